//! Scaled dot-product attention over packed sequences of different lengths.
//!
//! For query i and key j of one sequence and one head: `s = scale * q_i · k_j`; with a softcap
//! `c`, `s = c * tanh(s / c)` (Gemma 2); `p = softmax over the visible j of s`; dropout on `p`;
//! `out_i = sum over j of p * v_j`. Heads are grouped as in J. Ainslie et al., "GQA",
//! arXiv:2305.13245: query head h reads key and value head `h / (heads / kv_heads)`.

use crate::element::{Float, Real};
use crate::philox::{self, Key};

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Query i sees keys `j <= i` only.
    pub causal: bool,
    /// Query i sees keys with `|i - j| < window` only.
    pub window: Option<usize>,
    /// Scores are squeezed into `-softcap..softcap`.
    pub softcap: Option<f64>,
    /// Factor on the products of queries and keys, usually `1 / sqrt(head_dim)`.
    pub scale: f64,
    /// Probability that an attention weight is dropped; the others grow by `1 / (1 - dropout)`.
    pub dropout: f64,
    /// The key of the dropout mask; unused if `dropout` is 0.
    pub key: Key,
}

/// Rows of tokens: head h of token t is `data[t * row_stride + h * head_dim ..][.. head_dim]`.
/// Queries, keys and values may so be read from one fused `[tokens, 3 * hidden]`, by giving
/// slices that start at the first query, key and value.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a, T> {
    /// The elements, from the first head of the first token.
    pub data: &'a [T],
    /// Elements from a token to the next.
    pub row_stride: usize,
}

impl<'a, T> Packed<'a, T> {
    /// Head `h` of token `t`.
    fn row(&self, t: usize, h: usize, dim: usize) -> &'a [T] {
        &self.data[t * self.row_stride + h * dim..][..dim]
    }
}

impl Attention {
    /// The keys that query `i` of a sequence of `len` tokens sees.
    fn visible(&self, i: usize, len: usize) -> std::ops::Range<usize> {
        let reach = self.window.unwrap_or(usize::MAX);
        let first = (i + 1).saturating_sub(reach);
        let end = if self.causal {
            i + 1
        } else {
            i.saturating_add(reach).min(len)
        };
        if reach == 0 { 0..0 } else { first..end }
    }
}

fn longest(offsets: &[i64]) -> usize {
    offsets
        .windows(2)
        .map(|pair| (pair[1] - pair[0]) as usize)
        .max()
        .unwrap_or(0)
}

/// Workspace of [`attention`], in elements of `T::Acc`.
pub fn attention_workspace(p: &Attention, offsets: &[i64]) -> usize {
    let _ = p;
    2 * longest(offsets)
}

/// Workspace of [`attention_backward`], in elements of `T::Acc`.
pub fn attention_backward_workspace(p: &Attention, offsets: &[i64]) -> usize {
    (2 * p.head_dim + 2) * longest(offsets) + p.head_dim
}

/// Scores of one query before and after the softcap.
fn scores<T: Float>(
    p: &Attention,
    q: &[T],
    k: &Packed<T>,
    first: usize,
    h: usize,
    range: std::ops::Range<usize>,
    raw: &mut [T::Acc],
) {
    for j in range {
        let k = k.row(first + j, h / (p.heads / p.kv_heads), p.head_dim);
        let mut sum = T::Acc::ZERO;
        for (q, k) in q.iter().zip(k) {
            sum += q.widen() * k.widen();
        }
        let s = sum.to_f64() * p.scale;
        raw[j] = T::Acc::from_f64(p.softcap.map_or(s, |c| c * (s / c).tanh()));
    }
}

fn mask(p: &Attention, h: usize, token: usize, j: usize) -> f64 {
    if p.dropout == 0.0 {
        return 1.0;
    }
    let words = philox::block(p.key, [j as u32 / 4, token as u32, h as u32, 1]);
    if words[j % 4] >> 8 >= philox::keep_from(p.dropout) {
        crate::dropout::kept_scale(p.dropout)
    } else {
        0.0
    }
}

/// Attention of every head over every sequence.
///
/// offsets: `[sequences + 1]`, rising from 0 to tokens; q: `[tokens, heads, head_dim]`, k and v:
/// `[tokens, kv_heads, head_dim]`, each with its own row stride; out: `[tokens, heads *
/// head_dim]`; lse: `[heads, tokens]`, ln of the sum of exponentials of each query's scores,
/// which the backward pass needs. A query that sees no key gets 0 and an lse of -infinity.
pub fn attention<T: Float>(
    p: &Attention,
    offsets: &[i64],
    q: Packed<T>,
    k: Packed<T>,
    v: Packed<T>,
    out: &mut [T],
    lse: &mut [T::Acc],
    workspace: &mut [T::Acc],
) {
    let (dim, tokens) = (p.head_dim, offsets.last().map_or(0, |&n| n as usize));
    for pair in offsets.windows(2) {
        let (first, len) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
        for h in 0..p.heads {
            for i in 0..len {
                let range = p.visible(i, len);
                scores(
                    p,
                    q.row(first + i, h, dim),
                    &k,
                    first,
                    h,
                    range.clone(),
                    workspace,
                );
                let max = workspace[range.clone()]
                    .iter()
                    .fold(T::Acc::NEG_INFINITY, |a, &b| a.max(b));
                let sum: f64 = workspace[range.clone()]
                    .iter()
                    .map(|&s| (s - max).to_f64().exp())
                    .sum();
                let total = max + T::Acc::from_f64(sum.ln());
                lse[h * tokens + first + i] = total;
                for c in 0..dim {
                    let mut value = 0.0;
                    for j in range.clone() {
                        let weight =
                            (workspace[j] - total).to_f64().exp() * mask(p, h, first + i, j);
                        value += weight
                            * v.row(first + j, h / (p.heads / p.kv_heads), dim)[c]
                                .widen()
                                .to_f64();
                    }
                    out[(first + i) * p.heads * dim + h * dim + c] =
                        T::narrow(T::Acc::from_f64(value));
                }
            }
        }
    }
}

/// The gradients of [`attention`]; those that are not asked for are not computed.
///
/// out, lse: as the forward pass left them; dout: the gradient of out, `[tokens, heads *
/// head_dim]`; dq: the same; dk, dv: `[tokens, kv_heads * head_dim]`.
pub fn attention_backward<T: Float>(
    p: &Attention,
    offsets: &[i64],
    q: Packed<T>,
    k: Packed<T>,
    v: Packed<T>,
    out: &[T],
    lse: &[T::Acc],
    dout: &[T],
    mut dq: Option<&mut [T]>,
    mut dk: Option<&mut [T]>,
    mut dv: Option<&mut [T]>,
    workspace: &mut [T::Acc],
) {
    let (dim, tokens) = (p.head_dim, offsets.last().map_or(0, |&n| n as usize));
    let group = p.heads / p.kv_heads;
    for pair in offsets.windows(2) {
        let (first, len) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
        for g in 0..p.kv_heads {
            let (score, rest) = workspace.split_at_mut(len);
            let (dks, rest) = rest.split_at_mut(len * dim);
            let (dvs, rest) = rest.split_at_mut(len * dim);
            let dqs = &mut rest[..dim];
            dks.fill(T::Acc::ZERO);
            dvs.fill(T::Acc::ZERO);
            for h in g * group..(g + 1) * group {
                for i in 0..len {
                    let range = p.visible(i, len);
                    let row = (first + i) * p.heads * dim + h * dim;
                    let (o, d) = (&out[row..row + dim], &dout[row..row + dim]);
                    let dot: f64 = o
                        .iter()
                        .zip(d)
                        .map(|(o, d)| (o.widen() * d.widen()).to_f64())
                        .sum();
                    let q = q.row(first + i, h, dim);
                    scores(p, q, &k, first, h, range.clone(), score);
                    dqs.fill(T::Acc::ZERO);
                    for j in range {
                        let s = score[j].to_f64();
                        let weight = (s - lse[h * tokens + first + i].to_f64()).exp();
                        let kept = mask(p, h, first + i, j);
                        let (k, v) = (k.row(first + j, g, dim), v.row(first + j, g, dim));
                        let dp: f64 = v
                            .iter()
                            .zip(d)
                            .map(|(v, d)| (v.widen() * d.widen()).to_f64())
                            .sum();
                        let mut ds = weight * (dp * kept - dot) * p.scale;
                        if let Some(c) = p.softcap {
                            ds *= 1.0 - (s / c) * (s / c);
                        }
                        let (ds, pd) = (T::Acc::from_f64(ds), T::Acc::from_f64(weight * kept));
                        for c in 0..dim {
                            dqs[c] += ds * k[c].widen();
                            dks[j * dim + c] += ds * q[c].widen();
                            dvs[j * dim + c] += pd * d[c].widen();
                        }
                    }
                    if let Some(dq) = &mut dq {
                        for c in 0..dim {
                            dq[row + c] = T::narrow(dqs[c]);
                        }
                    }
                }
            }
            for (to, from) in [(dk.as_deref_mut(), &*dks), (dv.as_deref_mut(), &*dvs)] {
                if let Some(to) = to {
                    for j in 0..len {
                        for c in 0..dim {
                            to[(first + j) * p.kv_heads * dim + g * dim + c] =
                                T::narrow(from[j * dim + c]);
                        }
                    }
                }
            }
        }
    }
}
