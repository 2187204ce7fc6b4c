//! Weights on AVX-512, in powers of 2, and on AVX512_BF16 rounded to pairs of bf16.
//!
//! A strip of scores passes twice through registers: once for the maxima of its rows, once for
//! everything else. Rows are independent, and so are 32 columns of a row, which hides latencies.

use super::keep::{self, Bits};
use super::{Scores, factor, grow};
use crate::attention::plan::{KEYS, STRIP};
use std::arch::x86_64::*;
use std::f64::consts::LOG2_E;
use std::mem::transmute;
use std::ops::Range;

/// Columns of a register.
const LANES: usize = 16;

/// The scores of a strip.
pub(super) struct Rows<'a> {
    scores: Scores<'a>,
    s: *mut f32,
    /// From a score to the exponent of 2.
    factor: f32,
}

impl<'a> Rows<'a> {
    pub fn new(scores: Scores<'a>, s: &'a mut [f32]) -> Self {
        check(&scores, s);
        Rows {
            scores,
            s: s.as_mut_ptr(),
            factor: (factor(scores.p) * LOG2_E) as f32,
        }
    }
}

/// Rows come in pairs, whose second may be one of padding.
fn check(scores: &Scores, s: &[f32]) {
    let rows = scores.queries.next_multiple_of(2);
    assert!(
        scores.queries <= STRIP
            && (scores.to - scores.from).is_multiple_of(LANES)
            && scores.to <= scores.stride.min(KEYS)
            && s.len() >= rows * scores.stride,
        "attention: scores outside of their block"
    );
}

/// 2ˣ, at most 2 ulp from the true value, denormal results included; 0 in lanes without a bit in `lanes`.
#[inline]
#[target_feature(enable = "avx512f")]
#[allow(clippy::approx_constant)] // fitted, as all of them
fn exp2(lanes: u16, x: __m512) -> __m512 {
    // Far below every number, also where x is negative infinity; NaN stays.
    let x = _mm512_max_ps(_mm512_set1_ps(-160.0), x);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm512_sub_ps(x, n);
    // Fitted as those of `math`: relative error 9.2e-8 on -0.5 ..= 0.5.
    let mut p = _mm512_set1_ps(0.001_326_472_7);
    for c in [0.009_671_513, 0.055_507_336, 0.240_222_42, 0.693_147, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_maskz_scalef_ps(lanes, p, n)
}

/// The lanes of columns `at .. at + 16` that are in `columns`.
#[inline(always)]
fn lanes(columns: &Range<usize>, at: usize) -> u16 {
    if columns.start <= at && at + LANES <= columns.end {
        return !0;
    }
    let below = |end: usize| ((1u32 << end.saturating_sub(at).min(LANES)) - 1) as u16;
    below(columns.end) & !below(columns.start)
}

/// A row of which nothing is dropped.
const ALL: Bits = [!0; KEYS / LANES];

/// The halves of a register of bf16.
#[inline]
#[target_feature(enable = "avx512f")]
fn split(x: __m512i) -> [__m256i; 2] {
    [_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x)]
}

/// Writes the passes for one kind of slots.
macro_rules! passes {
    ($softmax:ident, $gradient:ident, $features:literal, $pairs:literal) => {
        /// [`softmax`](super::softmax).
        ///
        /// # Safety
        /// The processor has the instructions.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $softmax(
            rows: Rows,
            max: &mut [f32],
            sum: &mut [f32],
            out: &mut [f32],
            width: usize,
        ) {
            let Rows { scores, s, factor } = rows;
            let Scores {
                queries,
                from,
                to,
                stride,
                ..
            } = scores;
            let columns = to - from;
            let by = _mm512_set1_ps(factor);
            let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
            let (max, sum) = (&mut max[..queries], &mut sum[..queries]);
            let mut old = [0.0; STRIP];
            for r in 0..queries {
                let visible = scores.visible(r);
                let mut best = lowest;
                for at in (0..columns).step_by(LANES) {
                    // SAFETY: inside of row r.
                    let x = unsafe { _mm512_loadu_ps(s.add(r * stride + from + at)) };
                    // NaN is not looked for, the sum will show it.
                    let x = _mm512_mask_mul_ps(lowest, lanes(&visible, at), x, by);
                    best = _mm512_max_ps(x, best);
                }
                let here = _mm512_reduce_max_ps(best);
                old[r] = max[r];
                if here > max[r] {
                    max[r] = here;
                }
            }
            for r in 0..queries {
                if max[r] > old[r] && old[r] > f32::NEG_INFINITY {
                    let shrink = exp2(!0, _mm512_set1_ps(old[r] - max[r]));
                    sum[r] *= _mm512_cvtss_f32(shrink);
                    for x in out[r * width..(r + 1) * width].as_chunks_mut::<LANES>().0 {
                        // SAFETY: 16 elements.
                        unsafe {
                            let grown = _mm512_loadu_ps(x.as_ptr());
                            _mm512_storeu_ps(x.as_mut_ptr(), _mm512_mul_ps(grown, shrink));
                        }
                    }
                }
            }
            let masks = (scores.p.dropout > 0.0).then(|| keep::masks(&scores));
            for r in 0..queries {
                let visible = scores.visible(r);
                let kept = masks.as_ref().map_or(&ALL, |masks| &masks[r]);
                // No visible key so far: all lanes are masked.
                let shift = _mm512_set1_ps(max[r]);
                let mut sums = _mm512_setzero_ps();
                for at in (0..columns).step_by(LANES) {
                    // SAFETY: inside of row r; what is written lies before what is read next.
                    unsafe {
                        let row = s.add(r * stride + from);
                        let x = _mm512_loadu_ps(row.add(at));
                        let x = _mm512_fmsub_ps(x, by, shift);
                        let x = exp2(lanes(&visible, at), x);
                        sums = _mm512_add_ps(sums, x);
                        let x = _mm512_maskz_mov_ps(kept[at / LANES], x);
                        if $pairs {
                            let x = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x));
                            _mm256_storeu_si256(row.add(at / 2).cast(), x);
                        } else {
                            _mm512_storeu_ps(row.add(at), x);
                        }
                    }
                }
                sum[r] += _mm512_reduce_add_ps(sums);
            }
        }

        /// [`gradient`](super::gradient).
        ///
        /// # Safety
        /// The processor has the instructions.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $gradient(
            rows: Rows,
            dp: Option<&mut [f32]>,
            lse: &[f32],
            dot: &[f32],
        ) {
            let Rows { scores, s, factor } = rows;
            let Scores {
                queries,
                from,
                to,
                stride,
                ..
            } = scores;
            let dp = dp.map(|dp| {
                check(&scores, dp);
                dp.as_mut_ptr()
            });
            let columns = to - from;
            let by = _mm512_set1_ps(factor);
            let grow = _mm512_set1_ps(grow(scores.p) as f32);
            let capped = scores.p.softcap.is_some();
            let one = _mm512_set1_ps(1.0);
            let zero = _mm512_setzero_ps();
            let masks = (scores.p.dropout > 0.0).then(|| keep::masks(&scores));
            let interleaved = interleaving();
            for first in (0..queries).step_by(2) {
                let visible = [scores.visible(first), scores.visible(first + 1)];
                let mut shift = [zero; 2];
                let mut dots = [zero; 2];
                for n in 0..2.min(queries - first) {
                    shift[n] = _mm512_set1_ps(-lse[first + n] * LOG2_E as f32);
                    dots[n] = _mm512_set1_ps(-dot[first + n]);
                }
                let kept = match &masks {
                    Some(masks) => [&masks[first], &masks[first + 1]],
                    None => [&ALL; 2],
                };
                for at in (0..columns).step_by(LANES) {
                    let place = first * stride + from + at;
                    let mut weights = [zero; 2];
                    let mut grads = [zero; 2];
                    for n in 0..2 {
                        let lanes = lanes(&visible[n], at);
                        // SAFETY: inside of row first + n, which is there, if only as padding.
                        let (x, g) = unsafe {
                            let place = place + n * stride;
                            let g = dp.map(|dp| _mm512_loadu_ps(dp.add(place)));
                            (_mm512_loadu_ps(s.add(place)), g)
                        };
                        let weight = exp2(lanes, _mm512_fmadd_ps(x, by, shift[n]));
                        weights[n] = _mm512_maskz_mov_ps(kept[n][at / LANES], weight);
                        if let Some(g) = g {
                            // Where a weight was dropped, only the row's product remains.
                            let mut g =
                                _mm512_mask3_fmadd_ps(g, grow, dots[n], kept[n][at / LANES]);
                            if capped {
                                g = _mm512_mul_ps(g, _mm512_fnmadd_ps(x, x, one));
                            }
                            grads[n] = _mm512_maskz_mul_ps(lanes, weight, g);
                        }
                    }
                    // SAFETY: inside of the two rows; what is written lies where, or before
                    // where, these columns were read.
                    unsafe {
                        let to = [s.add(place), s.add(place + stride)];
                        if $pairs {
                            let pairs = |x: [__m512; 2]| {
                                transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(x[1], x[0]))
                            };
                            let pair = pairs(weights);
                            let pair = _mm512_permutexvar_epi16(interleaved, pair);
                            _mm512_storeu_si512(to[0].cast(), pair);
                            if let Some(dp) = dp {
                                let pair = pairs(grads);
                                let [a, b] = split(pair);
                                let row = dp.add(first * stride + from + at / 2);
                                _mm256_storeu_si256(row.cast(), a);
                                _mm256_storeu_si256(row.add(stride).cast(), b);
                                let pair = _mm512_permutexvar_epi16(interleaved, pair);
                                _mm512_storeu_si512(to[1].cast(), pair);
                            }
                        } else {
                            for n in 0..2 {
                                _mm512_storeu_ps(to[n], weights[n]);
                                if let Some(dp) = dp {
                                    _mm512_storeu_ps(dp.add(place + n * stride), grads[n]);
                                }
                            }
                        }
                    }
                }
            }
        }
    };
}

passes!(
    softmax_f32,
    gradient_f32,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
    false
);
passes!(
    softmax_pairs,
    gradient_pairs,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma",
    true
);

/// The order that makes columns of pairs of two rows that lie one after the other.
#[inline]
#[target_feature(enable = "avx512f")]
fn interleaving() -> __m512i {
    let mut order = [0u16; 32];
    for (i, from) in (0u16..).zip(&mut order) {
        *from = i / 2 + i % 2 * 16;
    }
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(order.as_ptr().cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    #[target_feature(enable = "avx512f")]
    fn powers(x: [f32; LANES]) -> [f32; LANES] {
        let mut y = [0.0; LANES];
        // SAFETY: 16 elements each.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), exp2(!0, _mm512_loadu_ps(x.as_ptr()))) };
        y
    }

    /// Against f64 over the whole range, and the numbers where something special happens.
    #[test]
    fn powers_of_two() {
        if !Isa::Avx512.is_available() {
            return;
        }
        let mut worst = 0.0f64;
        for n in 0..1_000_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|l| -149.0 + 276.0 * (n * LANES + l) as f32 / 16e6);
            // SAFETY: the processor has the instructions.
            let y = unsafe { powers(x) };
            for l in 0..LANES {
                let exact = f64::from(x[l]).exp2();
                // Distance to the next number at the exact value.
                let ulp = exact.log2().floor().max(-126.0).exp2() / f64::from(1 << 23);
                worst = worst.max((f64::from(y[l]) - exact).abs() / ulp);
            }
        }
        assert!(worst < 2.0, "{worst} ulp");
        let special = [
            (0.0, 1.0),
            (1.0, 2.0),
            (-160.0, 0.0),
            (-1e30, 0.0),
            (f32::NEG_INFINITY, 0.0),
            (128.0, f32::INFINITY),
        ];
        for (x, y) in special {
            // SAFETY: as above.
            assert_eq!(unsafe { powers([x; LANES]) }, [y; LANES], "2^{x}");
        }
        // SAFETY: as above.
        let nan = unsafe { powers([f32::NAN; LANES]) };
        assert!(nan.iter().all(|y| y.is_nan()));
    }

    #[test]
    fn lanes_are_the_columns_inside() {
        assert_eq!(lanes(&(0..128), 16), 0xffff);
        assert_eq!(lanes(&(3..128), 0), 0xfff8);
        assert_eq!(lanes(&(3..5), 0), 0x18);
        assert_eq!(lanes(&(3..18), 16), 0x3);
        assert_eq!(lanes(&(3..16), 16), 0);
        assert_eq!(lanes(&(20..20), 16), 0);
    }
}
