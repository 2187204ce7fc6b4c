//! One forward pass: a tape, the parameters, and which of them are trained.

use graft_autograd::{Gradients, Tape, Var};
use graft_tensor::{DType, Memory, Tensor};

use crate::adapters::{Adapter, Adapters};
use crate::error::Result;
use crate::parameters::{ParamId, Parameters};
use crate::trainable::TrainableSet;

/// What layers compute with.
pub struct Forward<'a> {
    /// The recording
    pub tape: Tape,
    parameters: &'a Parameters,
    trainable: Option<&'a TrainableSet>,
}

impl<'a> Forward<'a> {
    /// A training pass: dropout is on, and gradients are recorded for `trainable`.
    pub fn train(
        parameters: &'a Parameters,
        trainable: &'a TrainableSet,
        seed: u64,
        step: u64,
    ) -> Forward<'a> {
        Forward {
            tape: Tape::new(parameters.memory(), seed, step),
            parameters,
            trainable: Some(trainable),
        }
    }

    /// An evaluation pass: no dropout, no gradients, nothing recorded.
    pub fn evaluate(parameters: &'a Parameters) -> Forward<'a> {
        Forward {
            tape: Tape::evaluation(parameters.memory()),
            parameters,
            trainable: None,
        }
    }

    /// True in a training pass.
    pub fn is_training(&self) -> bool {
        self.trainable.is_some()
    }

    /// The allocator of the pass.
    pub fn memory(&self) -> &Memory {
        self.tape.memory()
    }

    /// The adapters beside the layers.
    pub fn adapters(&self) -> &'a Adapters {
        self.parameters.adapters()
    }

    /// What stands beside the layer of a weight, in the adapter in use.
    pub(crate) fn adapter(&self, weight: ParamId) -> Option<&'a Adapter> {
        self.parameters.adapters().of(weight)
    }

    /// A parameter on the tape: the one that an adapter in use has in its place, if it has one.
    ///
    /// # Errors
    /// A parameter without a value.
    pub fn parameter(&mut self, id: ParamId) -> Result<Var> {
        let id = self.parameters.adapters().in_place_of(id);
        let trained = self.trainable.is_some_and(|set| set.contains(id));
        let value = self.parameters.value(id)?;
        let name = self.parameters.get(id).name();
        Ok(self.tape.parameter(id.key(), name, value, trained))
    }

    /// `x` in the type of activations: where values of the parameters' type enter the network.
    ///
    /// # Errors
    /// A type that is no float.
    pub fn enter(&mut self, x: &Var) -> Result<Var> {
        self.cast(x, self.parameters.compute())
    }

    /// `x` in the parameters' type: where the network's values leave it, for a loss or to be kept.
    ///
    /// # Errors
    /// A type that is no float.
    pub fn leave(&mut self, x: &Var) -> Result<Var> {
        self.cast(x, self.parameters.dtype())
    }

    pub(crate) fn cast(&mut self, x: &Var, dtype: DType) -> Result<Var> {
        Ok(if x.value().dtype() == dtype {
            x.clone()
        } else {
            self.tape.cast(x, dtype)?
        })
    }

    /// A value that needs no gradient.
    pub fn input(&mut self, value: Tensor) -> Var {
        self.tape.input(value)
    }

    /// Dropout, in training only.
    ///
    /// # Errors
    /// A probability outside `[0, 1)`.
    pub fn dropout(&mut self, x: &Var, p: f64) -> Result<Var> {
        Ok(if self.is_training() {
            self.tape.dropout(x, p)?
        } else {
            x.clone()
        })
    }

    /// Adds the gradients of the scalar `loss` to `gradients`, and ends the pass.
    ///
    /// # Errors
    /// As [`Tape::backward`].
    pub fn backward(mut self, loss: Var, gradients: &mut Gradients) -> Result<()> {
        self.tape.backward(&loss, gradients)?;
        Ok(())
    }
}
