//! A decoder with a classification head, as transformers builds it: a linear layer over the last token, or over each.

use graft_autograd::Var;
use graft_nn::layers::Linear;
use graft_nn::{Forward, FreezePolicy, ParamId, Parameters, TrainableSet};
use graft_tensor::Tensor;
use graft_tensor::ops::Pool;

use super::{CLASSIFIER, Decoder, SCORE};
use crate::batch::TokenBatch;
use crate::classifier::Cut;
use crate::config::{DecoderConfig, DecoderFamily, ProblemType};
use crate::error::Result;
use crate::strategy::Strategy;

/// A classifier over a decoder: of texts, or of each token, as the configuration says.
#[derive(Clone, Debug)]
pub struct DecoderClassifier {
    decoder: Decoder,
    score: Linear,
    /// The head's parameters, as a rule matches them
    glob: &'static str,
    /// Where a frozen decoder ends
    end: Cut,
    dropout: f64,
}

impl DecoderClassifier {
    /// Declares the parameters of decoder and head.
    ///
    /// # Errors
    /// None for a configuration that was checked when it was read.
    pub fn new(p: &mut Parameters, config: &DecoderConfig) -> Result<DecoderClassifier> {
        let decoder = Decoder::new(p, config)?;
        let (hidden, labels) = (config.hidden_size, config.num_labels());
        let std = config.initializer_range;
        if config.head.problem() != ProblemType::Tokens {
            let score = Linear::without_bias(p, SCORE, hidden, labels, std)?;
            return Ok(DecoderClassifier {
                decoder,
                score,
                glob: "score.*",
                end: Cut::Head,
                dropout: 0.0,
            });
        }
        let (name, glob) = match config.family {
            DecoderFamily::Gpt2 => (CLASSIFIER, "classifier.*"),
            _ => (SCORE, "score.*"),
        };
        Ok(DecoderClassifier {
            decoder,
            score: Linear::new(p, name, hidden, labels, std)?,
            glob,
            end: Cut::Tokens,
            dropout: config.dropout.classifier,
        })
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
        self.decoder.policy(strategies, &[self.glob])
    }

    /// The logits, `[sequences, labels]`, or `[tokens, labels]` of a classifier of tokens.
    ///
    /// # Errors
    /// Ids outside the vocabulary, empty or too long sequences.
    pub fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Var> {
        let (x, offsets) = self.decoder.forward(f, batch)?;
        self.classify(f, x, &offsets)
    }

    /// The place below which nothing is trained: in front of the layer of the lowest trained parameter, where the final
    /// norm counts as one more layer. `None` if an embedding is trained, or more than the texts' own tokens would pass.
    pub fn cut(&self, p: &Parameters, set: &TrainableSet) -> Option<Cut> {
        let above = (self.stages(), self.end);
        Cut::below_trained(p, set, above, |id| self.decoder.stage_of(id))
    }

    /// Whether a parameter takes part in what passes through `cut`.
    pub fn is_below(&self, cut: Cut, id: ParamId) -> bool {
        cut.is_above(self.decoder.stage_of(id), self.stages())
    }

    /// Layers, and the final norm.
    fn stages(&self) -> usize {
        self.decoder.layers() + 1
    }

    /// What passes through `cut`: `[tokens, hidden]` in front of a layer or of a head over tokens, `[sequences, hidden]`
    /// (each last token's last hidden state) in front of one over texts; in the parameters' type, which holds every value of
    /// the activations' type.
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
            Cut::Tokens => decoder.forward(f, batch)?.0,
        };
        Ok(f.leave(&x)?)
    }

    /// The logits, as [`DecoderClassifier::forward`] gives them, of what passes through `cut` ([`DecoderClassifier::below`] says in which shape):
    /// what is left to compute when everything below is frozen and known. `offsets [sequences + 1]` say where each
    /// sequence begins.
    ///
    /// # Errors
    /// Shapes or offsets that do not fit.
    pub fn above(&self, f: &mut Forward, cut: Cut, x: Tensor, offsets: &[i64]) -> Result<Var> {
        let x = f.input(x);
        match cut {
            Cut::Layer(layer) => {
                let place = self.decoder.place(f, offsets)?;
                let x = f.enter(&x)?;
                let layers = layer..self.decoder.layers();
                let x = self.decoder.layers_of(f, x, &place, layers, None)?;
                let x = self.decoder.norm.forward(f, &x)?;
                self.classify(f, x, &place.offsets)
            }
            Cut::Head | Cut::Tokens => self.logits(f, &x),
        }
    }

    /// The logits of last hidden states `[tokens, hidden]`.
    fn classify(&self, f: &mut Forward, mut x: Var, offsets: &Var) -> Result<Var> {
        if self.end == Cut::Head {
            x = f.tape.pool(Pool::Last, &x, offsets)?;
        }
        let x = f.leave(&x)?;
        self.logits(f, &x)
    }

    /// The logits of what the head reads, `[rows, hidden]` to `[rows, labels]`.
    fn logits(&self, f: &mut Forward, x: &Var) -> Result<Var> {
        let x = f.dropout(x, self.dropout)?;
        Ok(self.score.forward(f, &x)?)
    }
}
