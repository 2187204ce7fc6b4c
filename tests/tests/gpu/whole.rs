//! Against PyTorch's figures as on the CPU, dropout and all against the CPU, the same bits twice.
//!
//! Tolerances in f32 are those of the CPU's tests against the same figures (`parity.rs`, `decoders.rs`).

use graft_nn::FreezePolicy;
use graft_tensor::{DType, Memory};
use graft_tests::parity::{assert_gradients, is_noise};
use graft_tests::{DECODERS, ENCODERS, fixture, json, max_distance, numbers, tensors};

use crate::model::{Trained, gpu, load, load_dropping};

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
        let model = load(name, &memory, DType::F32, Trained::Full);
        let exact = expected["logits64"].to_f64().unwrap();
        let error = max_distance(&model.logits(), &exact);
        assert!(error < 1e-5, "{name}: logits are off by {error:e}");
        let (loss, gradients) = model.gradients(0);
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
        let mut model = load(name, &memory, DType::F32, Trained::Full);
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
            let mut model = load_dropping(name, memory, DType::F32, Trained::Full, 0.1);
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
            let mut model = load(name, &memory, compute, Trained::Full);
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
            let model = load(name, &memory, compute, Trained::Full);
            let (loss, gradients) = model.gradients(0);
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
    let model = load("tiny-bert", &memory, DType::F32, Trained::Last);
    let full = FreezePolicy::default().resolve(&model.parameters).unwrap();
    let last = &model.set;
    let ((_, full), (_, part)) = (model.gradients_of(&full, 0), model.gradients(0));
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
