//! The feed-forward blocks.

use graft_autograd::Var;
use graft_tensor::ops::{Activation, Glu};

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

/// `down(activation(gate(x)) * up(x))` (Shazeer, 2020).
#[derive(Clone, Debug)]
pub struct GatedMlp {
    /// `[hidden]` to `[intermediate]`
    pub gate: Linear,
    /// `[hidden]` to `[intermediate]`
    pub up: Linear,
    /// `[intermediate]` to `[hidden]`
    pub down: Linear,
    /// What the gate goes through
    pub activation: Glu,
}

impl GatedMlp {
    /// `x [tokens, hidden]` to `[tokens, hidden]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, f: &mut Forward, x: &Var) -> Result<Var> {
        let gate = self.gate.forward(f, x)?; // [tokens, intermediate]
        let up = self.up.forward(f, x)?;
        let inner = f.tape.glu(self.activation, &gate, &up)?;
        drop((gate, up));
        self.down.forward(f, &inner)
    }
}
