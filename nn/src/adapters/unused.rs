//! Settings of a new adapter that nothing of its model answers to. What a file says is not asked this: PEFT lets it pass.

use super::attach::targets;
use super::names::{Matcher, Patterns, ends_in};
use super::{AdapterConfig, Method};
use crate::error::{Error, Result, nearest};
use crate::parameters::Parameters;

/// Refuses numbers of layers that have no target, and patterns and names of feed-forward targets that decide about none.
///
/// # Errors
/// The first of them; as [`attach`](super::attach) for targets that the model does not have.
pub fn refuse_unused(p: &Parameters, config: &AdapterConfig) -> Result<()> {
    let refuse = |what: String| Err(Error::Adapter { what });
    if let Some(layers) = &config.layers {
        let everywhere = AdapterConfig {
            layers: None,
            ..config.clone()
        };
        let matcher = Matcher::new(config)?;
        let mut numbers: Vec<usize> = targets(p, &everywhere)?
            .iter()
            .filter_map(|layer| matcher.number(&layer.module))
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        if let Some(layer) = layers.iter().find(|layer| !numbers.contains(layer)) {
            let there = match (numbers.first(), numbers.last()) {
                (Some(first), Some(last)) => format!("name some of {first} to {last}"),
                _ => "name no layers".to_owned(),
            };
            return refuse(format!(
                "no target of the adapter is in layer {layer}; {there}"
            ));
        }
    }
    let modules: Vec<String> = targets(p, config)?
        .into_iter()
        .map(|layer| layer.module)
        .collect();
    let near = |name: &str| {
        let near = nearest(&format!("*{name}"), modules.iter().map(String::as_str));
        near.map_or_else(String::new, |near| format!("; the nearest is {near}"))
    };
    match &config.method {
        Method::LowRank(c) => {
            let ranks = Patterns::new("rank_pattern", &c.rank_pattern)?.idle(&modules);
            let alphas = Patterns::new("alpha_pattern", &c.alpha_pattern)?.idle(&modules);
            let ranks = ranks.map(|i| ("rank_pattern", &c.rank_pattern[i].0));
            let alphas = alphas.map(|i| ("alpha_pattern", &c.alpha_pattern[i].0));
            match ranks.or(alphas) {
                Some((key, text)) => refuse(format!(
                    "{key}: \"{text}\" decides about no target of the adapter{}",
                    near(text)
                )),
                None => Ok(()),
            }
        }
        Method::Ia3 { feedforward } => {
            let idle = |end: &&String| !modules.iter().any(|module| ends_in(module, end));
            match feedforward.iter().find(idle) {
                Some(end) => refuse(format!(
                    "no target of the adapter ends in {end}, whose inputs are to be scaled{}",
                    near(end)
                )),
                None => Ok(()),
            }
        }
        Method::Bottleneck { .. } | Method::Prompt { .. } | Method::Prefix { .. } => Ok(()),
    }
}
