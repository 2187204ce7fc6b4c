//! What happens to whole rows: packing of operands, softmax of scores, and its gradient.

use super::Attention;
use super::plan::KEYS;
use super::tile::COLS;
use crate::element::{Float, Real};
use crate::gemm::{self, MatRef};
use crate::math::{exp, tanh};
use crate::philox::{self, WIDE_ITEMS};
use crate::shared::Shared;
use crate::simd::{Isa, kernel};
use crate::sums::{each_lane, fold, total};
use std::ops::Range;

/// Rows `stride` apart, of which `dim` elements count.
#[derive(Clone, Copy)]
pub(super) struct Source<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub rows: usize,
    pub dim: usize,
}

impl<'a, T> Source<'a, T> {
    #[inline(always)]
    pub fn row(&self, r: usize) -> &'a [T] {
        &self.data[r * self.stride..][..self.dim]
    }

    /// Rows `first .. first + rows`.
    pub fn rows(&self, first: usize, rows: usize) -> Self {
        Source {
            data: &self.data[first * self.stride..],
            rows,
            ..*self
        }
    }
}

kernel! {
    /// `dst[r, c] = src[r, c] * factor`, `[rows_padded, dim_padded]`, zeros around it.
    pub(super) fn pack_rows[A: Arch, T: Float](
        isa: Isa, src: Source<'_, T>, factor: T::Acc, dst: &mut [T::Acc], dim_padded: usize,
    ) {
        for (r, dst) in dst.chunks_exact_mut(dim_padded).enumerate() {
            if r < src.rows {
                for (y, x) in dst.iter_mut().zip(src.row(r)) {
                    *y = x.widen() * factor;
                }
                dst[src.dim..].fill(T::Acc::ZERO);
            } else {
                dst.fill(T::Acc::ZERO);
            }
        }
    }
}

/// Transposes rows into panels as wide as the tiles, `[panels, dim, width]`, with zeros after the
/// last row; see [`gemm::pack_panels`].
pub(super) fn pack_panels<T: Float>(isa: Isa, src: Source<'_, T>, dst: &mut [T::Acc]) {
    let Source {
        data,
        stride,
        rows,
        dim,
    } = src;
    let x = MatRef {
        data,
        rows,
        cols: dim,
        row_stride: stride,
        col_stride: 1,
    };
    gemm::pack_panels(isa, x, dst);
}

/// A rectangle of scores: rows are queries, columns keys of one sequence and head.
#[derive(Clone, Copy)]
pub(super) struct Scores<'a> {
    pub p: &'a Attention,
    pub head: usize,
    /// Tokens of the sequence, and where it begins among all tokens.
    pub len: usize,
    pub start: usize,
    /// The queries of the rows, and the key of column 0, both within the sequence.
    pub first_query: usize,
    pub queries: usize,
    pub first_key: usize,
    /// The columns that are computed: multiples of [`COLS`].
    pub from: usize,
    pub to: usize,
    /// Elements from a row to the next.
    pub stride: usize,
}

impl Scores<'_> {
    /// The visible columns of row r, within `from..to` and relative to `from`.
    #[inline(always)]
    fn visible(&self, r: usize) -> Range<usize> {
        let keys = self.p.visible(self.first_query + r, self.len);
        let origin = self.first_key + self.from;
        let width = self.to - self.from;
        let first = keys.start.saturating_sub(origin).min(width);
        first..keys.end.saturating_sub(origin).clamp(first, width)
    }

    /// The dropout mask of row r, for columns `from..to`: 0 or 1 / (1 - dropout).
    ///
    /// That of head h, query token t (counted over all sequences) and key j (within the sequence)
    /// is word `j % 4` of the Philox block with counter `[j / 4, t, h, 1]`, kept as in
    /// [`crate::dropout`].
    #[inline(always)]
    fn mask<'a, R: Real>(&self, r: usize, room: &'a mut [R; KEYS]) -> &'a [R] {
        let p = self.p;
        let keep = philox::keep_from(p.dropout);
        let scale = R::from_f64(crate::dropout::kept_scale(p.dropout));
        let token = (self.start + self.first_query + r) as u32;
        let first = ((self.first_key + self.from) / 4) as u32;
        let rest = [token, self.head as u32, 1];
        let mask = &mut room[..self.to - self.from];
        for (n, part) in mask.chunks_mut(WIDE_ITEMS).enumerate() {
            let counter = first.wrapping_add((n * WIDE_ITEMS / 4) as u32);
            let words = philox::wide_blocks(p.key, counter, rest);
            if let Some(part) = part.first_chunk_mut::<WIDE_ITEMS>() {
                for i in 0..WIDE_ITEMS {
                    part[i] = if words[i] >> 8 >= keep {
                        scale
                    } else {
                        R::ZERO
                    };
                }
            } else {
                for (x, word) in part.iter_mut().zip(words) {
                    *x = if word >> 8 >= keep { scale } else { R::ZERO };
                }
            }
        }
        mask
    }
}

/// `x[i] = x[i] * mask[i]`
#[inline(always)]
fn multiply<R: Real>(x: &mut [R], mask: &[R]) {
    for (x, &by) in x.iter_mut().zip(mask) {
        *x = *x * by;
    }
}

kernel! {
    /// One step of the online softmax (M. Milakov, N. Gimelshein, arXiv:1805.02867), as used by
    /// T. Dao et al., "FlashAttention", arXiv:2205.14135: turns scores into `exp(s - max)`,
    /// dropout applied, with the running maximum and sum of each row, and rescales what the rows
    /// have accumulated in `out` (`[queries, width]`) when their maximum has grown.
    ///
    /// With a softcap, the scores come divided by it.
    pub(super) fn softmax[A: Arch, R: Real](
        isa: Isa, scores: Scores<'_>, s: &mut [R], max: &mut [R], sum: &mut [R], out: &mut [R],
        width: usize,
    ) {
        let zero = R::ZERO;
        let mut room = [zero; KEYS];
        for r in 0..scores.queries {
            let row = &mut s[r * scores.stride..][scores.from..scores.to];
            if let Some(c) = scores.p.softcap {
                let c = R::from_f64(c);
                for x in row.as_chunks_mut::<COLS>().0 {
                    for l in 0..COLS {
                        x[l] = c * tanh::<A, R>(x[l]);
                    }
                }
            }
            let visible = scores.visible(r);
            row[visible.end..].fill(R::NEG_INFINITY);
            row[..visible.start].fill(R::NEG_INFINITY);
            let (chunks, _) = row.as_chunks_mut::<COLS>();
            let mut best = [R::NEG_INFINITY; COLS];
            for x in chunks.iter() {
                for l in 0..COLS {
                    best[l] = if x[l] > best[l] { x[l] } else { best[l] };
                }
            }
            // NaN is not looked for, the sum will show it: that would cost the forward pass 3%.
            let (old, here) = (max[r], fold(best, |a, b| if a > b { a } else { b }));
            let new = if here > old { here } else { old };
            // No visible key so far: any finite shift gives weights of 0 and not NaN.
            let shift = if new == R::NEG_INFINITY { zero } else { new };
            let mut sums = [zero; COLS];
            for x in chunks.iter_mut() {
                for l in 0..COLS {
                    x[l] = exp::<A, R>(x[l] - shift);
                    sums[l] += x[l];
                }
            }
            if new > old && old > R::NEG_INFINITY {
                let shrink = exp::<A, R>(old - shift);
                sum[r] = sum[r] * shrink;
                for x in &mut out[r * width..(r + 1) * width] {
                    *x = *x * shrink;
                }
            }
            sum[r] += total(sums);
            max[r] = new;
            if scores.p.dropout > 0.0 {
                multiply(row, scores.mask(r, &mut room));
            }
        }
    }
}

kernel! {
    /// Turns scores into the weights `P` of the forward pass, dropout applied, and the gradient
    /// `dp` of the weights (if given) into that of the scores before the softcap:
    /// `dS = P * (dropout(dP) - dot) * (1 - tanh^2)`, where `dot` is the row's `out · dout`.
    /// Scores come as bare products of queries and keys.
    pub(super) fn gradient[A: Arch, R: Real](
        isa: Isa, scores: Scores<'_>, s: &mut [R], dp: Option<&mut [R]>, lse: &[R],
        dot: &[R],
    ) {
        let mut dp = dp;
        let factor = R::from_f64(scores.p.factor());
        let mut room = [R::ZERO; KEYS];
        for r in 0..scores.queries {
            let at = r * scores.stride;
            let row = &mut s[at + scores.from..at + scores.to];
            let visible = scores.visible(r);
            let (lse, dot) = (lse[r], dot[r]);
            let mut grad = dp.as_deref_mut().map(|dp| &mut dp[at + scores.from..at + scores.to]);
            let mask = (scores.p.dropout > 0.0).then(|| scores.mask(r, &mut room));
            if let (Some(mask), Some(grad)) = (mask, grad.as_deref_mut()) {
                multiply(grad, mask);
            }
            let capped = scores.p.softcap.map(R::from_f64);
            let (xs, _) = row.as_chunks_mut::<COLS>();
            match (grad.as_deref_mut(), capped) {
                (Some(grad), Some(c)) => {
                    for (x, g) in xs.iter_mut().zip(grad.as_chunks_mut::<COLS>().0) {
                        for l in 0..COLS {
                            let t = tanh::<A, R>(x[l] * factor);
                            x[l] = exp::<A, R>(A::fma(c, t, -lse));
                            g[l] = x[l] * (g[l] - dot) * (R::ONE - t * t);
                        }
                    }
                }
                (Some(grad), None) => {
                    for (x, g) in xs.iter_mut().zip(grad.as_chunks_mut::<COLS>().0) {
                        for l in 0..COLS {
                            x[l] = exp::<A, R>(A::fma(x[l], factor, -lse));
                            g[l] = x[l] * (g[l] - dot);
                        }
                    }
                }
                (None, Some(c)) => {
                    for x in xs {
                        for l in 0..COLS {
                            x[l] = exp::<A, R>(A::fma(c, tanh::<A, R>(x[l] * factor), -lse));
                        }
                    }
                }
                (None, None) => {
                    for x in xs {
                        for l in 0..COLS {
                            x[l] = exp::<A, R>(A::fma(x[l], factor, -lse));
                        }
                    }
                }
            }
            // Whatever the hidden scores gave, infinity and NaN included, is not theirs to add.
            for row in [Some(&mut *row), grad].into_iter().flatten() {
                row[..visible.start].fill(R::ZERO);
                row[visible.end..].fill(R::ZERO);
            }
            if let Some(mask) = mask {
                multiply(row, mask);
            }
        }
    }
}

kernel! {
    /// `out · dout` of each row, for the gradient of the softmax.
    pub(super) fn dots[A: Arch, T: Float](
        isa: Isa, out: Source<'_, T>, dout: Source<'_, T>, dots: &mut [T::Acc],
    ) {
        for r in 0..out.rows {
            let (x, y) = (out.row(r), dout.row(r));
            let mut sums = [T::Acc::ZERO; COLS];
            each_lane!(COLS; [x = x, y = y], |lane| {
                sums[lane] = A::fma(x.widen(), y.widen(), sums[lane]);
            });
            dots[r] = total(sums);
        }
    }
}

/// Rows of an output, each `dim` long, from element `first` on and `stride` apart.
pub(super) struct Target<'a, T> {
    out: &'a Shared<T>,
    first: usize,
    stride: usize,
    dim: usize,
}

impl<'a, T> Target<'a, T> {
    /// # Safety
    /// Nobody else uses these rows as long as this exists.
    pub unsafe fn new(out: &'a Shared<T>, first: usize, stride: usize, dim: usize) -> Self {
        Target {
            out,
            first,
            stride,
            dim,
        }
    }
}

kernel! {
    /// Rounds rows of sums to storage, times `by`; sums: `[rows, padded]`.
    pub(super) fn write[A: Arch, T: Float](
        isa: Isa, sums: &[T::Acc], padded: usize, by: T::Acc, target: Target<'_, T>,
    ) {
        for (r, sums) in sums.chunks_exact(padded).enumerate() {
            // SAFETY: by the maker of the target.
            let out = unsafe { target.out.part(target.first + r * target.stride, target.dim) };
            for (y, x) in out.iter_mut().zip(sums) {
                *y = T::narrow(*x * by);
            }
        }
    }
}
