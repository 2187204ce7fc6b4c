//! The loss of a language model: a product with the vocabulary's matrix, and a cross-entropy of what
//! comes out, in chunks.

use std::ops::Range;

use graft_kernels::cuda::cross_entropy as on_gpu;
use graft_kernels::cuda::gemm;
use graft_kernels::gemm::{Operands, gemm_batched, gemm_batched_workspace};
use graft_kernels::{Float, cross_entropy as kernel, softcap};
use half::{bf16, f16};

use super::linalg::{
    add_product, matmul_as, matrix, operands, products, products_workspace, single, with_product,
};
use super::linear::{Linear, WeightLayout, linear_as, sum_to_columns};
use super::loss::{IGNORE, check_targets, of_gpu, total};
use super::{accumulator, cast, elementwise::add_assign, indices, parameter, put, workspace};
use crate::error::{Error, Result};
use crate::{Category, DType, Memory, Tensor, with_float};

/// Classes of one chunk on a CPU: large enough for the matrix product to run at
/// full speed, small enough that the logits of a chunk stay a fraction of the activations.
const CHUNK: usize = 4096;

/// Bytes of logits of one chunk of rows on a GPU: enough rows for the products to run at full speed,
/// and for the weight's gradient not to be read and written too often.
const CHUNK_BYTES: usize = 512 << 20;

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

/// Rows of a chunk on a GPU: whole tiles of a product, and if possible as many as the multiprocessors
/// of an H100 take at a time, so that the input's gradient keeps all of them at work.
fn rows_of_chunk(classes: usize, dtype: DType) -> usize {
    const TILE: usize = 128;
    const ROUND: usize = TILE * 132 / 4;
    let most = CHUNK_BYTES / (classes * dtype.size());
    let of = if most < ROUND { TILE } else { ROUND };
    (most / of * of).max(TILE)
}

/// [`linear_cross_entropy`] on a GPU. Logits of bf16 activations are f16, less the logit of their row's
/// target: those near it, which decide, have the digits that gradients in bf16 have.
fn by_rows(
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

/// Gradients that [`by_rows`] kept, those that are needed, times `dy` and in their types.
fn scaled(
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
