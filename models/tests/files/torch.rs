//! Files of `torch.save`, against the same tensors as safetensors; where they are looked for.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use graft_models::safetensors::{FileDtype, pt_metadata, write};
use graft_models::{Checkpoint, Error, ModelSource, SafetensorsFile, TensorInfo, torch};
use graft_tensor::DType;
use serde_json::json;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures/torch")
        .join(name)
}

/// Compares every tensor of a checkpoint, read by name and in one pass, with the same of a safetensors file.
fn same(checkpoint: &mut Checkpoint, expected: &mut SafetensorsFile, but: &[&str]) {
    let infos: Vec<TensorInfo> = expected
        .tensors()
        .filter(|t| !but.contains(&t.name.as_str()))
        .cloned()
        .collect();
    assert_eq!(checkpoint.len(), infos.len());
    let mut read = 0;
    for info in &infos {
        let found = checkpoint.get(&info.name).unwrap();
        assert_eq!(
            (found.dtype, &found.shape),
            (info.dtype, &info.shape),
            "{}",
            info.name
        );
        assert_eq!(found.byte_len(), info.byte_len(), "{}", info.name);
        let mut bytes = vec![0; info.byte_len() as usize];
        match info.dtype.dtype() {
            Some(_) => {
                let mut theirs = bytes.clone();
                checkpoint.read_into(&info.name, &mut bytes).unwrap();
                expected.read_into(&info.name, &mut theirs).unwrap();
                assert_eq!(bytes, theirs, "{}", info.name);
                read += 1;
            }
            None => {
                let error = checkpoint.read_into(&info.name, &mut bytes).unwrap_err();
                let text = error.to_string();
                assert!(
                    text.contains(info.dtype.name()) && text.contains(&info.name),
                    "{text}"
                );
            }
        }
    }
    let mut each = 0;
    let mut wanted = |t: &TensorInfo| t.dtype.dtype().is_some();
    checkpoint
        .read_each(&mut wanted, &mut |info, bytes| {
            let mut theirs = vec![0; bytes.len()];
            expected.read_into(&info.name, &mut theirs).unwrap();
            assert_eq!(bytes, theirs, "{}", info.name);
            each += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(each, read);
}

#[test]
fn both_formats_hold_what_torch_put_in() {
    let mut expected = SafetensorsFile::open(fixture("expected.safetensors")).unwrap();
    let types: Vec<FileDtype> = expected.tensors().map(|t| t.dtype).collect();
    for dtype in [
        FileDtype::F64,
        FileDtype::F32,
        FileDtype::F16,
        FileDtype::Bf16,
        FileDtype::I64,
        FileDtype::Bool,
        FileDtype::U8,
        FileDtype::U16,
        FileDtype::F8E4M3,
    ] {
        assert!(types.contains(&dtype), "{dtype}");
    }
    let mut zip = torch::open(fixture("zip.bin")).unwrap();
    same(&mut zip, &mut expected, &[]);
    let new = ["of.uint16", "of.uint32", "of.uint64", "of.float8_e4m3fn"];
    let mut legacy = torch::open(fixture("legacy.bin")).unwrap();
    same(&mut legacy, &mut expected, &new);
}

#[test]
fn a_modules_state() {
    let mut expected = SafetensorsFile::open(fixture("module.safetensors")).unwrap();
    let mut state = torch::open(fixture("module.bin")).unwrap();
    same(&mut state, &mut expected, &[]);
    let error = state
        .read_into("0.weigth", &mut [0; 24])
        .unwrap_err()
        .to_string();
    assert!(error.contains("nearest is `0.weight`"), "{error}");
    let error = state.read_into("0.weight", &mut [0; 23]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::ByteLength {
                expected: 24,
                found: 23,
                ..
            }
        ),
        "{error}"
    );
    assert!(state.metadata().unwrap().is_empty());
}

#[test]
fn what_is_no_dictionary_of_tensors() {
    let error = |name| torch::open(fixture(name)).unwrap_err().to_string();
    let nested = error("nested.bin");
    for part in [
        "`state_dict` holds a dictionary of 7",
        "`state_dict`, `epoch`",
        "state_dict() alone",
    ] {
        assert!(nested.contains(part), "{nested}");
    }
    let expanded = error("expanded.bin");
    assert!(
        expanded.contains("tensor `w`") && expanded.contains("more than once"),
        "{expanded}"
    );
    let object = error("object.bin");
    assert!(
        object.contains("GLOBAL asks for `torch.nn.modules.linear.Linear`"),
        "{object}"
    );
}

#[test]
fn errors_of_visitors_stop_the_pass() {
    let mut state = torch::open(fixture("module.bin")).unwrap();
    let mut calls = 0;
    let error = state
        .read_each(&mut |_| true, &mut |_, _| {
            calls += 1;
            Err(Error::Encode {
                reason: "stop".to_string(),
                help: "go".to_string(),
            })
        })
        .unwrap_err();
    assert!(matches!(error, Error::Encode { .. }) && calls == 1);
}

/// One tensor `w` of this value.
fn safetensors(path: &Path, value: f32) {
    write(
        path,
        &pt_metadata(),
        [("w", DType::F32, &[1usize][..], &value.to_le_bytes()[..])],
    )
    .unwrap();
}

#[test]
fn safetensors_go_first() {
    let dir = tempfile::tempdir().unwrap();
    let open = || ModelSource::directory(dir.path()).unwrap().checkpoint();
    let error = open().unwrap_err().to_string();
    assert!(
        error.contains("model.safetensors") && error.contains("pytorch_model.bin"),
        "{error}"
    );
    fs::copy(fixture("module.bin"), dir.path().join("pytorch_model.bin")).unwrap();
    let mut expected = SafetensorsFile::open(fixture("module.safetensors")).unwrap();
    same(&mut open().unwrap(), &mut expected, &[]);
    assert!(open().unwrap().name().ends_with("pytorch_model.bin"));
    safetensors(&dir.path().join("model.safetensors"), 1.0);
    assert_eq!(open().unwrap().len(), 1);
}

#[test]
fn shards_under_an_index() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::copy(
        fixture("module.bin"),
        at("pytorch_model-00001-of-00002.bin"),
    )
    .unwrap();
    fs::copy(fixture("zip.bin"), at("pytorch_model-00002-of-00002.bin")).unwrap();
    let mut map = serde_json::Map::new();
    for (n, name) in [(1, "module.safetensors"), (2, "expected.safetensors")] {
        for tensor in SafetensorsFile::open(fixture(name)).unwrap().tensors() {
            map.insert(
                tensor.name.clone(),
                json!(format!("pytorch_model-0000{n}-of-00002.bin")),
            );
        }
    }
    let index = |map: &serde_json::Map<String, serde_json::Value>| {
        // Tied tensors are counted once by the writer: nothing follows from the total.
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        fs::write(at("pytorch_model.bin.index.json"), index.to_string()).unwrap();
        Checkpoint::open(dir.path())
    };
    let mut checkpoint = index(&map).unwrap();
    assert_eq!(checkpoint.len(), map.len());
    for (tensor, file) in [
        ("0.weight", "module.safetensors"),
        ("permuted", "expected.safetensors"),
    ] {
        let mut expected = SafetensorsFile::open(fixture(file)).unwrap();
        let mut bytes = vec![0; expected.get(tensor).unwrap().byte_len() as usize];
        let mut theirs = bytes.clone();
        checkpoint.read_into(tensor, &mut bytes).unwrap();
        expected.read_into(tensor, &mut theirs).unwrap();
        assert_eq!(bytes, theirs);
    }
    for (name, part) in [
        ("../pytorch_model.bin", "path separator"),
        ("weights.safetensors", "does not end in .bin"),
        (".bin", "begins with a dot"),
    ] {
        let mut bad = map.clone();
        bad.insert("0.weight".to_string(), json!(name));
        let error = index(&bad).unwrap_err();
        assert!(
            matches!(&error, Error::UnsafePath { .. }) && error.to_string().contains(part),
            "{error}"
        );
    }
    map.remove("0.weight");
    let error = index(&map).unwrap_err().to_string();
    assert!(error.contains("`0.weight`"), "{error}");
}

/// Inside a compressed wheel there is no seeking: everything comes in passes.
#[test]
fn in_a_wheel() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = SafetensorsFile::open(fixture("expected.safetensors")).unwrap();
    for method in [CompressionMethod::Deflated, CompressionMethod::Stored] {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().compression_method(method);
        for (name, bytes) in [
            ("m/config.json", b"{}".to_vec()),
            ("m/pytorch_model.bin", fs::read(fixture("zip.bin")).unwrap()),
        ] {
            zip.start_file(name, options).unwrap();
            zip.write_all(&bytes).unwrap();
        }
        let path = dir.path().join("m.whl");
        fs::write(&path, zip.finish().unwrap().into_inner()).unwrap();
        let source = ModelSource::resolve(path.to_str().unwrap()).unwrap();
        same(&mut source.checkpoint().unwrap(), &mut expected, &[]);
    }
}
