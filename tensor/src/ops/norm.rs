//! Normalisations over the last dimension: layer norm, RMS norm, softmax, unit length.

use graft_kernels::{Float, cuda, norm as kernel, softmax as kernel_softmax};

use super::{accumulator, beside, cast, parameter, rows_of, workspace};
use crate::error::Result;
use crate::{DType, Memory, Tensor, with_float};

/// A normalised tensor and what its backward pass needs.
#[derive(Debug)]
pub struct Normed {
    /// The result, shaped as the input
    pub y: Tensor,
    /// `x + residual`, if there is a residual; the tensor that was normalised
    pub sum: Option<Tensor>,
    /// Mean of each row (layer norm only)
    pub mean: Option<Tensor>,
    /// Reciprocal standard deviation, root mean square or length of each row
    pub scale: Tensor,
}

/// Layer normalisation (Ba et al., 2016) of `x + residual`: `(s - mean) / sqrt(var + eps) * weight +
/// bias`. `x + residual` is returned only with `save`: the backward pass needs it.
///
/// # Errors
/// A residual, weight or bias whose shape or type does not fit `x [.., columns]`.
pub fn layer_norm(
    m: &Memory,
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    save: bool,
) -> Result<Normed> {
    let op = "layer norm";
    let (rows, columns) = rows_of(op, "the input", x)?;
    let x = x.contiguous(m)?;
    let residual = residual
        .map(|t| beside(op, "the residual", t, &x, m))
        .transpose()?;
    let weight = weight
        .map(|t| parameter(op, "the weight", t, columns, x.dtype(), m))
        .transpose()?;
    let bias = bias
        .map(|t| parameter(op, "the bias", t, columns, x.dtype(), m))
        .transpose()?;
    let mut y = Tensor::empty(m, x.dtype(), x.shape())?;
    let mut sum = residual
        .as_ref()
        .filter(|_| save)
        .map(|_| Tensor::empty(m, x.dtype(), x.shape()))
        .transpose()?;
    let mut mean = Tensor::empty(m, accumulator(x.dtype()), &[rows])?;
    let mut scale = Tensor::empty(m, accumulator(x.dtype()), &[rows])?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            Ok(cuda::norm::layer_norm(
                gpu,
                x.device()?,
                residual.as_ref().map(|t| t.device()).transpose()?,
                weight.as_ref().map(|t| t.device()).transpose()?,
                bias.as_ref().map(|t| t.device()).transpose()?,
                eps,
                y.device_mut()?,
                sum.as_mut().map(|t| t.device_mut()).transpose()?,
                mean.device_mut()?,
                scale.device_mut()?,
                columns,
            )?)
        })?;
        let mean = Some(mean);
        return Ok(Normed {
            y,
            sum,
            mean,
            scale,
        });
    }
    with_float!(op, x.dtype(), T => {
        if !y.is_planned() {
            kernel::layer_norm(
                x.slice::<T>()?,
                residual.as_ref().map(|t| t.slice::<T>()).transpose()?,
                weight.as_ref().map(|t| t.slice::<<T as Float>::Acc>()).transpose()?,
                bias.as_ref().map(|t| t.slice::<<T as Float>::Acc>()).transpose()?,
                eps,
                y.slice_mut::<T>()?,
                sum.as_mut().map(|t| t.slice_mut::<T>()).transpose()?,
                mean.slice_mut::<<T as Float>::Acc>()?,
                scale.slice_mut::<<T as Float>::Acc>()?,
                columns,
            );
        }
    });
    Ok(Normed {
        y,
        sum,
        mean: Some(mean),
        scale,
    })
}

/// The gradient of what [`layer_norm`] normalised (`x`, and the residual alike).
///
/// # Errors
/// Shapes or types that differ.
pub fn layer_norm_backward_input(
    m: &Memory,
    s: &Tensor,
    weight: Option<&Tensor>,
    mean: &Tensor,
    scale: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let op = "layer norm backward";
    let (_, columns) = rows_of(op, "the input", s)?;
    let s = s.contiguous(m)?;
    let dy = beside(op, "the gradient", dy, &s, m)?;
    let weight = weight
        .map(|t| parameter(op, "the weight", t, columns, s.dtype(), m))
        .transpose()?;
    let mut dx = Tensor::empty(m, s.dtype(), s.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            Ok(cuda::norm::layer_norm_backward_input(
                gpu,
                s.device()?,
                weight.as_ref().map(|t| t.device()).transpose()?,
                mean.device()?,
                scale.device()?,
                dy.device()?,
                dx.device_mut()?,
                columns,
            )?)
        })?;
        return Ok(dx);
    }
    with_float!(op, s.dtype(), T => {
        if !dx.is_planned() {
            kernel::layer_norm_backward_input(
                s.slice::<T>()?,
                weight.as_ref().map(|t| t.slice::<<T as Float>::Acc>()).transpose()?,
                mean.slice::<<T as Float>::Acc>()?,
                scale.slice::<<T as Float>::Acc>()?,
                dy.slice::<T>()?,
                dx.slice_mut::<T>()?,
                columns,
            );
        }
    });
    Ok(dx)
}

/// The gradients of [`layer_norm`]'s weight and bias in `dtype`, those that are asked for.
///
/// # Errors
/// Shapes or types that differ.
pub fn layer_norm_backward_params(
    m: &Memory,
    s: &Tensor,
    mean: &Tensor,
    scale: &Tensor,
    dy: &Tensor,
    needs: [bool; 2],
    dtype: DType,
) -> Result<[Option<Tensor>; 2]> {
    let op = "layer norm backward";
    let (rows, columns) = rows_of(op, "the input", s)?;
    let s = s.contiguous(m)?;
    let dy = beside(op, "the gradient", dy, &s, m)?;
    let output = |wanted: bool| {
        wanted
            .then(|| Tensor::empty(m, accumulator(s.dtype()), &[columns]))
            .transpose()
    };
    let (mut dweight, mut dbias) = (output(needs[0])?, output(needs[1])?);
    let stored = |x: Option<Tensor>| x.map(|x| cast(m, &x, dtype)).transpose();
    if let Some(on) = m.gpu() {
        let needed = cuda::norm::norm_backward_workspace(rows, columns, s.dtype().into());
        let mut scratch = workspace(m, s.dtype(), needed)?;
        on.run(|gpu| {
            Ok(cuda::norm::layer_norm_backward_params(
                gpu,
                s.device()?,
                mean.device()?,
                scale.device()?,
                dy.device()?,
                dweight.as_mut().map(|t| t.device_mut()).transpose()?,
                dbias.as_mut().map(|t| t.device_mut()).transpose()?,
                columns,
                scratch.device_mut()?,
            )?)
        })?;
        return Ok([stored(dweight)?, stored(dbias)?]);
    }
    with_float!(op, s.dtype(), T => {
        let needed = kernel::layer_norm_backward_workspace(rows, columns);
        let mut scratch = workspace(m, s.dtype(), needed)?;
        if !m.is_planned() {
            kernel::layer_norm_backward_params(
                s.slice::<T>()?,
                mean.slice::<<T as Float>::Acc>()?,
                scale.slice::<<T as Float>::Acc>()?,
                dy.slice::<T>()?,
                dweight
                    .as_mut()
                    .map(|t| t.slice_mut::<<T as Float>::Acc>())
                    .transpose()?,
                dbias
                    .as_mut()
                    .map(|t| t.slice_mut::<<T as Float>::Acc>())
                    .transpose()?,
                columns,
                scratch.slice_mut::<<T as Float>::Acc>()?,
            );
        }
    });
    Ok([stored(dweight)?, stored(dbias)?])
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
