use graft_tensor::DType;
use graft_tensor::ops::{self, Activation, Linear, WeightLayout};
use ndarray::{ArrayD, Axis, Ix2, IxDyn, indices};

use crate::common::*;
use crate::elementwise::activate;

/// Matrix products over the last two dimensions, by `ndarray`'s of two matrices.
pub fn product(a: &ArrayD<f64>, b: &ArrayD<f64>) -> ArrayD<f64> {
    let (a_lead, a_mat) = a.shape().split_at(a.ndim() - 2);
    let (b_lead, b_mat) = b.shape().split_at(b.ndim() - 2);
    let lead = broadcast(a_lead, b_lead);
    let full = |mat: &[usize]| IxDyn(&[&lead[..], mat].concat());
    let (a, b) = (
        a.broadcast(full(a_mat)).unwrap(),
        b.broadcast(full(b_mat)).unwrap(),
    );
    let mut y = ArrayD::zeros(full(&[a_mat[0], b_mat[1]]));
    for at in indices(IxDyn(&lead)) {
        let (mut a, mut b, mut y) = (a.view(), b.view(), y.view_mut());
        for axis in 0..lead.len() {
            a.index_axis_inplace(Axis(0), at[axis]);
            b.index_axis_inplace(Axis(0), at[axis]);
            y.index_axis_inplace(Axis(0), at[axis]);
        }
        let a = a.into_dimensionality::<Ix2>().unwrap();
        y.assign(&a.dot(&b.into_dimensionality::<Ix2>().unwrap()));
    }
    y
}

/// The sizes of the sums behind a product's elements.
fn sizes(a: &ArrayD<f64>, b: &ArrayD<f64>) -> ArrayD<f64> {
    product(&a.mapv(f64::abs), &b.mapv(f64::abs))
}

#[test]
fn batched_products() {
    cases(|case| {
        let [a, b, c, e] = case.dims;
        let k = case.columns;
        let (x, y) = [
            (vec![a, k], vec![k, b]),
            (vec![c, a, k], vec![k, b]),
            (vec![a, k], vec![c, k, b]),
            (vec![c, e, a, k], vec![c, e, k, b]),
            (vec![c, 1, a, k], vec![1, e, k, b]),
            (vec![c, e, a, k], vec![e, k, b]),
        ][case.pick % 6]
            .clone();
        let (x, y) = (case.input(0, &x), case.input(1, &y));
        let z = run1(|m| ops::matmul(m, &x.on(m), &y.on(m)));
        let size = sizes(&x.values, &y.values);
        near(&z, &product(&x.values, &y.values), k as f64 + 1.0, &size);
    });
}

#[test]
fn products_with_swapped_leading_dimensions() {
    // [2, 3, m, k] seen as [3, 2, m, k]: no single stride leads through the batch.
    cases(|case| {
        let x = case.input(0, &[2, 3, 4, 5]).plain();
        let y = case.input(1, &[3, 2, 5, 6]);
        let z = run1(|m| ops::matmul(m, &x.on(m).permute(&[1, 0, 2, 3])?, &y.on(m)));
        let x = x.values.permuted_axes(IxDyn(&[1, 0, 2, 3]));
        near(&z, &product(&x, &y.values), 6.0, &sizes(&x, &y.values));
    });
}

#[test]
fn linear_with_bias_and_activation() {
    cases(|case| {
        let [a, b, _, outputs] = case.dims;
        let inputs = case.columns;
        let layout = case.of(&[WeightLayout::OutIn, WeightLayout::InOut]);
        let activation = [
            None,
            Some(Activation::Gelu),
            Some(Activation::GeluTanh),
            Some(Activation::Relu),
            Some(Activation::Tanh),
            Some(Activation::Silu),
        ][case.pick / 2 % 6];
        let x = case.input(0, &[a, b, inputs]);
        let weight = match layout {
            WeightLayout::OutIn => case.input(1, &[outputs, inputs]),
            WeightLayout::InOut => case.input(1, &[inputs, outputs]),
        };
        let bias = case.flags[0].then(|| case.input(2, &[outputs]));
        let (p, save) = (Linear { layout, activation }, case.flags[1]);
        let parts = run(|m| {
            let bias = bias.as_ref().map(|b| b.on(m));
            let (y, pre) = ops::linear(m, &p, &x.on(m), &weight.on(m), bias.as_ref(), save)?;
            Ok([y].into_iter().chain(pre).collect())
        });
        assert_eq!(parts.len(), 1 + usize::from(save && activation.is_some()));
        let w = match layout {
            WeightLayout::OutIn => weight.values.clone().reversed_axes(),
            WeightLayout::InOut => weight.values.clone(),
        };
        let flat = x
            .values
            .clone()
            .into_shape_with_order(IxDyn(&[a * b, inputs]))
            .unwrap();
        let (mut want, mut size) = (product(&flat, &w), sizes(&flat, &w));
        if let Some(bias) = &bias {
            want += &bias.values;
            size += &bias.values.mapv(f64::abs);
        }
        let shape = IxDyn(&[a, b, outputs]);
        let want = want.into_shape_with_order(shape.clone()).unwrap();
        let size = size.into_shape_with_order(shape).unwrap();
        if let Some(pre) = parts.get(1) {
            near(pre, &want, inputs as f64 + 2.0, &size);
        }
        match activation {
            None => near(&parts[0], &want, inputs as f64 + 2.0, &size),
            Some(kind) => {
                // No activation is steeper than 1.13. What it is applied to is rounded to storage:
                // so many of the computing type's roundings.
                let rounding = match parts[0].dtype {
                    DType::Bf16 => f64::from(1 << 16),
                    DType::F16 => f64::from(1 << 13),
                    _ => 0.0,
                };
                let roundings = 1.2 * (inputs as f64 + 2.0) + 12.0;
                let size = size.mapv(|s| s.max(1.0) * roundings);
                let size = size + want.mapv(|x| 1.2 * rounding * x.abs());
                let want = want.mapv(|x| activate(kind, x));
                near(&parts[0], &want, 1.0, &size);
            }
        }
    });
}

#[test]
fn gradients_of_weights_and_biases() {
    cases(|case| {
        let [a, b, outputs, _] = case.dims;
        let inputs = case.columns;
        let (x, dy) = (
            case.input(0, &[a, b, inputs]),
            case.input(1, &[a, b, outputs]),
        );
        let flat = |x: &Input, columns| {
            x.values
                .clone()
                .into_shape_with_order(IxDyn(&[a * b, columns]))
                .unwrap()
        };
        let (xs, dys) = (flat(&x, inputs), flat(&dy, outputs));
        let roundings = (a * b) as f64 + 1.0;
        for layout in [WeightLayout::OutIn, WeightLayout::InOut] {
            let y = run1(|m| ops::weight_gradient(m, layout, &x.on(m), &dy.on(m), case.dtype));
            let (p, q) = match layout {
                WeightLayout::OutIn => (dys.t().to_owned(), xs.clone()),
                WeightLayout::InOut => (xs.t().to_owned(), dys.clone()),
            };
            near(&y, &product(&p, &q), roundings, &sizes(&p, &q));
        }
        let y = run1(|m| ops::sum_to_columns(m, &dy.on(m), case.dtype));
        let size = dys.mapv(f64::abs).sum_axis(Axis(0));
        near(&y, &dys.sum_axis(Axis(0)), roundings, &size);
    });
}
