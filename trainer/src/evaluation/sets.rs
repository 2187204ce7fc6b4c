//! Any number of labels for each text.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::classes::table;
use super::{Measure, Measured};
use crate::metrics::{ClassMetrics, ratio};
use crate::report::Table;

/// How a model does where any number of labels is right. A label is predicted where its likelihood is above one half.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SetsEvaluation {
    /// Mean binary cross-entropy over examples and labels
    pub loss: f64,
    /// Of the predictions
    pub score: SetScore,
    /// The same for always guessing one set
    pub baseline: SetScore,
}

/// How often sets of labels are right, and the labels in them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetScore {
    examples: u64,
    /// Sets that are right as a whole
    exact: u64,
    /// For each label, how often it was predicted rightly, predicted, and right
    labels: Vec<[u64; 3]>,
}

/// The likelihood of a label by its logit: the logistic function.
pub fn likelihood(logit: f32) -> f64 {
    1.0 / (1.0 + (-f64::from(logit)).exp())
}

/// The numbers of the labels whose likelihood is above one half, rising.
pub fn likely_labels(logits: &[f32]) -> Vec<u32> {
    let above = (0..).zip(logits).filter(|&(_, &logit)| logit > 0.0);
    above.map(|(label, _)| label).collect()
}

/// `ln(1 + e^x)` without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

impl SetScore {
    /// Of true and predicted sets, the numbers of whose labels rise and are below `labels`.
    pub fn new<'a>(
        labels: usize,
        truth: &[Vec<u32>],
        predicted: impl IntoIterator<Item = &'a [u32]>,
    ) -> SetScore {
        let mut score = SetScore {
            examples: truth.len() as u64,
            exact: 0,
            labels: vec![[0; 3]; labels],
        };
        for (right, guess) in truth.iter().zip(predicted) {
            score.exact += u64::from(right == guess);
            for &label in guess {
                score.labels[label as usize][1] += 1;
                score.labels[label as usize][0] += u64::from(right.contains(&label));
            }
            for &label in right {
                score.labels[label as usize][2] += 1;
            }
        }
        score
    }

    /// Fraction of sets that are right as a whole: scikit-learn's `accuracy_score`.
    pub fn accuracy(&self) -> f64 {
        ratio(self.exact, self.examples)
    }

    /// F1 of all labels of all examples together.
    pub fn micro_f1(&self) -> f64 {
        let sum = |i: usize| self.labels.iter().map(|counts| counts[i]).sum::<u64>();
        ratio(2 * sum(0), sum(1) + sum(2))
    }

    /// Unweighted mean of the labels' F1. As in scikit-learn, that of a label which is neither right nor predicted
    /// anywhere is 0.
    pub fn macro_f1(&self) -> f64 {
        let sum: f64 = self.per_label().iter().map(|label| label.f1).sum();
        sum / self.labels.len().max(1) as f64
    }

    /// Precision, recall and F1 of each label.
    pub fn per_label(&self) -> Vec<ClassMetrics> {
        let of = |&[hits, guessed, support]: &[u64; 3]| ClassMetrics::of(hits, guessed, support);
        self.labels.iter().map(of).collect()
    }
}

impl SetsEvaluation {
    /// Of given logits and true sets, `[n]` each.
    pub fn new(logits: &[Vec<f32>], labels: usize, truth: &[Vec<u32>], guess: &[u32]) -> Self {
        let predicted: Vec<Vec<u32>> = logits.iter().map(|row| likely_labels(row)).collect();
        let losses = logits.iter().zip(truth).map(|(row, right)| {
            let of = |(label, &logit): (u32, &f32)| {
                let logit = f64::from(logit);
                softplus(if right.contains(&label) {
                    -logit
                } else {
                    logit
                })
            };
            (0..).zip(row).map(of).sum::<f64>()
        });
        let elements = (truth.len() * labels).max(1);
        SetsEvaluation {
            loss: losses.sum::<f64>() / elements as f64,
            score: SetScore::new(labels, truth, predicted.iter().map(Vec::as_slice)),
            baseline: SetScore::new(labels, truth, truth.iter().map(|_| guess)),
        }
    }
}

impl Measured for SetsEvaluation {
    fn loss(&self) -> f64 {
        self.loss
    }

    fn rank(&self) -> [f64; 3] {
        [self.score.micro_f1(), self.score.macro_f1(), -self.loss]
    }

    fn measures(&self) -> Vec<Measure> {
        let (of, guess) = (&self.score, &self.baseline);
        vec![
            Measure::new("accuracy", "accuracy", of.accuracy(), guess.accuracy()),
            Measure::new("micro_f1", "micro-F1", of.micro_f1(), guess.micro_f1()),
            Measure::new("macro_f1", "macro-F1", of.macro_f1(), guess.macro_f1()),
        ]
    }

    fn guessing(&self) -> &'static str {
        "usual labels"
    }

    fn examples(&self) -> u64 {
        self.score.examples
    }

    fn details(&self) -> Map<String, Value> {
        Map::from_iter([("classes".to_owned(), json!(self.score.per_label()))])
    }

    fn by_label(&self, labels: &[String]) -> Option<Table> {
        Some(table(labels, &self.score.per_label()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The scores are those of scikit-learn's `f1_score`, `accuracy_score` and `precision_recall_fscore_support` too.
    /// ```text
    /// truth      {0, 2} {}  {1} {0}
    /// predicted  {0}    {1} {1} {0, 2}
    /// ```
    #[test]
    fn four_sets_by_hand() {
        let truth = [vec![0, 2], vec![], vec![1], vec![0]];
        let on = |set: [f32; 4]| set.to_vec();
        let logits = [
            on([2.0, -1.0, -0.5, -3.0]),
            on([-1.0, 0.5, -2.0, -3.0]),
            on([-1.0, 3.0, 0.0, -3.0]),
            on([1.0, -1.0, 1.0, -3.0]),
        ];
        let of = SetsEvaluation::new(&logits, 4, &truth, &[0]);
        let score = &of.score;
        // A logit of 0 is a likelihood of one half, and no prediction.
        assert_eq!(score.labels, [[2, 2, 2], [1, 2, 1], [0, 1, 1], [0, 0, 0]]);
        assert_eq!(score.accuracy(), 0.25);
        assert_eq!(score.micro_f1(), 6.0 / 9.0);
        assert!((score.macro_f1() - (1.0 + 2.0 / 3.0) / 4.0).abs() < 1e-15);
        assert_eq!(score.per_label()[1].precision, 0.5);
        assert_eq!(
            of.baseline.labels,
            [[2, 4, 2], [0, 0, 1], [0, 0, 1], [0, 0, 0]]
        );
        let mut loss = 0.0;
        for (row, right) in logits.iter().zip(&truth) {
            for (label, &logit) in row.iter().enumerate() {
                let p = likelihood(logit);
                let is_right = right.contains(&(label as u32));
                loss -= if is_right { p.ln() } else { (1.0 - p).ln() };
            }
        }
        assert!((of.loss - loss / 16.0).abs() < 1e-12);
    }

    #[test]
    fn large_logits_have_finite_losses() {
        let of = SetsEvaluation::new(&[vec![1e4, -1e4]], 2, &[vec![1]], &[]);
        assert_eq!(of.loss, 1e4);
    }
}
