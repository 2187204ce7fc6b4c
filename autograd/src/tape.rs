//! The tape: a program that is executed as it is recorded, and walked backwards for gradients.
//!
//! A node holds an operation, the numbers of the nodes that it reads, and what its backward needs;
//! nothing else keeps a value alive but the [`Var`]s that the caller holds. What no needed gradient
//! reads is therefore freed the moment the caller lets go of it, and a frozen prefix saves nothing.
//! Of what one pass over kept tensors can compute again ([`Op::can_rebuild`]), nothing is kept either.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use graft_tensor::ops::Activation;
use graft_tensor::ops::attention::Attention;
use graft_tensor::{Category, DType, Device, Memory, Shape, Tensor};

use crate::backward::{Around, Saved, backward};
use crate::error::{Error, Result};
use crate::forward::{Randomness, forward};
use crate::gradients::Gradients;
use crate::op::Op;
use crate::pending::Pending;
use crate::rebuild::rebuild;

/// A value on a tape.
#[derive(Clone, Debug)]
pub struct Var {
    node: usize,
    value: Tensor,
}

impl Var {
    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The value's shape.
    pub fn shape(&self) -> &Shape {
        self.value.shape()
    }

    /// The number of the node that computed the value.
    pub fn node(&self) -> usize {
        self.node
    }
}

/// A parameter on the tape.
#[derive(Clone, Debug)]
struct Parameter {
    key: usize,
    label: Arc<str>,
}

struct Node {
    op: Op,
    inputs: Vec<usize>,
    shape: Shape,
    dtype: DType,
    needs_gradient: bool,
    parameter: Option<Parameter>,
    saved: Saved,
}

impl Node {
    /// True if the node's result can be computed again from what the node keeps.
    fn rebuilds(&self) -> bool {
        let Saved {
            inputs,
            rebuilt,
            extras,
            ..
        } = &self.saved;
        let keeps = !extras.is_empty() || !rebuilt.is_empty() || inputs.iter().any(Option::is_some);
        keeps && self.op.can_rebuild()
    }
}

/// A stretch of the program whose saved tensors are recomputed when backward reaches it.
struct Region {
    start: usize,
    end: usize,
    /// The nodes from before the region, and leaves within it, that its operations read
    externals: Vec<usize>,
    /// Their values, until backward has used them
    values: HashMap<usize, Tensor>,
}

impl Region {
    fn reads(&mut self, node: usize, value: &Tensor) {
        if self.values.insert(node, value.clone()).is_none() {
            self.externals.push(node);
        }
    }
}

/// Counts one read of a value, and frees it if that was the last.
fn release(node: usize, values: &mut HashMap<usize, Tensor>, reads: &mut HashMap<usize, usize>) {
    let left = reads.get_mut(&node).expect("every read was counted");
    *left -= 1;
    if *left == 0 {
        values.remove(&node);
    }
}

/// A recorded step; see the module's text.
pub struct Tape {
    nodes: Vec<Node>,
    regions: Vec<Region>,
    /// The region being recorded.
    open: Option<Region>,
    parameters: HashMap<usize, Var>,
    memory: Memory,
    random: Randomness,
    streams: u64,
    /// Results that can be rebuilt are not kept
    rebuilds: bool,
    /// Where backward started, once it has run
    reached: Option<usize>,
}

impl Tape {
    /// An empty tape. `seed` and `step` key its random numbers: the same two give the same dropout.
    pub fn new(memory: &Memory, seed: u64, step: u64) -> Tape {
        Tape {
            nodes: Vec::new(),
            regions: Vec::new(),
            open: None,
            parameters: HashMap::new(),
            memory: memory.with(Category::Activations),
            random: Randomness { seed, step },
            streams: 0,
            rebuilds: true,
            reached: None,
        }
    }

    /// The allocator of the tape's values.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Keeps every result that backward reads, also those that it could rebuild: more memory for
    /// a little less time. Gradients are the same to the bit. Holds for what is recorded from now on.
    pub fn keep_everything(&mut self) {
        self.rebuilds = false;
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// True if nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// True if a trainable parameter leads to the value.
    pub fn needs_gradient(&self, x: &Var) -> bool {
        self.nodes[x.node].needs_gradient
    }

    /// A value from outside that needs no gradient: token ids, offsets, cached features.
    pub fn input(&mut self, value: Tensor) -> Var {
        self.leaf(value, None, false)
    }

    /// A parameter. Its gradient, if `trainable`, is found under `key`; `label` is for messages.
    /// A second call with the same key returns the first one's node: tied weights share a gradient.
    pub fn parameter(&mut self, key: usize, label: &str, value: &Tensor, trainable: bool) -> Var {
        if let Some(var) = self.parameters.get(&key) {
            return var.clone();
        }
        let parameter = Parameter {
            key,
            label: label.into(),
        };
        let var = self.leaf(value.clone(), Some(parameter), trainable);
        self.parameters.insert(key, var.clone());
        var
    }

    fn leaf(&mut self, value: Tensor, parameter: Option<Parameter>, needs_gradient: bool) -> Var {
        let node = self.nodes.len();
        if let Some(region) = &mut self.open {
            region.reads(node, &value);
        }
        self.nodes.push(Node {
            op: Op::Leaf,
            inputs: Vec::new(),
            shape: *value.shape(),
            dtype: value.dtype(),
            // That codes have none is refused when something reads them.
            needs_gradient: needs_gradient && !value.dtype().is_integer(),
            parameter,
            saved: Saved::default(),
        });
        Var { node, value }
    }

    /// The number of the next random stream.
    pub(crate) fn next_stream(&mut self) -> u64 {
        self.streams += 1;
        self.streams
    }

    /// Records and executes one operation. The methods named after the operations call this.
    ///
    /// # Errors
    /// Inputs that do not fit; an operation without a backward on a path that needs one.
    pub fn record(&mut self, op: Op, inputs: &[&Var]) -> Result<Var> {
        let numbers: Vec<usize> = inputs.iter().map(|var| var.node).collect();
        let needs = self.needs(&numbers);
        let wanted = needs.contains(&true);
        if wanted && !op.has_backward() {
            return Err(Error::NoBackward {
                op: format!("{:?}", op.kind()),
                parameter: self.parameter_above(&numbers),
            });
        }
        let codes = |&i: &usize| self.nodes[i].needs_gradient && self.nodes[i].dtype.is_quantised();
        if let Some(i) = numbers.iter().copied().find(|i| codes(i)) {
            return Err(Error::Quantised {
                parameter: self.parameter_above(&[i]),
                dtype: self.nodes[i].dtype,
            });
        }
        let values: Vec<&Tensor> = inputs.iter().map(|var| &var.value).collect();
        let saves = self.open.is_none() && wanted;
        let (value, saved) = self.execute(&op, &numbers, &values, &needs, saves)?;
        if let Some(region) = &mut self.open {
            let start = region.start;
            for var in inputs.iter().filter(|var| var.node < start) {
                region.reads(var.node, &var.value);
            }
        }
        let node = self.nodes.len();
        self.nodes.push(Node {
            op,
            inputs: numbers,
            shape: *value.shape(),
            dtype: value.dtype(),
            needs_gradient: wanted && op != Op::Detach && value.dtype().is_float(),
            parameter: None,
            saved,
        });
        Ok(Var { node, value })
    }

    fn needs(&self, inputs: &[usize]) -> Vec<bool> {
        inputs
            .iter()
            .map(|&i| self.nodes[i].needs_gradient)
            .collect()
    }

    /// Computes an operation and keeps what [`Op::saves`] says.
    fn execute(
        &self,
        op: &Op,
        numbers: &[usize],
        values: &[&Tensor],
        needs: &[bool],
        save: bool,
    ) -> Result<(Tensor, Saved)> {
        let saves = if save {
            op.saves(needs)
        } else {
            Default::default()
        };
        let (value, extras) = forward(&self.memory, self.random, op, values, needs, saves.extras)?;
        if !save {
            return Ok((value, Saved::default()));
        }
        let mut saved = Saved {
            inputs: vec![None; values.len()],
            rebuilt: Vec::new(),
            output: saves.output.then(|| value.clone()),
            extras: if saves.extras { extras } else { Vec::new() },
            sloped: false,
        };
        for i in saves.inputs {
            if self.rebuilds && self.nodes[numbers[i]].rebuilds() {
                saved.rebuilt.push(i);
            } else {
                saved.inputs[i] = Some(values[i].clone());
            }
        }
        Ok((value, saved))
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

    /// The label of a trainable parameter that one of the nodes depends on.
    fn parameter_above(&self, nodes: &[usize]) -> String {
        let mut stack = nodes.to_vec();
        let mut seen = vec![false; self.nodes.len()];
        while let Some(i) = stack.pop() {
            let node = &self.nodes[i];
            if !node.needs_gradient || std::mem::replace(&mut seen[i], true) {
                continue;
            }
            if let Some(parameter) = &node.parameter {
                return parameter.label.to_string();
            }
            stack.extend(&node.inputs);
        }
        "(an unnamed leaf)".into()
    }

    /// Records `body` without saving anything inside it but its inputs; backward computes it once
    /// more when it gets there (activation checkpointing, Chen et al., 2016). Gradients are the
    /// same to the bit. Nested calls belong to the outermost.
    ///
    /// # Errors
    /// Those of `body`.
    pub fn checkpoint<R>(&mut self, body: impl FnOnce(&mut Tape) -> Result<R>) -> Result<R> {
        if self.open.is_some() {
            return body(self);
        }
        let start = self.nodes.len();
        self.open = Some(Region {
            start,
            end: start,
            externals: Vec::new(),
            values: HashMap::new(),
        });
        let result = body(self);
        if let Some(mut region) = self.open.take() {
            region.end = self.nodes.len();
            let wanted = self.nodes[start..].iter().any(|node| node.needs_gradient);
            if wanted && result.is_ok() {
                self.regions.push(region);
            }
        }
        result
    }

    /// Computes the nodes `range` again. `values` holds what they read from before it, and `reads`
    /// how often each value is still to be read: the last read frees it. With `save`, what
    /// backward needs is kept in the nodes.
    fn run(
        &mut self,
        range: Range<usize>,
        values: &mut HashMap<usize, Tensor>,
        reads: &mut HashMap<usize, usize>,
        save: bool,
    ) -> Result<()> {
        for i in range {
            if self.nodes[i].op == Op::Leaf {
                continue;
            }
            let inputs = self.nodes[i].inputs.clone();
            let needs = self.needs(&inputs);
            let read: Vec<&Tensor> = inputs.iter().map(|input| &values[input]).collect();
            let saves = save && needs.contains(&true);
            let op = &self.nodes[i].op;
            let (value, saved) = self.execute(op, &inputs, &read, &needs, saves)?;
            self.nodes[i].saved = saved;
            if reads.contains_key(&i) {
                values.insert(i, value);
            }
            for input in inputs {
                release(input, values, reads);
            }
        }
        Ok(())
    }

    /// How often the nodes of `range` read each value.
    fn reads(&self, range: Range<usize>) -> HashMap<usize, usize> {
        let mut reads = HashMap::new();
        for &input in self.nodes[range].iter().flat_map(|node| &node.inputs) {
            *reads.entry(input).or_default() += 1;
        }
        reads
    }

    /// Executes the recorded program once more with other leaf values (`feed` is asked for each leaf
    /// by its node number and, for parameters, key) and with the random numbers of another step.
    /// Returns the last node's value; the tape is then as if it had just been recorded. The result
    /// equals a new recording to the bit.
    ///
    /// # Errors
    /// A leaf of another shape, and whatever the operations refuse.
    pub fn replay(
        &mut self,
        step: u64,
        mut feed: impl FnMut(usize, Option<usize>) -> Tensor,
    ) -> Result<Option<Var>> {
        let Some(last) = self.nodes.len().checked_sub(1) else {
            return Ok(None);
        };
        self.random.step = step;
        self.parameters.clear();
        let mut values = HashMap::new();
        for (i, node) in self.nodes.iter().enumerate() {
            if node.op != Op::Leaf {
                continue;
            }
            let value = feed(i, node.parameter.as_ref().map(|p| p.key));
            if *value.shape() != node.shape {
                return Err(Error::Replay {
                    leaf: i,
                    expected: node.shape.to_string(),
                    found: value.shape().to_string(),
                });
            }
            values.insert(i, value);
        }
        // The last value is returned, and a region reads its inputs once more than its nodes do.
        let mut reads = self.reads(0..last + 1);
        *reads.entry(last).or_default() += 1;
        for &i in self.regions.iter().flat_map(|region| &region.externals) {
            *reads.entry(i).or_default() += 1;
        }
        let mut next = 0;
        for r in 0..self.regions.len() {
            let (start, end) = (self.regions[r].start, self.regions[r].end);
            self.run(next..start, &mut values, &mut reads, true)?;
            for i in self.regions[r].externals.clone() {
                self.regions[r].values.insert(i, values[&i].clone());
                release(i, &mut values, &mut reads);
            }
            self.run(start..end, &mut values, &mut reads, false)?;
            next = end;
        }
        self.run(next..last + 1, &mut values, &mut reads, true)?;
        self.reached = None;
        Ok(values.remove(&last).map(|value| Var { node: last, value }))
    }

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
        if !self.nodes[from.node].needs_gradient {
            return Err(Error::NothingTrainable);
        }
        self.reached = Some(from.node);
        let mut pending: Vec<Option<Pending>> = Vec::new();
        pending.resize_with(from.node + 1, || None);
        pending[from.node] = Some(Pending::Whole(gradient));
        let mut rebuilt = HashMap::new();
        for i in (0..=from.node).rev() {
            if let Some(r) = self.regions.iter().position(|region| region.end == i + 1) {
                let range = self.regions[r].start..i + 1;
                let mut values = std::mem::take(&mut self.regions[r].values);
                let mut reads = self.reads(range.clone());
                self.run(range, &mut values, &mut reads, true)?;
            }
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
            let of = |f: &dyn Fn(&Node) -> Shape| -> Vec<Shape> {
                node.inputs.iter().map(|&k| f(&self.nodes[k])).collect()
            };
            let around = Around {
                shapes: &of(&|n| n.shape),
                dtypes: &node
                    .inputs
                    .iter()
                    .map(|&k| self.nodes[k].dtype)
                    .collect::<Vec<_>>(),
                needs: &self.needs(&node.inputs),
                parameters: &node
                    .inputs
                    .iter()
                    .map(|&k| self.nodes[k].parameter.is_some())
                    .collect::<Vec<_>>(),
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

    /// Bytes that the nodes keep for backward, each storage counted once.
    pub fn saved_bytes(&self) -> usize {
        let mut kept: Vec<&Tensor> = Vec::new();
        for node in &self.nodes {
            let saved = &node.saved;
            let tensors = saved.inputs.iter().flatten();
            for tensor in tensors.chain(&saved.output).chain(&saved.extras) {
                if !kept.iter().any(|other| other.shares_storage(tensor)) {
                    kept.push(tensor);
                }
            }
        }
        kept.iter().map(|t| t.dtype().bytes(t.count())).sum()
    }
}

/// The program, a line for each node.
impl fmt::Display for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, node) in self.nodes.iter().enumerate() {
            let inputs: Vec<String> = node.inputs.iter().map(|k| format!("%{k}")).collect();
            let label = node.parameter.as_ref().map_or("", |p| &p.label);
            let gradient = if node.needs_gradient { " *" } else { "" };
            writeln!(
                f,
                "%{i} {} {} = {:?}({}) {label}{gradient}",
                node.dtype,
                node.shape,
                node.op,
                inputs.join(", "),
            )?;
        }
        Ok(())
    }
}

/// Attention's parameters with the key taken out: on the tape, a stream number stands for it.
pub(crate) fn without_key(attention: Attention) -> Attention {
    Attention {
        key: graft_tensor::ops::random::Key::new(0, 0, 0),
        ..attention
    }
}
