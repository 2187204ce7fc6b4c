//! A linear layer, with its bias and activation fused, and its gradients.

use std::borrow::Cow;

use graft_kernels::activation::Activation;
use graft_kernels::{Float, cuda, reduce as kernel};

use super::linalg::{narrow_product, operands};
use super::product::{Last, product, summand};
use super::quantised::weight_dtype;
use super::{accumulator, as_matrix, beside, cast, parameter, rows_of, workspace};
use crate::error::{Error, Result};
use crate::{DType, Memory, Shape, Tensor, with_float};

/// How a weight matrix is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum WeightLayout {
    /// `[out, in]`: most families
    OutIn,
    /// `[in, out]`: GPT-2's Conv1D
    InOut,
}

/// What [`linear`] computes beside the product.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Linear {
    /// How the weight is stored
    pub layout: WeightLayout,
    /// Applied to `x·w + bias`
    pub activation: Option<Activation>,
}

impl Linear {
    /// `(in, out)` features of a weight.
    fn features(&self, weight: &Tensor) -> Result<(usize, usize)> {
        match (weight.shape().len(), self.layout) {
            (2, WeightLayout::OutIn) => Ok((weight.shape()[1], weight.shape()[0])),
            (2, WeightLayout::InOut) => Ok((weight.shape()[0], weight.shape()[1])),
            _ => Err(Error::shape(
                "linear",
                "the weight",
                weight.shape(),
                match self.layout {
                    WeightLayout::OutIn => "[out, in]",
                    WeightLayout::InOut => "[in, out]",
                },
            )),
        }
    }

    /// The weight as a view `[in, out]`.
    pub fn input_by_output<'a>(&self, weight: &'a Tensor) -> Result<Cow<'a, Tensor>> {
        match self.layout {
            WeightLayout::OutIn => Ok(Cow::Owned(weight.t()?)),
            WeightLayout::InOut => Ok(Cow::Borrowed(weight)),
        }
    }
}

/// `activation(x·w + bias)`: `x [.., in]` gives `[.., out]`. With `save`, also the pre-activation,
/// which the activation's backward needs. Weight and bias may be f32 beside bf16 activations; the
/// weight is then rounded on its way into the product, and nothing is copied. It may also be bf16 beside
/// f32 ones, or codes: a frozen weight's types.
///
/// # Errors
/// Inner sizes that differ, a bias that is not `[out]`, types that do not go together.
pub fn linear(
    m: &Memory,
    p: &Linear,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    save: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    linear_as(m, p, x, weight, bias, save, x.dtype())
}

/// [`linear`] with a result of another type: f32 logits of bf16 activations.
pub(super) fn linear_as(
    m: &Memory,
    p: &Linear,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    save: bool,
    dtype: DType,
) -> Result<(Tensor, Option<Tensor>)> {
    let op = "linear";
    let (inputs, outputs) = p.features(weight)?;
    let (rows, columns) = rows_of(op, "the input", x)?;
    if columns != inputs {
        return Err(Error::shape(
            op,
            format!("the input, for a weight {}", weight.shape()),
            x.shape(),
            format!("[.., {inputs}]"),
        ));
    }
    weight_dtype(op, weight, x.dtype())?;
    let bias = bias
        .map(|bias| parameter(op, "the bias", bias, outputs, x.dtype(), m))
        .transpose()?;
    let x = x.contiguous(m)?;
    let weight = p.input_by_output(weight)?;
    let shape = x.shape().replaced(x.shape().rank() - 1, Some(outputs));
    let mut y = Tensor::empty(m, dtype, &shape)?;
    let mut pre = (save && p.activation.is_some())
        .then(|| Tensor::empty(m, dtype, &shape))
        .transpose()?;
    let last = Last {
        bias: bias.as_deref(),
        activation: p.activation,
        pre: pre.as_mut(),
        ..Last::default()
    };
    let x = as_matrix(&x, [rows, inputs])?;
    product(m, &x, &weight, &mut y, false, last)?;
    Ok((y, pre))
}

/// The gradient of [`linear`]'s input, of `shape`: from `dy [.., out]`, the gradient after the
/// activation's backward, in whose type it is. It is added to `sum`, if there is one, in whose
/// storage the result lies if nothing else holds that.
///
/// # Errors
/// A gradient or a weight that does not fit.
pub fn input_gradient(
    m: &Memory,
    linear: &Linear,
    weight: &Tensor,
    dy: &Tensor,
    shape: &Shape,
    sum: Option<Tensor>,
) -> Result<Tensor> {
    let [flat, w] = backward_factors(m, linear, weight, dy)?;
    let (mut dx, accumulate) = match sum {
        Some(sum) => (summand(m, sum, dy, shape)?, true),
        None => (Tensor::empty(m, dy.dtype(), shape)?, false),
    };
    product(m, &flat, &w, &mut dx, accumulate, Last::default())?;
    Ok(dx)
}

/// The gradient of [`linear`]'s input where that is the activation of `pre`: of `pre`. On a
/// GPU, for a weight that is not codes.
///
/// # Errors
/// A gradient or a weight that does not fit.
pub fn input_gradient_through(
    m: &Memory,
    linear: &Linear,
    weight: &Tensor,
    dy: &Tensor,
    pre: &Tensor,
    kind: Activation,
) -> Result<Tensor> {
    let [flat, w] = backward_factors(m, linear, weight, dy)?;
    let mut dx = Tensor::empty(m, dy.dtype(), pre.shape())?;
    let pre = beside("linear backward", "the pre-activation", pre, &dx, m)?;
    let last = Last {
        activation: Some(kind),
        slope_of: Some(&pre),
        ..Last::default()
    };
    product(m, &flat, &w, &mut dx, false, last)?;
    Ok(dx)
}

/// What the gradient of [`linear`]'s input is the product of: `dy` as `[rows, out]`, contiguous, and the weight as a
/// view `[out, in]`.
fn backward_factors(
    m: &Memory,
    linear: &Linear,
    weight: &Tensor,
    dy: &Tensor,
) -> Result<[Tensor; 2]> {
    let op = "linear backward";
    weight_dtype(op, weight, dy.dtype())?;
    let (rows, outputs) = rows_of(op, "the gradient", dy)?;
    let flat = dy.contiguous(m)?.reshape(&[rows, outputs])?;
    Ok([flat, linear.input_by_output(weight)?.t()?])
}

/// The gradient of [`linear`]'s weight, in its layout and its `dtype`: from `x [.., in]` and `dy
/// [.., out]`, the gradient after the activation's backward.
///
/// # Errors
/// Row counts that differ, types that do not go together.
pub fn weight_gradient(
    m: &Memory,
    layout: WeightLayout,
    x: &Tensor,
    dy: &Tensor,
    dtype: DType,
) -> Result<Tensor> {
    let op = "linear backward";
    let (rows, inputs) = rows_of(op, "the input", x)?;
    let (dy_rows, outputs) = rows_of(op, "the gradient", dy)?;
    if rows != dy_rows {
        return Err(Error::shape(
            op,
            "the gradient",
            dy.shape(),
            format!("{rows} rows"),
        ));
    }
    let x = x.contiguous(m)?.reshape(&[rows, inputs])?;
    let dy = dy.contiguous(m)?.reshape(&[rows, outputs])?;
    let operands = operands(x.dtype());
    match layout {
        WeightLayout::OutIn => narrow_product(m, operands, &dy.t()?, &x, dtype),
        WeightLayout::InOut => narrow_product(m, operands, &x.t()?, &dy, dtype),
    }
}

/// The sum over all rows of `x [.., columns]`: `[columns]` in `dtype`, the gradient of a bias.
///
/// # Errors
/// A tensor without dimensions.
pub fn sum_to_columns(m: &Memory, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let op = "sum over rows";
    let (rows, columns) = rows_of(op, "the input", x)?;
    let x = x.contiguous(m)?;
    if let Some(on) = m.gpu() {
        let mut y = Tensor::empty(m, dtype, &[columns])?;
        let need = cuda::reduce::sum_rows_workspace(rows, columns);
        let mut scratch = workspace(m, x.dtype(), need)?;
        on.run(|gpu| {
            let (y, scratch) = (y.device_mut()?, scratch.device_mut()?);
            Ok(cuda::reduce::sum_rows(
                gpu,
                x.device()?,
                [rows, columns],
                y,
                scratch,
            )?)
        })?;
        return Ok(y);
    }
    let mut y = Tensor::empty(m, accumulator(x.dtype()), &[columns])?;
    with_float!(op, x.dtype(), T => {
        let mut scratch = workspace(m, x.dtype(), kernel::sum_rows_workspace(rows, columns))?;
        if !y.is_planned() {
            kernel::sum_rows(
                x.slice::<T>()?,
                rows,
                columns,
                y.slice_mut::<<T as Float>::Acc>()?,
                false,
                scratch.slice_mut::<<T as Float>::Acc>()?,
            );
        }
    });
    cast(m, &y, dtype)
}
