//! How often classes are taken for each other: accuracy, macro-F1, precision and recall of each.

use serde::{Deserialize, Serialize};

/// How often each class was taken for each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confusion {
    classes: usize,
    /// `[truth, prediction]`, row-major, `classes * classes`.
    counts: Vec<u64>,
}

/// One class of an evaluation. A ratio whose denominator is 0 is 0, as in scikit-learn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ClassMetrics {
    /// Of the predictions of this class, the fraction that is right.
    pub precision: f64,
    /// Of the examples of this class, the fraction that is found.
    pub recall: f64,
    /// Harmonic mean of the two.
    pub f1: f64,
    /// Examples of this class.
    pub support: u64,
}

impl ClassMetrics {
    /// Of how often the class was guessed, how often it was right, and how often the guess was.
    pub fn of(hits: u64, guessed: u64, support: u64) -> ClassMetrics {
        ClassMetrics {
            precision: ratio(hits, guessed),
            recall: ratio(hits, support),
            f1: ratio(2 * hits, guessed + support),
            support,
        }
    }
}

/// The two numbers an evaluation is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Score {
    /// Fraction of examples that are right.
    pub accuracy: f64,
    /// Unweighted mean of the classes' F1, see [`Confusion::macro_f1`].
    pub macro_f1: f64,
}

impl Confusion {
    /// No examples yet.
    pub fn new(classes: usize) -> Confusion {
        Confusion {
            classes,
            counts: vec![0; classes * classes],
        }
    }

    /// Of equally many true and predicted classes, `[n]` each.
    ///
    /// # Panics
    /// When they are not equally many, or one is not below `classes`.
    pub fn of(classes: usize, truth: &[u32], predicted: &[u32]) -> Confusion {
        assert_eq!(
            truth.len(),
            predicted.len(),
            "a prediction for each example"
        );
        let mut confusion = Confusion::new(classes);
        for (&t, &p) in truth.iter().zip(predicted) {
            confusion.add(t, p);
        }
        confusion
    }

    /// Of always guessing the same class.
    ///
    /// # Panics
    /// When a class is not below `classes`.
    pub fn of_guess(classes: usize, truth: &[u32], guess: u32) -> Confusion {
        Confusion::of(classes, truth, &vec![guess; truth.len()])
    }

    /// Counts one example.
    ///
    /// # Panics
    /// When a class is not below `classes`.
    pub fn add(&mut self, truth: u32, predicted: u32) {
        let (truth, predicted) = (truth as usize, predicted as usize);
        assert!(
            truth < self.classes && predicted < self.classes,
            "class out of range"
        );
        self.counts[truth * self.classes + predicted] += 1;
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// How often `truth` was taken for `predicted`.
    pub fn count(&self, truth: usize, predicted: usize) -> u64 {
        self.counts[truth * self.classes + predicted]
    }

    /// All counts, a row per true class.
    pub fn rows(&self) -> Vec<Vec<u64>> {
        (0..self.classes)
            .map(|t| (0..self.classes).map(|p| self.count(t, p)).collect())
            .collect()
    }

    /// Number of examples.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Fraction of examples that are right; 0 without examples.
    pub fn accuracy(&self) -> f64 {
        ratio(
            (0..self.classes).map(|c| self.count(c, c)).sum(),
            self.total(),
        )
    }

    /// Precision, recall and F1 of each class.
    pub fn per_class(&self) -> Vec<ClassMetrics> {
        (0..self.classes)
            .map(|class| {
                let hits = self.count(class, class);
                let support = (0..self.classes).map(|p| self.count(class, p)).sum();
                let guessed: u64 = (0..self.classes).map(|t| self.count(t, class)).sum();
                ClassMetrics::of(hits, guessed, support)
            })
            .collect()
    }

    /// Unweighted mean of F1 over the classes that occur among the true or the predicted ones; 0 without examples.
    ///
    /// This is scikit-learn's `f1_score(truth, predicted, average="macro")` with its defaults: a class that neither
    /// occurs nor is predicted is left out, one that occurs and is never found counts 0.
    pub fn macro_f1(&self) -> f64 {
        let seen: Vec<f64> = (0..self.classes)
            .zip(self.per_class())
            .filter(|&(class, metrics)| {
                metrics.support > 0 || (0..self.classes).any(|t| self.count(t, class) > 0)
            })
            .map(|(_, metrics)| metrics.f1)
            .collect();
        if seen.is_empty() {
            0.0
        } else {
            seen.iter().sum::<f64>() / seen.len() as f64
        }
    }

    /// Accuracy and macro-F1.
    pub fn score(&self) -> Score {
        Score {
            accuracy: self.accuracy(),
            macro_f1: self.macro_f1(),
        }
    }
}

/// 0 of nothing.
pub(crate) fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Worked by hand from
    /// ```text
    /// truth      0 0 0 0 1 1 2 2 2 2
    /// predicted  0 0 1 2 1 0 2 2 2 1
    /// ```
    /// hits 2, 1, 3; predicted 3, 3, 4; true 4, 2, 4.
    fn example() -> Confusion {
        Confusion::of(
            3,
            &[0, 0, 0, 0, 1, 1, 2, 2, 2, 2],
            &[0, 0, 1, 2, 1, 0, 2, 2, 2, 1],
        )
    }

    #[test]
    fn three_classes_by_hand() {
        let confusion = example();
        assert_eq!(confusion.rows(), [[2, 1, 1], [1, 1, 0], [0, 1, 3]]);
        assert_eq!(confusion.total(), 10);
        assert_eq!(confusion.accuracy(), 0.6);
        let classes = confusion.per_class();
        assert_eq!(
            classes[0],
            ClassMetrics {
                precision: 2.0 / 3.0,
                recall: 0.5,
                f1: 4.0 / 7.0,
                support: 4
            }
        );
        assert_eq!(
            classes[1],
            ClassMetrics {
                precision: 1.0 / 3.0,
                recall: 0.5,
                f1: 0.4,
                support: 2
            }
        );
        assert_eq!(
            classes[2],
            ClassMetrics {
                precision: 0.75,
                recall: 0.75,
                f1: 0.75,
                support: 4
            }
        );
        // (4/7 + 2/5 + 3/4) / 3 = (80 + 56 + 105) / 420, within a rounding or two.
        assert!((confusion.macro_f1() - 241.0 / 420.0).abs() < 1e-15);
    }

    #[test]
    fn macro_f1_leaves_out_only_what_nobody_names() {
        // Class 2 occurs nowhere: the mean is over two classes, both 1.
        assert_eq!(Confusion::of(3, &[0, 1], &[0, 1]).macro_f1(), 1.0);
        // Class 2 is predicted once, wrongly: F1 of 1, 0 and 0.
        assert_eq!(Confusion::of(3, &[0, 1], &[0, 2]).macro_f1(), 1.0 / 3.0);
        // Class 2 occurs once and is not found: F1 2/3, 1 and 0.
        let missed = Confusion::of(3, &[0, 1, 2], &[0, 1, 0]).macro_f1();
        assert!((missed - 5.0 / 9.0).abs() < 1e-15);
    }

    #[test]
    fn without_examples_all_is_zero() {
        assert_eq!(
            Confusion::new(2).score(),
            Score {
                accuracy: 0.0,
                macro_f1: 0.0
            }
        );
    }

    #[test]
    fn a_guess_is_one_prediction_for_all() {
        let guess = Confusion::of_guess(2, &[0, 0, 0, 1], 1);
        assert_eq!(guess.accuracy(), 0.25);
        // Class 0: 0. Class 1: one hit, four guesses, one true: 2/5.
        assert_eq!(guess.macro_f1(), 0.2);
    }
}
