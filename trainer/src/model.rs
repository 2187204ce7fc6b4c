//! A pretrained model in memory: configuration, tokenizer, parameters and classifier.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use graft_models::config::CONFIG_FILE;
use graft_models::{
    Classifier, Labels, LoadReport, ModelConfig, ModelSource, ProblemType, Tokenizer,
    little_endian, load_parameters_with, load_some, save_parameters, save_trained,
};
use graft_nn::{Parameters, TrainableSet};
use graft_tensor::{DType, Memory, Tensor};

use crate::certificate::sha256_hex;
use crate::error::{Error, Result};

/// The file of the weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// The trained weights of the best epoch, while a run goes on.
pub const ASIDE_FILE: &str = "best.safetensors";

/// SHA-256 of every parameter's bytes, by name.
pub type Hashes = BTreeMap<String, String>;

/// A model that was loaded.
#[derive(Debug)]
pub struct Loaded<T> {
    /// The model
    pub model: Model,
    /// What of its files is new or was not used
    pub report: LoadReport,
    /// Of the weights as they were loaded, or initialised
    pub hashes: Hashes,
    /// What was done meanwhile
    pub meanwhile: T,
}

/// A classifier and what belongs to it.
#[derive(Debug)]
pub struct Model {
    /// As it will be saved
    pub config: ModelConfig,
    /// Texts to ids
    pub tokenizer: Tokenizer,
    /// The weights
    pub parameters: Parameters,
    /// The layers
    pub classifier: Classifier,
}

impl Model {
    /// A pretrained model for a classification task with `labels`. If the model already is a classifier that knows all
    /// of them, its head is kept, and its order of the labels; otherwise the head is new, from `seed`. `dropout` takes
    /// the place of the model's own probabilities in this run, and is not saved with the model.
    ///
    /// # Errors
    /// Whatever is wrong with the model's files.
    pub fn for_task(
        spec: &str,
        labels: Labels,
        dropout: Option<f64>,
        seed: u64,
        memory: &Memory,
    ) -> Result<(Model, LoadReport)> {
        let nothing = |_: &ModelConfig, _: &Tokenizer| Ok(());
        let loaded = Model::for_task_while(spec, labels, dropout, seed, memory, nothing)?;
        Ok((loaded.model, loaded.report))
    }

    /// [`Model::for_task`], and `meanwhile` beside the reading of the weights, as soon as there is a tokenizer.
    ///
    /// # Errors
    /// As there, and those of `meanwhile`.
    pub fn for_task_while<T: Send>(
        spec: &str,
        labels: Labels,
        dropout: Option<f64>,
        seed: u64,
        memory: &Memory,
        meanwhile: impl FnOnce(&ModelConfig, &Tokenizer) -> Result<T> + Send,
    ) -> Result<Loaded<T>> {
        let source = ModelSource::resolve(spec)?;
        let mut config = ModelConfig::load(&source)?;
        let keeps_head = is_classifier(&config)
            && labels
                .names()
                .iter()
                .all(|name| config.labels.id(name).is_some());
        if !keeps_head {
            config.set_classification(labels, ProblemType::SingleLabel);
        }
        let new_head = (!keeps_head).then_some(seed);
        Model::load(&source, config, dropout, new_head, memory, meanwhile)
    }

    /// A model that was trained to classify.
    ///
    /// # Errors
    /// A model that is no classifier, or whatever is wrong with its files.
    pub fn trained(spec: &str, memory: &Memory) -> Result<Model> {
        let source = ModelSource::resolve(spec)?;
        let config = ModelConfig::load(&source)?;
        if !is_classifier(&config) {
            return Err(Error::config(
                spec,
                format!(
                    "the model is {}, expected {}",
                    crate::error::list_names(&config.architectures, 3),
                    config.family.classification_architecture()
                ),
                "train it for a classification task first, with `trainer train`",
            ));
        }
        let nothing = |_: &ModelConfig, _: &Tokenizer| Ok(());
        Ok(Model::load(&source, config, None, None, memory, nothing)?.model)
    }

    fn load<T: Send>(
        source: &ModelSource,
        config: ModelConfig,
        dropout: Option<f64>,
        new_head: Option<u64>,
        memory: &Memory,
        meanwhile: impl FnOnce(&ModelConfig, &Tokenizer) -> Result<T> + Send,
    ) -> Result<Loaded<T>> {
        let mut in_use = config.clone();
        if let Some(p) = dropout {
            in_use.dropout.hidden = p;
            in_use.dropout.attention = p;
            in_use.dropout.classifier = p;
        }
        let texts = || -> Result<(Tokenizer, T)> {
            let tokenizer = Tokenizer::load(source, config.vocab_size)?;
            let done = meanwhile(&config, &tokenizer)?;
            Ok((tokenizer, done))
        };
        let weights = || -> Result<(Parameters, Classifier, LoadReport, Hashes)> {
            let mut parameters = Parameters::new(memory, DType::F32);
            let classifier = Classifier::new(&mut parameters, &in_use)?;
            let mut checkpoint = source.checkpoint()?;
            // Each is hashed while the next is read.
            let hashes = Mutex::new(BTreeMap::new());
            let report = rayon::in_place_scope(|scope| {
                let hash = |name: &str, value: &Tensor| {
                    let (name, value, hashes) = (name.to_owned(), value.clone(), &hashes);
                    scope.spawn(move |_| {
                        let hash = little_endian(&value).map(|bytes| sha256_hex(&bytes));
                        drop(value);
                        let mut hashes = hashes.lock().unwrap_or_else(PoisonError::into_inner);
                        hashes.insert(name, hash);
                    });
                };
                load_parameters_with(&mut parameters, &config, &mut checkpoint, new_head, &mut {
                    hash
                })
            })?;
            let hashes = hashes.into_inner().unwrap_or_else(PoisonError::into_inner);
            let hashes = hashes
                .into_iter()
                .map(|(name, hash)| Ok((name, hash?)))
                .collect::<Result<Hashes>>()?;
            Ok((parameters, classifier, report, hashes))
        };
        let (weights, texts) = rayon::join(weights, texts);
        let (tokenizer, meanwhile) = texts?;
        let (parameters, classifier, report, hashes) = weights?;
        let model = Model {
            config,
            tokenizer,
            parameters,
            classifier,
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
        std::fs::write(&path, self.config.to_json()).map_err(|e| Error::io("write", &path, e))?;
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

fn is_classifier(config: &ModelConfig) -> bool {
    let class = config.family.classification_architecture();
    config.architectures.iter().any(|name| name == class)
}
