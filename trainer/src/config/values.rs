//! The values a configuration's keys take, where they are more than numbers and strings.

use std::fmt;
use std::str::FromStr;

use graft_tensor::DType;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::rules::Rule;
use super::strategy::Strategy;
use super::task::TaskKind;

/// Where a model's weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// Its checkpoint.
    Pretrained,
    /// The seed: the model's directory needs a configuration and a tokenizer only.
    Random,
}

/// How the learning rate goes on after the warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays at its peak.
    Constant,
    /// Falls in a straight line to 0 at the last step.
    Linear,
    /// Falls along half a cosine to 0 at the last step.
    Cosine,
}

/// The type of activations and products. Weights, their gradients and the optimizer's state are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 24 bits.
    F32,
    /// 8 bits, and the range of f32; sums are kept in f32.
    Bf16,
}

impl Precision {
    /// The type itself.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
        }
    }
}

/// The update rule with the settings only it has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum OptimizerKind {
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019).
    AdamW {
        /// Averaging factors of the gradient and of its square, each in [0, 1).
        betas: [f64; 2],
        /// Added to the denominator; above 0.
        eps: f64,
    },
    /// Stochastic gradient descent.
    Sgd {
        /// In [0, 1); 0 for none.
        momentum: f64,
    },
}

/// What the frozen weights of a model's layers are held in: those of linear layers, not embeddings, norms and heads.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Base {
    /// As they are.
    #[default]
    F32,
    /// Rounded.
    Bf16,
    /// In 4.127 bits each: QLoRA's.
    Nf4,
    /// In 8.5 bits each.
    Int8,
}

impl Base {
    /// The type itself.
    pub fn dtype(self) -> DType {
        match self {
            Base::F32 => DType::F32,
            Base::Bf16 => DType::Bf16,
            Base::Nf4 => DType::Nf4,
            Base::Int8 => DType::Int8,
        }
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dtype().fmt(f)
    }
}

/// Where the outputs of frozen layers are kept from epoch to epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheKind {
    /// Nowhere: they are computed in every epoch.
    Off,
    /// In memory, as many as fit.
    Memory,
    /// In memory, and in a file what does not fit.
    File,
}

/// How often a run writes a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Every {
    /// It writes none, not even when it is told to stop.
    Never,
    /// So many optimizer steps.
    Steps(u64),
    /// So many epochs.
    Epochs(u64),
    /// So many minutes.
    Minutes(u64),
}

impl fmt::Display for Every {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, unit) = match self {
            Every::Never => return f.write_str("never"),
            Every::Steps(count) => (count, "step"),
            Every::Epochs(count) => (count, "epoch"),
            Every::Minutes(count) => (count, "minute"),
        };
        let plural = if *count == 1 { "" } else { "s" };
        write!(f, "{count} {unit}{plural}")
    }
}

impl FromStr for Every {
    type Err = String;

    fn from_str(text: &str) -> Result<Every, String> {
        if text == "never" {
            return Ok(Every::Never);
        }
        let wrong = || format!("`{text}` is no interval");
        let (count, unit) = text.split_once(' ').ok_or_else(wrong)?;
        let count: u64 = count.parse().map_err(|_| wrong())?;
        let unit = unit.trim();
        match unit.strip_suffix('s').unwrap_or(unit) {
            _ if count == 0 => Err(wrong()),
            "step" => Ok(Every::Steps(count)),
            "epoch" => Ok(Every::Epochs(count)),
            "minute" => Ok(Every::Minutes(count)),
            _ => Err(wrong()),
        }
    }
}

/// How long the learning rate rises, in a straight line from 0 to its peak.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Warmup {
    /// A fraction of all optimizer steps, in [0, 1).
    Ratio(f64),
    /// A number of optimizer steps.
    Steps(u64),
}

impl Warmup {
    /// The optimizer steps of the warmup, of `total`; a ratio is rounded up, as transformers does.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Warmup::Ratio(ratio) => ((total as f64 * ratio).ceil() as u64).min(total),
            Warmup::Steps(steps) => steps.min(total),
        }
    }
}

impl<'de> Deserialize<'de> for Warmup {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(from)? {
            toml::Value::Float(ratio) if (0.0..1.0).contains(&ratio) => Ok(Warmup::Ratio(ratio)),
            toml::Value::Integer(steps) => match u64::try_from(steps) {
                Ok(steps) => Ok(Warmup::Steps(steps)),
                Err(_) => Err(de::Error::custom("negative")),
            },
            _ => Err(de::Error::custom("neither a ratio nor a number of steps")),
        }
    }
}

/// Serde by way of `Display` and `FromStr`.
macro_rules! as_string {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(de::Error::custom)
            }
        }
    )*};
}
as_string!(Strategy, Rule, Every, TaskKind);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_read_as_they_are_written() {
        let intervals = [
            ("never", Every::Never),
            ("1 step", Every::Steps(1)),
            ("500 steps", Every::Steps(500)),
            ("2 epochs", Every::Epochs(2)),
            ("10 minutes", Every::Minutes(10)),
        ];
        for (text, every) in intervals {
            assert_eq!(text.parse(), Ok(every));
            assert_eq!(every.to_string(), text);
        }
        assert_eq!("1 minutes".parse(), Ok(Every::Minutes(1)));
        for text in [
            "",
            "10",
            "steps",
            "0 steps",
            "-1 steps",
            "3 hours",
            "1.5 epochs",
            "1 stepss",
        ] {
            assert!(text.parse::<Every>().is_err(), "{text}");
        }
    }

    #[test]
    fn warmup_rounds_up_and_never_passes_the_end() {
        assert_eq!(Warmup::Ratio(0.1).steps(101), 11);
        assert_eq!(Warmup::Ratio(0.0).steps(101), 0);
        assert_eq!(Warmup::Steps(7).steps(101), 7);
        assert_eq!(Warmup::Steps(700).steps(101), 101);
    }
}
