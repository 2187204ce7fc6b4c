//! Backward of layer norms on a GPU whose rows a warp holds.

use graft_kernels::cuda::norm_held::{self as kernel, Read, Written};

use super::layer::{LayerNormGradients, Wanted, through_dropout};
use crate::error::Result;
use crate::ops::{beside, cast, parameter, rows_of, workspace};
use crate::{DType, Memory, Tensor};

/// Whether there are kernels for rows as long as those of `x`.
pub(super) fn holds(x: &Tensor) -> bool {
    x.shape()
        .last()
        .is_some_and(|&columns| kernel::holds(columns))
}

/// As [`layer_norm_backward`](super::layer_norm_backward).
pub(super) fn backward(
    m: &Memory,
    s: &Tensor,
    weight: Option<&Tensor>,
    mean: &Tensor,
    scale: &Tensor,
    dy: &Tensor,
    wanted: Wanted,
    sum: Option<Tensor>,
) -> Result<LayerNormGradients> {
    let op = "layer norm backward";
    let (rows, columns) = rows_of(op, "the input", s)?;
    let s = s.contiguous(m)?;
    let dy = beside(op, "the gradient", dy, &s, m)?;
    let weight = weight
        .map(|t| parameter(op, "the weight", t, columns, s.dtype(), m))
        .transpose()?;
    let adds = sum.is_some();
    let mut ds = match sum {
        Some(sum) => {
            beside(op, "the sum so far", &sum, &s, m)?;
            Some(sum.into_owned(m)?)
        }
        None if wanted.ds || wanted.dx.is_some() => Some(Tensor::empty(m, s.dtype(), s.shape())?),
        None => None,
    };
    let parameters = [wanted.dweight, wanted.dbias];
    let [mut dweight, mut dbias] = outputs(m, parameters, columns)?;
    let needed = kernel::workspace(rows, columns);
    let mut scratch = workspace(m, s.dtype(), needed)?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let read = Read {
                s: Some(s.device()?),
                weight: weight.as_deref().map(Tensor::device).transpose()?,
                mean: Some(mean.device()?),
                rstd: Some(scale.device()?),
                dy: dy.device()?,
            };
            let written = Written {
                ds: ds.as_mut().map(Tensor::device_mut).transpose()?,
                adds,
                dweight: dweight.as_mut().map(Tensor::device_mut).transpose()?,
                dbias: dbias.as_mut().map(Tensor::device_mut).transpose()?,
            };
            let sizes = [rows, columns];
            Ok(kernel::backward(
                gpu,
                read,
                written,
                sizes,
                scratch.device_mut()?,
            )?)
        })?;
    }
    let [ds, dx] = through_dropout(m, ds, wanted)?;
    Ok(LayerNormGradients {
        ds,
        dx,
        dweight: stored(m, dweight, wanted.dweight)?,
        dbias: stored(m, dbias, wanted.dbias)?,
    })
}

/// The gradient of the bias alone, in `dtype`.
pub(super) fn bias_gradient(m: &Memory, dy: &Tensor, dtype: DType) -> Result<Tensor> {
    let (rows, columns) = rows_of("layer norm backward", "the gradient", dy)?;
    let dy = dy.contiguous(m)?;
    let mut dbias = Tensor::empty(m, DType::F32, &[columns])?;
    let mut scratch = workspace(m, dy.dtype(), kernel::workspace(rows, columns))?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let read = Read {
                s: None,
                weight: None,
                mean: None,
                rstd: None,
                dy: dy.device()?,
            };
            let written = Written {
                dbias: Some(dbias.device_mut()?),
                ..Written::default()
            };
            let sizes = [rows, columns];
            Ok(kernel::backward(
                gpu,
                read,
                written,
                sizes,
                scratch.device_mut()?,
            )?)
        })?;
    }
    cast(m, &dbias, dtype)
}

/// Parameters' gradients as they are summed, those that are wanted.
fn outputs(m: &Memory, wanted: [Option<DType>; 2], columns: usize) -> Result<[Option<Tensor>; 2]> {
    let [a, b] = wanted.map(|wanted| {
        wanted
            .map(|_| Tensor::empty(m, DType::F32, &[columns]))
            .transpose()
    });
    Ok([a?, b?])
}

fn stored(m: &Memory, x: Option<Tensor>, dtype: Option<DType>) -> Result<Option<Tensor>> {
    x.zip(dtype)
        .map(|(x, dtype)| cast(m, &x, dtype))
        .transpose()
}
