//! The operations that are products against the CPU's.

use graft_kernels::activation::Activation;
use graft_tensor::ops::{
    self, Linear, WeightLayout, input_gradient, linear, matmul, weight_gradient,
};
use graft_tensor::{DType, Tensor};

use crate::common::{assert_close, assert_same, cpu, gpu, normal, on_gpu};

/// What a result in `dtype` of sums of `k` products may differ by from the CPU's, relative to its
/// root mean square: the order of sums, and one unit in the last place of its largest elements.
fn tolerance(dtype: DType, k: usize) -> f64 {
    match dtype {
        DType::Bf16 => 6.0 / 128.0,
        _ => 1e-6 * (k as f64).sqrt().max(4.0),
    }
}

#[track_caller]
fn assert_near(what: &str, found: &Tensor, expected: &Tensor, k: usize) {
    assert_close(what, found, expected, tolerance(expected.dtype(), k));
}

#[test]
#[ignore = "needs a GPU"]
fn linear_and_its_gradients_as_here() {
    for (rows, inputs, outputs) in [(37, 48, 80), (300, 768, 130), (4000, 65, 33)] {
        for (x_type, w_type) in [
            (DType::F32, DType::F32),
            (DType::Bf16, DType::Bf16),
            (DType::Bf16, DType::F32),
        ] {
            for layout in [WeightLayout::OutIn, WeightLayout::InOut] {
                let shape = match layout {
                    WeightLayout::OutIn => [outputs, inputs],
                    WeightLayout::InOut => [inputs, outputs],
                };
                let x = normal(x_type, &[rows, inputs], 1);
                let dy = normal(x_type, &[rows, outputs], 2);
                let (w, bias) = (normal(w_type, &shape, 3), normal(w_type, &[outputs], 4));
                let (gx, gdy, gw, gbias) = (on_gpu(&x), on_gpu(&dy), on_gpu(&w), on_gpu(&bias));
                for (activation, save, with_bias) in [
                    (None, false, false),
                    (None, true, true),
                    (Some(Activation::Gelu), true, true),
                    (Some(Activation::GeluTanh), false, true),
                    (Some(Activation::Silu), true, false),
                ] {
                    let p = Linear { layout, activation };
                    let (b, gb) = (with_bias.then_some(&bias), with_bias.then_some(&gbias));
                    let (y, pre) = linear(cpu(), &p, &x, &w, b, save).unwrap();
                    let (gy, gpre) = linear(gpu(), &p, &gx, &gw, gb, save).unwrap();
                    assert_near("linear", &gy, &y, inputs);
                    assert_eq!(pre.is_some(), gpre.is_some());
                    if let (Some(pre), Some(gpre)) = (&pre, &gpre) {
                        assert_near("the pre-activation", gpre, pre, inputs);
                    }
                    if let (Some(kind), Some(gpre)) = (activation, &gpre) {
                        // What backward computes again of it has the same bits.
                        let rebuilt = ops::activation(gpu(), kind, gpre).unwrap();
                        assert_same("the activation again", &rebuilt, &gy);
                    }
                    let again = linear(gpu(), &p, &gx, &gw, gb, save).unwrap().0;
                    assert_same("linear again", &again, &gy);
                }
                let p = Linear {
                    layout,
                    activation: None,
                };
                let dx = input_gradient(cpu(), &p, &w, &dy, x.shape(), None).unwrap();
                let gdx = input_gradient(gpu(), &p, &gw, &gdy, x.shape(), None).unwrap();
                assert_near("the input's gradient", &gdx, &dx, outputs);
                let dw = weight_gradient(cpu(), layout, &x, &dy, w_type).unwrap();
                let gdw = weight_gradient(gpu(), layout, &gx, &gdy, w_type).unwrap();
                assert_near("the weight's gradient", &gdw, &dw, rows);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn matmul_broadcasts_as_here() {
    for dtype in [DType::F32, DType::Bf16] {
        let a = normal(dtype, &[2, 3, 40, 24], 1);
        let (ga, none) = (on_gpu(&a), normal(dtype, &[0, 24], 5));
        for shape in [
            &[24, 56][..],
            &[3, 24, 56],
            &[2, 1, 24, 56],
            &[5, 1, 1, 24, 56],
        ] {
            let b = normal(dtype, shape, 2);
            let c = matmul(cpu(), &a, &b).unwrap();
            let found = matmul(gpu(), &ga, &on_gpu(&b)).unwrap();
            assert_near("matmul", &found, &c, 24);
            // Views: every other matrix dimension exchanged, and a part of the columns.
            let rank = shape.len();
            let view = |x: &Tensor| x.narrow(rank - 1, 3, 24).unwrap().t().unwrap();
            let c = matmul(cpu(), &a, &view(&b)).unwrap();
            let found = matmul(gpu(), &ga, &view(&on_gpu(&b))).unwrap();
            assert_near("matmul of views", &found, &c, 24);
        }
        let empty = matmul(gpu(), &on_gpu(&none), &on_gpu(&normal(dtype, &[24, 8], 6))).unwrap();
        assert_eq!(empty.shape()[..], [0, 8]);
        let nothing = |m| Tensor::empty(m, dtype, &[5, 0]).unwrap();
        let zeros = matmul(gpu(), &nothing(gpu()), &nothing(gpu()).t().unwrap()).unwrap();
        assert!(zeros.to_f64().unwrap().iter().all(|&x| x == 0.0));
    }
}
