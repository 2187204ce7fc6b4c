//! A number for each text.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Measure, Measured};

/// How a model does where a number is to be predicted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NumbersEvaluation {
    /// Number of examples
    pub examples: u64,
    /// Of the predictions
    pub fit: Fit,
    /// The same for always guessing one number
    pub baseline: Fit,
}

/// How near predicted numbers are to true ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// Mean squared error
    pub mse: f64,
    /// Mean absolute error
    pub mae: f64,
    /// Coefficient of determination: 1 less the squared error over that of the true numbers' mean. None where the true
    /// numbers are all the same
    pub r2: Option<f64>,
    /// Correlation (Pearson's r), None where one side is all the same
    pub pearson: Option<f64>,
    /// Correlation of the ranks (Spearman's rho), equals sharing theirs; None as above
    pub spearman: Option<f64>,
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}

/// Pearson's correlation.
fn correlation(x: &[f64], y: &[f64]) -> Option<f64> {
    let (mx, my) = (mean(x), mean(y));
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (x, y) in x.iter().zip(y) {
        xx += (x - mx) * (x - mx);
        yy += (y - my) * (y - my);
        xy += (x - mx) * (y - my);
    }
    (xx > 0.0 && yy > 0.0).then(|| (xy / (xx.sqrt() * yy.sqrt())).clamp(-1.0, 1.0))
}

/// The place of each number among them, from 0; equals have the mean of theirs.
fn ranks(x: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[a].total_cmp(&x[b]));
    let mut ranks = vec![0.0; x.len()];
    let mut first = 0;
    for equals in order.chunk_by(|&a, &b| x[a] == x[b]) {
        let middle = first as f64 + (equals.len() - 1) as f64 / 2.0;
        equals.iter().for_each(|&i| ranks[i] = middle);
        first += equals.len();
    }
    ranks
}

impl Fit {
    /// Of predicted and true numbers, `[n]` each.
    pub fn new(predicted: &[f64], truth: &[f64]) -> Fit {
        let apart = |f: fn(f64) -> f64| -> Vec<f64> {
            let pairs = predicted.iter().zip(truth);
            pairs.map(|(p, t)| f(p - t)).collect()
        };
        let mse = mean(&apart(|d| d * d));
        let middle = mean(truth);
        let spread: Vec<f64> = truth.iter().map(|t| (t - middle) * (t - middle)).collect();
        let spread = mean(&spread);
        Fit {
            mse,
            mae: mean(&apart(f64::abs)),
            r2: (spread > 0.0).then(|| 1.0 - mse / spread),
            pearson: correlation(predicted, truth),
            spearman: correlation(&ranks(predicted), &ranks(truth)),
        }
    }

    /// Root of the mean squared error, in the unit of the numbers.
    pub fn rmse(&self) -> f64 {
        self.mse.sqrt()
    }
}

impl NumbersEvaluation {
    /// Of given outputs, a number in each row, and true numbers, `[n]` each.
    pub fn new(outputs: &[Vec<f32>], truth: &[f32], guess: f64) -> Self {
        let predicted: Vec<f64> = outputs.iter().map(|row| f64::from(row[0])).collect();
        let truth: Vec<f64> = truth.iter().map(|&x| f64::from(x)).collect();
        NumbersEvaluation {
            examples: truth.len() as u64,
            fit: Fit::new(&predicted, &truth),
            baseline: Fit::new(&vec![guess; truth.len()], &truth),
        }
    }
}

impl Measured for NumbersEvaluation {
    fn loss(&self) -> f64 {
        self.fit.mse
    }

    fn rank(&self) -> [f64; 3] {
        [-self.fit.mse, 0.0, 0.0]
    }

    fn measures(&self) -> Vec<Measure> {
        let none = |x: Option<f64>| x.unwrap_or(f64::NAN);
        let (of, guess) = (&self.fit, &self.baseline);
        vec![
            Measure::new("rmse", "RMSE", of.rmse(), guess.rmse()),
            Measure::new("mae", "MAE", of.mae, guess.mae),
            Measure::new("r2", "R2", none(of.r2), none(guess.r2)),
            // A guess that is always the same goes along with nothing.
            Measure::new("pearson", "Pearson", none(of.pearson), f64::NAN),
            Measure::new("spearman", "Spearman", none(of.spearman), f64::NAN),
        ]
    }

    fn guessing(&self) -> &'static str {
        "mean"
    }

    fn examples(&self) -> u64 {
        self.examples
    }

    fn details(&self) -> Map<String, Value> {
        Map::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values are those of scikit-learn 1.9.1 (`mean_squared_error`, `mean_absolute_error`, `r2_score`) and scipy
    /// 1.17.1 (`pearsonr`, `spearmanr`).
    #[test]
    fn five_numbers_as_scikit_learn_and_scipy_have_them() {
        let truth = [1.0, 2.0, 2.0, 4.0, -1.0];
        let predicted = [0.5, 2.5, 1.0, 3.0, 0.5];
        let fit = Fit::new(&predicted, &truth);
        let near = |found: f64, expected: f64| {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        };
        near(fit.mse, 0.95);
        near(fit.mae, 0.9);
        near(fit.r2.unwrap(), 0.6401515151515151);
        near(fit.pearson.unwrap(), 0.8215419219227855);
        near(fit.spearman.unwrap(), 0.9473684210526317);
        assert_eq!(ranks(&truth), [1.0, 2.5, 2.5, 4.0, 0.0]);
    }

    #[test]
    fn what_is_all_the_same_goes_along_with_nothing() {
        let fit = Fit::new(&[2.0, 2.0], &[1.0, 3.0]);
        assert_eq!((fit.r2, fit.pearson, fit.spearman), (Some(0.0), None, None));
        let fit = Fit::new(&[1.0, 3.0], &[2.0, 2.0]);
        assert_eq!((fit.mse, fit.r2, fit.pearson), (1.0, None, None));
    }

    #[test]
    fn the_nearer_one_is_better() {
        let of = |x: f32| NumbersEvaluation::new(&[vec![x], vec![2.0]], &[1.0, 2.0], 1.5);
        assert!(of(1.1).rank() > of(1.2).rank());
        assert_eq!(of(1.1).baseline.rmse(), 0.5);
    }
}
