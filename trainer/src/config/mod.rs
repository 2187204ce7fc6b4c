//! The typed configuration of a run.
//!
//! A TOML file, `--set key=value` and flags are layered by [`Settings`] (flags over `--set` over the file) and
//! resolved once into a [`RunConfig`], in which every default is spelled out. Written back with
//! [`RunConfig::to_toml`], it resolves to itself: that file trains the same run again.

mod adapter;
mod keys;
mod optimizer;
mod read;
mod resolve;
mod rules;
mod settings;
mod strategy;
mod task;
#[cfg(test)]
mod tests;
mod values;

use std::path::PathBuf;

use serde::Serialize;

pub use adapter::{
    AdapterSettings, BOTTLENECK, BiasSetting, FRONT, InitSetting, Pattern, RANK, TargetSetting,
};
pub use keys::{KEYS, Key, describe};
pub use rules::Rule;
pub use settings::{Origin, Settings};
pub use strategy::{AdapterKind, Gradual, Strategy};
pub use task::TaskKind;
pub use values::{Base, CacheKind, Every, Init, OptimizerKind, Precision, Schedule, Warmup};

use crate::batch::BatchSize;
use crate::device::DeviceChoice;
use crate::error::{Error, Result};

/// Everything a training run depends on, with all defaults filled in and all paths absolute.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunConfig {
    /// `[model]`
    pub model: ModelConfig,
    /// `[data]`
    pub data: DataConfig,
    /// `[task]`
    pub task: TaskConfig,
    /// `[strategy]`
    pub strategy: StrategyConfig,
    /// `[adapter]`, where the strategy has one
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterSettings>,
    /// `[optimizer]`
    pub optimizer: OptimizerConfig,
    /// `[train]`
    pub train: TrainConfig,
    /// `[output]`
    pub output: OutputConfig,
}

/// The pretrained model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelConfig {
    /// Its directory or archive, absolute; or a hub id (`org/name`, `org/name@revision`), as it was given.
    pub path: String,
    /// Where its weights come from; default: pretrained.
    pub init: Init,
    /// What the weights of its linear layers are held in; default: f32.
    pub base: Base,
}

/// The examples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataConfig {
    /// File of training examples.
    pub train: PathBuf,
    /// File of evaluation examples; without one, no epoch is evaluated and the last model is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<PathBuf>,
    /// Column of the text, or of the messages; default [`TaskKind::text_column`].
    pub text: String,
    /// Column of the second text; none: `text_pair` where the file has such a column.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_pair: Option<String>,
    /// Column of the label; default `label`. None where the task has no labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Most tokens of one example, special tokens included; none: the model's positions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length: Option<usize>,
}

/// The task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskConfig {
    /// Default: classify.
    pub kind: TaskKind,
}

/// What is trained.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StrategyConfig {
    /// Default: full.
    pub name: Strategy,
    /// Applied in order after the strategy; the last rule that matches a parameter decides whether it is trained, and each
    /// changes how fast.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// Dropout probability in [0, 1) of every dropout layer; none: the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropout: Option<f64>,
}

/// How parameters move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OptimizerConfig {
    /// Default: AdamW with betas 0.9 and 0.999 and eps 1e-8. SGD's momentum is 0.9 by default.
    #[serde(flatten)]
    pub kind: OptimizerKind,
    /// Peak learning rate; its default depends on the strategy, see [`OptimizerConfig::default_lr`].
    pub lr: f64,
    /// Decoupled weight decay; default 0.01.
    pub weight_decay: f64,
    /// Whether biases and norm weights are excluded from weight decay; default true.
    pub no_decay: bool,
    /// Largest norm of the whole gradient, 0 for no clipping; default 1.
    pub clip_norm: f64,
    /// Default: linear.
    pub schedule: Schedule,
    /// Default: a tenth of all steps.
    pub warmup: Warmup,
}

/// The loop.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainConfig {
    /// Passes over the training examples; default 3.
    pub epochs: usize,
    /// Default: 16 examples, or 4 sequences of documents or conversations.
    #[serde(flatten)]
    pub batch: BatchSize,
    /// Batches in one optimizer step; default 1.
    pub accumulate: usize,
    /// Whether batches hold examples of like length; default false.
    pub group_by_length: bool,
    /// Type of activations and products, in training and evaluation; default f32.
    pub precision: Precision,
    /// Where to compute; default the CPU.
    pub device: DeviceChoice,
    /// Whether the first steps are watched for what is wrongly wired; default true.
    pub audit: bool,
    /// When what a stopped run needs to go on is written; default: every 10 minutes. Results do not depend on it.
    pub checkpoint: Every,
    /// Of the new head, the order and dropout; default 0.
    pub seed: u64,
    /// Worker threads; none: all cores. Results do not depend on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Where a frozen trunk's outputs are kept; default: in memory, then in a file.
    pub cache: CacheKind,
    /// MiB of them in memory at most; default 256, none where none are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_memory: Option<usize>,
    /// MiB that the run may take, 0 for no limit; none: what the machine has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<usize>,
    /// Directory where they outlive the run; none: they go when it ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
}

/// What is left behind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OutputConfig {
    /// Directory of the run and of the trained model.
    pub dir: PathBuf,
}

impl RunConfig {
    /// Virtual tokens that an adapter puts in front of each text.
    pub fn virtual_tokens(&self) -> usize {
        let adapter = self.adapter.as_ref();
        adapter.and_then(|adapter| adapter.tokens).unwrap_or(0)
    }

    /// The whole configuration as TOML, which resolves to an equal configuration wherever it lies.
    ///
    /// # Errors
    /// A path that is not UTF-8, which TOML cannot hold.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| {
            Error::config(
                "configuration",
                format!("it cannot be written as TOML: {e}"),
                "use paths that are valid UTF-8",
            )
        })
    }
}
