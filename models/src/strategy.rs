//! Which part of a model is trained, in one word: rules over the names that its parameters have.

use graft_nn::{FreezePolicy, Parameters, Rule};

use crate::error::{Error, Result};

/// Which part of a model is trained. Every strategy trains the head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strategy {
    /// The head alone
    Head,
    /// The last so many layers, and the head
    Last(usize),
    /// Every bias, and the head (BitFit; Ben Zaken et al., 2021)
    Bitfit,
    /// Weights and biases of every norm, and the head
    Norms,
    /// Everything
    Full,
}

/// What rules call the parts of a model's trunk.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// Each layer's parameters
    layers: Vec<String>,
    /// Each norm's
    norms: Vec<String>,
    has_biases: bool,
}

impl Parts {
    /// The parts of a trunk whose parameters are all that are declared in `p`; `layers` are globs.
    pub fn new(p: &Parameters, layers: Vec<String>) -> Parts {
        // A norm is what has a vector for its weight.
        let norms = p.iter().filter(|(_, one)| one.shape().rank() == 1);
        let norms = norms
            .filter_map(|(_, one)| one.name().strip_suffix(".weight"))
            .map(|module| format!("{module}.*"))
            .collect();
        Parts {
            layers,
            norms,
            has_biases: p.iter().any(|(_, one)| one.name().ends_with(".bias")),
        }
    }

    /// The rules of some strategies, added up. The head has the names `head`, and `beside` is trained with any layer.
    ///
    /// # Errors
    /// More layers than the model has; biases where there are none.
    pub fn policy(
        &self,
        strategies: &[Strategy],
        head: &[&str],
        beside: Option<&str>,
    ) -> Result<FreezePolicy> {
        let mut trained: Vec<String> = Vec::new();
        for strategy in strategies {
            match *strategy {
                Strategy::Full => return Ok(FreezePolicy::default()),
                Strategy::Head => {}
                Strategy::Last(last) => {
                    let layers = self.layers.len();
                    let Some(first) = layers.checked_sub(last) else {
                        return Err(Error::Strategy { last, layers });
                    };
                    trained.extend_from_slice(&self.layers[first..]);
                    trained.extend(beside.filter(|_| last > 0).map(str::to_owned));
                }
                Strategy::Bitfit if self.has_biases => trained.push("*.bias".to_owned()),
                Strategy::Bitfit => return Err(Error::NoBiases),
                Strategy::Norms => trained.extend_from_slice(&self.norms),
            }
        }
        trained.extend(head.iter().map(|glob| (*glob).to_owned()));
        let trained = trained.into_iter().map(Rule::train);
        Ok(FreezePolicy {
            rules: [Rule::freeze("*")].into_iter().chain(trained).collect(),
        })
    }
}
