//! Virtual tokens: trained rows in front of each text of a batch, to which the text's tokens attend.
//!
//! A prompt's enter the network where the words do, and pass through every layer (B. Lester et al., "The Power of Scale
//! for Parameter-Efficient Prompt Tuning", 2021). A prefix's are the keys and values that each layer would have made of
//! them (X. Li and P. Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021). The text stands behind
//! either: its positions begin behind them, and masks and windows count them.

use graft_autograd::Var;
use graft_tensor::ops::{Activation, Attention, WeightLayout};
use graft_tensor::{Tensor, ops};

use super::{Adapter, Adapters, Method, Prefix, Projection};
use crate::error::Result;
use crate::forward::Forward;
use crate::parameters::{ParamId, Parameters};

impl Method {
    /// Virtual tokens in front of each text.
    pub fn virtual_tokens(&self) -> usize {
        match self {
            Method::Prompt { tokens } | Method::Prefix { tokens, .. } => *tokens,
            Method::LowRank(_) | Method::Ia3 { .. } | Method::Bottleneck { .. } => 0,
        }
    }
}

impl Adapters {
    /// Virtual tokens in front of each text, by the adapter in use: the text's positions begin behind them.
    pub fn virtual_tokens(&self) -> usize {
        self.active()
            .map_or(0, |set| set.config().method.virtual_tokens())
    }

    /// Those of them that are rows of the batch in every layer: a prompt's.
    pub fn virtual_rows(&self) -> usize {
        match self.active().map(|set| &set.config().method) {
            Some(Method::Prompt { tokens }) => *tokens,
            _ => 0,
        }
    }
}

impl Adapter {
    /// A prompt's rows, `[tokens, width]`.
    pub(crate) fn prompt(&self, f: &mut Forward) -> Result<Option<Var>> {
        match self {
            Adapter::Prompt(id) => f.parameter(*id).map(Some),
            _ => Ok(None),
        }
    }

    /// A prefix's keys and values in the layer beside whose keys it stands, each `[tokens, width]`.
    pub(crate) fn prefix(&self, f: &mut Forward) -> Result<Option<[Var; 2]>> {
        match self {
            Adapter::Prefix(prefix) => prefix.keys_and_values(f).map(Some),
            _ => Ok(None),
        }
    }
}

impl Prefix {
    fn keys_and_values(&self, f: &mut Forward) -> Result<[Var; 2]> {
        let (rows, first) = match &self.projection {
            Some(projection) => (projection.rows(f)?, 0),
            None => (f.parameter(self.rows)?, 2 * self.layer * self.width),
        };
        Ok([
            f.tape.narrow(&rows, 1, first, self.width)?,
            f.tape.narrow(&rows, 1, first + self.width, self.width)?,
        ])
    }
}

impl Projection {
    /// Keys beside values of one layer, `[tokens, 2 * width]`.
    fn rows(&self, f: &mut Forward) -> Result<Var> {
        let x = f.parameter(self.tokens)?;
        let layer = |f: &mut Forward, x: &Var, ids: [ParamId; 2], activation| -> Result<Var> {
            let (weight, bias) = (f.parameter(ids[0])?, f.parameter(ids[1])?);
            let layout = WeightLayout::OutIn;
            Ok(f.tape.linear(x, &weight, Some(&bias), layout, activation)?)
        };
        let inner = layer(f, &x, self.down, Some(Activation::Tanh))?;
        layer(f, &inner, self.up, None)
    }
}

/// The parameters of a projection, which a file does not keep, are those that its product takes the place of: computes
/// the product of the adapter in use, which is then all that there is to it.
///
/// # Errors
/// Parameters without values.
pub fn project(p: &mut Parameters) -> Result<()> {
    let Some(set) = p.adapters().active() else {
        return Ok(());
    };
    let mut parts: Vec<(usize, ParamId, Projection)> = Vec::new();
    for (_, adapter) in set.layers() {
        if let Adapter::Prefix(prefix) = adapter
            && let Some(projection) = &prefix.projection
        {
            parts.push((prefix.layer, prefix.rows, projection.clone()));
        }
    }
    parts.sort_by_key(|(layer, ..)| *layer);
    let Some(&(_, rows, _)) = parts.first() else {
        return Ok(());
    };
    let mut values = Vec::with_capacity(parts.len());
    for (.., projection) in &parts {
        let mut f = Forward::evaluate(p);
        values.push(projection.rows(&mut f)?.value().clone());
    }
    let values: Vec<&Tensor> = values.iter().collect();
    let value = ops::concat(p.memory(), &values, 1)?;
    p.set(rows, value)
}

/// Where the rows of a batch stand when there are new ones in front of its sequences.
#[derive(Clone, Debug)]
pub struct Fronted {
    /// The new row, by its number in its own table, of each place where there is one
    new: Vec<i64>,
    /// For each place, the number of its row: new ones first, then the old ones
    order: Vec<i64>,
    /// The place of each old row
    old: Vec<i64>,
    offsets: Vec<i64>,
}

impl Fronted {
    /// `count` new rows in front of each sequence of which `is_fronted` holds; `offsets` say where sequences begin.
    pub fn new(offsets: &[i64], count: usize, is_fronted: impl Fn(usize) -> bool) -> Fronted {
        let count = count as i64;
        let fronted = (0..offsets.len().saturating_sub(1)).filter(|&i| is_fronted(i));
        let all_new = count * fronted.count() as i64;
        let mut made = Fronted {
            new: Vec::with_capacity(all_new as usize),
            order: Vec::new(),
            old: Vec::new(),
            offsets: vec![0],
        };
        for (i, pair) in offsets.windows(2).enumerate() {
            if is_fronted(i) {
                let first = made.new.len() as i64;
                made.new.extend(0..count);
                made.order.extend(first..first + count);
            }
            let place = made.order.len() as i64;
            made.old.extend(place..place + pair[1] - pair[0]);
            made.order
                .extend((pair[0]..pair[1]).map(|row| row + all_new));
            made.offsets.push(made.order.len() as i64);
        }
        made
    }

    /// Where the sequences begin with their new rows.
    pub fn offsets(&self) -> &[i64] {
        &self.offsets
    }

    /// The values of old rows where they stand, and 0 in front of their sequences.
    pub fn fill(&self, values: &[i64]) -> Vec<i64> {
        let mut all = vec![0; self.order.len()];
        for (&place, &value) in self.old.iter().zip(values) {
            all[place as usize] = value;
        }
        all
    }

    /// `x [rows, width]` with rows of `front [count, width]` in front of its sequences. Values of the parameters' type
    /// may stand in front of activations: their gradients are added up in their own type.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn insert(&self, f: &mut Forward, front: &Var, x: &Var) -> Result<Var> {
        let new = pick(f, front, &self.new)?;
        let new = f.cast(&new, x.value().dtype())?;
        let both = f.tape.concat(&[&new, x], 0)?;
        drop(new);
        pick(f, &both, &self.order)
    }

    /// `x [rows, width]` with any rows in front of its sequences, of which nothing will be used.
    fn stretch(&self, f: &mut Forward, x: &Var) -> Result<Var> {
        let all_new = self.new.len() as i64;
        let any: Vec<i64> = self.order.iter().map(|i| (i - all_new).max(0)).collect();
        pick(f, x, &any)
    }

    /// The old rows of `x [places, width]`.
    ///
    /// # Errors
    /// Another number of rows than there are places.
    pub fn remove(&self, f: &mut Forward, x: &Var) -> Result<Var> {
        pick(f, x, &self.old)
    }
}

fn pick(f: &mut Forward, x: &Var, rows: &[i64]) -> Result<Var> {
    let rows = Tensor::from_slice(f.memory(), rows, &[rows.len()])?;
    let rows = f.input(rows);
    Ok(f.tape.gather_rows(x, &rows)?)
}

/// Softmax attention of `q [tokens, heads * head_dim]` within each sequence, with a prefix's keys and values in front of
/// each sequence's own `k` and `v`: `[tokens, heads * head_dim]`.
///
/// # Errors
/// Shapes or offsets that do not fit.
pub fn attend(
    f: &mut Forward,
    attention: &Attention,
    [q, k, v]: [&Var; 3],
    offsets: &Var,
    prefix: Option<&[Var; 2]>,
) -> Result<Var> {
    let Some([keys, values]) = prefix.filter(|_| q.shape()[0] > 0) else {
        return Ok(f.tape.attention(attention, q, k, v, offsets)?);
    };
    let fronted = Fronted::new(offsets.value().slice::<i64>()?, keys.shape()[0], |_| true);
    let k = fronted.insert(f, keys, k)?;
    let v = fronted.insert(f, values, v)?;
    // Queries of virtual tokens cost little, and with them the kernels are those of whole texts.
    let q = fronted.stretch(f, q)?;
    let all = fronted.offsets();
    let offsets = Tensor::from_slice(f.memory(), all, &[all.len()])?;
    let offsets = f.input(offsets);
    let y = f.tape.attention(attention, &q, &k, &v, &offsets)?;
    drop((q, k, v));
    fronted.remove(f, &y)
}
