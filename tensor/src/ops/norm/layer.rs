//! Layer norm, with the dropout and the residual sum that come before it.

pub use graft_kernels::dropout::Dropout;
use graft_kernels::{Float, cuda, norm as kernel};

use super::{Normed, held};
use crate::error::{Error, Result};
use crate::ops::elementwise::add_assign;
use crate::ops::{self, accumulator, beside, cast, parameter, rows_of, workspace};
use crate::{DType, Memory, Tensor, with_float};

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
    layer_norm_dropped(m, x, None, residual, weight, bias, eps, save)
}

/// [`layer_norm`] of `dropout(x) + residual`, in one pass on the CPU: the bits of one after the other.
///
/// # Errors
/// As [`layer_norm`]; a probability outside `[0, 1)`.
pub fn layer_norm_dropped(
    m: &Memory,
    x: &Tensor,
    dropout: Option<Dropout>,
    residual: Option<&Tensor>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    save: bool,
) -> Result<Normed> {
    let op = "layer norm";
    let (rows, columns) = rows_of(op, "the input", x)?;
    if let Some(Dropout { p, .. }) = dropout.filter(|d| !(0.0..1.0).contains(&d.p)) {
        return Err(Error::argument(
            op,
            format!("dropout is {p}, not in [0, 1)"),
        ));
    }
    // A GPU has a kernel for each.
    let dropped = dropout
        .filter(|_| m.gpu().is_some())
        .map(|d| ops::dropout(m, x, d.p, d.key))
        .transpose()?;
    let x = dropped.as_ref().unwrap_or(x).contiguous(m)?;
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
    let apart = residual.is_some() || (dropout.is_some() && dropped.is_none());
    let mut sum = (save && apart)
        .then(|| Tensor::empty(m, x.dtype(), x.shape()))
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
            sum: sum.or(dropped.filter(|_| save)),
            mean,
            scale,
        });
    }
    with_float!(op, x.dtype(), T => {
        if !y.is_planned() {
            let x = x.slice::<T>()?;
            let rest = (
                residual.as_ref().map(|t| t.slice::<T>()).transpose()?,
                weight.as_ref().map(|t| t.slice::<<T as Float>::Acc>()).transpose()?,
                bias.as_ref().map(|t| t.slice::<<T as Float>::Acc>()).transpose()?,
                eps,
                y.slice_mut::<T>()?,
                sum.as_mut().map(|t| t.slice_mut::<T>()).transpose()?,
                mean.slice_mut::<<T as Float>::Acc>()?,
                scale.slice_mut::<<T as Float>::Acc>()?,
            );
            let (r, w, b, eps, y, sum, mean, rstd) = rest;
            match dropout {
                Some(d) => kernel::layer_norm_dropped(x, d, r, w, b, eps, y, sum, mean, rstd, columns),
                None => kernel::layer_norm(x, r, w, b, eps, y, sum, mean, rstd, columns),
            }
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

/// Which gradients [`layer_norm_backward`] computes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Of the tensor that was normalised: of the residual, and of x if nothing was dropped
    pub ds: bool,
    /// Of x before this dropout
    pub dx: Option<Dropout>,
    /// Of the weight, in this type
    pub dweight: Option<DType>,
    /// Of the bias, in this type
    pub dbias: Option<DType>,
}

/// What [`layer_norm_backward`] computed: what was wanted.
#[derive(Debug)]
pub struct LayerNormGradients {
    /// Of the tensor that was normalised
    pub ds: Option<Tensor>,
    /// Of x before the dropout
    pub dx: Option<Tensor>,
    /// Of the weight
    pub dweight: Option<Tensor>,
    /// Of the bias
    pub dbias: Option<Tensor>,
}

/// The gradients of s and of x, as far as they are wanted, from that of s, which there is if one of them is.
pub(super) fn through_dropout(
    m: &Memory,
    ds: Option<Tensor>,
    wanted: Wanted,
) -> Result<[Option<Tensor>; 2]> {
    Ok(match (ds, wanted.dx) {
        (Some(ds), Some(d)) if wanted.ds => {
            let dx = ops::dropout(m, &ds, d.p, d.key)?;
            [Some(ds), Some(dx)]
        }
        (Some(ds), Some(d)) => [None, Some(ops::dropout_backward(m, ds, d.p, d.key)?)],
        (ds, _) => [ds, None],
    })
}

/// The gradients of [`layer_norm_dropped`], in one pass over `s`, the tensor that was normalised, and `dy` on the CPU,
/// and for rows of up to 1024 columns on a GPU. Each has the same bits whatever else is wanted. That of `s` is added
/// to `sum`, if there is one, which goes with no dropout.
///
/// # Errors
/// Shapes or types that differ.
pub fn layer_norm_backward(
    m: &Memory,
    s: &Tensor,
    weight: Option<&Tensor>,
    mean: &Tensor,
    scale: &Tensor,
    dy: &Tensor,
    wanted: Wanted,
    sum: Option<Tensor>,
) -> Result<LayerNormGradients> {
    let Wanted {
        ds: wants_ds,
        dx: dropout,
        dweight: weight_dtype,
        dbias: bias_dtype,
    } = wanted;
    if m.gpu().is_some() && held::holds(s) {
        return held::backward(m, s, weight, mean, scale, dy, wanted, sum);
    }
    if let Some(sum) = sum {
        let found = layer_norm_backward(m, s, weight, mean, scale, dy, wanted, None)?;
        return Ok(LayerNormGradients {
            ds: found.ds.map(|ds| joined(m, sum, ds)).transpose()?,
            ..found
        });
    }
    if m.gpu().is_some() {
        let dbias = bias_dtype
            .map(|dtype| ops::sum_to_columns(m, dy, dtype))
            .transpose()?;
        let ds = (wants_ds || dropout.is_some())
            .then(|| layer_norm_backward_input(m, s, weight, mean, scale, dy))
            .transpose()?;
        let [ds, dx] = through_dropout(m, ds, wanted)?;
        let dweight = match weight_dtype {
            Some(dtype) => {
                layer_norm_backward_params(m, s, mean, scale, dy, [true, false], dtype)?[0].take()
            }
            None => None,
        };
        return Ok(LayerNormGradients {
            ds,
            dx,
            dweight,
            dbias,
        });
    }
    let op = "layer norm backward";
    let (rows, columns) = rows_of(op, "the input", s)?;
    let s = s.contiguous(m)?;
    let dy = beside(op, "the gradient", dy, &s, m)?;
    let weight = weight
        .map(|t| parameter(op, "the weight", t, columns, s.dtype(), m))
        .transpose()?;
    let rows_if = |wanted: bool| {
        wanted
            .then(|| Tensor::empty(m, s.dtype(), s.shape()))
            .transpose()
    };
    let columns_if = |wanted: bool| {
        wanted
            .then(|| Tensor::empty(m, accumulator(s.dtype()), &[columns]))
            .transpose()
    };
    let (mut ds, mut dx) = (rows_if(wants_ds)?, rows_if(dropout.is_some())?);
    let mut dweight = columns_if(weight_dtype.is_some())?;
    let mut dbias = columns_if(bias_dtype.is_some())?;
    with_float!(op, s.dtype(), T => {
        type Sum = <T as Float>::Acc;
        let needed = kernel::layer_norm_backward_workspace(rows, columns);
        let mut scratch = workspace(m, s.dtype(), needed)?;
        if !m.is_planned() {
            let gradients = kernel::Gradients {
                ds: ds.as_mut().map(|t| t.slice_mut::<T>()).transpose()?,
                dx: dx.as_mut().map(|t| t.slice_mut::<T>()).transpose()?.zip(dropout),
                dweight: dweight.as_mut().map(|t| t.slice_mut::<Sum>()).transpose()?,
                dbias: dbias.as_mut().map(|t| t.slice_mut::<Sum>()).transpose()?,
            };
            kernel::layer_norm_backward(
                s.slice::<T>()?,
                weight.as_ref().map(|t| t.slice::<Sum>()).transpose()?,
                mean.slice::<Sum>()?,
                scale.slice::<Sum>()?,
                dy.slice::<T>()?,
                gradients,
                columns,
                scratch.slice_mut::<Sum>()?,
            );
        }
    });
    let stored = |x: Option<Tensor>, dtype: Option<DType>| {
        x.zip(dtype)
            .map(|(x, dtype)| cast(m, &x, dtype))
            .transpose()
    };
    Ok(LayerNormGradients {
        ds,
        dx,
        dweight: stored(dweight, weight_dtype)?,
        dbias: stored(dbias, bias_dtype)?,
    })
}

/// The gradient of the bias alone, which reads nothing but `dy`: the bits of [`layer_norm_backward`]'s.
///
/// # Errors
/// A tensor without dimensions.
pub fn layer_norm_bias_gradient(m: &Memory, dy: &Tensor, dtype: DType) -> Result<Tensor> {
    match m.gpu().is_some() && held::holds(dy) {
        true => held::bias_gradient(m, dy, dtype),
        false => ops::sum_to_columns(m, dy, dtype),
    }
}

/// The sum of what has arrived of a gradient and another part of it, in the first one's storage if
/// nothing else holds that.
fn joined(m: &Memory, mut sum: Tensor, mut part: Tensor) -> Result<Tensor> {
    if sum.is_unique() && sum.is_contiguous() {
        add_assign(&mut sum, &part)?;
        return Ok(sum);
    }
    let sum = sum.contiguous(m)?;
    add_assign(&mut part, &sum)?;
    Ok(part)
}
