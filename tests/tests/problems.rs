//! Texts that have any number of labels, or a number: trained, resumed, evaluated, predicted with, adapted, merged.

use std::path::{Path, PathBuf};

use graft_tests::runs::{Random, Task, Trainer, language_model, records};
use graft_tests::{fixture, json, max_distance, tensors};
use serde_json::{Value, json};

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// Words that belong to a label, each of which texts hold or do not hold.
const WORDS: [(&str, [&str; 3]); 3] = [
    ("calm", ["quiet", "field", "bridge"]),
    ("loud", ["engine", "thunder", "drum"]),
    ("odd", ["nine", "three", "eleven"]),
];

/// A task whose rows are made from the numbers of words of each label in a text.
fn task(label: impl Fn([usize; 3]) -> Value) -> Task {
    let task = Task::new(1, 1);
    let mut random = Random::new(7);
    for (name, rows) in [("train.jsonl", 160), ("eval.jsonl", 48)] {
        let mut file = String::new();
        for _ in 0..rows {
            let counts = [0; 3].map(|_: usize| [0, 0, 1, 2][random.below(4)]);
            let mut words = vec!["the"];
            for ((_, of), count) in WORDS.iter().zip(counts) {
                words.extend((0..count).map(|_| of[random.below(3)]));
            }
            let row = json!({"text": words.join(" "), "label": label(counts)});
            file.push_str(&format!("{row}\n"));
        }
        std::fs::write(task.path(name), file).unwrap();
    }
    task
}

fn sets() -> Task {
    task(|counts| {
        let on = WORDS.iter().zip(counts).filter(|&(_, count)| count > 0);
        on.map(|((name, _), _)| *name).collect::<Vec<_>>().into()
    })
}

fn numbers() -> Task {
    task(|[calm, loud, odd]| json!(calm as f64 - 1.5 * loud as f64 + 0.25 * odd as f64))
}

fn best(run: &Path) -> Value {
    let evals = records(run, "eval");
    evals.into_iter().rfind(|e| e["best"] == true).unwrap()
}

fn of(value: &Value, key: &str) -> f64 {
    value[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key}: {value}"))
}

fn eval(run: &str, data: &str) -> Value {
    let said = TRAINER.succeeds(["eval", "--json", "--model", run, "--data", data]);
    serde_json::from_str(&said.out).unwrap()
}

fn lines(text: &str) -> Vec<Value> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn predictions(run: &str, data: &str) -> Vec<Value> {
    lines(
        &TRAINER
            .succeeds(["predict", "--logits", "--model", run, "--data", data])
            .out,
    )
}

fn rows(task: &Task) -> Vec<Value> {
    lines(&std::fs::read_to_string(task.path("eval.jsonl")).unwrap())
}

/// An encoder, and a decoder beside the task.
fn models(task: &Task) -> [PathBuf; 2] {
    let decoder = task.path("model");
    language_model(&decoder, "tiny-llama");
    [fixture("tiny-bert"), decoder]
}

const QUICK: [&str; 4] = ["--epochs", "12", "--lr", "0.01"];

/// The command line of a training with this kind of task.
fn train(task: &Task, kind: &str, model: &Path, out: &str, more: &[&str]) -> Vec<String> {
    task.train(model, out, &[&["--task", kind], &QUICK[..], more].concat())
}

#[test]
fn any_number_of_labels_is_learnt() {
    let task = sets();
    let data = task.text("eval.jsonl");
    for model in models(&task) {
        let context = model.display();
        let said = TRAINER.succeeds(train(&task, "multilabel", &model, "run", &[]));
        assert!(said.out.contains("micro-F1"), "{}", said.out);
        let run = task.text("run");
        let best = best(&task.path("run"));
        let f1 = |value: &Value| of(value, "micro_f1");
        assert!(f1(&best) > 0.9, "{context}: {best}");
        assert!(f1(&best) > f1(&best["baseline"]) + 0.2, "{context}: {best}");
        TRAINER.succeeds(["verify", &run]);
        // As transformers names it.
        let config: Value = json(&task.path("run").join("config.json"));
        assert_eq!(config["problem_type"], "multi_label_classification");
        let names = json!({"0": "calm", "1": "loud", "2": "odd"});
        assert_eq!(config["id2label"], names);
        // Evaluated and predicted with as it was measured.
        let measured = eval(&run, &data);
        for key in ["loss", "accuracy", "micro_f1", "macro_f1", "classes"] {
            assert_eq!(measured[key], best[key], "{context}: {key}");
        }
        let predicted = predictions(&run, &data);
        let (mut exact, mut loss) = (0, 0.0);
        for (row, truth) in predicted.iter().zip(rows(&task)) {
            exact += usize::from(row["labels"] == truth["label"]);
            for (i, (name, _)) in WORDS.iter().enumerate() {
                let p = of(&row["probabilities"], name);
                let logit = row["logits"][i].as_f64().unwrap();
                assert!((p - 1.0 / (1.0 + (-logit).exp())).abs() < 1e-12);
                let right = truth["label"].as_array().unwrap().contains(&json!(name));
                loss -= if right { p.ln() } else { (1.0 - p).ln() };
            }
        }
        assert_eq!(exact as f64, of(&measured, "accuracy") * 48.0, "{context}");
        let mean = loss / (48.0 * 3.0);
        assert!((mean - of(&measured, "loss")).abs() < 1e-9, "{context}");
        let table = TRAINER
            .succeeds(["eval", "--model", &run, "--data", &data])
            .out;
        assert!(table.contains("(usual labels: ") && table.contains("odd"));
        let compared = TRAINER.succeeds(["compare", &run]).out;
        assert!(compared.contains("micro-F1"), "{compared}");
        // The head is kept for the same labels, and not for another task.
        let kept = train(&task, "multilabel", Path::new(&run), "again", &[]);
        let said = TRAINER.succeeds(kept);
        assert!(!said.err.contains("new for this task"), "{}", said.err);
    }
}

#[test]
fn a_number_is_learnt() {
    let task = numbers();
    let data = task.text("eval.jsonl");
    for model in models(&task) {
        let context = model.display();
        let said = TRAINER.succeeds(train(&task, "regression", &model, "run", &[]));
        assert!(said.out.contains("Spearman"), "{}", said.out);
        let run = task.text("run");
        let best = best(&task.path("run"));
        assert!(of(&best, "pearson") > 0.9, "{context}: {best}");
        assert!(of(&best, "rmse") < 0.6 * of(&best["baseline"], "rmse"));
        TRAINER.succeeds(["verify", &run]);
        let config: Value = json(&task.path("run").join("config.json"));
        assert_eq!(config["problem_type"], "regression");
        assert_eq!(config["id2label"], json!({"0": "LABEL_0"}));
        let measured = eval(&run, &data);
        for key in ["loss", "rmse", "mae", "r2", "pearson", "spearman"] {
            assert_eq!(measured[key], best[key], "{context}: {key}");
        }
        let predicted = predictions(&run, &data);
        let squares = predicted.iter().zip(rows(&task)).map(|(row, truth)| {
            assert_eq!(row["number"], row["logits"][0]);
            (of(row, "number") - of(&truth, "label")).powi(2)
        });
        let mse = squares.sum::<f64>() / 48.0;
        assert!((mse - of(&measured, "loss")).abs() < 1e-9, "{context}");
        let compared = TRAINER.succeeds(["compare", &run]).out;
        assert!(
            compared.contains("RMSE") && !compared.contains("accuracy"),
            "{compared}"
        );
        let again = train(&task, "regression", Path::new(&run), "again", &[]);
        let said = TRAINER.succeeds(again);
        assert!(!said.err.contains("new for this task"), "{}", said.err);
    }
}

#[test]
fn a_head_serves_the_problem_that_it_was_trained_for() {
    let (sets, numbers) = (sets(), numbers());
    let bert = fixture("tiny-bert");
    let once = ["--epochs", "1", "--strategy", "head"];
    TRAINER.succeeds(sets.train(
        &bert,
        "run",
        &[&["--task", "multilabel"], &once[..]].concat(),
    ));
    let run = sets.text("run");
    // A base for another problem gets a new head.
    let other = [&["--task", "regression"], &once[..]].concat();
    let said = TRAINER.succeeds(numbers.train(Path::new(&run), "run", &other));
    assert!(said.err.contains("new for this task"), "{}", said.err);
    let said = TRAINER.refuses([
        "eval",
        "--model",
        &run,
        "--data",
        &sets.text("eval.jsonl"),
        "--task",
        "classify",
    ]);
    assert!(
        said.contains("the task is classify, but what the model's outputs mean is for multilabel"),
        "{said}"
    );
    // Data that mean something else name their line and the task that they are for.
    let data = sets.text("eval.jsonl");
    let said = TRAINER.refuses(["eval", "--model", &numbers.text("run"), "--data", &data]);
    assert!(
        said.contains("eval.jsonl:1:") && said.contains("an array, expected a number"),
        "{said}"
    );
    let said = TRAINER.refuses(sets.train(&bert, "no", &once));
    assert!(said.contains("--task multilabel"), "{said}");
    let said = TRAINER.refuses(numbers.train(&bert, "no", &once));
    assert!(said.contains("--task regression"), "{said}");
    // A model that predicts several numbers is none of ours.
    let config = sets.path("run").join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        text.replace("multi_label_classification", "regression"),
    )
    .unwrap();
    let said = TRAINER.refuses(["predict", "--model", &run, "--data", &data]);
    assert!(said.contains("predicts 3 numbers"), "{said}");
}

#[test]
fn adapters_of_each_problem_are_read_and_merged() {
    for (kind, task, key) in [
        ("multilabel", sets(), "micro_f1"),
        ("regression", numbers(), "rmse"),
    ] {
        let data = task.text("eval.jsonl");
        let bert = fixture("tiny-bert");
        let lora = ["--strategy", "lora", "--targets", "all-linear"];
        TRAINER.succeeds(train(&task, kind, &bert, "run", &lora));
        let (run, merged) = (task.text("run"), task.text("merged"));
        let best = best(&task.path("run"));
        let measured = eval(&run, &data);
        assert_eq!(measured[key], best[key], "{kind}");
        TRAINER.succeeds(["merge", "--model", &run, "--out", &merged]);
        let again = eval(&merged, &data);
        assert!(
            (of(&again, key) - of(&best, key)).abs() < 1e-4,
            "{kind}: {again} {best}"
        );
        TRAINER.succeeds(["verify", &run]);
    }
}

/// All weights of a run, in the order of their names.
fn weights(task: &Task) -> Vec<Vec<f64>> {
    let all = tensors(&task.path("run").join("model.safetensors"));
    let mut names: Vec<&String> = all.keys().collect();
    names.sort();
    let of = |name: &&String| all[*name].to_f64().unwrap();
    names.iter().map(of).collect()
}

/// Sums in another order differ in the last bits of f32. Plain SGD, because AdamW makes steps of the size of the learning
/// rate from rounding noise too.
#[test]
fn a_step_does_not_depend_on_how_its_rows_are_batched_nor_on_threads() {
    for (kind, task) in [("multilabel", sets()), ("regression", numbers())] {
        let run = |batch: &str, accumulate: &str, threads: &str| {
            let accumulate = format!("train.accumulate={accumulate}");
            let mut arguments = vec!["--task", kind, "--epochs", "2", "--lr", "0.02"];
            arguments.extend(["--batch-size", batch, "--threads", threads]);
            for setting in [&accumulate, "strategy.dropout=0", "optimizer.kind=sgd"] {
                arguments.extend(["--set", setting]);
            }
            TRAINER.succeeds(task.train(&fixture("tiny-bert"), "run", &arguments));
            weights(&task)
        };
        let whole = run("8", "1", "1");
        assert!(whole == run("8", "1", "2"), "{kind}: threads");
        for (batch, accumulate) in [("4", "2"), ("1", "8")] {
            let parts = run(batch, accumulate, "2");
            let pairs = whole.iter().zip(&parts);
            let error = pairs.map(|(a, b)| max_distance(a, b)).fold(0.0, f64::max);
            assert!(error < 1e-6, "{kind} {batch}x{accumulate}: {error:e}");
        }
    }
}
