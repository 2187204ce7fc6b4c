//! A model as a command takes it: by itself, or with adapters beside it, of which one is in use at a time.

use std::path::Path;

use clap::Args;
use graft_models::{
    CausalLm, Classifier, Config, DecoderClassifier, MaskedLm, ModelSource, ProblemType, Tokenizer,
};
use graft_nn::Parameters;
use graft_nn::adapters::DEFAULT;
use graft_tensor::Memory;

use crate::adapter::AdapterDir;
use crate::config::{Base, Settings, TaskKind};
use crate::error::{Error, Result};
use crate::model::{Changes, Hashes, Loaded, Model, Weights};
use crate::network::Network;
use crate::run_dir;
use crate::text_classifier::{Outputs, TextClassifier};

/// `--adapter` and `--use`.
#[derive(Debug, Clone, Default, Args)]
pub struct AdapterArgs {
    /// An adapter to put beside the model, as NAME=DIR or DIR; may be repeated. A directory that holds an adapter may
    /// also be named as the model.
    #[arg(long, value_name = "NAME=DIR")]
    pub adapter: Vec<String>,
    /// The one of several adapters to use.
    #[arg(long = "use", value_name = "NAME")]
    pub chosen: Option<String>,
    /// What the weights of linear layers are held in: the type that the adapter in use was trained beside, else f32.
    #[arg(long, value_enum, value_name = "TYPE")]
    pub base: Option<Base>,
}

/// A base and its adapters, found but not read yet.
#[derive(Debug, Clone)]
pub struct Choice {
    base: String,
    adapters: Vec<(String, AdapterDir)>,
    chosen: Option<String>,
    held: Base,
}

/// A model with its adapters beside it.
#[derive(Debug)]
pub struct Adapted<N: Network> {
    /// With one of them in use, if there are any
    pub model: Model<N>,
    /// Of the base, as it was read
    pub hashes: Hashes,
    names: Vec<String>,
    /// Of a classifier, what each adapter's outputs are
    outputs: Vec<Outputs>,
}

impl Choice {
    /// What `model` and arguments name.
    ///
    /// # Errors
    /// A directory without an adapter, two adapters of one name, a choice of one that is not there.
    pub fn of(model: &str, args: &AdapterArgs) -> Result<Choice> {
        let mut base = model.to_owned();
        let mut adapters = Vec::new();
        if let Some(dir) = AdapterDir::at(model)? {
            base = dir.base()?.to_owned();
            adapters.push((DEFAULT.to_owned(), dir));
        }
        for text in &args.adapter {
            let (name, dir) = match text.split_once('=') {
                Some((name, dir)) => (name.to_owned(), Path::new(dir)),
                None => {
                    let stem = Path::new(text).file_name().unwrap_or_default();
                    (stem.to_string_lossy().replace('.', "-"), Path::new(text))
                }
            };
            if adapters.iter().any(|(known, _)| *known == name) {
                let what = format!("two adapters are called `{name}`");
                let help = "give each a name: --adapter NAME=DIR";
                return Err(Error::config(format!("--adapter {text}"), what, help));
            }
            adapters.push((name, AdapterDir::open(dir)?));
        }
        if let Some(chosen) = &args.chosen
            && !adapters.iter().any(|(name, _)| name == chosen)
        {
            let names: Vec<&str> = adapters.iter().map(|(name, _)| name.as_str()).collect();
            let chosen = chosen.escape_debug();
            let (what, help) = match names.is_empty() {
                true => (
                    format!("there is no adapter to choose `{chosen}` from"),
                    "leave it out, or put adapters beside the model with --adapter NAME=DIR",
                ),
                false => (
                    format!(
                        "`{chosen}` is no adapter; there are {}",
                        crate::error::list_names(&names, 8)
                    ),
                    "name one of these",
                ),
            };
            return Err(Error::config("--use", what, help));
        }
        let mut choice = Choice {
            base,
            adapters,
            chosen: args.chosen.clone(),
            held: Base::F32,
        };
        let trained_on = || choice.first().and_then(AdapterDir::trained_on);
        choice.held = args.base.or_else(trained_on).unwrap_or_default();
        Ok(choice)
    }

    /// What the base's linear layers are held in.
    pub fn held(&self) -> Base {
        self.held
    }

    /// The same with the base held in another type.
    pub fn held_in(&self, base: Base) -> Choice {
        Choice {
            held: base,
            ..self.clone()
        }
    }

    /// The configuration of the base with the adapter in use beside it, the first of several: as a run left it, or the
    /// base's, with the labels that the adapter's head tells apart.
    ///
    /// # Errors
    /// A base that is not there.
    pub fn config(&self) -> Result<Config> {
        let mut base = Config::load(&ModelSource::resolve(&self.base)?)?;
        let Some(dir) = self.first() else {
            return Ok(base);
        };
        if let Some(source) = dir.description()? {
            return Ok(Config::load(&source)?);
        }
        if let Some(labels) = dir.labels()? {
            let problem = match dir.classifies_tokens() {
                true => ProblemType::Tokens,
                false => base.head().problem_with(&labels),
            };
            base.set_classification(labels, problem)?;
        }
        Ok(base)
    }

    /// What a model is for where nothing is said: what it was trained for, if it is a run, or else what the class in its
    /// [configuration](Choice::config) does.
    pub fn task(&self, config: &Config) -> TaskKind {
        match config {
            Config::Encoder(config) => match config.head.is(config.family.masked_architecture()) {
                true => TaskKind::Mlm,
                false => TaskKind::Texts(Classifier::problem(config)),
            },
            Config::Decoder(config) => {
                let run = || self.run()?.task();
                if DecoderClassifier::classes(config).is_classifier() {
                    TaskKind::Texts(DecoderClassifier::problem(config))
                } else if run() == Some(TaskKind::Chat) {
                    TaskKind::Chat
                } else {
                    TaskKind::Clm
                }
            }
        }
    }

    /// Most tokens of one example in the run that this is the outcome of, if it was one for `task` and said so.
    pub fn trained_length(&self, task: TaskKind) -> Option<usize> {
        let run = self.run()?;
        let same = run.task().unwrap_or(TaskKind::CLASSIFY) == task;
        run.max_length().filter(|_| same)
    }

    /// The settings of the run that this is the outcome of, if it is one's.
    fn run(&self) -> Option<Settings> {
        let dir = self.first().map_or(Path::new(&self.base), AdapterDir::path);
        Settings::from_file(&dir.join(run_dir::CONFIG_FILE)).ok()
    }

    /// The adapter in use, the first of several.
    fn first(&self) -> Option<&AdapterDir> {
        let name = *self.in_use().first()?;
        let (_, dir) = self.adapters.iter().find(|(known, _)| known == name)?;
        Some(dir)
    }

    /// What the base was found by.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The names of the adapters to use: the chosen one, or all.
    pub fn in_use(&self) -> Vec<&str> {
        let names = self.adapters.iter().map(|(name, _)| name.as_str());
        names
            .filter(|name| self.chosen.as_deref().is_none_or(|chosen| chosen == *name))
            .collect()
    }

    /// Refuses several adapters where one must be meant.
    ///
    /// # Errors
    /// More than one, and none chosen.
    pub fn single(&self) -> Result<&Choice> {
        match self.in_use().len() {
            0 | 1 => Ok(self),
            _ => {
                let what = format!(
                    "there are the adapters {}, and one must be meant",
                    crate::error::list_names(&self.in_use(), 8)
                );
                Err(Error::config(
                    "--adapter",
                    what,
                    "choose one with --use NAME",
                ))
            }
        }
    }

    /// What its adapters change of the base: texts leave room for the virtual tokens of each, and weights are held in
    /// some type.
    fn changes(&self) -> Changes {
        let tokens = self.adapters.iter().map(|(_, dir)| dir.virtual_tokens());
        Changes {
            dropout: None,
            virtual_tokens: tokens.max().unwrap_or(0),
            base: self.held,
        }
    }

    /// A classifier, with the adapters beside it.
    ///
    /// # Errors
    /// A model that is no classifier, adapters of another model, whatever is wrong with the files.
    pub fn classifier<N: TextClassifier>(&self, memory: &Memory) -> Result<Adapted<N>> {
        let Some(first) = self.first() else {
            return Ok(Adapted::alone(Model::trained_with(
                &self.base,
                self.changes(),
                memory,
            )?));
        };
        let source = ModelSource::resolve(&self.base)?;
        let own = N::read(&source)?;
        let config = described::<N>(&own, first)?;
        let of_tokens = |config: &N::Config| N::problem(config) == ProblemType::Tokens;
        let tokens = of_tokens(&config);
        let same =
            N::labels(&own).count() == N::labels(&config).count() && of_tokens(&own) == tokens;
        let new_head = (!(N::classes(&own).is_classifier() && same)).then_some(0);
        let weights = Weights::Stored { new_head };
        let loaded = Model::load(&source, config, self.changes(), weights, memory, nothing)?;
        let mut outputs = Vec::new();
        for (name, dir) in &self.adapters {
            let other = described::<N>(&own, dir)?;
            if of_tokens(&other) != tokens {
                let what = "one adapter labels words and another one texts";
                let help = "give the one that is to be used, without the other";
                return Err(Error::config(format!("--adapter {name}"), what, help));
            }
            outputs.push(N::outputs(&other));
        }
        let mut adapted = self.beside(loaded)?;
        N::set_padding(&mut adapted.model.config, &adapted.model.tokenizer);
        adapted.outputs = outputs;
        if let Some(name) = self.in_use().first() {
            adapted.choose(name)?;
        }
        Ok(adapted)
    }

    /// A language model, with the adapters beside it.
    ///
    /// # Errors
    /// A model that is none, adapters of another model, whatever is wrong with the files.
    pub fn causal(&self, memory: &Memory) -> Result<Adapted<CausalLm>> {
        let weights = Weights::Stored { new_head: None };
        self.beside(Model::causal_while(
            &self.base,
            self.changes(),
            weights,
            memory,
            nothing,
        )?)
    }

    /// An encoder that fills in tokens, with the adapters beside it. Its head is the base's, or the adapter's.
    ///
    /// # Errors
    /// A model that is none, adapters of another model, whatever is wrong with the files.
    pub fn masked(&self, memory: &Memory) -> Result<Adapted<MaskedLm>> {
        let new_head = self.first().map(|_| 0);
        let weights = Weights::Stored { new_head };
        self.beside(Model::masked_while(
            &self.base,
            self.changes(),
            weights,
            memory,
            nothing,
        )?)
    }

    /// The base with all adapters beside it, and the first of those in use active.
    fn beside<N: Network>(&self, loaded: Loaded<(), N>) -> Result<Adapted<N>> {
        let mut adapted = Adapted::alone(loaded.model);
        adapted.hashes = loaded.hashes;
        for (name, dir) in &self.adapters {
            dir.beside(&mut adapted.model, name)?;
            let p = &adapted.model.parameters;
            let lacks = |parameter: &&String| {
                p.lookup(parameter)
                    .is_some_and(|id| p.adapters().in_place_of(id) == id)
            };
            if let Some(parameter) = loaded.report.initialised.iter().find(lacks) {
                let what = format!("neither the adapter nor {} has `{parameter}`", self.base);
                let help = "name a base that has it, or an adapter with its head";
                return Err(Error::config(name, what, help));
            }
            adapted.names.push(name.clone());
        }
        if let Some(name) = self.in_use().first() {
            let adapters = adapted.model.parameters.adapters_mut();
            adapters.activate(Some(name))?;
        }
        Ok(adapted)
    }
}

/// What is done beside the reading of weights here.
fn nothing<C>(_: &C, _: &Tokenizer) -> Result<()> {
    Ok(())
}

/// The configuration of a classifier with an adapter beside it: as a run left it, or the base's with as many labels as the
/// adapter's head tells apart.
fn described<N: TextClassifier>(base: &N::Config, dir: &AdapterDir) -> Result<N::Config> {
    let mut config = match dir.description()? {
        Some(source) => N::read(&source)?,
        None => base.clone(),
    };
    let labels = dir.labels()?;
    let other = labels.filter(|labels| {
        !N::classes(&config).is_classifier()
            || labels.count() != N::labels(&config).count()
            || dir.classifies_tokens() != (N::problem(&config) == ProblemType::Tokens)
    });
    if let Some(labels) = other {
        let problem = match dir.classifies_tokens() {
            true => ProblemType::Tokens,
            false => N::problem_with(&config, &labels),
        };
        N::set_outputs(&mut config, Outputs { labels, problem })?;
    }
    if !N::classes(&config).is_classifier() {
        let what = "the adapter has no classification head, and its base is no classifier";
        let help = "name an adapter that was trained for a classification task";
        return Err(Error::config("--model", what, help));
    }
    Ok(config)
}

impl<N: Network> Adapted<N> {
    fn alone(model: Model<N>) -> Adapted<N> {
        Adapted {
            model,
            hashes: Hashes::new(),
            names: Vec::new(),
            outputs: Vec::new(),
        }
    }

    /// The parameters of base and adapters, and the hashes of the base as it was read.
    pub fn into_parts(self) -> (Parameters, Hashes) {
        (self.model.parameters, self.hashes)
    }
}

impl<N: TextClassifier> Adapted<N> {
    /// Takes an adapter into use, and its outputs.
    ///
    /// # Errors
    /// A name that none has.
    pub fn choose(&mut self, name: &str) -> Result<()> {
        self.model.parameters.adapters_mut().activate(Some(name))?;
        let mut all = self.names.iter().zip(&self.outputs);
        if let Some((_, outputs)) = all.find(|(known, _)| *known == name) {
            N::set_outputs(&mut self.model.config, outputs.clone())?;
        }
        Ok(())
    }
}
