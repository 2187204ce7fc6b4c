//! A plan is what a run takes, and a run that would take more than there is does not begin.

use std::path::Path;

use graft_tensor::Category;
use graft_tests::runs::{Task, Trainer, language_model, records};
use graft_tests::{fixture, minilm_wheel};
use graft_trainer::config::{RunConfig, Settings};
use graft_trainer::train::{plan, train};

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

fn config(task: &Task, model: &Path, out: &str, settings: &[&str]) -> RunConfig {
    let mut all = Settings::new();
    all.flag("model.path", "--model", model.to_str().unwrap());
    all.flag("data.train", "--train", task.text("train.jsonl"));
    all.flag("data.eval", "--eval", task.text("eval.jsonl"));
    all.flag("output.dir", "--out", task.text(out));
    settings.iter().for_each(|s| all.set(s).unwrap());
    RunConfig::resolve(all).unwrap()
}

/// Expects a plan that is within 2 % of what the run takes; each category, within 2 % of the whole.
fn agrees(config: &RunConfig) {
    let plan = plan(config).unwrap();
    let report = train(config).unwrap();
    let whole = report.peak_tensors as f64;
    let near = |planned: usize, measured: usize, what: &str| {
        let error = (planned as f64 - measured as f64).abs();
        assert!(
            error <= 0.02 * whole,
            "{what}: {planned} planned, {measured} measured, under {:?}",
            config.strategy
        );
    };
    for (category, measured) in report.usage {
        near(plan.usage.peak(category), measured, &category.to_string());
    }
    near(plan.usage.peak_total, report.peak_tensors, "together");
    let kept = report.kept.map_or(0, |kept| kept.memory);
    assert!(plan.kept >= kept, "{} kept, {kept} planned", plan.kept);
}

#[test]
fn a_plan_of_a_classifier_is_what_the_run_takes() {
    let task = Task::new(40, 12);
    for (i, family) in ["tiny-bert", "tiny-distilbert"].iter().enumerate() {
        for (j, settings) in [
            &["strategy.name=head"][..],
            &["strategy.name=head", "train.cache=off"],
            &["strategy.name=last:1", "train.cache_memory=0"],
            &["strategy.name=full"],
            &["strategy.name=bitfit", "optimizer.kind=sgd"],
            &["strategy.name=norms", "train.accumulate=3"],
            &["strategy.name=gradual"],
            &["strategy.name=llrd", "train.max_tokens=50"],
            &["strategy.name=prompt", "adapter.tokens=5"],
            &["strategy.name=prefix+norms", "adapter.projection=6"],
            &["strategy.name=adapter", "adapter.size=3"],
        ]
        .iter()
        .enumerate()
        {
            let precision = ["train.precision=f32", "train.precision=bf16"][(i + j) % 2];
            let mut settings = settings.to_vec();
            settings.extend(["train.batch_size=5", precision]);
            if settings.iter().any(|s| s.starts_with("train.max_tokens")) {
                settings.retain(|s| !s.starts_with("train.batch_size"));
            }
            agrees(&config(&task, &fixture(family), "run", &settings));
        }
    }
}

#[test]
fn a_plan_of_labels_of_words_is_what_the_run_takes() {
    let task = Task::of_words(40, 12);
    for (i, settings) in [
        &["strategy.name=head"][..],
        &["strategy.name=head", "train.cache=off"],
        &["strategy.name=last:1", "train.accumulate=2"],
        &["strategy.name=full"],
        &["strategy.name=lora", "adapter.targets=all-linear"],
        &["strategy.name=prompt", "adapter.tokens=5"],
    ]
    .iter()
    .enumerate()
    {
        let precision = ["train.precision=f32", "train.precision=bf16"][i % 2];
        let mut settings = settings.to_vec();
        settings.extend(["task.kind=ner", "train.batch_size=5", precision]);
        agrees(&config(&task, &fixture("tiny-bert"), "run", &settings));
    }
}

#[test]
fn a_plan_of_a_language_model_is_what_the_run_takes() {
    let task = Task::new(40, 12);
    for (family, settings) in [
        ("tiny-gpt2", &["strategy.name=full"][..]),
        (
            "tiny-gpt2",
            &["strategy.name=last:1", "train.precision=bf16"],
        ),
        ("tiny-llama", &["strategy.name=head", "train.accumulate=2"]),
        (
            "tiny-qwen3",
            &["strategy.name=norms", "train.precision=bf16"],
        ),
        (
            "tiny-gemma2",
            &["strategy.name=gradual", "optimizer.kind=sgd"],
        ),
        (
            "tiny-gpt2",
            &["strategy.name=prefix", "train.precision=bf16"],
        ),
        (
            "tiny-llama",
            &["strategy.name=prompt", "adapter.text=a text"],
        ),
    ] {
        let model = task.path(family);
        language_model(&model, family);
        let mut settings = settings.to_vec();
        settings.extend(["task.kind=clm", "data.max_length=24", "train.epochs=2"]);
        agrees(&config(&task, &model, "run", &settings));
    }
}

#[test]
fn a_plan_of_minilm_is_what_the_run_takes() {
    let task = Task::new(24, 6);
    for settings in [
        ["strategy.name=last:1", "train.precision=f32"],
        ["strategy.name=full", "train.precision=bf16"],
    ] {
        let mut settings = settings.to_vec();
        settings.extend(["train.epochs=1", "train.batch_size=12"]);
        agrees(&config(&task, &minilm_wheel(), "run", &settings));
    }
}

#[test]
fn the_plan_is_printed_by_category() {
    let task = Task::new(24, 6);
    let arguments = task.train(&fixture("tiny-bert"), "run", &["--device", "cpu"]);
    let arguments = arguments
        .into_iter()
        .map(|a| if a == "train" { "plan".to_owned() } else { a });
    let said = TRAINER.succeeds(arguments).out;
    for category in Category::ALL {
        assert!(said.contains(&format!("  {category}")), "{said}");
    }
    for wanted in ["at the worst moment", "in all", "longest batch", "MiB"] {
        assert!(said.contains(wanted), "{said}");
    }
    assert!(!task.path("run").exists());
    let out = task.text("run");
    let without: Vec<String> = task
        .train(&fixture("tiny-bert"), "run", &[])
        .into_iter()
        .filter(|a| a != "--out" && *a != out)
        .map(|a| if a == "train" { "plan".to_owned() } else { a })
        .collect();
    assert_eq!(
        TRAINER.succeeds(without).out,
        said,
        "a plan needs no output"
    );
}

#[test]
fn a_run_that_does_not_fit_does_not_begin() {
    let task = Task::new(60, 6);
    let model = fixture("tiny-bert");
    let run = |limit: &str| {
        let limit = format!("train.memory_limit={limit}");
        let more = ["--batch-size", "32", "--epochs", "2", "--set", &limit];
        TRAINER.run(task.train(&model, "run", &more))
    };
    let said = run("1");
    assert_eq!(said.code, Some(1), "{}", said.err);
    for wanted in [
        "train.memory_limit: the run needs",
        "1.0 MiB are allowed",
        "weights",
        "optimizer",
        "what fits: train.batch_size=",
        "train.accumulate=",
        "train.memory_limit=0",
    ] {
        assert!(said.err.contains(wanted), "{wanted}: {}", said.err);
    }
    assert!(!task.path("run").exists());
    // What it says would fit does fit.
    let fits = said.err.split("train.batch_size=").nth(1).unwrap();
    let size: String = fits.chars().take_while(char::is_ascii_digit).collect();
    let more = [
        "--batch-size",
        &size,
        "--epochs",
        "2",
        "--set",
        "train.memory_limit=1",
    ];
    TRAINER.succeeds(task.train(&model, "run", &more));
    let end = &records(&task.path("run"), "end")[0];
    assert!(end["peak_tensors"].as_u64().unwrap() <= 1 << 20, "{end}");
    for limit in ["0", "4096"] {
        let said = run(limit);
        assert_eq!(said.code, Some(0), "{}", said.err);
    }
}
