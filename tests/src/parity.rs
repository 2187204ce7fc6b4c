//! What the comparisons of encoders and of decoders with PyTorch share.

use std::collections::HashMap;

use graft_autograd::Gradients;
use graft_nn::Parameters;
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
