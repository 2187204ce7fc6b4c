//! The encoders of the BERT family: BERT and MiniLM, RoBERTa, DistilBERT. One set of layers serves
//! all three; they differ in the names of their tensors, in where positions begin, and in which
//! embeddings and dropouts there are.
//!
//! Dropout begins where training does: layers below the lowest trained parameter compute as in
//! evaluation. A frozen trunk's outputs are then the same in every epoch, and can be kept.

mod names;

use std::ops::Range;

use graft_autograd::Var;
use graft_nn::layers::{Embedding, LayerNorm, Linear, Mlp, SelfAttention};
use graft_nn::{Forward, ParamId, Parameters};
use graft_tensor::ops::{Activation, Attention};

use crate::batch::{Rows, TokenBatch, check_length, first_row, integers, positions_of};
use crate::config::{Family, HiddenAct, ModelConfig};
use crate::error::Result;
pub(crate) use names::{Names, is_dispensable, modern};

/// Post-norm transformer layer (Vaswani et al., 2017).
#[derive(Clone, Debug)]
struct Layer {
    attention: SelfAttention,
    attention_norm: LayerNorm,
    mlp: Mlp,
    output_norm: LayerNorm,
}

/// Embeddings and layers, without a head.
#[derive(Clone, Debug)]
pub struct Encoder {
    words: Embedding,
    positions: Embedding,
    /// BERT and RoBERTa
    types: Option<Embedding>,
    norm: LayerNorm,
    layers: Vec<Layer>,
    /// The number of each layer's first parameter, and of the first one behind the last layer
    begins: Vec<usize>,
    first_position: usize,
    positions_in_all: usize,
    dropout: f64,
    attention_output_dropout: f64,
}

impl Encoder {
    /// Declares the encoder's parameters under the names that transformers has for them.
    ///
    /// # Errors
    /// None for a configuration that was checked when it was read.
    pub fn new(p: &mut Parameters, config: &ModelConfig) -> Result<Encoder> {
        let names = config.family.names();
        let (hidden, std) = (config.hidden_size, config.initializer_range);
        let eps = config.layer_norm_eps;
        let embeddings = format!("{}embeddings", names.prefix);
        let table = |p: &mut Parameters, name: &str, rows: usize| {
            Embedding::new(p, &format!("{embeddings}.{name}"), rows, hidden, std)
        };
        let words = table(p, "word_embeddings", config.vocab_size)?;
        let positions = table(p, "position_embeddings", config.max_positions)?;
        let types = match config.family {
            Family::Bert | Family::Roberta => {
                Some(table(p, "token_type_embeddings", config.type_vocab_size)?)
            }
            Family::DistilBert => None,
        };
        let norm = LayerNorm::new(p, &format!("{embeddings}.LayerNorm"), hidden, eps)?;
        let mut layers = Vec::with_capacity(config.layers);
        let mut begins = Vec::with_capacity(config.layers + 1);
        for i in 0..config.layers {
            begins.push(p.len());
            layers.push(Layer::new(p, config, &names, i)?);
        }
        begins.push(p.len());
        Ok(Encoder {
            words,
            positions,
            types,
            norm,
            layers,
            begins,
            first_position: config.first_position(),
            positions_in_all: config.positions_in_all(),
            dropout: config.dropout.hidden,
            // DistilBERT has no dropout behind its attention.
            attention_output_dropout: match config.family {
                Family::Bert | Family::Roberta => config.dropout.hidden,
                Family::DistilBert => 0.0,
            },
        })
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The token embedding, `[vocabulary, hidden]`.
    pub fn words(&self) -> ParamId {
        self.words.weight()
    }

    /// The layer that a parameter belongs to: `None` for one of the embeddings, [`Encoder::layers`] for one that was
    /// declared after the encoder.
    pub fn layer_of(&self, id: ParamId) -> Option<usize> {
        // Parameters are declared in the order in which they take part.
        let behind = self.begins.partition_point(|&first| first <= id.key());
        behind.checked_sub(1)
    }

    /// The last hidden state `[rows, hidden]` and the offsets `i64 [sequences + 1]`. There is a row for each token, and
    /// in front of each sequence's those of a prompt in use: the first of these takes the place of the sequence's first
    /// token, as it does in PEFT.
    ///
    /// # Errors
    /// Ids outside the vocabulary, sequences longer than the positions.
    pub fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<(Var, Var)> {
        let (x, offsets) = self.embed(f, batch)?;
        let x = self.run(f, x, &offsets, 0..self.layers.len())?;
        Ok((x, offsets))
    }

    /// The last hidden state of the tokens themselves, `[tokens, hidden]`.
    ///
    /// # Errors
    /// As [`Encoder::forward`].
    pub fn forward_tokens(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let (x, _) = self.forward(f, batch)?;
        Rows::new(f, batch).tokens(f, x)
    }

    /// What the first layer reads, `[rows, hidden]`, and the offsets `i64 [sequences + 1]`.
    ///
    /// # Errors
    /// As [`Encoder::forward`].
    pub fn embed(&self, f: &mut Forward, batch: &TokenBatch) -> Result<(Var, Var)> {
        check_length(f, batch, self.positions_in_all)?;
        let rows = Rows::new(f, batch);
        let mut x = rows.words(f, &self.words, None)?; // [rows, hidden]
        if let Some(types) = &self.types {
            let ids = f.input(integers(f.memory(), &rows.type_ids())?);
            let types = types.forward(f, &ids)?;
            x = f.tape.add(&x, &types)?;
        }
        let positions = positions_of(rows.offsets(), self.first_position + first_row(f));
        let positions = f.input(integers(f.memory(), &positions)?);
        let positions = self.positions.forward(f, &positions)?;
        x = self.norm.forward(f, &x, Some(&positions))?;
        drop(positions);
        x = trained_dropout(f, &x, self.dropout)?;
        let offsets = integers(f.memory(), rows.offsets())?;
        Ok((x, f.input(offsets)))
    }

    /// Some consecutive layers, `x [rows, hidden]` to `[rows, hidden]`. Takes `x`, so that it can be freed as
    /// soon as it was used for the last time.
    ///
    /// # Errors
    /// A shape or offsets that do not fit.
    ///
    /// # Panics
    /// If there are no such layers.
    pub fn run(
        &self,
        f: &mut Forward,
        mut x: Var,
        offsets: &Var,
        layers: Range<usize>,
    ) -> Result<Var> {
        for layer in &self.layers[layers] {
            x = layer.forward(f, x, offsets, self.attention_output_dropout, self.dropout)?;
        }
        Ok(x)
    }
}

impl Layer {
    fn new(p: &mut Parameters, config: &ModelConfig, names: &Names, i: usize) -> Result<Layer> {
        let (hidden, std) = (config.hidden_size, config.initializer_range);
        let (inner, eps) = (config.intermediate_size, config.layer_norm_eps);
        let at = |name: &str| format!("{}{}.{i}.{name}", names.prefix, names.layer);
        let attention = SelfAttention {
            query: Linear::new(p, &at(names.query), hidden, hidden, std)?,
            key: Linear::new(p, &at(names.key), hidden, hidden, std)?,
            value: Linear::new(p, &at(names.value), hidden, hidden, std)?,
            output: Linear::new(p, &at(names.attention_output), hidden, hidden, std)?,
            attention: Attention {
                dropout: config.dropout.attention,
                ..Attention::bidirectional(config.heads, config.head_size())
            },
        };
        let attention_norm = LayerNorm::new(p, &at(names.attention_norm), hidden, eps)?;
        let mlp = Mlp {
            up: Linear::new(p, &at(names.up), hidden, inner, std)?,
            down: Linear::new(p, &at(names.down), inner, hidden, std)?,
            activation: activation_of(config.hidden_act),
        };
        let output_norm = LayerNorm::new(p, &at(names.output_norm), hidden, eps)?;
        Ok(Layer {
            attention,
            attention_norm,
            mlp,
            output_norm,
        })
    }

    /// `x [tokens, hidden]` to `[tokens, hidden]`. Takes `x`, so that in a frozen layer it is freed
    /// as soon as it was used for the last time.
    fn forward(
        &self,
        f: &mut Forward,
        x: Var,
        offsets: &Var,
        attention_dropout: f64,
        dropout: f64,
    ) -> Result<Var> {
        let heads = self.attention.forward(f, &x, offsets)?;
        let p = trained_p(f, &heads, attention_dropout);
        let h = self.attention_norm.dropped(f, &heads, p, Some(&x))?;
        drop((x, heads));
        let inner = self.mlp.forward(f, &h)?;
        let p = trained_p(f, &inner, dropout);
        Ok(self.output_norm.dropped(f, &inner, p, Some(&h))?)
    }
}

/// The operation of a nonlinearity.
pub(crate) fn activation_of(act: HiddenAct) -> Activation {
    match act {
        HiddenAct::Gelu => Activation::Gelu,
        HiddenAct::GeluTanh => Activation::GeluTanh,
        HiddenAct::Relu => Activation::Relu,
        HiddenAct::Silu => Activation::Silu,
        HiddenAct::Tanh => Activation::Tanh,
    }
}

/// Each layer's parameters, as rules match them.
pub(crate) fn layer_globs(config: &ModelConfig) -> Vec<String> {
    let names = config.family.names();
    (0..config.layers)
        .map(|i| format!("{}{}.{i}.*", names.prefix, names.layer))
        .collect()
}

/// Dropout where a trained parameter leads to `x`.
pub(crate) fn trained_dropout(f: &mut Forward, x: &Var, p: f64) -> Result<Var> {
    let p = trained_p(f, x, p);
    Ok(f.dropout(x, p)?)
}

/// `p` where a trained parameter leads to `x`, else 0.
fn trained_p(f: &Forward, x: &Var, p: f64) -> f64 {
    if f.tape.needs_gradient(x) { p } else { 0.0 }
}
