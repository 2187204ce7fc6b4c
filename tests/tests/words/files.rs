//! Files of words with labels in every form, read, written and refused.

use std::collections::BTreeSet;

use graft_tests::runs::{Task, language_model};
use graft_tests::{fixture, root};
use serde_json::{Value, json};

use crate::{
    QUICK, Row, TRAINER, all_rows, as_lines, as_lists, as_spans, eval, of, predict, task, train,
    trained, weights,
};

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
