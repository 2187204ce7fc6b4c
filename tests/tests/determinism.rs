//! The same seed gives the same bits, whatever the work was split into.

use std::path::Path;

use graft_autograd::Gradients;
use graft_nn::optimizer::Rule as UpdateRule;
use graft_nn::{Decay, Forward, Optimizer, Schedule, losses};
use graft_tensor::ops::random::{Key, shuffle};
use graft_tensor::{Memory, Tensor};
use graft_tests::runs::{Task, Trainer, records, snapshot};
use graft_tests::{ENCODERS, fixture, max_distance, minilm_wheel, tensors};
use graft_trainer::batch::{BatchSize, epoch_batches};
use graft_trainer::config::{Rule, Strategy};
use graft_trainer::course::policy;
use graft_trainer::data::{Columns, Dataset, training_labels};
use graft_trainer::evaluate::Labelled;
use graft_trainer::model::Model;
use graft_trainer::targets::Targets;

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// Trains without an evaluation file, so that the last model is the one that is kept; the bytes of its weights.
fn weights(task: &Task, model: &str, settings: &[(&str, &str)]) -> Vec<u8> {
    let model = match ENCODERS.contains(&model) {
        true => fixture(model).to_str().unwrap().to_owned(),
        false => model.to_owned(),
    };
    let mut arguments = vec!["train".to_owned()];
    for (key, value) in [
        ("model.path", model.as_str()),
        ("data.train", &task.text("train.jsonl")),
        ("output.dir", &task.text("run")),
    ]
    .iter()
    .chain(settings)
    {
        arguments.extend(["--set".to_owned(), format!("{key}={value}")]);
    }
    TRAINER.succeeds(arguments);
    std::fs::read(task.path("run").join("model.safetensors")).unwrap()
}

#[test]
fn bits_depend_on_the_seed_and_not_on_the_threads() {
    let task = Task::new(42, 1);
    for family in ENCODERS {
        for strategy in ["head", "last:1", "full"] {
            let run = |seed: &str, threads: &str| {
                let settings = [
                    ("strategy.name", strategy),
                    ("strategy.dropout", "0.1"),
                    ("optimizer.lr", "0.003"),
                    ("train.epochs", "2"),
                    ("train.batch_size", "8"),
                    ("train.seed", seed),
                    ("train.threads", threads),
                ];
                weights(&task, family, &settings)
            };
            let one = run("5", "1");
            for threads in ["1", "2", "3"] {
                assert!(
                    run("5", threads) == one,
                    "{family} {strategy}: {threads} threads"
                );
            }
            assert!(run("6", "1") != one, "{family} {strategy}: another seed");
        }
    }
}

#[test]
fn dropout_takes_part_in_what_the_seed_decides() {
    let task = Task::new(42, 1);
    for strategy in ["head", "full"] {
        let run = |p: &str| {
            let settings = [
                ("strategy.name", strategy),
                ("strategy.dropout", p),
                ("train.epochs", "1"),
            ];
            weights(&task, "tiny-bert", &settings)
        };
        assert!(run("0") == run("0"));
        assert!(run("0") != run("0.1"), "{strategy}");
    }
}

/// What is trained in the comparisons of kept outputs: a strategy, and rules after it.
const POLICIES: [(&str, &str); 5] = [
    ("head", "[]"),
    ("last:1", "[]"),
    // Nothing but the embeddings is frozen.
    ("last:2", "[]"),
    // No strategy has this name, and no layer is trained whole.
    (
        "full",
        r#"["freeze *", "train *layer.1.*bias", "train *classifier.*"]"#,
    ),
    ("last:1", r#"["freeze *layer.1.*"]"#),
];

fn rules_of(text: &str) -> Vec<Rule> {
    let rules: Vec<String> = serde_json::from_str(text).unwrap();
    rules.iter().map(|rule| rule.parse().unwrap()).collect()
}

/// Three epochs in which every step runs the whole model: what the trainer leaves out when it keeps a frozen trunk's
/// outputs.
fn whole_model_every_step(task: &Task, model: &Path, strategy: &str, rules: &str) -> Model {
    const SEED: u64 = 3;
    let data = Dataset::read(&task.path("train.jsonl"), &Columns::default()).unwrap();
    let labels = training_labels(&data).unwrap();
    let (mut model, _) = Model::<graft_models::Classifier>::for_task(
        model.to_str().unwrap(),
        labels,
        Some(0.2),
        SEED,
        &Memory::cpu(),
    )
    .unwrap();
    let data = Labelled::new(&model, &data, None).unwrap();
    let strategy: Strategy = strategy.parse().unwrap();
    let set = policy(
        &model.network,
        &strategy,
        &rules_of(rules),
        &model.parameters,
    )
    .unwrap();
    let set = set.resolve(&model.parameters).unwrap();
    let rule = UpdateRule::AdamW {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
    };
    let mut optimizer = Optimizer::new(rule, 0.01, false).unwrap();
    let epochs: Vec<Vec<Vec<usize>>> = (0..3)
        .map(|epoch| {
            let mut call = 0;
            epoch_batches(
                &data.encoded.lengths,
                BatchSize::Examples(8),
                None,
                |items| {
                    call += 1;
                    shuffle(Key::new(SEED, epoch, call), items);
                },
            )
        })
        .collect();
    let total = epochs.iter().map(Vec::len).sum::<usize>() as u64;
    let schedule = Schedule {
        decay: Decay::Linear,
        warmup: 0,
        total,
    };
    for (step, batch) in (0..).zip(epochs.iter().flatten()) {
        let Targets::Classes { right, .. } = data.targets.select(batch) else {
            panic!("one label each");
        };
        let targets: Vec<i64> = right.into_iter().map(i64::from).collect();
        let rows = targets.len();
        let mut f = Forward::train(&model.parameters, &set, SEED, step);
        let logits = model
            .network
            .forward(&mut f, &data.encoded.pack(batch))
            .unwrap();
        let targets = Tensor::from_vec(f.memory(), targets, &[rows]).unwrap();
        let targets = f.input(targets);
        let loss = losses::cross_entropy(&mut f, &logits, &targets, 0.0, rows as f64).unwrap();
        drop(logits);
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients).unwrap();
        let lr = 0.01 * schedule.factor(step);
        optimizer
            .step(&mut model.parameters, &set, &mut gradients, lr, Some(1.0))
            .unwrap();
    }
    model
}

/// Asserts that runs with each of these settings of the cache end with the weights of [`whole_model_every_step`].
fn assert_as_whole(task: &Task, model: &Path, strategy: &str, rules: &str, caches: &[&[&str]]) {
    let whole = whole_model_every_step(task, model, strategy, rules);
    for cache in caches {
        let mut settings = vec![
            ("strategy.name", strategy),
            ("strategy.rules", rules),
            ("strategy.dropout", "0.2"),
            ("optimizer.lr", "0.01"),
            ("optimizer.warmup", "0"),
            ("train.epochs", "3"),
            ("train.batch_size", "8"),
            ("train.seed", "3"),
        ];
        settings.extend(cache.iter().map(|text| text.split_once('=').unwrap()));
        let model = model.to_str().unwrap();
        weights(task, model, &settings);
        let kept = tensors(&task.path("run").join("model.safetensors"));
        assert_eq!(kept.len(), whole.parameters.len());
        for (id, parameter) in whole.parameters.iter() {
            let name = parameter.name();
            let bytes = whole.parameters.value(id).unwrap().to_bytes().unwrap();
            assert!(
                kept[name].to_bytes().unwrap() == bytes,
                "{model} {strategy} {rules} {cache:?}: `{name}`"
            );
        }
    }
}

#[test]
fn kept_outputs_of_a_frozen_trunk_change_no_bit() {
    let task = Task::new(42, 1);
    for family in ENCODERS {
        for (strategy, rules) in POLICIES {
            let directory = format!("train.cache_dir={}", task.text(family));
            let caches: [&[&str]; 6] = [
                &[],
                &["train.cache=off"],
                &["train.cache=memory"],
                // Everything in a file.
                &["train.cache_memory=0"],
                // Written, and used by the next.
                &[&directory],
                &[&directory],
            ];
            assert_as_whole(&task, &fixture(family), strategy, rules, &caches);
        }
        // Cuts in front of the head and of layer 1, and one file for each however many runs there were.
        let files: Vec<_> = snapshot(&task.path(family)).into_keys().collect();
        assert_eq!(files.len(), 2, "{files:?}");
    }
}

#[test]
fn kept_outputs_of_a_pretrained_trunk_change_no_bit() {
    let task = Task::new(20, 1);
    let rules = r#"["freeze *", "train *.layer.4.*", "train classifier.*"]"#;
    let caches: [&[&str]; 2] = [&[], &["train.cache_memory=0"]];
    for (strategy, rules) in [("last:2", "[]"), ("full", rules)] {
        assert_as_whole(&task, &minilm_wheel(), strategy, rules, &caches);
    }
}

#[test]
fn evaluations_and_the_choice_of_the_best_do_not_depend_on_what_is_kept() {
    let task = Task::new(42, 30);
    for (strategy, rules) in POLICIES {
        let run = |cache: &str| {
            let eval = task.text("eval.jsonl");
            let settings = [
                ("data.eval", eval.as_str()),
                ("strategy.name", strategy),
                ("strategy.rules", rules),
                ("strategy.dropout", "0.1"),
                // So large that the best epoch is not the last.
                ("optimizer.lr", "0.2"),
                ("train.epochs", "4"),
                ("train.cache", cache),
            ];
            let bytes = weights(&task, fixture("tiny-bert").to_str().unwrap(), &settings);
            TRAINER.succeeds(["verify", &task.text("run")]);
            (bytes, records(&task.path("run"), "eval"))
        };
        let (off, off_records) = run("off");
        let (kept, kept_records) = run("file");
        assert_eq!(off_records, kept_records, "{strategy} {rules}");
        assert!(off == kept, "{strategy} {rules}");
    }
}

/// Sums in another order differ in the last bits of f32: some 1e-7 of a gradient below 1, times a learning rate of
/// 0.05. Plain SGD, because AdamW makes steps of the size of the learning rate from rounding noise too.
#[test]
fn a_step_does_not_depend_on_how_its_rows_are_batched() {
    // The last step has fewer rows, and the last batch fewer still.
    let task = Task::new(22, 1);
    for family in ENCODERS {
        let run = |batch_size: &str, accumulate: &str| -> Vec<Vec<f64>> {
            let settings = [
                ("strategy.name", "full"),
                ("strategy.dropout", "0"),
                ("optimizer.kind", "sgd"),
                ("optimizer.lr", "0.05"),
                ("train.epochs", "3"),
                ("train.batch_size", batch_size),
                ("train.accumulate", accumulate),
            ];
            weights(&task, family, &settings);
            let all = tensors(&task.path("run").join("model.safetensors"));
            let mut names: Vec<&String> = all.keys().collect();
            names.sort();
            names
                .iter()
                .map(|name| all[*name].to_f64().unwrap())
                .collect()
        };
        let whole = run("8", "1");
        let start = tensors(&fixture(family).join("model.safetensors"));
        assert_eq!(start.len(), whole.len());
        for (batch_size, accumulate) in [("4", "2"), ("1", "8"), ("3", "3")] {
            let parts = run(batch_size, accumulate);
            let error = whole
                .iter()
                .zip(&parts)
                .map(|(a, b)| max_distance(a, b))
                .fold(0.0, f64::max);
            if batch_size == "3" {
                // Steps of 9 rows are another training.
                assert!(error > 1e-4, "{family}: {error:e}");
            } else {
                assert!(
                    error < 1e-6,
                    "{family} {batch_size}x{accumulate}: {error:e}"
                );
            }
        }
    }
}
