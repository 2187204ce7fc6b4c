//! Losses: sums over rows, so that the caller decides what they are divided by.

use graft_kernels::cuda;
use graft_kernels::{Float, cross_entropy as kernel, reduce as kernel_reduce};

pub use super::linear_loss::{linear_cross_entropy, linear_cross_entropy_backward};
use super::{accumulator, beside, indices, same_dtype, workspace};
use crate::error::{Error, Result};
use crate::{DType, Memory, Tensor, with_float};

/// The label that is left out of a cross-entropy.
pub const IGNORE: i64 = -100;

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
    if let Some(on) = m.gpu() {
        let p = of_gpu(classes, smoothing, None);
        on.run(|gpu| {
            let (x, targets) = (logits.device()?, targets.device()?);
            let (losses, lse) = (losses.device_mut()?, lse.device_mut()?);
            Ok(cuda::cross_entropy::cross_entropy(
                gpu, &p, x, targets, losses, lse,
            )?)
        })?;
        return Ok((total(m, &losses, logits.dtype())?, lse));
    }
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
    if let Some(on) = m.gpu() {
        let p = of_gpu(classes, smoothing, None);
        on.run(|gpu| {
            let (x, targets, lse) = (logits.device()?, targets.device()?, lse.device()?);
            let (dy, dx) = (dy.device()?, dlogits.device_mut()?);
            Ok(cuda::cross_entropy::cross_entropy_backward(
                gpu, &p, x, targets, lse, dy, dx,
            )?)
        })?;
        return Ok(dlogits);
    }
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

/// The numbers that a GPU's kernels are told.
pub(super) fn of_gpu(
    classes: usize,
    smoothing: f64,
    cap: Option<f64>,
) -> cuda::cross_entropy::Loss {
    cuda::cross_entropy::Loss {
        classes,
        step: classes,
        ignore: IGNORE,
        smoothing,
        cap,
    }
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

pub(super) fn check_targets(
    op: &'static str,
    rows: usize,
    targets: &Tensor,
    smoothing: f64,
) -> Result<()> {
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

/// The sum of a vector of accumulators as a scalar of type `dtype`.
pub(super) fn total(m: &Memory, losses: &Tensor, dtype: DType) -> Result<Tensor> {
    if let Some(on) = m.gpu() {
        let mut sum = Tensor::empty(m, accumulator(dtype), &[])?;
        let bytes = cuda::reduce::sum_all_workspace(losses.count());
        let mut scratch = workspace(m, DType::F32, bytes / 4)?;
        on.run(|gpu| {
            let (sum, scratch) = (sum.device_mut()?, scratch.device_mut()?);
            Ok(cuda::reduce::sum_all(gpu, losses.device()?, sum, scratch)?)
        })?;
        return Ok(sum);
    }
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
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (x, targets, losses) = (x.device()?, targets.device()?, losses.device_mut()?);
            Ok(cuda::cross_entropy::bce_with_logits(
                gpu, x, targets, losses,
            )?)
        })?;
        return total(m, &losses, x.dtype());
    }
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
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (x, targets, dy) = (x.device()?, targets.device()?, dy.device()?);
            let dx = dx.device_mut()?;
            Ok(cuda::cross_entropy::bce_with_logits_backward(
                gpu, x, targets, dy, dx,
            )?)
        })?;
        return Ok(dx);
    }
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
