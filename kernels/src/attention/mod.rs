//! Scaled dot-product attention over packed sequences of different lengths.
//!
//! For query i and key j of one sequence and one head: `s = scale * q_i · k_j`; with a softcap
//! `c`, `s = c * tanh(s / c)` (Gemma 2); `p = softmax over the visible j of s`; dropout on `p`;
//! `out_i = sum over j of p * v_j`. Heads are grouped as in J. Ainslie et al., "GQA",
//! arXiv:2305.13245: query head h reads key and value head `h / (heads / kv_heads)`.
//!
//! Products, softmax and sums are in `T::Acc`. Where bf16 is stored and the processor multiplies pairs
//! of it (AVX512_BF16), the weights and the gradients of the scores are rounded to bf16 between two
//! products; scores, maxima, sums and accumulators stay f32, and so do the sums of weights that
//! results are divided by, which are those before rounding.

mod backward;
mod cached;
mod forward;
mod plan;
mod rows;
mod tile;
mod weights;

pub use cached::{Kept, attention_cached, attention_cached_with, attention_cached_workspace};

use crate::element::Float;
use crate::philox::Key;
use crate::simd::public;
use plan::Plan;
use rows::Source;
use std::ops::Range;
use tile::COLS;

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
    /// Head `h` of tokens `first .. first + rows`.
    fn head(&self, first: usize, rows: usize, h: usize, dim: usize) -> Source<'a, T> {
        self.heads(first, rows, h..h + 1, dim)
    }

    /// Heads that lie side by side of tokens `first .. first + rows`.
    fn heads(&self, first: usize, rows: usize, heads: Range<usize>, dim: usize) -> Source<'a, T> {
        let data = if rows == 0 {
            &[]
        } else {
            &self.data[first * self.row_stride + heads.start * dim..]
        };
        Source {
            data,
            stride: self.row_stride,
            rows,
            dim: heads.len() * dim,
        }
    }
}

/// What is computed in f32, as such.
///
/// # Safety
/// R is f32.
#[cfg(target_arch = "x86_64")]
unsafe fn floats<R>(x: &[R]) -> &[f32] {
    // SAFETY: by the caller.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), x.len()) }
}

/// [`floats`], to write.
///
/// # Safety
/// R is f32.
#[cfg(target_arch = "x86_64")]
unsafe fn floats_mut<R>(x: &mut [R]) -> &mut [f32] {
    // SAFETY: by the caller.
    unsafe { std::slice::from_raw_parts_mut(x.as_mut_ptr().cast(), x.len()) }
}

impl Attention {
    /// The keys that query `i` of a sequence of `len` tokens sees.
    #[inline]
    fn visible(&self, i: usize, len: usize) -> Range<usize> {
        let reach = self.window.unwrap_or(usize::MAX);
        if reach == 0 {
            return 0..0;
        }
        let end = if self.causal {
            i + 1
        } else {
            i.saturating_add(reach).min(len)
        };
        (i + 1).saturating_sub(reach)..end
    }

    /// From a product of query and key to what the softmax, or the softcap's tanh, is taken of.
    #[inline]
    fn factor(&self) -> f64 {
        self.scale / self.softcap.unwrap_or(1.0)
    }

    /// From the first key that one of the queries sees to the last.
    fn visible_to(&self, queries: Range<usize>, len: usize) -> Range<usize> {
        self.visible(queries.start, len).start..self.visible(queries.end - 1, len).end
    }

    /// The columns, of a block of `count` keys from `block` on, that one of the queries sees,
    /// widened to whole tiles; none if there are none.
    fn columns(
        &self,
        queries: Range<usize>,
        len: usize,
        block: usize,
        count: usize,
    ) -> Option<(usize, usize)> {
        let seen = self.visible_to(queries, len);
        let (first, end) = (seen.start.max(block), seen.end.min(block + count));
        (first < end).then(|| {
            (
                (first - block) / COLS * COLS,
                (end - block).next_multiple_of(COLS),
            )
        })
    }

    /// Checks what both passes are given; returns the number of tokens.
    fn check<'a, T: 'a>(
        &self,
        who: &str,
        offsets: &[i64],
        operands: impl IntoIterator<Item = (&'static str, &'a Packed<'a, T>, usize)>,
    ) -> usize {
        let Attention {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *self;
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads) && head_dim > 0,
            "{who}: {heads} heads of {head_dim} dimensions over {kv_heads} key heads"
        );
        assert!(
            offsets.first().is_none_or(|&first| first == 0) && offsets.is_sorted(),
            "{who}: offsets do not rise from 0"
        );
        let tokens = offsets.last().map_or(0, |&last| last as usize);
        for (name, rows, heads) in operands {
            let need = match tokens {
                0 => 0,
                _ => (tokens - 1) * rows.row_stride + heads * head_dim,
            };
            assert!(
                rows.data.len() >= need,
                "{who}: {name} has {} elements, {tokens} rows {} apart need {need}",
                rows.data.len(),
                rows.row_stride
            );
        }
        tokens
    }
}

/// Workspace of [`attention`], in elements of `T::Acc`.
pub fn attention_workspace(p: &Attention, offsets: &[i64]) -> usize {
    let plan = Plan::forward(p, offsets);
    plan.workspace(forward::lane(&plan))
}

/// Workspace of [`attention_backward`], in elements of `T::Acc`.
pub fn attention_backward_workspace(p: &Attention, offsets: &[i64]) -> usize {
    let plan = Plan::backward(p, offsets);
    plan.workspace(backward::lane(&plan, p))
}

public! {
    /// Attention of every head over every sequence.
    ///
    /// offsets: `[sequences + 1]`, rising from 0 to tokens, equal neighbours being an empty sequence;
    /// q: `[tokens, heads, head_dim]`, k and v: `[tokens, kv_heads, head_dim]`, each with its own row
    /// stride; out: `[tokens, heads * head_dim]`; lse: `[heads, tokens]`, ln of the sum of
    /// exponentials of each query's scores, which the backward pass needs; workspace: at least
    /// [`attention_workspace`]. A query that sees no key gets 0 and an lse of -infinity.
    ///
    /// # Panics
    /// If the sizes do not fit each other.
    pub fn attention, attention_with[T: Float](
        isa: Isa,
        p: &Attention,
        offsets: &[i64],
        q: Packed<T>,
        k: Packed<T>,
        v: Packed<T>,
        out: &mut [T],
        lse: &mut [T::Acc],
        workspace: &mut [T::Acc],
    ) {
        let operands = [
            ("q", &q, p.heads),
            ("k", &k, p.kv_heads),
            ("v", &v, p.kv_heads),
        ];
        let tokens = p.check("attention", offsets, operands);
        let width = p.heads * p.head_dim;
        assert_eq!(
            out.len(),
            tokens * width,
            "attention: out is not [tokens, heads * head_dim]"
        );
        assert_eq!(
            lse.len(),
            p.heads * tokens,
            "attention: lse is not [heads, tokens]"
        );
        let need = attention_workspace(p, offsets);
        assert!(
            workspace.len() >= need,
            "attention: workspace of {} elements, {need} needed",
            workspace.len()
        );
        forward::run(isa, p, offsets, [q, k, v], out, lse, workspace);
    }
}

public! {
    /// The gradients of [`attention`]; those that are not asked for are not computed.
    ///
    /// offsets, q, k, v: as in the forward pass; out, lse: as it left them; dout: the gradient of
    /// out; dq: `[tokens, heads * head_dim]`; dk, dv: `[tokens, kv_heads * head_dim]`; workspace: at
    /// least [`attention_backward_workspace`]. Scores are recomputed block by block from q, k and lse,
    /// as in T. Dao et al., "FlashAttention", arXiv:2205.14135.
    ///
    /// # Panics
    /// If the sizes do not fit each other.
    pub fn attention_backward, attention_backward_with[T: Float](
        isa: Isa,
        p: &Attention,
        offsets: &[i64],
        q: Packed<T>,
        k: Packed<T>,
        v: Packed<T>,
        out: &[T],
        lse: &[T::Acc],
        dout: &[T],
        dq: Option<&mut [T]>,
        dk: Option<&mut [T]>,
        dv: Option<&mut [T]>,
        workspace: &mut [T::Acc],
    ) {
        let operands = [
            ("q", &q, p.heads),
            ("k", &k, p.kv_heads),
            ("v", &v, p.kv_heads),
        ];
        let tokens = p.check("attention_backward", offsets, operands);
        let (width, kv_width) = (p.heads * p.head_dim, p.kv_heads * p.head_dim);
        for (name, len, width) in [
            ("out", Some(out.len()), width),
            ("dout", Some(dout.len()), width),
            ("dq", dq.as_ref().map(|grad| grad.len()), width),
            ("dk", dk.as_ref().map(|grad| grad.len()), kv_width),
            ("dv", dv.as_ref().map(|grad| grad.len()), kv_width),
            ("lse", Some(lse.len()), p.heads),
        ] {
            assert!(
                len.is_none_or(|len| len == tokens * width),
                "attention_backward: {name} does not have {width} elements for each of {tokens} tokens"
            );
        }
        let need = attention_backward_workspace(p, offsets);
        assert!(
            workspace.len() >= need,
            "attention_backward: workspace of {} elements, {need} needed",
            workspace.len()
        );
        backward::run(
            isa,
            p,
            offsets,
            [q, k, v],
            [out, dout],
            lse,
            [dq, dk, dv],
            workspace,
        );
    }
}
