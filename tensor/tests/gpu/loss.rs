//! Losses, and the loss of a language model.

use graft_tensor::ops::loss::{
    IGNORE, bce_with_logits, bce_with_logits_backward, cross_entropy, cross_entropy_backward,
    linear_cross_entropy, linear_cross_entropy_backward,
};
use graft_tensor::ops::{affine, cast};
use graft_tensor::{DType, Memory, Tensor};
use proptest::prelude::*;

use crate::common::{assert_same, cpu, gpu, integers, normal, on_gpu};
use crate::within::assert_within;

/// Targets in `0..classes`, of which every fifth is left out.
fn targets(rows: usize, classes: usize, seed: u64) -> Tensor {
    let of = |i: u64| match (i + seed) % 5 {
        0 => IGNORE,
        _ => ((i + seed) * 7919 % classes as u64) as i64,
    };
    integers(&(0..rows as u64).map(of).collect::<Vec<_>>())
}

fn scalar(m: &Memory, value: f64) -> Tensor {
    Tensor::full(m, DType::F32, &[], value).unwrap()
}

fn check(logits: &Tensor, targets: &Tensor, smoothing: f64) {
    let (rows, classes) = (logits.shape()[0], logits.shape()[1]);
    let what = format!(
        "{} {rows} x {classes}, smoothing {smoothing}",
        logits.dtype()
    );
    let (sum, lse) = cross_entropy(cpu(), logits, targets, smoothing).unwrap();
    let (x, t) = (on_gpu(logits), on_gpu(targets));
    let (found, found_lse) = cross_entropy(gpu(), &x, &t, smoothing).unwrap();
    // Logits of a few units, and sums of exponentials that are rounded a few times.
    assert_within(&format!("lse of {what}"), &found_lse, &lse, 4e-6);
    let allowed = 6e-6 * rows as f64;
    assert_within(&format!("loss of {what}"), &found, &sum, allowed);
    let dy = 0.37;
    let expected =
        cross_entropy_backward(cpu(), logits, targets, smoothing, &lse, &scalar(cpu(), dy));
    let there = || {
        let dy = scalar(gpu(), dy);
        cross_entropy_backward(gpu(), &x, &t, smoothing, &found_lse, &dy).unwrap()
    };
    let dx = there();
    assert_within(
        &format!("gradient of {what}"),
        &dx,
        &expected.unwrap(),
        4e-6,
    );
    assert_same("a second time", &there(), &dx);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn of_logits(
        rows in 0usize..40, classes in 1usize..3000, seed in 0u64..1000, smooth in any::<bool>(),
        short in any::<bool>(), part in any::<bool>(),
    ) {
        let dtype = if short { DType::Bf16 } else { DType::F32 };
        let logits = affine(cpu(), &normal(dtype, &[rows, classes + 1], seed), 2.0, 0.0).unwrap();
        // Rows of a matrix, or a part of each.
        let logits = if part { logits.narrow(1, 1, classes).unwrap() } else { logits };
        let targets = targets(rows, logits.shape()[1], seed);
        check(&logits, &targets, if smooth { 0.1 } else { 0.0 });
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn of_two_sides(count in 0usize..3000, seed in 0u64..1000, short in any::<bool>()) {
        let dtype = if short { DType::Bf16 } else { DType::F32 };
        let x = affine(cpu(), &normal(dtype, &[count], seed), 5.0, 0.0).unwrap();
        let t: Vec<f32> = (0..count).map(|i| [0.0, 1.0, 0.25][i % 3]).collect();
        let t = cast(cpu(), &Tensor::from_vec(cpu(), t, &[count]).unwrap(), dtype).unwrap();
        let sum = bce_with_logits(cpu(), &x, &t).unwrap();
        let found = bce_with_logits(gpu(), &on_gpu(&x), &on_gpu(&t)).unwrap();
        assert_within("binary cross-entropy", &found, &sum, 2e-6 * (1.0 + count as f64));
        let dx = bce_with_logits_backward(cpu(), &x, &t, &scalar(cpu(), 1.5)).unwrap();
        let dy = scalar(gpu(), 1.5);
        let found = bce_with_logits_backward(gpu(), &on_gpu(&x), &on_gpu(&t), &dy).unwrap();
        assert_within("its gradient", &found, &dx, 1e-6);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn of_few_and_of_many_classes() {
    for dtype in [DType::F32, DType::Bf16] {
        for (rows, classes) in [
            (1, 1),
            (5, 2),
            (1000, 7),
            (33, 1023),
            (33, 1024),
            (9, 1025),
            (9, 4099),
            (40, 50_257),
            (3, 128_256),
        ] {
            let logits = normal(dtype, &[rows, classes], classes as u64);
            check(&logits, &targets(rows, classes, 1), 0.0);
            check(&logits, &targets(rows, classes, 2), 0.2);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn of_logits_that_are_infinite() {
    let low = f32::NEG_INFINITY;
    for classes in [3usize, 2000] {
        let mut rows = vec![vec![low; classes]; 4];
        rows[1][1] = 2.0;
        rows[2][0] = f32::NAN;
        rows[3][2] = f32::INFINITY;
        let logits = Tensor::from_vec(cpu(), rows.concat(), &[4, classes]).unwrap();
        let t = integers(&[IGNORE, 1, 1, 1]);
        let (_, lse) = cross_entropy(cpu(), &logits, &t, 0.0).unwrap();
        let (_, found) = cross_entropy(gpu(), &on_gpu(&logits), &on_gpu(&t), 0.0).unwrap();
        assert_within("lse", &found, &lse, 1e-6);
    }
}

/// The fused loss on both devices, in the types of input and of weight and bias.
fn check_linear(
    [rows, inputs, classes]: [usize; 3],
    [of_input, of_weight]: [DType; 2],
    biased: bool,
    cap: Option<f64>,
    needs: [bool; 3],
) {
    let x = normal(of_input, &[rows, inputs], 1);
    let w = normal(of_weight, &[classes, inputs], 2);
    let w = affine(cpu(), &w, 1.0 / (inputs as f64).sqrt(), 0.0).unwrap();
    let bias = biased.then(|| normal(of_weight, &[classes], 3));
    let t = targets(rows, classes, 4);
    let run = |m: &Memory| {
        let on = |x: &Tensor| x.to_memory(m).unwrap();
        let (x, w, bias, t) = (on(&x), on(&w), bias.as_ref().map(on), on(&t));
        let bias = bias.as_ref();
        let (sum, kept) = linear_cross_entropy(m, &x, &w, bias, &t, 0.1, cap, needs).unwrap();
        let dy = scalar(m, 0.37);
        let gradients =
            linear_cross_entropy_backward(m, &x, &w, bias, &t, 0.1, cap, kept, &dy, needs);
        (sum, gradients.unwrap())
    };
    let (sum, gradients) = run(cpu());
    let (found, there) = run(gpu());
    let what = format!("{of_input} by {of_weight}, {rows} x {inputs} x {classes}, cap {cap:?}");
    // Logits are sums in another order, or rounded to bf16 as well.
    let short = of_input == DType::Bf16;
    let logits_short = short && of_weight == DType::Bf16;
    let of_loss = if logits_short { 2e-3 } else { 2e-5 };
    let allowed = of_loss * rows as f64;
    assert_within(&format!("loss of {what}"), &found, &sum, allowed);
    for (i, (found, expected)) in there.iter().zip(&gradients).enumerate() {
        assert_eq!(found.is_some(), needs[i]);
        let (Some(found), Some(expected)) = (found, expected) else {
            continue;
        };
        // Each term is a gradient of a logit, which in bf16 is rounded before or after it is scaled: by
        // 1/512 of it both times. Few are large, those of the targets, and make the largest elements.
        let largest = expected.to_f64().unwrap().into_iter().map(f64::abs);
        let relative = if short { 1.0 / 128.0 } else { 1e-5 };
        let allowed = relative * largest.fold(0.0, f64::max);
        assert_within(&format!("gradient {i} of {what}"), found, expected, allowed);
    }
    let (again, once_more) = run(gpu());
    assert_same("a second time", &again, &found);
    for (again, found) in once_more.iter().flatten().zip(there.iter().flatten()) {
        assert_same("a gradient a second time", again, found);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn of_a_linear_layer() {
    let (f, b) = (DType::F32, DType::Bf16);
    for types in [[f, f], [b, f], [b, b]] {
        for needs in 0..8 {
            let needs = [needs & 1 != 0, needs & 2 != 0, needs & 4 != 0];
            check_linear([37, 24, 531], types, true, None, needs);
        }
        for (sizes, cap) in [
            ([1, 8, 1], None),
            ([64, 64, 1500], Some(3.0)),
            ([130, 40, 2051], Some(30.0)),
        ] {
            check_linear(sizes, types, false, cap, [true, true, false]);
        }
        check_linear([0, 8, 10], types, true, None, [true; 3]);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn of_a_linear_layer_in_several_chunks() {
    let (f, b) = (DType::F32, DType::Bf16);
    for types in [[f, f], [b, f]] {
        check_linear([4300, 16, 50_257], types, false, None, [true, true, false]);
    }
}
