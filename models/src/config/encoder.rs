//! The encoder families.

use std::fmt;

use graft_tensor::DType;
use serde_json::{Map, Value};

use super::read::Reader;
use super::{
    HeadConfig, HiddenAct, Labels, MAX_HIDDEN, MAX_INTERMEDIATE, MAX_LAYERS, MAX_POSITIONS,
    MAX_VOCAB, ProblemType, activation_named, load_with, put, put_dtype,
};
use crate::error::Result;
use crate::json::parse_object;
use crate::source::ModelSource;

const MAX_TYPES: u64 = 1 << 16;

/// A family of models that share their layers and the names of their tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// BERT (Devlin et al. 2018), and MiniLM, which has its layers.
    Bert,
    /// RoBERTa (Liu et al. 2019): BERT with positions counted from `pad_token_id + 1` and another head.
    Roberta,
    /// DistilBERT (Sanh et al. 2019): no token types, no pooler.
    DistilBert,
}

impl Family {
    pub(super) const ALL: [Family; 3] = [Family::Bert, Family::Roberta, Family::DistilBert];

    /// `model_type` in config.json.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Bert => "bert",
            Family::Roberta => "roberta",
            Family::DistilBert => "distilbert",
        }
    }

    /// The class of transformers that puts a classification head on this encoder.
    pub fn classification_architecture(self) -> &'static str {
        match self {
            Family::Bert => "BertForSequenceClassification",
            Family::Roberta => "RobertaForSequenceClassification",
            Family::DistilBert => "DistilBertForSequenceClassification",
        }
    }

    /// The class of transformers that puts a classification head on each token of this encoder.
    pub fn token_classification_architecture(self) -> &'static str {
        match self {
            Family::Bert => "BertForTokenClassification",
            Family::Roberta => "RobertaForTokenClassification",
            Family::DistilBert => "DistilBertForTokenClassification",
        }
    }

    /// The class of transformers that fills in tokens with this encoder.
    pub fn masked_architecture(self) -> &'static str {
        match self {
            Family::Bert => "BertForMaskedLM",
            Family::Roberta => "RobertaForMaskedLM",
            Family::DistilBert => "DistilBertForMaskedLM",
        }
    }

    /// How this family spells the keys; the first spelling is the one written.
    fn keys(self) -> Keys {
        match self {
            Family::Bert | Family::Roberta => Keys {
                hidden_size: &["hidden_size"],
                layers: &["num_hidden_layers"],
                heads: &["num_attention_heads"],
                intermediate_size: &["intermediate_size"],
                hidden_act: &["hidden_act"],
                hidden_dropout: "hidden_dropout_prob",
                attention_dropout: "attention_probs_dropout_prob",
                classifier_dropout: "classifier_dropout",
            },
            // transformers accepts the general names too, through the class's attribute map.
            Family::DistilBert => Keys {
                hidden_size: &["dim", "hidden_size"],
                layers: &["n_layers", "num_hidden_layers"],
                heads: &["n_heads", "num_attention_heads"],
                intermediate_size: &["hidden_dim"],
                hidden_act: &["activation"],
                hidden_dropout: "dropout",
                attention_dropout: "attention_dropout",
                classifier_dropout: "seq_classif_dropout",
            },
        }
    }
}

struct Keys {
    hidden_size: &'static [&'static str],
    layers: &'static [&'static str],
    heads: &'static [&'static str],
    intermediate_size: &'static [&'static str],
    hidden_act: &'static [&'static str],
    hidden_dropout: &'static str,
    attention_dropout: &'static str,
    classifier_dropout: &'static str,
}

/// Probabilities with which training drops values, each in 0..1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropoutRates {
    /// On embeddings and behind every linear layer of the encoder.
    pub hidden: f64,
    /// On attention probabilities.
    pub attention: f64,
    /// In front of the classifier.
    pub classifier: f64,
}

/// A config that has been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which layers and tensor names.
    pub family: Family,
    /// Width of the residual stream; a multiple of `heads`.
    pub hidden_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Attention heads per layer.
    pub heads: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Rows of the position embedding; see [`ModelConfig::max_tokens`].
    pub max_positions: usize,
    /// Positions that an adapter's virtual tokens take in front of each text; not part of the file
    pub reserved: usize,
    /// Rows of the token type embedding; 0 where the family has none.
    pub type_vocab_size: usize,
    /// Added to the variance in layer norms.
    pub layer_norm_eps: f64,
    /// Nonlinearity of the feed-forward layers.
    pub hidden_act: HiddenAct,
    /// Dropout in training.
    pub dropout: DropoutRates,
    /// Standard deviation of new weights.
    pub initializer_range: f64,
    /// The padding token, if there is one. RoBERTa always has one: positions are counted from it.
    pub pad_token_id: Option<usize>,
    /// What the checkpoint is for.
    pub head: HeadConfig,
    /// Element type of the checkpoint, if it is stated (`torch_dtype` in version 4, `dtype` in version 5).
    pub dtype: Option<DType>,
    /// All keys as they were read. [`ModelConfig::to_json`] starts from them.
    pub raw: Map<String, Value>,
}

impl ModelConfig {
    /// Reads the model's config.json.
    ///
    /// # Errors
    /// [`Error::MissingFile`](crate::Error::MissingFile), those of [`ModelSource::read_file`] and of [`ModelConfig::parse`].
    pub fn load(source: &ModelSource) -> Result<ModelConfig> {
        load_with(source, Self::parse)
    }

    /// Parses and checks the text of a config.json; `file` stands for it in messages.
    ///
    /// # Errors
    /// [`Error::Json`](crate::Error::Json), or [`Error::Config`](crate::Error::Config) with the key, what was found and what is supported.
    pub fn parse(file: &str, text: &[u8]) -> Result<ModelConfig> {
        let raw = parse_object(file, text)?;
        let read = Reader::new(file, &raw);
        let family = read.encoder_family()?;
        let keys = family.keys();
        read.refuse_unsupported_encoders()?;

        let hidden_size = read.size(keys.hidden_size, MAX_HIDDEN)?;
        let layers = read.size(keys.layers, MAX_LAYERS)?;
        let heads = read.size(keys.heads, MAX_HIDDEN)?;
        if hidden_size % heads != 0 {
            let found = format!("{heads} heads for a width of {hidden_size}");
            let help = "correct the one that does not fit the checkpoint";
            return Err(read.wrong(keys.heads[0], found, "a divisor of the width", help));
        }
        let intermediate_size = read.size(keys.intermediate_size, MAX_INTERMEDIATE)?;
        let vocab_size = read.size(&["vocab_size"], MAX_VOCAB)?;
        let max_positions = read.size(&["max_position_embeddings"], MAX_POSITIONS)?;
        let type_vocab_size = match family {
            Family::DistilBert => 0,
            _ if raw.contains_key("type_vocab_size") => {
                read.size(&["type_vocab_size"], MAX_TYPES)?
            }
            _ => 2,
        };
        let default_pad = if family == Family::Roberta { 1 } else { 0 };
        let pad_token_id = match read.get("pad_token_id") {
            None => Some(default_pad),
            // Absent, or the -1 of some old configs, is allowed where nothing depends on it.
            Some(Value::Null) => None,
            Some(v) if v.as_i64() == Some(-1) => None,
            Some(_) => Some(read.number("pad_token_id", 0, vocab_size as u64 - 1)?),
        };
        match (family, pad_token_id) {
            (Family::Roberta, None) => {
                let found = read.found("pad_token_id");
                let expected = "a token id: RoBERTa counts positions from the one behind it";
                return Err(read.wrong(
                    "pad_token_id",
                    found,
                    expected,
                    "state it (1 for every published RoBERTa)",
                ));
            }
            (Family::Roberta, Some(pad)) if pad + 1 >= max_positions => {
                let found = format!("{max_positions} with pad_token_id {pad}");
                let expected = "room for positions, which begin at pad_token_id + 1";
                return Err(read.wrong(
                    "max_position_embeddings",
                    found,
                    expected,
                    "correct one of the two",
                ));
            }
            _ => {}
        }
        let hidden = read.rate(keys.hidden_dropout)?.unwrap_or(0.1);
        let classifier = read.rate(keys.classifier_dropout)?;
        let dropout = DropoutRates {
            hidden,
            attention: read.rate(keys.attention_dropout)?.unwrap_or(0.1),
            classifier: match family {
                Family::DistilBert => classifier.unwrap_or(0.2),
                _ => classifier.unwrap_or(hidden),
            },
        };
        Ok(ModelConfig {
            family,
            hidden_size,
            layers,
            heads,
            intermediate_size,
            vocab_size,
            max_positions,
            reserved: 0,
            type_vocab_size,
            layer_norm_eps: match family {
                // Fixed in the layers, not in the config.
                Family::DistilBert => 1e-12,
                _ => read.positive("layer_norm_eps")?.unwrap_or(1e-12),
            },
            hidden_act: read.activation(keys.hidden_act[0], HiddenAct::Gelu)?,
            dropout,
            initializer_range: read.positive("initializer_range")?.unwrap_or(0.02),
            pad_token_id,
            head: HeadConfig::read(&read)?,
            dtype: read.dtype()?,
            raw,
        })
    }

    /// Number of outputs of the head.
    pub fn num_labels(&self) -> usize {
        self.head.labels.count()
    }

    /// Width of one attention head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.heads
    }

    /// The position of a sequence's first token.
    pub fn first_position(&self) -> usize {
        match self.family {
            Family::Roberta => self.pad_token_id.unwrap_or(1) + 1,
            Family::Bert | Family::DistilBert => 0,
        }
    }

    /// Most tokens of a sequence, special tokens included.
    pub fn max_tokens(&self) -> usize {
        self.positions_in_all().saturating_sub(self.reserved)
    }

    /// Most tokens of a sequence, virtual ones included.
    pub fn positions_in_all(&self) -> usize {
        self.max_positions - self.first_position()
    }

    /// Makes this the config of a model that fills in tokens.
    pub fn set_masked(&mut self) {
        self.head = HeadConfig::vocabulary(self.family.masked_architecture(), &mut self.raw);
    }

    /// Makes this the config of a classifier: its class, its labels, and what they mean.
    pub fn set_classification(&mut self, labels: Labels, problem_type: ProblemType) {
        let class = match problem_type {
            ProblemType::Tokens => self.family.token_classification_architecture(),
            _ => self.family.classification_architecture(),
        };
        self.head = HeadConfig::classifier(class, labels, problem_type);
    }

    /// The text of the config.json to save: what was read, with this config's values in the spelling that the file
    /// used, or else in the family's.
    pub fn to_json(&self) -> String {
        let keys = self.family.keys();
        let mut map = self.raw.clone();
        put(&mut map, &["model_type"], self.family.model_type().into());
        put(&mut map, keys.hidden_size, self.hidden_size.into());
        put(&mut map, keys.layers, self.layers.into());
        put(&mut map, keys.heads, self.heads.into());
        put(
            &mut map,
            keys.intermediate_size,
            self.intermediate_size.into(),
        );
        put(&mut map, &["vocab_size"], self.vocab_size.into());
        put(
            &mut map,
            &["max_position_embeddings"],
            self.max_positions.into(),
        );
        if self.family != Family::DistilBert {
            put(&mut map, &["type_vocab_size"], self.type_vocab_size.into());
            put(&mut map, &["layer_norm_eps"], self.layer_norm_eps.into());
        }
        let named = map.get(keys.hidden_act[0]).and_then(Value::as_str);
        if named.and_then(activation_named) != Some(self.hidden_act) {
            put(&mut map, keys.hidden_act, self.hidden_act.name().into());
        }
        put(
            &mut map,
            &["initializer_range"],
            self.initializer_range.into(),
        );
        put(&mut map, &[keys.hidden_dropout], self.dropout.hidden.into());
        put(
            &mut map,
            &[keys.attention_dropout],
            self.dropout.attention.into(),
        );
        // BERT's null stands for the hidden rate, and need not change when it still does.
        let implied = self.family != Family::DistilBert
            && map.get(keys.classifier_dropout).is_none_or(Value::is_null)
            && self.dropout.classifier == self.dropout.hidden;
        if !implied {
            put(
                &mut map,
                &[keys.classifier_dropout],
                self.dropout.classifier.into(),
            );
        }
        match self.pad_token_id {
            Some(pad) => put(&mut map, &["pad_token_id"], pad.into()),
            None if map.get("pad_token_id").and_then(Value::as_i64) == Some(-1) => {}
            None => put(&mut map, &["pad_token_id"], Value::Null),
        }
        self.head.put(&mut map);
        put_dtype(&mut map, self.dtype);
        // A map of strings to JSON values always prints.
        let mut text = serde_json::to_string_pretty(&map).unwrap_or_default();
        text.push('\n');
        text
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}
