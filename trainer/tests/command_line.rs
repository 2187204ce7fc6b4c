//! The binary from outside: exit codes, what is said and where.

use std::path::Path;
use std::process::{Command, Output};

/// Runs the binary in `dir`.
fn trainer(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trainer"))
        .current_dir(dir)
        .args(arguments)
        .output()
        .expect("the binary starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Expects exit code 1, nothing on standard output, no panic; returns standard error.
fn refused(dir: &Path, arguments: &[&str]) -> String {
    let output = trainer(dir, arguments);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty());
    assert!(!said.contains("panicked"), "{said}");
    said
}

#[test]
fn a_printed_configuration_prints_itself() {
    let dir = tempfile::tempdir().unwrap();
    let flags = [
        "config",
        "--model",
        "m",
        "--train",
        "t.csv",
        "--eval",
        "e.csv",
        "--task",
        "classify",
        "--strategy",
        "last:2",
        "--out",
        "o",
        "--epochs",
        "2",
        "--max-tokens",
        "512",
        "--lr",
        "3e-4",
        "--seed",
        "7",
        "--dropout",
        "0.2",
        "--label-column",
        "gold",
        "--set",
        "optimizer.warmup=5",
    ];
    let first = trainer(dir.path(), &flags);
    assert_eq!(first.status.code(), Some(0), "{}", text(&first.stderr));
    let printed = text(&first.stdout);
    for line in [
        "max_tokens = 512",
        "lr = 0.0003",
        "name = \"last:2\"",
        "label = \"gold\"",
        "warmup = 5",
    ] {
        assert!(
            printed.contains(&format!("\n{line}\n")),
            "{line} in {printed}"
        );
    }
    let elsewhere = dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::write(elsewhere.join("run.toml"), &printed).unwrap();
    let second = trainer(&elsewhere, &["config", "run.toml"]);
    assert_eq!(text(&second.stdout), printed, "{}", text(&second.stderr));
}

#[test]
fn user_errors_exit_with_1_and_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("run.toml"),
        "[optimizer]\nlearning = 1\nlrr = 2\n",
    )
    .unwrap();
    std::fs::write(dir.path().join("bad.toml"), [0xff, 0xfe, 0x00]).unwrap();
    let said = refused(dir.path(), &["config", "run.toml"]);
    assert!(
        said.contains("run.toml:2: unknown key `optimizer.learning`"),
        "{said}"
    );
    assert!(said.contains("help: the keys of [optimizer] are"), "{said}");
    let said = refused(dir.path(), &["config", "nowhere.toml"]);
    assert!(said.contains("nowhere.toml: cannot read"), "{said}");
    let said = refused(dir.path(), &["config", "bad.toml"]);
    assert!(said.contains("bad.toml:1: the file is not UTF-8"), "{said}");
    let said = refused(dir.path(), &["config"]);
    assert!(
        said.contains("`model.path` is missing") && said.contains("--model DIR"),
        "{said}"
    );
    for (flag, value, want) in [
        (
            "--lr",
            "-1",
            "--lr: `optimizer.lr` is -1.0, expected a number above 0",
        ),
        (
            "--epochs",
            "0",
            "--epochs: `train.epochs` is 0, expected a whole number, 1 or more",
        ),
        (
            "--dropout",
            "1",
            "--dropout: `strategy.dropout` is 1.0, expected a number in [0, 1)",
        ),
        (
            "--strategy",
            "tail",
            "--strategy: `strategy.name` is \"tail\"",
        ),
        ("--seed", "-1", "--seed: `train.seed` is -1"),
        ("--set", "train.epoch=1", "did you mean `train.epochs`?"),
        (
            "--max-tokens",
            "8",
            "`train.max_tokens` and `train.batch_size` (from --batch-size)",
        ),
    ] {
        let said = refused(
            dir.path(),
            &[
                "config",
                "--model",
                "m",
                "--train",
                "t",
                "--out",
                "o",
                "--batch-size",
                "4",
                flag,
                value,
            ],
        );
        assert!(said.contains(want), "{flag} {value}: {said}");
    }
}

#[test]
fn usage_errors_exit_with_2_and_help_with_0() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        &["frobnicate"][..],
        &["config", "--colour"],
        &["config", "--lr", "fast"],
    ] {
        assert_eq!(
            trainer(dir.path(), arguments).status.code(),
            Some(2),
            "{arguments:?}"
        );
    }
    let help = trainer(dir.path(), &["config", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(text(&help.stdout).contains("--max-tokens"));
    let keys = trainer(dir.path(), &["config", "--keys"]);
    assert!(text(&keys.stdout).contains("\noptimizer.clip_norm "));
}
