//! Normalisations over the last dimension: layer norm, RMS norm, softmax, unit length.

mod held;
mod layer;

use graft_kernels::{Float, cuda, norm as kernel, softmax as kernel_softmax};

use super::{accumulator, beside, cast, parameter, rows_of, workspace};
use crate::error::Result;
use crate::{Memory, Tensor, with_float};
pub use layer::{
    Dropout, LayerNormGradients, Wanted, layer_norm, layer_norm_backward,
    layer_norm_backward_input, layer_norm_backward_params, layer_norm_bias_gradient,
    layer_norm_dropped,
};

/// A normalised tensor and what its backward pass needs.
#[derive(Debug)]
pub struct Normed {
    /// The result, shaped as the input
    pub y: Tensor,
    /// The tensor that was normalised, if it is not the input: `x + residual`, or `x` after dropout
    pub sum: Option<Tensor>,
    /// Mean of each row (layer norm only)
    pub mean: Option<Tensor>,
    /// Reciprocal standard deviation, root mean square or length of each row
    pub scale: Tensor,
}

/// RMS normalisation (Zhang and Sennrich, 2019) of `x + residual`: `s / sqrt(mean(s²) + eps) *
/// (weight + offset)`; Gemma stores weights with an offset of 1. `x + residual` is returned only with
/// `save`.
///
/// # Errors
/// A residual or weight whose shape or type does not fit `x [.., columns]`.
pub fn rms_norm(
    m: &Memory,
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    offset: f64,
    eps: f64,
    save: bool,
) -> Result<Normed> {
    let op = "rms norm";
    let (rows, columns) = rows_of(op, "the input", x)?;
    let x = x.contiguous(m)?;
    let residual = residual
        .map(|t| beside(op, "the residual", t, &x, m))
        .transpose()?;
    let weight = parameter(op, "the weight", weight, columns, x.dtype(), m)?;
    let mut y = Tensor::empty(m, x.dtype(), x.shape())?;
    let mut sum = residual
        .as_ref()
        .filter(|_| save)
        .map(|_| Tensor::empty(m, x.dtype(), x.shape()))
        .transpose()?;
    let mut scale = Tensor::empty(m, accumulator(x.dtype()), &[rows])?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            Ok(cuda::norm::rms_norm(
                gpu,
                x.device()?,
                residual.as_ref().map(|t| t.device()).transpose()?,
                weight.device()?,
                offset,
                eps,
                y.device_mut()?,
                sum.as_mut().map(|t| t.device_mut()).transpose()?,
                scale.device_mut()?,
                columns,
            )?)
        })?;
        let mean = None;
        return Ok(Normed {
            y,
            sum,
            mean,
            scale,
        });
    }
    with_float!(op, x.dtype(), T => {
        if !y.is_planned() {
            kernel::rms_norm(
                x.slice::<T>()?,
                residual.as_ref().map(|t| t.slice::<T>()).transpose()?,
                weight.slice::<<T as Float>::Acc>()?,
                offset,
                eps,
                y.slice_mut::<T>()?,
                sum.as_mut().map(|t| t.slice_mut::<T>()).transpose()?,
                scale.slice_mut::<<T as Float>::Acc>()?,
                columns,
            );
        }
    });
    Ok(Normed {
        y,
        sum,
        mean: None,
        scale,
    })
}

/// The gradients of what [`rms_norm`] normalised and of its weight, those that are asked for, each
/// in the type of what it is the gradient of.
///
/// # Errors
/// Shapes or types that differ.
pub fn rms_norm_backward(
    m: &Memory,
    s: &Tensor,
    weight: &Tensor,
    offset: f64,
    scale: &Tensor,
    dy: &Tensor,
    needs: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let op = "rms norm backward";
    let (rows, columns) = rows_of(op, "the input", s)?;
    let s = s.contiguous(m)?;
    let dy = beside(op, "the gradient", dy, &s, m)?;
    let dtype = weight.dtype();
    let weight = parameter(op, "the weight", weight, columns, s.dtype(), m)?;
    let mut dx = needs[0]
        .then(|| Tensor::empty(m, s.dtype(), s.shape()))
        .transpose()?;
    let mut dweight = needs[1]
        .then(|| Tensor::empty(m, accumulator(s.dtype()), &[columns]))
        .transpose()?;
    if let Some(on) = m.gpu() {
        let needed = cuda::norm::norm_backward_workspace(rows, columns, s.dtype().into());
        let mut scratch = workspace(m, s.dtype(), needed)?;
        on.run(|gpu| {
            let (s, scale, dy) = (s.device()?, scale.device()?, dy.device()?);
            if let Some(dx) = &mut dx {
                let (weight, dx) = (weight.device()?, dx.device_mut()?);
                cuda::norm::rms_norm_backward_input(
                    gpu, s, weight, offset, scale, dy, dx, columns,
                )?;
            }
            if let Some(dweight) = &mut dweight {
                let (dweight, scratch) = (dweight.device_mut()?, scratch.device_mut()?);
                cuda::norm::rms_norm_backward_params(gpu, s, scale, dy, dweight, columns, scratch)?;
            }
            Ok(())
        })?;
        let dweight = dweight.map(|x| cast(m, &x, dtype)).transpose()?;
        return Ok([dx, dweight]);
    }
    with_float!(op, s.dtype(), T => {
        let needed = kernel::layer_norm_backward_workspace(rows, columns);
        let mut scratch = workspace(m, s.dtype(), needed)?;
        if !m.is_planned() {
            let scale = scale.slice::<<T as Float>::Acc>()?;
            let (s, dy) = (s.slice::<T>()?, dy.slice::<T>()?);
            if let Some(dx) = &mut dx {
                let dx = dx.slice_mut::<T>()?;
                kernel::rms_norm_backward_input(
                    s, weight.slice::<<T as Float>::Acc>()?, offset, scale, dy, dx, columns,
                );
            }
            if let Some(dweight) = &mut dweight {
                let dweight = dweight.slice_mut::<<T as Float>::Acc>()?;
                let scratch = scratch.slice_mut::<<T as Float>::Acc>()?;
                kernel::rms_norm_backward_params(s, scale, dy, dweight, columns, scratch);
            }
        }
    });
    let dweight = dweight.map(|x| cast(m, &x, dtype)).transpose()?;
    Ok([dx, dweight])
}

/// Each row divided by its Euclidean length, or by `eps` if that is larger; PyTorch's
/// `normalize`.
///
/// # Errors
/// A tensor without dimensions.
pub fn l2_normalize(m: &Memory, x: &Tensor, eps: f64) -> Result<Normed> {
    let op = "l2 normalize";
    let (rows, columns) = rows_of(op, "the input", x)?;
    let x = x.contiguous(m)?;
    let mut y = Tensor::empty(m, x.dtype(), x.shape())?;
    let mut scale = Tensor::empty(m, accumulator(x.dtype()), &[rows])?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (x, y, inverse) = (x.device()?, y.device_mut()?, scale.device_mut()?);
            Ok(cuda::norm::l2_normalize(gpu, x, eps, y, inverse, columns)?)
        })?;
        return Ok(Normed {
            y,
            sum: None,
            mean: None,
            scale,
        });
    }
    with_float!(op, x.dtype(), T => {
        if !y.is_planned() {
            let inverse = scale.slice_mut::<<T as Float>::Acc>()?;
            kernel::l2_normalize(x.slice::<T>()?, eps, y.slice_mut::<T>()?, inverse, columns);
        }
    });
    Ok(Normed {
        y,
        sum: None,
        mean: None,
        scale,
    })
}

/// The gradient of [`l2_normalize`]'s input, from its output.
///
/// # Errors
/// Shapes or types that differ.
pub fn l2_normalize_backward(
    m: &Memory,
    y: &Tensor,
    scale: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let op = "l2 normalize backward";
    let (_, columns) = rows_of(op, "the output", y)?;
    let y = y.contiguous(m)?;
    let dy = beside(op, "the gradient", dy, &y, m)?;
    let mut dx = Tensor::empty(m, y.dtype(), y.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (y, scale, dy, dx) = (y.device()?, scale.device()?, dy.device()?, dx.device_mut()?);
            Ok(cuda::norm::l2_normalize_backward(
                gpu, y, scale, dy, dx, columns,
            )?)
        })?;
        return Ok(dx);
    }
    with_float!(op, y.dtype(), T => {
        if !dx.is_planned() {
            kernel::l2_normalize_backward(
                y.slice::<T>()?,
                scale.slice::<<T as Float>::Acc>()?,
                dy.slice::<T>()?,
                dx.slice_mut::<T>()?,
                columns,
            );
        }
    });
    Ok(dx)
}

/// Softmax of each row, or its logarithm.
///
/// # Errors
/// A tensor without dimensions.
pub fn softmax(m: &Memory, x: &Tensor, log: bool) -> Result<Tensor> {
    let op = "softmax";
    let (_, columns) = rows_of(op, "the input", x)?;
    let x = x.contiguous(m)?;
    let mut y = Tensor::empty(m, x.dtype(), x.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (x, y) = (x.device()?, y.device_mut()?);
            Ok(cuda::softmax::softmax(gpu, x, y, columns, log)?)
        })?;
        return Ok(y);
    }
    with_float!(op, x.dtype(), T => {
        if !y.is_planned() {
            let (x, y) = (x.slice::<T>()?, y.slice_mut::<T>()?);
            if log {
                kernel_softmax::log_softmax(x, y, columns);
            } else {
                kernel_softmax::softmax(x, y, columns);
            }
        }
    });
    Ok(y)
}

/// The gradient of [`softmax`]'s input, from its output.
///
/// # Errors
/// Shapes or types that differ.
pub fn softmax_backward(m: &Memory, y: &Tensor, dy: &Tensor, log: bool) -> Result<Tensor> {
    let op = "softmax backward";
    let (_, columns) = rows_of(op, "the output", y)?;
    let y = y.contiguous(m)?;
    let dy = beside(op, "the gradient", dy, &y, m)?;
    let mut dx = Tensor::empty(m, y.dtype(), y.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (y, dy, dx) = (y.device()?, dy.device()?, dx.device_mut()?);
            Ok(cuda::softmax::softmax_backward(
                gpu, y, dy, dx, columns, log,
            )?)
        })?;
        return Ok(dx);
    }
    with_float!(op, y.dtype(), T => {
        if !dx.is_planned() {
            let (y, dy, dx) = (y.slice::<T>()?, dy.slice::<T>()?, dx.slice_mut::<T>()?);
            if log {
                kernel_softmax::log_softmax_backward(y, dy, dx, columns);
            } else {
                kernel_softmax::softmax_backward(y, dy, dx, columns);
            }
        }
    });
    Ok(dx)
}
