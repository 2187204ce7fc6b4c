//! What was recorded is computed again: the whole program with other leaves ([`Tape::replay`]), or a region of it
//! ([`Tape::checkpoint`]) when backward gets there.

use std::collections::HashMap;
use std::ops::Range;

use graft_tensor::Tensor;

use super::{Tape, Var};
use crate::error::{Error, Result};
use crate::op::Op;

/// A stretch of the program whose saved tensors are recomputed when backward reaches it.
pub(super) struct Region {
    pub(super) start: usize,
    end: usize,
    /// The nodes from before the region, and leaves within it, that its operations read
    externals: Vec<usize>,
    /// Their values, until backward has used them
    values: HashMap<usize, Tensor>,
}

impl Region {
    /// A node within the region reads `node`, or is a leaf itself: its value is held, if it is not yet.
    pub(super) fn reads(&mut self, node: usize, value: &Tensor) {
        if self.values.insert(node, value.clone()).is_none() {
            self.externals.push(node);
        }
    }
}

/// Values that what is computed again has still to read.
struct Live {
    values: HashMap<usize, Tensor>,
    /// How often each is still to be read
    reads: HashMap<usize, usize>,
}

impl Live {
    /// Holds the value of a node that somebody will read.
    fn hold(&mut self, node: usize, value: Tensor) {
        if self.reads.contains_key(&node) {
            self.values.insert(node, value);
        }
    }

    /// Counts one read of a value, and frees it if that was the last.
    fn release(&mut self, node: usize) {
        let left = self.reads.get_mut(&node).expect("every read was counted");
        *left -= 1;
        if *left == 0 {
            self.values.remove(&node);
        }
    }
}

impl Tape {
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
        let mut live = Live { values, reads };
        let mut next = 0;
        for r in 0..self.regions.len() {
            let (start, end) = (self.regions[r].start, self.regions[r].end);
            self.run(next..start, &mut live, true)?;
            for i in self.regions[r].externals.clone() {
                self.regions[r].values.insert(i, live.values[&i].clone());
                live.release(i);
            }
            self.run(start..end, &mut live, false)?;
            next = end;
        }
        self.run(next..last + 1, &mut live, true)?;
        self.reached = None;
        let value = live.values.remove(&last);
        Ok(value.map(|value| Var { node: last, value }))
    }

    /// Computes the region whose last node is `last`, if there is one, with what backward needs kept.
    pub(super) fn reach(&mut self, last: usize) -> Result<()> {
        let Some(region) = self.regions.iter_mut().find(|r| r.end == last + 1) else {
            return Ok(());
        };
        let range = region.start..region.end;
        let mut live = Live {
            values: std::mem::take(&mut region.values),
            reads: self.reads(range.clone()),
        };
        self.run(range, &mut live, true)
    }

    /// Computes the nodes `range` again. `live` holds what they read from before it; the last read of a value
    /// frees it. With `save`, what backward needs is kept in the nodes.
    fn run(&mut self, range: Range<usize>, live: &mut Live, save: bool) -> Result<()> {
        for i in range {
            if self.nodes[i].op == Op::Leaf {
                continue;
            }
            let inputs = self.nodes[i].inputs.clone();
            let needs = self.needs(&inputs);
            let read: Vec<&Tensor> = inputs.iter().map(|input| &live.values[input]).collect();
            let saves = save && needs.contains(&true);
            let op = &self.nodes[i].op;
            let (value, saved) = self.execute(op, &inputs, &read, &needs, saves)?;
            self.nodes[i].saved = saved;
            live.hold(i, value);
            for input in inputs {
                live.release(input);
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
}
