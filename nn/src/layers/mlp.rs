//! The feed-forward block.

use graft_autograd::Var;
use graft_tensor::ops::Activation;

use super::Linear;
use crate::error::Result;
use crate::forward::Forward;

/// `down(activation(up(x)))`.
#[derive(Clone, Debug)]
pub struct Mlp {
    /// `[hidden]` to `[intermediate]`
    pub up: Linear,
    /// `[intermediate]` to `[hidden]`
    pub down: Linear,
    /// Between the two
    pub activation: Activation,
}

impl Mlp {
    /// `x [tokens, hidden]` to `[tokens, hidden]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, f: &mut Forward, x: &Var) -> Result<Var> {
        let inner = self.up.activated(f, x, self.activation)?; // [tokens, intermediate]
        self.down.forward(f, &inner)
    }
}
