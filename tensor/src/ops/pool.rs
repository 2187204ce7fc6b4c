//! One row per packed sequence.

pub use graft_kernels::pool::Pool;
use graft_kernels::{cuda, pool as kernel};

use super::{beside, sequences};
use crate::error::{Error, Result};
use crate::{Memory, Tensor, with_float};

/// Checks the offsets against `tokens` packed rows; returns the number of sequences.
fn check(op: &'static str, kind: Pool, offsets: &Tensor, tokens: usize) -> Result<usize> {
    let count = sequences(op, offsets, tokens)?;
    let empty = offsets
        .slice::<i64>()?
        .windows(2)
        .position(|pair| pair[0] == pair[1]);
    match empty {
        Some(sequence) => Err(Error::argument(
            op,
            format!("sequence {sequence} has no tokens to take the {kind:?} of"),
        )),
        None => Ok(count),
    }
}

/// Mean, first, last or maximum row of each sequence: `x [tokens, columns]`, `offsets i64
/// [sequences + 1]` give `[sequences, columns]`.
///
/// # Errors
/// Offsets that do not describe `x`, or a sequence without tokens.
pub fn pool(m: &Memory, kind: Pool, x: &Tensor, offsets: &Tensor) -> Result<Tensor> {
    let [tokens, columns] = x.shape()[..] else {
        return Err(Error::shape(
            "pool",
            "the input",
            x.shape(),
            "[tokens, columns]",
        ));
    };
    let count = check("pool", kind, offsets, tokens)?;
    let x = x.contiguous(m)?;
    let mut y = Tensor::empty(m, x.dtype(), &[count, columns])?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (x, offsets, y) = (x.device()?, offsets.device()?, y.device_mut()?);
            Ok(cuda::pool::pool(gpu, kind, x, offsets, y, columns)?)
        })?;
        return Ok(y);
    }
    with_float!("pool", x.dtype(), T => {
        if !y.is_planned() {
            let (x, offsets) = (x.slice::<T>()?, offsets.slice::<i64>()?);
            kernel::pool(kind, x, offsets, y.slice_mut::<T>()?, columns);
        }
    });
    Ok(y)
}

/// The gradient of [`pool`]'s input, `[tokens, columns]`. Only the maximum reads that input, `x`.
///
/// # Errors
/// As [`pool`]; a maximum without `x`.
pub fn pool_backward(
    m: &Memory,
    kind: Pool,
    x: Option<&Tensor>,
    offsets: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let op = "pool backward";
    let tokens = offsets.slice::<i64>()?.last().map_or(0, |&n| n as usize);
    let count = check(op, kind, offsets, tokens)?;
    let columns = match dy.shape()[..] {
        [rows, columns] if rows == count => columns,
        _ => {
            let expected = format!("[{count}, columns]");
            return Err(Error::shape(op, "the gradient", dy.shape(), expected));
        }
    };
    let mut dx = Tensor::empty(m, dy.dtype(), &[tokens, columns])?;
    let x = match (kind, x) {
        (Pool::Max, Some(x)) => Some(beside(op, "the input", x, &dx, m)?),
        (Pool::Max, None) => return Err(Error::argument(op, "the maximum needs its input")),
        (Pool::Mean | Pool::First | Pool::Last, _) => None,
    };
    let dy = dy.contiguous(m)?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let x = x.as_ref().map(|x| x.device()).transpose()?;
            let (offsets, dy, dx) = (offsets.device()?, dy.device()?, dx.device_mut()?);
            Ok(cuda::pool::pool_backward(
                gpu, kind, x, offsets, dy, dx, columns,
            )?)
        })?;
        return Ok(dx);
    }
    with_float!(op, dy.dtype(), T => {
        if !dx.is_planned() {
            let x = match &x {
                Some(x) => x.slice::<T>()?,
                None => &[],
            };
            let (dy, offsets) = (dy.slice::<T>()?, offsets.slice::<i64>()?);
            kernel::pool_backward(kind, x, offsets, dy, dx.slice_mut::<T>()?, columns);
        }
    });
    Ok(dx)
}
