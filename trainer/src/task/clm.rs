//! The next token of each document: continued pretraining, domain adaptation, and pretraining from nothing.

use graft_autograd::Var;
use graft_models::{CausalLm, TokenBatch};
use graft_nn::Forward;
use graft_tensor::Memory;

use super::{Quality, Task};
use crate::config::{Init, RunConfig};
use crate::data::Dataset;
use crate::documents::{Documents, sequence_length};
use crate::error::Result;
use crate::model::{Loaded, Model, Weights};
use crate::perplexity::Perplexity;
use crate::run_dir::Record;
use crate::steps::diverged;

/// Causal language modelling: documents in sequences.
pub(crate) struct Clm {
    training: Documents,
    evaluation: Option<Documents>,
    notes: Vec<String>,
}

impl Task for Clm {
    type Network = CausalLm;
    /// Tokens, and what each should be followed by, `[tokens]`
    type Batch = (TokenBatch, Vec<i64>);
    type Quality = Perplexity;

    fn load(config: &RunConfig, memory: &Memory) -> Result<Loaded<Clm, CausalLm>> {
        let column = &config.data.text;
        let training = Dataset::documents(&config.data.train, column)?;
        let evaluation = config.data.eval.as_ref();
        let evaluation = evaluation
            .map(|path| Dataset::documents(path, column))
            .transpose()?;
        let weights = match config.model.init {
            Init::Pretrained => Weights::Stored { new_head: None },
            Init::Random => Weights::Random(config.train.seed),
        };
        Model::causal_while(
            &config.model.path,
            config.strategy.dropout,
            weights,
            memory,
            |model, tokenizer| {
                let length = sequence_length(model, config.data.max_length)?;
                let pack = |data: &Dataset| Documents::new(model, tokenizer, data, length);
                let training = pack(&training)?;
                let evaluation = evaluation.as_ref().map(pack).transpose()?;
                let mut notes = vec![training.note(&config.data.train)];
                if let (Some(path), Some(data)) = (&config.data.eval, &evaluation) {
                    notes.push(data.note(path));
                }
                if config.model.init == Init::Random {
                    notes.push("all weights are new, from the seed".to_owned());
                }
                Ok(Clm {
                    training,
                    evaluation,
                    notes,
                })
            },
        )
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

    fn truncated(&self) -> usize {
        0
    }

    fn prepare(&self, examples: &[usize]) -> (TokenBatch, Vec<i64>) {
        self.training.pack(examples)
    }

    fn loss(
        &self,
        f: &mut Forward,
        model: &Model<CausalLm>,
        (batch, next): (TokenBatch, Vec<i64>),
        targets: usize,
    ) -> Result<Var> {
        let sum = model.network.loss(f, &batch, &next)?;
        Ok(f.tape.scale(&sum, 1.0 / targets as f64)?)
    }

    fn evaluate(&self, model: &Model<CausalLm>, step: u64) -> Result<Option<Perplexity>> {
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
