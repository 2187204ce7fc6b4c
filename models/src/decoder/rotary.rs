//! Sines and cosines of the positions of a batch.

use graft_autograd::Var;
use graft_nn::Forward;
use graft_tensor::Tensor;
use graft_tensor::ops::rope::Rope;

use crate::config::{DecoderConfig, LayerKind, Positions, RopeParameters};
use crate::error::Result;

/// What turns one kind of layers' queries and keys.
#[derive(Clone, Debug)]
struct Angles {
    /// Per position, `[head_dim / 2]`
    frequencies: Vec<f32>,
    /// Factor of sine and cosine
    scale: f64,
}

/// Rotary positions, which may differ between layers that see everything and those with a window.
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    full: Angles,
    /// Where they differ
    sliding: Option<Angles>,
    head_dim: usize,
}

/// The tables of a batch on the tape: rows of cosines and sines, and each token's row.
pub(super) struct Turns {
    full: (Var, Var),
    sliding: Option<(Var, Var)>,
    rows: Var,
    head_dim: usize,
}

impl Rotary {
    /// None where positions are learned.
    pub fn new(config: &DecoderConfig) -> Option<Rotary> {
        let Positions::Rotary { full, sliding } = config.positions else {
            return None;
        };
        let angles = |p: &RopeParameters| Angles {
            frequencies: p.frequencies(config.head_dim),
            scale: p.attention_factor(),
        };
        Some(Rotary {
            full: angles(&full),
            sliding: (sliding != full).then(|| angles(&sliding)),
            head_dim: config.head_dim,
        })
    }

    /// Tables for `positions`, one for each token of a batch; they have rows for those from the least to the greatest.
    pub fn turns(&self, f: &mut Forward, positions: &[i64]) -> Result<Turns> {
        let first = positions.iter().copied().min().unwrap_or(0);
        let end = positions
            .iter()
            .copied()
            .max()
            .map_or(first, |last| last + 1);
        let rows = positions.iter().map(|position| position - first).collect();
        let rows = Tensor::from_vec(f.memory(), rows, &[positions.len()])?;
        Ok(Turns {
            full: self.full.tables(f, first..end)?,
            sliding: match &self.sliding {
                Some(angles) => Some(angles.tables(f, first..end)?),
                None => None,
            },
            rows: f.input(rows),
            head_dim: self.head_dim,
        })
    }
}

impl Angles {
    /// Cosines and sines, each `f32 [positions, head_dim / 2]`.
    fn tables(&self, f: &mut Forward, positions: std::ops::Range<i64>) -> Result<(Var, Var)> {
        let shape = [
            (positions.end - positions.start) as usize,
            self.frequencies.len(),
        ];
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for frequency in &self.frequencies {
                // The product is rounded to f32, as the frequency was.
                let (s, c) = f64::from(position as f32 * frequency).sin_cos();
                cos.push((c as f32) * self.scale as f32);
                sin.push((s as f32) * self.scale as f32);
            }
        }
        let (cos, sin) = (
            Tensor::from_vec(f.memory(), cos, &shape)?,
            Tensor::from_vec(f.memory(), sin, &shape)?,
        );
        Ok((f.input(cos), f.input(sin)))
    }
}

impl Turns {
    /// `x [tokens, heads * head_dim]` with each head turned by its token's angles.
    pub fn turn(&self, f: &mut Forward, kind: LayerKind, heads: usize, x: &Var) -> Result<Var> {
        let (cos, sin) = match (kind, &self.sliding) {
            (LayerKind::Sliding, Some(tables)) => tables,
            _ => &self.full,
        };
        let rope = Rope {
            heads,
            rotary_dim: self.head_dim,
            interleaved: false,
        };
        Ok(f.tape.rope(rope, x, cos, sin, &self.rows)?)
    }
}
