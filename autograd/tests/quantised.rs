//! Weights as codes on a tape: gradients pass through them, and none is had of them.

use graft_autograd::{Error, Gradients, Tape};
use graft_tensor::ops::random::{Key, normal};
use graft_tensor::ops::{self, Activation, Linear, Lora, WeightLayout};
use graft_tensor::{DType, Memory, Tensor};

fn values(m: &Memory, shape: &[usize], seed: u64) -> Tensor {
    normal(m, Key::new(seed, 0, 0), shape, 0.0, 0.3).unwrap()
}

/// Loss and gradients of two layers with adapters over the weights, and the bytes that the tape keeps.
fn step(m: &Memory, weights: [&Tensor; 2], compute: DType, again: bool) -> (Vec<u8>, usize) {
    let x = ops::cast(m, &values(m, &[11, 70], 1), compute).unwrap();
    let mut tape = Tape::new(m, 3, 5);
    let mut gradients = Gradients::new();
    let x = tape.parameter(0, "x", &x, true);
    let body = |tape: &mut Tape| {
        let mut h = x.clone();
        for (i, (w, size)) in weights.iter().zip([[70, 65], [65, 31]]).enumerate() {
            let w = tape.parameter(10 + i, "w", w, false);
            let bias = tape.parameter(20 + i, "bias", &values(m, &[size[1]], 2), true);
            let a = tape.parameter(30 + i, "a", &values(m, &[4, size[0]], 3), true);
            let b = tape.parameter(40 + i, "b", &values(m, &[size[1], 4], 4), true);
            let lora = Lora {
                linear: Linear {
                    layout: WeightLayout::OutIn,
                    activation: Some(Activation::Gelu),
                },
                scale: 0.5,
                dropout: 0.1,
            };
            h = tape.lora(&h, &w, Some(&bias), [&a, &b], lora)?;
        }
        Ok(h)
    };
    let y = match again {
        true => tape.checkpoint(body).unwrap(),
        false => body(&mut tape).unwrap(),
    };
    let y = tape.cast(&y, DType::F32).unwrap();
    let loss = tape.sum_all(&y).unwrap();
    let kept = tape.saved_bytes();
    tape.backward(&loss, &mut gradients).unwrap();
    let mut all = loss.value().to_bytes().unwrap();
    let keys: Vec<usize> = gradients.iter().map(|(key, _)| key).collect();
    assert_eq!(keys, [0, 20, 21, 30, 31, 40, 41]);
    for (_, gradient) in gradients.iter() {
        all.extend(gradient.to_bytes().unwrap());
    }
    (all, kept)
}

#[test]
fn gradients_are_those_beside_the_numbers() {
    let m = Memory::cpu();
    for dtype in [DType::Nf4, DType::Int8] {
        let codes = [[65, 70], [31, 65]]
            .map(|shape| ops::quantise(&m, &values(&m, &shape, 7), dtype).unwrap());
        let numbers = codes
            .each_ref()
            .map(|w| ops::cast(&m, w, DType::F32).unwrap());
        for compute in [DType::F32, DType::Bf16] {
            let (ours, kept) = step(&m, codes.each_ref(), compute, false);
            let (theirs, more) = step(&m, numbers.each_ref(), compute, false);
            assert!(ours == theirs, "{dtype} {compute}");
            let elements = [65 * 70, 31 * 65];
            let saved: usize = elements.iter().map(|&n| 4 * n - dtype.bytes(n)).sum();
            assert_eq!(more - kept, saved, "codes are kept as codes");
            assert!(
                step(&m, codes.each_ref(), compute, true).0 == ours,
                "{dtype} {compute}"
            );
        }
    }
}

#[test]
fn a_gradient_of_codes_is_refused_by_name() {
    let m = Memory::cpu();
    let codes = ops::quantise(&m, &values(&m, &[8, 16], 1), DType::Nf4).unwrap();
    let mut tape = Tape::new(&m, 0, 0);
    let x = tape.input(values(&m, &[3, 16], 2));
    let w = tape.parameter(1, "layer.3.query.weight", &codes, true);
    let error = tape
        .linear(&x, &w, None, WeightLayout::OutIn, None)
        .unwrap_err();
    let wanted = Error::Quantised {
        parameter: "layer.3.query.weight".into(),
        dtype: DType::Nf4,
    };
    assert_eq!(error, wanted);
    let said = error.to_string();
    assert!(
        said.starts_with("layer.3.query.weight is held in nf4"),
        "{said}"
    );
}
