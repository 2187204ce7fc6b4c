//! One label for each text.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Measure, Measured};
use crate::metrics::{ClassMetrics, Confusion};
use crate::report::Table;

/// How a model does where one label is right.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClassesEvaluation {
    /// Mean cross-entropy
    pub loss: f64,
    /// True against predicted labels
    pub confusion: Confusion,
    /// The same for always guessing one class
    pub baseline: Confusion,
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

impl ClassesEvaluation {
    /// Of given logits and true labels, `[n]` each.
    pub fn new(logits: &[Vec<f32>], classes: usize, truth: &[u32], guess: u32) -> Self {
        let predicted: Vec<u32> = logits.iter().map(|row| best_label(row)).collect();
        let losses = logits
            .iter()
            .zip(truth)
            .map(|(row, &t)| -probabilities(row)[t as usize].ln());
        ClassesEvaluation {
            loss: losses.sum::<f64>() / truth.len().max(1) as f64,
            confusion: Confusion::of(classes, truth, &predicted),
            baseline: Confusion::of_guess(classes, truth, guess),
        }
    }
}

impl Measured for ClassesEvaluation {
    fn loss(&self) -> f64 {
        self.loss
    }

    fn rank(&self) -> [f64; 3] {
        let score = self.confusion.score();
        [score.accuracy, score.macro_f1, -self.loss]
    }

    fn measures(&self) -> Vec<Measure> {
        let (score, guess) = (self.confusion.score(), self.baseline.score());
        vec![
            Measure::new("accuracy", "accuracy", score.accuracy, guess.accuracy),
            Measure::new("macro_f1", "macro-F1", score.macro_f1, guess.macro_f1),
        ]
    }

    fn guessing(&self) -> &'static str {
        "majority class"
    }

    fn examples(&self) -> u64 {
        self.confusion.total()
    }

    fn details(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("classes".into(), json!(self.confusion.per_class()));
        // A row per true label, a column per predicted one.
        map.insert("confusion".into(), json!(self.confusion.rows()));
        map
    }

    fn by_label(&self, labels: &[String]) -> Option<Table> {
        Some(table(labels, &self.confusion.per_class()))
    }
}

/// Precision, recall and F1 of each label.
pub(super) fn table(labels: &[String], of: &[ClassMetrics]) -> Table {
    let mut table = Table::new();
    for (name, class) in labels.iter().zip(of) {
        table.row(
            name,
            format!(
                "precision {:.3}  recall {:.3}  F1 {:.3}  of {}",
                class.precision, class.recall, class.f1, class.support
            ),
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::super::Evaluation;
    use super::*;
    use crate::targets::{Guess, Targets};
    use crate::task::Quality;

    #[test]
    fn probabilities_add_up_and_ties_go_to_the_first() {
        let p = probabilities(&[1000.0, 1000.0, -1000.0]);
        assert!((p[0] - 0.5).abs() < 1e-12 && p[2] == 0.0);
        assert_eq!(best_label(&[0.0, 2.0, 2.0]), 1);
    }

    #[test]
    fn accuracy_decides_then_f1_then_loss() {
        let logits = |sure: f32| vec![vec![sure, 0.0], vec![0.0, sure]];
        let of = |logits: Vec<Vec<f32>>, right: [u32; 2]| {
            let truth = Targets::Classes {
                classes: 2,
                right: right.to_vec(),
            };
            Evaluation::new(&logits, &truth, &Guess::Class(0))
        };
        let sure = of(logits(5.0), [0, 1]);
        let unsure = of(logits(1.0), [0, 1]);
        let wrong = of(logits(9.0), [1, 1]);
        assert!(sure.beats(&unsure) && !unsure.beats(&sure));
        assert!(unsure.beats(&wrong));
        assert!(!sure.beats(&sure));
        let Evaluation::Classes(unsure) = unsure else {
            panic!("one label each");
        };
        assert!((unsure.loss - (1.0 + (-1.0f64).exp()).ln()).abs() < 1e-6);
    }
}
