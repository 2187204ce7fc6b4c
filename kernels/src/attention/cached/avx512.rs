//! Attention of one query on AVX-512: what it reads of the cache goes through registers once.

use super::super::rows::Source;
use super::{Heads, ROWS, STRIPE, ask};
use crate::avx512::load16;
use crate::element::Float;
use std::arch::x86_64::*;

/// Keys whose products are in registers at once.
const KEYS: usize = 16;
/// Columns of a register.
const LANES: usize = 16;
/// Bytes of a line of the caches.
const LINE: usize = 64;

/// As [`super::products`].
///
/// # Safety
/// T is `f32`, `bf16` or `f16`; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn products<T: Float>(
    each: Heads,
    query: &[f32],
    [k, then]: [Source<'_, T>; 2],
    scores: &mut [f32],
) {
    let (heads, rest) = (query.len() / each.dim, each.dim % LANES);
    assert!(
        scores.len() == heads * k.rows && each.column(heads - 1) + each.dim <= k.dim,
        "attention_cached: a score for each head and key"
    );
    ask(k, 0..2 * KEYS);
    // A hint is dropped while as many reads are on their way as a core can have: each is given twice.
    let mut keys = block(k, then, 0);
    let mut next = block(k, then, 1);
    for first in (0..k.rows).step_by(KEYS) {
        let count = KEYS.min(k.rows - first);
        let far = block(k, then, first / KEYS + 2);
        for h in 0..heads {
            let query = query[h * each.dim..][..each.dim].as_ptr();
            let column = each.column(h);
            let mut sums = [_mm512_setzero_ps(); KEYS];
            // SAFETY: a query has each.dim columns, keys as many from `column` on; head h has a score for each key.
            unsafe {
                for c in (0..each.dim - rest).step_by(LANES) {
                    let x = _mm512_loadu_ps(query.add(c));
                    for i in 0..KEYS {
                        let key = load16(keys[i].add(column + c), LANES);
                        sums[i] = _mm512_fmadd_ps(x, key, sums[i]);
                        if (c * size_of::<T>()).is_multiple_of(LINE) {
                            hint(next[i].wrapping_add(column + c));
                            hint(far[i].wrapping_add(column + c));
                        }
                    }
                }
                if rest > 0 {
                    let c = each.dim - rest;
                    let x = load16(query.add(c), rest);
                    for i in 0..KEYS {
                        let key = load16(keys[i].add(column + c), rest);
                        sums[i] = _mm512_fmadd_ps(x, key, sums[i]);
                    }
                }
                let to = scores.as_mut_ptr().add(h * k.rows + first);
                _mm512_mask_storeu_ps(to, ((1u32 << count) - 1) as u16, totals(sums));
            }
        }
        (keys, next) = (next, far);
    }
}

/// Where the rows of a block of keys begin, or those of a block of what is read `then`. Behind the last row it is taken
/// again, for nothing.
#[inline]
fn block<T: Float>(k: Source<'_, T>, then: Source<'_, T>, n: usize) -> [*const T; KEYS] {
    let blocks = k.rows.div_ceil(KEYS);
    let (rows, n) = if n < blocks {
        (k, n)
    } else {
        (then, n - blocks)
    };
    std::array::from_fn(|i| {
        let row = (n * KEYS + i).min(rows.rows - 1);
        rows.row(row).as_ptr()
    })
}

/// Asks for a line.
#[inline]
#[target_feature(enable = "avx512f")]
fn hint<T>(address: *const T) {
    _mm_prefetch::<_MM_HINT_T0>(address.cast());
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

/// As [`super::weighted_sums`].
///
/// # Safety
/// T is `f32`, `bf16` or `f16`; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn weighted_sums<T: Float>(
    each: Heads,
    weights: &[f32],
    v: Source<'_, T>,
    out: &mut [f32],
) {
    let heads = out.len() / each.dim;
    assert!(
        weights.len() == heads * v.rows && each.column(heads - 1) + each.dim <= v.dim,
        "attention_cached: a weight for each head and value"
    );
    out.fill(0.0);
    for first in (0..v.rows).step_by(ROWS) {
        let rows = v.rows(first, ROWS.min(v.rows - first));
        // Nobody reads what lies behind the last row.
        let ahead = match v.rows - first {
            0..=ROWS => 0,
            _ => ROWS * v.stride,
        };
        for (h, out) in out.chunks_exact_mut(each.dim).enumerate() {
            let weights = &weights[h * v.rows + first..][..rows.rows];
            for (stripe, out) in out.chunks_mut(STRIPE).enumerate() {
                let column = each.column(h) + stripe * STRIPE;
                // SAFETY: by the caller; a stripe ends where the head does.
                unsafe {
                    match out.len() {
                        STRIPE => add::<T, 4, true>(weights, rows, column, ahead, out),
                        49.. => add::<T, 4, false>(weights, rows, column, ahead, out),
                        48 => add::<T, 3, true>(weights, rows, column, ahead, out),
                        33.. => add::<T, 3, false>(weights, rows, column, ahead, out),
                        32 => add::<T, 2, true>(weights, rows, column, ahead, out),
                        17.. => add::<T, 2, false>(weights, rows, column, ahead, out),
                        16 => add::<T, 1, true>(weights, rows, column, ahead, out),
                        _ => add::<T, 1, false>(weights, rows, column, ahead, out),
                    }
                }
            }
        }
    }
}

/// Adds the weighted rows' columns from `column` on, in V registers, the last of which is full if FULL. What lies
/// `ahead` elements behind them is asked for.
///
/// # Safety
/// As [`weighted_sums`]; rows have so many columns, and there are as many weights.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn add<T: Float, const V: usize, const FULL: bool>(
    weights: &[f32],
    rows: Source<'_, T>,
    column: usize,
    ahead: usize,
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
        for (row, &weight) in weights.iter().enumerate() {
            let (src, weight) = (rows.row(2 * n + row), _mm512_set1_ps(weight));
            let src = src[column..].as_ptr();
            for c in 0..V {
                if (c * LANES * size_of::<T>()).is_multiple_of(LINE) {
                    hint(src.wrapping_add(ahead + c * LANES));
                }
                let lanes = if c + 1 < V { LANES } else { rest };
                // SAFETY: by the caller.
                let value = unsafe { load16(src.add(c * LANES), lanes) };
                sums[row][c] = _mm512_fmadd_ps(weight, value, sums[row][c]);
            }
        }
    }
    for (c, out) in out.chunks_mut(LANES).enumerate() {
        let mask = ((1u32 << out.len()) - 1) as u16;
        // SAFETY: as many columns as there are.
        unsafe {
            let sum = _mm512_add_ps(sums[0][c], sums[1][c]);
            let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out.as_ptr()), sum);
            _mm512_mask_storeu_ps(out.as_mut_ptr(), mask, sum);
        }
    }
}
