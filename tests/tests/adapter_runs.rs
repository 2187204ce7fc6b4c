//! Runs with adapters, as a user makes and uses them: trained, verified, evaluated, predicted with, merged, compared.

use std::path::Path;

use graft_tests::runs::{Task, Trainer, flip_bit, language_model, records, snapshot};
use graft_tests::{fixture, tensors};
use serde_json::Value;

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// A run of a few epochs, which learn the task.
fn train(task: &Task, out: &str, more: &[&str]) -> String {
    let common = [
        "--seed",
        "3",
        "--set",
        "train.epochs=4",
        "--set",
        "optimizer.warmup=0.0",
    ];
    let arguments = task.train(&fixture("tiny-bert"), out, &[&common[..], more].concat());
    TRAINER.succeeds(arguments).out
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn accuracy(task: &Task, model: &str, more: &[&str]) -> f64 {
    let (model, data) = (task.text(model), task.text("eval.jsonl"));
    let base = ["eval", "--json", "--model", &model, "--data", &data];
    let said = TRAINER.succeeds([&base[..], more].concat());
    json(&said.out)["accuracy"].as_f64().unwrap()
}

fn logits(task: &Task, arguments: &[&str]) -> Vec<Vec<f64>> {
    let data = task.text("eval.jsonl");
    let base = ["predict", "--logits", "--data", &data];
    let said = TRAINER.succeeds([&base[..], arguments].concat());
    let row = |line: &str| graft_tests::numbers(&json(line)["logits"]);
    said.out.lines().map(row).collect()
}

fn distance(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b);
    pairs
        .map(|(a, b)| graft_tests::max_distance(a, b))
        .fold(0.0, f64::max)
}

/// Every kind of adapter: it learns, is verified, and merges, if a weight can hold it, into a model that computes the
/// same. Nothing of the base is in the run's directory.
#[test]
fn every_adapter_is_trained_verified_and_merged() {
    let task = Task::new(180, 60);
    for (name, more) in [
        (
            "lora",
            &["--rank", "4", "--alpha", "10", "--lr", "0.02"][..],
        ),
        ("rslora", &["--targets", "all-linear", "--lr", "0.01"]),
        (
            "dora",
            &["--targets", "query,value,output.dense", "--lr", "0.02"],
        ),
        ("ia3", &["--lr", "0.05"]),
        ("adapter", &["--set", "adapter.size=6", "--lr", "0.02"]),
        (
            "pissa",
            &["--rank", "2", "--set", "adapter.init=pissa", "--lr", "0.01"],
        ),
        (
            "plus",
            &[
                "--set",
                "adapter.plus=8",
                "--set",
                "adapter.init=orthogonal",
                "--lr",
                "0.005",
            ],
        ),
    ] {
        let strategy = match name {
            "pissa" | "plus" => "lora",
            name => name,
        };
        let said = train(&task, name, &[&["--strategy", strategy], more].concat());
        let line = said
            .lines()
            .find(|line| line.trim_start().starts_with("strategy"));
        assert!(line.unwrap().ends_with(strategy), "{said}");
        let dir = task.path(name);
        assert!(!dir.join("model.safetensors").exists());
        assert!(!dir.join("best.safetensors").exists());
        let kept = tensors(&dir.join("adapter_model.safetensors"));
        let of_base = |key: &&String| {
            !["lora_", "ia3_", "adapter_", "classifier"]
                .iter()
                .any(|p| key.contains(p))
        };
        assert_eq!(kept.keys().find(of_base), None, "{name}");

        let found = accuracy(&task, name, &[]);
        let best = records(&dir, "eval")
            .into_iter()
            .rfind(|r| r["best"] == true);
        let best = best.unwrap()["accuracy"].as_f64().unwrap();
        assert_eq!(found, best, "{name}: as good as when it was trained");
        assert!(found > 0.6, "{name}: {found}");

        let verified = TRAINER.succeeds(["verify", &task.text(name)]).out;
        assert!(
            verified.contains("39 frozen tensors are bit for bit"),
            "{name}: {verified}"
        );

        let (run, merged) = (task.text(name), task.text(&format!("{name}-merged")));
        if name == "adapter" {
            let refused = TRAINER.refuses(["merge", "--model", &run, "--out", &merged]);
            assert!(refused.contains("cannot be merged"), "{refused}");
            assert!(!Path::new(&merged).exists());
            let base = fixture("tiny-bert");
            let beside = ["--model", base.to_str().unwrap(), "--adapter", &run];
            assert_eq!(logits(&task, &beside), logits(&task, &["--model", &run]));
            continue;
        }
        let said = TRAINER
            .succeeds(["merge", "--model", &run, "--out", &merged])
            .out;
        assert!(said.contains("largest difference"), "{said}");
        let proof = graft_tests::json(&Path::new(&merged).join("merge.json"));
        assert_eq!(proof["texts"], 8);
        assert!(proof["max_difference"].as_f64().unwrap() < 1e-4, "{proof}");
        let gap = distance(
            &logits(&task, &["--model", &run]),
            &logits(&task, &["--model", &merged]),
        );
        assert!(gap < 1e-4, "{name}: off by {gap:e}");
        TRAINER.succeeds(["merge", "--model", &run, "--check", &merged]);
    }
    // Several adapters of one base, told apart by name; both for each text if none is chosen.
    let base = fixture("tiny-bert");
    let base = base.to_str().unwrap();
    let (one, two) = (
        format!("one={}", task.text("lora")),
        format!("two={}", task.text("ia3")),
    );
    let beside = ["--model", base, "--adapter", &one, "--adapter", &two];
    let both = logits(&task, &beside);
    let alone = [
        logits(&task, &["--model", &task.text("lora")]),
        logits(&task, &["--model", &task.text("ia3")]),
    ];
    assert_eq!(both, alone.concat());
    let chosen = logits(&task, &[&beside[..], &["--use", "two"]].concat());
    assert_eq!(chosen, alone[1]);
    let unclear =
        TRAINER.refuses([&["eval", "--data", &task.text("eval.jsonl")], &beside[..]].concat());
    assert!(unclear.contains("choose one with --use NAME"), "{unclear}");
    let unknown = TRAINER.refuses(
        [
            &[
                "predict",
                "--data",
                &task.text("eval.jsonl"),
                "--use",
                "tow",
            ],
            &beside[..],
        ]
        .concat(),
    );
    assert!(unknown.contains("`tow` is no adapter"), "{unknown}");

    let runs = [task.text("lora"), task.text("ia3")];
    let table = TRAINER
        .succeeds([&["compare".to_owned()], &runs[..]].concat())
        .out;
    assert!(
        table.contains("lora") && table.contains("ia3") && table.contains("step"),
        "{table}"
    );
}

/// A model that was merged with another scale is not the merged model, and the check says so.
#[test]
fn a_wrong_scale_is_found_out() {
    let task = Task::new(120, 30);
    train(&task, "lora", &["--strategy", "lora", "--lr", "0.02"]);
    let wrong = task.path("wrong");
    std::fs::create_dir(&wrong).unwrap();
    for (name, bytes) in snapshot(&task.path("lora")) {
        std::fs::write(wrong.join(name), bytes).unwrap();
    }
    let config = wrong.join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let changed = text.replace("\"lora_alpha\": 16", "\"lora_alpha\": 8");
    assert_ne!(changed, text);
    std::fs::write(&config, changed).unwrap();
    let (run, wrong) = (task.text("lora"), task.text("wrong"));
    let merged = task.text("merged");
    TRAINER.succeeds(["merge", "--model", &wrong, "--out", &merged]);
    let refused = TRAINER.refuses(["merge", "--model", &run, "--check", &merged]);
    assert!(
        refused.contains("this is not the merged model"),
        "{refused}"
    );
    assert!(
        refused.contains("differs from base and adapter by up to"),
        "{refused}"
    );
    // A tolerance that nothing meets: the result is not kept.
    let strict = ["merge", "--model", &run, "--tolerance", "0", "--out"];
    let kept = task.text("strict");
    let refused = TRAINER.refuses([&strict[..], &[&kept]].concat());
    assert!(
        refused.contains("the merged model is not kept"),
        "{refused}"
    );
    assert!(!Path::new(&kept).exists());
    // Nothing but an earlier merge is replaced.
    let refused = TRAINER.refuses(["merge", "--model", &run, "--out", &wrong]);
    assert!(refused.contains("no merge.json"), "{refused}");
    TRAINER.succeeds(["merge", "--model", &run, "--out", &merged]);
}

/// One bit of the adapter, or of the base that it belongs to, and the run is not what its certificate says.
#[test]
fn a_changed_bit_of_adapter_or_base_is_named() {
    let task = Task::new(60, 12);
    let base = task.path("base");
    std::fs::create_dir(&base).unwrap();
    for (name, bytes) in snapshot(&fixture("tiny-bert")) {
        std::fs::write(base.join(name), bytes).unwrap();
    }
    let more = ["--strategy", "lora", "--epochs", "1", "--lr", "0.01"];
    TRAINER.succeeds(task.train(&base, "lora", &more));
    let run = task.text("lora");
    TRAINER.succeeds(["verify", &run]);
    let file = task.path("lora").join("adapter_model.safetensors");
    let kept = std::fs::read(&file).unwrap();
    let tensor = "bert.encoder.layer.1.attention.self.value.lora_B";
    flip_bit(&file, &format!("base_model.model.{tensor}.weight"));
    let refused = TRAINER.refuses(["verify", &run]);
    assert!(
        refused.contains(&format!("trained tensor `{tensor}.default.weight` differs")),
        "{refused}"
    );
    std::fs::write(&file, kept).unwrap();
    TRAINER.succeeds(["verify", &run]);
    flip_bit(
        &base.join("model.safetensors"),
        "bert.encoder.layer.0.output.dense.weight",
    );
    let refused = TRAINER.refuses(["verify", &run]);
    let frozen = "frozen tensor `bert.encoder.layer.0.output.dense.weight` differs from before";
    assert!(refused.contains(frozen), "{refused}");
}

/// Adapters with norms, biases and the pooler trained beside them; what cannot be kept is refused before anything runs.
#[test]
fn adapters_combine_with_other_parts() {
    let task = Task::new(60, 12);
    let few = ["--epochs", "1", "--lr", "0.01"];
    train(
        &task,
        "norms",
        &[&few[..], &["--strategy", "lora+norms"]].concat(),
    );
    let kept = tensors(&task.path("norms").join("adapter_model.safetensors"));
    let norm = "base_model.model.bert.encoder.layer.0.output.LayerNorm.weight";
    assert!(kept.contains_key(norm), "{:?}", kept.keys());
    TRAINER.succeeds(["verify", &task.text("norms")]);
    let biases = ["--strategy", "lora", "--set", "adapter.bias=all"];
    train(&task, "biases", &[&few[..], &biases].concat());
    let kept = tensors(&task.path("biases").join("adapter_model.safetensors"));
    let query = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias";
    assert!(kept.contains_key(query), "{:?}", kept.keys());
    TRAINER.succeeds(["verify", &task.text("biases")]);
    accuracy(&task, "biases", &[]);
    for (more, said) in [
        (
            &["--strategy", "lora", "--rule", "train *.query.weight"][..],
            "a rule trains bert.encoder.layer.0.attention.self.query.weight, whose layer has an adapter",
        ),
        (&["--strategy", "lora+full"], "leave out what is beside it"),
        (
            &["--strategy", "lora", "--targets", "qeury"],
            "the nearest name is",
        ),
        (
            &["--strategy", "head", "--rank", "4"],
            "`adapter.rank` has no effect",
        ),
        (
            &["--strategy", "ia3", "--rank", "4"],
            "`adapter.rank` has no effect",
        ),
        (
            &["--strategy", "lora", "--rank", "0"],
            "`adapter.rank` is 0",
        ),
        (
            &["--strategy", "lora", "--set", "adapter.init=eva"],
            "`adapter.init` is \"eva\"",
        ),
    ] {
        let refused = TRAINER.refuses(task.train(&fixture("tiny-bert"), "bad", more));
        assert!(refused.contains(said), "{refused}");
        assert!(!task.path("bad").exists());
    }
}

#[test]
fn a_language_model_is_adapted_generated_with_and_merged() {
    let task = Task::new(1, 1);
    let train = task.lines("text.txt", |i| {
        format!("line {i} of the text, over and over")
    });
    for family in ["tiny-gpt2", "tiny-llama"] {
        let base = task.path(family);
        language_model(&base, family);
        let out = task.text(&format!("{family}-lora"));
        let arguments = [
            "train",
            "--task",
            "clm",
            "--model",
            base.to_str().unwrap(),
            "--train",
            &train,
            "--eval",
            &train,
            "--out",
            &out,
            "--strategy",
            "lora",
            "--rank",
            "4",
            "--epochs",
            "3",
            "--lr",
            "0.02",
            "--max-length",
            "32",
        ];
        TRAINER.succeeds(arguments);
        let perplexity: Vec<f64> = records(Path::new(&out), "eval")
            .iter()
            .map(|r| r["perplexity"].as_f64().unwrap())
            .collect();
        assert!(
            perplexity[2] < 0.9 * perplexity[0],
            "{family}: {perplexity:?}"
        );
        TRAINER.succeeds(["verify", &out]);
        let merged = format!("{out}-merged");
        TRAINER.succeeds(["merge", "--model", &out, "--out", &merged]);
        let prompt = ["--prompt", "line 3 of", "--max-new-tokens", "12"];
        let say = |model: &[&str]| {
            TRAINER
                .succeeds([&["generate"], model, &prompt[..]].concat())
                .out
        };
        let adapted = say(&["--model", &out]);
        assert_eq!(say(&["--model", &merged]), adapted, "{family}");
        let beside = ["--model", base.to_str().unwrap(), "--adapter", &out];
        assert_eq!(say(&beside), adapted, "{family}");
        assert_ne!(
            say(&["--model", base.to_str().unwrap()]),
            adapted,
            "{family}"
        );
        let eval = [
            "eval",
            "--model",
            &out,
            "--data",
            &train,
            "--max-length",
            "32",
            "--json",
        ];
        let found = json(&TRAINER.succeeds(eval).out)["perplexity"]
            .as_f64()
            .unwrap();
        assert!(
            (found / perplexity[2] - 1.0).abs() < 1e-6,
            "{found} {perplexity:?}"
        );
    }
}

#[test]
fn inspect_shows_what_an_adapter_trains() {
    let base = fixture("tiny-bert");
    let model = base.to_str().unwrap();
    let said = TRAINER
        .succeeds(["inspect", model, "--strategy", "lora", "--labels", "3"])
        .out;
    let line = said
        .lines()
        .find(|l| l.contains("layer.0.attention.self.query.lora_A.default.weight"));
    assert!(line.unwrap().ends_with("train"), "{said}");
    assert!(said.contains("lora trains 10 tensors"), "{said}");

    let task = Task::new(24, 6);
    let few = ["--epochs", "1", "--rank", "2", "--alpha", "7"];
    TRAINER.succeeds(task.train(&base, "run", &[&few[..], &["--strategy", "dora"]].concat()));
    let run = task.text("run");
    let said = TRAINER.succeeds(["inspect", &run]).out;
    let title = format!("{run}: dora of rank 2 and alpha 7, beside {model}");
    assert!(said.starts_with(&title), "{said}");
    let matrix = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight";
    let line = said.lines().find(|line| line.starts_with(matrix)).unwrap();
    assert!(line.contains("[2, 32]") && line.ends_with("64"), "{line}");
    assert!(said.trim_end().ends_with("parameters"), "{said}");
    let refused = TRAINER.refuses(["inspect", &run, "--strategy", "head"]);
    assert!(refused.contains("is an adapter"), "{refused}");
}
