//! Reductions along an axis, of rows, of everything.

use graft_tensor::ops::{Reduce, argmax, loss, max_backward, reduce, sum_to_columns};
use graft_tensor::{DType, Tensor};
use proptest::prelude::*;

use crate::common::{assert_same, cpu, gpu, normal, on_gpu};
use crate::within::assert_within;

/// What sums of so many normal numbers, in whatever order, may differ by: the partial sums are about
/// as large as the root of the number, and each is rounded.
fn of_sum(terms: usize) -> f64 {
    4e-6 * (terms.max(1) as f64).sqrt()
}

fn check(x: &Tensor, there: &Tensor, axis: usize, keep: bool) {
    for kind in [Reduce::Sum, Reduce::Mean, Reduce::Max] {
        let length = x.shape()[axis];
        if length == 0 && kind != Reduce::Sum {
            assert!(reduce(gpu(), kind, there, axis, keep).is_err());
            continue;
        }
        let y = reduce(gpu(), kind, there, axis, keep).unwrap();
        let expected = reduce(cpu(), kind, x, axis, keep).unwrap();
        let what = format!("{kind:?} over {axis} of {} {}", x.dtype(), x.shape());
        match kind {
            Reduce::Max => assert_same(&what, &y, &expected),
            Reduce::Sum => assert_within(&what, &y, &expected, of_sum(length)),
            Reduce::Mean => assert_within(&what, &y, &expected, of_sum(length) / length as f64),
        }
        let again = reduce(gpu(), kind, there, axis, keep).unwrap();
        assert_same("a second time", &again, &y);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn along_any_axis(
        dims in prop::collection::vec(1usize..40, 1..5), axis in 0usize..4, seed in 0u64..1000,
        short in any::<bool>(), keep in any::<bool>(), turned in any::<bool>(),
    ) {
        let dtype = if short { DType::Bf16 } else { DType::F32 };
        let x = normal(dtype, &dims, seed);
        let there = on_gpu(&x);
        let (x, there) = if turned && dims.len() > 1 {
            (x.t().unwrap(), there.t().unwrap())
        } else {
            (x, there)
        };
        check(&x, &there, axis % dims.len(), keep);
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn the_gradient_of_a_maximum(
        outer in 1usize..5, length in 1usize..100, inner in 1usize..5, seed in 0u64..1000,
        short in any::<bool>(),
    ) {
        let dtype = if short { DType::Bf16 } else { DType::F32 };
        // Few different numbers, so that maxima are tied.
        let x = normal(dtype, &[outer, length, inner], seed).to_f64().unwrap();
        let x: Vec<f32> = x.into_iter().map(|x| x.round() as f32).collect();
        let x = Tensor::from_vec(cpu(), x, &[outer, length, inner]).unwrap();
        let x = graft_tensor::ops::cast(cpu(), &x, dtype).unwrap();
        let y = reduce(cpu(), Reduce::Max, &x, 1, false).unwrap();
        let dy = normal(dtype, y.shape(), seed + 1);
        let expected = max_backward(cpu(), &x, &y, &dy, 1).unwrap();
        let (x, y, dy) = (on_gpu(&x), on_gpu(&y), on_gpu(&dy));
        let dx = max_backward(gpu(), &x, &y, &dy, 1).unwrap();
        assert_same("the gradient of a maximum", &dx, &expected);
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn places_of_maxima(rows in 1usize..20, columns in 1usize..2000, seed in 0u64..1000) {
        for dtype in [DType::F32, DType::Bf16] {
            let x = normal(dtype, &[rows, columns], seed);
            let y = argmax(gpu(), &on_gpu(&x)).unwrap();
            assert_same("the place of a maximum", &y, &argmax(cpu(), &x).unwrap());
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn long_and_empty_axes() {
    for dtype in [DType::F32, DType::Bf16] {
        for (shape, axis) in [
            (&[0, 3][..], 0),
            (&[3, 0], 1),
            (&[0, 3], 1),
            (&[1, 65_536, 3], 1),
            (&[30_011, 129], 0),
            (&[4096, 768], 0),
            (&[3, 4099, 64], 1),
            (&[2, 100_003], 1),
            (&[5, 2048], 1),
            (&[5, 2049], 1),
            (&[2000, 3, 130], 1),
        ] {
            let x = normal(dtype, shape, 7);
            check(&x, &on_gpu(&x), axis, true);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn what_is_not_a_number_is_the_maximum() {
    let nan = f32::NAN;
    let values = vec![1.0, nan, 3.0, nan, 2.0, 2.0, f32::NEG_INFINITY, -0.0, 0.0];
    let x = Tensor::from_vec(cpu(), values, &[3, 3]).unwrap();
    for axis in [0, 1] {
        let y = reduce(gpu(), Reduce::Max, &on_gpu(&x), axis, true).unwrap();
        let expected = reduce(cpu(), Reduce::Max, &x, axis, true).unwrap();
        assert_within("maxima", &y, &expected, 0.0);
        let dy = normal(DType::F32, y.shape(), 1);
        let dx = max_backward(gpu(), &on_gpu(&x), &y, &on_gpu(&dy), axis).unwrap();
        let expected = max_backward(cpu(), &x, &expected, &dy, axis).unwrap();
        assert_same("their gradient", &dx, &expected);
    }
    let places = argmax(gpu(), &on_gpu(&x)).unwrap();
    assert_eq!(places.slice::<i64>().unwrap(), [1, 0, 1]);
}

#[test]
#[ignore = "needs a GPU"]
fn gradients_of_biases() {
    for (shape, seed) in [
        (&[1, 1][..], 1),
        (&[300, 7], 2),
        (&[17, 33, 768], 3),
        (&[40_000, 770], 4),
        (&[0, 5], 5),
    ] {
        let rows = shape[..shape.len() - 1].iter().product();
        for dtype in [DType::F32, DType::Bf16] {
            let x = normal(dtype, shape, seed);
            for to in [DType::F32, DType::Bf16] {
                let y = sum_to_columns(gpu(), &on_gpu(&x), to).unwrap();
                let expected = sum_to_columns(cpu(), &x, to).unwrap();
                let what = format!("the sum of the rows of {dtype} as {to}");
                assert_within(&what, &y, &expected, of_sum(rows));
                let again = sum_to_columns(gpu(), &on_gpu(&x), to).unwrap();
                assert_same("a second time", &again, &y);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn sums_of_everything() {
    for count in [0, 1, 31, 4097, 1_000_003] {
        for dtype in [DType::F32, DType::Bf16] {
            let x = normal(dtype, &[count], 3);
            let y = loss::sum_all(gpu(), &on_gpu(&x)).unwrap();
            let expected = loss::sum_all(cpu(), &x).unwrap();
            // In double precision, and rounded once.
            let allowed = 1e-7 * (count as f64).sqrt();
            assert_within("the sum of everything", &y, &expected, allowed);
        }
    }
}
