//! What the trainer asks of the layers of a model, and of their configuration, whatever the family and the task.

use graft_models::{
    Adaptable, CausalLm, Classifier, DecoderClassifier, DecoderConfig, MaskedConfig, MaskedLm,
    ModelConfig, Strategy,
};
use graft_nn::{FreezePolicy, ParamId, Parameters};

use crate::error::Result;

/// The layers of a model for a kind of task, over the configuration of its families.
pub trait Network: Sized + Send {
    /// The configuration of its families.
    type Config: NetworkConfig;

    /// Declares the parameters.
    ///
    /// # Errors
    /// None for a configuration that was checked when it was read.
    fn declare(p: &mut Parameters, config: &Self::Config) -> Result<Self>;

    /// The rules of some strategies, added up.
    ///
    /// # Errors
    /// More layers than the model has; biases where there are none.
    fn policy(&self, strategies: &[Strategy]) -> Result<FreezePolicy>;

    /// Number of layers.
    fn layers(&self) -> usize;

    /// The layer that a parameter belongs to: `None` for one of the embeddings, [`Network::layers`] for one behind the
    /// layers.
    fn layer_of(&self, id: ParamId) -> Option<usize>;
}

/// What a run asks of a configuration, whatever its families.
pub trait NetworkConfig: Adaptable + Clone + std::fmt::Debug + Send + Sync {
    /// Rows of the token embedding.
    fn vocab_size(&self) -> usize;

    /// Sets every dropout probability.
    fn set_dropout(&mut self, p: f64);

    /// Most tokens of a text.
    fn max_tokens(&self) -> usize;

    /// The positions that virtual tokens take of those.
    fn reserved(&mut self) -> &mut usize;

    /// The text of the config.json to save.
    fn text(&self) -> String;
}

impl NetworkConfig for ModelConfig {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn set_dropout(&mut self, p: f64) {
        self.dropout.hidden = p;
        self.dropout.attention = p;
        self.dropout.classifier = p;
    }

    fn max_tokens(&self) -> usize {
        ModelConfig::max_tokens(self)
    }

    fn reserved(&mut self) -> &mut usize {
        &mut self.reserved
    }

    fn text(&self) -> String {
        self.to_json()
    }
}

impl NetworkConfig for MaskedConfig {
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    fn set_dropout(&mut self, p: f64) {
        self.0.set_dropout(p);
    }

    fn max_tokens(&self) -> usize {
        self.0.max_tokens()
    }

    fn reserved(&mut self) -> &mut usize {
        &mut self.0.reserved
    }

    fn text(&self) -> String {
        self.0.text()
    }
}

impl NetworkConfig for DecoderConfig {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn set_dropout(&mut self, p: f64) {
        self.dropout.embedding = p;
        self.dropout.attention = p;
        self.dropout.residual = p;
        self.dropout.classifier = p;
    }

    fn max_tokens(&self) -> usize {
        DecoderConfig::max_tokens(self)
    }

    fn reserved(&mut self) -> &mut usize {
        &mut self.reserved
    }

    fn text(&self) -> String {
        self.to_json()
    }
}

/// Networks over a `$trunk` with layers.
macro_rules! networks {
    ($($network:ident($config:ident), over $trunk:ident;)*) => {$(
        impl Network for $network {
            type Config = $config;

            fn declare(p: &mut Parameters, config: &$config) -> Result<$network> {
                Ok($network::new(p, config)?)
            }

            fn policy(&self, strategies: &[Strategy]) -> Result<FreezePolicy> {
                Ok(self.policy_of(strategies)?)
            }

            fn layers(&self) -> usize {
                self.$trunk().layers()
            }

            fn layer_of(&self, id: ParamId) -> Option<usize> {
                self.$trunk().layer_of(id)
            }
        }
    )*};
}
networks! {
    Classifier(ModelConfig), over encoder;
    MaskedLm(MaskedConfig), over encoder;
    CausalLm(DecoderConfig), over decoder;
    DecoderClassifier(DecoderConfig), over decoder;
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A network without computation: parameter 0 is an embedding, then each layer has one, and the head.
    #[derive(Debug)]
    pub struct Stack {
        pub layers: usize,
    }

    impl Network for Stack {
        type Config = ModelConfig;

        fn declare(_: &mut Parameters, _: &ModelConfig) -> Result<Stack> {
            Ok(Stack { layers: 0 })
        }

        fn policy(&self, _: &[Strategy]) -> Result<FreezePolicy> {
            Ok(FreezePolicy::default())
        }

        fn layers(&self) -> usize {
            self.layers
        }

        fn layer_of(&self, id: ParamId) -> Option<usize> {
            id.key().checked_sub(1)
        }
    }
}
