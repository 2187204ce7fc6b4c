//! Runs with prompts and prefixes, as a user makes and uses them: trained, verified, evaluated, predicted and generated
//! with. They cannot be merged.

use std::path::{Path, PathBuf};

use graft_tests::runs::{Task, Trainer, language_model, records};
use graft_tests::{fixture, json, tensors};
use serde_json::Value;

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// Each kind and what is set for it.
const KINDS: [(&str, &[&str]); 4] = [
    ("prompt", &["--set", "adapter.tokens=4"]),
    ("prompt", &["--set", "adapter.text=quiet thunder nine"]),
    ("prefix", &["--set", "adapter.tokens=3"]),
    ("prefix", &["--set", "adapter.projection=12"]),
];

/// A fixture with a tokenizer: a decoder's lies beside no other.
fn model(task: &Task, name: &str) -> PathBuf {
    let dir = task.path(name);
    if name != "tiny-llama" {
        return fixture(name);
    }
    if !dir.exists() {
        language_model(&dir, name);
    }
    dir
}

fn train(task: &Task, name: &str, out: &str, strategy: &str, more: &[&str]) {
    let common = [
        "--strategy",
        strategy,
        "--seed",
        "3",
        "--lr",
        "0.03",
        "--set",
        "optimizer.warmup=0.0",
    ];
    let arguments = task.train(&model(task, name), out, &[&common[..], more].concat());
    TRAINER.succeeds(arguments);
}

fn best(dir: &Path, measure: &str) -> f64 {
    let evals = records(dir, "eval");
    let best = evals.iter().rfind(|r| r["best"] == true).unwrap();
    best[measure].as_f64().unwrap()
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn logits(task: &Task, arguments: &[&str]) -> Vec<Vec<f64>> {
    let data = task.text("eval.jsonl");
    let base = ["predict", "--logits", "--data", &data];
    let said = TRAINER.succeeds([&base[..], arguments].concat());
    let row = |line: &str| graft_tests::numbers(&parse(line)["logits"]);
    said.out.lines().map(row).collect()
}

#[test]
fn texts_are_classified_behind_virtual_tokens() {
    let task = Task::new(180, 60);
    for (i, (strategy, more)) in KINDS.into_iter().enumerate() {
        for family in ["tiny-bert", "tiny-distilbert", "tiny-llama"] {
            let out = format!("{family}-{i}");
            train(
                &task,
                family,
                &out,
                strategy,
                &[&["--epochs", "4"], more].concat(),
            );
            let (dir, run) = (task.path(&out), task.text(&out));
            let kept = tensors(&dir.join("adapter_model.safetensors"));
            let head = |name: &str| name.contains("classifier.") || name.contains("score.");
            let own: Vec<&String> = kept.keys().filter(|name| !head(name)).collect();
            assert_eq!(own, ["prompt_embeddings"], "{out}");
            assert!(kept.len() > 1, "{out}: the head is kept");

            let base = model(&task, family);
            let data = task.text("eval.jsonl");
            let said = TRAINER.succeeds(["eval", "--json", "--model", &run, "--data", &data]);
            let found = parse(&said.out)["accuracy"].as_f64().unwrap();
            assert_eq!(found, best(&dir, "accuracy"), "{out}");
            assert!(found > 0.55, "{out}: {found}");
            let verified = TRAINER.succeeds(["verify", &run]).out;
            assert!(
                verified.contains("frozen tensors are bit for bit"),
                "{verified}"
            );
            let certificate = json(&dir.join("certificate.json")).to_string();
            assert!(certificate.contains("prompt_embeddings.default"));
            assert!(!certificate.contains("prefix_"), "{certificate}");

            let beside = ["--model", base.to_str().unwrap(), "--adapter", &run];
            assert_eq!(logits(&task, &beside), logits(&task, &["--model", &run]));
            let merged = task.text("merged");
            let refused = TRAINER.refuses(["merge", "--model", &run, "--out", &merged]);
            assert!(refused.contains("cannot be merged"), "{refused}");
            assert!(!Path::new(&merged).exists());
        }
    }
    // Beside an adapter of another kind, each as if it were alone.
    let base = fixture("tiny-bert");
    let (one, two) = (task.text("tiny-bert-0"), task.text("tiny-bert-2"));
    let (first, second) = (format!("one={one}"), format!("two={two}"));
    let beside = [
        "--model",
        base.to_str().unwrap(),
        "--adapter",
        &first,
        "--adapter",
        &second,
    ];
    let alone = [one, two].map(|run| logits(&task, &["--model", &run]));
    assert_eq!(logits(&task, &beside), alone.concat());
}

#[test]
fn a_language_model_goes_on_behind_virtual_tokens() {
    let task = Task::new(1, 1);
    let data = task.lines("text.txt", |i| {
        format!("line {i} of the text, over and over")
    });
    for family in ["tiny-gpt2", "tiny-llama", "tiny-gemma3"] {
        let base = task.path(family);
        language_model(&base, family);
        let base = base.to_str().unwrap();
        for (i, (strategy, more)) in KINDS.into_iter().enumerate() {
            let out = task.text(&format!("{family}-{i}"));
            let arguments = [
                "train",
                "--task",
                "clm",
                "--model",
                base,
                "--train",
                &data,
                "--eval",
                &data,
                "--out",
                &out,
                "--strategy",
                strategy,
                "--epochs",
                "4",
                "--lr",
                "0.05",
                "--max-length",
                "24",
            ];
            TRAINER.succeeds([&arguments[..], more].concat());
            let perplexity: Vec<f64> = records(Path::new(&out), "eval")
                .iter()
                .map(|r| r["perplexity"].as_f64().unwrap())
                .collect();
            let (first, last) = (perplexity[0], perplexity[3]);
            assert!(last < 0.95 * first, "{out}: {perplexity:?}");
            TRAINER.succeeds(["verify", &out]);
            let eval = |model: &str| {
                let base = [
                    "eval",
                    "--json",
                    "--data",
                    &data,
                    "--max-length",
                    "24",
                    "--model",
                    model,
                ];
                let said = TRAINER.succeeds(base).out;
                parse(&said)["perplexity"].as_f64().unwrap()
            };
            let found = eval(&out);
            assert!((found / last - 1.0).abs() < 1e-6, "{found} {perplexity:?}");
            assert!(found < 0.9 * eval(base), "{out}: {found}");
            let prompt = ["--prompt", "line 3 of", "--max-new-tokens", "12"];
            let say = |model: &[&str]| {
                TRAINER
                    .succeeds([&["generate"], model, &prompt[..]].concat())
                    .out
            };
            let adapted = say(&["--model", &out]);
            assert_eq!(say(&["--model", base, "--adapter", &out]), adapted);
        }
    }
}

#[test]
fn tokens_are_filled_in_behind_virtual_tokens() {
    let task = Task::new(1, 1);
    let data = task.lines("text.txt", |i| format!("{i} the water and the bridge"));
    let base = task.path("model");
    std::fs::create_dir(&base).unwrap();
    for (from, name) in [
        ("tiny-bert-masked", "config.json"),
        ("tiny-bert-masked", "model.safetensors"),
        ("tiny-bert", "tokenizer.json"),
        ("tiny-bert", "tokenizer_config.json"),
    ] {
        std::fs::copy(fixture(from).join(name), base.join(name)).unwrap();
    }
    for (i, (strategy, more)) in KINDS.into_iter().enumerate() {
        let out = task.text(&format!("run-{i}"));
        let arguments = [
            "train",
            "--task",
            "mlm",
            "--model",
            base.to_str().unwrap(),
            "--train",
            &data,
            "--eval",
            &data,
            "--out",
            &out,
            "--strategy",
            strategy,
            "--epochs",
            "8",
            "--lr",
            "0.05",
            "--seed",
            "3",
        ];
        TRAINER.succeeds([&arguments[..], more].concat());
        let losses: Vec<f64> = records(Path::new(&out), "eval")
            .iter()
            .map(|r| r["loss"].as_f64().unwrap())
            .collect();
        assert!(losses[7] < losses[0] - 0.03, "{out}: {losses:?}");
        TRAINER.succeeds(["verify", &out]);
        let eval = ["eval", "--json", "--model", &out, "--data", &data];
        let found = parse(&TRAINER.succeeds(eval).out)["loss"].as_f64().unwrap();
        assert!(
            (found - best(Path::new(&out), "loss")).abs() < 1e-6,
            "{found} {losses:?}"
        );
    }
}

/// With other parts trained beside them and thawed one after the other: what is kept of frozen layers changes no bit.
#[test]
fn virtual_tokens_combine_with_other_parts() {
    let task = Task::new(90, 30);
    for strategy in [
        "prompt+norms",
        "prefix+last:1",
        "prompt+head+gradual",
        "prefix+last:1+gradual",
        "prompt+last:1+gradual:1",
        "prefix+norms+llrd:0.8",
    ] {
        let tokens = ["--epochs", "3", "--set", "adapter.tokens=3"];
        let runs = ["train.cache=file", "train.cache=off"].map(|cache| {
            let out = format!("{strategy}-{cache}").replace([':', '+', '='], "-");
            train(
                &task,
                "tiny-bert",
                &out,
                strategy,
                &[&tokens[..], &["--set", cache]].concat(),
            );
            TRAINER.succeeds(["verify", &task.text(&out)]);
            logits(&task, &["--model", &task.text(&out)])
        });
        assert!(runs[0] == runs[1], "{strategy}");
    }
    let out = task.path("prefix-last-1-train.cache-off");
    let kept = tensors(&out.join("adapter_model.safetensors"));
    let key = "base_model.bert.encoder.layer.1.attention.self.key.weight";
    assert!(kept.contains_key(key), "{:?}", kept.keys());
}

#[test]
fn virtual_tokens_take_positions_from_the_texts() {
    let task = Task::new(12, 6);
    // The model has 40 positions: a text of 100 words is cut to 36 tokens, and not to 40.
    let long = "water ".repeat(100);
    let rows: String = ["calm", "loud"]
        .map(|label| format!("{{\"text\": \"{long}\", \"label\": \"{label}\"}}\n"))
        .concat();
    std::fs::write(task.path("train.jsonl"), &rows).unwrap();
    std::fs::write(task.path("eval.jsonl"), &rows).unwrap();
    for strategy in ["prompt", "prefix"] {
        let more = ["--epochs", "1", "--set", "adapter.tokens=4"];
        train(&task, "tiny-bert", strategy, strategy, &more);
        let end = &records(&task.path(strategy), "end")[0];
        assert_eq!(end["tokens"], 2 * 36);
        assert_eq!(logits(&task, &["--model", &task.text(strategy)]).len(), 2);
        for (more, said) in [
            (
                "adapter.tokens=40",
                "40 virtual tokens, but the model has 40 positions",
            ),
            ("adapter.tokens=0", "`adapter.tokens` is 0"),
            ("adapter.rank=4", "`adapter.rank` has no effect"),
            ("adapter.targets=query", "`adapter.targets` has no effect"),
        ] {
            let more = ["--strategy", strategy, "--set", more];
            let refused = TRAINER.refuses(task.train(&fixture("tiny-bert"), "bad", &more));
            assert!(refused.contains(said), "{refused}");
        }
    }
}
