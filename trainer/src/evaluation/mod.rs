//! How good a classifier is on examples whose labels are known, beside one guess for all of them.

mod classes;
mod numbers;
mod sets;
mod words;

pub use classes::{ClassesEvaluation, best_label, probabilities};
pub use numbers::{Fit, NumbersEvaluation};
pub use sets::{SetScore, SetsEvaluation, likelihood, likely_labels};
pub use words::{WordScore, WordsEvaluation, labels_of_words};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::record::Record;
use crate::report::Table;
use crate::targets::{Guess, Targets};
use crate::task::Quality;

/// How a model does on labelled examples.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "of", rename_all = "lowercase")]
pub enum Evaluation {
    /// One label each
    Classes(ClassesEvaluation),
    /// Any number of labels each
    Sets(SetsEvaluation),
    /// A number each
    Numbers(NumbersEvaluation),
    /// A label for each word
    Words(WordsEvaluation),
}

/// What each kind of evaluation says of itself.
trait Measured {
    /// Mean loss over the examples.
    fn loss(&self) -> f64;

    /// What decides which of two is better, the first number first; more is better.
    fn rank(&self) -> [f64; 3];

    /// Name, as in JSON, what it is called, and value, of the model and of a guess.
    fn measures(&self) -> Vec<Measure>;

    /// How the guess is made, in words.
    fn guessing(&self) -> &'static str;

    /// Number of examples.
    fn examples(&self) -> u64;

    /// What JSON says beside: precision, recall and F1 of labels.
    fn details(&self) -> Map<String, Value>;

    /// A row for each label.
    fn by_label(&self, _labels: &[String]) -> Option<Table> {
        None
    }
}

/// One number of an evaluation.
struct Measure {
    key: &'static str,
    name: &'static str,
    value: f64,
    guess: f64,
}

impl Measure {
    fn new(key: &'static str, name: &'static str, value: f64, guess: f64) -> Measure {
        Measure {
            key,
            name,
            value,
            guess,
        }
    }
}

impl Evaluation {
    /// Of given outputs and what is right, `[n]` each (for words the outputs of all tokens), beside a guess from the examples
    /// that were trained on.
    ///
    /// # Panics
    /// When a guess is of another kind.
    pub fn new(outputs: &[Vec<f32>], truth: &Targets, guess: &Guess) -> Evaluation {
        match (truth, guess) {
            (Targets::Classes { classes, right }, Guess::Class(guess)) => {
                Evaluation::Classes(ClassesEvaluation::new(outputs, *classes, right, *guess))
            }
            (Targets::Sets { labels, right }, Guess::Set(guess)) => {
                Evaluation::Sets(SetsEvaluation::new(outputs, *labels, right, guess))
            }
            (Targets::Numbers(right), Guess::Number(guess)) => {
                Evaluation::Numbers(NumbersEvaluation::new(outputs, right, *guess))
            }
            (Targets::Words { tags, right }, Guess::Class(guess)) => {
                Evaluation::Words(WordsEvaluation::new(outputs, tags, right, *guess))
            }
            (truth, guess) => panic!("{guess:?} is no guess for {truth:?}"),
        }
    }

    fn measured(&self) -> &dyn Measured {
        match self {
            Evaluation::Classes(of) => of,
            Evaluation::Sets(of) => of,
            Evaluation::Numbers(of) => of,
            Evaluation::Words(of) => of,
        }
    }

    /// As JSON: loss, measures, the same of the guess as `baseline`, and what there is for each label.
    pub fn json(&self) -> Map<String, Value> {
        let of = self.measured();
        let measures = of.measures();
        let numbers = |value: fn(&Measure) -> f64| -> Value {
            let pair = |m: &Measure| (m.key.to_owned(), Value::from(value(m)));
            measures.iter().map(pair).collect::<Map<_, _>>().into()
        };
        let mut all = Map::new();
        all.insert("examples".into(), of.examples().into());
        all.insert("loss".into(), of.loss().into());
        if let Value::Object(values) = numbers(|m| m.value) {
            all.extend(values);
        }
        all.insert("baseline".into(), numbers(|m| m.guess));
        all.extend(of.details());
        all
    }

    /// As tables: the measures, and a row for each label.
    pub fn tables(&self, labels: &[String]) -> String {
        let of = self.measured();
        let mut table = Table::new();
        table.row("examples", of.examples());
        table.row("loss", format!("{:.4}", of.loss()));
        for (name, value) in self.measures() {
            table.row(name, value);
        }
        match of.by_label(labels) {
            Some(labels) => format!("{table}\n{labels}"),
            None => table.to_string(),
        }
    }
}

/// A number for people; not every one is defined.
fn shown(value: f64) -> String {
    match value.is_finite() {
        true => format!("{value:.4}"),
        false => "-".to_owned(),
    }
}

impl Quality for Evaluation {
    /// By what its kind ranks by.
    fn beats(&self, other: &Evaluation) -> bool {
        let (one, other) = (self.measured().rank(), other.measured().rank());
        one.partial_cmp(&other) == Some(std::cmp::Ordering::Greater)
    }

    fn line(&self) -> String {
        let of = self.measured();
        let mut line = format!("loss {:.4}", of.loss());
        for m in of.measures() {
            line.push_str(&format!(", {} {}", m.name, shown(m.value)));
        }
        line
    }

    fn record(&self, epoch: usize, step: u64, best: bool) -> Record {
        Record::Eval {
            epoch,
            step,
            quality: self.json(),
            best,
        }
    }

    fn measures(&self) -> Vec<(&'static str, String)> {
        let of = self.measured();
        let guessing = of.guessing();
        let line = |m: Measure| {
            let value = shown(m.value);
            let text = match m.guess.is_finite() {
                true => format!("{value} ({guessing}: {:.4})", m.guess),
                false => value,
            };
            (m.name, text)
        };
        of.measures().into_iter().map(line).collect()
    }
}
