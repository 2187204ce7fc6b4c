//! What a linear layer with a low-rank adapter keeps for its backward pass, and what it costs.

use graft_autograd::{Gradients, Tape};
use graft_tensor::ops::{Activation, Linear, Lora, WeightLayout};
use graft_tensor::{DType, Memory, Tensor};

const TOKENS: usize = 32;
const INPUTS: usize = 24;
const OUTPUTS: usize = 16;
const RANK: usize = 2;

fn operation(dropout: f64, activation: Option<Activation>) -> Lora {
    Lora {
        linear: Linear {
            layout: WeightLayout::OutIn,
            activation,
        },
        scale: 0.5,
        dropout,
    }
}

fn values(m: &Memory, shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    let data = (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0);
    Tensor::from_vec(m, data.collect(), shape).unwrap()
}

/// Bytes that are kept if x, weight, bias, a and b need a gradient or not.
fn kept(needs: [bool; 5], lora: Lora) -> usize {
    let m = Memory::cpu();
    let mut tape = Tape::new(&m, 0, 0);
    let shapes: [&[usize]; 5] = [
        &[TOKENS, INPUTS],
        &[OUTPUTS, INPUTS],
        &[OUTPUTS],
        &[RANK, INPUTS],
        &[OUTPUTS, RANK],
    ];
    let vars: Vec<_> = shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| tape.parameter(i, "input", &values(&m, shape), needs[i]))
        .collect();
    tape.lora(
        &vars[0],
        &vars[1],
        Some(&vars[2]),
        [&vars[3], &vars[4]],
        lora,
    )
    .unwrap();
    tape.saved_bytes()
}

#[test]
fn a_frozen_base_costs_nothing_and_an_adapter_its_input() {
    let x = 4 * TOKENS * INPUTS;
    let w = 4 * OUTPUTS * INPUTS;
    let a = 4 * RANK * INPUTS;
    let b = 4 * OUTPUTS * RANK;
    let plain = operation(0.0, None);
    let low = 4 * TOKENS * RANK;
    // What the gradients read: dw and da read x, dx reads w, a and b, da reads b and db what a made of x.
    for (needs, expected) in [
        ([false, false, false, false, false], 0),
        ([true, false, false, false, false], w + a + b),
        ([false, false, true, false, false], 0),
        ([false, false, false, true, true], x + b + low),
        ([false, false, false, true, false], x + b),
        ([false, false, false, false, true], low),
        ([true, false, false, true, true], x + w + a + b + low),
        ([false, true, false, false, false], x),
        ([true, true, true, true, true], x + w + a + b + low),
    ] {
        assert_eq!(kept(needs, plain), expected, "{needs:?}");
        // A mask is computed again, never stored.
        assert_eq!(kept(needs, operation(0.3, None)), expected, "{needs:?}");
    }
    let activated = operation(0.0, Some(Activation::Gelu));
    let needs = [false, false, false, true, true];
    let pre = 4 * TOKENS * OUTPUTS;
    assert_eq!(kept(needs, activated), x + b + low + pre);
}

/// Neither pass holds anything as large as the weight beside the weight itself.
#[test]
fn the_product_of_the_adapter_is_never_formed() {
    // Few tokens and a large square weight: its size would stand out.
    let (tokens, width) = (4, 512);
    let m = Memory::cpu();
    let before = {
        let w = values(&m, &[width, width]);
        let (a, b) = (values(&m, &[RANK, width]), values(&m, &[width, RANK]));
        let x = values(&m, &[tokens, width]);
        let before = m.usage().live.iter().sum::<usize>();
        let mut tape = Tape::new(&m, 0, 0);
        let x = tape.parameter(0, "x", &x, true);
        let w = tape.parameter(1, "w", &w, false);
        let (a, b) = (
            tape.parameter(2, "a", &a, true),
            tape.parameter(3, "b", &b, true),
        );
        let y = tape
            .lora(&x, &w, None, [&a, &b], operation(0.1, None))
            .unwrap();
        let loss = tape.sum_all(&y).unwrap();
        let mut gradients = Gradients::new();
        tape.backward(&loss, &mut gradients).unwrap();
        assert_eq!(gradients.len(), 3);
        before
    };
    let weight = 4 * width * width;
    let usage = m.usage();
    let work = usage.peak(graft_tensor::Category::Workspace);
    let beside = usage.peak_total - before - work;
    assert!(beside < weight / 2, "{beside} bytes beside the weights");
}

/// Replayed over other values and another step, the operation gives what a new recording gives, mask included.
#[test]
fn a_replay_equals_a_recording() {
    let m = Memory::cpu();
    let record = |step: u64| {
        let mut tape = Tape::new(&m, 7, step);
        let x = tape.input(values(&m, &[TOKENS, INPUTS]));
        let w = tape.input(values(&m, &[OUTPUTS, INPUTS]));
        let a = tape.input(values(&m, &[RANK, INPUTS]));
        let b = tape.input(values(&m, &[OUTPUTS, RANK]));
        let lora = operation(0.4, Some(Activation::Gelu));
        let y = tape.lora(&x, &w, None, [&a, &b], lora).unwrap();
        let leaves = [x, w, a, b].map(|v| v.value().clone());
        (tape, y.value().to_vec::<f32>().unwrap(), leaves)
    };
    let (mut tape, first, leaves) = record(1);
    let (_, second, _) = record(2);
    assert_ne!(first, second, "another step drops other elements");
    let again = tape.replay(2, |leaf, _| leaves[leaf].clone()).unwrap();
    assert_eq!(again.unwrap().value().to_vec::<f32>().unwrap(), second);
    assert_eq!(DType::F32, leaves[0].dtype());
}
