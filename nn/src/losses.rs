//! Losses as sums divided by a number that the caller gives: the supervised rows of the whole
//! optimizer step, so that a step does not depend on how it was split into micro-batches.

use graft_autograd::Var;
use graft_tensor::ops::Unary;

use crate::error::Result;
use crate::forward::Forward;

/// Cross-entropy of `logits [rows, classes]` against `targets i64 [rows]`, summed and divided by
/// `rows_of_step`.
///
/// # Errors
/// A target outside the classes.
pub fn cross_entropy(
    f: &mut Forward,
    logits: &Var,
    targets: &Var,
    smoothing: f64,
    rows_of_step: f64,
) -> Result<Var> {
    let sum = f.tape.cross_entropy(logits, targets, smoothing)?;
    Ok(f.tape.scale(&sum, 1.0 / rows_of_step)?)
}

/// Squared error of `x` against `targets` of the same shape, summed and divided by
/// `elements_of_step`.
///
/// # Errors
/// Shapes that differ.
pub fn mean_squared_error(
    f: &mut Forward,
    x: &Var,
    targets: &Var,
    elements_of_step: f64,
) -> Result<Var> {
    let distance = f.tape.sub(x, targets)?;
    let square = f.tape.unary(Unary::Square, &distance)?;
    let sum = f.tape.sum_all(&square)?;
    Ok(f.tape.scale(&sum, 1.0 / elements_of_step)?)
}

/// Binary cross-entropy of logits `x` against `targets` in `[0, 1]`, summed and divided by
/// `elements_of_step`.
///
/// # Errors
/// Shapes that differ.
pub fn binary_cross_entropy(
    f: &mut Forward,
    x: &Var,
    targets: &Var,
    elements_of_step: f64,
) -> Result<Var> {
    let sum = f.tape.bce_with_logits(x, targets)?;
    Ok(f.tape.scale(&sum, 1.0 / elements_of_step)?)
}
