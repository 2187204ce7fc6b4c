//! Adapters in chat tuning and in the filling in of tokens: trained, verified, evaluated and merged.

use graft_tests::runs::records;
use graft_tests::tensors;
use serde_json::Value;

use crate::masked::{bench as encoder, train as fill_in};
use crate::{Bench, TRAINER};

const LORA: [&str; 8] = [
    "--strategy",
    "lora",
    "--rank",
    "4",
    "--targets",
    "all-linear",
    "--lr",
    "0.02",
];

/// The loss per token of a model on a file, as the task that the model was trained for.
fn loss(data: &str, model: &[&str]) -> f64 {
    let said = TRAINER.succeeds([&["eval", "--json", "--data", data], model].concat());
    let value: Value = serde_json::from_str(&said.out).unwrap();
    value["loss"].as_f64().unwrap()
}

/// A run learned, is what its certificate says, and computes the same beside its base as merged into it.
fn holds(bench: &Bench, run: &str, data: &str, task: &str) {
    let dir = bench.dir.path().join(run);
    assert!(!dir.join("model.safetensors").exists());
    let evals = records(&dir, "eval");
    let [first, last] = [0, evals.len() - 1].map(|i| evals[i]["loss"].as_f64().unwrap());
    assert!(last < 0.9 * first, "{evals:?}");
    let (base, run) = (bench.path("model"), bench.path(run));
    TRAINER.succeeds(["verify", &run]);
    let found = loss(data, &["--model", &run]);
    let best = evals.iter().rfind(|e| e["best"] == true).unwrap();
    assert!(
        (found - best["loss"].as_f64().unwrap()).abs() < 1e-6,
        "{found} {best}"
    );
    let beside = loss(data, &["--model", &base, "--adapter", &run]);
    assert_eq!(beside, found);
    let merged = format!("{run}-merged");
    TRAINER.succeeds(["merge", "--model", &run, "--out", &merged]);
    // The merged model is no run, so that the task must be named.
    let again = loss(data, &["--model", &merged, "--task", task]);
    assert!((again - found).abs() < 1e-4, "{again} {found}");
}

#[test]
fn a_chat_is_tuned_with_an_adapter_and_merged() {
    let bench = Bench::chat("tiny-llama");
    let data = bench.path("chat.jsonl");
    let more = ["--eval", &data, "--epochs", "6", "--seed", "3"];
    TRAINER.succeeds(bench.tune("run", &[&more[..], &LORA].concat()));
    holds(&bench, "run", &data, "chat");
    let run = bench.path("run");
    let ask = ["--chat", "--prompt", "2+2", "--max-new-tokens", "8"];
    let say = |model: &str| {
        TRAINER
            .succeeds([&["generate", "--model", model], &ask[..]].concat())
            .out
    };
    assert_eq!(say(&run), say(&format!("{run}-merged")));
}

#[test]
fn each_encoder_fills_in_with_an_adapter_and_is_merged() {
    for family in ["tiny-bert", "tiny-roberta", "tiny-distilbert"] {
        let bench = encoder(&format!("{family}-masked"), family);
        let data = bench.path("train.jsonl");
        let more = ["--eval", &data, "--epochs", "40", "--seed", "3"];
        TRAINER.succeeds(fill_in(&bench, "run", &[&more[..], &LORA].concat()));
        holds(&bench, "run", &data, "mlm");
    }
}

#[test]
fn a_new_head_is_kept_with_the_adapter_or_refused() {
    for family in ["tiny-bert", "tiny-roberta", "tiny-distilbert"] {
        let bench = encoder(family, family);
        let refused = TRAINER.refuses(fill_in(&bench, "run", &["--strategy", "lora"]));
        assert!(
            refused.contains("the checkpoint lacks") && refused.contains("`lora+head`"),
            "{refused}"
        );
        assert!(!bench.dir.path().join("run").exists());
        let data = bench.path("train.jsonl");
        let more = ["--eval", &data, "--epochs", "40", "--seed", "3"];
        let beside = ["--strategy", "lora+head", "--lr", "0.02"];
        TRAINER.succeeds(fill_in(&bench, "run", &[&more[..], &beside].concat()));
        holds(&bench, "run", &data, "mlm");
        let kept = tensors(
            &bench
                .dir
                .path()
                .join("run")
                .join("adapter_model.safetensors"),
        );
        let head = kept.keys().filter(|name| !name.contains("lora_"));
        assert_eq!(head.count(), 5, "{:?}", kept.keys());
    }
}
