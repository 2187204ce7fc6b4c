//! Encoders that fill in tokens, as a user trains them.

use std::path::Path;

use graft_tests::fixture;
use graft_tests::runs::{records, snapshot};
use serde_json::Value;

use crate::{Bench, TRAINER};

/// One epoch, which is one step: a warmup would leave it no learning rate.
const ONE_STEP: [&str; 4] = ["--epochs", "1", "--set", "optimizer.warmup=0"];

/// The fixture of that name with the tokenizer of its family, in `model` of a bench.
pub(crate) fn bench(weights: &str, family: &str) -> Bench {
    let bench = Bench::new("tiny-gpt2");
    let model = bench.dir.path().join("model");
    std::fs::remove_dir_all(&model).unwrap();
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture(weights).join(name), model.join(name)).unwrap();
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(fixture(family).join(name), model.join(name)).unwrap();
    }
    bench
}

pub(crate) fn train(bench: &Bench, out: &str, more: &[&str]) -> Vec<String> {
    let mut arguments = bench.train(out, more);
    let place = arguments.iter().position(|a| a == "--task").unwrap();
    arguments[place + 1] = "mlm".to_owned();
    arguments
}

fn eval(bench: &Bench, model: &str, more: &[&str]) -> Value {
    let (model, data) = (bench.path(model), bench.path("train.jsonl"));
    let arguments = ["eval", "--json", "--model", &model, "--data", &data];
    let said = TRAINER.succeeds(arguments.iter().chain(more));
    serde_json::from_str(&said.out).unwrap()
}

fn loss(value: &Value) -> f64 {
    value["loss"].as_f64().unwrap()
}

#[test]
fn each_family_learns_to_fill_in_and_a_classifier_grows_on_it() {
    for family in ["tiny-bert", "tiny-roberta", "tiny-distilbert"] {
        let bench = bench(&format!("{family}-masked"), family);
        let data = bench.path("train.jsonl");
        let before = eval(&bench, "model", &[]);
        let more = [
            "--eval", &data, "--epochs", "120", "--lr", "0.01", "--seed", "3",
        ];
        let said = TRAINER.succeeds(train(&bench, "run", &more));
        assert!(said.err.contains("to fill in"), "{}", said.err);
        assert!(!said.err.contains("new for this task"), "{}", said.err);
        TRAINER.succeeds(["verify", &bench.path("run")]);
        let after = eval(&bench, "run", &[]);
        assert_eq!(before["tokens"], after["tokens"]);
        assert_eq!(after["documents"], 10);
        assert!(
            loss(&after) < 0.5 * loss(&before),
            "{family}: {before} {after}"
        );
        let evals = records(&bench.dir.path().join("run"), "eval");
        let best = evals.iter().rfind(|e| e["best"] == true).unwrap();
        assert!((loss(best) - loss(&after)).abs() < 1e-9, "{best} {after}");
        // The class, and no label.
        let config = std::fs::read_to_string(bench.path("run") + "/config.json").unwrap();
        assert!(
            config.contains("ForMaskedLM") && !config.contains("LABEL"),
            "{config}"
        );
        let list = TRAINER
            .succeeds(["inspect", &bench.path("run"), "--strategy", "head"])
            .out;
        assert_eq!(
            list.lines().filter(|l| l.ends_with("  train")).count(),
            5,
            "{list}"
        );
        // The adapted encoder is the trunk of a classifier.
        let rows = "{\"text\": \"the river\", \"label\": 0}\n{\"text\": \"rain\", \"label\": 1}\n";
        std::fs::write(bench.path("labels.jsonl"), rows).unwrap();
        let (run, labels, out) = (
            bench.path("run"),
            bench.path("labels.jsonl"),
            bench.path("c"),
        );
        let said = TRAINER.succeeds([
            "train",
            "--model",
            &run,
            "--train",
            &labels,
            "--strategy",
            "head",
            "--epochs",
            "1",
            "--set",
            "optimizer.warmup=0",
            "--out",
            &out,
        ]);
        assert!(said.err.contains("new for this task"), "{}", said.err);
        TRAINER.succeeds(["verify", &out]);
    }
}

#[test]
fn a_head_that_the_checkpoint_lacks_is_new_and_said_to_be() {
    let bench = bench("tiny-bert", "tiny-bert");
    let data = bench.path("train.jsonl");
    let model = bench.path("model");
    let said = TRAINER.refuses(["eval", "--task", "mlm", "--model", &model, "--data", &data]);
    assert!(
        said.contains("expected BertForMaskedLM") && said.contains("--task mlm"),
        "{said}"
    );
    let said = TRAINER.succeeds(train(&bench, "run", &ONE_STEP)).err;
    let new = "new for this task: `cls.predictions.transform.dense.weight`";
    assert!(said.contains(new), "{said}");
    assert!(eval(&bench, "run", &[])["loss"].is_number());
}

#[test]
fn masks_are_new_in_each_epoch_and_do_not_depend_on_batches() {
    let bench = bench("tiny-bert-masked", "tiny-bert");
    let common = [
        "--set",
        "optimizer.kind=sgd",
        "--lr",
        "0.05",
        "--epochs",
        "3",
        "--set",
        "optimizer.schedule=constant",
        "--set",
        "optimizer.clip_norm=0",
    ];
    let mut all = Vec::new();
    for (batch, accumulate, threads) in [("8", "1", "1"), ("4", "2", "2"), ("1", "8", "2")] {
        let accumulate = format!("train.accumulate={accumulate}");
        let mut more = vec![
            "--batch-size",
            batch,
            "--set",
            &accumulate,
            "--threads",
            threads,
        ];
        more.extend(common);
        TRAINER.succeeds(train(&bench, batch, &more));
        let steps = records(&bench.dir.path().join(batch), "step");
        all.push((
            bench.weights(batch),
            steps.iter().map(loss).collect::<Vec<f64>>(),
        ));
    }
    let (whole, losses) = &all[0];
    for (parts, again) in &all[1..] {
        assert!(
            graft_tests::max_distance(losses, again) < 1e-5,
            "{losses:?} {again:?}"
        );
        for (name, tensor) in whole {
            let values = |t: &graft_tensor::Tensor| t.to_f64().unwrap();
            let error = graft_tests::max_distance(&values(tensor), &values(&parts[name]));
            assert!(error < 1e-6, "{name}: {error:e}");
        }
    }
    // The model stands still, and only the masks change from epoch to epoch.
    let frozen = [
        "--lr",
        "1e-30",
        "--set",
        "train.audit=false",
        "--set",
        "optimizer.weight_decay=0",
        "--epochs",
        "3",
        "--batch-size",
        "10",
    ];
    TRAINER.succeeds(train(&bench, "still", &frozen));
    let epochs = records(&bench.dir.path().join("still"), "epoch");
    let losses: Vec<f64> = epochs.iter().map(loss).collect();
    assert!(
        losses[0] != losses[1] && losses[1] != losses[2],
        "{losses:?}"
    );
}

#[test]
fn a_row_is_shown_as_it_is_hidden() {
    let bench = bench("tiny-bert-masked", "tiny-bert");
    let (data, model) = (bench.path("train.jsonl"), bench.path("model"));
    let arguments = ["data", "show", &data, "--model", &model, "--row", "6"];
    let said = TRAINER.succeeds(arguments).out;
    // 15 % of what lies between the two special tokens.
    assert!(
        said.contains("[CLS]") && said.lines().any(|l| l.starts_with("> ")),
        "{said}"
    );
    let last = said.lines().last().unwrap();
    assert!(
        last.contains("train.jsonl:6: ") && last.contains("of them supervised"),
        "{said}"
    );
}

#[test]
fn nothing_is_enough_to_pretrain_an_encoder_but_a_configuration_and_a_tokenizer() {
    let bench = bench("tiny-bert", "tiny-bert");
    std::fs::remove_file(bench.path("model") + "/model.safetensors").unwrap();
    let mut arguments = train(&bench, "run", &ONE_STEP);
    arguments[0] = "pretrain".to_owned();
    let said = TRAINER.succeeds(arguments).err;
    assert!(said.contains("all weights are new"), "{said}");
    assert!(snapshot(Path::new(&bench.path("run"))).contains_key("model.safetensors"));
}

#[test]
fn what_cannot_be_filled_in_is_refused() {
    let bench = bench("tiny-bert-masked", "tiny-bert");
    let refuse = |more: &[&str], wanted: &[&str]| {
        let said = TRAINER.refuses(train(&bench, "out", more));
        for wanted in wanted {
            assert!(said.contains(wanted), "{wanted} in {said}");
        }
    };
    refuse(
        &["--max-length", "2"],
        &["no room beside 2 special tokens", "ask for 3"],
    );
    refuse(&["--max-length", "41"], &["40 positions"]);
    bench.write("train.jsonl", &["", " "]);
    refuse(&[], &["no document holds any text"]);
    bench.write("train.jsonl", &["[SEP]"]);
    refuse(&[], &["no document has a token to fill in"]);
    let gpt = fixture("tiny-gpt2");
    let mut arguments = train(&bench, "out", &[]);
    let place = arguments.iter().position(|a| a == "--model").unwrap();
    arguments[place + 1] = gpt.to_str().unwrap().to_owned();
    let said = TRAINER.refuses(arguments);
    assert!(
        said.contains("family gpt2") && said.contains("fills in no token"),
        "{said}"
    );
}
