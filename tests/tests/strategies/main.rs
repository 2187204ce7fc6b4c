//! Strategies as a user runs them: what they train, when and how fast; what the audit of the first steps lets pass and
//! what it does not.

mod audit;
mod gradual;
mod rates;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use graft_models::Checkpoint;
use graft_tensor::Tensor;
use graft_tests::runs::{Task, Trainer, language_model};
use graft_tests::{ENCODERS, fixture, tensors};
use graft_trainer::certificate::Certificate;

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// Labelled texts, and documents for language models.
struct Bench {
    task: Task,
}

impl Bench {
    fn new() -> Bench {
        let task = Task::new(24, 12);
        let documents: String = (0..12)
            .map(|i| format!("{{\"text\": \"the lessee pays {i} before the {i}th day of May\"}}\n"))
            .collect();
        std::fs::write(task.path("documents.jsonl"), documents).unwrap();
        Bench { task }
    }

    /// The command line of a run of a family into the directory `out`.
    fn train(&self, family: &str, out: &str, more: &[&str]) -> Vec<String> {
        if ENCODERS.contains(&family) {
            return self.task.train(&fixture(family), out, more);
        }
        let model = self.task.path(family);
        if !model.exists() {
            language_model(&model, family);
        }
        let documents = self.task.text("documents.jsonl");
        let clm = ["train", "--task", "clm", "--max-length", "24"].map(str::to_owned);
        let (model, out) = (self.task.text(family), self.task.text(out));
        let rest = [
            "--model", &model, "--train", &documents, "--eval", &documents, "--out", &out,
        ];
        let rest = rest.iter().chain(more).map(|text| (*text).to_owned());
        clm.into_iter().chain(rest).collect()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.task.path(name)
    }

    fn weights(&self, run: &str) -> HashMap<String, Tensor> {
        tensors(&self.path(run).join("model.safetensors"))
    }

    /// The names that a run's certificate says were trained, after the certificate was verified.
    fn trained(&self, run: &str) -> Vec<String> {
        let dir = self.path(run);
        TRAINER.succeeds(["verify", dir.to_str().unwrap()]);
        let certificate = Certificate::read(&dir.join("certificate.json")).unwrap();
        let trained = certificate.tensors.into_iter().filter(|t| t.trainable);
        trained.map(|t| t.name).collect()
    }
}

/// The names of a model's tensors.
fn names(model: &Path) -> Vec<String> {
    let checkpoint = Checkpoint::open(model).unwrap();
    checkpoint.tensors().map(|t| t.name.clone()).collect()
}

#[test]
fn bitfit_and_norms_are_what_they_say() {
    let bench = Bench::new();
    for family in [
        "tiny-bert",
        "tiny-distilbert",
        "tiny-gpt2",
        "tiny-qwen3",
        "tiny-gemma3",
    ] {
        for strategy in ["bitfit", "norms", "norms+bitfit", "last:1+norms"] {
            let common = ["--strategy", strategy, "--epochs", "1"];
            let arguments = bench.train(family, "run", &common);
            let has_biases = names(&fixture(family))
                .iter()
                .any(|name| name.ends_with(".bias"));
            if strategy.contains("bitfit") && !has_biases {
                let said = TRAINER.refuses(arguments);
                assert!(said.contains("use norms"), "{said}");
                continue;
            }
            TRAINER.succeeds(arguments);
            let trained = bench.trained("run");
            let heads = ["classifier.", "pre_classifier.", "bert.pooler.", "lm_head."];
            let is_norm = |name: &str| {
                let words = ["norm", "Norm", ".ln_"];
                words.iter().any(|word| name.contains(word))
            };
            for name in names(&bench.path("run")) {
                let head = heads.iter().any(|head| name.starts_with(head))
                    || ["transformer.ln_f", "model.norm"]
                        .iter()
                        .any(|n| name.starts_with(n));
                let expected = head
                    || (strategy.contains("norms") && is_norm(&name))
                    || (strategy.contains("bitfit") && name.ends_with(".bias"))
                    || (strategy.contains("last:1")
                        && [".layer.1.", ".layers.1.", ".h.1."]
                            .iter()
                            .any(|l| name.contains(l)));
                assert_eq!(
                    trained.contains(&name),
                    expected,
                    "{family} {strategy} {name}"
                );
            }
        }
    }
}
