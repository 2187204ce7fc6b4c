//! Adapters: few trained numbers beside frozen layers.
//!
//! An adapter is found by the weight that it belongs to: [`Linear`](crate::layers::Linear) and
//! [`Embedding`](crate::layers::Embedding) ask the [`Parameters`](crate::Parameters) for the one of their own weight,
//! so no model family knows of adapters. Its tensors are parameters like others, under the names that PEFT has for
//! them in memory (`encoder.layer.0.attention.self.query.lora_A.default.weight`), and the one trainable set says which
//! of them move.
//!
//! Several adapters may lie beside one base; one of them, or none, is in use.

mod attach;
mod config;
mod declare;
mod forward;
mod front;
mod init;
mod merge;
mod names;
mod unused;

use std::collections::{BTreeMap, HashMap};

use graft_tensor::Tensor;

pub use attach::{Modules, attach, keep_trained, kept_parameters, rules};
pub use config::{AdapterConfig, Bias, LowRankConfig, LowRankInit, Method, Targets};
pub use front::{Fronted, attend, project};
pub use init::{begin_as, finish};
pub use merge::merge;
pub use unused::refuse_unused;

use crate::error::{Error, Result, nearest};
use crate::parameters::ParamId;

/// The name of an adapter where there is only one.
pub const DEFAULT: &str = "default";

/// What stands beside one layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Adapter {
    /// A low-rank matrix that is added to the weight
    LowRank(LowRank),
    /// Factors of the layer's outputs or inputs
    Scaling(Scaling),
    /// Two small layers behind it
    Bottleneck(Bottleneck),
    /// Rows in front of each text's words, `[tokens, width]`
    Prompt(ParamId),
    /// Keys and values in front of each text's own
    Prefix(Prefix),
}

impl Adapter {
    /// Its parameters.
    pub fn parameters(&self) -> Vec<ParamId> {
        match self {
            Adapter::LowRank(l) => [l.a, l.b].into_iter().chain(l.magnitude).collect(),
            Adapter::Scaling(s) => vec![s.factors],
            Adapter::Bottleneck(b) => b.down.into_iter().chain(b.up).collect(),
            Adapter::Prompt(rows) => vec![*rows],
            Adapter::Prefix(prefix) => {
                let projection = prefix.projection.iter();
                let made_of = |p: &Projection| [&[p.tokens][..], &p.down, &p.up].concat();
                [prefix.rows]
                    .into_iter()
                    .chain(projection.flat_map(made_of))
                    .collect()
            }
        }
    }

    /// Whether what its layer computes is another function of the layer's input: PEFT wraps such a layer.
    pub fn wraps(&self) -> bool {
        !matches!(self, Adapter::Prompt(_) | Adapter::Prefix(_))
    }
}

/// LoRA and its kin.
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    /// `[rank, in]`; of an embedding, `[rank, rows]`
    pub a: ParamId,
    /// `[out, rank]`; of an embedding, `[width, rank]`
    pub b: ParamId,
    /// DoRA: the length of each output's weights, `[out]`
    pub magnitude: Option<ParamId>,
    /// Factor of `b·a`
    pub scale: f64,
    /// Probability that it does not see an element of its input, in training
    pub dropout: f64,
}

/// IA³ (H. Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022).
#[derive(Clone, Debug, PartialEq)]
pub struct Scaling {
    /// `[out, 1]`, or `[1, in]`
    pub factors: ParamId,
    /// They are the inputs' factors
    pub input: bool,
}

/// `y + up(gelu(down(y)))` of a layer's output `y` (N. Houlsby et al., 2019).
#[derive(Clone, Debug, PartialEq)]
pub struct Bottleneck {
    /// Weight `[size, out]` and bias `[size]`
    pub down: [ParamId; 2],
    /// Weight `[out, size]` and bias `[out]`
    pub up: [ParamId; 2],
}

/// A prefix in one layer; it stands beside the weight that makes the keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Prefix {
    /// Of all layers, keys and values of one beside those of the next: `[tokens, layers * 2 * width]`
    pub rows: ParamId,
    /// Which of them this is
    pub layer: usize,
    /// Of its keys, and of its values
    pub width: usize,
    /// What the rows are the product of, while they are trained
    pub projection: Option<Projection>,
}

/// Keys and values of a layer as `up(tanh(down(tokens)))`.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    /// `[tokens, width]`, of all layers
    pub tokens: ParamId,
    /// Weight `[inner, width]` and bias `[inner]`, of all layers
    pub down: [ParamId; 2],
    /// Weight `[2 * width, inner]` and bias `[2 * width]`, of this layer
    pub up: [ParamId; 2],
}

/// The adapters of one name: what was trained together.
#[derive(Clone, Debug)]
pub struct AdapterSet {
    name: String,
    config: AdapterConfig,
    /// By the weight that each belongs to
    layers: BTreeMap<ParamId, Adapter>,
    /// Parameters of the base, and those that take their place while the set is in use
    copies: BTreeMap<ParamId, ParamId>,
    /// PiSSA: what was taken out of each weight, as `a` and `b`
    residuals: BTreeMap<ParamId, [Tensor; 2]>,
}

impl AdapterSet {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it was made.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Weights and adapters, in the order in which the weights take part.
    pub fn layers(&self) -> impl Iterator<Item = (ParamId, &Adapter)> {
        self.layers.iter().map(|(&id, adapter)| (id, adapter))
    }

    /// Whether a parameter is what others are multiplied to ([`project`]): it moves with them.
    pub fn is_product(&self, id: ParamId) -> bool {
        self.layers.values().any(|adapter| match adapter {
            Adapter::Prefix(prefix) => prefix.rows == id && prefix.projection.is_some(),
            _ => false,
        })
    }

    /// Whether a parameter is of the layers of which others are the product: no file keeps it.
    pub fn is_projection(&self, id: ParamId) -> bool {
        self.layers.values().any(|adapter| match adapter {
            Adapter::Prefix(prefix) => prefix.rows != id && adapter.parameters().contains(&id),
            _ => false,
        })
    }

    /// Parameters of the base, and those that take their place.
    pub fn copies(&self) -> impl Iterator<Item = (ParamId, ParamId)> + '_ {
        self.copies.iter().map(|(&base, &copy)| (base, copy))
    }
}

/// All adapters beside a base.
#[derive(Clone, Debug, Default)]
pub struct Adapters {
    sets: Vec<AdapterSet>,
    active: Option<usize>,
    /// By the parameter of an adapter, that of the base beside which it takes part
    anchors: HashMap<ParamId, ParamId>,
}

impl Adapters {
    /// The same beside parameters that are only counted.
    pub(crate) fn planned(&self) -> Adapters {
        let mut planned = self.clone();
        for set in &mut planned.sets {
            set.residuals.clear();
        }
        planned
    }

    /// The adapter sets, in the order in which they were attached.
    pub fn sets(&self) -> impl Iterator<Item = &AdapterSet> {
        self.sets.iter()
    }

    /// The set in use.
    pub fn active(&self) -> Option<&AdapterSet> {
        self.sets.get(self.active?)
    }

    /// Takes another set into use, or none: the base alone.
    ///
    /// # Errors
    /// A name that no set has.
    pub fn activate(&mut self, name: Option<&str>) -> Result<()> {
        self.active = match name {
            None => None,
            Some(name) => match self.sets.iter().position(|set| set.name == name) {
                Some(position) => Some(position),
                None => {
                    let names = self.sets.iter().map(|set| set.name.as_str());
                    let what = match nearest(name, names) {
                        Some(near) => format!("no adapter is called {name}; the nearest is {near}"),
                        None => format!("no adapter is called {name}: there are none; attach one"),
                    };
                    return Err(Error::Adapter { what });
                }
            },
        };
        Ok(())
    }

    /// What stands beside a weight, in the set in use.
    pub fn of(&self, weight: ParamId) -> Option<&Adapter> {
        self.active()?.layers.get(&weight)
    }

    /// The parameter that takes the place of one of the base, or that one itself.
    pub fn in_place_of(&self, id: ParamId) -> ParamId {
        let copy = self.active().and_then(|set| set.copies.get(&id));
        copy.copied().unwrap_or(id)
    }

    /// The parameter of the base beside which an adapter's takes part; of the base's own, each itself.
    pub fn anchor(&self, id: ParamId) -> ParamId {
        self.anchors.get(&id).copied().unwrap_or(id)
    }
}
