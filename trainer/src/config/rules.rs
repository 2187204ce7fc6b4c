//! Ordered rules over parameter names: what is trained, and how fast.

use std::fmt;
use std::str::FromStr;

use graft_nn::{RateRule, Rule as FreezeRule};

/// One rule: `freeze PATTERN`, `train PATTERN`, `lr PATTERN 1e-4`, `lr PATTERN x0.5` or `decay PATTERN 0.1`. In a pattern,
/// each `*` stands for any run of characters, dots included, and `?` for one.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// Whether matching parameters are trained.
    Freeze(FreezeRule),
    /// How fast matching parameters move.
    Rate(RateRule),
}

impl Rule {
    /// Those of a list that say what is trained.
    pub fn freezing(rules: &[Rule]) -> Vec<FreezeRule> {
        let freezing = rules.iter().filter_map(|rule| match rule {
            Rule::Freeze(rule) => Some(rule.clone()),
            Rule::Rate(_) => None,
        });
        freezing.collect()
    }

    /// Those that say how fast.
    pub fn rating(rules: &[Rule]) -> Vec<RateRule> {
        let rating = rules.iter().filter_map(|rule| match rule {
            Rule::Freeze(_) => None,
            Rule::Rate(rule) => Some(rule.clone()),
        });
        rating.collect()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rule::Freeze(rule) => rule.fmt(f),
            Rule::Rate(rule) => rule.fmt(f),
        }
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words.first() {
            Some(&("train" | "freeze")) => match words.len() {
                1 => Err(format!("`{text}` names no parameters")),
                2 => text
                    .parse()
                    .map(Rule::Freeze)
                    .map_err(|e: graft_nn::Error| e.to_string()),
                _ => Err(format!("`{text}` has more than one pattern")),
            },
            Some(&("lr" | "decay")) => text
                .parse()
                .map(Rule::Rate)
                .map_err(|e: graft_nn::Error| e.to_string()),
            _ => Err(format!(
                "`{text}` begins with neither `freeze`, `train`, `lr` nor `decay`"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_a_verb_and_one_pattern() {
        let rule: Rule = " train  encoder.layer.5.* ".parse().unwrap();
        assert_eq!(rule, Rule::Freeze(FreezeRule::train("encoder.layer.5.*")));
        for text in [
            "freeze *",
            "lr classifier.* 1e-3",
            "lr *.bias x2",
            "decay * 0",
        ] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "freeze",
            "thaw *",
            "train a b",
            "lr *",
            "lr * 0",
            "decay * x1",
        ] {
            assert!(bad.parse::<Rule>().is_err(), "{bad}");
        }
        let rules = ["lr a 1", "train a", "decay a 0"].map(|text| text.parse().unwrap());
        assert_eq!(Rule::freezing(&rules).len(), 1);
        assert_eq!(Rule::rating(&rules).len(), 2);
    }
}
