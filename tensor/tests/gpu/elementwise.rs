//! Functions of one and two elements, dropout.

use graft_kernels::philox::Key;
use graft_tensor::ops::elementwise::{add_assign, selects_first};
use graft_tensor::ops::{
    Activation, Binary, Glu, Needs, Unary, activation, activation_backward, affine, binary,
    dropout, dropout_backward, glu, glu_backward, unary, unary_backward,
};
use graft_tensor::{DType, Tensor};
use proptest::prelude::*;

use crate::common::{assert_same, cpu, gpu, normal, on_gpu};
use crate::near::{assert_near, shifted, swapped};

const TYPES: [DType; 2] = [DType::F32, DType::Bf16];
/// None, one, some that no vector instruction divides, rows of them, and more than one wave of blocks.
const SHAPES: [&[usize]; 6] = [&[0, 3], &[1], &[7], &[255, 3], &[64, 33], &[300, 1024]];

/// Arguments where a function is defined.
fn arguments(kind: Unary, dtype: DType, shape: &[usize]) -> Tensor {
    let x = normal(dtype, shape, 1);
    match kind {
        Unary::Ln | Unary::Sqrt | Unary::Reciprocal => {
            let size = unary(cpu(), Unary::Abs, &x).unwrap();
            affine(cpu(), &size, 1.0, 0.125).unwrap()
        }
        _ => affine(cpu(), &x, 2.0, 0.0).unwrap(),
    }
}

#[test]
#[ignore = "needs a GPU"]
fn unary_and_backward() {
    for (dtype, shape) in TYPES.into_iter().flat_map(|t| SHAPES.map(|s| (t, s))) {
        for kind in Unary::ALL {
            let what = format!("{kind:?}");
            let x = arguments(kind, dtype, shape);
            let y = unary(cpu(), kind, &x).unwrap();
            let there = unary(gpu(), kind, &on_gpu(&x)).unwrap();
            assert_near(&what, &there, &y);
            let again = unary(gpu(), kind, &shifted(&x)).unwrap();
            assert_same(&what, &again, &there);
            let dy = normal(dtype, shape, 2);
            let saved = match kind.backward_needs() {
                Needs::Input => Some(&x),
                Needs::Output => Some(&y),
                Needs::Neither => None,
            };
            let dx = unary_backward(cpu(), kind, saved, &dy).unwrap();
            let far = saved.map(on_gpu);
            let there = unary_backward(gpu(), kind, far.as_ref(), &on_gpu(&dy)).unwrap();
            assert_near(&format!("{what} backward"), &there, &dx);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn unusual_numbers() {
    let x = [
        0.0,
        -0.0,
        1e-40,
        -1e-40,
        1e-10,
        -1e-10,
        5.0,
        -5.0,
        -9.0,
        11.0,
        -13.0,
        20.0,
        -20.0,
        100.0,
        -100.0,
        1e10,
        3e38,
        f32::INFINITY,
        f32::NAN,
    ];
    let x = Tensor::from_slice(cpu(), &x, &[x.len()]).unwrap();
    for kind in Unary::ALL {
        // The sine of 3e38 is no question of rounding.
        if matches!(kind, Unary::Sin | Unary::Cos) {
            continue;
        }
        let y = unary(cpu(), kind, &x).unwrap();
        let there = unary(gpu(), kind, &on_gpu(&x)).unwrap();
        for (i, (f, w)) in there
            .to_f64()
            .unwrap()
            .iter()
            .zip(y.to_f64().unwrap())
            .enumerate()
        {
            // What is below the smallest normal number may be 0.
            let alike = *f == w || (f.is_nan() && w.is_nan());
            assert!(
                alike || (f - w).abs() <= 4e-6 * w.abs() + 1e-6 * f64::from(w.abs() < 1.0),
                "{kind:?}: element {i} is {f:e} and should be {w:e}"
            );
        }
    }
    for kind in Activation::ALL {
        let ones = Tensor::full(cpu(), DType::F32, x.shape(), 1.0).unwrap();
        let slopes = activation_backward(cpu(), kind, &x, ones.clone()).unwrap();
        let there = activation_backward(gpu(), kind, &on_gpu(&x), on_gpu(&ones)).unwrap();
        let (there, slopes) = (there.to_f64().unwrap(), slopes.to_f64().unwrap());
        for (i, (f, w)) in there.iter().zip(&slopes).enumerate() {
            let alike = f == w || (f.is_nan() && w.is_nan());
            assert!(
                alike || (f - w).abs() <= 4e-6,
                "{kind:?} backward: element {i} is {f:e} and should be {w:e}"
            );
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn activations_and_backward() {
    for (dtype, shape) in TYPES.into_iter().flat_map(|t| SHAPES.map(|s| (t, s))) {
        let x = affine(cpu(), &normal(dtype, shape, 1), 3.0, 0.0).unwrap();
        let dy = normal(dtype, shape, 2);
        for kind in Activation::ALL {
            let what = format!("{kind:?}");
            let y = activation(cpu(), kind, &x).unwrap();
            let there = activation(gpu(), kind, &on_gpu(&x)).unwrap();
            assert_near(&what, &there, &y);
            if shape.len() == 2 {
                let again = activation(gpu(), kind, &swapped(&x)).unwrap();
                assert_same(&what, &again, &there);
            }
            let dx = activation_backward(cpu(), kind, &x, dy.clone()).unwrap();
            // Over its gradient, and beside one that is shared.
            let kept = on_gpu(&dy);
            let beside = activation_backward(gpu(), kind, &on_gpu(&x), kept.clone()).unwrap();
            assert_same("the shared gradient", &kept, &dy);
            let over = activation_backward(gpu(), kind, &shifted(&x), kept).unwrap();
            assert_near(&format!("{what} backward"), &beside, &dx);
            assert_same(&format!("{what} backward"), &over, &beside);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gated_units_and_backward() {
    for (dtype, shape) in TYPES.into_iter().flat_map(|t| SHAPES.map(|s| (t, s))) {
        let [gate, up, dy] = [1, 2, 3].map(|seed| normal(dtype, shape, seed));
        let far = [&gate, &up, &dy].map(on_gpu);
        for kind in Glu::ALL {
            let what = format!("{kind:?}");
            let y = glu(cpu(), kind, &gate, &up).unwrap();
            let there = glu(gpu(), kind, &far[0], &far[1]).unwrap();
            assert_near(&what, &there, &y);
            for needs in [[true, true], [true, false], [false, true], [false, false]] {
                let wanted = glu_backward(cpu(), kind, &gate, &up, &dy, needs).unwrap();
                let found = glu_backward(gpu(), kind, &far[0], &far[1], &far[2], needs).unwrap();
                for (found, wanted) in found.iter().zip(&wanted) {
                    assert_eq!(found.is_some(), wanted.is_some());
                    if let (Some(found), Some(wanted)) = (found, wanted) {
                        assert_near(&format!("{what} backward"), found, wanted);
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn products_sums_and_choices_have_the_same_bits() {
    for (dtype, shape) in TYPES.into_iter().flat_map(|t| SHAPES.map(|s| (t, s))) {
        let (a, b) = (normal(dtype, shape, 1), normal(dtype, shape, 2));
        let y = affine(cpu(), &a, -1.75, 0.3).unwrap();
        assert_same(
            "affine",
            &affine(gpu(), &on_gpu(&a), -1.75, 0.3).unwrap(),
            &y,
        );
        for kind in Binary::ALL {
            let y = binary(cpu(), kind, &a, &b).unwrap();
            let there = binary(gpu(), kind, &on_gpu(&a), &on_gpu(&b)).unwrap();
            assert_same(&format!("{kind:?}"), &there, &y);
            let there = binary(gpu(), kind, &shifted(&a), &on_gpu(&b)).unwrap();
            assert_same(&format!("{kind:?} unaligned"), &there, &y);
        }
        let (mut sum, mut there) = (a.copy(cpu()).unwrap(), on_gpu(&a));
        add_assign(&mut sum, &b).unwrap();
        add_assign(&mut there, &shifted(&b)).unwrap();
        assert_same("add in place", &there, &sum);
    }
    // More than all threads of the largest grid have at once.
    let x = normal(DType::Bf16, &[20_000_003], 1);
    let y = affine(cpu(), &x, 0.5, 1.0).unwrap();
    assert_same(
        "a long one",
        &affine(gpu(), &on_gpu(&x), 0.5, 1.0).unwrap(),
        &y,
    );
}

#[test]
#[ignore = "needs a GPU"]
fn what_is_not_a_number_is_chosen() {
    let a = [1.0, f32::NAN, 2.0, f32::NAN, -0.0, 3.0];
    let b = [f32::NAN, 1.0, 2.0, f32::NAN, 0.0, -3.0];
    let (a, b) = (
        Tensor::from_slice(cpu(), &a, &[6]).unwrap(),
        Tensor::from_slice(cpu(), &b, &[6]).unwrap(),
    );
    for kind in [Binary::Max, Binary::Min] {
        let y = binary(cpu(), kind, &a, &b).unwrap().to_f64().unwrap();
        let there = binary(gpu(), kind, &on_gpu(&a), &on_gpu(&b)).unwrap();
        for (f, w) in there.to_f64().unwrap().iter().zip(y) {
            assert!(*f == w || (f.is_nan() && w.is_nan()), "{kind:?}: {f} {w}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    /// Shapes with dimensions that one of the two lacks, or has in another order in its storage.
    #[test]
    #[ignore = "needs a GPU"]
    fn broadcasting(
        dims in prop::collection::vec((1usize..9, 0u8..3), 0..=6),
        last in prop::sample::select(vec![1usize, 3, 8, 24, 64]),
        lead in 0usize..3, swap in any::<bool>(), short in any::<bool>(), seed in any::<u64>(),
    ) {
        let dtype = if short { DType::Bf16 } else { DType::F32 };
        let mut dims: Vec<(usize, u8)> = dims.into_iter().take(5).collect();
        dims.push((last, (seed % 3) as u8));
        // 0: both have the dimension, 1: a alone, 2: b alone
        let of = |absent: u8| -> Vec<usize> {
            dims.iter().map(|&(n, whose)| if whose == absent { 1 } else { n }).collect()
        };
        let (shape_a, shape_b) = (of(2), of(1));
        let lead = lead.min(shape_b.iter().take_while(|&&n| n == 1).count());
        let (a, b) = (normal(dtype, &shape_a, seed), normal(dtype, &shape_b[lead..], !seed));
        let far_b = on_gpu(&b);
        for kind in Binary::ALL {
            let y = binary(cpu(), kind, &a, &b).unwrap();
            let far_a = if swap && shape_a.len() > 1 { swapped(&a) } else { shifted(&a) };
            assert_same("broadcast", &binary(gpu(), kind, &far_a, &far_b).unwrap(), &y);
            assert_same("broadcast", &binary(gpu(), kind, &on_gpu(&a), &far_b).unwrap(), &y);
        }
        for kind in [Binary::Max, Binary::Min] {
            let mask = selects_first(cpu(), kind, &a, &b).unwrap();
            let there = selects_first(gpu(), kind, &on_gpu(&a), &far_b).unwrap();
            assert_same("selection", &there, &mask);
        }
    }

    /// The mask is that of the CPU, bit for bit, wherever the tensor begins.
    #[test]
    #[ignore = "needs a GPU"]
    fn dropout_masks(
        count in 0usize..5000, p in prop::sample::select(vec![0.0, 0.1, 0.5, 0.9]),
        seed in any::<u64>(), short in any::<bool>(),
    ) {
        let dtype = if short { DType::Bf16 } else { DType::F32 };
        let (x, key) = (normal(dtype, &[count], seed), Key::new(seed, 1, 2));
        let y = dropout(cpu(), &x, p, key).unwrap();
        assert_same("dropout", &dropout(gpu(), &on_gpu(&x), p, key).unwrap(), &y);
        assert_same("dropout", &dropout(gpu(), &shifted(&x), p, key).unwrap(), &y);
        let over = dropout_backward(gpu(), on_gpu(&x), p, key).unwrap();
        assert_same("dropout in place", &over, &y);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn other_types_are_refused() {
    let x = on_gpu(&normal(DType::F64, &[5], 1));
    let error = activation(gpu(), Activation::Gelu, &x).unwrap_err();
    assert!(
        error.to_string().contains("it takes f32 and bf16"),
        "{error}"
    );
}
