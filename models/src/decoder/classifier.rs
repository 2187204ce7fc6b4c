//! A decoder with a sequence-classification head, as transformers builds it: a linear layer over the last token.

use graft_autograd::Var;
use graft_nn::layers::Linear;
use graft_nn::{Forward, FreezePolicy, Parameters, TrainableSet};
use graft_tensor::ops::Pool;

use super::{Decoder, SCORE};
use crate::batch::TokenBatch;
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::strategy::Strategy;

/// A sequence classifier over a decoder.
#[derive(Clone, Debug)]
pub struct DecoderClassifier {
    decoder: Decoder,
    score: Linear,
}

impl DecoderClassifier {
    /// Declares the parameters of decoder and head.
    ///
    /// # Errors
    /// None for a configuration that was checked when it was read.
    pub fn new(p: &mut Parameters, config: &DecoderConfig) -> Result<DecoderClassifier> {
        let decoder = Decoder::new(p, config)?;
        let (hidden, labels) = (config.hidden_size, config.num_labels());
        let score = Linear::without_bias(p, SCORE, hidden, labels, config.initializer_range)?;
        Ok(DecoderClassifier { decoder, score })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The rules of a strategy.
    ///
    /// # Errors
    /// More layers than the model has.
    pub fn policy(&self, strategy: Strategy) -> Result<FreezePolicy> {
        self.policy_of(&[strategy])
    }

    /// The rules of some strategies, added up.
    ///
    /// # Errors
    /// As [`DecoderClassifier::policy`].
    pub fn policy_of(&self, strategies: &[Strategy]) -> Result<FreezePolicy> {
        self.decoder.policy(strategies, &["score.*"])
    }

    /// The logits, `[sequences, labels]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, empty or too long sequences.
    pub fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let last = self.last_tokens(f, batch)?;
        self.classify(f, &last)
    }

    /// The last hidden state of each sequence's last token, `[sequences, hidden]`: all that the head sees of the
    /// decoder.
    ///
    /// # Errors
    /// As [`DecoderClassifier::forward`].
    pub fn last_tokens(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let (x, offsets) = self.decoder.forward(f, batch)?;
        let last = f.tape.pool(Pool::Last, &x, &offsets)?;
        Ok(f.leave(&last)?)
    }

    /// True if nothing below the head is trained.
    pub fn trunk_is_frozen(&self, set: &TrainableSet) -> bool {
        set.ids().all(|id| id == self.score.weight())
    }

    /// The logits of last tokens' hidden states, `[sequences, hidden]` to `[sequences, labels]`: what is left to
    /// compute when the decoder is frozen and its outputs are known.
    ///
    /// # Errors
    /// A shape that does not fit.
    pub fn classify(&self, f: &mut Forward, last: &Var) -> Result<Var> {
        Ok(self.score.forward(f, last)?)
    }
}
