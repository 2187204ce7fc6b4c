//! Results that are computed again instead of kept: those of operations that need one pass over
//! what their own backward keeps anyway (T. Chen et al., "Training Deep Nets with Sublinear Memory
//! Cost", 2016, of the cheap operations alone).

use graft_tensor::{Memory, Tensor, ops, ops::norm};

use crate::backward::Saved;
use crate::error::Result;
use crate::op::Op;

/// The result of an operation for which [`Op::can_rebuild`] holds, from what it kept: the same bits.
pub(crate) fn rebuild(m: &Memory, op: &Op, saved: &Saved) -> Result<Tensor> {
    Ok(match op {
        Op::Linear { linear, .. } => {
            let kind = linear.activation.expect("can_rebuild asks for one");
            ops::activation(m, kind, &saved.extras[0])?
        }
        Op::Lora { lora, .. } => {
            let kind = lora.linear.activation.expect("can_rebuild asks for one");
            ops::activation(m, kind, &saved.extras[0])?
        }
        Op::Glu(kind) => ops::glu(m, *kind, saved.input(0), saved.input(1))?,
        Op::Unary(kind) => ops::unary(m, *kind, saved.input(0))?,
        Op::LayerNorm {
            eps,
            residual,
            weight,
            bias,
            ..
        } => {
            let at_weight = 1 + usize::from(*residual);
            let s = saved.extras.get(2).unwrap_or_else(|| saved.input(0));
            let weight = weight.then(|| saved.input(at_weight));
            let at_bias = at_weight + usize::from(weight.is_some());
            let bias = bias.then(|| saved.input(at_bias));
            norm::layer_norm(m, s, None, weight, bias, *eps, false)?.y
        }
        Op::RmsNorm {
            eps,
            offset,
            residual,
        } => {
            let s = saved.extras.get(1).unwrap_or_else(|| saved.input(0));
            let weight = saved.input(1 + usize::from(*residual));
            norm::rms_norm(m, s, None, weight, *offset, *eps, false)?.y
        }
        other => unreachable!("Op::can_rebuild denies it for {:?}", other.kind()),
    })
}
