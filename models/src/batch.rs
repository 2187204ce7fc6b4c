//! A packed batch: the tokens of several sequences one after the other, without padding.

use graft_autograd::Var;
use graft_nn::Forward;
use graft_tensor::{Memory, Tensor};

use crate::error::Result;
use crate::tokenizer::Encoding;

/// The tokens of some texts.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TokenBatch {
    /// Token ids, `[tokens]`
    pub ids: Vec<i64>,
    /// Token types (0 for the first text, 1 for its pair), `[tokens]`
    pub type_ids: Vec<i64>,
    /// Where each sequence begins, and the end: `[sequences + 1]`, from 0 to `tokens`
    pub offsets: Vec<i64>,
}

impl TokenBatch {
    /// An empty batch.
    pub fn new() -> TokenBatch {
        TokenBatch {
            offsets: vec![0],
            ..TokenBatch::default()
        }
    }

    /// Packs encoded texts.
    pub fn pack<'a>(encodings: impl IntoIterator<Item = &'a Encoding>) -> TokenBatch {
        let mut batch = TokenBatch::new();
        for encoding in encodings {
            batch
                .ids
                .extend(encoding.ids.iter().map(|&id| i64::from(id)));
            batch
                .type_ids
                .extend(encoding.type_ids.iter().map(|&id| i64::from(id)));
            batch.offsets.push(batch.ids.len() as i64);
        }
        batch
    }

    /// Packs token ids, of type 0.
    pub fn of_ids<'a>(sequences: impl IntoIterator<Item = &'a [i64]>) -> TokenBatch {
        let mut batch = TokenBatch::new();
        for ids in sequences {
            batch.ids.extend(ids);
            batch.offsets.push(batch.ids.len() as i64);
        }
        batch.type_ids = vec![0; batch.ids.len()];
        batch
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// The position of each token within its sequence, counted from `first`.
    pub fn positions(&self, first: usize) -> Vec<i64> {
        positions_of(&self.offsets, first)
    }
}

/// The position of each token within its sequence, counted from `first`, of sequences that begin at `offsets`.
pub(crate) fn positions_of(offsets: &[i64], first: usize) -> Vec<i64> {
    offsets
        .windows(2)
        .flat_map(|pair| (0..pair[1] - pair[0]).map(move |i| i + first as i64))
        .collect()
}

/// The batch on a tape.
pub(crate) struct TokenVars {
    pub ids: Var,
    pub type_ids: Var,
    pub positions: Var,
    pub offsets: Var,
}

impl TokenVars {
    /// With positions counted from `first_position` in each sequence.
    pub fn new(f: &mut Forward, batch: &TokenBatch, first_position: usize) -> Result<TokenVars> {
        Self::at(f, batch, batch.positions(first_position))
    }

    /// With a position for each token.
    pub fn at(f: &mut Forward, batch: &TokenBatch, positions: Vec<i64>) -> Result<TokenVars> {
        let memory = f.memory().clone();
        let mut vector = |data: Vec<i64>| -> Result<Var> { Ok(f.input(integers(&memory, data)?)) };
        Ok(TokenVars {
            ids: vector(batch.ids.clone())?,
            type_ids: vector(batch.type_ids.clone())?,
            positions: vector(positions)?,
            offsets: vector(batch.offsets.clone())?,
        })
    }
}

fn integers(memory: &Memory, data: Vec<i64>) -> graft_tensor::Result<Tensor> {
    let count = data.len();
    Tensor::from_vec(memory, data, &[count])
}
