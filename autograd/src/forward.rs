//! What each operation computes: one exhaustive match.

use graft_tensor::ops::{self, attention::Attention, loss, norm, norm::Dropout, random::Key, rope};
use graft_tensor::{Memory, Tensor};

use crate::error::Result;
use crate::op::Op;

/// Where the random numbers of a step come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Randomness {
    pub seed: u64,
    pub step: u64,
}

impl Randomness {
    pub fn key(self, stream: u64) -> Key {
        Key::new(self.seed, self.step, stream)
    }

    /// The dropout of that stream, if there is one.
    pub fn dropout(self, p: f64, stream: u64) -> Option<Dropout> {
        let key = self.key(stream);
        (p != 0.0).then_some(Dropout { p, key })
    }

    pub fn attention(self, attention: &Attention, stream: u64) -> Attention {
        Attention {
            key: self.key(stream),
            ..*attention
        }
    }
}

/// Computes `op`: its result, and what it computed beside it that its backward reads (only if
/// `extras`), for those of its inputs whose gradients it `needs`.
pub(crate) fn forward(
    m: &Memory,
    random: Randomness,
    op: &Op,
    x: &[&Tensor],
    needs: &[bool],
    extras: bool,
) -> Result<(Tensor, Vec<Tensor>)> {
    let plain = |value: Tensor| (value, Vec::new());
    Ok(match op {
        Op::Leaf | Op::Detach => plain(x[0].clone()),
        Op::Linear { linear, bias } => {
            let bias = bias.then(|| x[2]);
            let (y, pre) = ops::linear(m, linear, x[0], x[1], bias, extras)?;
            (y, pre.into_iter().collect())
        }
        Op::Lora { lora, bias, stream } => {
            let (bias, at) = match bias {
                true => (Some(x[2]), 3),
                false => (None, 2),
            };
            let adapter = [x[at], x[at + 1]];
            let key = random.key(*stream);
            ops::lora(m, lora, x[0], x[1], bias, adapter, key, extras)?
        }
        Op::MatMul => plain(ops::matmul(m, x[0], x[1])?),
        Op::Binary(kind) => plain(ops::binary(m, *kind, x[0], x[1])?),
        Op::Affine { scale, shift } => plain(ops::affine(m, x[0], *scale, *shift)?),
        Op::Unary(kind) => plain(ops::unary(m, *kind, x[0])?),
        Op::Glu(kind) => plain(ops::glu(m, *kind, x[0], x[1])?),
        Op::Reduce { kind, axis, keep } => plain(ops::reduce(m, *kind, x[0], *axis, *keep)?),
        Op::SumAll => plain(loss::sum_all(m, x[0])?),
        Op::ArgMax => plain(ops::argmax(m, x[0])?),
        Op::Reshape(shape) => plain(x[0].contiguous(m)?.reshape(shape)?),
        Op::Permute(order) => plain(x[0].permute(order)?),
        Op::Narrow {
            axis,
            start,
            length,
        } => plain(x[0].narrow(*axis, *start, *length)?),
        Op::Expand(shape) => plain(x[0].expand(shape)?),
        Op::Concat { axis } => plain(ops::concat(m, x, *axis)?),
        Op::GatherRows => plain(ops::gather_rows(m, x[0], x[1])?),
        Op::LayerNorm {
            eps,
            dropout,
            stream,
            residual,
            weight,
            bias,
        } => {
            let dropout = random.dropout(*dropout, *stream);
            let mut rest = x[1..].iter().copied();
            let mut next = |there: bool| if there { rest.next() } else { None };
            let (residual, weight, bias) = (next(*residual), next(*weight), next(*bias));
            let n =
                norm::layer_norm_dropped(m, x[0], dropout, residual, weight, bias, *eps, extras)?;
            let kept = n.mean.into_iter().chain([n.scale]).chain(n.sum);
            (n.y, if extras { kept.collect() } else { Vec::new() })
        }
        Op::RmsNorm {
            eps,
            offset,
            residual,
        } => {
            let sum = residual.then(|| x[1]);
            let weight = x[1 + usize::from(*residual)];
            let n = norm::rms_norm(m, x[0], sum, weight, *offset, *eps, extras)?;
            let kept = [n.scale].into_iter().chain(n.sum);
            (n.y, if extras { kept.collect() } else { Vec::new() })
        }
        Op::L2Normalize { eps } => {
            let n = norm::l2_normalize(m, x[0], *eps)?;
            (n.y, vec![n.scale])
        }
        Op::Softmax { log } => plain(norm::softmax(m, x[0], *log)?),
        Op::Attention { attention, stream } => {
            let p = random.attention(attention, *stream);
            let (y, lse) = ops::attention(m, &p, x[0], x[1], x[2], x[3])?;
            (y, vec![lse])
        }
        Op::Rope(p) => plain(rope::rope(m, p, x[0], x[1], x[2], x[3], false)?),
        Op::Dropout { p, stream } => plain(ops::dropout(m, x[0], *p, random.key(*stream))?),
        Op::Pool(kind) => plain(ops::pool(m, *kind, x[0], x[1])?),
        Op::CrossEntropy { smoothing } => {
            let (sum, lse) = loss::cross_entropy(m, x[0], x[1], *smoothing)?;
            (sum, vec![lse])
        }
        Op::LinearCrossEntropy {
            smoothing,
            cap,
            bias,
        } => {
            let (bias, targets) = if *bias {
                (Some(x[2]), x[3])
            } else {
                (None, x[2])
            };
            let need = |i: usize| extras && needs[i];
            let wanted = [need(0), need(1), bias.is_some() && need(2)];
            loss::linear_cross_entropy(m, x[0], x[1], bias, targets, *smoothing, *cap, wanted)?
        }
        Op::BceWithLogits => plain(loss::bce_with_logits(m, x[0], x[1])?),
        Op::Cast(to) => plain(ops::cast(m, x[0], *to)?),
    })
}
