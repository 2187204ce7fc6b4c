//! Adapters: values against the dense formulas, gradients, beginnings, merging, and what is trained.

mod beginnings;
mod front;
mod held;
mod layers;
mod training;

use graft_autograd::{Gradients, Var};
use graft_nn::adapters::{
    self, Adapter, AdapterConfig, Bias, DEFAULT, LowRankConfig, LowRankInit, Method, Modules,
    Targets, attach, finish, rules,
};
use graft_nn::layers::{Embedding, Linear};
use graft_nn::optimizer::Rule as Update;
use graft_nn::{Forward, FreezePolicy, Optimizer, ParamId, Parameters, Rule, TrainableSet};
use graft_tensor::ops::Activation;
use graft_tensor::{Category, DType, Memory, Tensor};
use ndarray::{Array2, ArrayD, Axis, Ix2, IxDyn};

use crate::common::*;

fn config(method: Method) -> AdapterConfig {
    AdapterConfig {
        method,
        targets: Targets::AllLinear,
        exclude: Vec::new(),
        layers: None,
        layers_pattern: Vec::new(),
        modules_to_save: Vec::new(),
        bias: Bias::None,
    }
}

/// A rank and an alpha that differ.
fn low_rank(rank: usize) -> LowRankConfig {
    LowRankConfig {
        alpha: 0.7 + rank as f64,
        ..LowRankConfig::lora(rank)
    }
}

fn put(p: &mut Parameters, method: Method) {
    attach(p, DEFAULT, &config(method), Modules::InPlace).unwrap();
}

fn layer(p: &mut Parameters, conv1d: bool, bias: bool, inputs: usize, outputs: usize) -> Linear {
    match (conv1d, bias) {
        (true, _) => Linear::conv1d(p, "a", inputs, outputs, 0.02),
        (false, true) => Linear::new(p, "a", inputs, outputs, 0.02),
        (false, false) => Linear::without_bias(p, "a", inputs, outputs, 0.02),
    }
    .unwrap()
}

fn matrix(x: &ArrayD<f64>) -> Array2<f64> {
    x.clone().into_dimensionality::<Ix2>().unwrap()
}

fn named(p: &Parameters, name: &str) -> ArrayD<f64> {
    value(p, p.find(name).unwrap())
}

/// The weight as `[out, in]`.
fn out_by_in(p: &Parameters, layer: &Linear, conv1d: bool) -> Array2<f64> {
    let w = matrix(&value(p, layer.weight()));
    if conv1d { w.reversed_axes() } else { w }
}

fn with_bias(p: &Parameters, layer: &Linear, y: Array2<f64>) -> ArrayD<f64> {
    match layer.bias() {
        Some(bias) => y.into_dyn() + value(p, bias),
        None => y.into_dyn(),
    }
}

fn change(p: &Parameters, scale: f64) -> Array2<f64> {
    let b = matrix(&named(p, "a.lora_B.default.weight"));
    b.dot(&matrix(&named(p, "a.lora_A.default.weight"))) * scale
}

fn lengths(w: &Array2<f64>) -> ArrayD<f64> {
    w.map_axis(Axis(1), |row| row.dot(&row).sqrt()).into_dyn()
}
