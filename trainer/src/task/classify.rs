//! A label, any number of labels, or a number for a text or a pair of texts; a label for each word of a text.

use std::marker::PhantomData;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use graft_autograd::Var;
use graft_models::TokenBatch;
use graft_nn::{Forward, TrainableSet};
use graft_tensor::Memory;

use super::{Task, new_parameters};
use crate::config::{RunConfig, TaskKind};
use crate::data::{Columns, Dataset, training_labels};
use crate::error::Result;
use crate::evaluate::{Labelled, logits};
use crate::evaluation::Evaluation;
use crate::features::{Features, Kept};
use crate::model::{Changes, Hashes, Loaded, Model};
use crate::report::counted;
use crate::steps::diverged;
use crate::targets::{Guess, Targets};
use crate::text_classifier::TextClassifier;

/// Classification: labelled texts, and what a frozen trunk makes of them.
pub(crate) struct Classify<N> {
    training: Labelled,
    evaluation: Option<Labelled>,
    /// What one would say without reading a text
    guess: Guess,
    features: Option<Mutex<Features>>,
    notes: Vec<String>,
    network: PhantomData<fn() -> N>,
}

/// A batch, ready to be computed.
pub(crate) struct Prepared {
    examples: Vec<usize>,
    packed: TokenBatch,
    targets: Targets,
    /// What a frozen trunk makes of them, if it is known
    rows: Option<Vec<f32>>,
}

/// No step of an update of the features leaves them wrong: after a panic they can be used.
fn lock(features: &Mutex<Features>) -> MutexGuard<'_, Features> {
    features.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<N: TextClassifier> Task for Classify<N> {
    type Network = N;
    type Batch = Prepared;
    type Quality = Evaluation;

    fn load(config: &RunConfig, memory: &Memory) -> Result<Loaded<Classify<N>, N>> {
        let TaskKind::Texts(problem) = config.task.kind else {
            panic!("{} is no task of labelled texts", config.task.kind);
        };
        let columns = Columns {
            text: config.data.text.clone(),
            text_pair: config.data.text_pair.clone(),
            label: config.data.label.clone(),
            problem,
        };
        let files = rayon::join(
            || Dataset::read(&config.data.train, &columns),
            || {
                let path = config.data.eval.as_ref();
                path.map(|path| Dataset::read(path, &columns)).transpose()
            },
        );
        let files = (files.0?, files.1?);
        let max_length = config.data.max_length;
        let loaded = Model::<N>::for_task_while(
            &config.model.path,
            training_labels(&files.0)?,
            Changes::of(config),
            config.train.seed,
            memory,
            |config, tokenizer| {
                let encode =
                    |data: &Dataset| Labelled::with::<N>(config, tokenizer, data, max_length);
                Ok((encode(&files.0)?, files.1.as_ref().map(encode).transpose()?))
            },
        )?;
        let (training, evaluation) = loaded.meanwhile;
        let mut notes = Vec::new();
        let paths = [Some(&config.data.train), config.data.eval.as_ref()];
        for (path, data) in paths
            .into_iter()
            .zip([Some(&training), evaluation.as_ref()])
        {
            if let (Some(path), Some(data)) = (path, data) {
                notes.extend(notes_of(path, data));
            }
        }
        notes.extend(new_parameters(&loaded.report));
        if !loaded.report.initialised.is_empty() {
            notes.extend(far_from_zero(&config.data.train, &training.targets));
        }
        let task = Classify {
            guess: training.targets.guess(),
            training,
            evaluation,
            features: None,
            notes,
            network: PhantomData,
        };
        Ok(Loaded {
            model: loaded.model,
            report: loaded.report,
            hashes: loaded.hashes,
            meanwhile: task,
        })
    }

    fn begin(
        &mut self,
        config: &RunConfig,
        model: &Model<N>,
        before: &Hashes,
        (set, epochs): (&TrainableSet, usize),
        dir: &Path,
    ) {
        // What an earlier cut gave is of no use any more; its file goes before there is another.
        if let Some(features) = self.features.take() {
            let features = features
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner);
            self.notes.extend(features.finish());
        }
        let cut = model.network.cut(&model.parameters, set);
        self.features = Features::new(config, model, before, (cut, epochs), dir).map(Mutex::new);
    }

    fn keeps(&self) -> u64 {
        let Some(features) = &self.features else {
            return 0;
        };
        let features = lock(features);
        let data = [Some(&self.training), self.evaluation.as_ref()];
        data.into_iter()
            .flatten()
            .map(|data| features.keeps(&data.encoded))
            .sum()
    }

    fn take_notes(&mut self) -> Vec<String> {
        let mut notes = std::mem::take(&mut self.notes);
        if let Some(features) = &self.features {
            notes.extend(lock(features).take_notes());
        }
        notes
    }

    fn lengths(&self) -> &[usize] {
        &self.training.encoded.lengths
    }

    fn targets(&self, example: usize) -> usize {
        self.training.targets.supervised(example)
    }

    fn truncated(&self) -> usize {
        self.training.encoded.truncated
    }

    fn prepare(&self, _: usize, examples: &[usize]) -> Prepared {
        let data = &self.training;
        let features = self.features.as_ref();
        Prepared {
            examples: examples.to_vec(),
            packed: data.encoded.pack(examples),
            targets: data.targets.select(examples),
            rows: features.and_then(|features| lock(features).fetch(&data.encoded, examples)),
        }
    }

    fn loss(
        &self,
        f: &mut Forward,
        model: &Model<N>,
        batch: Prepared,
        targets: usize,
    ) -> Result<Var> {
        let known = match &self.features {
            Some(features) => {
                let mut features = lock(features);
                let rows = match batch.rows {
                    Some(rows) => features.tensor(model, rows)?,
                    None => features.rows(model, &self.training.encoded, &batch.examples)?,
                };
                Some((features.cut(), rows))
            }
            None => None,
        };
        let outputs = match known {
            Some((cut, rows)) => model.network.above(f, cut, rows, &batch.packed.offsets)?,
            None => model.network.forward(f, &batch.packed)?,
        };
        batch.targets.loss(f, &outputs, targets as f64)
    }

    fn evaluate(&self, model: &Model<N>, step: u64) -> Result<Option<Evaluation>> {
        let Some(data) = &self.evaluation else {
            return Ok(None);
        };
        let mut features = self.features.as_ref().map(lock);
        let logits = logits(model, &data.encoded, features.as_deref_mut())?;
        if !logits.iter().flatten().all(|x| x.is_finite()) {
            let what = "a logit of the evaluation is not finite".into();
            return Err(diverged(step, what));
        }
        Ok(Some(Evaluation::new(&logits, &data.targets, &self.guess)))
    }

    fn labels(model: &Model<N>) -> Vec<String> {
        N::labels(&model.config).names().to_vec()
    }

    fn finish(self) -> (Option<Kept>, Vec<String>) {
        let Some(features) = self.features else {
            return (None, Vec::new());
        };
        let features = features
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        (Some(features.kept()), features.finish())
    }
}

/// What the user should know about a file before the run.
/// What the user should know of numbers that a new head, which begins near 0 and moves by about the learning rate in a step,
/// comes to late or never.
fn far_from_zero(path: &Path, targets: &Targets) -> Option<String> {
    /// Root mean square that a head of some hundred inputs reaches within some hundred steps.
    const NEAR: f64 = 100.0;
    let Targets::Numbers(numbers) = targets else {
        return None;
    };
    let mean_of = |f: &dyn Fn(f64) -> f64| {
        numbers.iter().map(|&x| f(f64::from(x))).sum::<f64>() / numbers.len() as f64
    };
    let mean = mean_of(&|x| x);
    let deviation = mean_of(&|x| (x - mean).powi(2)).sqrt();
    (mean.hypot(deviation) > NEAR).then(|| {
        format!(
            "{}: the numbers are {mean:.4e} on average, with a standard deviation of {deviation:.4e}, and a new head begins \
             near 0: they are learnt faster less their mean and divided by that, or in larger units",
            path.display()
        )
    })
}

fn notes_of(path: &Path, data: &Labelled) -> Vec<String> {
    let mut notes = data.notes.clone();
    if data.encoded.truncated > 0 {
        notes.push(format!(
            "{}: {} of {} texts have more tokens than allowed and were cut",
            path.display(),
            data.encoded.truncated,
            data.targets.len()
        ));
    }
    if data.empty > 0 {
        let verb = if data.empty == 1 { "is" } else { "are" };
        let empty = counted(data.empty, "text");
        notes.push(format!("{}: {empty} {verb} empty", path.display()));
    }
    notes
}
