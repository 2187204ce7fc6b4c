//! A linear layer with a low-rank adapter beside it, as one operation: `activation(x·w + bias + scale *
//! dropout(x)·aᵀ·bᵀ)`, forward and backward.
//!
//! E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. The adapter stays in the space of
//! activations: `b·a`, which is as large as the weight, is never formed. On a CPU the short product is written first and
//! the large one is added to it where its blocks are still in the cache; on a GPU the adapter's factors are a little more
//! of the depth of the large product, where the kernels can read them so. The adapter then costs no pass of its own over
//! the output, and in short types it is the small summand that is rounded once more, if anything is.

use super::elementwise::add_assign;
use super::linalg::{matmul_as, narrow_product, operands};
use super::product::{Last, product, summand};
use super::quantised::weight_dtype;
use super::random::Key;
use super::{Linear, affine, dropout, dropout_backward, parameter, parameter_dtype, rows_of};
use crate::error::{Error, Result};
use crate::{Memory, Shape, Tensor};

/// What [`lora`] computes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Lora {
    /// Layout of the weight, and what is applied to the sum
    pub linear: Linear,
    /// Factor of the adapter's product
    pub scale: f64,
    /// Probability that the adapter does not see an element of the input
    pub dropout: f64,
}

/// `activation(x·w + bias + scale * dropout(x)·aᵀ·bᵀ)`: `x [.., in]`, `a [rank, in]` and `b [out, rank]` give `[..,
/// out]`. With `save`, also the pre-activation, if there is an activation, and the adapter's inner values, which
/// [`lora_low`] gives. `key` keys the dropout's mask.
///
/// # Errors
/// As [`linear`](super::linear()); an adapter whose sizes do not fit the weight's; a dropout outside `[0, 1)`.
pub fn lora(
    m: &Memory,
    p: &Lora,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    [a, b]: [&Tensor; 2],
    key: Key,
    save: bool,
) -> Result<(Tensor, Vec<Tensor>)> {
    let op = "lora";
    let w = p.linear.input_by_output(weight)?;
    let (rows, inputs, outputs) = check(op, x, &w, [a, b])?;
    let bias = bias
        .map(|bias| parameter(op, "the bias", bias, outputs, x.dtype(), m))
        .transpose()?;
    let x = x.contiguous(m)?;
    let low = {
        let seen = lora_input(m, p, &x, key)?;
        lora_low(m, p, &seen, a)? // [rows, rank]
    };
    let shape = x.shape().replaced(x.shape().rank() - 1, Some(outputs));
    let mut y = Tensor::empty(m, x.dtype(), &shape)?;
    let mut pre = (save && p.linear.activation.is_some())
        .then(|| Tensor::empty(m, x.dtype(), &shape))
        .transpose()?;
    let flat = x.reshape(&[rows, inputs])?;
    let last = Last {
        bias: bias.as_deref(),
        activation: p.linear.activation,
        pre: pre.as_mut(),
        beside: Some([&low, &b.t()?]),
        ..Last::default()
    };
    product(m, &flat, &w, &mut y, false, last)?;
    let low = save.then_some(low);
    Ok((y, pre.into_iter().chain(low).collect()))
}

/// What the adapter sees of the input: `x` after dropout, or `x` itself if there is none.
///
/// # Errors
/// A dropout outside `[0, 1)`.
pub fn lora_input(m: &Memory, p: &Lora, x: &Tensor, key: Key) -> Result<Tensor> {
    if p.dropout == 0.0 {
        return Ok(x.contiguous(m)?.into_owned());
    }
    dropout(m, x, p.dropout, key)
}

/// `scale * seen·aᵀ`: what [`lora_input`] gave, `[.., in]`, and `a [rank, in]` give `[rows, rank]`.
///
/// # Errors
/// Sizes or types that do not fit.
pub fn lora_low(m: &Memory, p: &Lora, seen: &Tensor, a: &Tensor) -> Result<Tensor> {
    scaled_product(m, p, "the adapter's input", seen, &a.t()?)
}

/// The gradient of the adapter's inner values, `scale * dy·b`: `dy [.., out]`, the gradient after the activation's
/// backward, and `b [out, rank]` give `[rows, rank]`.
///
/// # Errors
/// Sizes or types that do not fit.
pub fn lora_low_gradient(m: &Memory, p: &Lora, b: &Tensor, dy: &Tensor) -> Result<Tensor> {
    scaled_product(m, p, "the gradient", dy, b)
}

fn scaled_product(
    m: &Memory,
    p: &Lora,
    what: &'static str,
    x: &Tensor,
    by: &Tensor,
) -> Result<Tensor> {
    let op = "lora";
    parameter_dtype(op, "the adapter", by, x.dtype())?;
    let (rows, columns) = rows_of(op, what, x)?;
    let flat = x.contiguous(m)?.reshape(&[rows, columns])?;
    let low = narrow_product(m, operands(x.dtype()), &flat, by, x.dtype())?;
    if p.scale == 1.0 {
        return Ok(low);
    }
    affine(m, &low, p.scale, 0.0)
}

/// The gradient of [`lora`]'s input, of `shape`: from `low`, which [`lora_low_gradient`] gave, and `dy [.., out]`, the
/// gradient after the activation's backward. It is added to `sum`, if there is one, in whose storage the result lies if
/// nothing else holds that.
///
/// # Errors
/// Sizes or types that do not fit.
pub fn lora_input_gradient(
    m: &Memory,
    p: &Lora,
    [weight, a]: [&Tensor; 2],
    low: &Tensor,
    dy: &Tensor,
    key: Key,
    shape: &Shape,
    sum: Option<Tensor>,
) -> Result<Tensor> {
    let op = "lora backward";
    weight_dtype(op, weight, dy.dtype())?;
    let (rows, outputs) = rows_of(op, "the gradient", dy)?;
    let sum = sum.map(|sum| summand(m, sum, dy, shape)).transpose()?;
    let w = p.linear.input_by_output(weight)?;
    let flat = dy.contiguous(m)?.reshape(&[rows, outputs])?;
    if p.dropout == 0.0 {
        let (mut dx, accumulate) = match sum {
            Some(sum) => (sum, true),
            None => (Tensor::empty(m, dy.dtype(), shape)?, false),
        };
        let last = Last {
            beside: Some([low, a]),
            ..Last::default()
        };
        product(m, &flat, &w.t()?, &mut dx, accumulate, last)?;
        return Ok(dx);
    }
    let dx = matmul_as(m, operands(dy.dtype()), low, a, dy.dtype())?; // [rows, in]
    let dx = dropout_backward(m, dx, p.dropout, key)?.reshape(shape)?;
    let mut dx = match sum {
        Some(mut sum) => {
            add_assign(&mut sum, &dx)?;
            sum
        }
        None => dx,
    };
    product(m, &flat, &w.t()?, &mut dx, true, Last::default())?;
    Ok(dx)
}

/// `(rows, in, out)`, after checking that input, weight `[in, out]` and adapter fit each other.
fn check(
    op: &'static str,
    x: &Tensor,
    w: &Tensor,
    [a, b]: [&Tensor; 2],
) -> Result<(usize, usize, usize)> {
    let (rows, columns) = rows_of(op, "the input", x)?;
    let [inputs, outputs] = w.shape()[..] else {
        return Err(Error::shape(op, "the weight", w.shape(), "a matrix"));
    };
    if columns != inputs {
        let expected = format!("[.., {inputs}]");
        return Err(Error::shape(op, "the input", x.shape(), expected));
    }
    let rank = match a.shape()[..] {
        [rank, columns] if columns == inputs => rank,
        _ => {
            let expected = format!("[rank, {inputs}]");
            return Err(Error::shape(op, "the adapter's a", a.shape(), expected));
        }
    };
    if b.shape()[..] != [outputs, rank] {
        let expected = format!("[{outputs}, {rank}]");
        return Err(Error::shape(op, "the adapter's b", b.shape(), expected));
    }
    weight_dtype(op, w, x.dtype())?;
    for (what, x2) in [("the adapter's a", a), ("the adapter's b", b)] {
        parameter_dtype(op, what, x2, x.dtype())?;
    }
    Ok((rows, inputs, outputs))
}
