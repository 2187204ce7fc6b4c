//! The gradients of a step, by parameter.

use std::collections::BTreeMap;

use graft_tensor::{Category, Tensor, ops};

use crate::error::{Error, Result};

/// Gradients by the key that a parameter was put on the tape with. Adds up over several backward
/// passes, which is how a step is split into micro-batches.
#[derive(Default, Debug)]
pub struct Gradients {
    by_key: BTreeMap<usize, Tensor>,
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Gradients {
        Gradients::default()
    }

    /// The gradient of a parameter, if it received one.
    pub fn get(&self, key: usize) -> Option<&Tensor> {
        self.by_key.get(&key)
    }

    /// Takes a gradient out.
    pub fn take(&mut self, key: usize) -> Option<Tensor> {
        self.by_key.remove(&key)
    }

    /// Keys and gradients, by rising key.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Tensor)> {
        self.by_key.iter().map(|(&key, tensor)| (key, tensor))
    }

    /// The number of parameters that have a gradient.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// True if no parameter has a gradient.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Adds to the gradient of parameter `key`.
    pub(crate) fn add(&mut self, key: usize, gradient: Tensor) -> Result<()> {
        let sum = match self.by_key.remove(&key) {
            Some(sum) => add(sum, gradient)?,
            None => gradient,
        };
        // What is part of something else would keep all of that.
        let sum = match sum.is_whole() {
            true => sum,
            false => sum.copy(sum.memory())?,
        };
        self.by_key.insert(key, sum.recount(Category::Gradients)?);
        Ok(())
    }

    /// Checks that each of the trainable parameters has a gradient.
    ///
    /// # Errors
    /// [`Error::NoGradient`] with the names of those that have none.
    pub fn require<'a>(&self, trainable: impl Iterator<Item = (usize, &'a str)>) -> Result<()> {
        let names: Vec<String> = trainable
            .filter(|(key, _)| !self.by_key.contains_key(key))
            .map(|(_, name)| name.to_owned())
            .collect();
        if names.is_empty() {
            Ok(())
        } else {
            Err(Error::NoGradient { names })
        }
    }
}

/// The sum of two gradients, in the first one's storage if nothing else shares it.
pub(crate) fn add(mut sum: Tensor, gradient: Tensor) -> Result<Tensor> {
    if sum.is_unique() && sum.is_contiguous() {
        ops::elementwise::add_assign(&mut sum, &gradient)?;
        return Ok(sum);
    }
    if gradient.is_unique() && gradient.is_contiguous() {
        let mut gradient = gradient;
        ops::elementwise::add_assign(&mut gradient, &sum)?;
        return Ok(gradient);
    }
    let memory = sum.memory().clone();
    Ok(ops::binary(&memory, ops::Binary::Add, &sum, &gradient)?)
}
