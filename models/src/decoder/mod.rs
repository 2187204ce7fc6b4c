//! The decoders of the GPT family: GPT-2, Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3. One set of layers serves all;
//! they differ in the names of their tensors, in norms, positions, biases and windows, and in how many heads share
//! their keys: all of it data, from the configuration.
//!
//! Dropout begins where training does: layers below the lowest trained parameter compute as in evaluation. A frozen
//! trunk's outputs are then the same in every epoch, and can be kept.

mod cache;
mod causal;
mod classifier;
mod layer;
mod names;
mod rotary;

use graft_autograd::Var;
use graft_nn::layers::Embedding;
use graft_nn::{Forward, FreezePolicy, ParamId, Parameters};

use crate::batch::{TokenBatch, TokenVars};
use crate::config::{DecoderConfig, DecoderFamily, Positions};
use crate::encoder::trained_dropout;
use crate::error::{Error, Result};
use crate::strategy::{Parts, Strategy};
pub use cache::KvCache;
use cache::Past;
pub use causal::CausalLm;
pub use classifier::DecoderClassifier;
use layer::{Layer, Norm};
pub(crate) use names::{LM_HEAD, SCORE};
use rotary::Rotary;

/// Embeddings and layers, without a head.
#[derive(Clone, Debug)]
pub struct Decoder {
    words: Embedding,
    /// Gemma
    word_scale: Option<f64>,
    /// GPT-2
    positions: Option<Embedding>,
    /// All others
    rotary: Option<Rotary>,
    layers: Vec<Layer>,
    norm: Norm,
    max_tokens: usize,
    dropout: f64,
    /// The number of each layer's first parameter, and of the first one behind the last layer
    begins: Vec<usize>,
    parts: Parts,
    /// The final norm, as a rule matches it
    norm_glob: String,
}

impl Decoder {
    /// Declares the decoder's parameters under the names that transformers has for them in a model with a head.
    ///
    /// # Errors
    /// None for a configuration that was checked when it was read.
    pub fn new(p: &mut Parameters, config: &DecoderConfig) -> Result<Decoder> {
        let names = config.family.names();
        let (hidden, std) = (config.hidden_size, config.initializer_range);
        let at = |name: &str| format!("{}{name}", names.prefix);
        let words = Embedding::new(p, &at(names.words), config.vocab_size, hidden, std)?;
        let positions = match config.positions {
            Positions::Learned => {
                let (name, rows) = (at(names.positions), config.max_positions);
                Some(Embedding::new(p, &name, rows, hidden, std)?)
            }
            Positions::Rotary { .. } => None,
        };
        let mut layers = Vec::with_capacity(config.layers);
        let mut begins = Vec::with_capacity(config.layers + 1);
        for i in 0..config.layers {
            begins.push(p.len());
            layers.push(Layer::new(p, config, &names, i)?);
        }
        begins.push(p.len());
        let norm = Norm::new(p, config, &at(names.final_norm))?;
        Ok(Decoder {
            words,
            word_scale: match config.family {
                // transformers keeps this factor in f32.
                DecoderFamily::Gemma2 | DecoderFamily::Gemma3 => {
                    Some(f64::from((hidden as f64).sqrt() as f32))
                }
                _ => None,
            },
            positions,
            rotary: Rotary::new(config),
            layers,
            norm,
            max_tokens: config.max_tokens(),
            dropout: config.dropout.embedding,
            begins,
            parts: {
                let glob = |i| format!("{}.{i}.*", at(names.layer));
                Parts::new(p, (0..config.layers).map(glob).collect())
            },
            norm_glob: format!("{}.*", at(names.final_norm)),
        })
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The layer that a parameter belongs to: `None` for one of the embeddings, [`Decoder::layers`] for one that was
    /// declared after the layers.
    pub fn layer_of(&self, id: ParamId) -> Option<usize> {
        let behind = self.begins.partition_point(|&first| first <= id.key());
        behind.checked_sub(1)
    }

    /// The token embedding, `[vocabulary, hidden]`.
    pub fn words(&self) -> ParamId {
        self.words.weight()
    }

    /// The last hidden state, after the final norm, `[tokens, hidden]`, and the offsets `i64 [sequences + 1]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, sequences longer than the positions.
    pub fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<(Var, Var)> {
        self.run(f, batch, None)
    }

    /// As [`Decoder::forward`], of the new tokens of each sequence of `cache` alone, which is then longer by them. An
    /// error leaves it as it was.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; another number of sequences than the cache has, more tokens than it has room for; a
    /// training pass.
    pub fn advance(
        &self,
        f: &mut Forward,
        batch: &TokenBatch,
        cache: &mut KvCache,
    ) -> Result<(Var, Var)> {
        if f.is_training() {
            return Err(Error::CacheInTraining);
        }
        let mut past = cache.begin(batch)?;
        let result = self.run(f, batch, Some(&mut past))?;
        cache.end(batch);
        Ok(result)
    }

    fn run(
        &self,
        f: &mut Forward,
        batch: &TokenBatch,
        mut past: Option<&mut Past>,
    ) -> Result<(Var, Var)> {
        let longest = batch.offsets.windows(2).map(|pair| pair[1] - pair[0]).max();
        if let Some(tokens) = longest.filter(|&n| n > self.max_tokens as i64) {
            return Err(Error::TooLong {
                tokens: tokens as usize,
                limit: self.max_tokens,
            });
        }
        let positions = match &past {
            Some(past) => past.positions(),
            None => batch.positions(0),
        };
        let turns = match &self.rotary {
            Some(rotary) => Some(rotary.turns(f, &positions)?),
            None => None,
        };
        let tokens = TokenVars::at(f, batch, positions)?;
        let mut x = self.words.forward(f, &tokens.ids)?; // [tokens, hidden]
        if let Some(scale) = self.word_scale {
            x = f.tape.scale(&x, scale)?;
        }
        if let Some(positions) = &self.positions {
            let positions = positions.forward(f, &tokens.positions)?;
            x = f.tape.add(&x, &positions)?;
        }
        x = trained_dropout(f, &x, self.dropout)?;
        for layer in &self.layers {
            x = layer.forward(f, x, &tokens.offsets, turns.as_ref(), past.as_deref_mut())?;
        }
        Ok((self.norm.forward(f, &x)?, tokens.offsets))
    }

    /// The rules of some strategies, added up, for a model whose head has the names `head`. The final norm is trained with
    /// any layer.
    fn policy(&self, strategies: &[Strategy], head: &[&str]) -> Result<FreezePolicy> {
        self.parts.policy(strategies, head, Some(&self.norm_glob))
    }
}
