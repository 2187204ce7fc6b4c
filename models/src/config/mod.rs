//! `config.json`: what transformers writes, in the spellings of its versions 4 and 5: [`ModelConfig`] for the encoder
//! families, [`DecoderConfig`] for the decoders, [`Config`] for whichever of them a file describes.
//!
//! What Graft needs is checked and typed. Everything else is kept as it was read and written back unchanged, so a
//! model that passes through Graft loses nothing.

use graft_tensor::DType;
use serde_json::{Map, Value};

use crate::error::Result;
use crate::json::parse_object;
use crate::source::ModelSource;

mod decoder;
mod encoder;
mod head;
mod read;
mod rope;

pub use decoder::{DecoderConfig, DecoderDropout, DecoderFamily, LayerKind, Positions};
pub use encoder::{DropoutRates, Family, ModelConfig};
pub use head::{HeadConfig, Labels, MAX_LABELS, ProblemType};
use read::{Architecture, Reader};
pub use rope::{RopeParameters, RopeScaling};

/// The file's name.
pub const CONFIG_FILE: &str = "config.json";

/// Reads the model's config.json by one of the parsers.
fn load_with<C>(source: &ModelSource, parse: impl Fn(&str, &[u8]) -> Result<C>) -> Result<C> {
    let text = source.require_file(CONFIG_FILE, "every model directory of transformers has one")?;
    parse(&source.display_file(CONFIG_FILE), &text)
}

/// The config of a model of any family.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// Reads in both directions: BERT and its kin.
    Encoder(Box<ModelConfig>),
    /// Reads forwards: GPT-2, Llama and their kin.
    Decoder(Box<DecoderConfig>),
}

impl Config {
    /// Reads the model's config.json.
    ///
    /// # Errors
    /// As [`ModelConfig::load`] and [`DecoderConfig::load`].
    pub fn load(source: &ModelSource) -> Result<Config> {
        load_with(source, Self::parse)
    }

    /// [`Config::load`] where an encoder is wanted: an architecture that is not supported is named beside encoders alone.
    ///
    /// # Errors
    /// As there.
    pub fn load_for_encoder(source: &ModelSource) -> Result<Config> {
        let expected = Family::ALL.map(Family::model_type);
        load_with(source, |file, text| Self::among(file, text, &expected))
    }

    /// [`Config::load`] where a decoder is wanted: an architecture that is not supported is named beside decoders alone.
    ///
    /// # Errors
    /// As there.
    pub fn load_for_decoder(source: &ModelSource) -> Result<Config> {
        let expected = DecoderFamily::ALL.map(DecoderFamily::model_type);
        load_with(source, |file, text| Self::among(file, text, &expected))
    }

    /// Parses and checks the text of a config.json; `file` stands for it in messages.
    ///
    /// # Errors
    /// An architecture that is not supported, named beside those that are; and as [`ModelConfig::parse`] and
    /// [`DecoderConfig::parse`].
    pub fn parse(file: &str, text: &[u8]) -> Result<Config> {
        let encoders = Family::ALL.map(Family::model_type);
        let decoders = DecoderFamily::ALL.map(DecoderFamily::model_type);
        Self::among(file, text, &[&encoders[..], &decoders].concat())
    }

    /// What the checkpoint is for.
    pub fn head(&self) -> &HeadConfig {
        match self {
            Config::Encoder(config) => &config.head,
            Config::Decoder(config) => &config.head,
        }
    }

    /// Makes this the config of a classifier: its class, its labels, and what they mean.
    ///
    /// # Errors
    /// As [`DecoderConfig::set_classification`].
    pub fn set_classification(&mut self, labels: Labels, problem_type: ProblemType) -> Result<()> {
        match self {
            Config::Encoder(config) => {
                config.set_classification(labels, problem_type);
                Ok(())
            }
            Config::Decoder(config) => config.set_classification(labels, problem_type),
        }
    }

    fn among(file: &str, text: &[u8], expected: &[&str]) -> Result<Config> {
        let raw = parse_object(file, text)?;
        Ok(match Reader::new(file, &raw).architecture(expected)? {
            Architecture::Encoder(_) => Config::Encoder(Box::new(ModelConfig::parse(file, text)?)),
            Architecture::Decoder(_) => {
                Config::Decoder(Box::new(DecoderConfig::parse(file, text)?))
            }
        })
    }
}

/// The nonlinearity of the feed-forward layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HiddenAct {
    /// x·Φ(x), by the error function.
    Gelu,
    /// The approximation of gelu by tanh.
    GeluTanh,
    /// max(x, 0)
    Relu,
    /// x·sigmoid(x)
    Silu,
    /// tanh(x)
    Tanh,
}

impl HiddenAct {
    /// Every name that transformers has for these functions.
    const NAMES: [(&'static str, HiddenAct); 9] = [
        ("gelu", HiddenAct::Gelu),
        ("gelu_python", HiddenAct::Gelu),
        ("gelu_new", HiddenAct::GeluTanh),
        ("gelu_pytorch_tanh", HiddenAct::GeluTanh),
        ("gelu_fast", HiddenAct::GeluTanh),
        ("relu", HiddenAct::Relu),
        ("silu", HiddenAct::Silu),
        ("swish", HiddenAct::Silu),
        ("tanh", HiddenAct::Tanh),
    ];

    /// The name that is written.
    fn name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(_, act)| *act == self)
            .map_or("gelu", |(name, _)| name)
    }
}

/// Largest values accepted: far beyond any model of these families, and small enough that no product of two of them
/// overflows.
const MAX_HIDDEN: u64 = 1 << 16;
const MAX_LAYERS: u64 = 1 << 10;
const MAX_INTERMEDIATE: u64 = 1 << 18;
const MAX_VOCAB: u64 = 1 << 24;
const MAX_POSITIONS: u64 = 1 << 20;

/// Sets every spelling that is there, or else the first one. Numbers that are equal stay as they were written.
fn put(map: &mut Map<String, Value>, spellings: &[&str], value: Value) {
    let mut set = false;
    for &key in spellings {
        if let Some(old) = map.get_mut(key) {
            set = true;
            let equal = *old == value || (old.as_f64().is_some() && old.as_f64() == value.as_f64());
            if !equal {
                *old = value.clone();
            }
        }
    }
    if !set {
        map.insert(spellings[0].to_string(), value);
    }
}

/// Sets the element type, if it is known, in the spelling of the file's version.
fn put_dtype(map: &mut Map<String, Value>, dtype: Option<DType>) {
    if let Some(dtype) = dtype {
        let name = DTYPE_NAMES
            .iter()
            .find(|(_, d)| *d == dtype)
            .map_or("float32", |(n, _)| n);
        let keys: &[&str] = if map.contains_key("dtype") {
            &["dtype", "torch_dtype"]
        } else {
            &["torch_dtype"]
        };
        put(map, keys, name.into());
    }
}

/// Names of element types in config.json, without the `torch.` that some old files have in front.
const DTYPE_NAMES: [(&str, DType); 4] = [
    ("float32", DType::F32),
    ("bfloat16", DType::Bf16),
    ("float16", DType::F16),
    ("float64", DType::F64),
];

fn activation_named(name: &str) -> Option<HiddenAct> {
    HiddenAct::NAMES
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, act)| *act)
}
