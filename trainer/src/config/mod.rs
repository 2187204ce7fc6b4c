//! The typed configuration of a run.
//!
//! A TOML file, `--set key=value` and flags are layered by [`Settings`] (flags over `--set` over the file) and
//! resolved once into a [`RunConfig`], in which every default is spelled out. Written back with
//! [`RunConfig::to_toml`], it resolves to itself: that file trains the same run again.

mod adapter;
mod keys;
mod optimizer;
mod rules;
mod settings;
mod strategy;
#[cfg(test)]
mod tests;
mod values;

use std::path::{Path, PathBuf};

use graft_models::Strategy as Part;
use serde::Serialize;

pub use adapter::{
    AdapterSettings, BOTTLENECK, BiasSetting, FRONT, InitSetting, Pattern, RANK, TargetSetting,
};
pub use keys::{KEYS, Key, describe};
use optimizer::optimizer;
pub use rules::Rule;
pub use settings::{Origin, Settings};
pub use strategy::{AdapterKind, Gradual, Strategy};
pub use values::{
    Base, CacheKind, Every, Init, OptimizerKind, Precision, Schedule, TaskKind, Warmup,
};

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

impl OptimizerConfig {
    /// The learning rate when none is given. A fresh head on a frozen trunk bears a large one; the deeper the
    /// pretrained layers that move, the smaller. SGD has no per-parameter scale and needs about a hundred times as
    /// much.
    pub fn default_lr(kind: &OptimizerKind, strategy: &Strategy) -> f64 {
        let of = |part: &Part| match (kind, part) {
            (OptimizerKind::AdamW { .. }, Part::Head) => 1e-3,
            // Biases and norms are few and cannot do much harm.
            (OptimizerKind::AdamW { .. }, Part::Bitfit | Part::Norms) => 2e-3,
            (OptimizerKind::AdamW { .. }, Part::Last(_)) => 1e-4,
            (OptimizerKind::AdamW { .. }, Part::Full) => 5e-5,
            (OptimizerKind::Sgd { .. }, Part::Head) => 1e-1,
            (OptimizerKind::Sgd { .. }, Part::Bitfit | Part::Norms) => 2e-1,
            (OptimizerKind::Sgd { .. }, Part::Last(_)) => 1e-2,
            (OptimizerKind::Sgd { .. }, Part::Full) => 5e-3,
        };
        let adapter = strategy.adapter.map(|adapter| match (kind, adapter) {
            // What nothing but the loss ties to the weights has far to go, and so have factors that begin at 1.
            (
                OptimizerKind::AdamW { .. },
                AdapterKind::Ia3 | AdapterKind::Prompt | AdapterKind::Prefix,
            ) => 3e-2,
            (OptimizerKind::AdamW { .. }, _) => 2e-3,
            (
                OptimizerKind::Sgd { .. },
                AdapterKind::Ia3 | AdapterKind::Prompt | AdapterKind::Prefix,
            ) => 3.0,
            (OptimizerKind::Sgd { .. }, _) => 2e-1,
        });
        let parts = strategy.parts.iter().map(of);
        parts.chain(adapter).fold(f64::INFINITY, f64::min)
    }
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
    /// MiB of them in memory at most; default 256.
    pub cache_memory: usize,
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

    /// Checks every setting and fills in the defaults.
    ///
    /// # Errors
    /// A required key that is missing, a value of the wrong type or out of range, two settings that exclude each
    /// other at the same level of precedence, or an output directory that would replace what the run reads.
    pub fn resolve(mut settings: Settings) -> Result<RunConfig> {
        exclusive(&mut settings, "train.batch_size", "train.max_tokens")?;
        let s = &settings;
        let kinds = "\"classify\", \"clm\", \"chat\" or \"mlm\"";
        let task = TaskConfig {
            kind: choice(s, "task.kind", kinds)?.unwrap_or(TaskKind::Classify),
        };
        let init = choice(s, "model.init", "\"pretrained\" or \"random\"")?;
        let model = ModelConfig {
            path: required(model_path(s)?, "model.path", "--model DIR")?,
            init: init.unwrap_or(Init::Pretrained),
            base: choice(s, "model.base", "\"f32\", \"bf16\", \"nf4\" or \"int8\"")?
                .unwrap_or_default(),
        };
        foreign_to_task(s, task.kind, &model)?;
        let column = |key: &str| -> Result<Option<String>> {
            let name = s.get(key, "the name of a column", |name: &String| {
                !name.is_empty()
            })?;
            Ok(name.map(|(name, _)| name))
        };
        let data = DataConfig {
            train: required(path(s, "data.train")?, "data.train", "--train FILE")?,
            eval: path(s, "data.eval")?,
            text: column("data.text")?.unwrap_or_else(|| task.kind.text_column().into()),
            text_pair: column("data.text_pair")?,
            label: match task.kind {
                TaskKind::Classify => Some(column("data.label")?.unwrap_or_else(|| "label".into())),
                TaskKind::Clm | TaskKind::Chat | TaskKind::Mlm => None,
            },
            max_length: count(s, "data.max_length")?,
        };
        distinct_columns(s, &data)?;
        let name = worded(
            s,
            "strategy.name",
            "head, last:K (K 1 or more), bitfit, norms, lora, rslora, dora, ia3, adapter, prompt, prefix or full, with gradual and llrd, \
             joined by +",
        )?;
        let rules = "a list of rules, each \"freeze PATTERN\", \"train PATTERN\", \"lr PATTERN 1e-4\", \"lr PATTERN \
                     x0.5\" or \"decay PATTERN 0.1\"";
        let strategy = StrategyConfig {
            name: name.unwrap_or_else(Strategy::full),
            rules: choice(s, "strategy.rules", rules)?.unwrap_or_default(),
            dropout: number(s, "strategy.dropout", "a number in [0, 1)", |p| {
                (0.0..1.0).contains(&p)
            })?,
        };
        if model.init == Init::Random && strategy.name.freezes() {
            let origin = s.origin("strategy.name").or(s.origin("model.init"));
            return Err(Error::config(
                origin.map_or_else(String::new, Origin::to_string),
                "`model.init` is \"random\", and `strategy.name` would freeze weights that have learnt nothing",
                "leave strategy.name at \"full\"",
            ));
        }
        if model.base != Base::F32 && strategy.name.adapter.is_none() {
            let origin = s.origin("model.base").map(Origin::to_string);
            return Err(Error::config(
                origin.unwrap_or_default(),
                format!(
                    "`model.base` is \"{}\", and `strategy.name` is \"{}\", which trains or saves the weights that would be rounded",
                    model.base, strategy.name
                ),
                "take an adapter, which is saved by itself: strategy.name = \"lora\"; or leave the base in f32",
            ));
        }
        let adapter = AdapterSettings::resolve(s, strategy.name.adapter)?;
        let optimizer = optimizer(s, &strategy.name, model.init)?;
        let train = TrainConfig {
            epochs: count(s, "train.epochs")?.unwrap_or(3),
            batch: match (count(s, "train.batch_size")?, count(s, "train.max_tokens")?) {
                (_, Some(tokens)) => BatchSize::Tokens(tokens),
                (Some(examples), None) => BatchSize::Examples(examples),
                (None, None) => BatchSize::Examples(match task.kind {
                    TaskKind::Classify | TaskKind::Mlm => 16,
                    TaskKind::Clm | TaskKind::Chat => 4,
                }),
            },
            accumulate: count(s, "train.accumulate")?.unwrap_or(1),
            group_by_length: choice(s, "train.group_by_length", "true or false")?.unwrap_or(false),
            precision: choice(s, "train.precision", "\"f32\" or \"bf16\"")?
                .unwrap_or(Precision::F32),
            device: choice(s, "train.device", "\"cpu\", \"cuda:N\" or \"auto\"")?
                .unwrap_or_default(),
            audit: choice(s, "train.audit", "true or false")?.unwrap_or(true),
            checkpoint: worded(
                s,
                "train.checkpoint",
                "\"never\", or a number of steps, epochs or minutes: \"500 steps\", \"1 epoch\", \"10 minutes\"",
            )?
            .unwrap_or(Every::Minutes(10)),
            seed: s
                .get(
                    "train.seed",
                    "a whole number from 0 to 2^63-1",
                    |_: &u64| true,
                )?
                .map_or(0, |(seed, _)| seed),
            threads: count(s, "train.threads")?,
            cache: choice(s, "train.cache", "\"off\", \"memory\" or \"file\"")?
                .unwrap_or(CacheKind::File),
            cache_memory: s
                .get(
                    "train.cache_memory",
                    "a whole number, 0 or more",
                    |_: &usize| true,
                )?
                .map_or(256, |(mib, _)| mib),
            memory_limit: s
                .get(
                    "train.memory_limit",
                    "a whole number, 0 or more",
                    |_: &usize| true,
                )?
                .map(|(mib, _)| mib),
            cache_dir: path(s, "train.cache_dir")?,
        };
        if strategy.name.gradual.is_some() && train.epochs < 2 {
            let origin = s.origin("train.epochs").or(s.origin("strategy.name"));
            return Err(Error::config(
                origin.map_or_else(String::new, Origin::to_string),
                "`strategy.name` has gradual, which thaws more layers in each epoch, and `train.epochs` is 1",
                "train for more epochs, or leave out gradual",
            ));
        }
        let output = OutputConfig {
            dir: required(path(s, "output.dir")?, "output.dir", "--out DIR")?,
        };
        let config = RunConfig {
            model,
            data,
            task,
            strategy,
            adapter,
            optimizer,
            train,
            output,
        };
        config.check_output(s)?;
        Ok(config)
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

    /// The output directory is replaced at the end of the run; nothing the run reads or keeps may lie in it.
    fn check_output(&self, settings: &Settings) -> Result<()> {
        let out = canonical(&self.output.dir);
        let inputs = [
            ("model.path", Some(Path::new(&self.model.path))),
            ("data.train", Some(self.data.train.as_path())),
            ("data.eval", self.data.eval.as_deref()),
            ("train.cache_dir", self.train.cache_dir.as_deref()),
        ];
        for (key, input) in inputs {
            let Some(input) = input else { continue };
            if canonical(input).starts_with(&out) {
                return Err(Error::config(
                    settings
                        .origin("output.dir")
                        .map_or_else(String::new, Origin::to_string),
                    format!(
                        "the output directory {} would replace `{key}`, {}",
                        self.output.dir.display(),
                        input.display()
                    ),
                    "name another output directory",
                ));
            }
        }
        Ok(())
    }
}

/// Of two keys that exclude each other, keeps the one of higher precedence.
fn exclusive(settings: &mut Settings, a: &'static str, b: &'static str) -> Result<()> {
    let (Some(from_a), Some(from_b)) = (settings.origin(a), settings.origin(b)) else {
        return Ok(());
    };
    match from_a.level().cmp(&from_b.level()) {
        std::cmp::Ordering::Greater => settings.remove(b),
        std::cmp::Ordering::Less => settings.remove(a),
        std::cmp::Ordering::Equal => {
            return Err(Error::config(
                from_b,
                format!("`{b}` and `{a}` (from {from_a}) exclude each other"),
                "give one of the two",
            ));
        }
    }
    Ok(())
}

/// Refuses settings that the task has no use for.
fn foreign_to_task(s: &Settings, kind: TaskKind, model: &ModelConfig) -> Result<()> {
    let place = |key: &str| s.origin(key).map_or_else(String::new, Origin::to_string);
    let from_nothing = matches!(kind, TaskKind::Clm | TaskKind::Mlm);
    if model.init == Init::Random && !from_nothing {
        return Err(Error::config(
            place("model.init"),
            "`model.init` is \"random\", which is for `task.kind` = \"clm\" or \"mlm\"",
            "name a pretrained model, or set task.kind = \"clm\"",
        ));
    }
    let classifiers = ["data.label", "data.text_pair", "train.cache_dir"];
    let given = |key: &&str| kind != TaskKind::Classify && s.origin(key).is_some();
    match classifiers.into_iter().find(given) {
        Some(key) => Err(Error::config(
            place(key),
            format!("`{key}` has no effect: `task.kind` is \"{kind}\""),
            "remove it",
        )),
        None => Ok(()),
    }
}

fn distinct_columns(s: &Settings, data: &DataConfig) -> Result<()> {
    let mut names = vec![("data.text", &data.text)];
    names.extend(data.label.as_ref().map(|name| ("data.label", name)));
    names.extend(data.text_pair.as_ref().map(|name| ("data.text_pair", name)));
    for (i, (key, name)) in names.iter().enumerate() {
        if let Some((other, _)) = names[..i].iter().find(|(_, earlier)| earlier == name) {
            let origin = s.origin(key).or(s.origin(other));
            return Err(Error::config(
                origin.map_or_else(String::new, Origin::to_string),
                format!("`{other}` and `{key}` both name the column `{name}`"),
                "give each its own column",
            ));
        }
    }
    Ok(())
}

fn required<T>(value: Option<T>, key: &str, flag: &str) -> Result<T> {
    value.ok_or_else(|| {
        Error::config(
            "configuration",
            format!("`{key}` is missing"),
            format!("give {flag}, or set {key} in the configuration file"),
        )
    })
}

/// A whole number, 1 or more.
fn count(s: &Settings, key: &str) -> Result<Option<usize>> {
    Ok(
        s.get(key, "a whole number, 1 or more", |n: &usize| *n >= 1)?
            .map(|(n, _)| n),
    )
}

fn number(
    s: &Settings,
    key: &str,
    expected: &str,
    ok: impl Fn(f64) -> bool,
) -> Result<Option<f64>> {
    Ok(s.get(key, expected, |x: &f64| ok(*x))?.map(|(x, _)| x))
}

/// A value whose type says all about what is allowed.
fn choice<T: serde::de::DeserializeOwned>(
    s: &Settings,
    key: &str,
    expected: &str,
) -> Result<Option<T>> {
    Ok(s.get(key, expected, |_| true)?.map(|(value, _)| value))
}

/// A value that is read from words, whose mistakes have messages of their own.
fn worded<T>(s: &Settings, key: &str, expected: &str) -> Result<Option<T>>
where
    T: std::str::FromStr<Err = String>,
{
    let Some((text, origin)) = s.get(key, expected, |_: &String| true)? else {
        return Ok(None);
    };
    text.parse().map(Some).map_err(|what| {
        let shown = text.escape_debug();
        Error::config(
            origin,
            format!("`{key}` is \"{shown}\", expected {expected}"),
            what,
        )
    })
}

/// An absolute path: one from a file is relative to the file's directory, others to the working directory.
fn path(s: &Settings, key: &str) -> Result<Option<PathBuf>> {
    let given = s.get(key, "a path", |p: &PathBuf| !p.as_os_str().is_empty())?;
    given
        .map(|(given, origin)| absolute(given, &origin))
        .transpose()
}

fn absolute(given: PathBuf, origin: &Origin) -> Result<PathBuf> {
    let relative = match origin {
        Origin::File { path, .. } => path.parent().unwrap_or(Path::new("")).join(given),
        Origin::Set(_) | Origin::Flag(_) => given,
    };
    std::path::absolute(&relative).map_err(|e| Error::io("find", &relative, e))
}

/// The model: what exists on disk is made absolute, and so is all that cannot be a hub id.
fn model_path(s: &Settings) -> Result<Option<String>> {
    let key = "model.path";
    let Some((given, origin)) = s.get(key, "a path or a hub id", |p: &String| !p.is_empty())?
    else {
        return Ok(None);
    };
    let path = absolute(PathBuf::from(&given), &origin)?;
    if !path.exists() && is_hub_id(&given) {
        return Ok(Some(given));
    }
    match path.to_str() {
        Some(text) => Ok(Some(text.to_owned())),
        None => Err(Error::config(
            origin,
            format!("`{key}` is {}, which is not valid UTF-8", path.display()),
            "use a path that is valid UTF-8; the configuration is kept as TOML",
        )),
    }
}

/// Whether a text has the form `org/name` or `org/name@revision`.
fn is_hub_id(text: &str) -> bool {
    let word = |part: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(inner)
    };
    let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
    let words = id
        .split_once('/')
        .is_some_and(|(org, name)| word(org) && word(name));
    words && revision.split('/').all(word)
}

/// The path with links and `..` resolved as far as it exists.
fn canonical(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let Ok(real) = ancestor.canonicalize() {
            return match path.strip_prefix(ancestor) {
                Ok(rest) if rest.as_os_str().is_empty() => real,
                Ok(rest) => real.join(rest),
                Err(_) => path.to_path_buf(),
            };
        }
    }
    path.to_path_buf()
}
