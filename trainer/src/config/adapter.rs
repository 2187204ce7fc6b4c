//! `[adapter]`: what stands beside the frozen layers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::read::{choice, count, number};
use super::{AdapterKind, Settings};
use crate::error::{Error, Result};

/// The rank where nothing is said.
pub const RANK: usize = 8;
/// The size of a bottleneck where nothing is said.
pub const BOTTLENECK: usize = 32;
/// The virtual tokens of a prompt or a prefix where nothing is said.
pub const FRONT: usize = 16;

/// The adapters of a run. What PEFT takes for a family is not known yet, and stands as `None`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdapterSettings {
    /// Default: 8. Other kinds than low-rank adapters have none, and none of what is theirs alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Default: twice the rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Default: 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
    /// Default: those of the family.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<TargetSetting>,
    /// Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rank_pattern: Vec<Pattern<usize>>,
    /// Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub alpha_pattern: Vec<Pattern<f64>>,
    /// Default: kaiming.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<InitSetting>,
    /// Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plus: Option<f64>,
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<BiasSetting>,
    /// Default: none beside a classification head.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub modules_to_save: Vec<String>,
    /// Default: those of the family.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feedforward: Option<Vec<String>>,
    /// Of a bottleneck; default: 32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<usize>,
    /// Virtual tokens of a prompt or a prefix; default: 16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// What a prompt begins as; default: words of the vocabulary, at random.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Inner width of the layers that a prefix is the product of while it is trained; default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub projection: Option<usize>,
}

/// `"all-linear"`, or names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetSetting {
    /// Every linear layer but the head.
    AllLinear,
    /// Names, or their ends.
    Names(Vec<String>),
}

/// How low-rank matrices begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitSetting {
    /// A uniform, B zero.
    Kaiming,
    /// A normal, B zero.
    Gaussian,
    /// Both random, their product zero.
    Orthogonal,
    /// The weight's principal part.
    Pissa,
}

/// Which biases are trained with the adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BiasSetting {
    /// None.
    None,
    /// Those of layers that have one.
    Adapted,
    /// All.
    All,
}

/// `EXPRESSION NUMBER`: another number for the names that an expression stands for the end of.
#[derive(Debug, Clone, PartialEq)]
pub struct Pattern<T> {
    /// The expression.
    pub name: String,
    /// The number.
    pub value: T,
}

/// Keys that low-rank adapters alone have.
const LOW_RANK: [&str; 8] = [
    "adapter.rank",
    "adapter.alpha",
    "adapter.dropout",
    "adapter.rank_pattern",
    "adapter.alpha_pattern",
    "adapter.init",
    "adapter.plus",
    "adapter.bias",
];
const OTHERS: [&str; 8] = [
    "adapter.targets",
    "adapter.layers",
    "adapter.modules_to_save",
    "adapter.feedforward",
    "adapter.size",
    "adapter.tokens",
    "adapter.text",
    "adapter.projection",
];

/// Whether a key means anything for a kind of adapter.
fn has(kind: AdapterKind, key: &str) -> bool {
    match key {
        "adapter.feedforward" => kind == AdapterKind::Ia3,
        "adapter.size" => kind == AdapterKind::Bottleneck,
        "adapter.targets" | "adapter.layers" => !kind.is_front(),
        "adapter.tokens" => kind.is_front(),
        "adapter.text" => kind == AdapterKind::Prompt,
        "adapter.projection" => kind == AdapterKind::Prefix,
        key if LOW_RANK.contains(&key) => kind.is_low_rank(),
        _ => true,
    }
}

impl AdapterSettings {
    /// What is taken where nothing is said.
    pub fn usual(kind: AdapterKind) -> AdapterSettings {
        let low_rank = kind.is_low_rank();
        AdapterSettings {
            rank: low_rank.then_some(RANK),
            alpha: low_rank.then_some(2.0 * RANK as f64),
            dropout: low_rank.then_some(0.0),
            targets: None,
            layers: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            init: low_rank.then_some(InitSetting::Kaiming),
            plus: None,
            bias: low_rank.then_some(BiasSetting::None),
            modules_to_save: Vec::new(),
            feedforward: None,
            size: (kind == AdapterKind::Bottleneck).then_some(BOTTLENECK),
            tokens: kind.is_front().then_some(FRONT),
            text: None,
            projection: None,
        }
    }

    /// Checks `[adapter]` and fills in the defaults.
    pub(super) fn resolve(
        s: &Settings,
        kind: Option<AdapterKind>,
    ) -> Result<Option<AdapterSettings>> {
        let foreign = |key: &&str| kind.is_none_or(|kind| !has(kind, key));
        for key in LOW_RANK.into_iter().chain(OTHERS).filter(foreign) {
            if let Some(origin) = s.origin(key) {
                let (why, help) = match kind {
                    None => (
                        "`strategy.name` has no adapter".to_owned(),
                        "remove it, or set strategy.name = \"lora\"",
                    ),
                    Some(kind) => (
                        format!("`strategy.name` has {}", kind.name()),
                        "remove it, or take another adapter",
                    ),
                };
                let what = format!("`{key}` has no effect: {why}");
                return Err(Error::config(origin, what, help));
            }
        }
        let Some(kind) = kind else { return Ok(None) };
        let names = "a list of names";
        let list = |key: &str| -> Result<Option<Vec<String>>> {
            let found = s.get(key, names, |list: &Vec<String>| {
                list.iter().all(|name| !name.is_empty())
            })?;
            Ok(found.map(|(list, _)| list))
        };
        let mut settings = AdapterSettings {
            targets: choice(s, "adapter.targets", "\"all-linear\" or a list of names")?,
            layers: choice(s, "adapter.layers", "a list of layer numbers, from 0")?,
            modules_to_save: list("adapter.modules_to_save")?.unwrap_or_default(),
            feedforward: list("adapter.feedforward")?,
            ..AdapterSettings::usual(kind)
        };
        settings.size = count(s, "adapter.size")?.or(settings.size);
        settings.tokens = count(s, "adapter.tokens")?.or(settings.tokens);
        settings.projection = count(s, "adapter.projection")?;
        let text = s.get("adapter.text", "a text", |text: &String| {
            !text.trim().is_empty()
        })?;
        settings.text = text.map(|(text, _)| text);
        if !kind.is_low_rank() {
            return Ok(Some(settings));
        }
        let rank = count(s, "adapter.rank")?.unwrap_or(RANK);
        let some = |x: f64| x.is_finite() && x != 0.0;
        let above = |x: f64| x > 0.0 && x.is_finite();
        let alpha = number(s, "adapter.alpha", "a number other than 0", some)?;
        settings.alpha = Some(alpha.unwrap_or(2.0 * rank as f64));
        settings.rank = Some(rank);
        let dropout = |p: f64| (0.0..1.0).contains(&p);
        let dropout = number(s, "adapter.dropout", "a number in [0, 1)", dropout)?;
        settings.dropout = Some(dropout.unwrap_or(0.0));
        let ranks = "a list of an expression and a rank each, [\"query 4\"]";
        settings.rank_pattern = choice(s, "adapter.rank_pattern", ranks)?.unwrap_or_default();
        let alphas = "a list of an expression and an alpha each, [\"query 16\"]";
        settings.alpha_pattern = choice(s, "adapter.alpha_pattern", alphas)?.unwrap_or_default();
        let inits = "\"kaiming\", \"gaussian\", \"orthogonal\" or \"pissa\"";
        settings.init = Some(choice(s, "adapter.init", inits)?.unwrap_or(InitSetting::Kaiming));
        settings.plus = number(s, "adapter.plus", "a number above 0", above)?;
        let biases = "\"none\", \"adapted\" or \"all\"";
        settings.bias = Some(choice(s, "adapter.bias", biases)?.unwrap_or(BiasSetting::None));
        Ok(Some(settings))
    }
}

impl Serialize for TargetSetting {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            TargetSetting::AllLinear => to.serialize_str("all-linear"),
            TargetSetting::Names(names) => names.serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for TargetSetting {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let names = match toml::Value::deserialize(from)? {
            toml::Value::String(text) if text == "all-linear" => {
                return Ok(TargetSetting::AllLinear);
            }
            // `--set adapter.targets=query,value`
            toml::Value::String(text) => text.split(',').map(|s| s.trim().to_owned()).collect(),
            toml::Value::Array(list) => list
                .into_iter()
                .map(|name| name.as_str().map(str::to_owned))
                .collect::<Option<Vec<String>>>()
                .ok_or_else(|| de::Error::custom("no list of names"))?,
            _ => return Err(de::Error::custom("neither names nor all-linear")),
        };
        match names.is_empty() || names.iter().any(String::is_empty) {
            true => Err(de::Error::custom("no name")),
            false => Ok(TargetSetting::Names(names)),
        }
    }
}

impl<T: FromStr> FromStr for Pattern<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let value = |text: &str| text.parse().ok();
        match words[..] {
            [name, number] => match value(number) {
                Some(value) => Ok(Pattern {
                    name: name.to_owned(),
                    value,
                }),
                None => Err(format!("`{number}` in `{text}` is no such number")),
            },
            _ => Err(format!("`{text}` is not an expression and a number")),
        }
    }
}

impl<T: fmt::Display> Serialize for Pattern<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{} {}", self.name, self.value))
    }
}

impl<'de, T: FromStr> Deserialize<'de> for Pattern<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?
            .parse()
            .map_err(de::Error::custom)
    }
}
