//! What can go wrong with layers, parameters and optimizers.

use graft_autograd::Error as AutogradError;
use graft_tensor::{DType, Error as TensorError};

/// A refused declaration, policy, step or layer.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum Error {
    /// From a recording or backward pass.
    #[error(transparent)]
    Autograd(#[from] AutogradError),
    /// From a tensor operation.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// Two parameters of one name.
    #[error("the parameter {name} is declared twice; every name must be unique")]
    Duplicate {
        /// The name
        name: String,
    },
    /// A name that no parameter has.
    #[error("no parameter is called {name}{}", suggestion(nearest))]
    Unknown {
        /// The name
        name: String,
        /// The parameter with the most similar name
        nearest: Option<String>,
    },
    /// A value of the wrong shape for its parameter.
    #[error("the parameter {name} has shape {expected}; found a tensor of shape {found}")]
    ParameterShape {
        /// The parameter
        name: String,
        /// The declared shape
        expected: String,
        /// The shape that was given
        found: String,
    },
    /// A parameter that was declared but neither loaded nor initialised.
    #[error("the parameter {name} has no value yet: load a checkpoint or initialise it first")]
    NoValue {
        /// The parameter
        name: String,
    },
    /// A rule that is not `freeze GLOB` or `train GLOB`.
    #[error("the rule \"{rule}\" is not understood; write \"freeze GLOB\" or \"train GLOB\"")]
    Rule {
        /// The rule as written
        rule: String,
    },
    /// A rule about rates that is not understood.
    #[error(
        "the rule \"{rule}\" is not understood; write \"lr GLOB 1e-4\", \"lr GLOB x0.5\" or \"decay GLOB \
         0.1\""
    )]
    RateRule {
        /// The rule as written
        rule: String,
    },
    /// A rule about the rates of parameters that do not move.
    #[error(
        "the rule \"{rule}\" is about frozen parameters only, such as {name}; remove it, or train \
         them with \"train GLOB\""
    )]
    RateOfFrozen {
        /// The rule as written
        rule: String,
        /// One of the parameters
        name: String,
    },
    /// A rule that matches no parameter.
    #[error(
        "the rule \"{rule}\" matches no parameter{}; `trainer inspect` lists their names",
        suggestion(nearest)
    )]
    RuleMatchesNothing {
        /// The rule as written
        rule: String,
        /// The parameter with the most similar name
        nearest: Option<String>,
    },
    /// An adapter that cannot stand beside the model.
    #[error("{what}")]
    Adapter {
        /// What was found, what was expected, and one thing to do
        what: String,
    },
    /// A value that cannot be held as it is to be.
    #[error("{name} cannot be held in {dtype}: {source}")]
    Held {
        /// The parameter
        name: String,
        /// What it was to be held in
        dtype: DType,
        /// Why not
        source: Box<TensorError>,
    },
    /// A policy that leaves nothing to train.
    #[error("every parameter is frozen, so there is nothing to train; add a \"train GLOB\" rule")]
    NothingTrainable,
    /// A gradient that is infinite or NaN.
    #[error(
        "the gradient of {name} is not finite at step {step}; lower the learning rate, or look at \
         the data of this step"
    )]
    NonFiniteGradient {
        /// The first such parameter
        name: String,
        /// The optimizer step, from 1
        step: u64,
    },
    /// State that the optimizer's rule does not keep for a parameter.
    #[error("the optimizer's state of {name} is {found}; expected {expected}")]
    State {
        /// The parameter
        name: String,
        /// The state that was given
        found: String,
        /// What the rule keeps
        expected: String,
    },
    /// A setting outside its range.
    #[error("{name} is {value}; it must be {expected}")]
    Setting {
        /// The setting
        name: &'static str,
        /// Its value
        value: String,
        /// What is allowed
        expected: &'static str,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

fn suggestion(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map_or_else(String::new, |name| format!("; the nearest name is {name}"))
}

/// The candidate with the smallest edit distance (Levenshtein) to `name`, in which `*` and `?` stand
/// for any characters and for any one.
pub fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    candidates
        .map(|candidate| (distance(name, candidate), candidate))
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate.to_owned())
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for x in a.chars() {
        if x == '*' {
            // Whatever it takes in costs nothing.
            for j in 0..b.len() {
                row[j + 1] = row[j + 1].min(row[j]);
            }
            continue;
        }
        let mut diagonal = row[0];
        row[0] += 1;
        for (j, &y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != y && x != '?');
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_is_by_edit_distance() {
        let names = ["classifier.weight", "pooler.dense.weight"];
        let found = nearest("clasifier.weigth", names.into_iter());
        assert_eq!(found.as_deref(), Some("classifier.weight"));
        assert_eq!(nearest("x", std::iter::empty()), None);
        let layers = [
            "pooler.bias",
            "layer.1.query.weight",
            "layer.10.query.weight",
        ];
        let found = |glob| nearest(glob, layers.into_iter()).unwrap();
        assert_eq!(found("layer.12.*"), "layer.1.query.weight");
        assert_eq!(found("lyer.1?.*.weight"), "layer.10.query.weight");
    }
}
