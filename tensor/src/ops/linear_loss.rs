//! The loss of a language model: a product with the vocabulary's matrix, and a cross-entropy of what
//! comes out, in chunks.

use std::ops::Range;

use graft_kernels::cuda::gemm;
use graft_kernels::gemm::{Operands, gemm_batched, gemm_batched_workspace};
use graft_kernels::{Float, cross_entropy as kernel, softcap};
use half::{bf16, f16};

use super::linalg::{
    matmul_as, matrix, operands, products, products_workspace, single, with_product,
};
use super::linear::{Linear, WeightLayout, linear_as, sum_to_columns};
use super::loss::{IGNORE, check_targets, total};
use super::{accumulator, cast, elementwise::add_assign, indices, parameter, workspace};
use crate::error::{Error, Result};
use crate::{Category, DType, Memory, Tensor, with_float};

mod by_rows;

use by_rows::{by_rows, scaled};

/// Classes of one chunk on a CPU: large enough for the matrix product to run at
/// full speed, small enough that the logits of a chunk stay a fraction of the activations.
const CHUNK: usize = 4096;

/// How logits come out of the input.
const HEAD: Linear = Linear {
    layout: WeightLayout::OutIn,
    activation: None,
};

/// Cross-entropy of `x·w + bias` against `targets`, summed, without ever holding all logits.
/// `weight [classes, in]`. With a `cap`, the logits are `cap * tanh((x·w + bias) / cap)`. Weight and
/// bias may be f32 beside a bf16 `x`, whose logits are f32 as well on a CPU.
///
/// Returns the sum and what [`linear_cross_entropy_backward`] reads, if one of `needs` (the
/// gradients of input, weight and bias) says that it is to come. The CPU walks through the vocabulary
/// in chunks with an online softmax, keeps the log-sum-exp of each row (`needs` or not), and computes
/// logits again. A GPU walks through the rows, forms the gradients that are needed from the logits
/// while it has them, for a `dy` of 1, and keeps those.
///
/// # Errors
/// As [`cross_entropy`](super::loss::cross_entropy) and [`linear`](super::linear()).
pub fn linear_cross_entropy(
    m: &Memory,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    smoothing: f64,
    cap: Option<f64>,
    needs: [bool; 3],
) -> Result<(Tensor, Vec<Tensor>)> {
    let op = "linear cross-entropy";
    let (rows, classes) = check_linear(op, x, weight, targets, smoothing, cap)?;
    let checked = indices(op, targets, classes, Some(IGNORE), m)?;
    if m.gpu().is_some() {
        return by_rows(m, x, weight, bias, &checked, smoothing, cap, needs);
    }
    let acc = accumulator(x.dtype());
    let rows_of_state = || Tensor::empty(m, acc, &[rows]);
    // The running maximum, sum, target's logit and sum of logits of each row.
    let (mut max, mut sum) = (rows_of_state()?, rows_of_state()?);
    let (mut target_logit, mut logit_sum) = (rows_of_state()?, rows_of_state()?);
    for first in (0..classes).step_by(CHUNK) {
        let count = CHUNK.min(classes - first);
        let logits = chunk_logits(m, x, weight, bias, cap, first, count)?; // [rows, count]
        with_float!(op, logits.dtype(), T => {
            if !logits.is_planned() {
                kernel::cross_entropy_chunk(
                    logits.slice::<T>()?,
                    first,
                    checked.slice::<i64>()?,
                    max.slice_mut::<<T as Float>::Acc>()?,
                    sum.slice_mut::<<T as Float>::Acc>()?,
                    target_logit.slice_mut::<<T as Float>::Acc>()?,
                    logit_sum.slice_mut::<<T as Float>::Acc>()?,
                    count,
                );
            }
        });
    }
    let (mut losses, mut lse) = (rows_of_state()?, rows_of_state()?);
    with_float!(op, x.dtype(), T => {
        if !losses.is_planned() {
            kernel::cross_entropy_chunk_finish(
                max.slice::<<T as Float>::Acc>()?,
                sum.slice::<<T as Float>::Acc>()?,
                target_logit.slice::<<T as Float>::Acc>()?,
                logit_sum.slice::<<T as Float>::Acc>()?,
                checked.slice::<i64>()?,
                IGNORE,
                smoothing,
                losses.slice_mut::<<T as Float>::Acc>()?,
                lse.slice_mut::<<T as Float>::Acc>()?,
                classes,
            );
        }
    });
    Ok((total(m, &losses, x.dtype())?, vec![lse]))
}

/// The gradients of [`linear_cross_entropy`]'s input, weight and bias, those that are asked for,
/// times the scalar `dy`; from what it kept for the same `needs`.
///
/// # Errors
/// As [`linear_cross_entropy`].
///
/// # Panics
/// If something else is kept.
pub fn linear_cross_entropy_backward(
    m: &Memory,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    smoothing: f64,
    cap: Option<f64>,
    kept: Vec<Tensor>,
    dy: &Tensor,
    needs: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let op = "linear cross-entropy backward";
    let (_, classes) = check_linear(op, x, weight, targets, smoothing, cap)?;
    if m.gpu().is_some() {
        let dtypes = [Some(x), Some(weight), bias].map(|t| t.map_or(DType::F32, Tensor::dtype));
        return scaled(m, kept, dy, needs, dtypes);
    }
    let lse = &kept[0];
    let targets = targets.contiguous(m)?;
    let mut dx: Option<Tensor> = None;
    let lasting = of_gradient(m, weight);
    let mut dweight = needs[1]
        .then(|| Tensor::empty(&lasting, weight.dtype(), weight.shape()))
        .transpose()?;
    let mut dbias = Vec::new();
    for first in (0..classes).step_by(CHUNK) {
        let count = CHUNK.min(classes - first);
        let mut logits = chunk_logits(m, x, weight, bias, cap, first, count)?;
        let copy = |cap| Ok::<_, Error>((cap, logits.copy(m)?));
        let capped = cap.map(copy).transpose()?;
        with_float!(op, logits.dtype(), T => {
            if !logits.is_planned() {
                kernel::cross_entropy_chunk_backward(
                    logits.slice_mut::<T>()?,
                    first,
                    targets.slice::<i64>()?,
                    IGNORE,
                    smoothing,
                    lse.slice::<<T as Float>::Acc>()?,
                    dy.item()?,
                    classes,
                    count,
                );
                if let Some((cap, capped)) = &capped {
                    let dlogits = logits.slice_mut::<T>()?;
                    softcap::softcap_backward(*cap, capped.slice::<T>()?, dlogits);
                }
            }
        });
        drop(capped);
        let dlogits = logits; // [rows, count]
        let multiplied = operands(x.dtype());
        if needs[0] {
            let weight = weight.narrow(0, first, count)?;
            let part = matmul_as(m, multiplied, &dlogits, &weight, dlogits.dtype())?;
            add(&mut dx, part)?;
        }
        if let Some(dweight) = &mut dweight {
            let rows = first..first + count;
            product_into(m, multiplied, &dlogits.t()?, x, dweight, rows)?;
        }
        if needs[2] {
            let dtype = bias.map_or(dlogits.dtype(), Tensor::dtype);
            dbias.push(sum_to_columns(m, &dlogits, dtype)?);
        }
    }
    let dbias = match needs[2] && classes > 0 {
        true => Some(super::concat(m, &dbias.iter().collect::<Vec<_>>(), 0)?),
        false => None,
    };
    let dx = dx.map(|dx| cast(m, &dx, x.dtype())).transpose()?;
    Ok([dx, dweight, dbias])
}

fn check_linear(
    op: &'static str,
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    smoothing: f64,
    cap: Option<f64>,
) -> Result<(usize, usize)> {
    if let Some(cap) = cap.filter(|&cap| !(cap > 0.0 && cap.is_finite())) {
        return Err(Error::argument(
            op,
            format!("the cap of the logits is {cap}, not above 0"),
        ));
    }
    let [rows, inputs] = x.shape()[..] else {
        return Err(Error::shape(op, "the input", x.shape(), "[rows, in]"));
    };
    match weight.shape()[..] {
        [classes, columns] if columns == inputs && classes > 0 => {
            check_targets(op, rows, targets, smoothing)?;
            Ok((rows, classes))
        }
        _ => {
            let expected = format!("[classes, {inputs}]");
            Err(Error::shape(op, "the weight", weight.shape(), expected))
        }
    }
}

/// The loss is computed from more digits than bf16 has, if the weight has them.
fn logits_dtype(x: &Tensor, weight: &Tensor) -> DType {
    match x.dtype() {
        DType::Bf16 if weight.dtype() == DType::F32 => DType::F32,
        dtype => dtype,
    }
}

fn chunk_logits(
    m: &Memory,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    cap: Option<f64>,
    first: usize,
    count: usize,
) -> Result<Tensor> {
    if let Some(bias) = bias {
        let classes = weight.shape()[0];
        parameter("linear", "the bias", bias, classes, x.dtype(), m)?;
    }
    let dtype = logits_dtype(x, weight);
    let bias = bias.map(|b| b.narrow(0, first, count)).transpose()?;
    let weight = weight.narrow(0, first, count)?;
    let mut logits = linear_as(m, &HEAD, x, &weight, bias.as_ref(), false, dtype)?.0;
    if let Some(cap) = cap.filter(|_| !logits.is_planned()) {
        with_float!("soft cap", dtype, T => softcap::softcap(cap, logits.slice_mut::<T>()?));
    }
    Ok(logits)
}

/// Rows `range` of `c` = `a·b`.
fn product_into(
    m: &Memory,
    multiplied: Operands,
    a: &Tensor,
    b: &Tensor,
    c: &mut Tensor,
    range: Range<usize>,
) -> Result<()> {
    let (rows, columns, inner) = (range.len(), c.shape()[1], a.shape()[1]);
    let range = range.start * columns..range.end * columns;
    let batch = single(range.len());
    let Some(on) = m.gpu() else {
        with_product!("a product", (a.dtype(), b.dtype(), c.dtype()), (A, B, C) => {
            let need = gemm_batched_workspace::<C>(multiplied, 1, rows, columns, inner);
            let mut scratch = workspace(m, c.dtype(), need)?;
            if !c.is_planned() {
                gemm_batched(
                    multiplied,
                    batch,
                    matrix::<A>(a, rows, inner)?,
                    matrix::<B>(b, inner, columns)?,
                    &mut c.slice_mut::<C>()?[range],
                    false,
                    scratch.slice_mut::<<C as Float>::Acc>()?,
                );
            }
        });
        return Ok(());
    };
    let products = products(multiplied, batch, a, b, c.dtype())?;
    let mut scratch = products_workspace(m, &products, None)?;
    on.run(|gpu| {
        let (a, b) = (a.device_strided()?, b.device_strided()?);
        let (c, scratch) = (c.device_mut()?.part(range), scratch.device_mut()?);
        let none = gemm::Epilogue::default();
        Ok(gemm::gemm(gpu, &products, a, b, c, false, none, scratch)?)
    })
}

/// Where the gradient of the vocabulary's matrix belongs: that of a parameter is the step's largest, and outlasts the
/// backward pass.
fn of_gradient(m: &Memory, weight: &Tensor) -> Memory {
    match weight.memory().category() {
        Category::Weights => m.with(Category::Gradients),
        _ => m.clone(),
    }
}

/// Adds to a sum that may not have begun.
fn add(sum: &mut Option<Tensor>, part: Tensor) -> Result<()> {
    match sum {
        Some(sum) => add_assign(sum, &part),
        None => {
            *sum = Some(part);
            Ok(())
        }
    }
}
