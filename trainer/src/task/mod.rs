//! What a run learns. The recipe (`train.rs`) and the loop (`steps.rs`) know batches, optimizer steps, run directories
//! and certificates; all that differs between kinds of tasks stands here.

mod classify;
mod tokens;

use std::path::Path;

use graft_autograd::Var;
use graft_models::LoadReport;
use graft_nn::{Forward, TrainableSet};
use graft_tensor::Memory;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use classify::Classify;
pub(crate) use tokens::Tokens;

use crate::config::RunConfig;
use crate::error::{Result, list_names};
use crate::features::Kept;
use crate::model::{Hashes, Loaded, Model};
use crate::network::Network;
use crate::record::Record;

/// A kind of task with its data.
pub(crate) trait Task: Sync + Sized {
    /// What is trained.
    type Network: Network;
    /// Examples, ready to be computed.
    type Batch: Send;
    /// How good a model is.
    type Quality: Quality;

    /// Reads data and model. Data are read and tokenized beside the weights.
    ///
    /// # Errors
    /// Whatever is wrong with either.
    fn load(config: &RunConfig, memory: &Memory) -> Result<Loaded<Self, Self::Network>>;

    /// Told before the first step, and whenever more is thawed, what will be trained from now on and for how many epochs;
    /// `dir` is where files may be while the run goes on.
    fn begin(
        &mut self,
        _config: &RunConfig,
        _model: &Model<Self::Network>,
        _before: &Hashes,
        _trained: (&TrainableSet, usize),
        _dir: &Path,
    ) {
    }

    /// Bytes of memory that what is kept of frozen layers would take, without a limit.
    fn keeps(&self) -> u64 {
        0
    }

    /// What the user should know since the last call.
    fn take_notes(&mut self) -> Vec<String>;

    /// Tokens of each training example.
    fn lengths(&self) -> &[usize];

    /// What of an example is supervised, counted: the loss of an optimizer step is a mean over these.
    fn targets(&self, example: usize) -> usize;

    /// Texts in an example that do not see each other: each stands behind virtual tokens of its own.
    fn texts(&self, _example: usize) -> usize {
        1
    }

    /// Training examples whose tokens were cut.
    fn truncated(&self) -> usize;

    /// Makes examples ready for an epoch, counted from 1. Called on a thread beside the computation of the batch before.
    fn prepare(&self, epoch: usize, examples: &[usize]) -> Self::Batch;

    /// A batch's share of the loss of a step with so many `targets`: the sum over the batch's, divided by them.
    ///
    /// # Errors
    /// As the model's forward pass.
    fn loss(
        &self,
        f: &mut Forward,
        model: &Model<Self::Network>,
        batch: Self::Batch,
        targets: usize,
    ) -> Result<Var>;

    /// How good the model is after `step` optimizer steps, if there is something to evaluate on.
    ///
    /// # Errors
    /// Numbers that are not finite; as the model's forward pass.
    fn evaluate(&self, model: &Model<Self::Network>, step: u64) -> Result<Option<Self::Quality>>;

    /// The names of the model's outputs, where they have names.
    fn labels(_model: &Model<Self::Network>) -> Vec<String> {
        Vec::new()
    }

    /// Ends the task: the outputs of frozen layers that were kept, and what the user should know.
    fn finish(self) -> (Option<Kept>, Vec<String>) {
        (None, Vec::new())
    }
}

/// What the user should know about parameters that no checkpoint held.
fn new_parameters(report: &LoadReport) -> Option<String> {
    let new = &report.initialised;
    (!new.is_empty()).then(|| format!("new for this task: {}", list_names(new, 4)))
}

/// The result of an evaluation.
pub(crate) trait Quality: Clone + Serialize + DeserializeOwned {
    /// Whether this is the better of two.
    fn beats(&self, other: &Self) -> bool;

    /// In a few words, for the progress.
    fn line(&self) -> String;

    /// For the metrics.
    fn record(&self, epoch: usize, step: u64, best: bool) -> Record;

    /// Rows of the report.
    fn measures(&self) -> Vec<(&'static str, String)>;
}
