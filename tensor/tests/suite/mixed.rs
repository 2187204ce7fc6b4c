//! f32 parameters beside bf16 activations: results in bf16, gradients of parameters in f32.

use graft_tensor::ops::{self, Activation, Linear, WeightLayout, loss, norm};
use graft_tensor::{DType, Tensor};
use ndarray::{ArrayD, Axis, IxDyn};

use crate::common::*;
use crate::elementwise::activate;
use crate::linalg::product;

/// The case with inputs of another type.
fn of(case: &Case, dtype: DType) -> Case {
    Case {
        dtype,
        ..case.clone()
    }
}

/// As it enters a product: bf16.
fn rounded(x: &ArrayD<f64>) -> ArrayD<f64> {
    x.mapv(|x| round(DType::Bf16, x))
}

fn flat(x: &ArrayD<f64>) -> ArrayD<f64> {
    let columns = x.shape()[x.ndim() - 1];
    let rows = x.shape()[..x.ndim() - 1].iter().product();
    let shape = IxDyn(&[rows, columns]);
    x.clone().into_shape_with_order(shape).unwrap()
}

fn dtypes(parts: &[Out]) -> Vec<DType> {
    parts.iter().map(|y| y.dtype).collect()
}

/// Two bf16 multiply exactly in f32, so what a product may be off by is its sums' roundings in f32
/// (a rounding for each of k, and the bias') and the one to its type.
#[test]
fn linear_and_its_gradients() {
    cases(|case| {
        let (short, wide) = (of(case, DType::Bf16), of(case, DType::F32));
        let [a, b, outputs, _] = case.dims;
        let inputs = case.columns;
        let layout = case.of(&[WeightLayout::OutIn, WeightLayout::InOut]);
        let x = short.input(0, &[a, b, inputs]);
        let weight = match layout {
            WeightLayout::OutIn => wide.input(1, &[outputs, inputs]),
            WeightLayout::InOut => wide.input(1, &[inputs, outputs]),
        };
        let bias = wide.input(2, &[outputs]);
        let dy = short.input(3, &[a, b, outputs]);
        let p = Linear {
            layout,
            activation: None,
        };
        let parts = run(|m| {
            let (x, w, dy) = (x.on(m), weight.on(m), dy.on(m));
            let (y, _) = ops::linear(m, &p, &x, &w, Some(&bias.on(m)), false)?;
            let dx = ops::input_gradient(m, &p, &w, &dy, x.shape(), None)?;
            let dw = ops::weight_gradient(m, layout, &x, &dy, w.dtype())?;
            Ok(vec![y, dx, dw, ops::sum_to_columns(m, &dy, DType::F32)?])
        });
        let expected = [DType::Bf16, DType::Bf16, DType::F32, DType::F32];
        assert_eq!(dtypes(&parts), expected);
        let w = match layout {
            WeightLayout::OutIn => rounded(&weight.values).reversed_axes(),
            WeightLayout::InOut => rounded(&weight.values),
        };
        let (x, dy) = (flat(&x.values), flat(&dy.values));
        let abs = |x: &ArrayD<f64>| x.mapv(f64::abs);
        let check = |y: &Out, want: ArrayD<f64>, size: ArrayD<f64>, n: usize| {
            let shape = IxDyn(y.values.shape());
            let want = want.into_shape_with_order(shape.clone()).unwrap();
            let size = size.into_shape_with_order(shape).unwrap();
            near(y, &want, n as f64 + 2.0, &size);
        };
        let size = product(&abs(&x), &abs(&w)) + abs(&bias.values);
        check(&parts[0], product(&x, &w) + &bias.values, size, inputs);
        let wt = w.clone().reversed_axes();
        let size = product(&abs(&dy), &abs(&wt));
        check(&parts[1], product(&dy, &wt), size, outputs);
        let (p, q) = match layout {
            WeightLayout::OutIn => (dy.t().to_owned(), x),
            WeightLayout::InOut => (x.t().to_owned(), dy.clone()),
        };
        check(
            &parts[2],
            product(&p, &q),
            product(&abs(&p), &abs(&q)),
            a * b,
        );
        let size = abs(&dy).sum_axis(Axis(0));
        check(&parts[3], dy.sum_axis(Axis(0)), size, a * b);
    });
}

/// What is kept for the backward pass is what the activation was taken of, to the bit.
#[test]
fn an_activation_can_be_made_again_from_what_is_kept() {
    cases(|case| {
        let (short, wide) = (of(case, DType::Bf16), of(case, DType::F32));
        let [rows, outputs, ..] = case.dims;
        let x = short.input(0, &[rows, case.columns]);
        let weight = wide.input(1, &[outputs, case.columns]);
        let kind = case.of(&[Activation::Gelu, Activation::GeluTanh, Activation::Silu]);
        let p = Linear {
            layout: WeightLayout::OutIn,
            activation: Some(kind),
        };
        let parts = run(|m| {
            let (x, weight) = (x.on(m), weight.on(m));
            let (y, pre) = ops::linear(m, &p, &x, &weight, None, true)?;
            let (alone, _) = ops::linear(m, &p, &x, &weight, None, false)?;
            let pre = pre.expect("it was asked for");
            Ok(vec![ops::activation(m, kind, &pre)?, y, alone, pre])
        });
        equal(&parts[0], &parts[1].values);
        equal(&parts[0], &parts[2].values);
        let want = parts[3].values.mapv(|x| activate(kind, x));
        near_by(&parts[1], &want, 12.0, 1.0);
    });
}

/// Against the same in f64, which is held against formulas and finite differences elsewhere.
#[test]
fn norms_and_their_gradients() {
    cases(|case| {
        let (short, wide) = (of(case, DType::Bf16), of(case, DType::F32));
        let shape = [case.dims[0], case.dims[1], case.columns.max(1)];
        let (x, dy) = (short.input(0, &shape), short.input(1, &shape));
        let weight = wide.between(2, &shape[2..], 0.5, 1.5);
        let bias = wide.input(3, &shape[2..]);
        let eps = 1e-2;
        let both = |exact: bool| {
            let of = |dtype: DType| if exact { DType::F64 } else { dtype };
            run(|m| {
                let (x, dy) = (
                    x.cast_on(of(DType::Bf16), m),
                    dy.cast_on(of(DType::Bf16), m),
                );
                let w = weight.cast_on(of(DType::F32), m);
                let b = bias.cast_on(of(DType::F32), m);
                let n = norm::layer_norm(m, &x, None, Some(&w), Some(&b), eps, false)?;
                let mean: &Tensor = n.mean.as_ref().expect("layer norm has one");
                let dx = norm::layer_norm_backward_input(m, &x, Some(&w), mean, &n.scale, &dy)?;
                let [dw, db] = norm::layer_norm_backward_params(
                    m,
                    &x,
                    mean,
                    &n.scale,
                    &dy,
                    [true; 2],
                    w.dtype(),
                )?;
                let r = norm::rms_norm(m, &x, None, &w, 0.0, eps, false)?;
                let [rdx, rdw] = norm::rms_norm_backward(m, &x, &w, 0.0, &r.scale, &dy, [true; 2])?;
                let short = [Some(n.y), Some(dx), Some(r.y), rdx];
                Ok(short.into_iter().chain([dw, db, rdw]).flatten().collect())
            })
        };
        let (found, exact) = (both(false), both(true));
        let (b, f) = (DType::Bf16, DType::F32);
        assert_eq!(dtypes(&found), [b, b, b, b, f, f, f]);
        // Statistics and sums are f32: roundings for each column, of numbers up to 10 / eps.
        let (rows, columns) = (shape[0] * shape[1], shape[2]);
        let roundings = 4.0 * (columns + rows) as f64 + 32.0;
        for (y, want) in found.iter().zip(&exact) {
            near_by(y, &want.values, roundings, 4000.0);
        }
    });
}

/// Logits, and so the loss, are f32; gradients have the types of what they are gradients of.
#[test]
fn cross_entropy_of_a_linear_layer() {
    cases(|case| {
        let (short, wide) = (of(case, DType::Bf16), of(case, DType::F32));
        let (rows, inputs) = (case.dims[0].max(1), case.dims[1].max(1));
        let classes = case.columns.max(1);
        let x = short.between(0, &[rows, inputs], -1.0, 1.0);
        let weight = wide.between(1, &[classes, inputs], -1.0, 1.0);
        let bias = wide.between(2, &[classes], -1.0, 1.0);
        let targets = case.integers(3, rows, classes);
        let exact_weight = rounded(&weight.values);
        let both = |exact: bool| {
            run(|m| {
                let t = ids(m, &targets);
                let (x, w, b) = if exact {
                    let w = exact_weight.iter().copied().collect();
                    let w = upload(m, DType::F64, w, &[classes, inputs]);
                    (x.cast_on(DType::F64, m), w, bias.cast_on(DType::F64, m))
                } else {
                    (x.on(m), weight.on(m), bias.on(m))
                };
                let needs = [true; 3];
                let (sum, kept) =
                    loss::linear_cross_entropy(m, &x, &w, Some(&b), &t, 0.1, None, needs)?;
                let lse = kept[0].clone();
                let dy = Tensor::full(m, sum.dtype(), &[], 1.0)?;
                let parts = loss::linear_cross_entropy_backward(
                    m,
                    &x,
                    &w,
                    Some(&b),
                    &t,
                    0.1,
                    None,
                    kept,
                    &dy,
                    needs,
                )?;
                let forward = [sum, lse].into_iter();
                Ok(forward.chain(parts.into_iter().flatten()).collect())
            })
        };
        let (found, exact) = (both(false), both(true));
        let (b, f) = (DType::Bf16, DType::F32);
        assert_eq!(dtypes(&found), [f, f, b, f, f]);
        let roundings = 2.0 * (inputs + classes + rows) as f64 + 32.0;
        let size = (inputs + 4) as f64 * (rows + 1) as f64;
        near_by(&found[0], &exact[0].values, roundings, size);
        near_by(&found[1], &exact[1].values, roundings, size);
        // The logits' gradients, at most 1 each, enter products in bf16.
        let in_bf16 = unit(DType::Bf16) / unit(DType::F32);
        for i in [2, 3] {
            let terms = [classes, rows][i - 2] as f64;
            near_by(
                &found[i],
                &exact[i].values,
                roundings + in_bf16,
                2.0 * terms,
            );
        }
        near_by(&found[4], &exact[4].values, roundings, size);
    });
}

/// f16 has no products with f32, and an f64 weight is nobody's master weight. A bf16 one beside f32 is frozen: norms are
/// never held so.
#[test]
fn other_pairs_are_refused() {
    let m = graft_tensor::Memory::cpu();
    let p = Linear {
        layout: WeightLayout::OutIn,
        activation: None,
    };
    for (x, w, expected) in [
        (DType::F16, DType::F32, "f16"),
        (DType::F32, DType::F64, "f32"),
        (DType::Bf16, DType::F64, "bf16 or f32"),
    ] {
        let x = Tensor::zeros(&m, x, &[2, 3]).unwrap();
        let w = Tensor::zeros(&m, w, &[4, 3]).unwrap();
        let error = ops::linear(&m, &p, &x, &w, None, false).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        let weight = w.narrow(0, 0, 1).unwrap().reshape(&[3]).unwrap();
        let error = norm::rms_norm(&m, &x, None, &weight, 0.0, 1e-5, false).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let x = Tensor::zeros(&m, DType::F32, &[2, 3]).unwrap();
    let weight = Tensor::zeros(&m, DType::Bf16, &[3]).unwrap();
    let error = norm::rms_norm(&m, &x, None, &weight, 0.0, 1e-5, false).unwrap_err();
    assert!(error.to_string().contains("bf16, expected f32"), "{error}");
}
