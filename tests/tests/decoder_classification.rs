//! Classification with decoders, as a user runs it.

use std::path::{Path, PathBuf};

use graft_tests::runs::{LABELS, Task, Trainer, flip_bit, language_model, records, snapshot};
use graft_tests::{fixture, tensors};
use serde_json::Value;

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// A language model beside a task.
fn model(task: &Task, family: &str) -> PathBuf {
    let dir = task.path("model");
    language_model(&dir, family);
    dir
}

const QUICK: [&str; 6] = ["--epochs", "30", "--lr", "0.01", "--max-length", "40"];

fn accuracy(record: &Value) -> f64 {
    record["accuracy"].as_f64().unwrap()
}

#[test]
fn decoders_learn_to_classify_and_are_evaluated_predicted_with_and_verified() {
    for family in ["tiny-gpt2", "tiny-llama", "tiny-qwen3", "tiny-gemma2"] {
        let task = Task::new(120, 40);
        let dir = model(&task, family);
        let said = TRAINER.succeeds(task.train(&dir, "run", &QUICK));
        assert!(
            said.err.contains("new for this task: `score.weight`"),
            "{}",
            said.err
        );
        let run = task.text("run");
        let evals = records(&task.path("run"), "eval");
        let best = evals.iter().rfind(|e| e["best"] == true).unwrap();
        assert!(accuracy(best) > 0.9, "{family}: {best}");
        TRAINER.succeeds(["verify", &run]);
        let data = task.text("eval.jsonl");
        let eval = TRAINER
            .succeeds(["eval", "--json", "--model", &run, "--data", &data])
            .out;
        let eval: Value = serde_json::from_str(&eval).unwrap();
        assert_eq!(accuracy(&eval), accuracy(best));
        let said = TRAINER
            .succeeds(["predict", "--logits", "--model", &run, "--data", &data])
            .out;
        let rows: Vec<Value> = said
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        let truth = std::fs::read_to_string(&data).unwrap();
        let truth = truth
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap());
        let right = rows
            .iter()
            .zip(truth)
            .filter(|(row, t)| row["label"] == t["label"]);
        assert_eq!(right.count() as f64, accuracy(&eval) * 40.0);
        assert_eq!(rows[0]["logits"].as_array().unwrap().len(), 3);
        // As transformers names and needs it.
        let stored = tensors(&task.path("run").join("model.safetensors"));
        assert_eq!(**stored["score.weight"].shape(), [3, stored_width(family)]);
        assert!(!stored.keys().any(|name| name.starts_with("lm_head")));
        let config: Value = graft_tests::json(&task.path("run").join("config.json"));
        let class = config["architectures"][0].as_str().unwrap();
        assert!(class.ends_with("ForSequenceClassification"), "{class}");
        assert_eq!(config["id2label"]["1"], LABELS[1]);
        assert!(config["pad_token_id"].is_u64(), "{config}");
        // Trained again on the same labels, the head is kept.
        let said = TRAINER.succeeds(task.train(&task.path("run"), "again", &["--epochs", "1"]));
        assert!(!said.err.contains("new for this task"), "{}", said.err);
        let list = TRAINER
            .succeeds(["inspect", &run, "--strategy", "head"])
            .out;
        assert!(list.contains("3 labels"), "{list}");
        let trained: Vec<&str> = list.lines().filter(|l| l.ends_with("  train")).collect();
        assert_eq!(trained.len(), 1, "{list}");
        let said = TRAINER.refuses(["generate", "--model", &run, "--prompt", "a"]);
        assert!(said.contains("ForSequenceClassification"), "{said}");
        flip_bit(&task.path("run").join("model.safetensors"), "score.weight");
        assert!(TRAINER.refuses(["verify", &run]).contains("score.weight"));
    }
}

fn stored_width(family: &str) -> usize {
    let config = graft_tests::json(&fixture(family).join("config.json"));
    let width = config.get("hidden_size").or(config.get("n_embd"));
    width.and_then(Value::as_u64).unwrap() as usize
}

fn weights(dir: &Path) -> Vec<u8> {
    snapshot(dir)["model.safetensors"].clone()
}

#[test]
fn kept_outputs_of_frozen_layers_change_no_bit() {
    for (family, precision) in [
        ("tiny-gpt2", "f32"),
        ("tiny-llama", "f32"),
        ("tiny-gemma3", "bf16"),
    ] {
        let task = Task::new(60, 20);
        let dir = model(&task, family);
        for (strategy, rule) in [
            ("head", ""),
            ("last:1", ""),
            ("head", "train model.norm.*"),
            ("head", "train *ln_f*"),
        ] {
            // Families name their final norm differently.
            let fits = rule.is_empty() || rule.contains("ln_f") == (family == "tiny-gpt2");
            if !fits {
                continue;
            }
            let rules = format!("strategy.rules=[\"{rule}\"]");
            let run = |out: &str, cache: &str| {
                let cache = format!("train.cache={cache}");
                let mut more = vec![
                    "--strategy",
                    strategy,
                    "--epochs",
                    "3",
                    "--lr",
                    "0.01",
                    "--precision",
                    precision,
                    "--set",
                    &cache,
                ];
                // Behind its layers a decoder has no dropout.
                if strategy != "head" {
                    more.extend(["--dropout", "0.1"]);
                }
                if !rule.is_empty() {
                    more.extend(["--set", &rules]);
                }
                TRAINER.succeeds(task.train(&dir, out, &more))
            };
            let said = run("kept", "memory");
            assert!(
                said.out.contains("frozen outputs"),
                "{family} {strategy}: {}",
                said.out
            );
            run("anew", "off");
            let same = weights(&task.path("kept")) == weights(&task.path("anew"));
            assert!(same, "{family} {strategy} {rule}");
        }
    }
}

#[test]
fn a_frozen_trunk_outlives_the_run_and_is_known_again() {
    let task = Task::new(60, 20);
    let dir = model(&task, "tiny-llama");
    let cache = format!("train.cache_dir={}", task.text("cache"));
    let more = ["--strategy", "last:1", "--epochs", "2", "--set", &cache];
    TRAINER.succeeds(task.train(&dir, "first", &more));
    let files = || std::fs::read_dir(task.path("cache")).unwrap().count();
    assert_eq!(files(), 1);
    let first = std::fs::read(
        std::fs::read_dir(task.path("cache"))
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path(),
    )
    .unwrap();
    TRAINER.succeeds(task.train(&dir, "second", &more));
    assert_eq!(files(), 1, "the same layers have the same file");
    assert!(!first.is_empty());
    assert!(weights(&task.path("first")) == weights(&task.path("second")));
}

#[test]
fn strategies_freeze_what_they_say() {
    for family in ["tiny-gpt2", "tiny-mistral"] {
        let task = Task::new(30, 10);
        let dir = model(&task, family);
        let before = tensors(&dir.join("model.safetensors"));
        let moved = |strategy: &str| -> Vec<String> {
            let more = ["--strategy", strategy, "--epochs", "1", "--lr", "0.05"];
            TRAINER.succeeds(task.train(&dir, strategy, &more));
            TRAINER.succeeds(["verify", &task.text(strategy)]);
            let after = tensors(&task.path(strategy).join("model.safetensors"));
            let same = |name: &String| {
                before
                    .get(name)
                    .is_some_and(|t| t.to_bytes().unwrap() == after[name].to_bytes().unwrap())
            };
            let mut names: Vec<String> = after.keys().filter(|name| !same(name)).cloned().collect();
            names.sort();
            names
        };
        assert_eq!(moved("head"), ["score.weight"]);
        let last = moved("last:1");
        let top = |name: &String| {
            [".1.", "ln_f", "model.norm", "score"]
                .iter()
                .any(|part| name.contains(part))
        };
        assert!(last.len() > 8 && last.iter().all(top), "{last:?}");
        assert!(moved("full").len() > last.len() + 8);
    }
}

#[test]
fn what_cannot_be_classified_is_refused() {
    let task = Task::new(12, 6);
    let dir = model(&task, "tiny-gpt2");
    let language_model = dir.to_str().unwrap();
    let data = task.text("eval.jsonl");
    let said = TRAINER.refuses(["predict", "--model", language_model, "--data", &data]);
    assert!(
        said.contains("expected GPT2ForSequenceClassification"),
        "{said}"
    );
    let said = TRAINER.refuses([
        "eval",
        "--task",
        "classify",
        "--model",
        language_model,
        "--data",
        &data,
    ]);
    assert!(
        said.contains("train it for a classification task first"),
        "{said}"
    );
    // This tokenizer adds no token: nothing would be left of an empty text.
    let rows = "{\"text\": \"a\", \"label\": \"x\"}\n{\"text\": \"\", \"label\": \"y\"}\n";
    std::fs::write(task.path("train.jsonl"), rows).unwrap();
    let said = TRAINER.refuses(task.train(&dir, "out", &[]));
    assert!(said.contains("train.jsonl:2: the text is empty"), "{said}");
}

#[test]
fn a_decoder_classifies_with_an_adapter_and_is_merged() {
    for family in ["tiny-gpt2", "tiny-llama"] {
        let task = Task::new(120, 40);
        let base = model(&task, family);
        let more = [&QUICK[..], &["--strategy", "lora", "--rank", "4"]].concat();
        TRAINER.succeeds(task.train(&base, "run", &more));
        let evals = records(&task.path("run"), "eval");
        let best = evals.iter().rfind(|e| e["best"] == true).unwrap();
        assert!(accuracy(best) > 0.8, "{family}: {best}");
        assert!(!task.path("run").join("model.safetensors").exists());
        let kept = tensors(&task.path("run").join("adapter_model.safetensors"));
        assert!(
            kept.contains_key("base_model.model.score.weight"),
            "{:?}",
            kept.keys()
        );
        let (run, base) = (task.text("run"), base.to_str().unwrap().to_owned());
        TRAINER.succeeds(["verify", &run]);
        let (merged, data) = (task.text("merged"), task.text("eval.jsonl"));
        TRAINER.succeeds(["merge", "--model", &run, "--out", &merged]);
        let measured = |model: &[&str]| -> f64 {
            let eval = [&["eval", "--json", "--data", &data], model].concat();
            accuracy(&serde_json::from_str(&TRAINER.succeeds(eval).out).unwrap())
        };
        let found = measured(&["--model", &run]);
        assert_eq!(found, accuracy(best));
        assert_eq!(measured(&["--model", &merged]), found);
        assert_eq!(measured(&["--model", &base, "--adapter", &run]), found);
        // Labels of several adapters, and no language model.
        let beside = ["--model", &base, "--adapter", &run, "--data", &data];
        let said = TRAINER.succeeds([&["predict"], &beside[..]].concat()).out;
        assert_eq!(said.lines().count(), 40);
        assert!(
            said.lines()
                .all(|line| LABELS.iter().any(|l| line.contains(l)))
        );
    }
}

/// The layers below the lowest one with an adapter are frozen: what is kept of them changes no bit of the adapter.
#[test]
fn kept_outputs_below_an_adapter_change_no_bit() {
    let task = Task::new(60, 20);
    let base = model(&task, "tiny-llama");
    let train = |out: &str, cache: &str| {
        let common = [
            "--strategy",
            "lora",
            "--set",
            "adapter.layers=[1]",
            "--epochs",
            "3",
            "--max-length",
            "40",
        ];
        let cache = ["--set", cache];
        TRAINER.succeeds(task.train(&base, out, &[&common[..], &cache].concat()));
        snapshot(&task.path(out))["adapter_model.safetensors"].clone()
    };
    assert_eq!(
        train("kept", "train.cache=memory"),
        train("computed", "train.cache=off")
    );
}
