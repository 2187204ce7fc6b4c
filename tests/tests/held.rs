//! Runs beside a base that is held in bf16, NF4 or int8, as a user makes and uses them.

use std::path::Path;

use graft_tests::fixture;
use graft_tests::runs::{Task, Trainer, language_model, records};
use graft_trainer::config::{RunConfig, Settings};
use graft_trainer::train::plan;
use serde_json::Value;

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));
const COMMON: [&str; 10] = [
    "--strategy",
    "lora",
    "--lr",
    "0.02",
    "--seed",
    "3",
    "--set",
    "train.epochs=4",
    "--set",
    "optimizer.warmup=0.0",
];

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn accuracy(task: &Task, model: &str, more: &[&str]) -> f64 {
    let (model, data) = (task.text(model), task.text("eval.jsonl"));
    let base = ["eval", "--json", "--model", &model, "--data", &data];
    json(&TRAINER.succeeds([&base[..], more].concat()).out)["accuracy"]
        .as_f64()
        .unwrap()
}

fn logits(task: &Task, arguments: &[&str]) -> Vec<f64> {
    let data = task.text("eval.jsonl");
    let base = ["predict", "--logits", "--data", &data];
    let said = TRAINER.succeeds([&base[..], arguments].concat());
    let row = |line: &str| graft_tests::numbers(&json(line)["logits"]);
    said.out.lines().flat_map(row).collect()
}

/// It learns, is verified over what was held, is evaluated beside the base that it was trained beside, and is merged into
/// the base as its files have it, which is said to be another one.
#[test]
fn every_base_is_trained_beside_verified_and_merged() {
    let task = Task::new(180, 60);
    let base = fixture("tiny-bert");
    for (held, dtype) in [("bf16", "BF16"), ("nf4", "NF4"), ("int8", "INT8")] {
        let more = [&COMMON[..], &["--base", held]].concat();
        TRAINER.succeeds(task.train(&base, held, &more));
        let dir = task.path(held);
        let best = records(&dir, "eval")
            .into_iter()
            .rfind(|r| r["best"] == true);
        let best = best.unwrap()["accuracy"].as_f64().unwrap();
        assert!(best > 0.6, "{held}: {best}");
        assert_eq!(
            accuracy(&task, held, &[]),
            best,
            "{held}: as good as when it was trained"
        );

        let certificate = graft_tests::json(&dir.join("certificate.json"));
        let list = certificate["tensors"].as_array().unwrap();
        let of = |end: &str| -> Vec<&Value> {
            let named = |t: &&Value| t["name"].as_str().unwrap().ends_with(end);
            list.iter().filter(named).collect()
        };
        let queries = of("layer.0.attention.self.query.weight");
        assert_eq!(queries.len(), 1);
        assert_eq!(queries[0]["dtype"], dtype);
        for other in [
            "word_embeddings.weight",
            "LayerNorm.weight",
            "query.bias",
            "pooler.dense.weight",
        ] {
            assert!(of(other).iter().all(|t| t["dtype"] == "F32"), "{other}");
            assert!(!of(other).is_empty(), "{other}");
        }
        let verified = TRAINER.succeeds(["verify", &task.text(held)]).out;
        assert!(
            verified.contains("frozen tensors are bit for bit"),
            "{verified}"
        );

        let run = task.text(held);
        let own = logits(&task, &["--model", &run]);
        let full = logits(&task, &["--model", &run, "--base", "f32"]);
        let gap = graft_tests::max_distance(&own, &full);
        assert!(gap > 0.0 && gap < 2.0, "{held}: {gap} from the base in f32");

        let merged = task.text(&format!("{held}-merged"));
        let said = TRAINER
            .succeeds(["merge", "--model", &run, "--out", &merged])
            .out;
        assert!(said.contains(&format!("beside a base in {held}")), "{said}");
        let proof = graft_tests::json(&Path::new(&merged).join("merge.json"));
        assert!(proof["max_difference"].as_f64().unwrap() < 1e-4, "{proof}");
        assert_eq!(proof["trained_on"]["base"], held);
        assert!(
            proof["trained_on"]["max_difference"].as_f64().unwrap() > 1e-4,
            "{proof}"
        );
        let gap = graft_tests::max_distance(&full, &logits(&task, &["--model", &merged]));
        assert!(gap < 1e-4, "{held}: merged is off by {gap:e}");

        let config =
            RunConfig::resolve(Settings::from_file(&dir.join("config.resolved.toml")).unwrap());
        let mut config = config.unwrap();
        config.output.dir = task.path("elsewhere");
        let planned = plan(&config).unwrap().usage.peak_total as f64;
        let measured = records(&dir, "end")[0]["peak_tensors"].as_f64().unwrap();
        assert!(
            (planned - measured).abs() <= 0.02 * measured,
            "{held}: {planned} planned, {measured} measured"
        );
    }
}

#[test]
fn a_base_that_would_be_trained_or_saved_is_refused() {
    let task = Task::new(12, 6);
    let base = fixture("tiny-bert");
    let refused = |more: &[&str]| TRAINER.refuses(task.train(&base, "no", more));
    let said = refused(&["--base", "nf4"]);
    assert!(
        said.contains("`model.base` is \"nf4\"") && said.contains("\"full\""),
        "{said}"
    );
    let said = refused(&["--base", "int8", "--strategy", "head"]);
    assert!(said.contains("take an adapter"), "{said}");
    let rule = "train *.layer.1.output.dense.weight";
    let said = refused(&["--base", "nf4", "--strategy", "lora", "--rule", rule]);
    assert!(
        said.contains("layer.1.output.dense.weight` would be trained"),
        "{said}"
    );
    let said = refused(&["--base", "bf16", "--strategy", "lora+last:1"]);
    assert!(said.contains("holds it in bf16"), "{said}");
    let pissa = ["--strategy", "lora", "--set", "adapter.init=pissa"];
    let said = refused(&[&pissa[..], &["--base", "nf4"]].concat());
    assert!(said.contains("held in nf4"), "{said}");
    let said = refused(&["--base", "nf3", "--strategy", "lora"]);
    assert!(said.contains("\"nf4\""), "{said}");
    let said = refused(&["--set", "model.load_in_4bit=true", "--strategy", "lora"]);
    assert!(said.contains("did you mean `model.base`?"), "{said}");
    assert!(!task.path("no").exists());
}

/// Kinds of adapters, and decoders whose matrices lie the other way.
#[test]
fn other_adapters_and_families_run_beside_codes() {
    let task = Task::new(24, 6);
    let once = ["--base", "nf4", "--epochs", "1"];
    for strategy in ["dora", "rslora+norms", "ia3", "lora+head"] {
        let more = [&once[..], &["--strategy", strategy, "--precision", "bf16"]].concat();
        TRAINER.succeeds(task.train(&fixture("tiny-bert"), "run", &more));
        TRAINER.succeeds(["verify", &task.text("run")]);
    }
    for family in ["gpt2", "llama"] {
        let model = task.path(family);
        language_model(&model, &format!("tiny-{family}"));
        let text = "the lessee returns the key. ".repeat(40);
        std::fs::write(task.path("a.txt"), text).unwrap();
        let model = task.text(family);
        let out = task.text(&format!("{family}-lora"));
        let data = task.text("a.txt");
        let arguments = [
            "train", "--task", "clm", "--model", &model, "--train", &data, "--eval", &data,
        ];
        let more = ["--strategy", "lora", "--max-length", "20", "--out", &out];
        TRAINER.succeeds([&arguments[..], &more, &once].concat());
        TRAINER.succeeds(["verify", &out]);
        let continued = |more: &[&str]| {
            let generate = ["generate", "--prompt", "the", "--max-new-tokens", "8"];
            TRAINER.succeeds([&generate[..], more].concat()).out
        };
        for held in ["f32", "bf16", "nf4", "int8"] {
            let said = continued(&["--model", &model, "--base", held]);
            assert!(!said.trim().is_empty(), "{family} {held}");
        }
        continued(&["--model", &out]);
    }
}
