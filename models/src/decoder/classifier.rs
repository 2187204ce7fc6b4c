//! A decoder with a sequence-classification head, as transformers builds it: a linear layer over the last token.

use graft_autograd::Var;
use graft_nn::layers::Linear;
use graft_nn::{Forward, FreezePolicy, ParamId, Parameters, TrainableSet};
use graft_tensor::Tensor;
use graft_tensor::ops::Pool;

use super::{Decoder, SCORE};
use crate::batch::TokenBatch;
use crate::classifier::Cut;
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::strategy::Strategy;

/// A sequence classifier over a decoder.
#[derive(Clone, Debug)]
pub struct DecoderClassifier {
    decoder: Decoder,
    score: Linear,
}

impl DecoderClassifier {
    /// Declares the parameters of decoder and head.
    ///
    /// # Errors
    /// None for a configuration that was checked when it was read.
    pub fn new(p: &mut Parameters, config: &DecoderConfig) -> Result<DecoderClassifier> {
        let decoder = Decoder::new(p, config)?;
        let (hidden, labels) = (config.hidden_size, config.num_labels());
        let score = Linear::without_bias(p, SCORE, hidden, labels, config.initializer_range)?;
        Ok(DecoderClassifier { decoder, score })
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The rules of a strategy.
    ///
    /// # Errors
    /// More layers than the model has.
    pub fn policy(&self, strategy: Strategy) -> Result<FreezePolicy> {
        self.policy_of(&[strategy])
    }

    /// The rules of some strategies, added up.
    ///
    /// # Errors
    /// As [`DecoderClassifier::policy`].
    pub fn policy_of(&self, strategies: &[Strategy]) -> Result<FreezePolicy> {
        self.decoder.policy(strategies, &["score.*"])
    }

    /// The logits, `[sequences, labels]`.
    ///
    /// # Errors
    /// Ids outside the vocabulary, empty or too long sequences.
    pub fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let (x, offsets) = self.decoder.forward(f, batch)?;
        let last = f.tape.pool(Pool::Last, &x, &offsets)?;
        drop(x);
        let last = f.leave(&last)?;
        self.classify(f, &last)
    }

    /// The place below which nothing is trained: in front of the layer of the lowest trained parameter, where the final
    /// norm counts as one more layer. `None` if an embedding is trained, or more than the texts' own tokens would pass.
    pub fn cut(&self, p: &Parameters, set: &TrainableSet) -> Option<Cut> {
        Cut::below_trained(p, set, self.stages(), |id| self.decoder.stage_of(id))
    }

    /// Whether a parameter takes part in what passes through `cut`.
    pub fn is_below(&self, cut: Cut, id: ParamId) -> bool {
        cut.is_above(self.decoder.stage_of(id), self.stages())
    }

    /// Layers, and the final norm.
    fn stages(&self) -> usize {
        self.decoder.layers() + 1
    }

    /// What passes through `cut`: `[tokens, hidden]` in front of a layer, `[sequences, hidden]` (each last token's last
    /// hidden state) in front of the head; in the parameters' type, which holds every value of the activations' type.
    ///
    /// # Errors
    /// As [`DecoderClassifier::forward`].
    pub fn below(&self, f: &mut Forward, cut: Cut, batch: &TokenBatch) -> Result<Var> {
        let decoder = &self.decoder;
        let x = match cut {
            Cut::Layer(layer) => {
                let (x, place) = decoder.embed(f, batch)?;
                decoder.layers_of(f, x, &place, 0..layer, None)?
            }
            Cut::Head => {
                let (x, offsets) = decoder.forward(f, batch)?;
                f.tape.pool(Pool::Last, &x, &offsets)?
            }
        };
        Ok(f.leave(&x)?)
    }

    /// The logits, `[sequences, labels]`, of what passes through `cut` ([`DecoderClassifier::below`] says in which shape):
    /// what is left to compute when everything below is frozen and known. `offsets [sequences + 1]` say where each
    /// sequence begins.
    ///
    /// # Errors
    /// Shapes or offsets that do not fit.
    pub fn above(&self, f: &mut Forward, cut: Cut, x: Tensor, offsets: &[i64]) -> Result<Var> {
        let x = f.input(x);
        let last = match cut {
            Cut::Layer(layer) => {
                let place = self.decoder.place(f, offsets)?;
                let x = f.enter(&x)?;
                let layers = layer..self.decoder.layers();
                let x = self.decoder.layers_of(f, x, &place, layers, None)?;
                let x = self.decoder.norm.forward(f, &x)?;
                let last = f.tape.pool(Pool::Last, &x, &place.offsets)?;
                f.leave(&last)?
            }
            Cut::Head => x,
        };
        self.classify(f, &last)
    }

    /// The logits of last tokens' hidden states, `[sequences, hidden]` to `[sequences, labels]`.
    fn classify(&self, f: &mut Forward, last: &Var) -> Result<Var> {
        Ok(self.score.forward(f, last)?)
    }
}
