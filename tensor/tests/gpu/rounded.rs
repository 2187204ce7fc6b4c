//! Copies of weights in bf16: made once, never read out of date, and counted by a plan.

use graft_kernels::activation::Activation;
use graft_kernels::cuda::{Asked, Gpu};
use graft_tensor::ops::linear::{Linear, WeightLayout, input_gradient, linear};
use graft_tensor::ops::loss::{linear_cross_entropy, linear_cross_entropy_backward};
use graft_tensor::ops::optimizer::{AdamW, Rule, Sgd, Tables, Update, step};
use graft_tensor::ops::random::Key;
use graft_tensor::ops::{self, Lora, lora};
use graft_tensor::{Category, DType, Device, Memory, Tensor};

use crate::common::{assert_same, cpu, normal};

const LINEAR: Linear = Linear {
    layout: WeightLayout::OutIn,
    activation: Some(Activation::Gelu),
};
const ROWS: usize = 5;
const INPUTS: usize = 24;
const CLASSES: usize = 70;

fn weight(m: &Memory, seed: u64) -> Tensor {
    let x = normal(DType::F32, &[CLASSES, INPUTS], seed);
    x.to_memory(&m.with(Category::Weights)).unwrap()
}

fn input(m: &Memory) -> Tensor {
    normal(DType::Bf16, &[ROWS, INPUTS], 1)
        .to_memory(m)
        .unwrap()
}

/// A device of a test's own: what it is asked for is listed.
fn own() -> (Memory, Gpu) {
    let m = Memory::of(Device::Cuda(0)).expect("these tests need a GPU");
    let gpu = m.opened_gpu().unwrap().clone();
    (m, gpu)
}

/// Everything that a bf16 step multiplies a weight with.
fn products(m: &Memory, w: &Tensor) -> Vec<Tensor> {
    let x = input(m);
    let targets: Vec<i64> = (0..ROWS as i64).map(|i| i * 13).collect();
    let targets = Tensor::from_slice(m, &targets, &[ROWS]).unwrap();
    let (y, pre) = linear(m, &LINEAR, &x, w, None, true).unwrap();
    let dx = input_gradient(m, &LINEAR, w, &y, x.shape(), None).unwrap();
    // A part of the weight, as of a fused projection.
    let (part, _) = linear(m, &LINEAR, &x, &w.narrow(0, 3, 40).unwrap(), None, false).unwrap();
    let (a, b) = (
        w.narrow(0, 0, 4).unwrap(),
        normal(DType::F32, &[CLASSES, 4], 9),
    );
    let b = b.to_memory(m).unwrap();
    let p = Lora {
        linear: LINEAR,
        scale: 2.0,
        dropout: 0.0,
    };
    let (adapted, _) = lora(m, &p, &x, w, None, [&a, &b], Key::new(0, 0, 0), false).unwrap();
    let needs = [true, true, false];
    let (loss, kept) = linear_cross_entropy(m, &x, w, None, &targets, 0.0, None, needs).unwrap();
    let dy = Tensor::full(m, DType::F32, &[], 1.0).unwrap();
    let [dloss, dw, _] =
        linear_cross_entropy_backward(m, &x, w, None, &targets, 0.0, None, kept, &dy, needs)
            .unwrap();
    [
        Some(y),
        pre,
        Some(dx),
        Some(part),
        Some(adapted),
        Some(loss),
        dloss,
        dw,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Asserts that products of the weight are those of another tensor with its elements, of which there is no copy yet.
#[track_caller]
fn assert_current(what: &str, w: &Tensor) {
    let fresh = w.to_memory(cpu()).unwrap();
    let m = w.memory().with(Category::Activations);
    let fresh = fresh.to_memory(w.memory()).unwrap();
    for (found, expected) in products(&m, w).iter().zip(&products(&m, &fresh)) {
        assert_same(what, found, expected);
    }
}

/// How often the products of a weight round something.
fn roundings(gpu: &Gpu, w: &Tensor) -> usize {
    let m = w.memory().with(Category::Activations);
    let (_, asked) = gpu.recorded(|| products(&m, w));
    let rounds = |asked: &&Asked| {
        matches!(
            asked,
            Asked::Launch("convert_f32_bf16" | "gemm_pack_f32_bf16")
        )
    };
    asked.iter().filter(rounds).count()
}

#[test]
#[ignore = "needs a GPU"]
fn a_weight_is_rounded_once() {
    let (m, gpu) = own();
    let w = weight(&m, 2);
    let bytes = || m.usage().live(Category::Weights);
    assert_eq!(bytes(), 4 * CLASSES * INPUTS);
    let (first, again) = (roundings(&gpu, &w), roundings(&gpu, &w));
    // Once for the layers, once more with zeros behind the classes, which the loss wants.
    assert_eq!(first - again, 2, "{first} and {again}");
    assert_eq!(bytes(), 4 * CLASSES * INPUTS + 2 * 128 * INPUTS);
    drop(w);
    assert_eq!(bytes(), 0);
}

#[test]
#[ignore = "needs a GPU"]
fn what_is_written_to_is_rounded_again() {
    let (m, _) = own();
    let mut w = weight(&m, 3);
    assert_current("as loaded", &w);
    let more = weight(&m, 4);
    ops::elementwise::add_assign(&mut w, &more).unwrap();
    assert_current("after a sum in place", &w);
    let rows = normal(DType::F32, &[2, INPUTS], 5).to_memory(&m).unwrap();
    ops::write_rows(&m, &mut w, 7, &rows).unwrap();
    assert_current("after rows were written", &w);
    ops::put(&m, &mut w, &rows, 0, 30).unwrap();
    assert_current("after a block was put", &w);
    let w = w.recount(Category::Activations).unwrap();
    let w = w.recount(Category::Weights).unwrap();
    assert_current("after it was counted as something else", &w);
}

#[test]
#[ignore = "needs a GPU"]
fn an_update_writes_the_copy_too() {
    let adamw = |step| {
        Rule::AdamW(AdamW {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.1,
            step,
            grad_scale: 1.0,
        })
    };
    let sgd = |_| {
        Rule::Sgd(Sgd {
            lr: 0.1,
            momentum: 0.0,
            dampening: 0.0,
            nesterov: false,
            weight_decay: 0.01,
            first_step: true,
            grad_scale: 1.0,
        })
    };
    let rules: [(&dyn Fn(u64) -> Rule, usize); 2] = [(&adamw, 2), (&sgd, 0)];
    let (m, gpu) = own();
    for (rule, states) in rules {
        // Of the first there is a copy, of the second none.
        let mut weights = [weight(&m, 5), weight(&m, 6)];
        let mut tables = Tables::default();
        let mut moments = weights.each_ref().map(|w| {
            let zeros = || Tensor::zeros(&m, DType::F32, w.shape()).unwrap();
            (0..states).map(|_| zeros()).collect::<Vec<_>>()
        });
        for number in 1..=2 {
            if number == 1 {
                assert_current("before", &weights[0]);
            }
            let gradients = [8, 9].map(|seed| {
                let g = normal(DType::F32, &[CLASSES, INPUTS], seed + number);
                g.to_memory(&m).unwrap()
            });
            let mut updates: Vec<Update<'_>> = weights
                .iter_mut()
                .zip(&gradients)
                .zip(&mut moments)
                .map(|((weight, gradient), states)| Update {
                    rule: rule(number),
                    weight,
                    gradient,
                    states: states.iter_mut().collect(),
                })
                .collect();
            step(&mut updates, Some(1.0), &mut tables).unwrap();
            drop(updates);
            // The update wrote the copy: the first use after it rounds no more than the second.
            let [first, second] = [0, 1].map(|_| roundings(&gpu, &weights[0]));
            assert_eq!(first, second, "step {number}");
            for w in &weights {
                assert_current("after an update", w);
            }
        }
    }
}

/// An update in which a gradient is not finite leaves weight and copy alone.
#[test]
#[ignore = "needs a GPU"]
fn a_refused_update_leaves_both() {
    let (m, _) = own();
    let mut w = weight(&m, 11);
    let before = products(&m, &w);
    let gradient = Tensor::full(&m, DType::F32, w.shape(), f64::NAN).unwrap();
    let mut updates = [Update {
        rule: Rule::Sgd(Sgd {
            lr: 0.1,
            momentum: 0.0,
            dampening: 0.0,
            nesterov: false,
            weight_decay: 0.0,
            first_step: true,
            grad_scale: 1.0,
        }),
        weight: &mut w,
        gradient: &gradient,
        states: Vec::new(),
    }];
    step(&mut updates, None, &mut Tables::default()).unwrap();
    for (found, expected) in products(&m, &w).iter().zip(&before) {
        assert_same("after a refused update", found, expected);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_plan_counts_the_copy() {
    let (real, _) = own();
    let plan = Memory::planned_for(Device::Cuda(0));
    let run = |m: &Memory| {
        let w = weight(m, 2);
        products(m, &w);
        m.usage().live(Category::Weights)
    };
    assert_eq!(run(&real), run(&plan));
    assert_eq!(run(&plan), 4 * CLASSES * INPUTS + 2 * 128 * INPUTS);
}
