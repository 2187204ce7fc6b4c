//! A model's logits on a data set, and how good they are.

use std::path::Path;

use graft_models::{Labels, Tokenizer};
use graft_nn::Forward;
use serde::{Deserialize, Serialize};

use crate::batch::{BatchSize, in_order};
use crate::data::{Columns, Dataset, count_labels, encode_labels};
use crate::encode::Encoded;
use crate::error::{Error, Result};
use crate::features::Features;
use crate::metrics::Confusion;
use crate::model::Model;
use crate::plan::{heaviest_if, read_all, rows};
use crate::text_classifier::TextClassifier;

/// Tokens of one batch of an evaluation: enough to keep every core busy, few enough to need less memory than a
/// training step.
const EVALUATION_BATCH: BatchSize = BatchSize::Tokens(2048);

/// The logits of every example, in their order: a row of `labels` numbers each. With `features`, the trunk is only
/// run for examples that are not in there yet.
///
/// # Errors
/// As the model's forward pass.
pub fn logits<N: TextClassifier>(
    model: &Model<N>,
    data: &Encoded,
    mut features: Option<&mut Features>,
) -> Result<Vec<Vec<f32>>> {
    let labels = N::labels(&model.config).count();
    let mut all = Vec::with_capacity(data.encodings.len());
    let planned = model.parameters.memory().is_planned();
    let batches = in_order(&data.lengths, EVALUATION_BATCH);
    let rows = rows(&data.lengths, &model.parameters, |_| 1);
    for batch in heaviest_if(planned, batches, &rows) {
        let mut f = Forward::evaluate(&model.parameters);
        let packed = data.pack(&batch);
        let logits = match &mut features {
            Some(features) => {
                let rows = features.rows(model, data, &batch)?;
                let cut = features.cut();
                model.network.above(&mut f, cut, rows, &packed.offsets)?
            }
            None => model.network.forward(&mut f, &packed)?,
        };
        let values = read_all(logits.value())?;
        all.extend(values.chunks(labels).map(<[f32]>::to_vec));
    }
    if planned {
        all.resize(data.encodings.len(), vec![0.0; labels]);
    }
    Ok(all)
}

/// [`logits`] of a model that is there to be used, all of them numbers.
///
/// # Errors
/// As there; a logit that is none.
pub(crate) fn sound_logits<N: TextClassifier>(
    model: &Model<N>,
    data: &Encoded,
) -> Result<Vec<Vec<f32>>> {
    let all = logits(model, data, None)?;
    match all.iter().flatten().all(|x| x.is_finite()) {
        true => Ok(all),
        false => Err(Error::not_numbers()),
    }
}

/// The number of a row's largest logit, the first if several are.
pub fn best_label(logits: &[f32]) -> u32 {
    let best = logits
        .iter()
        .enumerate()
        .fold(0, |best, (i, x)| if *x > logits[best] { i } else { best });
    best as u32
}

/// Softmax of a row of logits.
pub fn probabilities(logits: &[f32]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = logits.iter().map(|&x| f64::from(x - top).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

/// How a model does on labelled examples.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross-entropy
    pub loss: f64,
    /// True against predicted labels
    pub confusion: Confusion,
    /// The same for always guessing the class most frequent in training
    pub baseline: Confusion,
}

impl Evaluation {
    /// Of given logits and true labels, `[n]` each; `training_counts` has a count for each label.
    pub fn new(logits: &[Vec<f32>], truth: &[u32], training_counts: &[usize]) -> Evaluation {
        let classes = training_counts.len();
        let predicted: Vec<u32> = logits.iter().map(|row| best_label(row)).collect();
        let losses = logits
            .iter()
            .zip(truth)
            .map(|(row, &t)| -probabilities(row)[t as usize].ln());
        Evaluation {
            loss: losses.sum::<f64>() / truth.len().max(1) as f64,
            confusion: Confusion::of(classes, truth, &predicted),
            baseline: Confusion::majority_baseline(training_counts, truth),
        }
    }

    /// Whether this is the better of two: by accuracy, then macro-F1, then loss.
    pub fn beats(&self, other: &Evaluation) -> bool {
        let rank = |e: &Evaluation| {
            let score = e.confusion.score();
            [score.accuracy, score.macro_f1, -e.loss]
        };
        rank(self).partial_cmp(&rank(other)) == Some(std::cmp::Ordering::Greater)
    }
}

/// Labelled examples, ready to be evaluated on.
#[derive(Debug)]
pub struct Labelled {
    /// The tokens
    pub encoded: Encoded,
    /// A label number for each example
    pub labels: Vec<u32>,
    /// Examples without any text
    pub empty: usize,
}

impl Labelled {
    /// Reads and tokenizes a file whose labels the model knows.
    ///
    /// # Errors
    /// A file that cannot be used, a label that the model does not know.
    pub fn read<N: TextClassifier>(
        model: &Model<N>,
        path: &Path,
        columns: &Columns,
        max_length: Option<usize>,
    ) -> Result<Labelled> {
        let data = Dataset::read(path, columns)?;
        Labelled::new(model, &data, max_length)
    }

    /// Tokenizes a data set whose labels the model knows.
    ///
    /// # Errors
    /// A label that the model does not know.
    pub fn new<N: TextClassifier>(
        model: &Model<N>,
        data: &Dataset,
        max_length: Option<usize>,
    ) -> Result<Labelled> {
        Labelled::with::<N>(&model.config, &model.tokenizer, data, max_length)
    }

    /// [`Labelled::new`] for a model of which only these two are there yet.
    ///
    /// # Errors
    /// A label that the model does not know.
    pub fn with<N: TextClassifier>(
        config: &N::Config,
        tokenizer: &Tokenizer,
        data: &Dataset,
        max_length: Option<usize>,
    ) -> Result<Labelled> {
        let positions = N::max_tokens(config);
        Ok(Labelled {
            labels: encode_labels(N::labels(config), data)?,
            encoded: Encoded::with(positions, tokenizer, data, max_length)?,
            empty: data.empty_texts(),
        })
    }

    /// Examples of each label.
    pub fn counts(&self, labels: &Labels) -> Vec<usize> {
        count_labels(labels.count(), &self.labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_add_up_and_ties_go_to_the_first() {
        let p = probabilities(&[1000.0, 1000.0, -1000.0]);
        assert!((p[0] - 0.5).abs() < 1e-12 && p[2] == 0.0);
        assert_eq!(best_label(&[0.0, 2.0, 2.0]), 1);
    }

    #[test]
    fn accuracy_decides_then_f1_then_loss() {
        let logits = |sure: f32| vec![vec![sure, 0.0], vec![0.0, sure]];
        let sure = Evaluation::new(&logits(5.0), &[0, 1], &[1, 1]);
        let unsure = Evaluation::new(&logits(1.0), &[0, 1], &[1, 1]);
        let wrong = Evaluation::new(&logits(9.0), &[1, 1], &[1, 1]);
        assert!(sure.beats(&unsure) && !unsure.beats(&sure));
        assert!(unsure.beats(&wrong));
        assert!(!sure.beats(&sure));
        assert!((unsure.loss - (1.0 + (-1.0f64).exp()).ln()).abs() < 1e-6);
    }
}
