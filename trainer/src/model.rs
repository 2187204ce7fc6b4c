//! A model in memory: configuration, tokenizer, parameters and layers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use graft_models::config::CONFIG_FILE;
use graft_models::{
    CausalLm, Classifier, Config, DecoderConfig, LoadReport, MaskedConfig, MaskedLm, ModelSource,
    ProblemType, Tokenizer, little_endian, load_parameters_with, load_some, save_parameters,
    save_trained,
};
use graft_nn::{ParamId, Parameters, Role, TrainableSet};
use graft_tensor::{DType, Memory, Tensor};

use crate::certificate::sha256_hex;
use crate::config::{Base, RunConfig};
use crate::error::{Error, Result, list_names};
use crate::network::{Network, NetworkConfig};
use crate::text_classifier::{Outputs, TextClassifier};

/// The file of the weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// The trained weights of the best epoch, while a run goes on.
pub const ASIDE_FILE: &str = "best.safetensors";

/// SHA-256 of every parameter's bytes, by name.
pub type Hashes = BTreeMap<String, String>;

/// What a run or an adapter changes of a configuration, or of weights, as long as it is in use; none of it is saved.
#[derive(Debug, Clone, Copy, Default)]
pub struct Changes {
    /// In place of every dropout probability
    pub dropout: Option<f64>,
    /// Virtual tokens in front of each text, for which positions are kept free
    pub virtual_tokens: usize,
    /// What the weights of linear layers are held in
    pub base: Base,
}

impl Changes {
    /// Those of a run.
    pub fn of(config: &RunConfig) -> Changes {
        Changes {
            dropout: config.strategy.dropout,
            virtual_tokens: config.virtual_tokens(),
            base: config.model.base,
        }
    }
}

/// Has the weights of a network's layers held in the type of `base`, from when they are read: not those in front of the
/// layers and behind them.
fn hold<N: Network>(parameters: &mut Parameters, network: &N, base: Base) -> Result<()> {
    if base == Base::F32 {
        return Ok(());
    }
    let in_layer = |id| {
        network
            .layer_of(id)
            .is_some_and(|layer| layer < network.layers())
    };
    let weights: Vec<ParamId> = parameters
        .iter()
        .filter(|(id, p)| matches!(p.role(), Role::Linear(_)) && in_layer(*id))
        .map(|(id, _)| id)
        .collect();
    for id in weights {
        parameters.hold(id, base.dtype())?;
    }
    Ok(())
}

/// A model that was loaded.
#[derive(Debug)]
pub struct Loaded<T, N: Network = Classifier> {
    /// The model
    pub model: Model<N>,
    /// What of its files is new or was not used
    pub report: LoadReport,
    /// Of the weights as they were loaded, or initialised
    pub hashes: Hashes,
    /// What was done meanwhile
    pub meanwhile: T,
}

/// Layers for a task and what belongs to them.
#[derive(Debug)]
pub struct Model<N: Network = Classifier> {
    /// As it will be saved
    pub config: N::Config,
    /// Texts to ids
    pub tokenizer: Tokenizer,
    /// The weights
    pub parameters: Parameters,
    /// The layers
    pub network: N,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// The checkpoint; a head for a new task from the seed
    Stored {
        /// Of a new head; none if the checkpoint's is kept
        new_head: Option<u64>,
    },
    /// This seed; no checkpoint is read
    Random(u64),
}

impl<N: TextClassifier> Model<N> {
    /// A pretrained model for a task with these outputs. If the model already has a head whose outputs mean the same and
    /// that knows all labels, it is kept, and its order of the labels; otherwise the head is new, from `seed`. `dropout` takes
    /// the place of the model's own probabilities in this run, and is not saved with the model.
    ///
    /// # Errors
    /// Whatever is wrong with the model's files.
    pub fn for_task(
        spec: &str,
        outputs: Outputs,
        dropout: Option<f64>,
        seed: u64,
        memory: &Memory,
    ) -> Result<(Model<N>, LoadReport)> {
        let changes = Changes {
            dropout,
            ..Changes::default()
        };
        let nothing = |_: &N::Config, _: &Tokenizer| Ok(());
        let loaded = Model::for_task_while(spec, outputs, changes, seed, memory, nothing)?;
        Ok((loaded.model, loaded.report))
    }

    /// [`Model::for_task`], and `meanwhile` beside the reading of the weights, as soon as there is a tokenizer.
    ///
    /// # Errors
    /// As there, and those of `meanwhile`.
    pub fn for_task_while<T: Send>(
        spec: &str,
        outputs: Outputs,
        changes: Changes,
        seed: u64,
        memory: &Memory,
        meanwhile: impl FnOnce(&N::Config, &Tokenizer) -> Result<T> + Send,
    ) -> Result<Loaded<T, N>> {
        let source = ModelSource::resolve(spec)?;
        let mut config = N::read(&source)?;
        let keeps_head = N::classes(&config).is_classifier() && gives::<N>(&config, &outputs);
        if !keeps_head {
            N::set_outputs(&mut config, outputs)?;
        }
        let new_head = (!keeps_head).then_some(seed);
        let weights = Weights::Stored { new_head };
        let mut loaded = Model::load(&source, config, changes, weights, memory, meanwhile)?;
        N::set_padding(&mut loaded.model.config, &loaded.model.tokenizer);
        Ok(loaded)
    }

    /// A model that was trained to classify.
    ///
    /// # Errors
    /// A model that is no classifier, or whatever is wrong with its files.
    pub fn trained(spec: &str, memory: &Memory) -> Result<Model<N>> {
        Model::trained_with(spec, Changes::default(), memory)
    }

    /// [`Model::trained`], changed as long as it is in use.
    ///
    /// # Errors
    /// As there.
    pub fn trained_with(spec: &str, changes: Changes, memory: &Memory) -> Result<Model<N>> {
        let source = ModelSource::resolve(spec)?;
        let config = N::read(&source)?;
        let classes = N::classes(&config);
        if !classes.is_classifier() {
            let found = list_names(classes.stated, 3);
            let mut expected = classes.classifier.to_owned();
            if let Some(class) = classes.token_classifier {
                expected.push_str(&format!(" or {class}"));
            }
            let what = format!("the model is {found}, expected {expected}");
            let help = "train it for a classification task first, with `trainer train`";
            return Err(Error::config(spec, what, help));
        }
        let nothing = |_: &N::Config, _: &Tokenizer| Ok(());
        let weights = Weights::Stored { new_head: None };
        Ok(Model::load(&source, config, changes, weights, memory, nothing)?.model)
    }
}

/// Whether a model's outputs mean the same as these and are called so; what one number is called makes no difference.
fn gives<N: TextClassifier>(config: &N::Config, outputs: &Outputs) -> bool {
    let known = N::labels(config);
    let mut names = outputs.labels.names().iter();
    N::problem(config) == outputs.problem
        && match outputs.problem {
            ProblemType::Regression => known.count() == outputs.labels.count(),
            _ => names.all(|name| known.id(name).is_some()),
        }
}

impl Model<MaskedLm> {
    /// An encoder that fills in tokens, and `meanwhile` beside the reading of the weights. With `Weights::Stored` and a
    /// seed, a head that the checkpoint lacks is new from it.
    ///
    /// # Errors
    /// A decoder, or whatever is wrong with the model's files.
    pub fn masked_while<T: Send>(
        spec: &str,
        changes: Changes,
        weights: Weights,
        memory: &Memory,
        meanwhile: impl FnOnce(&MaskedConfig, &Tokenizer) -> Result<T> + Send,
    ) -> Result<Loaded<T, MaskedLm>> {
        let source = ModelSource::resolve(spec)?;
        let mut config = match Config::load_for_encoder(&source)? {
            Config::Encoder(config) => *config,
            Config::Decoder(config) => {
                let what = format!(
                    "the model is of the family {}, which reads a text forwards and fills in no token",
                    config.family
                );
                let help = "name a model of the BERT family, or set task.kind = \"clm\"";
                return Err(Error::config(spec, what, help));
            }
        };
        let class = config.family.masked_architecture();
        if !config.head.is(class) {
            if weights == (Weights::Stored { new_head: None }) {
                let found = list_names(&config.head.architectures, 3);
                let what = format!("the model is {found}, expected {class}");
                let help = "train its head first, with `trainer train --task mlm`";
                return Err(Error::config(spec, what, help));
            }
            config.set_masked();
        }
        let config = MaskedConfig(config);
        Model::load(&source, config, changes, weights, memory, meanwhile)
    }

    /// [`Model::masked_while`], as it is stored.
    ///
    /// # Errors
    /// As there; a model without the head.
    pub fn masked(spec: &str, memory: &Memory) -> Result<Model<MaskedLm>> {
        let nothing = |_: &MaskedConfig, _: &Tokenizer| Ok(());
        let weights = Weights::Stored { new_head: None };
        Ok(Model::masked_while(spec, Changes::default(), weights, memory, nothing)?.model)
    }
}

impl Model<CausalLm> {
    /// A model that predicts the next token, and `meanwhile` beside the reading of the weights. Without `weights`, they
    /// are random, from the seed.
    ///
    /// # Errors
    /// An encoder, or whatever is wrong with the model's files.
    pub fn causal_while<T: Send>(
        spec: &str,
        changes: Changes,
        weights: Weights,
        memory: &Memory,
        meanwhile: impl FnOnce(&DecoderConfig, &Tokenizer) -> Result<T> + Send,
    ) -> Result<Loaded<T, CausalLm>> {
        let source = ModelSource::resolve(spec)?;
        let mut config = match Config::load_for_decoder(&source)? {
            Config::Decoder(config) => *config,
            Config::Encoder(config) => {
                let what = format!(
                    "the model is of the family {}, which reads a text in both directions and predicts no next token",
                    config.family.model_type()
                );
                let help = "name a model of the GPT family: GPT-2, Llama, Mistral, Qwen or Gemma";
                return Err(Error::config(spec, what, help));
            }
        };
        let class = config.family.causal_architecture();
        let family = config.family;
        let classifiers = [
            Some(family.classification_architecture()),
            family.token_classification_architecture(),
        ];
        let mut classifiers = classifiers.into_iter().flatten();
        if let Some(classifies) = classifiers.find(|class| config.head.is(class)) {
            let what = format!("the model is {classifies}, expected {class}");
            let help = "name the language model that it was made from";
            return Err(Error::config(spec, what, help));
        }
        if !config.head.is(class) {
            config.set_causal();
        }
        Model::load(&source, config, changes, weights, memory, meanwhile)
    }

    /// [`Model::causal_while`], as it is stored.
    ///
    /// # Errors
    /// As there.
    pub fn causal(spec: &str, memory: &Memory) -> Result<Model<CausalLm>> {
        let nothing = |_: &DecoderConfig, _: &Tokenizer| Ok(());
        let weights = Weights::Stored { new_head: None };
        Ok(Model::causal_while(spec, Changes::default(), weights, memory, nothing)?.model)
    }
}

impl<N: Network> Model<N> {
    pub(crate) fn load<T: Send>(
        source: &ModelSource,
        mut config: N::Config,
        changes: Changes,
        from: Weights,
        memory: &Memory,
        meanwhile: impl FnOnce(&N::Config, &Tokenizer) -> Result<T> + Send,
    ) -> Result<Loaded<T, N>> {
        let (positions, front) = (config.max_tokens(), changes.virtual_tokens);
        if front >= positions {
            let what = format!("{front} virtual tokens, but the model has {positions} positions");
            let help = "ask for fewer, so that a text has room behind them";
            return Err(Error::config("adapter.tokens", what, help));
        }
        *config.reserved() = front;
        let mut in_use = config.clone();
        if let Some(p) = changes.dropout {
            in_use.set_dropout(p);
        }
        let texts = || -> Result<(Tokenizer, T)> {
            let tokenizer = Tokenizer::load(source, config.vocab_size())?;
            let done = meanwhile(&config, &tokenizer)?;
            Ok((tokenizer, done))
        };
        let weights = || -> Result<(Parameters, N, LoadReport, Hashes)> {
            let mut parameters = Parameters::new(memory, DType::F32);
            let network = N::declare(&mut parameters, &in_use)?;
            hold(&mut parameters, &network, changes.base)?;
            // Each is hashed while the next is read.
            let hashes = Mutex::new(BTreeMap::new());
            let report = rayon::in_place_scope(|scope| -> Result<LoadReport> {
                let mut hash = |name: &str, value: &Tensor| {
                    let (name, value, hashes) = (name.to_owned(), value.clone(), &hashes);
                    scope.spawn(move |_| {
                        let hash = little_endian(&value).map(|bytes| sha256_hex(&bytes));
                        drop(value);
                        let mut hashes = hashes.lock().unwrap_or_else(PoisonError::into_inner);
                        hashes.insert(name, hash);
                    });
                };
                match from {
                    // A plan needs shapes alone.
                    _ if memory.is_planned() => {
                        parameters.initialise(0)?;
                        let mut hashes = hashes.lock().unwrap_or_else(PoisonError::into_inner);
                        for (_, parameter) in parameters.iter() {
                            hashes.insert(parameter.name().to_owned(), Ok(String::new()));
                        }
                        Ok(LoadReport::default())
                    }
                    Weights::Stored { new_head } => Ok(load_parameters_with(
                        &mut parameters,
                        &config,
                        &mut source.checkpoint()?,
                        new_head,
                        &mut hash,
                    )?),
                    Weights::Random(seed) => {
                        parameters.initialise(seed)?;
                        for (id, parameter) in parameters.iter() {
                            hash(parameter.name(), parameters.value(id)?);
                        }
                        Ok(LoadReport::default())
                    }
                }
            })?;
            if changes.base != Base::F32 {
                // Numbers on their way to codes are no part of what a step needs.
                memory.reset_peak();
            }
            let hashes = hashes.into_inner().unwrap_or_else(PoisonError::into_inner);
            let hashes = hashes
                .into_iter()
                .map(|(name, hash)| Ok((name, hash?)))
                .collect::<Result<Hashes>>()?;
            Ok((parameters, network, report, hashes))
        };
        let (weights, texts) = rayon::join(weights, texts);
        let (tokenizer, meanwhile) = texts?;
        let (parameters, network, report, hashes) = weights?;
        let model = Model {
            config,
            tokenizer,
            parameters,
            network,
        };
        Ok(Loaded {
            model,
            report,
            hashes,
            meanwhile,
        })
    }

    /// Writes configuration and tokenizer into `dir`: all but the weights.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn save_description(&self, dir: &Path) -> Result<()> {
        let path = dir.join(CONFIG_FILE);
        std::fs::write(&path, self.config.text()).map_err(|e| Error::io("write", &path, e))?;
        Ok(self.tokenizer.save(dir)?)
    }

    /// Writes the weights of `set` alone into `dir`; [`Model::restore`] takes them back from there.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn set_aside(&self, set: &TrainableSet, dir: &Path) -> Result<()> {
        Ok(save_trained(&self.parameters, set, &dir.join(ASIDE_FILE))?)
    }

    /// Takes back the weights that were last set aside in `dir`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn restore(&mut self, dir: &Path) -> Result<()> {
        Ok(load_some(&mut self.parameters, &dir.join(ASIDE_FILE))?)
    }

    /// Writes the weights into `dir`, whole or not at all.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn save_weights(&self, dir: &Path) -> Result<()> {
        Ok(save_parameters(&self.parameters, &dir.join(WEIGHTS_FILE))?)
    }
}
