//! Every kind of adapter beside decoders of several families and beside bases in every type, as a user runs them: trained,
//! verified, evaluated, generated with, several beside one base, merged or refused.

use std::path::Path;

use graft_tests::json;
use graft_tests::runs::{Task, Trainer, language_model, records};
use serde_json::Value;

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));
const FAMILIES: [&str; 4] = ["tiny-gpt2", "tiny-llama", "tiny-qwen2", "tiny-qwen3"];
const BASES: [&str; 4] = ["f32", "bf16", "nf4", "int8"];

/// Each kind, what is set for it, and whether a weight can hold it.
const KINDS: [(&str, &[&str], bool); 8] = [
    (
        "lora",
        &["--rank", "4", "--alpha", "6", "--lr", "0.02"],
        true,
    ),
    (
        "rslora",
        &["--targets", "all-linear", "--rank", "2", "--lr", "0.01"],
        true,
    ),
    ("dora", &["--rank", "2", "--lr", "0.02"], true),
    ("ia3", &["--lr", "0.05"], true),
    (
        "adapter",
        &["--set", "adapter.size=6", "--lr", "0.02"],
        false,
    ),
    (
        "prompt",
        &["--set", "adapter.text=line 3", "--lr", "0.05"],
        false,
    ),
    (
        "prefix",
        &["--set", "adapter.tokens=3", "--lr", "0.05"],
        false,
    ),
    (
        "prefix",
        &["--set", "adapter.projection=12", "--lr", "0.05"],
        false,
    ),
];
const LENGTH: [&str; 2] = ["--max-length", "24"];

/// Documents in `text.txt`, and a base of each family.
fn bench() -> Task {
    let task = Task::new(1, 1);
    task.lines("text.txt", |i| {
        format!("line {i} of the text, over and over")
    });
    for family in FAMILIES {
        language_model(&task.path(family), family);
    }
    task
}

fn train(task: &Task, family: &str, out: &str, more: &[&str]) {
    let (model, data, out) = (task.text(family), task.text("text.txt"), task.text(out));
    let arguments = [
        "train", "--task", "clm", "--model", &model, "--train", &data, "--eval", &data, "--out",
        &out,
    ];
    TRAINER.succeeds([&arguments[..], &LENGTH, more].concat());
}

fn perplexity(task: &Task, model: &[&str]) -> f64 {
    let data = task.text("text.txt");
    let arguments = ["eval", "--json", "--data", &data];
    let said = TRAINER.succeeds([&arguments[..], &LENGTH, model].concat());
    let said: Value = serde_json::from_str(&said.out).unwrap();
    said["perplexity"].as_f64().unwrap()
}

fn continued(model: &[&str]) -> String {
    let prompt = ["--prompt", "line 3 of", "--max-new-tokens", "12"];
    TRAINER
        .succeeds([&["generate"], model, &prompt[..]].concat())
        .out
}

#[test]
fn every_adapter_learns_beside_every_family_and_base() {
    let task = bench();
    for (i, family) in FAMILIES.into_iter().enumerate() {
        for (j, (strategy, more, merges)) in KINDS.into_iter().enumerate() {
            let held = BASES[(i + j) % BASES.len()];
            let out = format!("{family}-{j}");
            let common = ["--strategy", strategy, "--base", held, "--epochs", "3"];
            train(&task, family, &out, &[&common[..], more].concat());
            let (dir, run, base) = (task.path(&out), task.text(&out), task.text(family));
            let what = format!("{strategy} beside {family} in {held}");
            let all: Vec<f64> = records(&dir, "eval")
                .iter()
                .map(|record| record["perplexity"].as_f64().unwrap())
                .collect();
            assert!(all[2] < 0.98 * all[0], "{what}: {all:?}");
            let said = TRAINER.succeeds(["verify", &run]).out;
            assert!(said.contains("frozen tensors are bit for bit"), "{said}");

            let found = perplexity(&task, &["--model", &run]);
            assert!((found / all[2] - 1.0).abs() < 1e-6, "{what}: {found}");
            let beside = ["--model", &base, "--adapter", &run];
            assert_eq!(continued(&beside), continued(&["--model", &run]), "{what}");
            let whole = perplexity(&task, &["--model", &run, "--base", "f32"]);
            assert_eq!(whole != found, held != "f32", "{what}: {whole}");

            let merged = task.text(&format!("{out}-merged"));
            let merge = ["merge", "--model", &run, "--out", &merged];
            if !merges {
                let refused = TRAINER.refuses(merge);
                assert!(refused.contains("cannot be merged"), "{what}: {refused}");
                assert!(!Path::new(&merged).exists(), "{what}");
                continue;
            }
            TRAINER.succeeds(merge);
            let proof = json(&Path::new(&merged).join("merge.json"));
            assert!(proof["max_difference"].as_f64().unwrap() < 1e-4, "{proof}");
            assert_eq!(proof["trained_on"].is_object(), held != "f32", "{proof}");
            let merged = perplexity(&task, &["--model", &merged]);
            assert!((merged / whole - 1.0).abs() < 1e-5, "{what}: {merged}");
        }
    }
}

#[test]
fn several_adapters_of_a_decoder_are_told_apart_by_name() {
    let task = bench();
    for family in FAMILIES {
        let names = ["lora", "ia3", "adapter", "prompt", "prefix"];
        let mut arguments = vec!["--model".to_owned(), task.text(family)];
        for name in names {
            let (strategy, more, _) = KINDS.iter().find(|(known, ..)| *known == name).unwrap();
            let out = format!("{family}-{name}");
            let common = ["--strategy", strategy, "--epochs", "2"];
            train(&task, family, &out, &[&common[..], more].concat());
            let adapter = format!("{name}={}", task.text(&out));
            arguments.extend(["--adapter".to_owned(), adapter]);
        }
        let all: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut found = Vec::new();
        for name in names {
            let run = task.text(&format!("{family}-{name}"));
            let chosen = [&all[..], &["--use", name]].concat();
            let alone = ["--model", &run];
            let measured = perplexity(&task, &alone);
            assert_eq!(perplexity(&task, &chosen), measured, "{family} {name}");
            assert_eq!(continued(&chosen), continued(&alone), "{family} {name}");
            assert!(!found.contains(&measured), "{family} {name}");
            found.push(measured);
        }
        let prompt = ["generate", "--prompt", "line"];
        let unclear = TRAINER.refuses([&prompt[..], &all].concat());
        assert!(unclear.contains("choose one with --use NAME"), "{unclear}");
    }
}
