//! A pretrained model in memory: configuration, tokenizer, parameters and classifier.

use std::path::Path;

use graft_models::config::CONFIG_FILE;
use graft_models::{
    Classifier, Labels, LoadReport, ModelConfig, ModelSource, ProblemType, Tokenizer,
    load_parameters, save_parameters,
};
use graft_nn::Parameters;
use graft_tensor::{DType, Memory};

use crate::error::{Error, Result};

/// The file of the weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";

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
        Model::load(&source, config, dropout, new_head, memory)
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
        Ok(Model::load(&source, config, None, None, memory)?.0)
    }

    fn load(
        source: &ModelSource,
        config: ModelConfig,
        dropout: Option<f64>,
        new_head: Option<u64>,
        memory: &Memory,
    ) -> Result<(Model, LoadReport)> {
        let mut in_use = config.clone();
        if let Some(p) = dropout {
            in_use.dropout.hidden = p;
            in_use.dropout.attention = p;
            in_use.dropout.classifier = p;
        }
        let tokenizer = Tokenizer::load(source, config.vocab_size)?;
        let mut parameters = Parameters::new(memory, DType::F32);
        let classifier = Classifier::new(&mut parameters, &in_use)?;
        let mut checkpoint = source.checkpoint()?;
        let report = load_parameters(&mut parameters, &config, &mut checkpoint, new_head)?;
        let model = Model {
            config,
            tokenizer,
            parameters,
            classifier,
        };
        Ok((model, report))
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
