//! Updates of parameters in place, and the sums that clipping needs.

use graft_kernels::optimizer as kernel;
pub use graft_kernels::optimizer::{AdamW, Sgd};

pub use super::tables::Tables;
use super::tables::{Coming, single, squares_on_gpu};
use super::{beside, same_dtype, same_shape};
use crate::error::{Error, Result};
use crate::{Category, Tensor, with_float};

/// An update rule with its numbers for one parameter and one step. What the gradient is multiplied
/// with for clipping, [`step`] finds out.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Rule {
    /// Has two states: first and second moment
    AdamW(AdamW),
    /// Has a velocity if there is momentum
    Sgd(Sgd),
}

/// One parameter among those that [`step`] updates.
#[derive(Debug)]
pub struct Update<'a> {
    /// How
    pub rule: Rule,
    /// The parameter
    pub weight: &'a mut Tensor,
    /// Its gradient
    pub gradient: &'a Tensor,
    /// Its state, of its shape and type
    pub states: Vec<&'a mut Tensor>,
}

/// What became of a step.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Stepped {
    /// Everything was updated
    Done {
        /// Euclidean norm of all gradients before clipping
        norm: f64,
        /// Factor that they were multiplied with
        clip: f64,
    },
    /// Nothing was updated: the gradient of the update of this number is not finite
    NotFinite(usize),
}

/// What [`send`] has asked for.
#[derive(Debug)]
pub enum Outcome {
    /// It is done.
    Known(Stepped),
    /// A GPU will do it.
    Coming(Coming),
}

impl Outcome {
    /// What became of it, which is waited for.
    ///
    /// # Errors
    /// What failed on a GPU.
    pub fn wait(self) -> Result<Stepped> {
        match self {
            Outcome::Known(stepped) => Ok(stepped),
            Outcome::Coming(coming) => coming.wait(),
        }
    }
}

/// The factor that brings a norm down to `most`: PyTorch's clip_grad_norm_, with its guard against a
/// division by zero.
pub(super) fn clip(norm: f64, most: Option<f64>) -> f64 {
    most.map_or(1.0, |most| (most / (norm + 1e-6)).min(1.0))
}

/// [`send`], and what became of it.
///
/// # Errors
/// As there; what failed on a GPU.
pub fn step(
    updates: &mut [Update<'_>],
    max_norm: Option<f64>,
    tables: &mut Tables,
) -> Result<Stepped> {
    send(updates, max_norm, tables)?.wait()
}

/// Updates many parameters. With `max_norm`, gradients are first scaled so that their global norm is
/// at most that. A GPU does it in one go ([`Tables`]), when it gets there: nobody waits for it here.
///
/// # Errors
/// Shapes or types that differ, or a tensor that is shared.
pub fn send(
    updates: &mut [Update<'_>],
    max_norm: Option<f64>,
    tables: &mut Tables,
) -> Result<Outcome> {
    let Some(first) = updates.first() else {
        let (norm, clip) = (0.0, clip(0.0, max_norm));
        return Ok(Outcome::Known(Stepped::Done { norm, clip }));
    };
    let memory = first.weight.memory().with(Category::Workspace);
    match memory.gpu() {
        Some(on) => tables.send((&memory, on), updates, max_norm),
        None => update(updates, max_norm).map(Outcome::Known),
    }
}

/// [`send`] on the CPU.
fn update(updates: &mut [Update<'_>], max_norm: Option<f64>) -> Result<Stepped> {
    let mut squares = 0.0;
    for (number, update) in updates.iter().enumerate() {
        let sum = sum_squares(update.gradient)?;
        // A sum of squares can overflow f32 and f64 alike without any element being infinite.
        if !sum.is_finite() && !all_finite(update.gradient)? {
            return Ok(Stepped::NotFinite(number));
        }
        squares += sum;
    }
    let norm = squares.sqrt();
    let clip = clip(norm, max_norm);
    for update in updates {
        let (weight, gradient) = (&mut *update.weight, update.gradient);
        match (update.rule, &mut update.states[..]) {
            (Rule::AdamW(p), [m, v]) => {
                let grad_scale = clip;
                adamw(&AdamW { grad_scale, ..p }, weight, gradient, m, v)?;
            }
            (Rule::Sgd(p), states @ ([] | [_])) => {
                let grad_scale = clip;
                let velocity = states.first_mut().map(|v| &mut **v);
                sgd(&Sgd { grad_scale, ..p }, weight, gradient, velocity)?;
            }
            (rule, states) => return Err(wrong_states(rule, states.len())),
        }
    }
    Ok(Stepped::Done { norm, clip })
}

pub(super) fn wrong_states(rule: Rule, states: usize) -> Error {
    Error::argument("optimizer", format!("{rule:?} with {states} states"))
}

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
    if memory.gpu().is_some() {
        return single(&memory, Rule::AdamW(*p), weight, &gradient, vec![m, v]);
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
    if memory.gpu().is_some() {
        let states = velocity.into_iter().collect();
        return single(&memory, Rule::Sgd(*p), weight, &gradient, states);
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
    if x.is_on_device() {
        return squares_on_gpu(x.memory(), &x);
    }
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
    if x.is_on_device() {
        // In double precision, no sum of squares of what is finite overflows.
        return Ok(squares_on_gpu(x.memory(), &x)?.is_finite());
    }
    with_float!("finite", x.dtype(), T => Ok(kernel::all_finite(x.slice::<T>()?)))
}
