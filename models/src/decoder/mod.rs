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

use std::ops::Range;

use graft_autograd::Var;
use graft_nn::layers::Embedding;
use graft_nn::{Forward, FreezePolicy, ParamId, Parameters};

use crate::batch::{Rows, TokenBatch, check_length, first_row, integers, positions_of};
use crate::config::{DecoderConfig, DecoderFamily, Positions};
use crate::encoder::trained_dropout;
use crate::error::{Error, Result};
use crate::strategy::{Parts, Strategy};
pub use cache::KvCache;
use cache::Past;
pub use causal::CausalLm;
pub use classifier::DecoderClassifier;
use layer::{Layer, Norm};
pub(crate) use names::{CLASSIFIER, LM_HEAD, Projections, SCORE};
use rotary::{Rotary, Turns};

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
    /// The number of the first parameter of each layer, of the final norm, and of what comes behind it
    begins: Vec<usize>,
    positions_in_all: usize,
    dropout: f64,
    parts: Parts,
    /// The final norm, as a rule matches it
    norm_glob: String,
}

/// Where the rows of a batch stand.
struct Place {
    offsets: Var,
    /// Where positions are rotary
    turns: Option<Turns>,
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
        let mut begins = Vec::with_capacity(config.layers + 2);
        for i in 0..config.layers {
            begins.push(p.len());
            layers.push(Layer::new(p, config, &names, i)?);
        }
        begins.push(p.len());
        let norm = Norm::new(p, config, &at(names.final_norm))?;
        begins.push(p.len());
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
            positions_in_all: config.positions_in_all(),
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
        Some(self.stage_of(id)?.min(self.layers.len()))
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
        let mut past = cache.begin(batch, f.adapters())?;
        let result = self.run(f, batch, Some(&mut past))?;
        cache.end(batch);
        Ok(result)
    }

    fn run(
        &self,
        f: &mut Forward,
        batch: &TokenBatch,
        past: Option<&mut Past>,
    ) -> Result<(Var, Var)> {
        check_length(f, batch, self.positions_in_all)?;
        let (rows, positions) = match &past {
            Some(past) => (
                Rows::of(f, batch, |text| past.begins(text)),
                past.positions(),
            ),
            None => {
                let rows = Rows::new(f, batch);
                let positions = positions_of(rows.offsets(), first_row(f));
                (rows, positions)
            }
        };
        let (x, place) = self.embed_rows(f, &rows, &positions)?;
        let x = self.layers_of(f, x, &place, 0..self.layers.len(), past)?;
        let x = rows.tokens(f, x)?;
        let offsets = f.input(integers(f.memory(), &batch.offsets)?);
        Ok((self.norm.forward(f, &x)?, offsets))
    }

    /// What the first layer reads of whole texts, `[rows, hidden]`, and where the rows stand.
    fn embed(&self, f: &mut Forward, batch: &TokenBatch) -> Result<(Var, Place)> {
        check_length(f, batch, self.positions_in_all)?;
        let rows = Rows::new(f, batch);
        let positions = positions_of(rows.offsets(), first_row(f));
        self.embed_rows(f, &rows, &positions)
    }

    fn embed_rows(&self, f: &mut Forward, rows: &Rows, positions: &[i64]) -> Result<(Var, Place)> {
        let turns = self.turns(f, positions)?;
        let mut x = rows.words(f, &self.words, self.word_scale)?; // [rows, hidden]
        if let Some(table) = &self.positions {
            let positions = f.input(integers(f.memory(), positions)?);
            let positions = table.forward(f, &positions)?;
            x = f.tape.add(&x, &positions)?;
        }
        x = trained_dropout(f, &x, self.dropout)?;
        let offsets = f.input(integers(f.memory(), rows.offsets())?);
        Ok((x, Place { offsets, turns }))
    }

    fn turns(&self, f: &mut Forward, positions: &[i64]) -> Result<Option<Turns>> {
        let turns = self
            .rotary
            .as_ref()
            .map(|rotary| rotary.turns(f, positions));
        turns.transpose()
    }

    /// Where the tokens of whole sequences stand that begin at `offsets [sequences + 1]`.
    fn place(&self, f: &mut Forward, offsets: &[i64]) -> Result<Place> {
        let turns = self.turns(f, &positions_of(offsets, first_row(f)))?;
        let offsets = f.input(integers(f.memory(), offsets)?);
        Ok(Place { offsets, turns })
    }

    /// Some consecutive layers, `x [rows, hidden]` to `[rows, hidden]`. Takes `x`, so that it can be freed as soon as
    /// it was used for the last time.
    fn layers_of(
        &self,
        f: &mut Forward,
        mut x: Var,
        place: &Place,
        layers: Range<usize>,
        mut past: Option<&mut Past>,
    ) -> Result<Var> {
        for layer in &self.layers[layers] {
            let past = past.as_deref_mut();
            x = layer.forward(f, x, &place.offsets, place.turns.as_ref(), past)?;
        }
        Ok(x)
    }

    /// As [`Decoder::layer_of`], but the final norm is a stage of its own, in front of all that was declared after the
    /// decoder.
    fn stage_of(&self, id: ParamId) -> Option<usize> {
        // Parameters are declared in the order in which they take part.
        let behind = self.begins.partition_point(|&first| first <= id.key());
        behind.checked_sub(1)
    }

    /// The rules of some strategies, added up, for a model whose head has the names `head`. The final norm is trained with
    /// any layer.
    fn policy(&self, strategies: &[Strategy], head: &[&str]) -> Result<FreezePolicy> {
        self.parts.policy(strategies, head, Some(&self.norm_glob))
    }
}
