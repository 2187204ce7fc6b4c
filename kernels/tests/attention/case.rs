//! A problem with its inputs, its definition in f64 with plain loops, and runs of the kernels on it.

use graft_kernels::attention::{
    Attention, Packed, attention_backward_with, attention_backward_workspace, attention_with,
    attention_workspace,
};
use graft_kernels::philox::{self, Key};
use graft_kernels::{Float, Isa, Real};
use proptest::prelude::*;

/// A problem with its inputs, which every type is rounded from. q, k and v are packed side by
/// side, with a gap after each row.
#[derive(Clone, Debug)]
pub struct Case {
    pub p: Attention,
    pub offsets: Vec<i64>,
    pub fused: Vec<f64>,
    pub dout: Vec<f64>,
}

/// Elements behind each row.
const GAP: usize = 3;

impl Case {
    pub fn new(p: Attention, lengths: &[usize], seed: u32) -> Case {
        let mut offsets = vec![0i64];
        for &n in lengths {
            offsets.push(offsets.last().unwrap() + n as i64);
        }
        let tokens = *offsets.last().unwrap() as usize;
        let width = (p.heads + 2 * p.kv_heads) * p.head_dim + GAP;
        // Multiples of 1/16 in -1..1 are exact in every type.
        let number = |stream: u32| {
            move |i| {
                (f64::from(philox::uniform(Key([seed, stream]), i as u64)) * 32.0).floor() / 16.0
                    - 1.0
            }
        };
        let fused = (0..tokens * width).map(number(0)).collect();
        let dout = (0..tokens * p.heads * p.head_dim).map(number(1)).collect();
        Case {
            p,
            offsets,
            fused,
            dout,
        }
    }

    pub fn tokens(&self) -> usize {
        *self.offsets.last().unwrap() as usize
    }

    /// Elements in a row, and where k and v begin in it.
    pub fn layout(&self) -> (usize, usize, usize) {
        let k = self.p.heads * self.p.head_dim;
        let kv = self.p.kv_heads * self.p.head_dim;
        (k + 2 * kv + GAP, k, k + kv)
    }

    pub fn packed<'a, T>(&self, fused: &'a [T]) -> [Packed<'a, T>; 3] {
        let (row_stride, k, v) = self.layout();
        [0, k, v].map(|first| Packed {
            data: fused.get(first..).unwrap_or(&[]),
            row_stride,
        })
    }

    pub fn row<'a>(&self, fused: &'a [f64], first: usize, t: usize, h: usize) -> &'a [f64] {
        &fused[t * self.layout().0 + first + h * self.p.head_dim..][..self.p.head_dim]
    }

    /// Output and lse by the definition.
    pub fn naive(&self, fused: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let p = &self.p;
        let (_, k, v) = self.layout();
        let (dim, tokens) = (p.head_dim, self.tokens());
        let mut out = vec![0.0; tokens * p.heads * dim];
        let mut lse = vec![f64::NEG_INFINITY; p.heads * tokens];
        for pair in self.offsets.windows(2) {
            let (start, len) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
            for (h, i) in (0..p.heads).flat_map(|h| (0..len).map(move |i| (h, i))) {
                let g = h * p.kv_heads / p.heads;
                let query = self.row(fused, 0, start + i, h);
                let seen = |j: &usize| {
                    (!p.causal || *j <= i) && p.window.is_none_or(|w| i.abs_diff(*j) < w)
                };
                let scores: Vec<(usize, f64)> = (0..len)
                    .filter(seen)
                    .map(|j| {
                        let key = self.row(fused, k, start + j, g);
                        let s = query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * p.scale;
                        (j, p.softcap.map_or(s, |c| c * (s / c).tanh()))
                    })
                    .collect();
                let sum: f64 = scores.iter().map(|(_, s)| s.exp()).sum();
                lse[h * tokens + start + i] = sum.ln();
                for (j, s) in scores {
                    let weight = s.exp() / sum * self.mask(h, start + i, j);
                    let value = self.row(fused, v, start + j, g);
                    let out = &mut out[((start + i) * p.heads + h) * dim..][..dim];
                    out.iter_mut()
                        .zip(value)
                        .for_each(|(o, v)| *o += weight * v);
                }
            }
        }
        (out, lse)
    }

    pub fn mask(&self, h: usize, token: usize, j: usize) -> f64 {
        let counter = [(j / 4) as u32, token as u32, h as u32, 1];
        let word = philox::block(self.p.key, counter)[j % 4];
        let kept = f64::from(word >> 8) / f64::from(1 << 24) >= self.p.dropout;
        if kept {
            1.0 / (1.0 - self.p.dropout)
        } else {
            0.0
        }
    }

    /// The weighted sum of the output whose gradient dout is.
    pub fn objective(&self, fused: &[f64]) -> f64 {
        self.naive(fused)
            .0
            .iter()
            .zip(&self.dout)
            .map(|(o, d)| o * d)
            .sum()
    }

    pub fn forward<T: Float>(&self, isa: Isa) -> (Vec<T>, Vec<T::Acc>) {
        let fused: Vec<T> = round(&self.fused);
        let [q, k, v] = self.packed(&fused);
        // NaN wherever something is read that has not been written.
        let nan = T::Acc::from_f64(f64::NAN);
        let mut out = vec![T::narrow(nan); self.dout.len()];
        let mut lse = vec![nan; self.tokens() * self.p.heads];
        let mut workspace = vec![nan; attention_workspace(&self.p, &self.offsets)];
        attention_with(
            isa,
            &self.p,
            &self.offsets,
            q,
            k,
            v,
            &mut out,
            &mut lse,
            &mut workspace,
        );
        (out, lse)
    }

    /// dq, dk, dv, those of them that `need` names.
    pub fn backward<T: Float>(&self, isa: Isa, need: [bool; 3]) -> [Option<Vec<T>>; 3] {
        let (out, lse) = self.forward::<T>(isa);
        let (fused, dout): (Vec<T>, Vec<T>) = (round(&self.fused), round(&self.dout));
        let [q, k, v] = self.packed(&fused);
        let nan = T::Acc::from_f64(f64::NAN);
        let sizes = [self.p.heads, self.p.kv_heads, self.p.kv_heads];
        let mut grads = [0, 1, 2].map(|i| {
            need[i].then(|| vec![T::narrow(nan); self.tokens() * sizes[i] * self.p.head_dim])
        });
        let [dq, dk, dv] = grads.each_mut().map(|grad| grad.as_deref_mut());
        let mut workspace = vec![nan; attention_backward_workspace(&self.p, &self.offsets)];
        attention_backward_with(
            isa,
            &self.p,
            &self.offsets,
            q,
            k,
            v,
            &out,
            &lse,
            &dout,
            dq,
            dk,
            dv,
            &mut workspace,
        );
        grads
    }
}

pub fn round<T: Float>(x: &[f64]) -> Vec<T> {
    x.iter().map(|&x| T::narrow(T::Acc::from_f64(x))).collect()
}

pub fn wide<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.widen().to_f64()).collect()
}

pub fn bits<T: Float>(x: &[T]) -> Vec<u64> {
    x.iter().map(|x| x.widen().to_f64().to_bits()).collect()
}

#[track_caller]
pub fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            g == w || (g - w).abs() <= tolerance * (1.0 + w.abs()),
            "{what}: element {i} is {g}, expected {w}"
        );
    }
}

/// Every combination of options, over shapes that cross the edges of tiles (8, 16, 32), strips
/// (32) and blocks (128).
pub fn cases(longest: usize) -> impl Strategy<Value = Case> {
    let heads = prop_oneof![Just((1, 1)), Just((2, 2)), Just((3, 1)), Just((4, 2))];
    let dim = prop_oneof![1usize..20, Just(32), Just(40), 60usize..70];
    let length = prop_oneof![4 => 0usize..40, 1 => 0usize..longest];
    let window = prop_oneof![
        2 => Just(None), 2 => (1usize..12).prop_map(Some), 1 => (1usize..200).prop_map(Some),
        1 => Just(Some(0)), 1 => Just(Some(usize::MAX))
    ];
    let softcap = prop_oneof![2 => Just(None), 1 => (0.5f64..20.0).prop_map(Some)];
    let dropout = prop_oneof![2 => Just(0.0), 1 => 0.05f64..0.9];
    let lengths = proptest::collection::vec(length, 0..4);
    (
        heads,
        dim,
        any::<bool>(),
        window,
        softcap,
        dropout,
        lengths,
        any::<u32>(),
    )
        .prop_map(
            |((heads, kv_heads), head_dim, causal, window, softcap, dropout, lengths, seed)| {
                let scale = 1.5 / (head_dim as f64).sqrt();
                let key = Key([seed, 77]);
                let p = Attention {
                    heads,
                    kv_heads,
                    head_dim,
                    causal,
                    window,
                    softcap,
                    scale,
                    dropout,
                    key,
                };
                Case::new(p, &lengths, seed)
            },
        )
}

/// All three gradients.
pub const FULL: [bool; 3] = [true; 3];
