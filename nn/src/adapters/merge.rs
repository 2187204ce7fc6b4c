//! Folds an adapter into the weights of its base.

use graft_tensor::Tensor;
use graft_tensor::ops::{self, Binary, Reduce, Unary};

use super::init::{in_f64, out_by_in, set_out_by_in};
use super::{Adapter, LowRank, Scaling};
use crate::error::{Error, Result};
use crate::parameters::{ParamId, Parameters, Role};

/// Folds the adapter in use into the weights, in f64 with one rounding at the end, and takes none into use: the base
/// then computes by itself what base and adapter did. A weight that was held in a short type, or as codes, is then held
/// in the parameters' own.
///
/// # Errors
/// Parameters without values; an adapter that no weight can hold ([`Method::unmergeable`]).
///
/// [`Method::unmergeable`]: super::Method::unmergeable
pub fn merge(p: &mut Parameters) -> Result<()> {
    let Some(set) = p.adapters().active() else {
        return Ok(());
    };
    if let Some(why) = set.config().method.unmergeable() {
        let what = format!(
            "{} cannot be merged: {why}; use it beside its base",
            set.name()
        );
        return Err(Error::Adapter { what });
    }
    let layers: Vec<(ParamId, Adapter)> = set
        .layers()
        .map(|(id, adapter)| (id, adapter.clone()))
        .collect();
    let copies: Vec<(ParamId, ParamId)> = set.copies().collect();
    // Biases that the adapter has of its own are scaled too.
    for (base, copy) in copies {
        let value = p.value(copy)?.clone();
        p.replace(base, value)?;
    }
    for (weight, adapter) in layers {
        // What is added is smaller than what short types round away.
        let whole = p.dtype();
        if p.get(weight).held().is_some() {
            p.hold(weight, whole)?;
        }
        match adapter {
            Adapter::LowRank(adapter) => {
                let mut w = changed_weight(p, weight, &adapter)?;
                if let Some(magnitude) = adapter.magnitude {
                    let m = p.memory().on_cpu();
                    let lengths = in_f64(p, magnitude)?;
                    let factors = ops::binary(&m, Binary::Div, &lengths, &row_lengths(&w)?)?;
                    let factors = factors.reshape(&[factors.count(), 1])?;
                    w = ops::binary(&m, Binary::Mul, &w, &factors)?;
                }
                match p.get(weight).role() {
                    Role::Embedding => p.set(weight, w)?,
                    _ => set_out_by_in(p, weight, w)?,
                }
            }
            Adapter::Scaling(adapter) => scale(p, weight, &adapter)?,
            // Refused above.
            Adapter::Bottleneck(_) | Adapter::Prompt(_) | Adapter::Prefix(_) => {}
        }
    }
    p.adapters_mut().activate(None)
}

/// `w + scale * b·a` in f64, in this machine's memory: `[out, in]`, or an embedding's `[rows, width]`.
pub(super) fn changed_weight(p: &Parameters, weight: ParamId, l: &LowRank) -> Result<Tensor> {
    let m = &p.memory().on_cpu();
    let (a, b) = (in_f64(p, l.a)?, in_f64(p, l.b)?);
    let change = ops::affine(m, &ops::matmul(m, &b, &a)?, l.scale, 0.0)?;
    let (w, change) = match p.get(weight).role() {
        Role::Embedding => {
            let w = in_f64(p, weight)?;
            (w, change.t()?)
        }
        _ => (out_by_in(p, weight)?, change),
    };
    Ok(ops::binary(m, Binary::Add, &w, &change)?)
}

/// The length of each row of `w [rows, columns]`, `[rows]`.
pub(super) fn row_lengths(w: &Tensor) -> Result<Tensor> {
    let m = w.memory().clone();
    let squares = ops::unary(&m, Unary::Square, w)?;
    let sums = ops::reduce(&m, Reduce::Sum, &squares, 1, false)?;
    Ok(ops::unary(&m, Unary::Sqrt, &sums)?)
}

/// Folds factors into a weight, and into the bias where they are the outputs'.
fn scale(p: &mut Parameters, weight: ParamId, adapter: &Scaling) -> Result<()> {
    let m = p.memory().on_cpu();
    let factors = in_f64(p, adapter.factors)?;
    let w = out_by_in(p, weight)?;
    // [out, 1] or [1, in], as they are stored
    let w = ops::binary(&m, Binary::Mul, &w, &factors)?;
    set_out_by_in(p, weight, w)?;
    let name = p.get(weight).name();
    let bias = name.strip_suffix("weight").map(|at| format!("{at}bias"));
    let bias = bias.and_then(|bias| p.lookup(&bias));
    if let Some(bias) = bias.filter(|_| !adapter.input) {
        let value = in_f64(p, bias)?;
        let factors = factors.reshape(&[factors.count()])?;
        let value = ops::binary(&m, Binary::Mul, &value, &factors)?;
        p.set(bias, value)?;
    }
    Ok(())
}
