//! The keys and values of tokens that a decoder has seen, so that a text is continued at the price of its new tokens.

use graft_autograd::Var;
use graft_nn::adapters::{Adapters, attend};
use graft_nn::{Forward, Parameters};
use graft_tensor::ops::{self, Attention, Kept};
use graft_tensor::{Category, Tensor};

use crate::batch::TokenBatch;
use crate::config::DecoderConfig;
use crate::error::{Error, Result};

/// Keys and values of the tokens of some texts, in every layer.
///
/// Each text has a slot with room for `capacity` tokens, where a layer's new rows are written in place; a text that is
/// finished leaves its slot behind. Virtual tokens of the adapter in use are in front of each text, and count for nothing.
#[derive(Debug)]
pub struct KvCache {
    /// Of each layer: keys and values, each `[slots * (front + capacity), kv_heads * head_dim]`
    layers: Vec<[Tensor; 2]>,
    /// The slot of each sequence
    slots: Vec<usize>,
    /// Tokens of each sequence so far
    lengths: Vec<usize>,
    capacity: usize,
    /// Virtual tokens in front of each text
    front: usize,
}

impl KvCache {
    /// Room for so many sequences of at most `capacity` tokens, in the type of `parameters`.
    ///
    /// # Errors
    /// [`Error::TooLong`] for a capacity beyond the model's positions; what the allocator refuses.
    pub fn new(
        parameters: &Parameters,
        config: &DecoderConfig,
        sequences: usize,
        capacity: usize,
    ) -> Result<KvCache> {
        let front = parameters.adapters().virtual_tokens();
        let limit = config.positions_in_all().saturating_sub(front);
        if capacity > limit {
            return Err(Error::TooLong {
                tokens: capacity,
                limit,
            });
        }
        let memory = parameters.memory().with(Category::Activations);
        let shape = [
            sequences * (front + capacity),
            config.kv_heads * config.head_dim,
        ];
        let table = || Tensor::zeros(&memory, parameters.compute(), &shape);
        let layers = (0..config.layers)
            .map(|_| Ok([table()?, table()?]))
            .collect::<Result<_>>()?;
        Ok(KvCache {
            layers,
            slots: (0..sequences).collect(),
            lengths: vec![0; sequences],
            capacity,
            front,
        })
    }

    /// Tokens of each sequence so far.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Most tokens of a sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Goes on with these sequences alone, in this order; the others are finished.
    ///
    /// # Panics
    /// If one of them does not exist.
    pub fn keep(&mut self, sequences: &[usize]) {
        self.slots = sequences.iter().map(|&s| self.slots[s]).collect();
        self.lengths = sequences.iter().map(|&s| self.lengths[s]).collect();
    }

    /// Makes ready for the new tokens of a batch.
    pub(super) fn begin(&mut self, batch: &TokenBatch, adapters: &Adapters) -> Result<Past<'_>> {
        if adapters.virtual_tokens() != self.front {
            return Err(Error::CacheFront {
                adapter: adapters.virtual_tokens(),
                cache: self.front,
            });
        }
        if batch.sequences() != self.lengths.len() {
            return Err(Error::CacheSequences {
                batch: batch.sequences(),
                cache: self.lengths.len(),
            });
        }
        let prompt = adapters.virtual_rows();
        let mut past = Past {
            layers: &mut self.layers,
            starts: Vec::with_capacity(self.slots.len()),
            begins: self.lengths.iter().map(|&n| n == 0).collect(),
            before: Vec::with_capacity(self.slots.len()),
            after: Vec::with_capacity(self.slots.len()),
            offsets: vec![0],
        };
        let mut end = 0;
        let sequences = self.slots.iter().zip(&self.lengths);
        for ((slot, &length), pair) in sequences.zip(batch.offsets.windows(2)) {
            let tokens = length + (pair[1] - pair[0]) as usize;
            if tokens > self.capacity {
                return Err(Error::CacheFull {
                    tokens,
                    capacity: self.capacity,
                });
            }
            // Rows of a prompt are new with the text's first tokens; a prefix is there before any.
            let before = match length {
                0 => self.front - prompt,
                _ => self.front + length,
            };
            let after = self.front + tokens;
            end += (after - before) as i64;
            past.starts
                .push((slot * (self.front + self.capacity)) as i64);
            past.before.push(before as i64);
            past.after.push(after as i64);
            past.offsets.push(end);
        }
        Ok(past)
    }

    /// Counts the tokens of a batch whose keys and values were written in every layer.
    pub(super) fn end(&mut self, batch: &TokenBatch) {
        for (length, pair) in self.lengths.iter_mut().zip(batch.offsets.windows(2)) {
            *length += (pair[1] - pair[0]) as usize;
        }
    }
}

/// A cache while the new tokens of a batch go through the layers.
pub(super) struct Past<'a> {
    layers: &'a mut [[Tensor; 2]],
    /// First row of each sequence
    starts: Vec<i64>,
    /// Whether each sequence has its first tokens
    begins: Vec<bool>,
    /// Rows of each sequence without the new ones, and with them
    before: Vec<i64>,
    after: Vec<i64>,
    /// Of the new rows
    offsets: Vec<i64>,
}

impl Past<'_> {
    /// Whether a sequence has its first tokens.
    pub fn begins(&self, sequence: usize) -> bool {
        self.begins[sequence]
    }

    /// The positions of the new rows.
    pub fn positions(&self) -> Vec<i64> {
        let pairs = self.before.iter().zip(&self.after);
        pairs.flat_map(|(&before, &after)| before..after).collect()
    }

    /// Keeps the new rows' keys and values of layer `i`, and attends to all that there are, a prefix's included: queries
    /// `[rows, heads * head_dim]` to `[rows, heads * head_dim]`.
    pub fn attend(
        &mut self,
        f: &mut Forward,
        i: usize,
        attention: &Attention,
        [q, k, v]: [&Var; 3],
        offsets: &Var,
        prefix: Option<&[Var; 2]>,
    ) -> Result<Var> {
        let memory = f.memory().clone();
        for (which, (table, new)) in self.layers[i].iter_mut().zip([k, v]).enumerate() {
            if let Some(prefix) = prefix {
                let rows = ops::cast(&memory, prefix[which].value(), table.dtype())?;
                let rows = rows.contiguous(&memory)?;
                let begun = self.starts.iter().zip(&self.begins);
                for (&start, _) in begun.filter(|(_, begins)| **begins) {
                    ops::write_rows(&memory, table, start as usize, &rows)?;
                }
            }
            let sequences = self.starts.iter().zip(&self.before);
            for ((start, before), pair) in sequences.zip(self.offsets.windows(2)) {
                let (first, count) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
                let rows = new.value().narrow(0, first, count)?;
                ops::write_rows(&memory, table, (start + before) as usize, &rows)?;
            }
        }
        if self.begins.iter().all(|&begins| begins) {
            // Whole texts: the tiled kernel is faster, and reads no cache.
            return Ok(attend(f, attention, [q, k, v], offsets, prefix)?);
        }
        let [keys, values] = &self.layers[i];
        let kept = Kept {
            starts: &self.starts,
            lengths: &self.after,
        };
        let (q, offsets) = (q.value(), offsets.value());
        let y = ops::attention_cached(&memory, attention, q, keys, values, offsets, kept)?;
        Ok(f.input(y))
    }
}
