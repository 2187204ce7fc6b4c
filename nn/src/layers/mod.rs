//! Layers: plain structs of parameter numbers, with a `forward` over a [`Forward`] pass.
//!
//! Activations are packed: `[tokens, hidden]` for a whole batch, with `offsets` where the sequences
//! begin; only [`SelfAttention`] sees those.

mod attention;
mod embedding;
mod linear;
mod mlp;
mod norm;

pub use attention::SelfAttention;
pub use embedding::Embedding;
pub use linear::Linear;
pub use mlp::{GatedMlp, Mlp};
pub use norm::{LayerNorm, RmsNorm};

#[cfg(doc)]
use crate::Forward;
