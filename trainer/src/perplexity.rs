//! How well a language model foresees tokens.

use graft_nn::Forward;
use serde::{Deserialize, Serialize};

use crate::batch::{BatchSize, in_order};
use crate::corpus::{Corpus, Pass, TokenNetwork};
use crate::error::Result;
use crate::model::Model;
use crate::plan::{heaviest_if, read_one, rows};

/// Tokens of one batch of an evaluation, as for classifiers.
const EVALUATION_BATCH: BatchSize = BatchSize::Tokens(2048);

/// The loss of a language model on texts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// Mean cross-entropy of the tokens that were predicted, in nats
    pub loss: f64,
    /// How many these are
    pub tokens: u64,
}

impl Perplexity {
    /// Of a model on texts: over all their supervised tokens.
    ///
    /// # Errors
    /// As the model's forward pass.
    pub fn of<C: Corpus>(model: &Model<C::Network>, data: &C) -> Result<Perplexity> {
        let (mut sum, mut tokens) = (0.0, 0);
        let planned = model.parameters.memory().is_planned();
        let batches = in_order(data.lengths(), EVALUATION_BATCH);
        let rows = rows(data.lengths(), &model.parameters, |i| data.texts(i));
        for batch in heaviest_if(planned, batches, &rows) {
            let (packed, targets) = data.pack(Pass::Evaluation, &batch);
            let mut f = Forward::evaluate(&model.parameters);
            let loss = model.network.loss(&mut f, &packed, &targets)?;
            sum += read_one(loss.value())?;
            tokens += batch.iter().map(|&i| data.targets(i)).sum::<usize>();
        }
        Ok(Perplexity {
            loss: sum / tokens as f64,
            tokens: tokens as u64,
        })
    }

    /// The exponential of the loss: among how many equally likely tokens the model is as unsure.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}
