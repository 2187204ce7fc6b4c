//! Updates of one parameter in place, and the sums that clipping needs.

use graft_kernels::optimizer as kernel;
pub use graft_kernels::optimizer::{AdamW, Sgd};

use super::{beside, same_dtype, same_shape};
use crate::error::Result;
use crate::{Tensor, with_float};

/// One AdamW step (Loshchilov and Hutter, 2019) on `weight`, with moments `m` and `v` of its shape.
///
/// # Errors
/// Shapes or types that differ, or a tensor that is shared.
pub fn adamw(
    p: &AdamW,
    weight: &mut Tensor,
    gradient: &Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
) -> Result<()> {
    let op = "adamw";
    let memory = weight.memory().clone();
    let gradient = beside(op, "the gradient", gradient, weight, &memory)?;
    for (what, moment) in [("the first moment", &*m), ("the second moment", &*v)] {
        same_shape(op, what, moment, weight.shape())?;
        same_dtype(op, what, moment, weight.dtype())?;
    }
    if weight.is_planned() {
        return Ok(());
    }
    with_float!(op, weight.dtype(), T => kernel::adamw(
        p,
        weight.slice_mut::<T>()?,
        gradient.slice::<T>()?,
        m.slice_mut::<T>()?,
        v.slice_mut::<T>()?,
    ));
    Ok(())
}

/// One step of stochastic gradient descent on `weight`, with a velocity if there is momentum.
///
/// # Errors
/// Shapes or types that differ, or a tensor that is shared.
pub fn sgd(
    p: &Sgd,
    weight: &mut Tensor,
    gradient: &Tensor,
    velocity: Option<&mut Tensor>,
) -> Result<()> {
    let op = "sgd";
    let memory = weight.memory().clone();
    let gradient = beside(op, "the gradient", gradient, weight, &memory)?;
    if let Some(velocity) = &velocity {
        same_shape(op, "the velocity", velocity, weight.shape())?;
        same_dtype(op, "the velocity", velocity, weight.dtype())?;
    }
    if weight.is_planned() {
        return Ok(());
    }
    with_float!(op, weight.dtype(), T => kernel::sgd(
        p,
        weight.slice_mut::<T>()?,
        gradient.slice::<T>()?,
        velocity.map(|t| t.slice_mut::<T>()).transpose()?,
    ));
    Ok(())
}

/// The sum of squares of all elements; 0 for a planned tensor.
///
/// # Errors
/// A type that is no float.
pub fn sum_squares(x: &Tensor) -> Result<f64> {
    if x.is_planned() {
        return Ok(0.0);
    }
    let x = x.contiguous(x.memory())?;
    with_float!("sum of squares", x.dtype(), T => Ok(kernel::sum_squares(x.slice::<T>()?)))
}

/// True if no element is infinite or NaN.
///
/// # Errors
/// A type that is no float.
pub fn all_finite(x: &Tensor) -> Result<bool> {
    if x.is_planned() {
        return Ok(true);
    }
    let x = x.contiguous(x.memory())?;
    with_float!("finite", x.dtype(), T => Ok(kernel::all_finite(x.slice::<T>()?)))
}
