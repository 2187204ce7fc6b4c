//! The parameters of adapters: their names, shapes and beginnings.

use super::attach::Layer;
use super::config::{LowRankConfig, LowRankInit};
use super::{Adapter, Bottleneck, LowRank, Prefix, Projection, Scaling};
use crate::error::{Error, Result};
use crate::parameters::{Init, ParamId, Parameters, Role};

/// Deviation of both matrices of a bottleneck, as Houlsby et al. have it: what it adds begins near 0.
const NEAR_IDENTITY: f64 = 1e-3;
/// Deviation of a prefix's keys and values.
const PREFIX: f64 = 0.1;
/// Most virtual tokens: far more than any model has positions.
const MOST_TOKENS: usize = 1 << 20;
/// Largest rank, and largest inner width of a bottleneck.
const MOST_INNER: usize = 1 << 20;

/// Declares parameters and notes where they take part.
pub(super) struct Declare<'a> {
    pub p: &'a mut Parameters,
    pub name: &'a str,
    /// An adapter's parameters and those beside which they take part
    pub anchors: Vec<(ParamId, ParamId)>,
}

impl Declare<'_> {
    fn one(&mut self, beside: ParamId, name: &str, shape: &[usize], init: Init) -> Result<ParamId> {
        let id = self.p.declare(name, shape, init)?;
        self.anchors.push((id, beside));
        Ok(id)
    }

    pub fn low_rank(
        &mut self,
        layer: &Layer,
        c: &LowRankConfig,
        rank: usize,
        alpha: f64,
    ) -> Result<Adapter> {
        let (module, name) = (&layer.module, self.name);
        let refuse = |what: String| Err(Error::Adapter { what });
        if rank == 0 || rank > MOST_INNER {
            return refuse(format!(
                "{module}: a rank of {rank}; it must be 1 to {MOST_INNER}"
            ));
        }
        if !alpha.is_finite() {
            return refuse(format!(
                "{module}: an alpha of {alpha}; it must be a number"
            ));
        }
        if !(0.0..1.0).contains(&c.dropout) {
            let p = c.dropout;
            return refuse(format!("{module}: a dropout of {p}; it must be in [0, 1)"));
        }
        let [inputs, outputs] = layer.sizes();
        if c.init == LowRankInit::Pissa && rank > inputs.min(outputs) {
            let most = inputs.min(outputs);
            return refuse(format!(
                "{module}: a rank of {rank}, but it has {most} singular vectors; take a smaller rank"
            ));
        }
        if c.init == LowRankInit::Orthogonal && rank % 2 == 1 {
            return refuse(format!(
                "{module}: an odd rank of {rank}; orthogonal matrices need an even one"
            ));
        }
        let weight = layer.weight;
        let (a, b) = if layer.role == Role::Embedding {
            let at = |which: &str| format!("{module}.lora_embedding_{which}.{name}");
            // The rows are looked up in `a`, so that this one begins as zero.
            (
                self.one(weight, &at("A"), &[rank, inputs], Init::Zeros)?,
                self.one(weight, &at("B"), &[outputs, rank], Init::Normal(1.0))?,
            )
        } else {
            let at = |which: &str| format!("{module}.lora_{which}.{name}.weight");
            let first = match c.init {
                LowRankInit::Gaussian => Init::Normal(1.0 / rank as f64),
                // PyTorch's uniform initialisation of He et al. with a slope of √5.
                _ => Init::Uniform(1.0 / (inputs as f64).sqrt()),
            };
            (
                self.one(weight, &at("A"), &[rank, inputs], first)?,
                self.one(weight, &at("B"), &[outputs, rank], Init::Zeros)?,
            )
        };
        let magnitude = match c.magnitude {
            true => {
                let at = format!("{module}.lora_magnitude_vector.{name}.weight");
                Some(self.one(weight, &at, &[outputs], Init::Ones)?)
            }
            false => None,
        };
        Ok(Adapter::LowRank(LowRank {
            a,
            b,
            magnitude,
            scale: c.scale(rank, alpha),
            dropout: c.dropout,
        }))
    }

    pub fn scaling(&mut self, layer: &Layer, input: bool) -> Result<Adapter> {
        let [inputs, outputs] = layer.sizes();
        let shape = match input {
            true => [1, inputs],
            false => [outputs, 1],
        };
        let at = format!("{}.ia3_l.{}", layer.module, self.name);
        let factors = self.one(layer.weight, &at, &shape, Init::Ones)?;
        Ok(Adapter::Scaling(Scaling { factors, input }))
    }

    pub fn bottleneck(&mut self, layer: &Layer, size: usize) -> Result<Adapter> {
        let (weight, module, name) = (layer.weight, &layer.module, self.name);
        if size == 0 || size > MOST_INNER {
            let what = format!("{module}: a bottleneck of {size}; it must be 1 to {MOST_INNER}");
            return Err(Error::Adapter { what });
        }
        let outputs = layer.sizes()[1];
        let mut small = |which: &str, shape: [usize; 2]| -> Result<[ParamId; 2]> {
            let at = |last: &str| format!("{module}.adapter_{which}.{name}.{last}");
            Ok([
                self.one(weight, &at("weight"), &shape, Init::Normal(NEAR_IDENTITY))?,
                self.one(weight, &at("bias"), &shape[..1], Init::Zeros)?,
            ])
        };
        Ok(Adapter::Bottleneck(Bottleneck {
            down: small("down", [size, outputs])?,
            up: small("up", [outputs, size])?,
        }))
    }

    fn count(tokens: usize) -> Result<()> {
        match tokens {
            1..=MOST_TOKENS => Ok(()),
            _ => {
                let what = format!("{tokens} virtual tokens; there must be 1 to {MOST_TOKENS}");
                Err(Error::Adapter { what })
            }
        }
    }

    /// Rows that take their values from the words when the initialisation ends.
    pub fn prompt(&mut self, words: &Layer, tokens: usize) -> Result<Adapter> {
        Self::count(tokens)?;
        let width = words.sizes()[1];
        let at = format!("prompt_embeddings.{}", self.name);
        let rows = self.one(words.weight, &at, &[tokens, width], Init::Zeros)?;
        Ok(Adapter::Prompt(rows))
    }

    /// Keys and values for layers whose keys are made by `layers`, in their order.
    pub fn prefix(
        &mut self,
        layers: &[Layer],
        [tokens, width]: [usize; 2],
        projection: Option<usize>,
    ) -> Result<Vec<(ParamId, Adapter)>> {
        Self::count(tokens)?;
        let narrow = layers.iter().find(|layer| layer.sizes()[1] < width);
        if let Some(layer) = narrow.or(layers.first().filter(|_| width == 0)) {
            let (module, outputs) = (&layer.module, layer.sizes()[1]);
            let what = format!(
                "keys of width {width} beside {module}, which has {outputs} outputs; take the width of the model's keys"
            );
            return Err(Error::Adapter { what });
        }
        let (name, first) = (self.name, layers[0].weight);
        let shape = [tokens, layers.len() * 2 * width];
        let at = format!("prompt_embeddings.{name}");
        let rows = self.one(first, &at, &shape, Init::Normal(PREFIX))?;
        let shared = match projection {
            None => None,
            Some(0) => {
                let what =
                    "a prefix projected from 0 numbers; take 1 or more, or no projection".into();
                return Err(Error::Adapter { what });
            }
            Some(inner) => {
                let at = |what: &str| format!("prefix_{what}.{name}");
                let shape = [tokens, width];
                let weight = format!("{}.weight", at("tokens"));
                let tokens = self.one(first, &weight, &shape, Init::Normal(1.0))?;
                Some((
                    tokens,
                    self.linear(first, &at("down"), [inner, width])?,
                    inner,
                ))
            }
        };
        let mut all = Vec::with_capacity(layers.len());
        for (i, layer) in layers.iter().enumerate() {
            let projection = match shared {
                None => None,
                Some((tokens, down, inner)) => {
                    let at = format!("{}.prefix_up.{name}", layer.module);
                    let up = self.linear(layer.weight, &at, [2 * width, inner])?;
                    Some(Projection { tokens, down, up })
                }
            };
            let prefix = Prefix {
                rows,
                layer: i,
                width,
                projection,
            };
            all.push((layer.weight, Adapter::Prefix(prefix)));
        }
        Ok(all)
    }

    /// Weight and bias of a layer, as PyTorch begins its weights.
    fn linear(&mut self, beside: ParamId, name: &str, shape: [usize; 2]) -> Result<[ParamId; 2]> {
        let init = Init::Uniform(1.0 / (shape[1] as f64).sqrt());
        Ok([
            self.one(beside, &format!("{name}.weight"), &shape, init)?,
            self.one(beside, &format!("{name}.bias"), &shape[..1], Init::Zeros)?,
        ])
    }

    pub fn copy(
        &mut self,
        id: ParamId,
        shape_of: &dyn Fn(&str) -> Option<Vec<usize>>,
    ) -> Result<Option<(ParamId, ParamId)>> {
        let name = self.p.get(id).name().to_owned();
        let Some(shape) = shape_of(&name) else {
            return Ok(None);
        };
        let (module, last) = name.rsplit_once('.').unwrap_or(("", &name));
        let at = format!("{module}.modules_to_save.{}.{last}", self.name);
        let copy = self.one(id, &at, &shape, Init::Zeros)?;
        Ok(Some((id, copy)))
    }
}
