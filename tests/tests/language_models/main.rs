//! Causal language models as a user runs them: training, evaluation, generation.

mod adapters;
mod chat;
mod generation;
mod masked;
mod pretrain;
mod training;

use std::collections::HashMap;
use std::fmt::Write as _;

use graft_tensor::Tensor;
use graft_tests::runs::{Trainer, language_model};
use graft_tests::tensors;
use serde_json::json;

pub(crate) const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// Documents of very different lengths, some longer than a sequence of the tiny models.
pub(crate) const DOCUMENTS: [&str; 10] = [
    "the river",
    "it runs to the sea, and the sea gives it back as rain on the hills",
    "a",
    "rain",
    "one bridge, two roads",
    "nine fields of barley and a mill; the mill turns with the river and grinds what the fields give",
    "stones",
    "at dusk",
    "the road bends here",
    "sea and hill",
];

/// A model, documents, and runs.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new(family: &str) -> Bench {
        let bench = Bench {
            dir: tempfile::tempdir().unwrap(),
        };
        language_model(&bench.dir.path().join("model"), family);
        bench.write("train.jsonl", &DOCUMENTS);
        bench.write(
            "eval.jsonl",
            &["the sea and the river", "two mills on a hill"],
        );
        bench
    }

    pub(crate) fn write(&self, name: &str, documents: &[&str]) {
        let mut text = String::new();
        for document in documents {
            writeln!(text, "{}", json!({"text": document})).unwrap();
        }
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn train(&self, out: &str, more: &[&str]) -> Vec<String> {
        let flags = [
            ("--task", "clm".to_owned()),
            ("--model", self.path("model")),
            ("--train", self.path("train.jsonl")),
            ("--out", self.path(out)),
        ];
        let mut arguments = vec!["train".to_owned()];
        for (flag, value) in flags {
            arguments.extend([flag.to_owned(), value]);
        }
        arguments.extend(more.iter().map(|s| (*s).to_owned()));
        arguments
    }

    pub(crate) fn weights(&self, run: &str) -> HashMap<String, Tensor> {
        tensors(&self.dir.path().join(run).join("model.safetensors"))
    }
}
