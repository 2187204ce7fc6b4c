//! The loss of a language model on a GPU: logits of some rows at a time, which their gradient replaces.

use graft_kernels::cuda::cross_entropy as on_gpu;
use graft_kernels::cuda::gemm;

use super::{HEAD, add, of_gradient, product_into};
use crate::error::Result;
use crate::ops::linalg::{add_product, operands, products, products_workspace, single};
use crate::ops::linear::{linear_as, sum_to_columns};
use crate::ops::loss::{of_gpu, total};
use crate::ops::{cast, parameter, put};
use crate::{Category, DType, Memory, Tensor};

/// Bytes of logits of one chunk of rows on a GPU: enough rows for the products to run at full speed,
/// and for the weight's gradient not to be read and written too often.
const CHUNK_BYTES: usize = 512 << 20;

/// Rows of a chunk on a GPU: whole tiles of a product, and if possible as many as the multiprocessors
/// of an H100 take at a time, so that the input's gradient keeps all of them at work.
fn rows_of_chunk(classes: usize, dtype: DType) -> usize {
    const TILE: usize = 128;
    const ROUND: usize = TILE * 132 / 4;
    let most = CHUNK_BYTES / (classes * dtype.size());
    let of = if most < ROUND { TILE } else { ROUND };
    (most / of * of).max(TILE)
}

/// [`linear_cross_entropy`](super::linear_cross_entropy()) on a GPU. Logits of bf16 activations are f16, less the logit of their row's
/// target: those near it, which decide, have the digits that gradients in bf16 have.
pub(super) fn by_rows(
    m: &Memory,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    smoothing: f64,
    cap: Option<f64>,
    needs: [bool; 3],
) -> Result<(Tensor, Vec<Tensor>)> {
    let (rows, inputs, classes) = (x.shape()[0], x.shape()[1], weight.shape()[0]);
    // Rows of logits begin where tensor cores and their copies want it: with classes of which none
    // counts, whose weights and gradients are 0.
    let short = x.dtype() == DType::Bf16;
    let step = if short {
        classes.next_multiple_of(64)
    } else {
        classes
    };
    let p = on_gpu::Loss {
        step,
        ..of_gpu(classes, smoothing, cap)
    };
    let (dtype, multiplied) = (x.dtype(), operands(x.dtype()));
    let lasting = of_gradient(m, weight);
    // Rounded once, not for every chunk, and if it is a parameter not for every step.
    let scratch = &m.with(Category::Workspace);
    let kept = weight.memory().category() == Category::Weights
        && (dtype, weight.dtype()) == (DType::Bf16, DType::F32);
    let kept = match kept {
        true => weight.rounded_with_rows(step)?,
        false => None,
    };
    let weight = &match kept {
        Some(kept) => kept,
        None => lengthened(scratch, cast(scratch, weight, dtype)?, step)?,
    };
    let bias = bias
        .map(|bias| parameter("linear", "the bias", bias, classes, dtype, m))
        .transpose()?
        .map(|bias| lengthened(scratch, bias.into_owned(), step))
        .transpose()?;
    let x = x.contiguous(m)?;
    let mut losses = Tensor::empty(m, DType::F32, &[rows])?;
    let mut lse = Tensor::empty(m, DType::F32, &[rows])?;
    let chunk = rows_of_chunk(step, dtype);
    // Summed in f32, and rounded to its type when it has been scaled.
    let mut dx = needs[0]
        .then(|| Tensor::empty(m, DType::F32, &[rows, inputs]))
        .transpose()?;
    let (mut dweight, mut dbias) = (None, None);
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        let x = x.narrow(0, first, count)?;
        let targets = targets.narrow(0, first, count)?;
        let range = first..first + count;
        let gradient = needs.contains(&true);
        // Logits [count, step], and then their gradient.
        let dlogits = if short {
            let (mut logits, relative) =
                relative_logits(m, &p, &x, weight, bias.as_ref(), &targets)?;
            if let Some(on) = m.gpu() {
                on.run(|gpu| {
                    let (x, relative) = (logits.device_mut()?, relative.device()?);
                    let (targets, losses) =
                        (targets.device()?, losses.device_mut()?.part(range.clone()));
                    Ok(on_gpu::relative_cross_entropy(
                        gpu, &p, x, relative, targets, losses, gradient,
                    )?)
                })?;
            }
            logits
        } else {
            let mut logits = linear_as(m, &HEAD, &x, weight, bias.as_ref(), false, dtype)?.0;
            if let Some(on) = m.gpu() {
                on.run(|gpu| {
                    let targets = targets.device()?;
                    let losses = losses.device_mut()?.part(range.clone());
                    let lse = lse.device_mut()?.part(range.clone());
                    Ok(match gradient {
                        true => on_gpu::cross_entropy_with_gradient(
                            gpu,
                            &p,
                            logits.device_mut()?,
                            targets,
                            losses,
                            lse,
                        ),
                        false => {
                            on_gpu::cross_entropy(gpu, &p, logits.device()?, targets, losses, lse)
                        }
                    }?)
                })?;
            }
            logits
        };
        if let Some(dx) = &mut dx {
            product_into(m, multiplied, &dlogits, weight, dx, range)?;
        }
        if needs[1] {
            let factors = (&dlogits.t()?, &x);
            add_product(&lasting, multiplied, factors, &mut dweight, DType::F32)?;
        }
        if needs[2] {
            add(&mut dbias, sum_to_columns(m, &dlogits, DType::F32)?)?;
        }
    }
    let sum = total(m, &losses, dtype)?;
    if rows == 0 {
        // No chunk has started the sums.
        let zeros = |shape: &[usize]| Tensor::zeros(m, DType::F32, shape);
        dweight = needs[1].then(|| zeros(&[step, inputs])).transpose()?;
        dbias = needs[2].then(|| zeros(&[step])).transpose()?;
    }
    let shortened = |x: Option<Tensor>| x.map(|x| x.narrow(0, 0, classes)).transpose();
    let kept = [dx, shortened(dweight)?, shortened(dbias)?];
    Ok((sum, kept.into_iter().flatten().collect()))
}

/// `x·w + bias` as f16, less what is returned beside it: that of each row's target. The tensor of
/// logits, `[rows, step]`, says that they are bf16.
fn relative_logits(
    m: &Memory,
    p: &on_gpu::Loss,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let rows = x.shape()[0];
    let mut relative = Tensor::empty(m, DType::F32, &[rows])?;
    let mut logits = Tensor::empty(m, DType::Bf16, &[rows, p.step])?;
    let by = weight.t()?;
    let products = products(
        operands(x.dtype()),
        single(logits.count()),
        x,
        &by,
        logits.dtype(),
    )?;
    let mut scratch = products_workspace(m, &products, None)?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let bias = bias.map(Tensor::device).transpose()?;
            let (x, w, targets) = (x.device()?, weight.device()?, targets.device()?);
            on_gpu::target_logits(gpu, p, x, w, bias, targets, relative.device_mut()?)?;
            let epilogue = gemm::Epilogue {
                bias,
                relative_to: Some(relative.device()?),
                ..Default::default()
            };
            let (y, scratch) = (logits.device_mut()?, scratch.device_mut()?);
            Ok(gemm::gemm(
                gpu, &products, x, w, y, false, epilogue, scratch,
            )?)
        })?;
    }
    Ok((logits, relative))
}

/// `x` with zeros behind its rows, up to `rows`.
fn lengthened(m: &Memory, x: Tensor, rows: usize) -> Result<Tensor> {
    let own = x.shape()[0];
    if own == rows {
        return Ok(x);
    }
    let shape = |rows| [&[rows], &x.shape()[1..]].concat();
    let mut y = Tensor::empty(m, x.dtype(), &shape(rows))?;
    put(m, &mut y, &x, 0, 0)?;
    put(
        m,
        &mut y,
        &Tensor::zeros(m, x.dtype(), &shape(rows - own))?,
        0,
        own,
    )?;
    Ok(y)
}

/// Gradients that [`by_rows`] kept, those that are needed, times `dy` and in their types.
pub(super) fn scaled(
    m: &Memory,
    kept: Vec<Tensor>,
    dy: &Tensor,
    needs: [bool; 3],
    dtypes: [DType; 3],
) -> Result<[Option<Tensor>; 3]> {
    let mut kept = kept.into_iter();
    let mut gradients = [None, None, None];
    for i in (0..3).filter(|&i| needs[i]) {
        let gradient = kept.next().expect("one for each that is needed");
        gradients[i] = Some(times(m, gradient, dy, dtypes[i])?);
    }
    Ok(gradients)
}

/// `x * dy` as `dtype`, in place where that is f32.
fn times(m: &Memory, x: Tensor, dy: &Tensor, dtype: DType) -> Result<Tensor> {
    let Some(on) = m.gpu() else {
        return Ok(x);
    };
    if dtype == DType::F32 {
        let mut y = x.into_owned(m)?;
        on.run(|gpu| Ok(on_gpu::times_in_place(gpu, dy.device()?, y.device_mut()?)?))?;
        return Ok(y);
    }
    let mut y = Tensor::empty(m, dtype, x.shape())?;
    on.run(|gpu| {
        Ok(on_gpu::times(
            gpu,
            x.device()?,
            dy.device()?,
            y.device_mut()?,
        )?)
    })?;
    Ok(y)
}
