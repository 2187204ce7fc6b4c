//! The walk over the nodes, last one first, that leads gradients to the parameters. The rule of each operation is in
//! `autograd/src/backward.rs`.

use std::collections::HashMap;

use graft_tensor::ops::Activation;
use graft_tensor::{Device, Tensor};

use super::{Tape, Var};
use crate::backward::{Around, Saved, backward};
use crate::error::{Error, Result};
use crate::gradients::Gradients;
use crate::op::Op;
use crate::pending::Pending;
use crate::rebuild::rebuild;

impl Tape {
    /// Adds the gradients of the scalar `loss` to `gradients`. What was saved is freed on the way.
    ///
    /// # Errors
    /// A loss that is no scalar or depends on nothing trainable; a second call on one recording.
    pub fn backward(&mut self, loss: &Var, gradients: &mut Gradients) -> Result<()> {
        if loss.value.count() != 1 {
            return Err(Error::NotScalar {
                shape: *loss.shape(),
            });
        }
        let one = Tensor::full(&self.memory, loss.value.dtype(), loss.shape(), 1.0)?;
        self.backward_from(loss, one, gradients)
    }

    /// As [`Tape::backward`], from any value and a given gradient of it.
    ///
    /// # Errors
    /// A gradient of another shape, and as [`Tape::backward`].
    pub fn backward_from(
        &mut self,
        from: &Var,
        gradient: Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if self.reached.is_some() {
            return Err(Error::Consumed);
        }
        if gradient.shape() != from.shape() {
            return Err(graft_tensor::Error::shape(
                "backward",
                "the gradient",
                gradient.shape(),
                from.shape(),
            )
            .into());
        }
        if !self.needs_gradient(from) {
            return Err(Error::NothingTrainable);
        }
        self.reached = Some(from.node);
        let mut pending: Vec<Option<Pending>> = Vec::new();
        pending.resize_with(from.node + 1, || None);
        pending[from.node] = Some(Pending::Whole(gradient));
        let mut rebuilt = HashMap::new();
        for i in (0..=from.node).rev() {
            self.reach(i)?;
            rebuilt.remove(&i);
            let mut saved = std::mem::take(&mut self.nodes[i].saved);
            let Some(dy) = pending[i].take() else {
                continue;
            };
            let dy = dy.whole(&self.memory)?;
            let node = &self.nodes[i];
            self.complete(&node.inputs, &mut saved, &mut rebuilt)?;
            // Kept only while another node, of which there are few in between, still reads it.
            rebuilt.retain(|&k, _| {
                let later = &self.nodes[k + 1..i];
                later.iter().any(|n| n.saved.rebuilds(&n.inputs, k))
            });
            if node.op == Op::Leaf {
                if let Some(parameter) = &node.parameter {
                    gradients.add(parameter.key, dy)?;
                }
                continue;
            }
            let inputs = || node.inputs.iter().map(|&k| &self.nodes[k]);
            let around = Around {
                shapes: &inputs().map(|n| n.shape).collect::<Vec<_>>(),
                dtypes: &inputs().map(|n| n.dtype).collect::<Vec<_>>(),
                needs: &self.needs(&node.inputs),
                parameters: &inputs().map(|n| n.parameter.is_some()).collect::<Vec<_>>(),
            };
            let (m, random) = (&self.memory, self.random);
            let sum = match node.inputs.first() {
                Some(&first) if node.op.adds() && self.nodes[first].needs_gradient => {
                    pending[first].take().map(|sum| sum.whole(m)).transpose()?
                }
                _ => None,
            };
            let through = match sum {
                None => self.activation_before(i, &saved, &pending),
                Some(_) => None,
            };
            let sloped = through.is_some().then(|| node.inputs[0]);
            let parts = backward(m, random, &node.op, &mut saved, dy, sum, through, &around)?;
            drop(saved);
            debug_assert_eq!(parts.len(), node.inputs.len(), "{:?}", node.op);
            for (&input, part) in node.inputs.iter().zip(parts) {
                let Some(part) = part.filter(|_| self.nodes[input].needs_gradient) else {
                    continue;
                };
                let (sum, shape) = (pending[input].take(), &self.nodes[input].shape);
                pending[input] = Some(Pending::add(m, sum, &node.op, part, shape)?);
            }
            if let Some(k) = sloped {
                self.nodes[k].saved.sloped = true;
            }
        }
        Ok(())
    }

    /// Computes again what `saved`, of the node that reads `inputs`, was kept without. `rebuilt`
    /// holds results until the node that they belong to is reached.
    fn complete(
        &self,
        inputs: &[usize],
        saved: &mut Saved,
        rebuilt: &mut HashMap<usize, Tensor>,
    ) -> Result<()> {
        for i in std::mem::take(&mut saved.rebuilt) {
            let number = inputs[i];
            if !rebuilt.contains_key(&number) {
                let node = &self.nodes[number];
                let mut kept = node.saved.clone();
                self.complete(&node.inputs, &mut kept, rebuilt)?;
                rebuilt.insert(number, rebuild(&self.memory, &node.op, &kept)?);
            }
            saved.inputs[i] = rebuilt.get(&number).cloned();
        }
        Ok(())
    }

    /// Where linear layer `i` alone reads the activation that another one ends with: that activation and what it
    /// was applied to. On a GPU the product that makes the gradient goes through it.
    fn activation_before(
        &self,
        i: usize,
        saved: &Saved,
        pending: &[Option<Pending>],
    ) -> Option<(Activation, Tensor)> {
        let node = &self.nodes[i];
        let k = *node.inputs.first()?;
        let before = &self.nodes[k];
        let (Op::Linear { .. }, Op::Linear { linear, .. }) = (&node.op, &before.op) else {
            return None;
        };
        let weight = saved.inputs[1].as_ref()?;
        let alone = pending[k].is_none()
            && self.nodes[k + 1..i].iter().all(|n| !n.inputs.contains(&k))
            && !node.inputs[1..].contains(&k);
        let possible = self.memory.device() != Device::Cpu && !weight.dtype().is_quantised();
        let pre = before.saved.extras.first()?;
        let kind = linear.activation?;
        (alone && possible && before.needs_gradient).then(|| (kind, pre.clone()))
    }
}
