//! Words that have labels, entities above all.

mod files;
mod parity;
mod runs;

use std::path::{Path, PathBuf};

use graft_tests::runs::{Random, Said, Task, Trainer, language_model, records};
use graft_tests::{ENCODERS, fixture, tensors};
use serde_json::{Value, json};

pub(crate) const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// Words and labels. What a word is can be told from it and from the word before: a place may be followed by `water`, which
/// belongs to it, and a count by `one`; both words are outside elsewhere.
pub(crate) type Row = Vec<(&'static str, &'static str)>;

pub(crate) fn row(random: &mut Random) -> Row {
    let mut row = vec![("the", "O")];
    for _ in 0..1 + random.below(3) {
        let (words, begin, more, inside) = match random.below(4) {
            0 => (["bridge", "field"], "B-place", "water", "I-place"),
            1 => (["nine", "eleven"], "B-count", "one", "I-count"),
            2 => (["is", "and"], "O", "water", "O"),
            _ => (["is", "and"], "O", "one", "O"),
        };
        row.push((words[random.below(2)], begin));
        if random.below(2) == 0 {
            row.push((more, inside));
        }
    }
    row
}

pub(crate) fn all_rows(seed: u64, count: usize) -> Vec<Row> {
    let mut random = Random::new(seed);
    (0..count).map(|_| row(&mut random)).collect()
}

/// A file's text in each of the forms.
pub(crate) fn as_lists(rows: &[Row]) -> String {
    let line = |row: &Row| {
        let words: Vec<&str> = row.iter().map(|(word, _)| *word).collect();
        let labels: Vec<&str> = row.iter().map(|(_, label)| *label).collect();
        format!("{}\n", json!({"tokens": words, "ner_tags": labels}))
    };
    rows.iter().map(line).collect()
}

pub(crate) fn as_lines(rows: &[Row]) -> String {
    let word = |(word, label): &(&str, &str)| format!("{word}\t{label}\n");
    let text = |row: &Row| {
        row.iter()
            .map(word)
            .chain(["\n".to_owned()])
            .collect::<String>()
    };
    format!(
        "-DOCSTART-\tO\n\n{}",
        rows.iter().map(text).collect::<String>()
    )
}

pub(crate) fn as_spans(rows: &[Row]) -> String {
    let line = |row: &Row| {
        let (mut text, mut spans) = (String::new(), Vec::new());
        for (i, (word, label)) in row.iter().enumerate() {
            if i > 0 {
                text.push(' ');
            }
            let end = text.len() + word.len();
            match label.split_once('-') {
                Some(("B", kind)) => spans.push((text.len(), end, kind)),
                Some(_) => spans.last_mut().unwrap().1 = end,
                None => {}
            }
            text.push_str(word);
        }
        format!("{}\n", json!({"text": text, "entities": spans}))
    };
    rows.iter().map(line).collect()
}

/// A task whose files have the words in lists.
pub(crate) fn task() -> Task {
    let task = Task::new(1, 1);
    std::fs::write(task.path("train.jsonl"), as_lists(&all_rows(3, 240))).unwrap();
    std::fs::write(task.path("eval.jsonl"), as_lists(&all_rows(4, 40))).unwrap();
    task
}

/// The command line of a training.
pub(crate) fn train(task: &Task, model: &Path, out: &str, more: &[&str]) -> Vec<String> {
    let usual = ["--task", "ner", "--seed", "2", "--batch-size", "8"];
    task.train(model, out, &[&usual[..], more].concat())
}

pub(crate) const QUICK: [&str; 4] = ["--epochs", "16", "--lr", "0.01"];

pub(crate) fn trained(task: &Task, model: &Path, out: &str, more: &[&str]) -> Said {
    TRAINER.succeeds(train(task, model, out, more))
}

pub(crate) fn best(run: &Path) -> Value {
    let evals = records(run, "eval");
    evals.into_iter().rfind(|e| e["best"] == true).unwrap()
}

pub(crate) fn of(value: &Value, key: &str) -> f64 {
    value[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key}: {value}"))
}

pub(crate) fn eval(run: &str, data: &str) -> Value {
    let said = TRAINER.succeeds(["eval", "--json", "--model", run, "--data", data]);
    serde_json::from_str(&said.out).unwrap()
}

pub(crate) fn predict(run: &str, data: &str) -> Vec<Value> {
    let said = TRAINER.succeeds(["predict", "--logits", "--model", run, "--data", data]);
    let lines = said.out.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

pub(crate) fn models(task: &Task) -> Vec<PathBuf> {
    let decoder = task.path("model");
    language_model(&decoder, "tiny-llama");
    ENCODERS
        .iter()
        .map(|name| fixture(name))
        .chain([decoder])
        .collect()
}

/// All weights of a run, in the order of their names.
pub(crate) fn weights(run: &Path) -> Vec<Vec<f64>> {
    let all = tensors(&run.join("model.safetensors"));
    let mut names: Vec<&String> = all.keys().collect();
    names.sort();
    let of = |name: &&String| all[*name].to_f64().unwrap();
    names.iter().map(of).collect()
}
