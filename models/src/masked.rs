//! An encoder that fills in hidden tokens, as transformers builds it for each family: BertForMaskedLM and its kin.

use graft_autograd::Var;
use graft_nn::layers::{LayerNorm, Linear};
use graft_nn::{Forward, FreezePolicy, Init, ParamId, Parameters};
use graft_tensor::Tensor;
use graft_tensor::ops::loss::IGNORE;
use graft_tensor::ops::{Activation, WeightLayout};

use crate::batch::TokenBatch;
use crate::config::{Family, ModelConfig};
use crate::encoder::{Encoder, activation_of, is_dispensable, layer_globs, modern};
use crate::error::{Error, Result};
use crate::load::Stored;
use crate::strategy::{Parts, Strategy};

/// The configuration of an encoder as a model that fills in tokens: its checkpoints are read differently from those of
/// a classifier.
#[derive(Clone, Debug, PartialEq)]
pub struct MaskedConfig(pub ModelConfig);

impl Stored for MaskedConfig {
    fn prefix(&self) -> &'static str {
        self.0.family.names().prefix
    }

    fn modern(&self, name: &str) -> String {
        modern(name)
    }

    fn is_task_specific(&self, _: &str) -> bool {
        false
    }

    fn is_optional(&self, name: &str) -> bool {
        // A checkpoint of a bare encoder or of a classifier has no such head.
        head_names(self.0.family).iter().any(|module| {
            name.strip_prefix(module)
                .is_some_and(|rest| rest.starts_with('.'))
        })
    }

    fn is_dispensable(&self, name: &str) -> bool {
        // The pooler is trained by no token; copies of tied tensors hold what others hold.
        is_dispensable(name) || name.contains("pooler.dense.")
    }

    fn copy_of(&self, name: &str) -> Option<String> {
        let family = self.0.family;
        let matrix = match family {
            Family::Bert => "cls.predictions.decoder.weight",
            Family::Roberta => "lm_head.decoder.weight",
            Family::DistilBert => "vocab_projector.weight",
        };
        let words = || format!("{}embeddings.word_embeddings.weight", family.names().prefix);
        (name == matrix).then(words)
    }

    fn is_other_head(&self, name: &str) -> bool {
        name.starts_with("classifier.") || name.starts_with("pre_classifier.")
    }
}

/// The modules of a family's head: the transformation, its norm, and what has the bias of the logits.
fn head_names(family: Family) -> [&'static str; 3] {
    match family {
        Family::Bert => [
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions",
        ],
        Family::Roberta => ["lm_head.dense", "lm_head.layer_norm", "lm_head"],
        Family::DistilBert => ["vocab_transform", "vocab_layer_norm", "vocab_projector"],
    }
}

/// A masked language model. The matrix of the logits is the token embedding.
#[derive(Clone, Debug)]
pub struct MaskedLm {
    encoder: Encoder,
    dense: Linear,
    activation: Activation,
    norm: LayerNorm,
    /// Of the logits, `[vocabulary]`
    bias: ParamId,
    parts: Parts,
    head_globs: [String; 3],
}

impl MaskedLm {
    /// Declares the parameters of encoder and head.
    ///
    /// # Errors
    /// A configuration whose logits have a matrix of their own.
    pub fn new(p: &mut Parameters, config: &MaskedConfig) -> Result<MaskedLm> {
        let config = &config.0;
        if config.raw.get("tie_word_embeddings") == Some(&false.into()) {
            return Err(Error::Config {
                file: crate::config::CONFIG_FILE.to_string(),
                key: "tie_word_embeddings".to_string(),
                found: "false".to_string(),
                expected: "true: the logits are products with the token embedding".to_string(),
                help: "use a checkpoint whose head is tied".to_string(),
            });
        }
        let encoder = Encoder::new(p, config)?;
        let parts = Parts::new(p, layer_globs(config));
        let (hidden, std) = (config.hidden_size, config.initializer_range);
        let [transform, norm, logits] = head_names(config.family);
        Ok(MaskedLm {
            encoder,
            dense: Linear::new(p, transform, hidden, hidden, std)?,
            activation: match config.family {
                Family::Bert | Family::DistilBert => activation_of(config.hidden_act),
                Family::Roberta => Activation::Gelu,
            },
            norm: LayerNorm::new(p, norm, hidden, config.layer_norm_eps)?,
            bias: p.declare(&format!("{logits}.bias"), &[config.vocab_size], Init::Zeros)?,
            parts,
            head_globs: [
                format!("{transform}.*"),
                format!("{norm}.*"),
                format!("{logits}.bias"),
            ],
        })
    }

    /// The encoder.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// The rules of a strategy. The token embedding, which is the matrix of the logits too, is trained under
    /// [`Strategy::Full`] alone.
    ///
    /// # Errors
    /// More layers than the model has.
    pub fn policy(&self, strategy: Strategy) -> Result<FreezePolicy> {
        self.policy_of(&[strategy])
    }

    /// The rules of some strategies, added up.
    ///
    /// # Errors
    /// As [`MaskedLm::policy`].
    pub fn policy_of(&self, strategies: &[Strategy]) -> Result<FreezePolicy> {
        let head = self.head_globs.each_ref().map(String::as_str);
        self.parts.policy(strategies, &head, None)
    }

    /// The logits of the token in each place, `[tokens, vocabulary]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, too long sequences.
    pub fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let hidden = self.encoder.forward_tokens(f, batch)?;
        let x = self.transform(f, &hidden)?;
        let (weight, bias) = (f.parameter(self.encoder.words())?, f.parameter(self.bias)?);
        Ok(f.tape
            .linear(&x, &weight, Some(&bias), WeightLayout::OutIn, None)?)
    }

    fn transform(&self, f: &mut Forward, hidden: &Var) -> Result<Var> {
        let x = self.dense.activated(f, hidden, self.activation)?;
        Ok(self.norm.forward(f, &x, None)?)
    }

    /// Cross-entropy summed over the supervised tokens: `targets[t]` is what should stand in the place of token t of the
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
        let hidden = self.encoder.forward_tokens(f, batch)?;
        let supervised = |row: &i64| targets[*row as usize] != IGNORE;
        let rows: Vec<i64> = (0..targets.len() as i64).filter(supervised).collect();
        let count = rows.len();
        let rows = Tensor::from_vec(f.memory(), rows, &[count])?;
        let rows = f.input(rows);
        let hidden = f.tape.gather_rows(&hidden, &rows)?;
        let x = self.transform(f, &hidden)?;
        let targets = targets.iter().copied().filter(|t| *t != IGNORE).collect();
        let targets = Tensor::from_vec::<i64>(f.memory(), targets, &[count])?;
        let targets = f.input(targets);
        let (weight, bias) = (f.parameter(self.encoder.words())?, f.parameter(self.bias)?);
        Ok(f.tape
            .linear_cross_entropy(&x, &weight, Some(&bias), &targets, 0.0, None)?)
    }
}
