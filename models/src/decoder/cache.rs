//! The keys and values of tokens that a decoder has seen, so that a text is continued at the price of its new tokens.

use graft_autograd::Var;
use graft_nn::{Forward, Parameters};
use graft_tensor::ops::{self, Attention, Kept};
use graft_tensor::{Category, Tensor};

use crate::batch::TokenBatch;
use crate::config::DecoderConfig;
use crate::error::{Error, Result};

/// Keys and values of the tokens of some texts, in every layer.
///
/// Each text has a slot with room for `capacity` tokens, where a layer's new rows are written in place; a text that is
/// finished leaves its slot behind.
#[derive(Debug)]
pub struct KvCache {
    /// Of each layer: keys and values, each `[slots * capacity, kv_heads * head_dim]`
    layers: Vec<[Tensor; 2]>,
    /// The slot of each sequence
    slots: Vec<usize>,
    /// Tokens of each sequence so far
    lengths: Vec<usize>,
    capacity: usize,
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
        if capacity > config.max_tokens() {
            return Err(Error::TooLong {
                tokens: capacity,
                limit: config.max_tokens(),
            });
        }
        let memory = parameters.memory().with(Category::Activations);
        let shape = [sequences * capacity, config.kv_heads * config.head_dim];
        let table = || Tensor::zeros(&memory, parameters.compute(), &shape);
        let layers = (0..config.layers)
            .map(|_| Ok([table()?, table()?]))
            .collect::<Result<_>>()?;
        Ok(KvCache {
            layers,
            slots: (0..sequences).collect(),
            lengths: vec![0; sequences],
            capacity,
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
    pub(super) fn begin(&mut self, batch: &TokenBatch) -> Result<Past<'_>> {
        if batch.sequences() != self.lengths.len() {
            return Err(Error::CacheSequences {
                batch: batch.sequences(),
                cache: self.lengths.len(),
            });
        }
        let new = batch
            .offsets
            .windows(2)
            .map(|pair| (pair[1] - pair[0]) as usize);
        let lengths: Vec<usize> = self.lengths.iter().zip(new).map(|(a, b)| a + b).collect();
        if let Some(&tokens) = lengths.iter().find(|&&n| n > self.capacity) {
            return Err(Error::CacheFull {
                tokens,
                capacity: self.capacity,
            });
        }
        let first = |slot: &usize| (slot * self.capacity) as i64;
        Ok(Past {
            starts: self.slots.iter().map(first).collect(),
            before: self.lengths.iter().map(|&n| n as i64).collect(),
            after: lengths.iter().map(|&n| n as i64).collect(),
            offsets: batch.offsets.clone(),
            layers: &mut self.layers,
        })
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
    /// Tokens of each sequence without the new ones, and with them
    before: Vec<i64>,
    after: Vec<i64>,
    /// Of the new tokens
    offsets: Vec<i64>,
}

impl Past<'_> {
    /// The positions of the new tokens.
    pub fn positions(&self) -> Vec<i64> {
        let pairs = self.before.iter().zip(&self.after);
        pairs.flat_map(|(&before, &after)| before..after).collect()
    }

    /// Keeps the new tokens' keys and values of layer `i`, and attends to all that there are: queries
    /// `[tokens, heads * head_dim]` to `[tokens, heads * head_dim]`.
    pub fn attend(
        &mut self,
        f: &mut Forward,
        i: usize,
        attention: &Attention,
        [q, k, v]: [&Var; 3],
        offsets: &Var,
    ) -> Result<Var> {
        let memory = f.memory().clone();
        for (table, new) in self.layers[i].iter_mut().zip([k, v]) {
            let sequences = self.starts.iter().zip(&self.before);
            for ((start, before), pair) in sequences.zip(self.offsets.windows(2)) {
                let (first, count) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
                let rows = new.value().narrow(0, first, count)?;
                ops::write_rows(&memory, table, (start + before) as usize, &rows)?;
            }
        }
        if self.before.iter().all(|&n| n == 0) {
            // Whole texts: the tiled kernel is faster, and reads no cache.
            return Ok(f.tape.attention(attention, q, k, v, offsets)?);
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
