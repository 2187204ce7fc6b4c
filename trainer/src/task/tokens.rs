//! Single tokens of texts: the next token of documents or of an assistant's answers, hidden tokens.

use graft_autograd::Var;
use graft_models::TokenBatch;
use graft_nn::Forward;
use graft_tensor::Memory;

use super::{Quality, Task, new_parameters};
use crate::config::{Init, RunConfig};
use crate::corpus::{Corpus, Pass, TokenNetwork};
use crate::error::Result;
use crate::model::{Loaded, Model};
use crate::perplexity::Perplexity;
use crate::record::Record;
use crate::steps::diverged;

/// A task over the supervised tokens of some texts.
pub(crate) struct Tokens<C> {
    training: C,
    evaluation: Option<C>,
    seed: u64,
    notes: Vec<String>,
}

impl<C: Corpus> Task for Tokens<C> {
    type Network = C::Network;
    /// Tokens, and what is supervised of each, `[tokens]`
    type Batch = (TokenBatch, Vec<i64>);
    type Quality = Perplexity;

    fn load(config: &RunConfig, memory: &Memory) -> Result<Loaded<Tokens<C>, C::Network>> {
        let data = &config.data;
        let rows = C::read(&data.train, &data.text)?;
        let other = data.eval.as_ref().map(|path| C::read(path, &data.text));
        let other = other.transpose()?;
        let mut loaded = C::Network::load_while(config, memory, |model, tokenizer| {
            let encode = |rows: &C::Rows| C::new(model, tokenizer, rows, data.max_length);
            let training = encode(&rows)?;
            let evaluation = other.as_ref().map(encode).transpose()?;
            let mut notes = vec![training.note(&data.train)];
            if let (Some(path), Some(corpus)) = (&data.eval, &evaluation) {
                notes.push(corpus.note(path));
            }
            if config.model.init == Init::Random {
                notes.push("all weights are new, from the seed".to_owned());
            }
            Ok(Tokens {
                training,
                evaluation,
                seed: config.train.seed,
                notes,
            })
        })?;
        loaded
            .meanwhile
            .notes
            .extend(new_parameters(&loaded.report));
        Ok(loaded)
    }

    fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    fn lengths(&self) -> &[usize] {
        self.training.lengths()
    }

    fn targets(&self, example: usize) -> usize {
        self.training.targets(example)
    }

    fn texts(&self, example: usize) -> usize {
        self.training.texts(example)
    }

    fn truncated(&self) -> usize {
        self.training.truncated()
    }

    fn prepare(&self, epoch: usize, examples: &[usize]) -> (TokenBatch, Vec<i64>) {
        let seed = self.seed;
        self.training.pack(Pass::Epoch { epoch, seed }, examples)
    }

    fn loss(
        &self,
        f: &mut Forward,
        model: &Model<C::Network>,
        (batch, supervised): (TokenBatch, Vec<i64>),
        targets: usize,
    ) -> Result<Var> {
        let sum = model.network.loss(f, &batch, &supervised)?;
        Ok(f.tape.scale(&sum, 1.0 / targets as f64)?)
    }

    fn evaluate(&self, model: &Model<C::Network>, step: u64) -> Result<Option<Perplexity>> {
        let Some(data) = &self.evaluation else {
            return Ok(None);
        };
        let result = Perplexity::of(model, data)?;
        if !result.loss.is_finite() {
            let what = "the loss of the evaluation is not finite".into();
            return Err(diverged(step, what));
        }
        Ok(Some(result))
    }
}

impl Quality for Perplexity {
    fn beats(&self, other: &Perplexity) -> bool {
        self.loss < other.loss
    }

    fn line(&self) -> String {
        format!(
            "loss {:.4} per token, perplexity {:.4}",
            self.loss,
            self.perplexity()
        )
    }

    fn record(&self, epoch: usize, step: u64, best: bool) -> Record {
        Record::TokenEval {
            epoch,
            step,
            loss: self.loss,
            perplexity: self.perplexity(),
            tokens: self.tokens,
            best,
        }
    }

    fn measures(&self) -> Vec<(&'static str, String)> {
        vec![
            ("loss per token", format!("{:.4}", self.loss)),
            ("perplexity", format!("{:.4}", self.perplexity())),
        ]
    }
}
