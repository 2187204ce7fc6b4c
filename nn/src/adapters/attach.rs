//! Declares the parameters of an adapter beside the layers that its configuration means.

use std::collections::BTreeMap;

use super::config::{AdapterConfig, Bias, Method, Targets};
use super::declare::Declare;
use super::names::{Matcher, Patterns, ends_in};
use super::{Adapter, AdapterSet};
use crate::error::{Error, Result, nearest};
use crate::parameters::{ParamId, Parameters, Role};
use crate::trainable::{Rule, TrainableSet};

/// What becomes of the base's parameters that an adapter keeps as a whole.
pub enum Modules<'a> {
    /// They are trained where they are
    InPlace,
    /// The adapter has parameters of its own in their place, of the shape that is given for a name; without one, there
    /// is none
    Copies(&'a dyn Fn(&str) -> Option<Vec<usize>>),
}

/// A layer that may have an adapter.
pub(super) struct Layer {
    pub weight: ParamId,
    pub module: String,
    pub role: Role,
    /// As the weight is stored
    shape: [usize; 2],
}

impl Layer {
    /// Inputs and outputs; rows and width of an embedding.
    pub fn sizes(&self) -> [usize; 2] {
        use graft_tensor::ops::WeightLayout;
        match self.role {
            Role::Linear(WeightLayout::OutIn) => [self.shape[1], self.shape[0]],
            _ => self.shape,
        }
    }
}

/// Declares an adapter of the name `name` and takes it into use. Its parameters have no values yet:
/// [`Parameters::initialise`] and then [`finish`](super::finish) give them the ones to begin with.
///
/// # Errors
/// A name that is taken; targets that are no layers, or none at all; settings out of range.
pub fn attach(
    p: &mut Parameters,
    name: &str,
    config: &AdapterConfig,
    modules: Modules,
) -> Result<()> {
    if name.is_empty() || name.contains(['.', '*', '?']) {
        let what = format!("an adapter cannot be called \"{name}\"; use letters and digits");
        return Err(Error::Adapter { what });
    }
    if p.adapters().sets().any(|set| set.name() == name) {
        let what = format!("two adapters are called {name}; give each a name of its own");
        return Err(Error::Adapter { what });
    }
    let layers = targets(p, config)?;
    let mut set = AdapterSet {
        name: name.to_owned(),
        config: config.clone(),
        layers: BTreeMap::new(),
        copies: BTreeMap::new(),
        residuals: BTreeMap::new(),
    };
    let mut declare = Declare {
        p,
        name,
        anchors: Vec::new(),
    };
    match &config.method {
        Method::LowRank(c) => {
            let ranks = Patterns::new("rank_pattern", &c.rank_pattern)?;
            let alphas = Patterns::new("alpha_pattern", &c.alpha_pattern)?;
            for layer in &layers {
                let rank = ranks.of(&layer.module).unwrap_or(c.rank);
                let alpha = alphas.of(&layer.module).unwrap_or(c.alpha);
                let adapter = declare.low_rank(layer, c, rank, alpha)?;
                set.layers.insert(layer.weight, adapter);
            }
        }
        Method::Ia3 { feedforward } => {
            for layer in &layers {
                let input = feedforward.iter().any(|end| ends_in(&layer.module, end));
                let adapter = declare.scaling(layer, input)?;
                set.layers.insert(layer.weight, adapter);
            }
        }
        Method::Prompt { tokens } => {
            let [layer] = &layers[..] else {
                let what =
                    "a prompt stands beside one embedding, that of the words; name it alone".into();
                return Err(Error::Adapter { what });
            };
            set.layers
                .insert(layer.weight, declare.prompt(layer, *tokens)?);
        }
        Method::Prefix {
            tokens,
            width,
            projection,
        } => {
            // A file has the product alone.
            let projection = projection.filter(|_| matches!(modules, Modules::InPlace));
            let all = declare.prefix(&layers, [*tokens, *width], projection)?;
            set.layers.extend(all);
        }
        Method::Bottleneck { size } => {
            for layer in &layers {
                let adapter = declare.bottleneck(layer, *size)?;
                set.layers.insert(layer.weight, adapter);
            }
        }
    }
    if let Modules::Copies(shape_of) = modules {
        for id in kept(declare.p, config, &set.layers) {
            set.copies.extend(declare.copy(id, shape_of)?);
        }
    }
    let anchors = declare.anchors;
    p.adapters_mut().anchors.extend(anchors);
    p.adapters_mut().sets.push(set);
    p.adapters_mut().activate(Some(name))
}

/// The layers that a configuration means.
pub(super) fn targets(p: &Parameters, config: &AdapterConfig) -> Result<Vec<Layer>> {
    let matcher = Matcher::new(config)?;
    let mut found = Vec::new();
    let mut modules = Vec::new();
    for (weight, parameter) in p.iter() {
        let Some(module) = parameter.name().strip_suffix(".weight") else {
            continue;
        };
        let role = parameter.role();
        let linear = matches!(role, Role::Linear(_));
        modules.push(module);
        if !matcher.matches(module, linear) {
            continue;
        }
        let what = match (role, &config.method) {
            (Role::Other, _) => "is neither a linear layer nor an embedding that can have one",
            (Role::Embedding, Method::Ia3 { .. }) => {
                "is an embedding, and IA3 scales linear layers"
            }
            (Role::Embedding, Method::Bottleneck { .. }) => {
                "is an embedding, and a bottleneck stands behind a linear layer"
            }
            (Role::Embedding, Method::Prefix { .. }) => {
                "is an embedding, and a prefix stands beside a layer that makes keys"
            }
            (Role::Linear(_), Method::Prompt { .. }) => {
                "is a linear layer, and a prompt stands beside the embedding of the words"
            }
            (Role::Embedding, Method::LowRank(c)) if c.magnitude => {
                "is an embedding, and DoRA is for linear layers"
            }
            _ => {
                let shape = [parameter.shape()[0], parameter.shape()[1]];
                let module = module.to_owned();
                found.push(Layer {
                    weight,
                    module,
                    role,
                    shape,
                });
                continue;
            }
        };
        let what = format!("{module} cannot have an adapter: it {what}; name other targets");
        return Err(Error::Adapter { what });
    }
    let unmet = |name: &&String| !modules.iter().any(|module| ends_in(module, name));
    let near = |name: &str| match nearest(&format!("*{name}"), modules.iter().copied()) {
        Some(near) => format!("; the nearest name is {near}"),
        None => String::new(),
    };
    if let Targets::Names(names) = &config.targets
        && let Some(name) = names.iter().find(unmet)
    {
        let what = format!("no layer's name ends in the target {name}{}", near(name));
        return Err(Error::Adapter { what });
    }
    if let Some(name) = config.modules_to_save.iter().find(|name| {
        !p.iter()
            .any(|(_, q)| module_of(q.name()).is_some_and(|m| keeps(m, name)))
    }) {
        let what = format!(
            "no module's name ends in {name}, which is to be kept{}",
            near(name)
        );
        return Err(Error::Adapter { what });
    }
    if found.is_empty() {
        let what = "no layer is a target of the adapter; name targets that the model has".into();
        return Err(Error::Adapter { what });
    }
    Ok(found)
}

/// The module of a parameter.
fn module_of(parameter: &str) -> Option<&str> {
    parameter.rsplit_once('.').map(|(module, _)| module)
}

/// Whether a module is kept by a name: it or a module above it ends in that, within a word too, as PEFT has it.
fn keeps(module: &str, name: &str) -> bool {
    let mut module = Some(module);
    while let Some(here) = module {
        if here.ends_with(name) {
            return true;
        }
        module = module_of(here);
    }
    false
}

/// The parameters of the base that are trained and kept with an adapter of a configuration, where `set` stands beside
/// the layers: whole modules, and biases.
pub fn kept_parameters(p: &Parameters, config: &AdapterConfig, set: &AdapterSet) -> Vec<ParamId> {
    kept(p, config, &set.layers)
}

/// Notes the modules of which rules train a part, beside what the adapter in use keeps anyway, so that they are kept as
/// well.
///
/// # Errors
/// A trained parameter of a layer that has an adapter: no file of an adapter can hold it, unless it is a bias that
/// [`AdapterConfig::bias`] says is trained.
pub fn keep_trained(p: &mut Parameters, trained: &TrainableSet) -> Result<()> {
    let Some(set) = p.adapters().active() else {
        return Ok(());
    };
    let known = kept(p, &set.config, &set.layers);
    let mut more: Vec<String> = Vec::new();
    for id in trained.ids() {
        if p.adapters().anchor(id) != id || known.contains(&id) {
            continue;
        }
        let name = p.get(id).name();
        let module = module_of(name).unwrap_or(name);
        let weight = p.lookup(&format!("{module}.weight"));
        let adapter = weight.and_then(|weight| set.layers.get(&weight));
        if adapter.is_some_and(Adapter::wraps) {
            let what = format!(
                "a rule trains {name}, whose layer has an adapter; leave the layer out of the adapter's targets, or \
                 freeze it (biases of adapted layers are trained with the adapter's bias setting)"
            );
            return Err(Error::Adapter { what });
        }
        if !more.iter().any(|known| known == module) {
            more.push(module.to_owned());
        }
    }
    let name = set.name.clone();
    if let Some(set) = p.adapters_mut().sets.iter_mut().find(|s| s.name == name) {
        set.config.modules_to_save.extend(more);
    }
    Ok(())
}

fn kept(
    p: &Parameters,
    config: &AdapterConfig,
    layers: &BTreeMap<ParamId, Adapter>,
) -> Vec<ParamId> {
    let adapted = |module: &str| {
        let weight = p.lookup(&format!("{module}.weight"));
        weight.is_some_and(|weight| layers.contains_key(&weight))
    };
    p.iter()
        .filter(|(id, q)| {
            let Some(module) = module_of(q.name()) else {
                return false;
            };
            let bias = q.name().ends_with(".bias");
            let by_bias = match config.bias {
                Bias::None => false,
                Bias::Adapted => bias && adapted(module),
                Bias::All => bias,
            };
            let by_module = config
                .modules_to_save
                .iter()
                .any(|name| keeps(module, name));
            p.adapters().anchor(*id) == *id && (by_bias || by_module)
        })
        .map(|(id, _)| id)
        .collect()
}

/// The rules under which an adapter that was attached in place is trained, and nothing else.
pub fn rules(p: &Parameters, name: &str) -> Vec<Rule> {
    let mut rules = vec![Rule::freeze("*")];
    let Some(set) = p.adapters().sets().find(|set| set.name() == name) else {
        return rules;
    };
    rules.push(Rule::train(match &set.config.method {
        Method::LowRank(_) => format!("*.lora_*.{name}*"),
        Method::Ia3 { .. } => format!("*.ia3_l.{name}"),
        Method::Bottleneck { .. } => format!("*.adapter_*.{name}.*"),
        Method::Prompt { .. } => format!("prompt_embeddings.{name}"),
        Method::Prefix { projection, .. } => match projection {
            Some(_) => format!("*prefix_*.{name}.*"),
            None => format!("prompt_embeddings.{name}"),
        },
    }));
    let kept = kept(p, &set.config, &set.layers);
    rules.extend(kept.iter().map(|id| Rule::train(p.get(*id).name())));
    rules
}
