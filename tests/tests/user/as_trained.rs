//! What a run says of its model, `eval` and `predict` say of it too.

use std::path::Path;

use graft_tests::fixture;
use graft_tests::runs::{Task, language_model, records};
use serde_json::Value;

use crate::TRAINER;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn loss(run: &Path, data: &str, more: &[&str]) -> f64 {
    let base = ["eval", "--json", "--data", data, "--model"];
    let arguments = [&base[..], &[run.to_str().unwrap()], more].concat();
    json(&TRAINER.succeeds(arguments).out)["loss"]
        .as_f64()
        .unwrap()
}

/// Of the kept epoch.
fn loss_of_run(run: &Path) -> f64 {
    let best = records(run, "eval")
        .into_iter()
        .rfind(|r| r["best"] == true);
    best.unwrap()["loss"].as_f64().unwrap()
}

#[test]
fn texts_are_cut_where_the_run_cut_them() {
    let task = Task::new(24, 24);
    let data = task.text("eval.jsonl");
    for strategy in ["last:1", "lora"] {
        let more = ["--strategy", strategy, "--max-length", "4", "--epochs", "2"];
        TRAINER.succeeds(task.train(&fixture("tiny-bert"), strategy, &more));
        let run = task.path(strategy);
        let trained = loss_of_run(&run);
        let same = |found: f64| (found - trained).abs() < 1e-6 * trained;
        assert!(same(loss(&run, &data, &[])), "{strategy}: {trained}");
        // The texts are longer than that, or this would say nothing.
        assert!(
            !same(loss(&run, &data, &["--max-length", "12"])),
            "{strategy}"
        );
        let model = run.to_str().unwrap();
        let predicted = |more: &[&str]| {
            let base = ["predict", "--logits", "--data", &data, "--model", model];
            TRAINER.succeeds([&base[..], more].concat()).out
        };
        assert_eq!(predicted(&[]), predicted(&["--max-length", "4"]));
        assert_ne!(predicted(&[]), predicted(&["--max-length", "12"]));
    }
}

#[test]
fn documents_are_cut_where_the_run_cut_them() {
    let task = Task::new(12, 6);
    language_model(&task.path("gpt"), "tiny-gpt2");
    let more = ["--task", "clm", "--max-length", "7", "--epochs", "1"];
    TRAINER.succeeds(task.train(&task.path("gpt"), "run", &more));
    let (run, data) = (task.path("run"), task.text("eval.jsonl"));
    let trained = loss_of_run(&run);
    let same = |found: f64| (found - trained).abs() < 1e-6 * trained;
    assert!(same(loss(&run, &data, &[])), "{trained}");
    assert!(!same(loss(&run, &data, &["--max-length", "30"])));
}
