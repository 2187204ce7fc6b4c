//! An encoder with a sequence-classification head, as transformers builds it for each family.

use graft_autograd::Var;
use graft_nn::layers::Linear;
use graft_nn::{Forward, FreezePolicy, Parameters, Rule, TrainableSet};
use graft_tensor::ops::{Activation, Pool};

use crate::batch::TokenBatch;
use crate::config::{Family, ModelConfig};
use crate::encoder::Encoder;
use crate::error::{Error, Result};

/// Which part of a model is trained, in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strategy {
    /// The head alone
    Head,
    /// The last so many layers, and the head
    Last(usize),
    /// Everything
    Full,
}

/// What lies between the first token's hidden state and the logits.
#[derive(Clone, Debug)]
struct Head {
    /// Module names of the head, as rules match them
    globs: &'static [&'static str],
    dense: Linear,
    activation: Activation,
    /// Dropout in front of `dense` (RoBERTa); all have one behind it
    dropout_first: bool,
    out: Linear,
}

/// A sequence classifier.
#[derive(Clone, Debug)]
pub struct Classifier {
    encoder: Encoder,
    head: Head,
    dropout: f64,
    layer_globs: Vec<String>,
}

impl Classifier {
    /// Declares the parameters of encoder and head.
    ///
    /// # Errors
    /// None for a configuration that was checked when it was read.
    pub fn new(p: &mut Parameters, config: &ModelConfig) -> Result<Classifier> {
        let encoder = Encoder::new(p, config)?;
        let (hidden, std) = (config.hidden_size, config.initializer_range);
        let labels = config.num_labels();
        let mut linear = |name: &str, outputs| Linear::new(p, name, hidden, outputs, std);
        let head = match config.family {
            Family::Bert => Head {
                globs: &["bert.pooler.*", "classifier.*"],
                dense: linear("bert.pooler.dense", hidden)?,
                activation: Activation::Tanh,
                dropout_first: false,
                out: linear("classifier", labels)?,
            },
            Family::Roberta => Head {
                globs: &["classifier.*"],
                dense: linear("classifier.dense", hidden)?,
                activation: Activation::Tanh,
                dropout_first: true,
                out: linear("classifier.out_proj", labels)?,
            },
            Family::DistilBert => Head {
                globs: &["pre_classifier.*", "classifier.*"],
                dense: linear("pre_classifier", hidden)?,
                activation: Activation::Relu,
                dropout_first: false,
                out: linear("classifier", labels)?,
            },
        };
        let names = config.family.names();
        let layer_globs = (0..config.layers)
            .map(|i| format!("{}{}.{i}.*", names.prefix, names.layer))
            .collect();
        Ok(Classifier {
            encoder,
            head,
            dropout: config.dropout.classifier,
            layer_globs,
        })
    }

    /// The encoder.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// The parameters that no pretrained checkpoint without a classification head can hold: they
    /// are initialised when a new task begins.
    pub fn is_task_specific(config: &ModelConfig, name: &str) -> bool {
        match config.family {
            // The pooler belongs to the pretrained model.
            Family::Bert | Family::Roberta => name.starts_with("classifier."),
            Family::DistilBert => {
                name.starts_with("classifier.") || name.starts_with("pre_classifier.")
            }
        }
    }

    /// The rules of a strategy.
    ///
    /// # Errors
    /// More layers than the model has.
    pub fn policy(&self, strategy: Strategy) -> Result<FreezePolicy> {
        let layers = self.layer_globs.len();
        let last = match strategy {
            Strategy::Full => return Ok(FreezePolicy::default()),
            Strategy::Head => 0,
            Strategy::Last(k) => k,
        };
        let Some(first) = layers.checked_sub(last) else {
            return Err(Error::Strategy { last, layers });
        };
        let trained = self.layer_globs[first..].iter().cloned();
        let head = self.head.globs.iter().map(|glob| (*glob).to_owned());
        let rules = [Rule::freeze("*")]
            .into_iter()
            .chain(trained.chain(head).map(Rule::train))
            .collect();
        Ok(FreezePolicy { rules })
    }

    /// The logits, `[sequences, labels]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, empty or too long sequences.
    pub fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let first = self.first_tokens(f, batch)?;
        self.classify(f, &first)
    }

    /// The last hidden state of each sequence's first token, `[sequences, hidden]`: all that the head
    /// sees of the encoder.
    ///
    /// # Errors
    /// As [`Classifier::forward`].
    pub fn first_tokens(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let (x, offsets) = self.encoder.forward(f, batch)?;
        Ok(f.tape.pool(Pool::First, &x, &offsets)?)
    }

    /// True if nothing below the head is trained.
    pub fn trunk_is_frozen(&self, p: &Parameters, set: &TrainableSet) -> bool {
        let is_head = |name: &str| {
            self.head
                .globs
                .iter()
                .any(|glob| Rule::train(*glob).matches(name))
        };
        set.ids().all(|id| is_head(p.get(id).name()))
    }

    /// The logits of first tokens' hidden states, `[sequences, hidden]` to `[sequences, labels]`:
    /// what is left to compute when the encoder is frozen and its outputs are known.
    ///
    /// # Errors
    /// A shape that does not fit.
    pub fn classify(&self, f: &mut Forward, first: &Var) -> Result<Var> {
        let mut x = first.clone();
        if self.head.dropout_first {
            x = f.dropout(&x, self.dropout)?;
        }
        x = self.head.dense.activated(f, &x, self.head.activation)?;
        x = f.dropout(&x, self.dropout)?;
        Ok(self.head.out.forward(f, &x)?)
    }
}
