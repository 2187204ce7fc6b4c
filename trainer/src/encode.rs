//! Texts of a data set as token ids.

use graft_models::{Encoding, ModelConfig, TokenBatch, Tokenizer};

use crate::data::Dataset;
use crate::error::Result;
use crate::model::Model;

/// A tokenized data set.
#[derive(Debug, Clone, Default)]
pub struct Encoded {
    /// One for each example
    pub encodings: Vec<Encoding>,
    /// Tokens of each example
    pub lengths: Vec<usize>,
    /// Examples whose tokens were cut to the longest length allowed
    pub truncated: usize,
}

impl Encoded {
    /// Tokenizes `data`. Texts are cut to `max_length` tokens, and to the model's positions in any case.
    ///
    /// # Errors
    /// A length that leaves no room beside the special tokens.
    pub fn new(model: &Model, data: &Dataset, max_length: Option<usize>) -> Result<Encoded> {
        Encoded::with(&model.config, &model.tokenizer, data, max_length)
    }

    /// [`Encoded::new`] for a model of which only these two are there yet.
    ///
    /// # Errors
    /// As there.
    pub fn with(
        config: &ModelConfig,
        tokenizer: &Tokenizer,
        data: &Dataset,
        max_length: Option<usize>,
    ) -> Result<Encoded> {
        let positions = config.max_tokens();
        let limit = max_length.map_or(positions, |n| n.min(positions));
        let texts: Vec<(&str, Option<&str>)> = data
            .examples
            .iter()
            .map(|example| (example.text.as_str(), example.text_pair.as_deref()))
            .collect();
        let encodings = tokenizer.encode_batch(&texts, limit)?;
        Ok(Encoded {
            lengths: encodings.iter().map(|e| e.ids.len()).collect(),
            truncated: encodings.iter().filter(|e| e.truncated).count(),
            encodings,
        })
    }

    /// The examples of those numbers, packed in that order.
    pub fn pack(&self, batch: &[usize]) -> TokenBatch {
        TokenBatch::pack(batch.iter().map(|&i| &self.encodings[i]))
    }
}
