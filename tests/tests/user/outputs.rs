//! Outputs replace nothing but what they are meant to.

use graft_tests::fixture;
use graft_tests::runs::{Task, language_model, snapshot};

use crate::TRAINER;

fn trained() -> Task {
    let task = Task::new(24, 6);
    TRAINER.succeeds(task.train(&fixture("tiny-bert"), "run", &["--strategy", "head"]));
    task
}

#[test]
fn a_run_does_not_replace_what_a_user_put_into_an_earlier_one() {
    let task = trained();
    std::fs::write(task.path("run").join("notes.md"), "mine").unwrap();
    let before = snapshot(&task.path("run"));
    let again = task.train(&fixture("tiny-bert"), "run", &["--strategy", "head"]);
    let said = TRAINER.refuses(&again);
    assert!(said.contains("`notes.md`, which no run wrote"), "{said}");
    assert!(said.contains("move that elsewhere"), "{said}");
    assert_eq!(snapshot(&task.path("run")), before);
    std::fs::remove_file(task.path("run").join("notes.md")).unwrap();
    TRAINER.succeeds(&again);
}

#[test]
fn a_merge_does_not_replace_what_a_user_put_into_an_earlier_one() {
    let task = Task::new(24, 6);
    TRAINER.succeeds(task.train(&fixture("tiny-bert"), "run", &["--strategy", "lora"]));
    let (run, out) = (task.text("run"), task.text("merged"));
    let merge = ["merge", "--model", &run, "--out", &out];
    TRAINER.succeeds(merge);
    TRAINER.succeeds(merge);
    std::fs::write(task.path("merged").join("card.txt"), "mine").unwrap();
    let said = TRAINER.refuses(merge);
    assert!(said.contains("`card.txt`, which no merge wrote"), "{said}");
    assert!(task.path("merged").join("card.txt").is_file());
}

#[test]
fn predictions_do_not_replace_the_texts_that_they_are_made_of() {
    let task = trained();
    let (run, data) = (task.text("run"), task.text("eval.jsonl"));
    let before = std::fs::read(&data).unwrap();
    let link = task.text("link.jsonl");
    std::os::unix::fs::symlink(&data, &link).unwrap();
    for out in [&data, &link] {
        let said = TRAINER.refuses(["predict", "--model", &run, "--data", &data, "--out", out]);
        assert!(said.contains("--out: it would replace"), "{said}");
    }
    assert_eq!(std::fs::read(&data).unwrap(), before);
    // Whatever else is wrong with an output is said before anything is computed, the model not even being there.
    let nowhere = task.text("nowhere/labels.jsonl");
    let folder = task.text("run");
    for (out, said) in [
        (&nowhere, "there is no directory"),
        (&folder, "is a directory"),
    ] {
        let found = TRAINER.refuses(["predict", "--model", "none", "--data", &data, "--out", out]);
        assert!(found.contains("--out: ") && found.contains(said), "{found}");
    }
}

#[test]
fn continuations_do_not_replace_their_prompts() {
    let task = Task::new(6, 2);
    language_model(&task.path("gpt"), "tiny-gpt2");
    let prompts = task.text("prompts.jsonl");
    std::fs::write(&prompts, "{\"prompt\": \"the\"}\n").unwrap();
    let model = task.text("gpt");
    let arguments = [
        "generate",
        "--model",
        &model,
        "--prompts",
        &prompts,
        "--out",
        &prompts,
    ];
    let said = TRAINER.refuses(arguments);
    assert!(said.contains("--out: it would replace"), "{said}");
    assert_eq!(
        std::fs::read_to_string(&prompts).unwrap(),
        "{\"prompt\": \"the\"}\n"
    );
}

#[test]
fn what_an_earlier_run_left_is_not_said_to_be_reached_by_one_that_did_not_begin() {
    let task = Task::new(24, 6);
    let base = [
        "--strategy",
        "full",
        "--epochs",
        "3",
        "--checkpoint",
        "1 steps",
    ];
    let mut stopped = TRAINER
        .command(task.train(&fixture("tiny-bert"), "run", &base))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let checkpoint = task.path(".run.graft-new").join("checkpoint.safetensors");
    while !checkpoint.is_file() && stopped.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    stopped.kill().unwrap();
    stopped.wait().unwrap();
    assert!(checkpoint.is_file(), "the run ended before it was killed");
    for (model, what) in [
        (fixture("tiny-bert"), "a run of this name was stopped"),
        (task.path("none"), "no model at"),
    ] {
        let said = TRAINER.refuses(task.train(&model, "run", &base));
        assert!(said.contains(what), "{said}");
        assert!(!said.contains("what was reached is kept"), "{said}");
    }
    // A restart that cannot begin forgets nothing.
    let none = ["--restart", "--set", "data.text=none"];
    let said =
        TRAINER.refuses(task.train(&fixture("tiny-bert"), "run", &[&base[..], &none].concat()));
    assert!(said.contains("the column `none` is missing"), "{said}");
    TRAINER.succeeds(["resume", &task.text("run")]);
}
