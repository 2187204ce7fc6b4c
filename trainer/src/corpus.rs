//! Texts whose tokens are supervised one by one: what tasks over tokens are made of.

use std::path::Path;

use graft_autograd::Var;
use graft_models::{CausalLm, MaskedLm, TokenBatch, Tokenizer};
use graft_nn::Forward;
use graft_tensor::Memory;

use crate::config::{Init, RunConfig};
use crate::error::Result;
use crate::model::{Changes, Loaded, Model, Weights};
use crate::network::Network;

/// The pass over the data for which [`Corpus::pack`] is asked: an epoch, from 1, or an evaluation, which is always the
/// same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// An epoch of the training with this seed
    Epoch {
        /// From 1
        epoch: usize,
        /// Of the run
        seed: u64,
    },
    /// An evaluation
    Evaluation,
}

/// Tokenized texts in sequences, each with tokens to predict.
pub trait Corpus: Sized + Send + Sync {
    /// What predicts them.
    type Network: TokenNetwork;
    /// The texts as they are read, before there is a tokenizer.
    type Rows: Send + Sync;

    /// Reads a data file whole; `column` is that of the texts.
    ///
    /// # Errors
    /// A file that cannot be used.
    fn read(path: &Path, column: &str) -> Result<Self::Rows>;

    /// Tokenizes texts into sequences of at most `max_length` tokens; none: as many as the task has by default.
    ///
    /// # Errors
    /// A text that cannot be used, or none that has a token to predict; a longer length than the model's positions.
    fn new(
        config: &<Self::Network as Network>::Config,
        tokenizer: &Tokenizer,
        rows: &Self::Rows,
        max_length: Option<usize>,
    ) -> Result<Self>;

    /// What there is, in a line.
    fn note(&self, path: &Path) -> String;

    /// Tokens of each sequence.
    fn lengths(&self) -> &[usize];

    /// Tokens of a sequence that are supervised; at least one.
    fn targets(&self, sequence: usize) -> usize;

    /// Texts in a sequence that do not see each other: each stands behind virtual tokens of its own.
    fn texts(&self, _sequence: usize) -> usize {
        1
    }

    /// Sequences that were cut.
    fn truncated(&self) -> usize {
        0
    }

    /// The sequences of those numbers as a batch, and for each of its tokens the supervised one, or
    /// [`IGNORE`](graft_tensor::ops::loss::IGNORE).
    fn pack(&self, pass: Pass, sequences: &[usize]) -> (TokenBatch, Vec<i64>);
}

/// Layers that give each token logits over the vocabulary.
pub trait TokenNetwork: Network + Sync {
    /// Loads the model for a run, and does `meanwhile` beside the reading of the weights.
    ///
    /// # Errors
    /// Whatever is wrong with the model's files; those of `meanwhile`.
    fn load_while<T: Send>(
        config: &RunConfig,
        memory: &Memory,
        meanwhile: impl FnOnce(&Self::Config, &Tokenizer) -> Result<T> + Send,
    ) -> Result<Loaded<T, Self>>;

    /// Cross-entropy summed over the supervised tokens of a batch.
    ///
    /// # Errors
    /// As the model's forward pass.
    fn loss(&self, f: &mut Forward, batch: &TokenBatch, targets: &[i64]) -> Result<Var>;
}

impl TokenNetwork for CausalLm {
    fn load_while<T: Send>(
        config: &RunConfig,
        memory: &Memory,
        meanwhile: impl FnOnce(&Self::Config, &Tokenizer) -> Result<T> + Send,
    ) -> Result<Loaded<T, CausalLm>> {
        let weights = match config.model.init {
            Init::Pretrained => Weights::Stored { new_head: None },
            Init::Random => Weights::Random(config.train.seed),
        };
        let changes = Changes::of(config);
        Model::causal_while(&config.model.path, changes, weights, memory, meanwhile)
    }

    fn loss(&self, f: &mut Forward, batch: &TokenBatch, targets: &[i64]) -> Result<Var> {
        Ok(CausalLm::loss(self, f, batch, targets)?)
    }
}

impl TokenNetwork for MaskedLm {
    fn load_while<T: Send>(
        config: &RunConfig,
        memory: &Memory,
        meanwhile: impl FnOnce(&Self::Config, &Tokenizer) -> Result<T> + Send,
    ) -> Result<Loaded<T, MaskedLm>> {
        let seed = config.train.seed;
        let weights = match config.model.init {
            Init::Pretrained => Weights::Stored {
                new_head: Some(seed),
            },
            Init::Random => Weights::Random(seed),
        };
        let changes = Changes::of(config);
        Model::masked_while(&config.model.path, changes, weights, memory, meanwhile)
    }

    fn loss(&self, f: &mut Forward, batch: &TokenBatch, targets: &[i64]) -> Result<Var> {
        Ok(MaskedLm::loss(self, f, batch, targets)?)
    }
}
