//! The linear layer.

use graft_autograd::Var;
use graft_tensor::ops::{self, Activation, WeightLayout};

use crate::error::Result;
use crate::forward::Forward;
use crate::parameters::{Init, ParamId, Parameters, Role};

/// `activation(x·w + bias)`: `[.., inputs]` to `[.., outputs]`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: ParamId,
    bias: Option<ParamId>,
    layout: WeightLayout,
}

impl Linear {
    /// Declares `NAME.weight [outputs, inputs]` and `NAME.bias [outputs]`, normal with standard
    /// deviation `std` and zero.
    ///
    /// # Errors
    /// A name that is taken.
    pub fn new(
        p: &mut Parameters,
        name: &str,
        inputs: usize,
        outputs: usize,
        std: f64,
    ) -> Result<Linear> {
        let bias = Some(outputs);
        Linear::declare(p, name, [outputs, inputs], bias, WeightLayout::OutIn, std)
    }

    /// Declares `NAME.weight [outputs, inputs]` alone.
    ///
    /// # Errors
    /// A name that is taken.
    pub fn without_bias(
        p: &mut Parameters,
        name: &str,
        inputs: usize,
        outputs: usize,
        std: f64,
    ) -> Result<Linear> {
        Linear::declare(p, name, [outputs, inputs], None, WeightLayout::OutIn, std)
    }

    /// Declares GPT-2's Conv1D: `NAME.weight [inputs, outputs]` and `NAME.bias [outputs]`.
    ///
    /// # Errors
    /// A name that is taken.
    pub fn conv1d(
        p: &mut Parameters,
        name: &str,
        inputs: usize,
        outputs: usize,
        std: f64,
    ) -> Result<Linear> {
        let bias = Some(outputs);
        Linear::declare(p, name, [inputs, outputs], bias, WeightLayout::InOut, std)
    }

    fn declare(
        p: &mut Parameters,
        name: &str,
        shape: [usize; 2],
        bias: Option<usize>,
        layout: WeightLayout,
        std: f64,
    ) -> Result<Linear> {
        let weight = p.declare(&format!("{name}.weight"), &shape, Init::Normal(std))?;
        p.set_role(weight, Role::Linear(layout));
        let bias = bias
            .map(|outputs| p.declare(&format!("{name}.bias"), &[outputs], Init::Zeros))
            .transpose()?;
        Ok(Linear {
            weight,
            bias,
            layout,
        })
    }

    /// The weight's number.
    pub fn weight(&self) -> ParamId {
        self.weight
    }

    /// The bias' number.
    pub fn bias(&self) -> Option<ParamId> {
        self.bias
    }

    /// `x·w + bias`.
    ///
    /// # Errors
    /// An input whose last dimension is not `inputs`.
    pub fn forward(&self, f: &mut Forward, x: &Var) -> Result<Var> {
        self.run(f, x, None)
    }

    /// `activation(x·w + bias)`, fused.
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn activated(&self, f: &mut Forward, x: &Var, activation: Activation) -> Result<Var> {
        self.run(f, x, Some(activation))
    }

    /// The keys and values of the prefix in use that stands beside this layer, which makes a text's keys: each
    /// `[tokens, width]`, in the parameters' type.
    ///
    /// # Errors
    /// A parameter without a value.
    pub fn prefix(&self, f: &mut Forward) -> Result<Option<[Var; 2]>> {
        match f.adapter(self.weight) {
            Some(adapter) => adapter.prefix(f),
            None => Ok(None),
        }
    }

    fn run(&self, f: &mut Forward, x: &Var, activation: Option<Activation>) -> Result<Var> {
        let weight = f.parameter(self.weight)?;
        let bias = self.bias.map(|id| f.parameter(id)).transpose()?;
        if let Some(adapter) = f.adapter(self.weight) {
            let linear = ops::Linear {
                layout: self.layout,
                activation,
            };
            return adapter.linear(f, x, &weight, bias.as_ref(), linear);
        }
        let y = f
            .tape
            .linear(x, &weight, bias.as_ref(), self.layout, activation)?;
        Ok(y)
    }
}
