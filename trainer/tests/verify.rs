//! `trainer verify` on a run directory, whole and tampered with.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use graft_models::safetensors::{SINGLE_FILE, SafetensorsFile, pt_metadata, write};
use graft_tensor::DType;
use graft_trainer::certificate::{Certificate, TensorEntry, sha256_hex};
use graft_trainer::config::{RunConfig, Settings};
use graft_trainer::run_dir::{CERTIFICATE_FILE, CONFIG_FILE, RunDir};
use graft_trainer::verify::hash_tensors;

const FROZEN: &str = "bert.embeddings.word_embeddings.weight";
const TRAINED: &str = "classifier.weight";
const STILL: &str = "classifier.bias";

/// A run of one frozen tensor, one that was trained and one that was trained and did not move.
fn make_run(dir: &Path) {
    let mut settings = Settings::new();
    settings.flag("model.path", "--model", "/models/bert");
    settings.flag("data.train", "--train", "/data/train.csv");
    settings.flag("output.dir", "--out", dir.to_str().unwrap());
    let run = RunDir::create(&RunConfig::resolve(settings).unwrap()).unwrap();
    let tensors: [(&str, DType, &[usize], &[u8]); 3] = [
        (FROZEN, DType::F32, &[2, 2], &[7; 16]),
        (TRAINED, DType::Bf16, &[3], &[1, 2, 3, 4, 5, 6]),
        (STILL, DType::F32, &[1], &[0; 4]),
    ];
    write(run.path().join(SINGLE_FILE), &pt_metadata(), tensors).unwrap();
    let entries: Vec<TensorEntry> = hash_tensors(run.path())
        .unwrap()
        .into_iter()
        .map(|(name, found)| TensorEntry {
            trainable: name != FROZEN,
            before: if name == TRAINED {
                sha256_hex(b"initial")
            } else {
                found.sha256.clone()
            },
            after: found.sha256,
            dtype: found.dtype,
            shape: found.shape,
            name,
        })
        .collect();
    let certificate = Certificate::new(
        "/models/bert".into(),
        run.config_sha256().to_owned(),
        entries,
    );
    run.commit(&certificate).unwrap();
}

/// Exit code, standard output and standard error of `trainer verify`.
fn verify(run: &Path) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_trainer"))
        .arg("verify")
        .arg(run)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Flips one bit of a tensor's bytes in the model file.
fn flip(run: &Path, tensor: &str, byte: u64, bit: u8) {
    let path = run.join(SINGLE_FILE);
    let start = SafetensorsFile::open(&path)
        .unwrap()
        .get(tensor)
        .unwrap()
        .range
        .start;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[(start + byte) as usize] ^= 1 << bit;
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn a_run_passes_and_one_flipped_bit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    make_run(&run);
    let (code, said, _) = verify(&run);
    assert_eq!(code, 0);
    assert!(
        said.contains("1 frozen tensors") && said.contains("2 trained tensors"),
        "{said}"
    );
    assert!(said.contains(&format!("did not move: `{STILL}`")), "{said}");

    for (tensor, byte, bit, want) in [
        (
            FROZEN,
            0,
            0,
            "frozen tensor `bert.embeddings.word_embeddings.weight` differs from before",
        ),
        (
            FROZEN,
            15,
            7,
            "frozen tensor `bert.embeddings.word_embeddings.weight` differs from before",
        ),
        (
            TRAINED,
            5,
            3,
            "trained tensor `classifier.weight` differs from the end",
        ),
        (
            STILL,
            0,
            0,
            "trained tensor `classifier.bias` differs from the end",
        ),
    ] {
        flip(&run, tensor, byte, bit);
        let (code, out, said) = verify(&run);
        assert_eq!(code, 1);
        assert!(out.is_empty() && said.contains(want), "{said}");
        assert_eq!(said.matches(" tensor `").count(), 1, "{said}");
        flip(&run, tensor, byte, bit);
    }
    assert_eq!(verify(&run).0, 0);
}

#[test]
fn tensors_that_went_came_or_changed_form_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    make_run(&run);
    let rewrite = |tensors: &[(&str, DType, &[usize], &[u8])]| {
        write(
            run.join(SINGLE_FILE),
            &BTreeMap::new(),
            tensors.iter().copied(),
        )
        .unwrap();
    };
    rewrite(&[
        (FROZEN, DType::F32, &[4], &[7; 16]),
        (TRAINED, DType::F16, &[3], &[1, 2, 3, 4, 5, 6]),
        ("spare", DType::F32, &[1], &[0; 4]),
    ]);
    let (code, _, said) = verify(&run);
    assert_eq!(code, 1);
    for want in [
        "tensor `bert.embeddings.word_embeddings.weight` is F32 [4], certified as F32 [2, 2]",
        "tensor `classifier.weight` is F16 [3], certified as BF16 [3]",
        "tensor `classifier.bias` is certified but missing",
        "tensor `spare` is in the model but not certified",
    ] {
        assert!(said.contains(want), "{want}: {said}");
    }
}

#[test]
fn what_cannot_be_checked_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let (code, _, said) = verify(&run);
    assert_eq!(code, 1);
    assert!(said.contains("certificate.json: cannot read"), "{said}");

    make_run(&run);
    let config = run.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("epochs = 3", "epochs = 4")).unwrap();
    let (code, _, said) = verify(&run);
    assert!(
        code == 1 && said.contains("the resolved configuration differs"),
        "{said}"
    );
    std::fs::write(&config, text).unwrap();

    let model = std::fs::read(run.join(SINGLE_FILE)).unwrap();
    std::fs::write(run.join(SINGLE_FILE), &model[..model.len() - 1]).unwrap();
    let (code, _, said) = verify(&run);
    assert!(
        code == 1 && said.contains("model.safetensors") && !said.contains("panicked"),
        "{said}"
    );
    std::fs::remove_file(run.join(SINGLE_FILE)).unwrap();
    assert_eq!(verify(&run).0, 1);

    std::fs::write(run.join(CERTIFICATE_FILE), "{\"format\": ").unwrap();
    let (code, _, said) = verify(&run);
    assert!(code == 1 && said.contains("not a certificate"), "{said}");
}
