//! Classifiers of texts and of their tokens, over encoders and over decoders: all that data, evaluation and the keeping of
//! frozen outputs ask of them.

use graft_autograd::Var;
use graft_models::{
    Classifier, Cut, DecoderClassifier, DecoderConfig, Labels, ModelConfig, ModelSource,
    ProblemType, TokenBatch, Tokenizer,
};
use graft_nn::{Forward, ParamId, Parameters, TrainableSet};
use graft_tensor::Tensor;

use crate::error::Result;
use crate::network::Network;

/// The classes of transformers that a configuration states, and those that classify.
#[derive(Debug, Clone, Copy)]
pub struct Classes<'a> {
    /// Those stated
    pub stated: &'a [String],
    /// The family's classifier of texts
    pub classifier: &'static str,
    /// The family's classifier of tokens, if there is one
    pub token_classifier: Option<&'static str>,
}

impl Classes<'_> {
    /// Whether the model is a classifier already.
    pub fn is_classifier(&self) -> bool {
        let mut stated = self.stated.iter();
        stated.any(|name| name == self.classifier || Some(name.as_str()) == self.token_classifier)
    }
}

/// What the outputs of a head are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outputs {
    /// Their names, by number
    pub labels: Labels,
    /// What they mean
    pub problem: ProblemType,
}

/// Layers that give each text, or each token of it, an output for each of some labels: a logit, or the number that is to be
/// predicted.
pub trait TextClassifier: Network + Sync {
    /// Reads the configuration.
    ///
    /// # Errors
    /// Whatever is wrong with it.
    fn read(source: &ModelSource) -> Result<Self::Config>;

    /// What the model is.
    fn classes(config: &Self::Config) -> Classes<'_>;

    /// The labels, by number.
    fn labels(config: &Self::Config) -> &Labels;

    /// What the outputs would mean if they had these labels and the configuration said nothing new.
    fn problem_with(config: &Self::Config, labels: &Labels) -> ProblemType;

    /// What the outputs mean.
    fn problem(config: &Self::Config) -> ProblemType {
        Self::problem_with(config, Self::labels(config))
    }

    /// What the outputs are.
    fn outputs(config: &Self::Config) -> Outputs {
        Outputs {
            labels: Self::labels(config).clone(),
            problem: Self::problem(config),
        }
    }

    /// Makes it the configuration of a classifier with these outputs.
    ///
    /// # Errors
    /// A family without a class for them.
    fn set_outputs(config: &mut Self::Config, outputs: Outputs) -> Result<()>;

    /// Sees to it that transformers can tell padding from text in a batch.
    fn set_padding(_config: &mut Self::Config, _tokenizer: &Tokenizer) {}

    /// Most tokens of a text.
    fn max_tokens(config: &Self::Config) -> usize;

    /// Most tokens of a text, virtual ones in front of it included.
    fn positions_in_all(config: &Self::Config) -> usize;

    /// Numbers of a hidden state.
    fn hidden_size(config: &Self::Config) -> usize;

    /// All of the configuration that decides, beside the weights, what the layers compute.
    fn arrangement(config: &Self::Config) -> String;

    /// The outputs, `[sequences, labels]`, or `[tokens, labels]` where tokens are classified.
    ///
    /// # Errors
    /// Ids outside the vocabulary, empty or too long sequences.
    fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var>;

    /// The place below which nothing is trained; `None` if an embedding is trained.
    fn cut(&self, p: &Parameters, set: &TrainableSet) -> Option<Cut>;

    /// Whether a parameter takes part in what passes through `cut`.
    fn is_below(&self, cut: Cut, id: ParamId) -> bool;

    /// What passes through `cut`: `[tokens, hidden]` in front of a layer or of a head over tokens, `[sequences, hidden]` in
    /// front of one over texts.
    ///
    /// # Errors
    /// As [`TextClassifier::forward`].
    fn below(&self, f: &mut Forward, cut: Cut, batch: &TokenBatch) -> Result<Var>;

    /// The outputs of what passes through `cut`, of sequences that begin at `offsets [sequences + 1]`.
    ///
    /// # Errors
    /// Shapes or offsets that do not fit.
    fn above(&self, f: &mut Forward, cut: Cut, x: Tensor, offsets: &[i64]) -> Result<Var>;
}

/// The passes of a network of `graft_models`, which has them under the same names.
macro_rules! passes {
    ($network:ident) => {
        fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
            Ok($network::forward(self, f, batch)?)
        }

        fn cut(&self, p: &Parameters, set: &TrainableSet) -> Option<Cut> {
            $network::cut(self, p, set)
        }

        fn is_below(&self, cut: Cut, id: ParamId) -> bool {
            $network::is_below(self, cut, id)
        }

        fn below(&self, f: &mut Forward, cut: Cut, batch: &TokenBatch) -> Result<Var> {
            Ok($network::below(self, f, cut, batch)?)
        }

        fn above(&self, f: &mut Forward, cut: Cut, x: Tensor, offsets: &[i64]) -> Result<Var> {
            Ok($network::above(self, f, cut, x, offsets)?)
        }
    };
}

impl TextClassifier for Classifier {
    fn read(source: &ModelSource) -> Result<ModelConfig> {
        Ok(ModelConfig::load(source)?)
    }

    fn classes(config: &ModelConfig) -> Classes<'_> {
        Classes {
            stated: &config.head.architectures,
            classifier: config.family.classification_architecture(),
            token_classifier: Some(config.family.token_classification_architecture()),
        }
    }

    fn labels(config: &ModelConfig) -> &Labels {
        &config.head.labels
    }

    fn problem_with(config: &ModelConfig, labels: &Labels) -> ProblemType {
        config.head.problem_with(labels)
    }

    fn set_outputs(config: &mut ModelConfig, outputs: Outputs) -> Result<()> {
        config.set_classification(outputs.labels, outputs.problem);
        Ok(())
    }

    fn max_tokens(config: &ModelConfig) -> usize {
        config.max_tokens()
    }

    fn positions_in_all(config: &ModelConfig) -> usize {
        config.positions_in_all()
    }

    fn hidden_size(config: &ModelConfig) -> usize {
        config.hidden_size
    }

    fn arrangement(c: &ModelConfig) -> String {
        format!(
            "{:?} layers {} heads {} {:?} eps {:e} first position {}",
            c.family,
            c.layers,
            c.heads,
            c.hidden_act,
            c.layer_norm_eps,
            c.first_position(),
        )
    }

    passes!(Classifier);
}

impl TextClassifier for DecoderClassifier {
    fn read(source: &ModelSource) -> Result<DecoderConfig> {
        Ok(DecoderConfig::load(source)?)
    }

    fn classes(config: &DecoderConfig) -> Classes<'_> {
        Classes {
            stated: &config.head.architectures,
            classifier: config.family.classification_architecture(),
            token_classifier: config.family.token_classification_architecture(),
        }
    }

    fn labels(config: &DecoderConfig) -> &Labels {
        &config.head.labels
    }

    fn problem_with(config: &DecoderConfig, labels: &Labels) -> ProblemType {
        config.head.problem_with(labels)
    }

    fn set_outputs(config: &mut DecoderConfig, outputs: Outputs) -> Result<()> {
        Ok(config.set_classification(outputs.labels, outputs.problem)?)
    }

    fn set_padding(config: &mut DecoderConfig, tokenizer: &Tokenizer) {
        // transformers looks for the last token of a padded text in front of this one.
        let named = tokenizer.special_token("pad_token").and_then(|(_, id)| id);
        let end = config.eos_token_ids.first().copied();
        let known = |id: &usize| *id < config.vocab_size;
        let new = named.map(|id| id as usize).or(end).filter(known);
        config.pad_token_id = config.pad_token_id.or(new);
    }

    fn max_tokens(config: &DecoderConfig) -> usize {
        config.max_tokens()
    }

    fn positions_in_all(config: &DecoderConfig) -> usize {
        config.positions_in_all()
    }

    fn hidden_size(config: &DecoderConfig) -> usize {
        config.hidden_size
    }

    fn arrangement(c: &DecoderConfig) -> String {
        // Head and labels have no part in it.
        let mut raw = c.raw.clone();
        for key in [
            "architectures",
            "id2label",
            "label2id",
            "problem_type",
            "pad_token_id",
        ] {
            raw.remove(key);
        }
        serde_json::Value::Object(raw).to_string()
    }

    passes!(DecoderClassifier);
}
