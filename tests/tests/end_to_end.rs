//! Every strategy on every family, from data files to a certified run directory and back.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use graft_models::{Classifier, TokenBatch};
use graft_nn::Forward;
use graft_tensor::Memory;
use graft_tests::runs::{LABELS, Task, Trainer, flip_bit, records, snapshot};
use graft_tests::{fixture, json, tensors};
use graft_trainer::certificate::Certificate;
use graft_trainer::model::Model;
use serde_json::{Value, json};

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// What a family calls its parts, said apart from the library.
struct Family {
    fixture: &'static str,
    architecture: &'static str,
    head: &'static [&'static str],
    last_layer: &'static str,
}

const BERT: Family = Family {
    fixture: "tiny-bert",
    architecture: "BertForSequenceClassification",
    head: &["bert.pooler.", "classifier."],
    last_layer: "bert.encoder.layer.1.",
};
const ROBERTA: Family = Family {
    fixture: "tiny-roberta",
    architecture: "RobertaForSequenceClassification",
    head: &["classifier."],
    last_layer: "roberta.encoder.layer.1.",
};
const DISTILBERT: Family = Family {
    fixture: "tiny-distilbert",
    architecture: "DistilBertForSequenceClassification",
    head: &["pre_classifier.", "classifier."],
    last_layer: "distilbert.transformer.layer.1.",
};

impl Family {
    fn trains(&self, strategy: &str, tensor: &str) -> bool {
        strategy == "full"
            || self.head.iter().any(|part| tensor.starts_with(part))
            || strategy == "last:1" && tensor.starts_with(self.last_layer)
    }
}

#[test]
fn bert_learns() {
    all_strategies(&BERT);
}

#[test]
fn roberta_learns() {
    all_strategies(&ROBERTA);
}

#[test]
fn distilbert_learns() {
    all_strategies(&DISTILBERT);
}

fn all_strategies(family: &Family) {
    let task = Task::new(96, 48);
    for (strategy, epochs, lr) in [
        ("head", "20", "0.01"),
        ("last:1", "8", "0.005"),
        ("full", "6", "0.003"),
    ] {
        let model = fixture(family.fixture);
        let arguments = task.train(
            &model,
            "run",
            &[
                "--strategy",
                strategy,
                "--epochs",
                epochs,
                "--lr",
                lr,
                "--batch-size",
                "8",
                "--set",
                "optimizer.weight_decay=0.1",
                "--set",
                "optimizer.no_decay=false",
            ],
        );
        let said = TRAINER.succeeds(arguments);
        assert!(said.out.contains(strategy), "{}", said.out);
        let run = task.path("run");
        let context = format!("{} {strategy}", family.fixture);
        it_learned(&run, &context);
        the_directory_is_a_model(family, &run, &context);
        only_the_trained_moved(family, strategy, &run, &context);
        commands_agree(&task, &run, &context);
        tampering_is_named(family, strategy, &run, &context);
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn best_evaluation(run: &Path) -> Value {
    let evaluations = records(run, "eval");
    let best = evaluations.into_iter().rfind(|e| e["best"] == true);
    best.expect("the first evaluation is the best so far")
}

fn it_learned(run: &Path, context: &str) {
    let losses: Vec<f64> = records(run, "epoch")
        .iter()
        .map(|e| number(&e["loss"]))
        .collect();
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < 0.8 * first, "{context}: the loss goes {losses:.3?}");
    let best = best_evaluation(run);
    let (accuracy, majority) = (
        number(&best["accuracy"]),
        number(&best["baseline"]["accuracy"]),
    );
    assert_eq!(
        majority, 0.5,
        "{context}: half of the rows have the first label"
    );
    assert!(accuracy > majority + 0.2, "{context}: accuracy {accuracy}");
    let rows = number(&best["examples"]);
    assert_eq!(rows, 48.0);
}

fn the_directory_is_a_model(family: &Family, run: &Path, context: &str) {
    let files: Vec<String> = snapshot(run).into_keys().collect();
    let expected = [
        "certificate.json",
        "config.json",
        "config.resolved.toml",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(files, expected, "{context}");
    let config = json(&run.join("config.json"));
    assert_eq!(config["architectures"], json!([family.architecture]));
    assert_eq!(
        config["id2label"],
        json!({"0": LABELS[0], "1": LABELS[1], "2": LABELS[2]})
    );
    assert_eq!(config["label2id"], json!({"calm": 0, "loud": 1, "odd": 2}));
    let before = json(&fixture(family.fixture).join("config.json"));
    for (key, value) in before.as_object().unwrap() {
        if !["id2label", "label2id"].contains(&key.as_str()) {
            assert_eq!(&config[key], value, "{context}: `{key}` in config.json");
        }
    }
    let names = |path: &Path| -> BTreeMap<String, Vec<usize>> {
        tensors(path)
            .into_iter()
            .map(|(name, tensor)| (name, tensor.shape().to_vec()))
            .collect()
    };
    assert_eq!(
        names(&run.join("model.safetensors")),
        names(&fixture(family.fixture).join("model.safetensors")),
        "{context}"
    );
}

fn only_the_trained_moved(family: &Family, strategy: &str, run: &Path, context: &str) {
    let before = tensors(&fixture(family.fixture).join("model.safetensors"));
    let after = tensors(&run.join("model.safetensors"));
    let certificate = Certificate::read(&run.join("certificate.json")).unwrap();
    let certified: BTreeSet<&str> = certificate
        .tensors
        .iter()
        .map(|t| t.name.as_str())
        .collect();
    assert_eq!(
        certified,
        before.keys().map(String::as_str).collect(),
        "{context}"
    );
    for entry in &certificate.tensors {
        let name = &entry.name;
        let same = before[name].to_bytes().unwrap() == after[name].to_bytes().unwrap();
        let trained = family.trains(strategy, name);
        assert_eq!(
            entry.trainable, trained,
            "{context}: `{name}` in the certificate"
        );
        assert_eq!(
            same, !trained,
            "{context}: `{name}` against the file it came from"
        );
        assert_eq!(
            entry.before == entry.after,
            !trained,
            "{context}: hashes of `{name}`"
        );
    }
    let start = &records(run, "start")[0];
    let count: usize = before
        .iter()
        .filter(|(name, _)| family.trains(strategy, name))
        .map(|(_, tensor)| tensor.count())
        .sum();
    assert_eq!(start["trainable"], count, "{context}");
}

fn commands_agree(task: &Task, run: &Path, context: &str) {
    let (run, data) = (run.to_str().unwrap(), task.text("eval.jsonl"));
    let said = TRAINER.succeeds(["eval", "--model", run, "--data", &data, "--json"]);
    let found: Value = serde_json::from_str(&said.out).unwrap();
    let best = best_evaluation(Path::new(run));
    for key in ["accuracy", "macro_f1", "examples", "confusion"] {
        assert_eq!(found[key], best[key], "{context}: `{key}` of trainer eval");
    }
    // The last bit may go in a number's way through text.
    let distance = (number(&found["loss"]) - number(&best["loss"])).abs();
    assert!(
        distance < 1e-12,
        "{context}: the loss is off by {distance:e}"
    );

    let said = TRAINER.succeeds(["predict", "--model", run, "--data", &data, "--logits"]);
    let model = Model::trained(run, &Memory::cpu()).unwrap();
    let rows = std::fs::read_to_string(task.path("eval.jsonl")).unwrap();
    assert_eq!(said.out.lines().count(), rows.lines().count());
    let mut right = 0;
    for (line, row) in said.out.lines().zip(rows.lines()) {
        let (line, row): (Value, Value) = (
            serde_json::from_str(line).unwrap(),
            serde_json::from_str(row).unwrap(),
        );
        right += usize::from(line["label"] == row["label"]);
        let logits: Vec<f32> = line["logits"]
            .as_array()
            .unwrap()
            .iter()
            .map(|x| number(x) as f32)
            .collect();
        // One text at a time: its batch must not matter.
        let alone = logits_of(&model, row["text"].as_str().unwrap());
        assert_eq!(logits, alone, "{context}: logits of {row}");
        let top = (0..3)
            .rev()
            .max_by(|&a, &b| alone[a].total_cmp(&alone[b]))
            .unwrap();
        assert_eq!(line["label"], LABELS[top]);
        let sum: f64 = LABELS
            .iter()
            .map(|label| number(&line["probabilities"][label]))
            .sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }
    assert_eq!(right as f64 / 48.0, number(&best["accuracy"]), "{context}");
}

fn logits_of(model: &Model, text: &str) -> Vec<f32> {
    let encoding = model
        .tokenizer
        .encode(text, None, model.config.max_tokens())
        .unwrap();
    let mut f = Forward::evaluate(&model.parameters);
    let batch = TokenBatch::pack([&encoding]);
    let logits = Classifier::forward(&model.network, &mut f, &batch).unwrap();
    logits.value().to_vec().unwrap()
}

fn tampering_is_named(family: &Family, strategy: &str, run: &Path, context: &str) {
    let said = TRAINER.succeeds([Path::new("verify"), run]);
    assert!(said.out.contains("passed"), "{context}: {}", said.out);
    assert!(!said.out.contains("warning"), "{context}: {}", said.out);
    let file = run.join("model.safetensors");
    let names: BTreeSet<String> = tensors(&file).into_keys().collect();
    for trained in [false, true] {
        let Some(name) = names
            .iter()
            .find(|name| family.trains(strategy, name) == trained)
        else {
            assert_eq!(strategy, "full");
            continue;
        };
        flip_bit(&file, name);
        let said = TRAINER.refuses([Path::new("verify"), run]);
        let kind = if trained { "trained" } else { "frozen" };
        assert!(
            said.contains(&format!("{kind} tensor `{name}` differs")),
            "{context}: {said}"
        );
        flip_bit(&file, name);
    }
    TRAINER.succeeds([Path::new("verify"), run]);
}
