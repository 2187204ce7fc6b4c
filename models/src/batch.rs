//! A packed batch: the tokens of several sequences one after the other, without padding.

use graft_autograd::Var;
use graft_nn::Forward;
use graft_nn::adapters::Fronted;
use graft_nn::layers::Embedding;
use graft_tensor::{Memory, Tensor};

use crate::error::{Error, Result};
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

/// The rows of a batch in the layers: its tokens and, in front of a text, the virtual tokens of a prompt in use.
pub(crate) struct Rows<'a> {
    batch: &'a TokenBatch,
    front: Option<Fronted>,
}

impl<'a> Rows<'a> {
    /// Of whole texts.
    pub fn new(f: &Forward, batch: &'a TokenBatch) -> Rows<'a> {
        Self::of(f, batch, |_| true)
    }

    /// Of texts of which those begin here of which `begins` holds.
    pub fn of(f: &Forward, batch: &'a TokenBatch, begins: impl Fn(usize) -> bool) -> Rows<'a> {
        let count = f.adapters().virtual_rows();
        let front = (count > 0).then(|| Fronted::new(&batch.offsets, count, begins));
        Rows { batch, front }
    }

    /// Where each sequence begins, and the end.
    pub fn offsets(&self) -> &[i64] {
        match &self.front {
            Some(front) => front.offsets(),
            None => &self.batch.offsets,
        }
    }

    /// The rows of an embedding for the batch's tokens, times `scale`, and the prompt beside it as it is: `[rows, width]`.
    pub fn words(&self, f: &mut Forward, words: &Embedding, scale: Option<f64>) -> Result<Var> {
        let ids = f.input(integers(f.memory(), &self.batch.ids)?);
        let mut x = words.forward(f, &ids)?;
        if let Some(scale) = scale {
            x = f.tape.scale(&x, scale)?;
        }
        match (&self.front, words.prompt(f)?) {
            (Some(front), Some(prompt)) => Ok(front.insert(f, &prompt, &x)?),
            _ => Ok(x),
        }
    }

    /// The type of each row's token: 0 for a virtual one.
    pub fn type_ids(&self) -> Vec<i64> {
        let types = &self.batch.type_ids;
        match &self.front {
            Some(front) => front.fill(types),
            None => types.clone(),
        }
    }

    /// The rows of the batch's own tokens, `[rows, width]` to `[tokens, width]`.
    pub fn tokens(&self, f: &mut Forward, x: Var) -> Result<Var> {
        match &self.front {
            Some(front) => Ok(front.remove(f, &x)?),
            None => Ok(x),
        }
    }
}

/// The position of a text's first row: behind the virtual tokens that are no rows.
pub(crate) fn first_row(f: &Forward) -> usize {
    let adapters = f.adapters();
    adapters.virtual_tokens() - adapters.virtual_rows()
}

/// Refuses a batch with a text that has, with the virtual tokens in front of it, more tokens than there are positions.
///
/// # Errors
/// [`Error::TooLong`].
pub(crate) fn check_length(f: &Forward, batch: &TokenBatch, positions: usize) -> Result<()> {
    let limit = positions.saturating_sub(f.adapters().virtual_tokens());
    let longest = batch.offsets.windows(2).map(|pair| pair[1] - pair[0]).max();
    match longest.filter(|&n| n > limit as i64) {
        Some(tokens) => Err(Error::TooLong {
            tokens: tokens as usize,
            limit,
        }),
        None => Ok(()),
    }
}

/// Integers for a tape.
pub(crate) fn integers(memory: &Memory, data: &[i64]) -> Result<Tensor> {
    Ok(Tensor::from_slice(memory, data, &[data.len()])?)
}
