//! Rotary position embedding (Su et al., 2021).

use graft_kernels::{cuda, rope as kernel};

use super::{indices, same_dtype};
use crate::error::{Error, Result};
use crate::{DType, Memory, Tensor, with_float};

/// How the pairs of a head are rotated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rope {
    /// Heads in a row of the input
    pub heads: usize,
    /// Leading elements of each head that are rotated; even
    pub rotary_dim: usize,
    /// Pairs are neighbours `(2i, 2i + 1)` instead of halves `(i, i + rotary_dim / 2)`
    pub interleaved: bool,
}

/// Rotates each head of `x [tokens, heads * head_dim]` by the angle of its token's position: `cos`
/// and `sin` are f32 `[positions, rotary_dim / 2]`, `positions` i64 `[tokens]`. With `inverse`, the
/// other way round: the backward pass.
///
/// # Errors
/// Sizes that do not fit, a position outside the tables.
pub fn rope(
    m: &Memory,
    p: &Rope,
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    positions: &Tensor,
    inverse: bool,
) -> Result<Tensor> {
    let op = "rope";
    let [tokens, columns] = x.shape()[..] else {
        return Err(Error::shape(
            op,
            "the input",
            x.shape(),
            "[tokens, heads x head_dim]",
        ));
    };
    let fits = p.heads > 0
        && columns.is_multiple_of(p.heads)
        && p.rotary_dim.is_multiple_of(2)
        && p.rotary_dim <= columns / p.heads;
    if !fits {
        let expected = format!("{} heads of at least {}", p.heads, p.rotary_dim);
        return Err(Error::shape(op, "the input", x.shape(), expected));
    }
    for (what, table) in [("cos", cos), ("sin", sin)] {
        same_dtype(op, what, table, DType::F32)?;
        if table.shape().rank() != 2
            || table.shape()[1] != p.rotary_dim / 2
            || table.shape() != cos.shape()
        {
            let expected = format!("[positions, {}]", p.rotary_dim / 2);
            return Err(Error::shape(op, what, table.shape(), expected));
        }
    }
    if positions.shape()[..] != [tokens] {
        return Err(Error::shape(
            op,
            "the positions",
            positions.shape(),
            format!("[{tokens}]"),
        ));
    }
    let positions = indices(op, positions, cos.shape()[0], None, m)?;
    let x = x.contiguous(m)?;
    let (cos, sin) = (cos.contiguous(m)?, sin.contiguous(m)?);
    let mut y = Tensor::empty(m, x.dtype(), x.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            Ok(cuda::rope::rope(
                gpu,
                x.device()?,
                cos.device()?,
                sin.device()?,
                positions.device()?,
                p.heads,
                columns / p.heads,
                p.rotary_dim,
                p.interleaved,
                inverse,
                y.device_mut()?,
            )?)
        })?;
        return Ok(y);
    }
    with_float!(op, x.dtype(), T => {
        if !y.is_planned() {
            kernel::rope(
                x.slice::<T>()?,
                cos.slice::<f32>()?,
                sin.slice::<f32>()?,
                positions.slice::<i64>()?,
                p.heads,
                columns / p.heads,
                p.rotary_dim,
                p.interleaved,
                inverse,
                y.slice_mut::<T>()?,
            );
        }
    });
    Ok(y)
}
