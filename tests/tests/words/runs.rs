//! Words that have labels, entities above all: trained, resumed, evaluated, predicted with, adapted, merged; in every form in
//! which files have them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use graft_tests::runs::{Random, Said, Task, Trainer, language_model, records};
use graft_tests::{ENCODERS, fixture, json, max_distance, root, tensors};
use serde_json::{Value, json};

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// Words and labels. What a word is can be told from it and from the word before: a place may be followed by `water`, which
/// belongs to it, and a count by `one`; both words are outside elsewhere.
type Row = Vec<(&'static str, &'static str)>;

fn row(random: &mut Random) -> Row {
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

fn all_rows(seed: u64, count: usize) -> Vec<Row> {
    let mut random = Random::new(seed);
    (0..count).map(|_| row(&mut random)).collect()
}

/// A file's text in each of the forms.
fn as_lists(rows: &[Row]) -> String {
    let line = |row: &Row| {
        let words: Vec<&str> = row.iter().map(|(word, _)| *word).collect();
        let labels: Vec<&str> = row.iter().map(|(_, label)| *label).collect();
        format!("{}\n", json!({"tokens": words, "ner_tags": labels}))
    };
    rows.iter().map(line).collect()
}

fn as_lines(rows: &[Row]) -> String {
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

fn as_spans(rows: &[Row]) -> String {
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
fn task() -> Task {
    let task = Task::new(1, 1);
    std::fs::write(task.path("train.jsonl"), as_lists(&all_rows(3, 240))).unwrap();
    std::fs::write(task.path("eval.jsonl"), as_lists(&all_rows(4, 40))).unwrap();
    task
}

/// The command line of a training.
fn train(task: &Task, model: &Path, out: &str, more: &[&str]) -> Vec<String> {
    let usual = ["--task", "ner", "--seed", "2", "--batch-size", "8"];
    task.train(model, out, &[&usual[..], more].concat())
}

const QUICK: [&str; 4] = ["--epochs", "16", "--lr", "0.01"];

fn trained(task: &Task, model: &Path, out: &str, more: &[&str]) -> Said {
    TRAINER.succeeds(train(task, model, out, more))
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

fn predict(run: &str, data: &str) -> Vec<Value> {
    let said = TRAINER.succeeds(["predict", "--logits", "--model", run, "--data", data]);
    let lines = said.out.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn models(task: &Task) -> Vec<PathBuf> {
    let decoder = task.path("model");
    language_model(&decoder, "tiny-llama");
    ENCODERS
        .iter()
        .map(|name| fixture(name))
        .chain([decoder])
        .collect()
}

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

/// All weights of a run, in the order of their names.
fn weights(run: &Path) -> Vec<Vec<f64>> {
    let all = tensors(&run.join("model.safetensors"));
    let mut names: Vec<&String> = all.keys().collect();
    names.sort();
    let of = |name: &&String| all[*name].to_f64().unwrap();
    names.iter().map(of).collect()
}

#[test]
fn every_form_of_a_file_says_the_same() {
    let task = task();
    let bert = fixture("tiny-bert");
    let (training, others) = (all_rows(3, 40), all_rows(4, 12));
    let mut first: Option<Vec<Vec<f64>>> = None;
    for (ending, form) in [
        ("jsonl", as_lists as fn(&[Row]) -> String),
        ("conll", as_lines),
        ("jsonl", as_spans),
    ] {
        let (train_file, eval_file) = (
            task.path(&format!("t.{ending}")),
            task.path(&format!("e.{ending}")),
        );
        std::fs::write(&train_file, form(&training)).unwrap();
        std::fs::write(&eval_file, form(&others)).unwrap();
        let files = [
            "--set",
            &format!("data.train={}", train_file.display()),
            "--set",
            &format!("data.eval={}", eval_file.display()),
        ]
        .map(str::to_owned);
        let mut arguments = vec!["train", "--task", "ner", "--epochs", "2", "--seed", "2"];
        let (model, out) = (bert.to_str().unwrap(), task.text("run"));
        arguments.extend(["--model", model, "--out", &out]);
        arguments.extend(files.iter().map(String::as_str));
        TRAINER.succeeds(&arguments);
        let found = weights(&task.path("run"));
        let expected = first.get_or_insert_with(|| found.clone());
        assert!(found == *expected, "{ending}");
        // What is written down trains the same run again.
        let config = task.path("run").join("config.resolved.toml");
        let config = config.to_str().unwrap();
        let out = task.text("again");
        TRAINER.succeeds(["train", config, "--out", &out]);
        assert!(weights(&task.path("again")) == found, "{ending}");
    }
}

/// Where words lie in a text is said in characters: they are those of the list, and so are the labels.
#[test]
fn what_was_predicted_in_a_text_is_data_again() {
    let task = task();
    trained(&task, &fixture("tiny-bert"), "run", &QUICK);
    let run = task.text("run");
    let (texts, lists) = (task.text("texts.jsonl"), task.text("lists.jsonl"));
    let rows = [
        "né  the bridge water is nine one",
        "the eleven\tand bridge ",
        "",
        "the\u{a0}field is one bridge water",
    ];
    let lines = |row: &dyn Fn(&str) -> Value| -> String {
        rows.iter().map(|text| format!("{}\n", row(text))).collect()
    };
    std::fs::write(&texts, lines(&|text| json!({"text": text}))).unwrap();
    let words = |text: &str| json!({"tokens": text.split_whitespace().collect::<Vec<_>>()});
    std::fs::write(&lists, lines(&words)).unwrap();
    let predicted = predict(&run, &texts);
    let mut all = 0;
    for ((row, list), text) in predicted.iter().zip(predict(&run, &lists)).zip(rows) {
        assert_eq!(row["text"], text);
        assert_eq!(row["logits"], list["logits"], "{text}");
        let characters: Vec<char> = text.chars().collect();
        let mut found: Vec<(String, String)> = Vec::new();
        for entity in row["entities"].as_array().unwrap() {
            let at = |key: &str| entity[key].as_u64().unwrap() as usize;
            let inside: String = characters[at("start")..at("end")].iter().collect();
            assert_eq!(entity["text"], inside);
            assert!(of(entity, "score") > 0.2 && of(entity, "score") <= 1.0);
            found.push((inside, entity["label"].as_str().unwrap().to_owned()));
        }
        let mut expected: Vec<(String, String)> = Vec::new();
        let mut before = "O".to_owned();
        let labels = list["labels"].as_array().unwrap();
        for (word, label) in text.split_whitespace().zip(labels) {
            let label = label.as_str().unwrap();
            if let Some((letter, kind)) = label.split_once('-') {
                match expected
                    .last_mut()
                    .filter(|_| letter == "I" && before == kind)
                {
                    Some((inside, _)) => *inside = format!("{inside} {word}"),
                    None => expected.push((word.to_owned(), kind.to_owned())),
                }
            }
            before = label.get(2..).unwrap_or("O").to_owned();
        }
        assert_eq!(found, expected, "{text}");
        all += found.len();
    }
    assert!(all >= 4, "{predicted:?}");
    // Its lines are a file of spans, which the model labels without an error.
    let again: String = predicted
        .iter()
        .filter(|row| row["text"] != "")
        .map(|row| format!("{row}\n"))
        .collect();
    std::fs::write(task.path("again.jsonl"), again).unwrap();
    let measured = eval(&run, &task.text("again.jsonl"));
    assert_eq!((of(&measured, "f1"), of(&measured, "accuracy")), (1.0, 1.0));
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

#[test]
fn words_that_were_cut_off_are_outside_and_the_user_is_told() {
    let task = task();
    trained(&task, &fixture("tiny-bert"), "run", &QUICK);
    let row: Row = (0..30).map(|_| ("bridge", "B-place")).collect();
    std::fs::write(task.path("long.jsonl"), as_lists(&[row])).unwrap();
    let (run, data) = (task.text("run"), task.text("long.jsonl"));
    let arguments = ["eval", "--json", "--max-length", "12", "--model", &run];
    let said = TRAINER.succeeds(arguments.iter().copied().chain(["--data", &data]));
    assert!(
        said.err
            .contains("1 of 1 texts have more tokens than allowed"),
        "{}",
        said.err
    );
    let measured: Value = serde_json::from_str(&said.out).unwrap();
    // Ten tokens stand between the special ones; what is behind them is not found.
    assert_eq!(
        (&measured["truncated"], &measured["words"]),
        (&json!(1), &json!(30))
    );
    assert!(of(&measured, "recall") <= 10.0 / 30.0, "{measured}");
    let place = &measured["entities"]["place"];
    assert_eq!(place["support"], 30);
}

#[test]
fn what_does_not_fit_is_refused() {
    let task = task();
    let bert = fixture("tiny-bert");
    trained(
        &task,
        &bert,
        "run",
        &["--epochs", "1", "--strategy", "head"],
    );
    let (run, data) = (task.text("run"), task.text("bad.conll"));
    std::fs::write(&data, "the\tO\nbridge\tB-bridge\n").unwrap();
    let said = TRAINER.refuses(["eval", "--model", &run, "--data", &data]);
    assert!(
        said.contains("bad.conll:2: unknown label `B-bridge`"),
        "{said}"
    );
    assert!(
        said.contains("the known labels are `O`, `B-count`"),
        "{said}"
    );
    let bad = |set: &str| {
        let more = ["--epochs", "1", "--set", set];
        TRAINER.refuses(train(&task, &bert, "no", &more))
    };
    let said = bad("data.text_pair=b");
    assert!(
        said.contains("`data.text_pair` has no effect: `task.kind` is \"ner\""),
        "{said}"
    );
    std::fs::write(task.path("texts.csv"), "text,label\na,b\n").unwrap();
    let table = task.text("texts.csv");
    let said = TRAINER.refuses(["eval", "--model", &run, "--data", &table]);
    assert!(
        said.contains("expected a name ending in .jsonl, .conll"),
        "{said}"
    );
    let pairs = [
        "predict",
        "--model",
        &run,
        "--data",
        &data,
        "--text-pair-column",
        "b",
    ];
    assert!(
        TRAINER
            .refuses(pairs)
            .contains("it has no effect: the task is ner")
    );
    // A file with a word a line has no columns with names.
    for (flag, command) in [("--text-column", "predict"), ("--label-column", "eval")] {
        let said = TRAINER.refuses([command, "--model", &run, "--data", &data, flag, "b"]);
        assert!(
            said.contains("a file with a word a line has no columns"),
            "{said}"
        );
    }
    let mut arguments = train(&task, &bert, "no", &["--label-column", "b"]);
    for argument in &mut arguments {
        if argument.ends_with(".jsonl") {
            *argument = data.clone();
        }
    }
    let said = TRAINER.refuses(&arguments);
    assert!(
        said.contains("`data.label` has no effect: a file with"),
        "{said}"
    );
    // transformers has no class for it.
    language_model(&task.path("gemma"), "tiny-gemma3");
    let said = TRAINER.refuses(train(&task, &task.path("gemma"), "no", &["--epochs", "1"]));
    assert!(said.contains("gemma3_text"), "{said}");
    // A file of texts with one label each.
    let texts = Task::new(6, 6);
    let said = TRAINER.refuses(texts.train(&bert, "no", &["--task", "ner"]));
    assert!(
        said.contains("train.jsonl:1:") && said.contains("is a string, expected a list"),
        "{said}"
    );
}

#[test]
fn a_row_is_shown_with_its_labels() {
    let task = task();
    std::fs::write(
        task.path("row.conll"),
        "the O\nbridge B-place\nwater I-place\n",
    )
    .unwrap();
    let bert = fixture("tiny-bert");
    let arguments = [
        "data",
        "show",
        &task.text("row.conll"),
        "--task",
        "ner",
        "--model",
    ];
    let said = TRAINER.succeeds(arguments.iter().copied().chain([bert.to_str().unwrap()]));
    assert!(
        said.out.contains("br[B-place]\n  idge\n>  wa[I-place]"),
        "{}",
        said.out
    );
    assert!(said.out.contains("3 of them supervised"), "{}", said.out);
}

/// `examples/entities/README.md`: what names a party, a company or a job in the test set does not do so in the training set.
#[test]
fn the_example_has_names_of_its_own_in_either_part() {
    let folder = root().join("examples/entities");
    let mut names = Vec::new();
    for (file, rows, entities) in [("train.jsonl", 414, 900), ("test.jsonl", 200, 456)] {
        let text = std::fs::read_to_string(folder.join(file)).unwrap();
        let mut found = BTreeSet::new();
        let mut count = 0;
        for line in text.lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            let characters: Vec<char> = row["text"].as_str().unwrap().chars().collect();
            for entity in row["entities"].as_array().unwrap() {
                let at = |key: &str| entity[key].as_u64().unwrap() as usize;
                let inside: String = characters[at("start")..at("end")].iter().collect();
                assert_eq!(inside, inside.trim(), "{line}");
                count += 1;
                if ["party", "company", "title"].contains(&entity["label"].as_str().unwrap()) {
                    found.insert(inside.to_lowercase());
                }
            }
        }
        assert_eq!((text.lines().count(), count), (rows, entities), "{file}");
        names.push(found);
    }
    assert!(names[0].is_disjoint(&names[1]));
}
