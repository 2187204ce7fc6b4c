//! Reductions along one dimension.

use graft_kernels::cuda;
use graft_kernels::reduce as kernel;
pub use graft_kernels::reduce::Reduce;

use super::{beside, rows_of, workspace};
use crate::error::{Error, Result};
use crate::{Category, DType, Memory, Tensor, with_float};

/// `(outer, axis, inner)` sizes around dimension `axis`.
fn around(op: &'static str, x: &Tensor, axis: usize) -> Result<(usize, usize, usize)> {
    if axis >= x.shape().rank() {
        return Err(Error::argument(
            op,
            format!("dimension {axis} of {} does not exist", x.shape()),
        ));
    }
    let (outer, rest) = x.shape().split_at(axis);
    Ok((outer.iter().product(), rest[0], rest[1..].iter().product()))
}

/// Sum, mean or maximum along dimension `axis`, which stays with length 1 if `keep`.
///
/// # Errors
/// A dimension that does not exist; the maximum or mean of no elements.
pub fn reduce(m: &Memory, kind: Reduce, x: &Tensor, axis: usize, keep: bool) -> Result<Tensor> {
    let (outer, length, inner) = around("reduce", x, axis)?;
    if length == 0 && kind != Reduce::Sum {
        return Err(Error::argument(
            "reduce",
            format!(
                "{kind:?} over dimension {axis} of {}, which is empty",
                x.shape()
            ),
        ));
    }
    let x = x.contiguous(m)?;
    let shape = x.shape().replaced(axis, keep.then_some(1));
    let mut y = Tensor::empty(m, x.dtype(), &shape)?;
    if let Some(on) = m.gpu() {
        let need = cuda::reduce::reduce_workspace(kind, outer, length, inner);
        let mut scratch = workspace(m, x.dtype(), need)?;
        on.run(|gpu| {
            let (sizes, y) = ([outer, length, inner], y.device_mut()?);
            let scratch = scratch.device_mut()?;
            Ok(cuda::reduce::reduce(
                gpu,
                kind,
                x.device()?,
                sizes,
                y,
                scratch,
            )?)
        })?;
        return Ok(y);
    }
    with_float!("reduce", x.dtype(), T => {
        if !y.is_planned() {
            kernel::reduce(kind, x.slice::<T>()?, outer, length, inner, y.slice_mut::<T>()?);
        }
    });
    Ok(y)
}

/// The gradient of a maximum's input: `dy` at the first maximum, zero elsewhere. `y` and `dy` have
/// the reduced dimension or not.
///
/// # Errors
/// Element counts or types that differ.
pub fn max_backward(
    m: &Memory,
    x: &Tensor,
    y: &Tensor,
    dy: &Tensor,
    axis: usize,
) -> Result<Tensor> {
    let (outer, length, inner) = around("max backward", x, axis)?;
    let x = x.contiguous(m)?;
    let y = beside("max backward", "the output", y, dy, m)?;
    let dy = dy.contiguous(m)?;
    let mut dx = Tensor::empty(m, x.dtype(), x.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (x, y, dy) = (x.device()?, y.device()?, dy.device()?);
            let sizes = [outer, length, inner];
            Ok(cuda::reduce::max_backward(
                gpu,
                x,
                y,
                dy,
                dx.device_mut()?,
                sizes,
            )?)
        })?;
        return Ok(dx);
    }
    with_float!("max backward", x.dtype(), T => {
        if !dx.is_planned() {
            kernel::reduce_max_backward(
                x.slice::<T>()?,
                y.slice::<T>()?,
                dy.slice::<T>()?,
                dx.slice_mut::<T>()?,
                outer,
                length,
                inner,
            );
        }
    });
    Ok(dx)
}

/// The index of the first maximum of each row of `x [.., columns]`: `i64 [..]`.
///
/// # Errors
/// Rows without elements.
pub fn argmax(m: &Memory, x: &Tensor) -> Result<Tensor> {
    let (rows, columns) = rows_of("argmax", "the input", x)?;
    if columns == 0 {
        return Err(Error::shape(
            "argmax",
            "the input",
            x.shape(),
            "[.., 1 or more]",
        ));
    }
    let x = x.contiguous(m)?;
    let shape = x.shape().replaced(x.shape().rank() - 1, None);
    let mut y = Tensor::empty(m, DType::I64, &shape)?;
    if let Some(on) = m.gpu() {
        // Integers are this machine's: the GPU writes to numbers of the same size, which are copied.
        let mut there = Tensor::empty(&m.with(Category::Workspace), DType::F64, &[rows])?;
        let here = y.slice_mut::<i64>()?;
        here.fill(0);
        on.run(|gpu| {
            cuda::reduce::argmax(gpu, x.device()?, [rows, columns], there.device_mut()?)?;
            Ok(gpu.download(there.device()?, bytemuck::cast_slice_mut(here))?)
        })?;
        return Ok(y);
    }
    with_float!("argmax", x.dtype(), T => {
        if x.is_planned() {
            // Indices stay real in a plan; any valid ones do.
            y.slice_mut::<i64>()?.fill(0);
        } else {
            kernel::argmax(x.slice::<T>()?, rows, columns, y.slice_mut::<i64>()?);
        }
    });
    Ok(y)
}
