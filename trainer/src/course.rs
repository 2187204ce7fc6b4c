//! What a run trains in each epoch, and how fast: the strategy over one model, resolved.

use graft_nn::adapters::{self, DEFAULT};
use graft_nn::{FreezePolicy, ParamId, Parameters, RateRule, Rated, Rates, TrainableSet};

use crate::config::{Gradual, Rule, RunConfig, Strategy, StrategyConfig};
use crate::error::{Error, Result};
use crate::network::Network;

/// The policy of a strategy, refined by ordered rules. If it has an adapter, that stands beside the layers already.
///
/// # Errors
/// A strategy that asks for more layers than there are, or for biases of a model without any.
pub fn policy<N: Network>(
    network: &N,
    strategy: &Strategy,
    rules: &[Rule],
    parameters: &Parameters,
) -> Result<FreezePolicy> {
    let mut policy = match strategy.adapter {
        None => network.policy(&strategy.parts)?,
        Some(_) => FreezePolicy {
            rules: adapters::rules(parameters, DEFAULT),
        },
    };
    if strategy.adapter.is_some() && !strategy.parts.is_empty() {
        let beside = network.policy(&strategy.parts)?.rules.into_iter();
        policy.rules.extend(beside.filter(|rule| rule.train));
    }
    policy.rules.extend(Rule::freezing(rules));
    Ok(policy)
}

/// Refuses to train what is held in a short type or as codes.
fn frozen_where_held(parameters: &Parameters, set: &TrainableSet) -> Result<()> {
    for id in set.ids() {
        let parameter = parameters.get(id);
        if let Some(dtype) = parameter.held() {
            return Err(Error::config(
                "strategy.name",
                format!(
                    "`{}` would be trained, and `model.base` holds it in {dtype}",
                    parameter.name()
                ),
                "leave it frozen, or hold the base in f32: model.base = \"f32\"",
            ));
        }
    }
    Ok(())
}

/// How far a parameter is from the head, in layers: 0 for the head itself, one more than there are layers for the
/// embeddings.
fn depth<N: Network>(network: &N, parameters: &Parameters, id: ParamId) -> usize {
    let layers = network.layers();
    network
        .layer_of(parameters.adapters().anchor(id))
        .map_or(layers + 1, |layer| layers - layer)
}

/// How fast each parameter moves in a run whose peak learning rate is `lr`: the strategy's factor for its depth, `plus`
/// for the second matrices of adapters, then the rules in their order.
///
/// # Errors
/// A rule that matches no parameter, or none of `set`.
pub fn rates<N: Network>(
    network: &N,
    config: &StrategyConfig,
    (lr, plus): (f64, Option<f64>),
    parameters: &Parameters,
    set: &TrainableSet,
) -> Result<Rates> {
    let mut rates = match config.name.llrd {
        Some(factor) => Rates::scaled(parameters, |id| {
            factor.powi(depth(network, parameters, id) as i32)
        }),
        None => Rates::default(),
    };
    let mut rules = Rule::rating(&config.rules);
    if let Some(factor) = plus {
        // S. Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024.
        let second = RateRule {
            glob: "*.lora_*B.*".into(),
            rated: Rated::LrTimes(factor),
        };
        rules.insert(0, second);
    }
    rates.apply(&rules, lr, parameters, set)?;
    Ok(rates)
}

/// What is trained in each epoch.
#[derive(Debug)]
pub struct Course {
    /// The set of each epoch, which contains that of the epoch before
    sets: Vec<TrainableSet>,
    /// How fast
    pub rates: Rates,
}

impl Course {
    /// Resolves the strategy of a run of so many `epochs` over a model.
    ///
    /// # Errors
    /// As [`policy`] and [`rates`]; a set with nothing in it; nothing to thaw where the strategy is gradual.
    pub fn new<N: Network>(
        config: &RunConfig,
        network: &N,
        parameters: &Parameters,
    ) -> Result<Course> {
        let strategy = &config.strategy;
        let policy = policy(network, &strategy.name, &strategy.rules, parameters)?;
        let all = policy.resolve(parameters)?;
        frozen_where_held(parameters, &all)?;
        let plus = config.adapter.as_ref().and_then(|adapter| adapter.plus);
        let lr = (config.optimizer.lr, plus);
        let rates = rates(network, strategy, lr, parameters, &all)?;
        let epochs = config.train.epochs;
        let sets = match strategy.name.gradual {
            None => vec![all; epochs],
            Some(pace) => thaw(network, parameters, &all, pace, epochs)?,
        };
        Ok(Course { sets, rates })
    }

    /// What is trained in an epoch, from 0.
    pub fn set(&self, epoch: usize) -> &TrainableSet {
        &self.sets[epoch.min(self.sets.len() - 1)]
    }

    /// All that is trained in some epoch.
    pub fn all(&self) -> &TrainableSet {
        self.set(usize::MAX)
    }

    /// Whether an epoch is the first that trains what it does.
    pub fn begins(&self, epoch: usize) -> bool {
        epoch == 0 || self.set(epoch - 1) != self.set(epoch)
    }

    /// The number of epochs from this one on that train what it does.
    pub fn stretch(&self, epoch: usize) -> usize {
        let set = self.set(epoch);
        let from = self.sets.iter().skip(epoch);
        from.take_while(|other| *other == set).count()
    }
}

/// The sets of a gradual strategy: `all` as deep as each epoch has thawed. Depths at which nothing is trained do not count.
fn thaw<N: Network>(
    network: &N,
    parameters: &Parameters,
    all: &TrainableSet,
    pace: Gradual,
    epochs: usize,
) -> Result<Vec<TrainableSet>> {
    let mut depths: Vec<usize> = all.ids().map(|id| depth(network, parameters, id)).collect();
    depths.sort_unstable();
    depths.dedup();
    let last = depths.len() - 1;
    if last == 0 {
        return Err(Error::config(
            "strategy.name",
            "gradual thaws one layer after the other, and all that is trained lies in one",
            "leave out gradual, or train more layers",
        ));
    }
    let thawed = |epoch: usize| match pace {
        Gradual::Even => epoch * last / (epochs - 1).max(1),
        Gradual::Layers(layers) => epoch.saturating_mul(layers).min(last),
    };
    Ok((0..epochs)
        .map(|epoch| {
            let deepest = depths[thawed(epoch)];
            all.filtered(|id| depth(network, parameters, id) <= deepest)
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use graft_models::Strategy as Part;
    use graft_nn::{Init, Parameters};
    use graft_tensor::{DType, Memory};

    use super::*;
    use crate::network::testing::Stack;

    /// The deepest parameter that each epoch trains.
    fn deepest(all: &[&str], pace: Gradual, epochs: usize) -> Vec<usize> {
        let mut p = Parameters::new(&Memory::planned(), DType::F32);
        for i in 0..6 {
            p.declare(&format!("p{i}"), &[1], Init::Zeros).unwrap();
        }
        let rules = all.iter().map(|rule| rule.parse().unwrap()).collect();
        let all = FreezePolicy { rules }.resolve(&p).unwrap();
        let sets = thaw(&Stack { layers: 4 }, &p, &all, pace, epochs).unwrap();
        for pair in sets.windows(2) {
            assert!(pair[0].ids().all(|id| pair[1].contains(id)));
        }
        let first = |set: &TrainableSet| set.ids().next().unwrap().key();
        sets.iter().map(first).collect()
    }

    #[test]
    fn layers_thaw_from_the_top() {
        // p0 is the embedding, p1 to p4 are layers, p5 is the head.
        assert_eq!(deepest(&[], Gradual::Even, 6), [5, 4, 3, 2, 1, 0]);
        assert_eq!(deepest(&[], Gradual::Even, 3), [5, 3, 0]);
        assert_eq!(deepest(&[], Gradual::Even, 2), [5, 0]);
        assert_eq!(deepest(&[], Gradual::Layers(2), 5), [5, 3, 1, 0, 0]);
        assert_eq!(deepest(&[], Gradual::Layers(1), 3), [5, 4, 3]);
        // What is frozen for good takes no epoch.
        let rules = ["freeze p1", "freeze p3", "freeze p5"];
        assert_eq!(deepest(&rules, Gradual::Layers(1), 3), [4, 2, 0]);
    }

    #[test]
    fn rates_fall_with_the_depth() {
        let network = Stack { layers: 4 };
        let mut p = Parameters::new(&Memory::planned(), DType::F32);
        for i in 0..6 {
            p.declare(&format!("p{i}"), &[1], Init::Zeros).unwrap();
        }
        let all = network.policy(&[Part::Full]).unwrap().resolve(&p).unwrap();
        let config = StrategyConfig {
            name: "llrd:0.5".parse().unwrap(),
            rules: vec!["lr p4 x3".parse().unwrap()],
            dropout: None,
        };
        let rates = rates(&network, &config, (1e-3, None), &p, &all).unwrap();
        let found: Vec<f64> = p.iter().map(|(id, _)| rates.get(id).lr).collect();
        let half = |n| 0.5f64.powi(n);
        assert_eq!(
            found,
            [half(5), half(4), half(3), half(2), 3.0 * half(1), 1.0]
        );
    }
}
