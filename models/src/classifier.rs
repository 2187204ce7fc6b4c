//! An encoder with a classification head over texts or over tokens, as transformers builds it for each family.

use graft_autograd::Var;
use graft_nn::layers::Linear;
use graft_nn::{Forward, FreezePolicy, ParamId, Parameters, TrainableSet};
use graft_tensor::Tensor;
use graft_tensor::ops::{Activation, Pool};

use crate::batch::TokenBatch;
use crate::config::{Family, ModelConfig, ProblemType};
use crate::encoder::{Encoder, layer_globs};
use crate::error::Result;
use crate::strategy::{Parts, Strategy};

/// A place in a classifier: what lies below it is frozen, what lies above it is trained or leads to what is.
///
/// What passes through it is the same in every epoch, since dropout begins where training does, and can be kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Cut {
    /// Between the embeddings or the layer below and the layer of this number: a hidden state for each token
    Layer(usize),
    /// Between encoder and head: a hidden state for each sequence's first token
    Head,
    /// Between the trunk and a head over tokens: a hidden state for each token
    Tokens,
}

impl Cut {
    /// The place below the lowest trained parameter, in a classifier of `stages` between embeddings and head, in front of
    /// which `head` lies: in front of the stage that the parameter belongs to. `None` if that is an embedding, or if more
    /// than the texts' own tokens would pass: a prompt has rows of its own in the layers.
    pub(crate) fn below_trained(
        p: &Parameters,
        set: &TrainableSet,
        (stages, head): (usize, Cut),
        stage_of: impl FnOnce(ParamId) -> Option<usize>,
    ) -> Option<Cut> {
        // The model's own parameters are declared, and numbered, in the order in which they take part; an adapter's take
        // part beside one of these.
        let first = set.ids().map(|id| p.adapters().anchor(id)).min()?;
        let stage = stage_of(first)?;
        let cut = match stage < stages {
            true => Cut::Layer(stage),
            false => head,
        };
        Some(cut).filter(|&cut| cut == head || p.adapters().virtual_rows() == 0)
    }

    /// Whether it lies above a stage of so many; above the embeddings, which are of none, it always does.
    pub(crate) fn is_above(self, stage: Option<usize>, stages: usize) -> bool {
        let end = match self {
            Cut::Layer(first) => first,
            Cut::Head | Cut::Tokens => stages,
        };
        stage.is_none_or(|stage| stage < end)
    }

    /// Rows of `hidden` numbers that pass for a sequence of so many tokens.
    pub fn rows(self, tokens: usize) -> usize {
        match self {
            Cut::Layer(_) | Cut::Tokens => tokens,
            Cut::Head => 1,
        }
    }
}

/// What lies between hidden states and the logits.
#[derive(Clone, Debug)]
struct Head {
    /// Module names of the head, as rules match them
    globs: &'static [&'static str],
    /// In front of the logits, of a head over texts
    dense: Option<Dense>,
    dropout: f64,
    out: Linear,
}

/// What a head over texts makes of the first token's hidden state.
#[derive(Clone, Debug)]
struct Dense {
    linear: Linear,
    activation: Activation,
    /// Dropout in front of it (RoBERTa); all have one behind it
    dropout_first: bool,
}

impl Head {
    /// Of texts, over the first token.
    fn of_texts(p: &mut Parameters, config: &ModelConfig) -> Result<Head> {
        let (hidden, std) = (config.hidden_size, config.initializer_range);
        let (dense, activation, out) = match config.family {
            Family::Bert => ("bert.pooler.dense", Activation::Tanh, "classifier"),
            Family::Roberta => ("classifier.dense", Activation::Tanh, "classifier.out_proj"),
            Family::DistilBert => ("pre_classifier", Activation::Relu, "classifier"),
        };
        Ok(Head {
            globs: match config.family {
                Family::Bert => &["bert.pooler.*", "classifier.*"],
                Family::Roberta => &["classifier.*"],
                Family::DistilBert => &["pre_classifier.*", "classifier.*"],
            },
            dense: Some(Dense {
                linear: Linear::new(p, dense, hidden, hidden, std)?,
                activation,
                dropout_first: config.family == Family::Roberta,
            }),
            dropout: config.dropout.classifier,
            out: Linear::new(p, out, hidden, config.num_labels(), std)?,
        })
    }

    /// Of tokens: one layer.
    fn of_tokens(p: &mut Parameters, config: &ModelConfig) -> Result<Head> {
        let (hidden, std) = (config.hidden_size, config.initializer_range);
        Ok(Head {
            globs: &["classifier.*"],
            dense: None,
            dropout: match config.family {
                Family::Bert | Family::Roberta => config.dropout.classifier,
                // Its rate for classifiers is one for those of texts.
                Family::DistilBert => config.dropout.hidden,
            },
            out: Linear::new(p, "classifier", hidden, config.num_labels(), std)?,
        })
    }

    /// Where a frozen encoder ends.
    fn cut(&self) -> Cut {
        match self.dense {
            Some(_) => Cut::Head,
            None => Cut::Tokens,
        }
    }

    /// Hidden states `[rows, hidden]` to logits `[rows, labels]`, in the parameters' type: it costs little, and losses keep
    /// their digits.
    fn logits(&self, f: &mut Forward, x: &Var) -> Result<Var> {
        let mut x = x.clone();
        if let Some(dense) = &self.dense {
            if dense.dropout_first {
                x = f.dropout(&x, self.dropout)?;
            }
            x = dense.linear.activated(f, &x, dense.activation)?;
        }
        x = f.dropout(&x, self.dropout)?;
        Ok(self.out.forward(f, &x)?)
    }
}

/// A classifier of texts, or of each token, as the configuration says.
#[derive(Clone, Debug)]
pub struct Classifier {
    encoder: Encoder,
    head: Head,
    parts: Parts,
}

impl Classifier {
    /// Declares the parameters of encoder and head.
    ///
    /// # Errors
    /// None for a configuration that was checked when it was read.
    pub fn new(p: &mut Parameters, config: &ModelConfig) -> Result<Classifier> {
        let encoder = Encoder::new(p, config)?;
        let parts = Parts::new(p, layer_globs(config));
        let head = match config.head.problem() {
            ProblemType::Tokens => Head::of_tokens(p, config)?,
            _ => Head::of_texts(p, config)?,
        };
        Ok(Classifier {
            encoder,
            head,
            parts,
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

    /// The parameters that a checkpoint without a classification head may lack, which are then initialised when a new
    /// task begins: BERT's pooler, which a model that fills in tokens does without.
    pub fn is_optional(config: &ModelConfig, name: &str) -> bool {
        config.family == Family::Bert && name.starts_with("bert.pooler.")
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
    /// As [`Classifier::policy`].
    pub fn policy_of(&self, strategies: &[Strategy]) -> Result<FreezePolicy> {
        self.parts.policy(strategies, self.head.globs, None)
    }

    /// The logits, `[sequences, labels]`, or `[tokens, labels]` of a classifier of tokens.
    ///
    /// # Errors
    /// Ids outside the vocabulary, empty or too long sequences.
    pub fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let x = match self.head.cut() {
            Cut::Tokens => self.encoder.forward_tokens(f, batch)?,
            _ => {
                let (x, offsets) = self.encoder.forward(f, batch)?;
                f.tape.pool(Pool::First, &x, &offsets)?
            }
        };
        let x = f.leave(&x)?;
        self.head.logits(f, &x)
    }

    /// The place below which nothing is trained: in front of the layer of the lowest trained parameter. `None` if an
    /// embedding is trained, or more than the texts' own tokens would pass.
    pub fn cut(&self, p: &Parameters, set: &TrainableSet) -> Option<Cut> {
        let above = (self.encoder.layers(), self.head.cut());
        Cut::below_trained(p, set, above, |id| self.encoder.layer_of(id))
    }

    /// Whether a parameter takes part in what passes through `cut`.
    pub fn is_below(&self, cut: Cut, id: ParamId) -> bool {
        cut.is_above(self.encoder.layer_of(id), self.encoder.layers())
    }

    /// What passes through `cut`: `[tokens, hidden]` in front of a layer or of a head over tokens, `[sequences, hidden]` in
    /// front of one over texts; in the parameters' type, which holds every value of the activations' type.
    ///
    /// # Errors
    /// As [`Classifier::forward`].
    pub fn below(&self, f: &mut Forward, cut: Cut, batch: &TokenBatch) -> Result<Var> {
        let x = match cut {
            Cut::Layer(layer) => {
                let (x, offsets) = self.encoder.embed(f, batch)?;
                self.encoder.run(f, x, &offsets, 0..layer)?
            }
            Cut::Head => {
                let (x, offsets) = self.encoder.forward(f, batch)?;
                f.tape.pool(Pool::First, &x, &offsets)?
            }
            Cut::Tokens => self.encoder.forward_tokens(f, batch)?,
        };
        Ok(f.leave(&x)?)
    }

    /// The logits, as [`Classifier::forward`] gives them, of what passes through `cut` ([`Classifier::below`] says in which shape):
    /// what is left to compute when everything below is frozen and known. `offsets [sequences + 1]` say where each
    /// sequence begins.
    ///
    /// # Errors
    /// Shapes or offsets that do not fit.
    pub fn above(&self, f: &mut Forward, cut: Cut, x: Tensor, offsets: &[i64]) -> Result<Var> {
        let x = f.input(x);
        let x = match cut {
            Cut::Layer(layer) => {
                let offsets = Tensor::from_slice(f.memory(), offsets, &[offsets.len()])?;
                let offsets = f.input(offsets);
                let x = f.enter(&x)?;
                let x = self
                    .encoder
                    .run(f, x, &offsets, layer..self.encoder.layers())?;
                let x = match self.head.cut() {
                    Cut::Tokens => x,
                    _ => f.tape.pool(Pool::First, &x, &offsets)?,
                };
                f.leave(&x)?
            }
            Cut::Head | Cut::Tokens => x,
        };
        self.head.logits(f, &x)
    }
}
