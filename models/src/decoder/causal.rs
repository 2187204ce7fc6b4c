//! A decoder that predicts the next token.

use graft_autograd::Var;
use graft_nn::layers::Linear;
use graft_nn::{Forward, FreezePolicy, ParamId, Parameters, Role};
use graft_tensor::Tensor;
use graft_tensor::ops::loss::IGNORE;
use graft_tensor::ops::{Pool, Unary, WeightLayout};

use super::{Decoder, KvCache, LM_HEAD};
use crate::batch::TokenBatch;
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::strategy::Strategy;

/// A causal language model.
#[derive(Clone, Debug)]
pub struct CausalLm {
    decoder: Decoder,
    /// `[vocabulary, hidden]`: the token embedding where the head is tied to it
    head: ParamId,
    tied: bool,
    softcap: Option<f64>,
}

impl CausalLm {
    /// Declares the parameters of decoder and head.
    ///
    /// # Errors
    /// None for a configuration that was checked when it was read.
    pub fn new(p: &mut Parameters, config: &DecoderConfig) -> Result<CausalLm> {
        let decoder = Decoder::new(p, config)?;
        let head = match config.tied {
            true => decoder.words(),
            false => {
                let (hidden, vocab) = (config.hidden_size, config.vocab_size);
                let std = config.initializer_range;
                let head = Linear::without_bias(p, LM_HEAD, hidden, vocab, std)?.weight();
                // The loss reads it by chunks, beside which no adapter can stand.
                p.set_role(head, Role::Other);
                head
            }
        };
        Ok(CausalLm {
            decoder,
            head,
            tied: config.tied,
            softcap: config.final_softcap,
        })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The rules of a strategy. The head is the matrix of the logits and the final norm; where the matrix is the token
    /// embedding, it is trained under [`Strategy::Full`] alone, and the head is the norm.
    ///
    /// # Errors
    /// More layers than the model has.
    pub fn policy(&self, strategy: Strategy) -> Result<FreezePolicy> {
        self.policy_of(&[strategy])
    }

    /// The rules of some strategies, added up.
    ///
    /// # Errors
    /// As [`CausalLm::policy`].
    pub fn policy_of(&self, strategies: &[Strategy]) -> Result<FreezePolicy> {
        let norm = self.decoder.norm_glob.as_str();
        match self.tied {
            true => self.decoder.policy(strategies, &[norm]),
            false => self.decoder.policy(strategies, &[norm, "lm_head.*"]),
        }
    }

    /// The logits of the token behind each token, `[tokens, vocabulary]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, too long sequences.
    pub fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let (hidden, _) = self.decoder.forward(f, batch)?;
        self.logits(f, &hidden)
    }

    /// The logits of the token behind each sequence, `[sequences, vocabulary]`, from the new tokens of each sequence of
    /// `cache`, at least one; it is then longer by them.
    ///
    /// # Errors
    /// As [`Decoder::advance`]; a sequence without a new token.
    pub fn advance(&self, f: &mut Forward, batch: &TokenBatch, cache: &mut KvCache) -> Result<Var> {
        let (hidden, offsets) = self.decoder.advance(f, batch, cache)?;
        let last = f.tape.pool(Pool::Last, &hidden, &offsets)?;
        self.logits(f, &last)
    }

    /// The logits of hidden states, `[rows, hidden]` to `[rows, vocabulary]`.
    ///
    /// # Errors
    /// A shape that does not fit.
    pub fn logits(&self, f: &mut Forward, hidden: &Var) -> Result<Var> {
        let weight = f.parameter(self.head)?;
        let layout = WeightLayout::OutIn;
        let logits = f.tape.linear(hidden, &weight, None, layout, None)?;
        let Some(cap) = self.softcap else {
            return Ok(logits);
        };
        let logits = f.tape.scale(&logits, 1.0 / cap)?;
        let logits = f.tape.unary(Unary::Tanh, &logits)?;
        Ok(f.tape.scale(&logits, cap)?)
    }

    /// Cross-entropy summed over the supervised tokens: `targets[t]` is the token that should follow token t of the
    /// batch, or [`IGNORE`]. All logits are never held at once, and those of tokens that are not supervised are not
    /// computed.
    ///
    /// # Errors
    /// Another number of targets than of tokens; targets or ids outside the vocabulary; too long sequences.
    pub fn loss(&self, f: &mut Forward, batch: &TokenBatch, targets: &[i64]) -> Result<Var> {
        if targets.len() != batch.tokens() {
            return Err(Error::Targets {
                targets: targets.len(),
                tokens: batch.tokens(),
            });
        }
        let (hidden, _) = self.decoder.forward(f, batch)?;
        self.loss_of(f, &hidden, targets)
    }

    /// [`CausalLm::loss`] of hidden states `[rows, hidden]` that the decoder gave.
    ///
    /// # Errors
    /// As [`CausalLm::loss`].
    pub fn loss_of(&self, f: &mut Forward, hidden: &Var, targets: &[i64]) -> Result<Var> {
        let supervised = |row: &i64| targets[*row as usize] != IGNORE;
        let rows: Vec<i64> = (0..targets.len() as i64).filter(supervised).collect();
        let count = rows.len();
        let mut hidden = hidden.clone();
        if count < targets.len() {
            let rows = Tensor::from_vec(f.memory(), rows, &[count])?;
            let rows = f.input(rows);
            hidden = f.tape.gather_rows(&hidden, &rows)?;
        }
        let targets = targets.iter().copied().filter(|t| *t != IGNORE).collect();
        let targets = Tensor::from_vec::<i64>(f.memory(), targets, &[count])?;
        let targets = f.input(targets);
        let weight = f.parameter(self.head)?;
        Ok(f.tape
            .linear_cross_entropy(&hidden, &weight, None, &targets, 0.0, self.softcap)?)
    }

    /// What each token of a batch should be followed by: the next token of its sequence, and [`IGNORE`] for the last.
    pub fn next_tokens(batch: &TokenBatch) -> Vec<i64> {
        let mut targets = vec![IGNORE; batch.tokens()];
        for pair in batch.offsets.windows(2) {
            let (start, end) = (pair[0] as usize, pair[1] as usize);
            if start + 1 < end {
                targets[start..end - 1].copy_from_slice(&batch.ids[start + 1..end]);
            }
        }
        targets
    }
}
