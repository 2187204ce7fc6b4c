//! Settings become a configuration: every one is checked, alone and against the others, and defaults are filled in.

use std::path::{Path, PathBuf};

use super::optimizer::optimizer;
use super::read::{choice, count, model_path, number, path, required, worded};
use super::{
    AdapterSettings, Base, CacheKind, DataConfig, Every, Init, ModelConfig, Origin, OutputConfig,
    Precision, RunConfig, Settings, Strategy, StrategyConfig, TaskConfig, TaskKind, TrainConfig,
};
use crate::batch::BatchSize;
use crate::data::{has_columns, without_columns};
use crate::error::{Error, Result};

impl RunConfig {
    /// Checks every setting and fills in the defaults.
    ///
    /// # Errors
    /// A required key that is missing, a value of the wrong type or out of range, two settings that exclude each
    /// other at the same level of precedence, or an output directory that would replace what the run reads.
    pub fn resolve(mut settings: Settings) -> Result<RunConfig> {
        exclusive(&mut settings, "train.batch_size", "train.max_tokens")?;
        let cache = cache(&mut settings)?;
        let s = &settings;
        let kinds =
            "\"classify\", \"multilabel\", \"regression\", \"ner\", \"clm\", \"chat\" or \"mlm\"";
        let task = TaskConfig {
            kind: choice(s, "task.kind", kinds)?.unwrap_or(TaskKind::CLASSIFY),
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
            label: match task.kind.label_column() {
                Some(usual) => Some(column("data.label")?.unwrap_or_else(|| usual.into())),
                None => None,
            },
            max_length: count(s, "data.max_length")?,
        };
        distinct_columns(s, &data)?;
        column_without_table(s, task.kind, &data)?;
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
                    TaskKind::Texts(_) | TaskKind::Mlm => 16,
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
            seed: choice(s, "train.seed", "a whole number from 0 to 2^63-1")?.unwrap_or(0),
            threads: count(s, "train.threads")?,
            cache,
            cache_memory: choice(s, "train.cache_memory", "a whole number, 0 or more")?
                .or((cache != CacheKind::Off).then_some(256)),
            memory_limit: choice(s, "train.memory_limit", "a whole number, 0 or more")?,
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

/// Where outputs of frozen layers are kept. Nowhere leaves no use for settings about them: those that it was chosen over
/// are forgotten, others refused.
fn cache(settings: &mut Settings) -> Result<CacheKind> {
    let key = "train.cache";
    let kind = settings.get(key, "\"off\", \"memory\" or \"file\"", |_| true)?;
    let Some((CacheKind::Off, off)) = kind else {
        return Ok(kind.map_or(CacheKind::File, |(kind, _)| kind));
    };
    for about in ["train.cache_memory", "train.cache_dir"] {
        match settings.origin(about) {
            Some(origin) if origin.level() >= off.level() => {
                return Err(Error::config(
                    origin,
                    format!("`{about}` has no effect: `{key}` is \"off\""),
                    format!("remove it, or set {key} = \"file\""),
                ));
            }
            _ => settings.remove(about),
        }
    }
    Ok(CacheKind::Off)
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
    let has_effect = |key: &str| match kind {
        TaskKind::NER => key != "data.text_pair",
        TaskKind::Texts(_) => true,
        TaskKind::Clm | TaskKind::Chat | TaskKind::Mlm => false,
    };
    let given = |key: &&str| !has_effect(key) && s.origin(key).is_some();
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

/// Refuses the name of a column where all files are documents without any.
fn column_without_table(s: &Settings, kind: TaskKind, data: &DataConfig) -> Result<()> {
    let words = match kind {
        TaskKind::NER => true,
        TaskKind::Clm | TaskKind::Mlm => false,
        TaskKind::Texts(_) | TaskKind::Chat => return Ok(()),
    };
    let files = [Some(&data.train), data.eval.as_ref()];
    let mut files = files.into_iter().flatten();
    if files.any(|file| has_columns(file, words)) {
        return Ok(());
    }
    let usual = Some(kind.text_column());
    for (key, name, usual) in [
        ("data.text", Some(data.text.as_str()), usual),
        ("data.label", data.label.as_deref(), kind.label_column()),
    ] {
        // A resolved configuration says the usual name.
        if let Some(origin) = s.origin(key).filter(|_| name != usual) {
            let what = format!("`{key}` has no effect: {}", without_columns(words));
            return Err(Error::config(origin, what, "remove it"));
        }
    }
    Ok(())
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
