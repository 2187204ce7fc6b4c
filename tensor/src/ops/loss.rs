//! Losses: sums over rows, so that the caller decides what they are divided by.

use graft_kernels::activation::Activation;
use graft_kernels::{Float, cross_entropy as kernel, reduce as kernel_reduce, softcap};

use super::linalg::{Linear, WeightLayout, linear_as, matmul_as, operands, sum_to_columns};
use super::{accumulator, beside, cast, indices, parameter, same_dtype};
use crate::error::{Error, Result};
use crate::{DType, Memory, Tensor, with_float};

/// The label that is left out of a cross-entropy.
pub const IGNORE: i64 = -100;

/// Classes of one chunk of [`linear_cross_entropy`]: large enough for the matrix product to run at
/// full speed, small enough that the logits of a chunk stay a fraction of the activations.
const CHUNK: usize = 4096;

/// Cross-entropy of `logits [rows, classes]` against `targets i64 [rows]`, summed over the rows that
/// are not [`IGNORE`]. Returns the sum as a scalar and the log-sum-exp of each row.
///
/// # Errors
/// A target outside the classes, shapes that do not fit, smoothing outside `[0, 1)`.
pub fn cross_entropy(
    m: &Memory,
    logits: &Tensor,
    targets: &Tensor,
    smoothing: f64,
) -> Result<(Tensor, Tensor)> {
    let op = "cross-entropy";
    let (rows, classes) = check(op, logits, targets, smoothing)?;
    let targets = indices(op, targets, classes, Some(IGNORE), m)?;
    let logits = logits.contiguous(m)?;
    let acc = accumulator(logits.dtype());
    let mut losses = Tensor::empty(m, acc, &[rows])?;
    let mut lse = Tensor::empty(m, acc, &[rows])?;
    with_float!(op, logits.dtype(), T => {
        if !losses.is_planned() {
            kernel::cross_entropy(
                logits.slice::<T>()?,
                targets.slice::<i64>()?,
                IGNORE,
                smoothing,
                losses.slice_mut::<<T as Float>::Acc>()?,
                lse.slice_mut::<<T as Float>::Acc>()?,
                classes,
            );
        }
    });
    Ok((total(m, &losses, logits.dtype())?, lse))
}

/// The gradient of [`cross_entropy`]'s logits, times the scalar `dy`.
///
/// # Errors
/// As [`cross_entropy`].
pub fn cross_entropy_backward(
    m: &Memory,
    logits: &Tensor,
    targets: &Tensor,
    smoothing: f64,
    lse: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let op = "cross-entropy backward";
    let (_, classes) = check(op, logits, targets, smoothing)?;
    let targets = targets.contiguous(m)?;
    let logits = logits.contiguous(m)?;
    let mut dlogits = Tensor::empty(m, logits.dtype(), logits.shape())?;
    with_float!(op, logits.dtype(), T => {
        if !dlogits.is_planned() {
            kernel::cross_entropy_backward(
                logits.slice::<T>()?,
                targets.slice::<i64>()?,
                IGNORE,
                smoothing,
                lse.slice::<<T as Float>::Acc>()?,
                dy.item()?,
                dlogits.slice_mut::<T>()?,
                classes,
            );
        }
    });
    Ok(dlogits)
}

/// `(rows, classes)` of a cross-entropy.
fn check(
    op: &'static str,
    logits: &Tensor,
    targets: &Tensor,
    smoothing: f64,
) -> Result<(usize, usize)> {
    match logits.shape()[..] {
        [rows, classes] if classes > 0 => {
            check_targets(op, rows, targets, smoothing)?;
            Ok((rows, classes))
        }
        _ => Err(Error::shape(
            op,
            "the logits",
            logits.shape(),
            "[rows, classes]",
        )),
    }
}

fn check_targets(op: &'static str, rows: usize, targets: &Tensor, smoothing: f64) -> Result<()> {
    if targets.shape()[..] != [rows] {
        let expected = format!("[{rows}]");
        return Err(Error::shape(op, "the targets", targets.shape(), expected));
    }
    if !(0.0..1.0).contains(&smoothing) {
        let what = format!("smoothing is {smoothing}, not in [0, 1)");
        return Err(Error::argument(op, what));
    }
    Ok(())
}

/// Cross-entropy of `x·w + bias` against `targets`, summed, without ever holding all logits: the
/// vocabulary is walked in chunks with an online softmax. `weight [classes, in]`. With a `cap`, the
/// logits are `cap * tanh((x·w + bias) / cap)`. Returns the sum and the log-sum-exp of each row.
/// Weight and bias may be f32 beside a bf16 `x`, whose logits are f32 as well.
///
/// # Errors
/// As [`cross_entropy`] and [`linear`](super::linear).
pub fn linear_cross_entropy(
    m: &Memory,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    smoothing: f64,
    cap: Option<f64>,
) -> Result<(Tensor, Tensor)> {
    let op = "linear cross-entropy";
    let (rows, classes) = check_linear(op, x, weight, targets, smoothing, cap)?;
    let checked = indices(op, targets, classes, Some(IGNORE), m)?;
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
    Ok((total(m, &losses, x.dtype())?, lse))
}

/// The gradients of [`linear_cross_entropy`]'s input, weight and bias, those that are asked for,
/// times the scalar `dy`. Logits are recomputed chunk by chunk.
///
/// # Errors
/// As [`linear_cross_entropy`].
pub fn linear_cross_entropy_backward(
    m: &Memory,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    smoothing: f64,
    cap: Option<f64>,
    lse: &Tensor,
    dy: &Tensor,
    needs: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let op = "linear cross-entropy backward";
    let (_, classes) = check_linear(op, x, weight, targets, smoothing, cap)?;
    let targets = targets.contiguous(m)?;
    let mut dx: Option<Tensor> = None;
    let mut dweight = Vec::new();
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
            match &mut dx {
                Some(dx) => super::elementwise::add_assign(dx, &part)?,
                None => dx = Some(part),
            }
        }
        if needs[1] {
            let part = matmul_as(m, multiplied, &dlogits.t()?, x, weight.dtype())?;
            dweight.push(part);
        }
        if needs[2] {
            let dtype = bias.map_or(dlogits.dtype(), Tensor::dtype);
            dbias.push(sum_to_columns(m, &dlogits, dtype)?);
        }
    }
    let join = |parts: Vec<Tensor>| match parts.len() {
        0 => Ok(None),
        1 => Ok(parts.into_iter().next()),
        _ => super::concat(m, &parts.iter().collect::<Vec<_>>(), 0).map(Some),
    };
    let dx = dx.map(|dx| cast(m, &dx, x.dtype())).transpose()?;
    Ok([dx, join(dweight)?, join(dbias)?])
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

fn chunk_logits(
    m: &Memory,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    cap: Option<f64>,
    first: usize,
    count: usize,
) -> Result<Tensor> {
    let p = Linear {
        layout: WeightLayout::OutIn,
        activation: None::<Activation>,
    };
    if let Some(bias) = bias {
        let classes = weight.shape()[0];
        parameter("linear", "the bias", bias, classes, x.dtype(), m)?;
    }
    // The loss is computed from more digits than bf16 has.
    let dtype = match x.dtype() {
        DType::Bf16 if weight.dtype() == DType::F32 => DType::F32,
        dtype => dtype,
    };
    let bias = bias.map(|b| b.narrow(0, first, count)).transpose()?;
    let weight = weight.narrow(0, first, count)?;
    let mut logits = linear_as(m, &p, x, &weight, bias.as_ref(), false, dtype)?.0;
    if let Some(cap) = cap.filter(|_| !logits.is_planned()) {
        with_float!("soft cap", dtype, T => softcap::softcap(cap, logits.slice_mut::<T>()?));
    }
    Ok(logits)
}

/// The sum of a vector of accumulators as a scalar of type `dtype`.
fn total(m: &Memory, losses: &Tensor, dtype: DType) -> Result<Tensor> {
    let sum = if losses.is_planned() {
        0.0
    } else {
        with_float!("sum", losses.dtype(), T => kernel_reduce::sum_all(losses.slice::<T>()?))
    };
    // A short type would lose the loss's digits; its gradient is what flows on.
    Tensor::full(m, accumulator(dtype), &[], sum)
}

/// Binary cross-entropy of logits `x` against targets in `[0, 1]` of the same shape, summed.
///
/// # Errors
/// Shapes or types that differ.
pub fn bce_with_logits(m: &Memory, x: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let op = "binary cross-entropy";
    let x = x.contiguous(m)?;
    let targets = beside(op, "the targets", targets, &x, m)?;
    let mut losses = Tensor::empty(m, accumulator(x.dtype()), x.shape())?;
    with_float!(op, x.dtype(), T => {
        if !losses.is_planned() {
            let losses = losses.slice_mut::<<T as Float>::Acc>()?;
            kernel::bce_with_logits(x.slice::<T>()?, targets.slice::<T>()?, losses);
        }
    });
    total(m, &losses, x.dtype())
}

/// The gradient of [`bce_with_logits`]' input, times the scalar `dy`.
///
/// # Errors
/// Shapes or types that differ.
pub fn bce_with_logits_backward(
    m: &Memory,
    x: &Tensor,
    targets: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let op = "binary cross-entropy backward";
    let x = x.contiguous(m)?;
    let targets = beside(op, "the targets", targets, &x, m)?;
    let mut dx = Tensor::empty(m, x.dtype(), x.shape())?;
    with_float!(op, x.dtype(), T => {
        if !dx.is_planned() {
            let (x, targets) = (x.slice::<T>()?, targets.slice::<T>()?);
            kernel::bce_with_logits_backward(x, targets, dy.item()?, dx.slice_mut::<T>()?);
        }
    });
    Ok(dx)
}

/// The sum of all elements, as a scalar of the accumulating type.
///
/// # Errors
/// A type that is no float.
pub fn sum_all(m: &Memory, x: &Tensor) -> Result<Tensor> {
    same_dtype("sum", "the input", x, x.dtype())?;
    let x = x.contiguous(m)?;
    total(m, &x, x.dtype())
}
