//! The tape: a program that is executed as it is recorded, and walked backwards for gradients.
//!
//! A node holds an operation, the numbers of the nodes that it reads, and what its backward needs;
//! nothing else keeps a value alive but the [`Var`]s that the caller holds. What no needed gradient
//! reads is therefore freed the moment the caller lets go of it, and a frozen prefix saves nothing.
//! Of what one pass over kept tensors can compute again ([`Op::can_rebuild`]), nothing is kept either.
//! Where no gradient will be asked for ([`Tape::evaluation`]), operations are executed and not recorded.
//!
//! Here is what records; `backward.rs` walks back, `replay.rs` computes again what was recorded.

mod backward;
mod replay;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use graft_tensor::{Category, DType, Memory, Shape, Tensor};

use self::replay::Region;
use crate::backward::Saved;
use crate::error::{Error, Result};
use crate::forward::{Randomness, forward};
use crate::op::{Inputs, Op};

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

    /// The number of the node that computed the value; of a tape that records nothing, one that no node has.
    pub fn node(&self) -> usize {
        self.node
    }

    fn unrecorded(value: Tensor) -> Var {
        let node = usize::MAX;
        Var { node, value }
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
    inputs: Inputs<usize>,
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

/// A recorded step; see the module's text.
pub struct Tape {
    nodes: Vec<Node>,
    /// What [`Tape::checkpoint`] recorded, in the order of the nodes
    regions: Vec<Region>,
    /// The region being recorded.
    open: Option<Region>,
    parameters: HashMap<usize, Var>,
    memory: Memory,
    random: Randomness,
    streams: u64,
    /// Operations become nodes
    records: bool,
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
            records: true,
            rebuilds: true,
            reached: None,
        }
    }

    /// A tape that executes operations and records none: nothing needs a gradient, whatever it is said to be. It costs
    /// what the operations cost, and stays empty.
    pub fn evaluation(memory: &Memory) -> Tape {
        Tape {
            records: false,
            ..Tape::new(memory, 0, 0)
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
        self.nodes
            .get(x.node)
            .is_some_and(|node| node.needs_gradient)
    }

    /// A value from outside that needs no gradient: token ids, offsets, cached features.
    pub fn input(&mut self, value: Tensor) -> Var {
        self.leaf(value, None, false)
    }

    /// A parameter. Its gradient, if `trainable`, is found under `key`; `label` is for messages.
    /// A second call with the same key returns the first one's node: tied weights share a gradient.
    pub fn parameter(&mut self, key: usize, label: &str, value: &Tensor, trainable: bool) -> Var {
        if !self.records {
            return Var::unrecorded(value.clone());
        }
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
        if !self.records {
            return Var::unrecorded(value);
        }
        let node = self.nodes.len();
        if let Some(region) = &mut self.open {
            region.reads(node, &value);
        }
        self.nodes.push(Node {
            op: Op::Leaf,
            inputs: Inputs::new(),
            shape: *value.shape(),
            dtype: value.dtype(),
            // That codes have none is refused when something reads them.
            needs_gradient: needs_gradient && !value.dtype().is_integer(),
            parameter,
            saved: Saved::default(),
        });
        Var { node, value }
    }

    /// How many random streams were drawn: one for each operation with dropout.
    pub fn streams(&self) -> u64 {
        self.streams
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
        let values: Inputs<&Tensor> = inputs.iter().map(|var| &var.value).collect();
        if !self.records {
            let (value, _) = forward(&self.memory, self.random, &op, &values, &[], false)?;
            return Ok(Var::unrecorded(value));
        }
        let numbers: Inputs<usize> = inputs.iter().map(|var| var.node).collect();
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

    fn needs(&self, inputs: &[usize]) -> Inputs<bool> {
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
