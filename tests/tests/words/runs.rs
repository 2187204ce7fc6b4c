//! Runs that label words: trained, evaluated, predicted with, adapted, merged.

use std::path::Path;

use graft_tests::runs::{Task, records};
use graft_tests::{fixture, json, max_distance, tensors};
use serde_json::{Value, json};

use crate::{
    QUICK, TRAINER, all_rows, as_lists, best, eval, models, of, predict, task, trained, weights,
};

#[test]
fn entities_are_learnt_by_every_family() {
    let task = task();
    let data = task.text("eval.jsonl");
    for model in models(&task) {
        let context = model.display();
        let said = trained(&task, &model, "run", &QUICK);
        assert!(said.err.contains("new for this task"), "{}", said.err);
        assert!(
            said.out.contains("F1") && said.out.contains("(usual label: "),
            "{}",
            said.out
        );
        let run = task.text("run");
        let best = best(&task.path("run"));
        assert!(of(&best, "f1") > 0.95, "{context}: {best}");
        assert_eq!(of(&best["baseline"], "f1"), 0.0);
        assert!(of(&best, "accuracy") > of(&best["baseline"], "accuracy") + 0.2);
        TRAINER.succeeds(["verify", &run]);
        // As transformers names it.
        let config: Value = json(&task.path("run").join("config.json"));
        let class = config["architectures"][0].as_str().unwrap();
        assert!(class.ends_with("ForTokenClassification"), "{class}");
        assert!(config.get("problem_type").is_none(), "{config}");
        let labels = ["O", "B-count", "I-count", "B-place", "I-place"];
        for (i, label) in labels.iter().enumerate() {
            assert_eq!(config["id2label"][i.to_string()], *label);
            assert_eq!(config["label2id"][*label], i);
        }
        let names = tensors(&task.path("run").join("model.safetensors"));
        assert!(
            !names.keys().any(|name| name.contains("pooler")),
            "{context}"
        );
        // Evaluated and predicted with as it was measured.
        let measured = eval(&run, &data);
        for key in [
            "loss",
            "precision",
            "recall",
            "f1",
            "macro_f1",
            "accuracy",
            "entities",
            "words",
        ] {
            assert_eq!(measured[key], best[key], "{context}: {key}");
        }
        let predicted = predict(&run, &data);
        let truth = all_rows(4, 40);
        assert_eq!(predicted.len(), truth.len());
        let (mut right, mut words, mut loss) = (0, 0, 0.0);
        for (row, truth) in predicted.iter().zip(&truth) {
            for (i, (word, label)) in truth.iter().enumerate() {
                assert_eq!(row["tokens"][i], *word);
                right += usize::from(row["labels"][i] == *label);
                words += 1;
                let logits: Vec<f64> = serde_json::from_value(row["logits"][i].clone()).unwrap();
                let sum: f64 = logits.iter().map(|x| x.exp()).sum();
                let place = labels.iter().position(|l| l == label).unwrap();
                loss += sum.ln() - logits[place];
                let top = logits.iter().copied().fold(f64::MIN, f64::max);
                assert!((row["scores"][i].as_f64().unwrap() - top.exp() / sum).abs() < 1e-6);
            }
        }
        assert_eq!(measured["words"], words);
        assert!((right as f64 / words as f64 - of(&measured, "accuracy")).abs() < 1e-12);
        assert!(
            (loss / words as f64 - of(&measured, "loss")).abs() < 1e-6,
            "{context}"
        );
        let table = TRAINER
            .succeeds(["eval", "--model", &run, "--data", &data])
            .out;
        assert!(
            table.contains("place") && table.contains("precision"),
            "{table}"
        );
        let compared = TRAINER.succeeds(["compare", &run]).out;
        assert!(compared.contains("F1"), "{compared}");
        let listed = TRAINER
            .succeeds(["inspect", &run, "--strategy", "head"])
            .out;
        assert!(listed.contains("5 labels"), "{listed}");
        // The head is kept for the same labels, and makes room for a task of texts.
        let again = trained(&task, Path::new(&run), "again", &["--epochs", "1"]);
        assert!(!again.err.contains("new for this task"), "{}", again.err);
        let texts = Task::new(48, 6);
        let other = texts.train(Path::new(&run), "run", &["--epochs", "1"]);
        let said = TRAINER.succeeds(other);
        assert!(said.err.contains("new for this task"), "{}", said.err);
        let said = TRAINER.refuses([
            "eval", "--model", &run, "--data", &data, "--task", "classify",
        ]);
        assert!(
            said.contains("the model's outputs mean is for ner"),
            "{said}"
        );
    }
}

#[test]
fn every_strategy_learns_and_is_certified() {
    let task = task();
    let data = task.text("eval.jsonl");
    let bert = fixture("tiny-bert");
    let mut numbered = as_lists(&all_rows(4, 40));
    for (i, label) in ["O", "B-count", "I-count", "B-place", "I-place"]
        .iter()
        .enumerate()
    {
        numbered = numbered.replace(&format!("\"{label}\""), &format!("\"LABEL_{i}\""));
    }
    std::fs::write(task.path("numbered.jsonl"), numbered).unwrap();
    for strategy in [
        "head",
        "last:1",
        "bitfit",
        "norms+bitfit",
        "last:2+gradual",
        "full+llrd:0.8",
        "lora",
        "dora",
        "ia3",
        "adapter",
        "prompt",
        "prefix",
    ] {
        let more = ["--strategy", strategy, "--epochs", "3"];
        trained(&task, &bert, "run", &more);
        let run = task.text("run");
        TRAINER.succeeds(["verify", &run]);
        let (measured, best) = (eval(&run, &data), best(&task.path("run")));
        for key in ["loss", "f1", "accuracy"] {
            assert_eq!(measured[key], best[key], "{strategy}: {key}");
        }
        let losses: Vec<f64> = records(&task.path("run"), "epoch")
            .iter()
            .map(|epoch| of(epoch, "loss"))
            .collect();
        assert!(losses[2] < losses[0], "{strategy}: {losses:?}");
        if ["lora", "dora", "ia3"].contains(&strategy) {
            let stored: Value = json(&task.path("run").join("adapter_config.json"));
            assert_eq!(stored["task_type"], "TOKEN_CLS", "{strategy}");
            assert_eq!(stored["modules_to_save"], json!(["classifier"]));
            let merged = task.text("merged");
            TRAINER.succeeds(["merge", "--model", &run, "--out", &merged]);
            let again = eval(&merged, &data);
            assert!(
                (of(&again, "f1") - of(&best, "f1")).abs() < 1e-3,
                "{strategy}"
            );
            // PEFT leaves no config.json: what the adapter is for stands in its own, and labels have numbers.
            std::fs::remove_file(task.path("run").join("config.json")).unwrap();
            let bare = eval(&run, &task.text("numbered.jsonl"));
            assert_eq!(bare["loss"], best["loss"], "{strategy}");
        }
    }
}

#[test]
fn adapters_of_words_and_of_texts_are_not_beside_one_base() {
    let (words, texts) = (task(), Task::new(48, 6));
    let bert = fixture("tiny-bert");
    let lora = ["--strategy", "lora", "--epochs", "1"];
    trained(&words, &bert, "run", &lora);
    TRAINER.succeeds(texts.train(&bert, "run", &lora));
    let adapters = [words.text("run"), texts.text("run")];
    let mut arguments = vec!["predict".to_owned(), "--model".to_owned()];
    arguments.extend([bert.display().to_string(), "--data".to_owned()]);
    arguments.push(words.text("eval.jsonl"));
    for (name, dir) in ["one", "other"].iter().zip(adapters) {
        arguments.extend(["--adapter".to_owned(), format!("{name}={dir}")]);
    }
    let said = TRAINER.refuses(&arguments);
    assert!(
        said.contains("--adapter other: one adapter labels words and another one texts"),
        "{said}"
    );
}

#[test]
fn frozen_outputs_that_are_kept_change_no_bit() {
    let task = task();
    let bert = fixture("tiny-bert");
    for strategy in ["head", "last:1"] {
        let run = |more: &[&str]| {
            let more = [&["--strategy", strategy, "--epochs", "3"], more].concat();
            let said = trained(&task, &bert, "run", &more);
            (
                weights(&task.path("run")),
                best(&task.path("run")),
                said.out,
            )
        };
        let (off, measured, _) = run(&["--set", "train.cache=off"]);
        let (kept, again, said) = run(&[]);
        assert!(said.contains("frozen outputs"), "{said}");
        assert!(kept == off, "{strategy}");
        assert_eq!(measured["loss"], again["loss"], "{strategy}");
    }
}

/// Sums in another order differ in the last bits of f32. Plain SGD, because AdamW makes steps of the size of the learning
/// rate from rounding noise too.
#[test]
fn a_step_does_not_depend_on_how_its_rows_are_batched_nor_on_threads() {
    let task = task();
    let run = |batch: &str, accumulate: &str, threads: &str| {
        let accumulate = format!("train.accumulate={accumulate}");
        let mut arguments = vec!["--task", "ner", "--epochs", "2", "--lr", "0.02"];
        arguments.extend(["--batch-size", batch, "--threads", threads]);
        for setting in [&accumulate, "strategy.dropout=0", "optimizer.kind=sgd"] {
            arguments.extend(["--set", setting]);
        }
        TRAINER.succeeds(task.train(&fixture("tiny-bert"), "run", &arguments));
        weights(&task.path("run"))
    };
    let whole = run("8", "1", "1");
    assert!(whole == run("8", "1", "2"), "threads");
    for (batch, accumulate) in [("4", "2"), ("1", "8")] {
        let parts = run(batch, accumulate, "2");
        let pairs = whole.iter().zip(&parts);
        let error = pairs.map(|(a, b)| max_distance(a, b)).fold(0.0, f64::max);
        assert!(error < 1e-6, "{batch}x{accumulate}: {error:e}");
    }
}

#[test]
fn labels_that_are_no_tags_are_learnt_word_by_word() {
    let task = task();
    for (file, seed, count) in [("train.jsonl", 3, 240), ("eval.jsonl", 4, 40)] {
        let mut text = as_lists(&all_rows(seed, count));
        for (tag, name) in [
            ("\"O\"", "\"X\""),
            ("B-place", "NOUN"),
            ("I-place", "NOUN2"),
        ] {
            text = text.replace(tag, name);
        }
        let text = text.replace("B-count", "NUM").replace("I-count", "NUM2");
        std::fs::write(task.path(file), text).unwrap();
    }
    let said = trained(&task, &fixture("tiny-bert"), "run", &QUICK);
    assert!(!said.out.contains("precision"), "{}", said.out);
    let best = best(&task.path("run"));
    assert!(of(&best, "accuracy") > 0.95, "{best}");
    assert!(of(&best, "accuracy") > of(&best["baseline"], "accuracy") + 0.2);
    assert_eq!(best["classes"].as_array().unwrap().len(), 5);
    let row = &predict(&task.text("run"), &task.text("eval.jsonl"))[0];
    assert_eq!(row["labels"][0], "X", "{row}");
}
