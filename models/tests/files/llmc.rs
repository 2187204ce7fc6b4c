//! llm.c's GPT-2 checkpoints, against what numpy wrote under GPT-2's names.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use graft_models::safetensors::FileDtype;
use graft_models::{Error, ModelSource, SafetensorsFile, llmc};
use proptest::prelude::*;
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures/llmc")
        .join(name)
}

#[test]
fn tensors_have_gpt2s_names_and_layout() {
    for (kind, dtype) in [("f32", FileDtype::F32), ("bf16", FileDtype::Bf16)] {
        let (header, mut checkpoint) = llmc::open(fixture(&format!("{kind}.bin"))).unwrap();
        assert_eq!(
            header,
            llmc::LlmcHeader {
                dtype,
                max_seq_len: 3,
                vocab_size: 5,
                num_layers: 2,
                num_heads: 2,
                channels: 4,
                padded_vocab_size: 8,
            }
        );
        let mut expected = SafetensorsFile::open(fixture(&format!("{kind}.safetensors"))).unwrap();
        assert_eq!(checkpoint.len(), 2 + 2 * 12 + 2);
        assert_eq!(checkpoint.len(), expected.tensors().len());
        let mut seen = 0;
        checkpoint
            .read_each(&mut |_| true, &mut |info, bytes| {
                let same = expected.get(&info.name).unwrap();
                assert_eq!(
                    (info.dtype, &info.shape),
                    (dtype, &same.shape),
                    "{}",
                    info.name
                );
                let mut theirs = vec![0; bytes.len()];
                expected.read_into(&info.name, &mut theirs).unwrap();
                assert_eq!(bytes, theirs, "{}", info.name);
                seen += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, checkpoint.len());
    }
}

#[test]
fn the_file_is_a_model_with_a_config() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gpt2_124M.bin");
    fs::copy(fixture("bf16.bin"), &path).unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    // What lies beside it does not replace what the file says.
    fs::write(dir.path().join("config.json"), "[]").unwrap();
    let source = ModelSource::resolve(path.to_str().unwrap()).unwrap();
    let config: Value =
        serde_json::from_slice(&source.read_file("config.json").unwrap().unwrap()).unwrap();
    for (key, value) in [
        ("model_type", json!("gpt2")),
        ("architectures", json!(["GPT2LMHeadModel"])),
        ("n_layer", json!(2)),
        ("n_head", json!(2)),
        ("n_embd", json!(4)),
        ("n_positions", json!(3)),
        ("vocab_size", json!(5)),
        ("activation_function", json!("gelu_new")),
        ("torch_dtype", json!("bfloat16")),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(source.read_file("tokenizer.json").unwrap().unwrap(), b"{}");
    assert_eq!(source.read_file("vocab.json").unwrap(), None);
    assert!(matches!(
        source.read_file("../x"),
        Err(Error::UnsafePath { .. })
    ));
    assert_eq!(source.checkpoint().unwrap().len(), 28);
    assert_eq!(source.to_string(), path.display().to_string());
    // Another .bin is no model by itself.
    fs::write(&path, "something else").unwrap();
    let error = ModelSource::resolve(path.to_str().unwrap())
        .unwrap_err()
        .to_string();
    assert!(error.contains("single file"), "{error}");
}

fn refused(bytes: Vec<u8>) -> String {
    match llmc::from_reader("x.bin", Cursor::new(bytes)) {
        Err(error @ Error::Weights { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn headers_that_lie() {
    let good = fs::read(fixture("f32.bin")).unwrap();
    let with = |field: usize, value: i32| {
        let mut bad = good.clone();
        bad[4 * field..4 * field + 4].copy_from_slice(&value.to_le_bytes());
        refused(bad)
    };
    assert!(
        with(0, 20240327).contains("offset 0: the number 20240327 where llm.c writes 20240326")
    );
    for version in [0, 1, 4, -3] {
        let message = with(1, version);
        assert!(
            message.contains(&format!(
                "offset 4: version {version}, expected 3 (f32) or 5 (bf16)"
            )),
            "{message}"
        );
    }
    // The other element type: half the bytes.
    assert!(with(1, 5).contains("the header's sizes need 2104 bytes in all, the file has 3184"));
    for field in 2..8 {
        for value in [0, -1, i32::MIN, i32::MAX] {
            let message = with(field, value);
            assert!(
                message.contains(&format!("offset {}: ", 4 * field)),
                "{message}"
            );
        }
    }
    assert!(with(7, 4).contains("padded_vocab_size is 4, less than the vocab_size 5"));
    assert!(with(5, 3).contains("4 channels are no multiple of 3 heads"));
    assert!(with(4, 3).contains("in all"));
    // The largest that the header may say: refused by arithmetic alone.
    let mut bad = good.clone();
    for (field, value) in [
        (2, 1 << 20),
        (3, 1 << 20),
        (4, 4096),
        (5, 1),
        (6, 1 << 20),
        (7, 1 << 20),
    ] {
        bad[4 * field..4 * field + 4].copy_from_slice(&i32::to_le_bytes(value));
    }
    assert!(refused(bad).contains("in all"));
    for len in (0..good.len())
        .step_by(7)
        .chain([1023, 1024, good.len() - 1])
    {
        let message = refused(good[..len].to_vec());
        let part = if len < 1024 {
            "the header takes 1024"
        } else {
            "in all"
        };
        assert!(message.contains(part), "{message}");
    }
    assert!(refused([&good[..], &[0]].concat()).contains("in all"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_never_panic(
        changes in prop::collection::vec((0usize..40, any::<u8>()), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        noise in prop::option::of(prop::collection::vec(any::<u8>(), 0..2000)),
    ) {
        let mut bytes = noise.unwrap_or_else(|| fs::read(fixture("bf16.bin")).unwrap());
        for (at, byte) in changes {
            if let Some(b) = bytes.get_mut(at) {
                *b = byte;
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        let len = bytes.len() as u64;
        if let Ok((_, mut checkpoint)) = llmc::from_reader("x", Cursor::new(bytes)) {
            checkpoint.read_each(&mut |_| true, &mut |info, _| {
                assert!(info.byte_len() <= len);
                Ok(())
            }).unwrap();
        }
    }
}
