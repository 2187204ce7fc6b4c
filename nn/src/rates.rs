//! How fast each parameter moves: factors of the learning rate and weight decay, by depth and by ordered rules over
//! names. Like what is trained, it is data that a policy yields, and no code path.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result, nearest};
use crate::parameters::{ParamId, Parameters};
use crate::trainable::{TrainableSet, matches_glob};

/// What a [`RateRule`] sets.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Rated {
    /// The peak learning rate, whatever the run's is
    Lr(f64),
    /// A factor of the learning rate that the rules before it leave
    LrTimes(f64),
    /// The weight decay, also of what has one dimension
    Decay(f64),
}

/// `lr GLOB 1e-4`, `lr GLOB x0.5` or `decay GLOB 0.1`, over globs as [`crate::Rule`] has them.
#[derive(Clone, PartialEq, Debug)]
pub struct RateRule {
    /// The names it is about
    pub glob: String,
    /// What it sets
    pub rated: Rated,
}

impl FromStr for RateRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<RateRule> {
        let refuse = || Error::RateRule { rule: text.into() };
        let words: Vec<&str> = text.split_whitespace().collect();
        let &[verb, glob, value] = &words[..] else {
            return Err(refuse());
        };
        let number = |text: &str| text.parse().ok().filter(|x: &f64| x.is_finite());
        let rated = match (verb, value.strip_prefix('x')) {
            ("lr", Some(factor)) => number(factor).filter(|x| *x > 0.0).map(Rated::LrTimes),
            ("lr", None) => number(value).filter(|x| *x > 0.0).map(Rated::Lr),
            ("decay", _) => number(value).filter(|x| *x >= 0.0).map(Rated::Decay),
            _ => None,
        };
        Ok(RateRule {
            glob: glob.to_owned(),
            rated: rated.ok_or_else(refuse)?,
        })
    }
}

impl fmt::Display for RateRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let glob = &self.glob;
        match self.rated {
            Rated::Lr(rate) => write!(f, "lr {glob} {rate:e}"),
            Rated::LrTimes(factor) => write!(f, "lr {glob} x{factor}"),
            Rated::Decay(decay) => write!(f, "decay {glob} {decay}"),
        }
    }
}

/// How one parameter moves.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rate {
    /// Factor of the step's learning rate
    pub lr: f64,
    /// Weight decay in place of the optimizer's
    pub decay: Option<f64>,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate {
            lr: 1.0,
            decay: None,
        }
    }
}

/// How every parameter moves; by default, all alike.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Rates {
    by_number: Vec<Rate>,
}

impl Rates {
    /// All alike but for a factor of the learning rate.
    pub fn scaled(parameters: &Parameters, factor: impl Fn(ParamId) -> f64) -> Rates {
        let rate = |id| Rate {
            lr: factor(id),
            decay: None,
        };
        Rates {
            by_number: parameters.iter().map(|(id, _)| rate(id)).collect(),
        }
    }

    /// How a parameter moves.
    pub fn get(&self, id: ParamId) -> Rate {
        self.by_number.get(id.0).copied().unwrap_or_default()
    }

    /// Applies rules in their order, in a run whose peak learning rate is `lr`.
    ///
    /// # Errors
    /// A rule that matches no parameter, or none that is trained.
    pub fn apply(
        &mut self,
        rules: &[RateRule],
        lr: f64,
        parameters: &Parameters,
        set: &TrainableSet,
    ) -> Result<()> {
        self.by_number.resize_with(parameters.len(), Rate::default);
        for rule in rules {
            let (mut trained, mut frozen) = (0, None);
            for (id, parameter) in parameters.iter() {
                let name = parameter.name();
                if !matches_glob(&rule.glob, name) {
                    continue;
                }
                match set.contains(id) {
                    true => trained += 1,
                    false => frozen = frozen.or(Some(name)),
                }
                let rate = &mut self.by_number[id.0];
                match rule.rated {
                    Rated::Lr(peak) => rate.lr = peak / lr,
                    Rated::LrTimes(factor) => rate.lr *= factor,
                    Rated::Decay(decay) => rate.decay = Some(decay),
                }
            }
            let rule = || rule.to_string();
            match (trained, frozen) {
                (0, None) => {
                    let glob = &rule().split_whitespace().nth(1).unwrap_or("").to_owned();
                    return Err(Error::RuleMatchesNothing {
                        rule: rule(),
                        nearest: nearest(glob, parameters.iter().map(|(_, p)| p.name())),
                    });
                }
                (0, Some(name)) => {
                    return Err(Error::RateOfFrozen {
                        rule: rule(),
                        name: name.to_owned(),
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use graft_tensor::{DType, Memory};

    use super::*;
    use crate::parameters::Init;
    use crate::trainable::FreezePolicy;

    fn parameters() -> Parameters {
        let mut p = Parameters::new(&Memory::cpu(), DType::F32);
        for name in ["table.weight", "layer.weight", "layer.bias", "head.weight"] {
            p.declare(name, &[2], Init::Zeros).unwrap();
        }
        p
    }

    fn apply(rules: &[&str], frozen: &[&str]) -> Result<Vec<Rate>> {
        let p = parameters();
        let rules: Vec<RateRule> = rules.iter().map(|r| r.parse().unwrap()).collect();
        let frozen = frozen.iter().map(|r| r.parse().unwrap()).collect();
        let set = FreezePolicy { rules: frozen }.resolve(&p).unwrap();
        let mut rates = Rates::scaled(&p, |id| [0.25, 0.5, 0.5, 1.0][id.key()]);
        rates.apply(&rules, 1e-3, &p, &set)?;
        Ok(p.iter().map(|(id, _)| rates.get(id)).collect())
    }

    #[test]
    fn rules_apply_in_their_order_over_the_depth() {
        let rules = ["lr layer.* x0.1", "lr *.bias 2e-3", "lr *.bias x0.5"];
        let lrs = |rates: Vec<Rate>| rates.iter().map(|r| r.lr).collect::<Vec<f64>>();
        assert_eq!(lrs(apply(&rules, &[]).unwrap()), [0.25, 0.05, 1.0, 1.0]);
        assert_eq!(lrs(apply(&[], &[]).unwrap()), [0.25, 0.5, 0.5, 1.0]);
        let rates = apply(&["decay * 0.1", "decay *.bias 0"], &[]).unwrap();
        let decays: Vec<_> = rates.iter().map(|r| r.decay).collect();
        assert_eq!(decays, [Some(0.1), Some(0.1), Some(0.0), Some(0.1)]);
        // Without any, all alike.
        let id = parameters().find("head.weight").unwrap();
        assert_eq!(Rates::default().get(id), Rate::default());
    }

    #[test]
    fn rules_without_effect_are_mistakes() {
        let error = apply(&["lr layr.bias x2"], &[]).unwrap_err().to_string();
        assert!(error.contains("\"lr layr.bias x2\" matches no"), "{error}");
        assert!(error.contains("nearest name is layer.bias"), "{error}");
        let error = apply(&["decay table.* 0.5"], &["freeze table.*"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the rule \"decay table.* 0.5\" is about frozen parameters only, such as table.weight; \
             remove it, or train them with \"train GLOB\""
        );
        // Half of what it matches is trained.
        apply(&["lr layer.* x2"], &["freeze *.bias"]).unwrap();
    }

    #[test]
    fn rules_print_as_they_parse() {
        for text in ["lr a.* 1e-4", "lr *.bias x0.5", "decay * 0", "decay b 0.01"] {
            assert_eq!(text.parse::<RateRule>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "lr",
            "lr *",
            "lr * fast",
            "lr * 0",
            "lr * x0",
            "lr * -1",
            "lr * inf",
            "lr * x",
            "decay * -1",
            "decay * x2",
            "decay *",
            "lr a b 1",
            "rate * 1",
        ] {
            let error = text.parse::<RateRule>().unwrap_err().to_string();
            assert!(error.contains("lr GLOB x0.5"), "{text}: {error}");
        }
    }
}
