//! What the comparisons of encoders and of decoders with PyTorch share.

use std::collections::HashMap;

use graft_autograd::{Gradients, Var};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, Optimizer, Parameters, TrainableSet, losses};
use graft_tensor::ops::loss::IGNORE;
use graft_tensor::{DType, Tensor};

use serde_json::Value;

use crate::max_distance;

/// True for a parameter without a gradient in exact arithmetic, as a fixture's `expected.json` lists them: its gradient
/// is rounding noise, and AdamW makes steps of the size of the learning rate from it.
pub fn is_noise(expected: &Value, name: &str) -> bool {
    let list = &expected["f32_against_f64"]["gradients"]["zero_in_exact_arithmetic"];
    let list = list.as_array();
    list.is_some_and(|list| list.iter().any(|x| x == name))
}

/// The mean cross-entropy of a classifier's logits, and its gradients.
///
/// # Panics
/// If logits and labels do not fit each other.
pub fn loss_of_labels(mut f: Forward, logits: &Var, labels: &[i64]) -> (f64, Gradients) {
    let targets = Tensor::from_slice(f.memory(), labels, &[labels.len()]).unwrap();
    let targets = f.input(targets);
    let rows = labels.len() as f64;
    let loss = losses::cross_entropy(&mut f, logits, &targets, 0.0, rows).unwrap();
    gradients_of(f, loss)
}

/// The mean over the supervised tokens of a loss that was summed, and its gradients.
///
/// # Panics
/// If it depends on nothing that is trained.
pub fn loss_of_tokens(mut f: Forward, sum: &Var, targets: &[i64]) -> (f64, Gradients) {
    let supervised = targets.iter().filter(|t| **t != IGNORE).count();
    let loss = f.tape.scale(sum, 1.0 / supervised as f64).unwrap();
    gradients_of(f, loss)
}

fn gradients_of(f: Forward, loss: Var) -> (f64, Gradients) {
    let value = loss.value().item().unwrap();
    let mut gradients = Gradients::new();
    f.backward(loss, &mut gradients).unwrap();
    (value, gradients)
}

/// Holds every parameter's gradient against the fixture's in f64, relative to the largest element of that. Where
/// `is_noise` says that the gradient is 0 in exact arithmetic, it is measured against the loss, whose gradient it ought
/// not to have.
///
/// # Panics
/// If a parameter has no gradient, or one that is off by `tolerance` or more.
pub fn assert_gradients(
    (model, dtype): (&str, DType),
    parameters: &Parameters,
    gradients: &Gradients,
    expected: &HashMap<String, Tensor>,
    tolerance: f64,
    is_noise: impl Fn(&str) -> bool,
) {
    for (id, parameter) in parameters.iter() {
        let name = parameter.name();
        let found = gradients.get(id.key());
        let found = found.expect("every parameter has a gradient").to_f64();
        let exact = expected[&format!("grad64.{name}")].to_f64();
        let (found, exact) = (found.expect("it is real"), exact.expect("it is real"));
        let size = if is_noise(name) {
            1.0
        } else {
            exact.iter().fold(0.0f64, |m, x| m.max(x.abs()))
        };
        let error = max_distance(&found, &exact) / size;
        assert!(error < tolerance, "{model} {dtype} {name}: {error:e}");
    }
}

/// The losses before each of ten steps of AdamW at the rate `lr`, whose loss and gradients `step` gives: as the scripts of the
/// fixtures train.
///
/// # Panics
/// If a step fails.
pub fn losses_of_adamw(
    parameters: &mut Parameters,
    set: &TrainableSet,
    lr: f64,
    mut step: impl FnMut(&Parameters) -> (f64, Gradients),
) -> Vec<f64> {
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.01, true).expect("valid settings");
    let one = |_| {
        let (loss, mut gradients) = step(parameters);
        let done = optimizer.step(parameters, set, &mut gradients, lr, None);
        done.expect("every gradient is a number");
        loss
    };
    (0..10).map(one).collect()
}
