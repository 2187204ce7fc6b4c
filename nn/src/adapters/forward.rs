//! What a layer computes with the adapter that stands beside it.

use graft_autograd::Var;
use graft_tensor::ops::{Activation, Linear, Lora, Reduce, Unary, WeightLayout};

use super::{Adapter, Bottleneck, LowRank, Scaling};
use crate::error::Result;
use crate::forward::Forward;
use crate::parameters::ParamId;

impl Adapter {
    /// A linear layer's `activation(x·w + bias)`, adapted: `[.., in]` to `[.., out]`.
    pub(crate) fn linear(
        &self,
        f: &mut Forward,
        x: &Var,
        weight: &Var,
        bias: Option<&Var>,
        linear: Linear,
    ) -> Result<Var> {
        match self {
            Adapter::LowRank(adapter) => adapter.linear(f, x, weight, bias, linear),
            Adapter::Scaling(adapter) => adapter.linear(f, x, weight, bias, linear),
            Adapter::Bottleneck(adapter) => adapter.linear(f, x, weight, bias, linear),
            // They act in front of the texts, and not here.
            Adapter::Prompt(_) | Adapter::Prefix(_) => {
                let Linear { layout, activation } = linear;
                Ok(f.tape.linear(x, weight, bias, layout, activation)?)
            }
        }
    }

    /// The rows `ids` of an embedding's table, adapted: `[tokens, width]`.
    pub(crate) fn embedding(&self, f: &mut Forward, table: &Var, ids: &Var) -> Result<Var> {
        let rows = f.tape.gather_rows(table, ids)?;
        match self {
            Adapter::LowRank(adapter) => {
                let (a, b) = (f.parameter(adapter.a)?, f.parameter(adapter.b)?);
                let a = f.tape.permute(&a, &[1, 0])?;
                let inner = f.tape.gather_rows(&a, ids)?; // [tokens, rank]
                let b = f.tape.permute(&b, &[1, 0])?;
                let change = f.tape.matmul(&inner, &b)?;
                let change = f.tape.scale(&change, adapter.scale)?;
                Ok(f.tape.add(&rows, &change)?)
            }
            // `attach` refuses embeddings: this is the same for the sake of a complete match.
            Adapter::Scaling(adapter) => scaled(f, &rows, adapter),
            Adapter::Bottleneck(adapter) => adapter.behind(f, &rows),
            Adapter::Prompt(_) | Adapter::Prefix(_) => Ok(rows),
        }
    }
}

impl LowRank {
    fn linear(
        &self,
        f: &mut Forward,
        x: &Var,
        weight: &Var,
        bias: Option<&Var>,
        linear: Linear,
    ) -> Result<Var> {
        let (a, b) = (f.parameter(self.a)?, f.parameter(self.b)?);
        let trained = f.tape.needs_gradient(&a) || f.tape.needs_gradient(&b);
        let lora = Lora {
            linear,
            scale: self.scale,
            dropout: match f.is_training() && trained {
                true => self.dropout,
                false => 0.0,
            },
        };
        let Some(magnitude) = self.magnitude else {
            return Ok(f.tape.lora(x, weight, bias, [&a, &b], lora)?);
        };
        // DoRA: the directions are those of the changed weight, its lengths are trained by themselves. As in the paper
        // (4.3), no gradient passes through the norm.
        let direction = Lora {
            linear: Linear {
                activation: None,
                ..linear
            },
            ..lora
        };
        let y = f.tape.lora(x, weight, None, [&a, &b], direction)?;
        let norms = norms(f, weight, [&a, &b], linear.layout, self.scale)?;
        let magnitude = f.parameter(magnitude)?;
        let factor = f.tape.div(&magnitude, &norms)?;
        let factor = f.cast(&factor, y.value().dtype())?;
        let y = f.tape.mul(&y, &factor)?;
        let y = match bias {
            Some(bias) => {
                let bias = f.cast(bias, y.value().dtype())?;
                f.tape.add(&y, &bias)?
            }
            None => y,
        };
        activated(f, y, linear.activation)
    }
}

impl Scaling {
    fn linear(
        &self,
        f: &mut Forward,
        x: &Var,
        weight: &Var,
        bias: Option<&Var>,
        linear: Linear,
    ) -> Result<Var> {
        let Linear { layout, activation } = linear;
        if self.input {
            let x = scaled(f, x, self)?;
            return Ok(f.tape.linear(&x, weight, bias, layout, activation)?);
        }
        let y = f.tape.linear(x, weight, bias, layout, None)?;
        let y = scaled(f, &y, self)?;
        activated(f, y, activation)
    }
}

impl Bottleneck {
    fn linear(
        &self,
        f: &mut Forward,
        x: &Var,
        weight: &Var,
        bias: Option<&Var>,
        linear: Linear,
    ) -> Result<Var> {
        let Linear { layout, activation } = linear;
        let y = f.tape.linear(x, weight, bias, layout, activation)?;
        self.behind(f, &y)
    }

    /// `y + up(gelu(down(y)))`, of `y [.., out]`.
    fn behind(&self, f: &mut Forward, y: &Var) -> Result<Var> {
        let layer = |f: &mut Forward, x: &Var, ids: [ParamId; 2], activation| -> Result<Var> {
            let (weight, bias) = (f.parameter(ids[0])?, f.parameter(ids[1])?);
            let layout = WeightLayout::OutIn;
            Ok(f.tape.linear(x, &weight, Some(&bias), layout, activation)?)
        };
        let inner = layer(f, y, self.down, Some(Activation::Gelu))?; // [.., size]
        let change = layer(f, &inner, self.up, None)?;
        Ok(f.tape.add(y, &change)?)
    }
}

/// The columns of `x [.., n]` times the factors.
fn scaled(f: &mut Forward, x: &Var, adapter: &Scaling) -> Result<Var> {
    let factors = f.parameter(adapter.factors)?;
    let factors = f.tape.reshape(&factors, &[factors.value().count()])?;
    let factors = f.cast(&factors, x.value().dtype())?;
    Ok(f.tape.mul(x, &factors)?)
}

fn activated(f: &mut Forward, x: Var, activation: Option<Activation>) -> Result<Var> {
    let Some(activation) = activation else {
        return Ok(x);
    };
    let kind = match activation {
        Activation::Gelu => Unary::Gelu,
        Activation::GeluTanh => Unary::GeluTanh,
        Activation::Silu => Unary::Silu,
        Activation::Relu => Unary::Relu,
        Activation::Tanh => Unary::Tanh,
    };
    Ok(f.tape.unary(kind, &x)?)
}

/// The length of each output's weights in `w + scale * b·a`, `[out]`, through which no gradient passes. `b·a` is not
/// formed: `|w + s b·a|² = |w|² + s b·(2 w·aᵀ + s b·(a·aᵀ))`, row by row.
pub(super) fn norms(
    f: &mut Forward,
    weight: &Var,
    [a, b]: [&Var; 2],
    layout: WeightLayout,
    scale: f64,
) -> Result<Var> {
    // The numbers of one weight that is held otherwise, until its row lengths are summed.
    let dtype = a.value().dtype();
    let weight = f.cast(weight, dtype)?;
    let t = &mut f.tape;
    let (w, a, b) = (t.detach(&weight)?, t.detach(a)?, t.detach(b)?);
    let w = match layout {
        WeightLayout::OutIn => w,
        WeightLayout::InOut => t.permute(&w, &[1, 0])?,
    };
    let a_t = t.permute(&a, &[1, 0])?;
    let cross = t.matmul(&w, &a_t)?; // [out, rank]
    let cross = t.scale(&cross, 2.0)?;
    let gram = t.matmul(&a, &a_t)?; // [rank, rank]
    let own = t.matmul(&b, &gram)?;
    let own = t.scale(&own, scale)?;
    let both = t.add(&cross, &own)?;
    let change = t.mul(&b, &both)?;
    let change = t.reduce(Reduce::Sum, &change, 1, false)?; // [out]
    let change = t.scale(&change, scale)?;
    let squares = t.unary(Unary::Square, &w)?;
    let squares = t.reduce(Reduce::Sum, &squares, 1, false)?;
    let squares = t.add(&squares, &change)?;
    Ok(t.unary(Unary::Sqrt, &squares)?)
}
