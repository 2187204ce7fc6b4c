//! Checkpoints in shards, and indices that do not fit them or lead elsewhere.

use std::fs;
use std::path::Path;

use graft_models::safetensors::{IndexProblem, TensorView, pt_metadata, write, write_checkpoint};
use graft_models::{Checkpoint, Error, SafetensorsFile};
use graft_tensor::DType;

/// Two shards `s1` (tensor a) and `s2` (tensors b, c), and an index with this text.
fn sharded(index: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let t = |name| (name, DType::F32, &[2usize][..], &[7u8; 8][..]);
    write(dir.path().join("s1.safetensors"), &pt_metadata(), [t("a")]).unwrap();
    write(
        dir.path().join("s2.safetensors"),
        &pt_metadata(),
        [t("b"), t("c")],
    )
    .unwrap();
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    dir
}

fn index_error(index: &str) -> Error {
    let dir = sharded(index);
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(
        error.to_string().contains("model.safetensors.index.json"),
        "{error}"
    );
    error
}

fn index_problem(index: &str) -> IndexProblem {
    match index_error(index) {
        Error::Index { problem, .. } => problem,
        other => panic!("{other}"),
    }
}

const GOOD: &str = r#"{"metadata":{"total_size":24},"weight_map":{"a":"s1.safetensors","b":"s2.safetensors","c":"s2.safetensors"}}"#;

#[test]
fn shards_are_one_checkpoint() {
    for index in [
        GOOD.to_string(),
        GOOD.replace("24", "24.0"),
        GOOD.replace("\"total_size\":24", ""),
        GOOD.replace("\"metadata\":{\"total_size\":24},", ""),
    ] {
        let dir = sharded(&index);
        let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.len(), 3);
        assert_eq!(checkpoint.get("c").unwrap().shape, [2]);
        let mut bytes = [0; 8];
        checkpoint.read_into("b", &mut bytes).unwrap();
        assert_eq!(bytes, [7; 8]);
        assert!(checkpoint.read_into("d", &mut bytes).is_err());
        let mut names = Vec::new();
        checkpoint
            .read_each(&mut |t| t.name != "b", &mut |t, _| {
                names.push(t.name.clone());
                Ok(())
            })
            .unwrap();
        assert_eq!(names, ["a", "c"]);
    }
}

#[test]
fn indices_are_strict_both_ways() {
    let strings = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
    assert_eq!(
        index_problem(&GOOD.replace("\"c\"", "\"x\"")),
        IndexProblem::NotInShard {
            shard: "s2.safetensors".to_string(),
            tensors: strings(&["x"])
        }
    );
    assert_eq!(
        index_problem(&GOOD.replace(",\"c\":\"s2.safetensors\"", "")),
        IndexProblem::NotInIndex {
            shard: "s2.safetensors".to_string(),
            tensors: strings(&["c"])
        }
    );
    assert_eq!(
        index_problem(&GOOD.replace("24", "25")),
        IndexProblem::TotalSize {
            stated: 25,
            actual: 24
        }
    );
    assert_eq!(
        index_problem(&GOOD.replace("\"s1.", "\"s3.")),
        IndexProblem::MissingShard {
            shard: "s3.safetensors".to_string(),
            tensor: "a".to_string()
        }
    );
    for bad in [
        "{}",
        r#"{"weight_map":{}}"#,
        r#"{"weight_map":[]}"#,
        r#"{"weight_map":{"a":1}}"#,
    ] {
        assert!(
            matches!(index_problem(bad), IndexProblem::Malformed { .. }),
            "{bad}"
        );
    }
    assert!(matches!(
        index_problem(&GOOD.replace("24", "-1")),
        IndexProblem::Malformed { .. }
    ));
    assert!(matches!(
        index_problem(&GOOD.replace("{\"total_size\":24}", "3")),
        IndexProblem::Malformed { .. }
    ));
    let twice = GOOD.replace("\"b\":", "\"a\":\"s1.safetensors\",\"b\":");
    assert!(index_error(&twice).to_string().contains("`a` occurs twice"));
    assert!(matches!(index_error("not json"), Error::Json { .. }));
}

#[test]
fn shard_names_stay_in_the_directory() {
    for name in [
        "../s1.safetensors",
        "/etc/s1.safetensors",
        "sub/s1.safetensors",
        "..\\\\s1.safetensors",
        "C:s1.safetensors",
        "..",
        ".safetensors",
        "s1.bin",
        "",
        "s1.safetensors\\u0000.safetensors",
    ] {
        let error = index_error(&GOOD.replace("s1.safetensors", name));
        assert!(
            matches!(&error, Error::UnsafePath { .. }),
            "{name}: {error}"
        );
    }
}

#[test]
fn checkpoints_in_shards_round_trip() {
    let data: Vec<u8> = (0..=255).collect();
    let views: Vec<TensorView> = ["e", "d", "c", "b", "a"]
        .iter()
        .enumerate()
        .map(|(i, name)| TensorView {
            name,
            dtype: DType::U8,
            shape: &[50],
            data: &data[i * 50..i * 50 + 50],
        })
        .collect();
    let shard_files = |dir: &Path| {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    for (max, files) in [(1000, 1), (250, 1), (249, 3), (100, 4), (10, 6)] {
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path(), &pt_metadata(), views.iter().copied(), max).unwrap();
        let names = shard_files(dir.path());
        assert_eq!(names.len(), files, "{max}: {names:?}");
        if files > 1 {
            assert_eq!(
                names[0],
                format!("model-00001-of-{:05}.safetensors", files - 1)
            );
        }
        let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.metadata(), Some(&pt_metadata()));
        for view in &views {
            let mut bytes = [0; 50];
            checkpoint.read_into(view.name, &mut bytes).unwrap();
            assert_eq!(bytes, view.data);
        }
        assert_eq!(checkpoint.len(), 5);
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(
        write_checkpoint(
            dir.path(),
            &pt_metadata(),
            [views[0], views[1], views[0]],
            60
        )
        .is_err()
    );
    assert!(shard_files(dir.path()).is_empty());
    write_checkpoint(dir.path(), &pt_metadata(), Vec::<TensorView>::new(), 60).unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap().is_empty());
}

#[test]
fn directories_without_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Checkpoint::open(dir.path()),
        Err(Error::MissingFile { .. })
    ));
    fs::write(dir.path().join("pytorch_model.bin"), b"\x80\x02.").unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("pickle") && error.contains("safe_serialization"),
        "{error}"
    );
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(Checkpoint::open(dir.path()).is_err());
    assert!(Checkpoint::open(dir.path().join("nowhere")).is_err());
    assert!(SafetensorsFile::open(dir.path()).is_err());
    assert!(
        SafetensorsFile::open(dir.path().join("nowhere"))
            .unwrap_err()
            .to_string()
            .contains("nowhere")
    );
}
