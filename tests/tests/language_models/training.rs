//! Continued pretraining and pretraining, and perplexity.

use std::path::Path;

use graft_models::{CausalLm, Checkpoint, DecoderConfig, ModelSource, TokenBatch, load_parameters};
use graft_nn::{Forward, Parameters};
use graft_tensor::{DType, Memory, Tensor};
use graft_tests::runs::{characters, flip_bit, records};
use graft_tests::{fixture, max_distance};
use serde_json::Value;

use crate::{Bench, DOCUMENTS, TRAINER};

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_f64().unwrap()
}

#[test]
fn a_step_does_not_depend_on_how_it_is_accumulated() {
    for (family, chat) in [
        ("tiny-gpt2", false),
        ("tiny-llama", false),
        ("tiny-gpt2", true),
        ("tiny-mistral", true),
    ] {
        let bench = match chat {
            true => Bench::chat(family),
            false => Bench::new(family),
        };
        let common = [
            "--set",
            "optimizer.kind=sgd",
            "--lr",
            "0.05",
            "--epochs",
            "4",
            "--max-length",
            "24",
            "--set",
            "optimizer.schedule=constant",
            "--set",
            "optimizer.clip_norm=0",
        ];
        let mut all = Vec::new();
        for (batch, accumulate) in [("8", "1"), ("4", "2"), ("1", "8")] {
            let accumulate = format!("train.accumulate={accumulate}");
            let mut more = vec!["--batch-size", batch, "--set", &accumulate];
            more.extend(common);
            TRAINER.succeeds(match chat {
                true => bench.tune(batch, &more),
                false => bench.train(batch, &more),
            });
            let steps = records(&bench.dir.path().join(batch), "step");
            assert!(steps.len() >= 4, "{} steps", steps.len());
            let losses: Vec<f64> = steps.iter().map(|s| s["loss"].as_f64().unwrap()).collect();
            all.push((bench.weights(batch), losses));
        }
        let before = bench.weights("model");
        let (whole, losses) = &all[0];
        for (parts, again) in &all[1..] {
            assert!(max_distance(losses, again) < 1e-5, "{losses:?} {again:?}");
            for (name, tensor) in whole {
                let error = max_distance(&values(tensor), &values(&parts[name]));
                assert!(error < 1e-6, "{family} {name}: {error:e}");
            }
        }
        let moved = |name: &String| max_distance(&values(&whole[name]), &values(&before[name]));
        assert!(whole.keys().map(moved).fold(0.0, f64::max) > 1e-2);
    }
}

#[test]
fn perplexity_is_that_of_the_logits() {
    for family in ["tiny-gpt2", "tiny-llama", "tiny-gemma2"] {
        let bench = Bench::new(family);
        let length = 13;
        let said = TRAINER.succeeds([
            "eval",
            "--json",
            "--max-length",
            "13",
            "--model",
            &bench.path("model"),
            "--data",
            &bench.path("train.jsonl"),
        ]);
        let said: Value = serde_json::from_str(&said.out).unwrap();

        // The same from every logit of every piece, in f64.
        let dir = fixture(family);
        let config = DecoderConfig::load(&ModelSource::directory(&dir).unwrap()).unwrap();
        let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
        let lm = CausalLm::new(&mut parameters, &config).unwrap();
        let mut checkpoint = Checkpoint::open(&dir).unwrap();
        load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
        let (mut sum, mut count) = (0.0, 0);
        for document in DOCUMENTS {
            let ids = characters(document);
            for (i, piece) in ids.chunks(length).enumerate() {
                let batch = TokenBatch::of_ids([piece]);
                let mut f = Forward::evaluate(&parameters);
                let logits = lm
                    .forward(&mut f, &batch)
                    .unwrap()
                    .value()
                    .to_f64()
                    .unwrap();
                for (j, row) in logits.chunks(config.vocab_size).enumerate() {
                    if let Some(&next) = ids.get(i * length + j + 1) {
                        let top = row.iter().copied().fold(f64::MIN, f64::max);
                        let all: f64 = row.iter().map(|x| (x - top).exp()).sum();
                        sum += all.ln() + top - row[next as usize];
                        count += 1;
                    }
                }
            }
        }
        assert_eq!(said["documents"], DOCUMENTS.len());
        assert_eq!(said["tokens"], count);
        let (loss, mean) = (said["loss"].as_f64().unwrap(), sum / f64::from(count));
        assert!((loss - mean).abs() < 1e-6, "{family}: {loss} {mean}");
        let perplexity = said["perplexity"].as_f64().unwrap();
        assert!((perplexity / mean.exp() - 1.0).abs() < 1e-6, "{family}");
    }
}

#[test]
fn strategies_freeze_what_they_say_and_the_best_epoch_is_kept() {
    for (family, head) in [
        (
            "tiny-gpt2",
            &["transformer.ln_f.weight", "transformer.ln_f.bias"][..],
        ),
        ("tiny-llama", &["model.norm.weight", "lm_head.weight"]),
    ] {
        let bench = Bench::new(family);
        let before = bench.weights("model");
        for strategy in ["head", "last:1", "full"] {
            let eval = bench.path("eval.jsonl");
            // A rate at which some epoch is worse than one before it.
            let more = [
                "--eval",
                &eval,
                "--strategy",
                strategy,
                "--epochs",
                "6",
                "--lr",
                "0.1",
                "--set",
                "optimizer.schedule=constant",
            ];
            let said = TRAINER.succeeds(bench.train(strategy, &more));
            assert!(said.out.contains("perplexity"), "{}", said.out);
            assert!(said.err.contains("10 documents, "), "{}", said.err);
            let run = bench.dir.path().join(strategy);
            TRAINER.succeeds([Path::new("verify"), &run]);
            let after = bench.weights(strategy);
            for (name, tensor) in &after {
                let moved = values(tensor) != values(&before[name]);
                let expected = match strategy {
                    "head" => head.contains(&name.as_str()),
                    "last:1" => name.contains(".1.") || head.contains(&name.as_str()),
                    _ => true,
                };
                assert_eq!(moved, expected, "{family} {strategy} {name}");
            }
            let evals = records(&run, "eval");
            assert_eq!(evals.len(), 6);
            let best = evals.iter().map(|e| e["loss"].as_f64().unwrap());
            let best = best.fold(f64::INFINITY, f64::min);
            let kept = TRAINER.succeeds([
                "eval",
                "--json",
                "--model",
                run.to_str().unwrap(),
                "--data",
                &eval,
            ]);
            let kept: Value = serde_json::from_str(&kept.out).unwrap();
            assert!(
                (kept["loss"].as_f64().unwrap() - best).abs() < 1e-9,
                "{kept} {best}"
            );
            let last = evals.iter().rposition(|e| e["best"] == true).unwrap();
            assert_eq!(records(&run, "end")[0]["best_epoch"], last as u64 + 1);
        }
        let runs = ["head", "last:1", "full"].map(|run| bench.path(run));
        let runs = runs.iter().map(String::as_str);
        let table = TRAINER.succeeds(["compare"].into_iter().chain(runs)).out;
        let header = table.lines().next().unwrap();
        assert!(
            header.contains("perplexity") && !header.contains("accuracy"),
            "{table}"
        );
        assert!(!table.contains("NaN"), "{table}");
        let list = TRAINER
            .succeeds(["inspect", &bench.path("model"), "--strategy", "head"])
            .out;
        let trained = list.lines().filter(|line| line.ends_with("  train"));
        let trained: Vec<&str> = trained.filter_map(|line| line.split(' ').next()).collect();
        assert_eq!(trained, head, "{list}");
        let frozen = before
            .keys()
            .find(|name| name.contains("embed") || name.contains("wte"));
        flip_bit(
            &bench.dir.path().join("head").join("model.safetensors"),
            frozen.unwrap(),
        );
        let said = TRAINER.refuses(["verify", &bench.path("head")]);
        assert!(said.contains(frozen.unwrap()), "{said}");
    }
}

#[test]
fn a_configuration_and_a_tokenizer_are_enough_to_pretrain() {
    let bench = Bench::new("tiny-llama");
    std::fs::remove_file(bench.dir.path().join("model/model.safetensors")).unwrap();
    let text = "the mill turns with the river.\n\nand the river runs to the sea.\n".repeat(20);
    std::fs::write(bench.dir.path().join("train.jsonl"), "").unwrap();
    std::fs::write(bench.dir.path().join("text.txt"), &text).unwrap();
    let train = bench.path("text.txt");
    let more = [
        "--train", &train, "--init", "random", "--epochs", "30", "--lr", "0.01", "--seed", "5",
    ];
    let run = |out: &str, extra: &[&str]| {
        let mut arguments = bench.train(out, &[]);
        let place = arguments.iter().position(|a| a == "--train").unwrap();
        arguments.drain(place..place + 2);
        arguments.extend(more.iter().chain(extra).map(|s| (*s).to_owned()));
        TRAINER.succeeds(arguments)
    };
    let said = run("a", &[]);
    assert!(said.err.contains("all weights are new"), "{}", said.err);
    assert!(said.err.contains("text.txt: 1 document,"), "{}", said.err);
    run("b", &["--threads", "1"]);
    TRAINER.succeeds(["verify", &bench.path("a")]);
    let weights = |run: &str| std::fs::read(bench.path(run) + "/model.safetensors").unwrap();
    assert!(weights("a") == weights("b"), "threads changed the weights");
    let epochs = records(&bench.dir.path().join("a"), "epoch");
    let loss = |i: usize| epochs[i]["loss"].as_f64().unwrap();
    // At first every token is as likely as another.
    let first = records(&bench.dir.path().join("a"), "step")[0]["loss"]
        .as_f64()
        .unwrap();
    assert!((first - 101f64.ln()).abs() < 0.1, "{first}");
    assert!(loss(29) < 1.0, "{} to {}", loss(0), loss(29));
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let bench = Bench::new("tiny-gpt2");
    let refuse = |more: &[&str], wanted: &[&str]| {
        let mut arguments = bench.train("out", &[]);
        // Later arguments in place of earlier ones.
        for pair in more.chunks(2) {
            if let Some(place) = arguments.iter().position(|a| a == pair[0] && a != "--set") {
                arguments.drain(place..place + 2);
            }
            arguments.extend(pair.iter().map(|s| (*s).to_owned()));
        }
        let said = TRAINER.refuses(arguments);
        for wanted in wanted {
            assert!(said.contains(wanted), "{wanted} in {said}");
        }
        assert!(!bench.dir.path().join("out").exists());
    };
    let encoder = fixture("tiny-bert");
    refuse(
        &["--model", encoder.to_str().unwrap()],
        &["family bert", "predicts no next token", "GPT-2"],
    );
    let classifier = fixture("tiny-gpt2-classifier");
    refuse(
        &["--model", classifier.to_str().unwrap()],
        &[
            "the model is GPT2ForSequenceClassification",
            "GPT2LMHeadModel",
        ],
    );
    refuse(
        &["--set", "train.cache_dir=/tmp/kept"],
        &["--set train.cache_dir", "has no effect"],
    );
    refuse(
        &["--max-length", "41"],
        &["data.max_length: it is 41", "40 positions"],
    );
    refuse(
        &["--label-column", "x"],
        &["--label-column", "has no effect"],
    );
    refuse(
        &["--init", "random", "--strategy", "head"],
        &["--strategy", "learnt nothing"],
    );
    refuse(
        &["--init", "random", "--task", "classify"],
        &["--init", "\"clm\""],
    );
    refuse(&["--init", "zero"], &["--init", "\"random\""]);
    refuse(&["--task", "chess"], &["--task", "\"clm\""]);
    refuse(&["--text-column", "body"], &["train.jsonl:1", "`body`"]);
    bench.write("train.jsonl", &["", " \n"]);
    refuse(
        &["--epochs", "1"],
        &["train.jsonl", "no document holds any text"],
    );
    bench.write("train.jsonl", &DOCUMENTS);
    let path = bench.dir.path().join("model/config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let without = config.replace("\"eos_token_id\": 2", "\"eos_token_id\": null");
    std::fs::write(&path, &without).unwrap();
    refuse(&["--epochs", "1"], &["`eos_token_id` is missing"]);
    let outside = config.replace("\"eos_token_id\": 2", "\"eos_token_id\": 101");
    std::fs::write(&path, &outside).unwrap();
    refuse(&["--epochs", "1"], &["`eos_token_id` is 101", "101 tokens"]);
    let small = config.replace("\"vocab_size\": 101", "\"vocab_size\": 60");
    std::fs::write(&path, &small).unwrap();
    refuse(&["--epochs", "1"], &["vocab_size is 60"]);
}
