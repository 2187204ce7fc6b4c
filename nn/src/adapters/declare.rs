//! The parameters of adapters: their names, shapes and beginnings.

use super::attach::Layer;
use super::config::{LowRankConfig, LowRankInit};
use super::{Adapter, Bottleneck, LowRank, Scaling};
use crate::error::{Error, Result};
use crate::parameters::{Init, ParamId, Parameters, Role};

/// Deviation of both matrices of a bottleneck, as Houlsby et al. have it: what it adds begins near 0.
const NEAR_IDENTITY: f64 = 1e-3;

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
        if rank == 0 || rank > 1 << 20 {
            return refuse(format!("{module}: a rank of {rank}; it must be 1 or more"));
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
        if size == 0 || size > 1 << 20 {
            let what = format!("{module}: a bottleneck of {size}; it must be 1 or more");
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
