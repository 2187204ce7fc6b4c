//! Self-attention with its four projections.

use graft_autograd::Var;
use graft_tensor::ops::Attention;

use super::Linear;
use crate::adapters::attend;
use crate::error::Result;
use crate::forward::Forward;

/// Multi-head self-attention within each packed sequence.
#[derive(Clone, Debug)]
pub struct SelfAttention {
    /// Projection to the queries
    pub query: Linear,
    /// Projection to the keys
    pub key: Linear,
    /// Projection to the values
    pub value: Linear,
    /// Projection of the heads' outputs
    pub output: Linear,
    /// Heads, masks, scale; dropout of the weights, in training and unless query, key and value are
    /// all frozen
    pub attention: Attention,
}

impl SelfAttention {
    /// `x [tokens, hidden]` and `offsets i64 [sequences + 1]` to `[tokens, hidden]`.
    ///
    /// # Errors
    /// Shapes or offsets that do not fit.
    pub fn forward(&self, f: &mut Forward, x: &Var, offsets: &Var) -> Result<Var> {
        let q = self.query.forward(f, x)?;
        let k = self.key.forward(f, x)?;
        let v = self.value.forward(f, x)?;
        let prefix = self.key.prefix(f)?;
        let trained = [&q, &k, &v]
            .into_iter()
            .chain(prefix.iter().flatten())
            .any(|x| f.tape.needs_gradient(x));
        let dropout = if f.is_training() && trained {
            self.attention.dropout
        } else {
            0.0
        };
        let attention = Attention {
            dropout,
            ..self.attention
        };
        let heads = attend(f, &attention, [&q, &k, &v], offsets, prefix.as_ref())?;
        drop((q, k, v, prefix));
        self.output.forward(f, &heads)
    }
}
