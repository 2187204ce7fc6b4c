//! Normalisation layers, with the residual sum that precedes them fused.

use graft_autograd::Var;

use crate::error::Result;
use crate::forward::Forward;
use crate::parameters::{Init, ParamId, Parameters};

/// Layer norm with weight and bias.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: ParamId,
    bias: ParamId,
    eps: f64,
}

impl LayerNorm {
    /// Declares `NAME.weight [width]` as ones and `NAME.bias [width]` as zeros.
    ///
    /// # Errors
    /// A name that is taken.
    pub fn new(p: &mut Parameters, name: &str, width: usize, eps: f64) -> Result<LayerNorm> {
        Ok(LayerNorm {
            weight: p.declare(&format!("{name}.weight"), &[width], Init::Ones)?,
            bias: p.declare(&format!("{name}.bias"), &[width], Init::Zeros)?,
            eps,
        })
    }

    /// The norm of `x + residual`, each `[.., width]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, f: &mut Forward, x: &Var, residual: Option<&Var>) -> Result<Var> {
        self.run(f, x, 0.0, residual)
    }

    /// The norm of `dropout(x) + residual` in training, of `x + residual` otherwise; each `[.., width]`.
    ///
    /// # Errors
    /// Shapes that do not fit, a probability outside `[0, 1)`.
    pub fn dropped(
        &self,
        f: &mut Forward,
        x: &Var,
        dropout: f64,
        residual: Option<&Var>,
    ) -> Result<Var> {
        let dropout = if f.is_training() { dropout } else { 0.0 };
        self.run(f, x, dropout, residual)
    }

    fn run(&self, f: &mut Forward, x: &Var, dropout: f64, residual: Option<&Var>) -> Result<Var> {
        let (weight, bias) = (f.parameter(self.weight)?, f.parameter(self.bias)?);
        let y = f.tape.layer_norm_dropped(
            x,
            dropout,
            residual,
            Some(&weight),
            Some(&bias),
            self.eps,
        )?;
        Ok(y)
    }
}

/// RMS norm with a weight.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: ParamId,
    eps: f64,
    offset: f64,
}

impl RmsNorm {
    /// Declares `NAME.weight [width]` as ones.
    ///
    /// # Errors
    /// A name that is taken.
    pub fn new(p: &mut Parameters, name: &str, width: usize, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm {
            weight: p.declare(&format!("{name}.weight"), &[width], Init::Ones)?,
            eps,
            offset: 0.0,
        })
    }

    /// The same with weights that are stored less one, as Gemma's are; declared as zeros.
    ///
    /// # Errors
    /// A name that is taken.
    pub fn with_unit_offset(
        p: &mut Parameters,
        name: &str,
        width: usize,
        eps: f64,
    ) -> Result<RmsNorm> {
        Ok(RmsNorm {
            weight: p.declare(&format!("{name}.weight"), &[width], Init::Zeros)?,
            eps,
            offset: 1.0,
        })
    }

    /// The norm of `x + residual`, each `[.., width]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(&self, f: &mut Forward, x: &Var, residual: Option<&Var>) -> Result<Var> {
        let weight = f.parameter(self.weight)?;
        let y = f
            .tape
            .rms_norm(x, residual, &weight, self.offset, self.eps)?;
        Ok(y)
    }
}
