//! The decoder families.

use graft_tensor::DType;
use serde_json::{Map, Value};

use super::read::Reader;
use super::rope::RopeParameters;
use super::{
    CONFIG_FILE, HeadConfig, HiddenAct, Labels, MAX_HIDDEN, MAX_INTERMEDIATE, MAX_LAYERS,
    MAX_POSITIONS, MAX_VOCAB, ProblemType, load_with, put, put_dtype,
};
use crate::error::{Error, Result};
use crate::json::parse_object;
use crate::source::ModelSource;

mod family;
mod layers;

pub use family::DecoderFamily;
use layers::{head_dim, hidden_act, kv_heads, layer_kinds, refuse_unsupported, rotary, tokens};

/// What a layer's attention sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// Everything before it: `full_attention`.
    Full,
    /// The window's last tokens: `sliding_attention`.
    Sliding,
}

impl LayerKind {
    const NAMES: [(&'static str, LayerKind); 2] = [
        ("full_attention", LayerKind::Full),
        ("sliding_attention", LayerKind::Sliding),
    ];
}

/// How a decoder knows where a token stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Positions {
    /// By a table that is added to the embeddings.
    Learned,
    /// By rotation of queries and keys.
    Rotary {
        /// In layers that see everything.
        full: RopeParameters,
        /// In layers with a window.
        sliding: RopeParameters,
    },
}

/// Probabilities with which training drops values, each in 0..1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecoderDropout {
    /// On embeddings.
    pub embedding: f64,
    /// On attention probabilities.
    pub attention: f64,
    /// On what attention and feed-forward layers add to the residual stream.
    pub residual: f64,
    /// In front of a head that labels tokens.
    pub classifier: f64,
}

/// A decoder's config that has been checked.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Which layers and tensor names.
    pub family: DecoderFamily,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads per layer.
    pub heads: usize,
    /// Key and value heads per layer; a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head; even where positions are rotary.
    pub head_dim: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Positions stated; see [`DecoderConfig::max_tokens`].
    pub max_positions: usize,
    /// Positions that an adapter's virtual tokens take in front of each text; not part of the file
    pub reserved: usize,
    /// Added to the variance or mean square in norms.
    pub norm_eps: f64,
    /// Nonlinearity of the feed-forward layers.
    pub hidden_act: HiddenAct,
    /// Logits are products with the token embedding; there is no other matrix for them.
    pub tied: bool,
    /// Dropout in training.
    pub dropout: DecoderDropout,
    /// Standard deviation of new weights.
    pub initializer_range: f64,
    /// What the checkpoint is for.
    pub head: HeadConfig,
    /// Element type of the checkpoint, if it is stated (`torch_dtype` in version 4, `dtype` in version 5).
    pub dtype: Option<DType>,
    /// Tokens that end a text, if any are stated.
    pub eos_token_ids: Vec<usize>,
    /// The token that begins a text, if it is stated.
    pub bos_token_id: Option<usize>,
    /// The padding token, if there is one.
    pub pad_token_id: Option<usize>,
    /// All keys as they were read. [`DecoderConfig::to_json`] starts from them.
    pub raw: Map<String, Value>,
    pub(crate) positions: Positions,
    /// One for each layer
    pub(crate) kinds: Vec<LayerKind>,
    /// Tokens that a sliding layer sees, itself included
    pub(crate) window: Option<usize>,
    pub(crate) attention_softcap: Option<f64>,
    pub(crate) final_softcap: Option<f64>,
    /// Factor of the attention scores
    pub(crate) score_scale: f64,
    /// Scores of layer i are divided by i + 1 besides
    pub(crate) scale_by_layer: bool,
    /// On queries, keys and values; on the attention's output; in the feed-forward layers
    pub(crate) biases: [bool; 3],
}

impl DecoderConfig {
    /// Reads the model's config.json.
    ///
    /// # Errors
    /// [`Error::MissingFile`](crate::Error::MissingFile), those of [`ModelSource::read_file`] and of
    /// [`DecoderConfig::parse`].
    pub fn load(source: &ModelSource) -> Result<DecoderConfig> {
        load_with(source, Self::parse)
    }

    /// Parses and checks the text of a config.json; `file` stands for it in messages.
    ///
    /// # Errors
    /// [`Error::Json`](crate::Error::Json), or [`Error::Config`](crate::Error::Config) with the key, what was found
    /// and what is supported.
    pub fn parse(file: &str, text: &[u8]) -> Result<DecoderConfig> {
        let raw = parse_object(file, text)?;
        let read = Reader::new(file, &raw);
        let family = read.decoder_family()?;
        let (keys, defaults) = (family.keys(), family.defaults());
        refuse_unsupported(&read)?;
        let gpt2 = family == DecoderFamily::Gpt2;

        let hidden_size = read.size(keys.hidden_size, MAX_HIDDEN)?;
        let layers = read.size(keys.layers, MAX_LAYERS)?;
        let heads = read.size(keys.heads, MAX_HIDDEN)?;
        let max_positions = read.size(keys.max_positions, MAX_POSITIONS)?;
        let intermediate_size = match gpt2 {
            true => read
                .optional_size(keys.intermediate_size, MAX_INTERMEDIATE)?
                .unwrap_or(4 * hidden_size),
            false => read.size(keys.intermediate_size, MAX_INTERMEDIATE)?,
        };
        let kv_heads = kv_heads(&read, &defaults, heads)?;
        let head_dim = head_dim(&read, &defaults, &keys, hidden_size, heads)?;
        let (kinds, window) = layer_kinds(&read, family, layers)?;
        let rate =
            |key: &str, default: f64| -> Result<f64> { Ok(read.rate(key)?.unwrap_or(default)) };
        let classifier = match read.rate("classifier_dropout")? {
            Some(rate) => rate,
            None => rate("hidden_dropout", 0.1)?,
        };
        let bias = match family {
            DecoderFamily::Gpt2 => [true; 3],
            DecoderFamily::Mistral => [false; 3],
            DecoderFamily::Qwen2 => [true, false, false],
            _ => {
                let attention = read.flag("attention_bias", false)?;
                let mlp = family == DecoderFamily::Llama && read.flag("mlp_bias", false)?;
                [attention, attention, mlp]
            }
        };
        let softcap = |key: &str, default: f64| match read.get(key) {
            None if family == DecoderFamily::Gemma2 => Ok(Some(default)),
            _ => read.factor(key),
        };
        let plain_scale = 1.0 / (head_dim as f64).sqrt();
        Ok(DecoderConfig {
            family,
            hidden_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            intermediate_size,
            vocab_size: read.size(&["vocab_size"], MAX_VOCAB)?,
            max_positions,
            reserved: 0,
            norm_eps: read.positive(keys.norm_eps)?.unwrap_or(defaults.norm_eps),
            hidden_act: hidden_act(&read, &keys, &defaults, gpt2)?,
            tied: read.flag("tie_word_embeddings", defaults.tied)?,
            dropout: match gpt2 {
                true => DecoderDropout {
                    embedding: rate("embd_pdrop", 0.1)?,
                    attention: rate(keys.attention_dropout, 0.1)?,
                    residual: rate("resid_pdrop", 0.1)?,
                    classifier,
                },
                false => DecoderDropout {
                    embedding: 0.0,
                    attention: rate(keys.attention_dropout, 0.0)?,
                    residual: 0.0,
                    classifier,
                },
            },
            initializer_range: read.positive("initializer_range")?.unwrap_or(0.02),
            head: HeadConfig::read(&read)?,
            dtype: read.dtype()?,
            eos_token_ids: tokens(&read, "eos_token_id")?,
            bos_token_id: tokens(&read, "bos_token_id")?.first().copied(),
            pad_token_id: tokens(&read, "pad_token_id")?.first().copied(),
            positions: match gpt2 {
                true => Positions::Learned,
                false => rotary(&read, family, &defaults, head_dim, max_positions)?,
            },
            kinds,
            window,
            attention_softcap: match family {
                DecoderFamily::Gemma2 => softcap("attn_logit_softcapping", 50.0)?,
                _ => None,
            },
            final_softcap: match family.is_gemma() {
                true => softcap("final_logit_softcapping", 30.0)?,
                false => None,
            },
            score_scale: match family {
                DecoderFamily::Gpt2 if !read.flag("scale_attn_weights", true)? => 1.0,
                DecoderFamily::Gemma2 | DecoderFamily::Gemma3 => {
                    let scalar = read.factor("query_pre_attn_scalar")?.unwrap_or(256.0);
                    1.0 / scalar.sqrt()
                }
                _ => plain_scale,
            },
            scale_by_layer: gpt2 && read.flag("scale_attn_by_inverse_layer_idx", false)?,
            biases: bias,
            raw,
        })
    }

    /// Number of outputs of a classification head.
    pub fn num_labels(&self) -> usize {
        self.head.labels.count()
    }

    /// Most tokens of a sequence.
    pub fn max_tokens(&self) -> usize {
        self.positions_in_all().saturating_sub(self.reserved)
    }

    /// Most tokens of a sequence, virtual ones included.
    pub fn positions_in_all(&self) -> usize {
        match &self.positions {
            Positions::Learned => self.max_positions,
            Positions::Rotary { full, .. } => full.reach(self.max_positions),
        }
    }

    /// How the decoder knows where a token stands.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// What each layer's attention sees, and how many tokens a window holds.
    pub fn layer_kinds(&self) -> (&[LayerKind], Option<usize>) {
        (&self.kinds, self.window)
    }

    /// Makes this the config of a model that predicts tokens.
    pub fn set_causal(&mut self) {
        self.head = HeadConfig::vocabulary(self.family.causal_architecture(), &mut self.raw);
    }

    /// Makes this the config of a classifier: its class, its labels, and what they mean.
    ///
    /// # Errors
    /// [`Error::Config`] for labels of tokens in a family for which transformers has no such class.
    pub fn set_classification(&mut self, labels: Labels, problem_type: ProblemType) -> Result<()> {
        let class = match problem_type {
            ProblemType::Tokens => self.family.token_classification_architecture(),
            _ => Some(self.family.classification_architecture()),
        };
        let class = class.ok_or_else(|| Error::Config {
            file: CONFIG_FILE.to_string(),
            key: "model_type".to_string(),
            found: self.family.model_type().to_string(),
            expected: "a family that transformers has a class for, which labels tokens".to_string(),
            help: "take a model of another family".to_string(),
        })?;
        self.head = HeadConfig::classifier(class, labels, problem_type);
        Ok(())
    }

    /// The text of the config.json to save: what was read, with those of this config's public values that were changed
    /// since, in the spelling that the file used, or else in the family's.
    pub fn to_json(&self) -> String {
        let keys = self.family.keys();
        let mut map = self.raw.clone();
        // A map of strings to JSON values always prints.
        let text = serde_json::to_string(&map).unwrap_or_default();
        let read = DecoderConfig::parse(CONFIG_FILE, text.as_bytes()).ok();
        let mut changed = |spellings: &[&str], value: &dyn Fn(&DecoderConfig) -> Value| {
            if read.as_ref().map(value) != Some(value(self)) {
                put(&mut map, spellings, value(self));
            }
        };
        changed(&["model_type"], &|c| c.family.model_type().into());
        changed(keys.hidden_size, &|c| c.hidden_size.into());
        changed(keys.layers, &|c| c.layers.into());
        changed(keys.heads, &|c| c.heads.into());
        changed(&["num_key_value_heads"], &|c| c.kv_heads.into());
        changed(&["head_dim"], &|c| c.head_dim.into());
        changed(keys.intermediate_size, &|c| c.intermediate_size.into());
        changed(&["vocab_size"], &|c| c.vocab_size.into());
        changed(keys.max_positions, &|c| c.max_positions.into());
        changed(&[keys.norm_eps], &|c| c.norm_eps.into());
        changed(&[keys.hidden_act], &|c| c.hidden_act.name().into());
        changed(&["tie_word_embeddings"], &|c| c.tied.into());
        changed(&["initializer_range"], &|c| c.initializer_range.into());
        changed(&["embd_pdrop"], &|c| c.dropout.embedding.into());
        changed(&["resid_pdrop"], &|c| c.dropout.residual.into());
        changed(&[keys.attention_dropout], &|c| c.dropout.attention.into());
        changed(&["bos_token_id"], &|c| c.bos_token_id.into());
        changed(&["pad_token_id"], &|c| c.pad_token_id.into());
        changed(&["eos_token_id"], &|c| match c.eos_token_ids[..] {
            [] => Value::Null,
            [one] => one.into(),
            _ => c.eos_token_ids.clone().into(),
        });
        self.head.put(&mut map);
        put_dtype(&mut map, self.dtype);
        let mut text = serde_json::to_string_pretty(&map).unwrap_or_default();
        text.push('\n');
        text
    }
}
