//! Attention of one query on AVX-512: what it reads of the cache goes through registers once.

use super::super::rows::Source;
use super::{ROWS_AHEAD, ask};
use crate::avx512::load16;
use crate::element::Float;
use std::arch::x86_64::*;

/// Keys whose products are in registers at once.
const KEYS: usize = 16;
/// Columns of a register.
const LANES: usize = 16;
/// Columns of values that are summed together.
const STRIPE: usize = 4 * LANES;

/// As [`super::products`].
///
/// # Safety
/// T is `f32`, `bf16` or `f16`; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn products<T: Float>(query: &[f32], k: Source<'_, T>, scores: &mut [f32]) {
    let (heads, rest) = (query.len() / k.dim, k.dim % LANES);
    assert!(
        scores.len() == heads * k.rows,
        "attention_cached: a score for each head and key"
    );
    ask(k, 0..ROWS_AHEAD);
    for first in (0..k.rows).step_by(KEYS) {
        ask(k, first + ROWS_AHEAD..first + ROWS_AHEAD + KEYS);
        let count = KEYS.min(k.rows - first);
        // Behind the last key it is taken again, for nothing.
        let mut keys = [k.row(first + count - 1).as_ptr(); KEYS];
        for (i, key) in keys.iter_mut().enumerate().take(count - 1) {
            *key = k.row(first + i).as_ptr();
        }
        for h in 0..heads {
            let query = query[h * k.dim..][..k.dim].as_ptr();
            let mut sums = [_mm512_setzero_ps(); KEYS];
            // SAFETY: a query and keys have k.dim columns; head h has a score for each key.
            unsafe {
                for c in (0..k.dim - rest).step_by(LANES) {
                    let x = _mm512_loadu_ps(query.add(c));
                    for i in 0..KEYS {
                        sums[i] = _mm512_fmadd_ps(x, load16(keys[i].add(c), LANES), sums[i]);
                    }
                }
                if rest > 0 {
                    let c = k.dim - rest;
                    let x = load16(query.add(c), rest);
                    for i in 0..KEYS {
                        sums[i] = _mm512_fmadd_ps(x, load16(keys[i].add(c), rest), sums[i]);
                    }
                }
                let to = scores.as_mut_ptr().add(h * k.rows + first);
                _mm512_mask_storeu_ps(to, ((1u32 << count) - 1) as u16, totals(sums));
            }
        }
    }
}

/// The sum of each register.
#[inline]
#[target_feature(enable = "avx512f")]
fn totals(sums: [__m512; KEYS]) -> __m512 {
    // Afterwards, each 128 bits of quads[g] are parts of the sums of registers 4g .. 4g + 4.
    let mut quads = [_mm512_setzero_ps(); 4];
    for g in 0..4 {
        let (a, b) = (sums[4 * g], sums[4 * g + 1]);
        let (c, d) = (sums[4 * g + 2], sums[4 * g + 3]);
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        quads[g] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
            _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
        );
    }
    halves(halves(quads[0], quads[1]), halves(quads[2], quads[3]))
}

/// Sums of the even and the odd 128 bits of both.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(
        _mm512_shuffle_f32x4::<0x88>(a, b),
        _mm512_shuffle_f32x4::<0xdd>(a, b),
    )
}

/// As [`super::weighted_sum`].
///
/// # Safety
/// T is `f32`, `bf16` or `f16`; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn weighted_sum<T: Float>(weights: &[f32], v: Source<'_, T>, out: &mut [f32]) {
    assert!(
        weights.len() == v.rows && out.len() == v.dim,
        "attention_cached: a weight for each value"
    );
    for (stripe, out) in out.chunks_mut(STRIPE).enumerate() {
        let first = stripe * STRIPE;
        // SAFETY: by the caller; a stripe ends where the row does.
        unsafe {
            match out.len() {
                STRIPE => summed::<T, 4, true>(weights, v, first, out),
                49.. => summed::<T, 4, false>(weights, v, first, out),
                48 => summed::<T, 3, true>(weights, v, first, out),
                33.. => summed::<T, 3, false>(weights, v, first, out),
                32 => summed::<T, 2, true>(weights, v, first, out),
                17.. => summed::<T, 2, false>(weights, v, first, out),
                16 => summed::<T, 1, true>(weights, v, first, out),
                _ => summed::<T, 1, false>(weights, v, first, out),
            }
        }
    }
}

/// Columns from `first` on, in V registers, the last of which is full if FULL.
///
/// # Safety
/// As [`weighted_sum`]; rows have so many columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn summed<T: Float, const V: usize, const FULL: bool>(
    weights: &[f32],
    v: Source<'_, T>,
    first: usize,
    out: &mut [f32],
) {
    let rest = if FULL {
        LANES
    } else {
        out.len() - (V - 1) * LANES
    };
    // Two rows in turns: sums wait for each other less.
    let mut sums = [[_mm512_setzero_ps(); V]; 2];
    for (n, weights) in weights.chunks(2).enumerate() {
        if first == 0 {
            ask(v, 2 * n + ROWS_AHEAD..2 * n + ROWS_AHEAD + 2);
        }
        for (row, &weight) in weights.iter().enumerate() {
            let (src, weight) = (v.row(2 * n + row)[first..].as_ptr(), _mm512_set1_ps(weight));
            for c in 0..V {
                let lanes = if c + 1 < V { LANES } else { rest };
                // SAFETY: by the caller.
                let value = unsafe { load16(src.add(c * LANES), lanes) };
                sums[row][c] = _mm512_fmadd_ps(weight, value, sums[row][c]);
            }
        }
    }
    for (c, out) in out.chunks_mut(LANES).enumerate() {
        let mask = ((1u32 << out.len()) - 1) as u16;
        let sum = _mm512_add_ps(sums[0][c], sums[1][c]);
        // SAFETY: as many columns as there are.
        unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, sum) };
    }
}
