//! The one trainable set, from ordered rules over parameter names.
//!
//! Whatever is trained less than fully is a policy: a list of rules, of which the last one that
//! matches a name decides. The set that a policy yields drives gradients, optimizer state, weight
//! decay, clipping, checkpoints and certificates; nothing else says what moves.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result, nearest};
use crate::parameters::{ParamId, Parameters};

/// `freeze GLOB` or `train GLOB`. In a glob, `*` stands for any characters, dots included, and `?`
/// for one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Matching parameters are trained (or frozen)
    pub train: bool,
    /// The names it is about
    pub glob: String,
}

impl Rule {
    /// `train GLOB`
    pub fn train(glob: impl Into<String>) -> Rule {
        Rule {
            train: true,
            glob: glob.into(),
        }
    }

    /// `freeze GLOB`
    pub fn freeze(glob: impl Into<String>) -> Rule {
        Rule {
            train: false,
            glob: glob.into(),
        }
    }

    /// True if the rule is about this name.
    pub fn matches(&self, name: &str) -> bool {
        matches_glob(&self.glob, name)
    }
}

impl FromStr for Rule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Rule> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            ["train", glob] => Ok(Rule::train(glob)),
            ["freeze", glob] => Ok(Rule::freeze(glob)),
            _ => Err(Error::Rule { rule: text.into() }),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.train { "train" } else { "freeze" };
        write!(f, "{verb} {}", self.glob)
    }
}

/// Whether a glob stands for a name.
pub(crate) fn matches_glob(glob: &str, name: &str) -> bool {
    matches(glob.as_bytes(), name.as_bytes())
}

/// Glob matching in linear space: on a mismatch, the last `*` takes one character more.
fn matches(glob: &[u8], name: &[u8]) -> bool {
    let (mut g, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match glob.get(g) {
            Some(b'*') => {
                star = Some((g, n));
                g += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => {
                g += 1;
                n += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    g = at + 1;
                    n = from + 1;
                }
                None => return false,
            },
        }
    }
    glob[g..].iter().all(|&c| c == b'*')
}

/// Ordered rules. Without any, everything is trained.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FreezePolicy {
    /// The rules; the last that matches a name decides
    pub rules: Vec<Rule>,
}

impl FreezePolicy {
    /// The set of parameters that the rules leave trainable.
    ///
    /// # Errors
    /// A rule that matches no parameter; a set without any.
    pub fn resolve(&self, parameters: &Parameters) -> Result<TrainableSet> {
        let mut trained = vec![true; parameters.len()];
        for rule in &self.rules {
            let mut hits = 0;
            for (id, parameter) in parameters.iter() {
                if rule.matches(parameter.name()) {
                    trained[id.0] = rule.train;
                    hits += 1;
                }
            }
            if hits == 0 {
                let names = parameters.iter().map(|(_, p)| p.name());
                return Err(Error::RuleMatchesNothing {
                    rule: rule.to_string(),
                    nearest: nearest(&rule.glob, names),
                });
            }
        }
        if !trained.contains(&true) {
            return Err(Error::NothingTrainable);
        }
        Ok(TrainableSet { trained })
    }
}

/// Which parameters are trained.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TrainableSet {
    trained: Vec<bool>,
}

impl TrainableSet {
    /// No parameter is trained: evaluation.
    pub fn none(parameters: &Parameters) -> TrainableSet {
        TrainableSet {
            trained: vec![false; parameters.len()],
        }
    }

    /// Those of the set for which `keep` holds.
    pub fn filtered(&self, keep: impl Fn(ParamId) -> bool) -> TrainableSet {
        let both = |(i, trained): (usize, &bool)| *trained && keep(ParamId(i));
        TrainableSet {
            trained: self.trained.iter().enumerate().map(both).collect(),
        }
    }

    /// True if the parameter is trained.
    pub fn contains(&self, id: ParamId) -> bool {
        self.trained[id.0]
    }

    /// The trained parameters, in order.
    pub fn ids(&self) -> impl Iterator<Item = ParamId> + '_ {
        self.trained
            .iter()
            .enumerate()
            .filter(|(_, trained)| **trained)
            .map(|(i, _)| ParamId(i))
    }

    /// Number of trained tensors.
    pub fn len(&self) -> usize {
        self.ids().count()
    }

    /// True if nothing is trained.
    pub fn is_empty(&self) -> bool {
        !self.trained.contains(&true)
    }

    /// Number of elements that are trained.
    pub fn count(&self, parameters: &Parameters) -> usize {
        self.ids()
            .map(|id| parameters.get(id).shape().count())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use graft_tensor::{DType, Memory};
    use proptest::prelude::*;

    use super::*;
    use crate::parameters::Init;

    fn parameters() -> Parameters {
        let mut p = Parameters::new(&Memory::cpu(), DType::F32);
        for name in [
            "encoder.layer.1.weight",
            "encoder.layer.10.weight",
            "classifier.bias",
        ] {
            p.declare(name, &[2, 3], Init::Zeros).unwrap();
        }
        p
    }

    fn resolve(rules: &[&str]) -> Result<Vec<usize>> {
        let rules = rules.iter().map(|r| r.parse().unwrap()).collect();
        let set = FreezePolicy { rules }.resolve(&parameters())?;
        Ok(set.ids().map(ParamId::key).collect())
    }

    #[test]
    fn the_last_matching_rule_decides() {
        assert_eq!(resolve(&[]).unwrap(), [0, 1, 2]);
        assert_eq!(resolve(&["freeze *", "train classifier.*"]).unwrap(), [2]);
        let rules = ["freeze *", "train *.weight", "freeze encoder.layer.1.*"];
        assert_eq!(resolve(&rules).unwrap(), [1], "layer.1 is not layer.10");
    }

    #[test]
    fn useless_rules_and_empty_sets_are_errors() {
        let error = resolve(&["freeze *", "train clasifier.bias"]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("nearest name is classifier.bias"),
            "{error}"
        );
        assert_eq!(resolve(&["freeze *"]).unwrap_err(), Error::NothingTrainable);
        assert!("thaw *".parse::<Rule>().is_err());
    }

    /// The definition of a glob, by recursion.
    fn oracle(glob: &[u8], name: &[u8]) -> bool {
        match (glob.split_first(), name.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), _) => {
                oracle(rest, name) || name.split_first().is_some_and(|(_, n)| oracle(glob, n))
            }
            (Some((b'?', g)), Some((_, n))) => oracle(g, n),
            (Some((a, g)), Some((b, n))) => a == b && oracle(g, n),
            _ => false,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn globs_match_by_their_definition(glob in "[ab*?.]{0,8}", name in "[ab.]{0,10}") {
            prop_assert_eq!(
                Rule::train(glob.as_str()).matches(&name),
                oracle(glob.as_bytes(), name.as_bytes())
            );
        }
    }
}
