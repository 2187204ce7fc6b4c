//! Scores into attention weights, and the gradient of that.
//!
//! The body for any instruction set is here, AVX-512 has one of its own. Both are given the bare
//! products of queries and keys.

use super::Attention;
use super::plan::KEYS;
use super::tile::{COLS, Products};
#[cfg(target_arch = "x86_64")]
use super::{floats, floats_mut};
use crate::element::{Real, same};
use crate::math::{exp, tanh};
use crate::philox::{self, WIDE_ITEMS};
use crate::simd::{Isa, kernel};
use crate::sums::{fold, total};
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod keep;

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
    /// The visible columns of row r, within `from..to` and relative to `from`; none of a row that
    /// there is not.
    #[inline(always)]
    fn visible(&self, r: usize) -> Range<usize> {
        if r >= self.queries {
            return 0..0;
        }
        let keys = self.p.visible(self.first_query + r, self.len);
        let origin = self.first_key + self.from;
        let width = self.to - self.from;
        let first = keys.start.saturating_sub(origin).min(width);
        first..keys.end.saturating_sub(origin).clamp(first, width)
    }

    /// The token of row r, counted over all sequences, as it stands in the counter of its masks.
    #[inline(always)]
    fn token(&self, r: usize) -> u32 {
        (self.start + self.first_query + r) as u32
    }

    /// The dropout mask of row r, for columns `from..to`: 0 or 1.
    ///
    /// That of head h, query token t (counted over all sequences) and key j (within the sequence)
    /// is word `j % 4` of the Philox block with counter `[j / 4, t, h, 1]`, kept as in
    /// [`crate::dropout`].
    #[inline(always)]
    fn mask<'a, R: Real>(&self, r: usize, room: &'a mut [R; KEYS]) -> &'a [R] {
        let keep = philox::keep_from(self.p.dropout);
        let first = ((self.first_key + self.from) / 4) as u32;
        let rest = [self.token(r), self.head as u32, 1];
        let mask = &mut room[..self.to - self.from];
        for (n, part) in mask.chunks_mut(WIDE_ITEMS).enumerate() {
            let counter = first.wrapping_add((n * WIDE_ITEMS / 4) as u32);
            let words = philox::wide_blocks(self.p.key, counter, rest);
            for (x, word) in part.iter_mut().zip(words) {
                *x = if word >> 8 >= keep { R::ONE } else { R::ZERO };
            }
        }
        mask
    }
}

/// What a weight that is kept is multiplied with; 1 without dropout. Weights and their sums leave
/// this module short of it.
pub(super) fn grow(p: &Attention) -> f64 {
    crate::dropout::kept_scale(p.dropout)
}

/// Weights are powers of e, or of 2 on AVX-512: ln of the base, by which the maxima of [`softmax`]
/// count.
pub(super) fn unit<R: Real>(products: &Products<R>) -> R {
    if by_twos(products) {
        R::from_f64(std::f64::consts::LN_2)
    } else {
        R::ONE
    }
}

/// Whether the body for AVX-512 computes.
fn by_twos<R: Real>(products: &Products<R>) -> bool {
    matches!(products.isa, Isa::Avx512 | Isa::Avx512Bf16) && same::<R, f32>()
}

/// From a score as it lies in memory, squeezed if there is a softcap, to the exponent of e.
fn factor(p: &Attention) -> f64 {
    p.softcap.unwrap_or(p.factor())
}

/// One step of the online softmax (M. Milakov, N. Gimelshein, arXiv:1805.02867), as used by
/// T. Dao et al., "FlashAttention", arXiv:2205.14135: turns scores into `exp(s - max)`, 0 where dropped,
/// with the running maximum and sum of each row (before dropout), and rescales what the rows have
/// accumulated in `out` (`[queries, width]`) when their maximum has grown.
///
/// Where slots hold pairs, the weights of columns `from..` of a row are rounded to bf16 and lie
/// side by side from slot `from` on; the sums are those of the weights before rounding.
pub(super) fn softmax<R: Real>(
    products: &Products<R>,
    scores: Scores<'_>,
    s: &mut [R],
    max: &mut [R],
    sum: &mut [R],
    out: &mut [R],
    width: usize,
) {
    if scores.p.softcap.is_some() {
        squeeze(products.isa, scores, s);
    }
    #[cfg(target_arch = "x86_64")]
    if by_twos(products) {
        // SAFETY: the processor has the instructions, or `products` would be of others; R is f32.
        unsafe {
            let [s, max, sum, out] = [s, max, sum, out].map(|x| floats_mut(x));
            let rows = avx512::Rows::new(scores, s);
            if products.pairs() {
                avx512::softmax_pairs(rows, max, sum, out, width);
            } else {
                avx512::softmax_f32(rows, max, sum, out, width);
            }
        }
        return;
    }
    softmax_any(products.isa, scores, s, max, sum, out, width);
}

/// Turns scores into the weights `P` of the forward pass, 0 where dropped, and the gradient `dp` of
/// the dropped and grown weights (if given) into that of the scores before the softcap:
/// `dS = P * (dropout(dP) - dot) * (1 - tanh^2)`, where `dot` is the row's `out · dout`.
///
/// Where slots hold pairs, both are rounded to bf16: of rows 2i and 2i + 1, the weights lie in row
/// 2i of s, column by column, dS in row 2i + 1 likewise, and in dp row by row, side by side from
/// slot `from` on.
pub(super) fn gradient<R: Real>(
    products: &Products<R>,
    scores: Scores<'_>,
    s: &mut [R],
    dp: Option<&mut [R]>,
    lse: &[R],
    dot: &[R],
) {
    if scores.p.softcap.is_some() {
        squeeze(products.isa, scores, s);
    }
    #[cfg(target_arch = "x86_64")]
    if by_twos(products) {
        // SAFETY: as in `softmax`.
        unsafe {
            let (s, dp) = (floats_mut(s), dp.map(|dp| floats_mut(dp)));
            let [lse, dot] = [lse, dot].map(|x| floats(x));
            let rows = avx512::Rows::new(scores, s);
            if products.pairs() {
                avx512::gradient_pairs(rows, dp, lse, dot);
            } else {
                avx512::gradient_f32(rows, dp, lse, dot);
            }
        }
        return;
    }
    gradient_any(products.isa, scores, s, dp, lse, dot);
}

kernel! {
    /// tanh of what the softcap divides: the scores short of the cap.
    fn squeeze[A: Arch, R: Real](isa: Isa, scores: Scores<'_>, s: &mut [R]) {
        let factor = R::from_f64(scores.p.factor());
        for r in 0..scores.queries {
            let row = &mut s[r * scores.stride..][scores.from..scores.to];
            for x in row.as_chunks_mut::<COLS>().0 {
                for l in 0..COLS {
                    x[l] = tanh::<A, R>(x[l] * factor);
                }
            }
        }
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
    /// [`softmax`] on any instruction set.
    fn softmax_any[A: Arch, R: Real](
        isa: Isa, scores: Scores<'_>, s: &mut [R], max: &mut [R], sum: &mut [R], out: &mut [R],
        width: usize,
    ) {
        let zero = R::ZERO;
        let factor = R::from_f64(factor(scores.p));
        let mut room = [zero; KEYS];
        for r in 0..scores.queries {
            let row = &mut s[r * scores.stride..][scores.from..scores.to];
            for x in row.as_chunks_mut::<COLS>().0 {
                for l in 0..COLS {
                    x[l] = x[l] * factor;
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
    /// [`gradient`] on any instruction set.
    fn gradient_any[A: Arch, R: Real](
        isa: Isa, scores: Scores<'_>, s: &mut [R], dp: Option<&mut [R]>, lse: &[R], dot: &[R],
    ) {
        let mut dp = dp;
        let factor = R::from_f64(factor(scores.p));
        let grow = R::from_f64(grow(scores.p));
        let capped = scores.p.softcap.is_some();
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
            let (xs, _) = row.as_chunks_mut::<COLS>();
            match grad.as_deref_mut() {
                Some(grad) => {
                    for (x, g) in xs.iter_mut().zip(grad.as_chunks_mut::<COLS>().0) {
                        for l in 0..COLS {
                            let slope = if capped { R::ONE - x[l] * x[l] } else { R::ONE };
                            x[l] = exp::<A, R>(A::fma(x[l], factor, -lse));
                            g[l] = x[l] * A::fma(g[l], grow, -dot) * slope;
                        }
                    }
                }
                None => {
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
