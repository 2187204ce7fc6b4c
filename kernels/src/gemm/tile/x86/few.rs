//! Columns of a product of few rows on AVX-512, from B where it lies: each element is read once and
//! multiplied with every row. The order of sums is that of the tiles, so the bits are, too.

use super::pairs::{interleaving, load32};
use super::{dot_pairs, transposed};
use crate::avx512::load16;
use crate::element::Float;
use crate::gemm::few::{Columns, ROWS};
use std::arch::x86_64::*;

/// Registers of sums of columns that lie side by side and are read together...
const WIDE: usize = 4;
/// ...and of one or two rows, whose sums leave registers. Rows of B may lie so that they meet in the
/// same lines of the first cache level: then long pieces of few rows stay there, short ones of many do not.
const WIDEST: usize = 8;
/// How many bytes ahead are asked for, in pieces of rows of B, where columns lie side by side.
const AHEAD: usize = 4096;
/// How many blocks of 16 steps ahead columns along k are asked for. A hint is dropped while as many reads
/// are on their way as a core can have, which is most of the time here: each is given three times.
const AGAIN: [usize; 3] = [16, 8, 4];

/// Writes the choice of the variant for the number of rows, and between columns that lie side by
/// side (`across`) and columns that lie along k (`along`), in strips as wide as either reads at once.
macro_rules! columns {
    ($name:ident, $features:literal, $across:ident, $along:ident, $unit:literal) => {
        /// # Safety
        /// What [`Columns`] says lies inside the buffers; T is `f32`, `bf16` or `f16` (not in pairs);
        /// the processor has the instructions.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name<T: Float>(columns: &Columns<T>) {
            // SAFETY: passed on.
            unsafe {
                match columns.rows {
                    1 => strips::<T, 1, WIDEST>(columns),
                    2 => strips::<T, 2, WIDEST>(columns),
                    3 => strips::<T, 3, WIDE>(columns),
                    ROWS => strips::<T, ROWS, WIDE>(columns),
                    rows => unreachable!("gemm: {rows} rows at once"),
                }
            }

            /// # Safety
            /// As above, with M rows, and V registers of columns that lie side by side.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn strips<T: Float, const M: usize, const V: usize>(columns: &Columns<T>) {
                let mut j = 0;
                while j < columns.cols {
                    let left = columns.cols - j;
                    // SAFETY: at most as many columns from j on as are left.
                    unsafe {
                        j += if columns.col_stride != 1 {
                            $along::<T, M>(columns, j, left.min(16));
                            16
                        } else if left >= 16 * V {
                            $across::<T, M, V, true>(columns, j, 16 * V);
                            16 * V
                        } else {
                            $across::<T, M, { $unit / 16 }, false>(columns, j, left.min($unit));
                            $unit
                        };
                    }
                }
            }
        }
    };
}

columns!(columns_f32, "avx512f,avx512bw", across_f32, along_f32, 16);
columns!(
    columns_pairs,
    "avx512f,avx512bw,avx512vl,avx512bf16",
    across_pairs,
    along_pairs,
    32
);

/// Writes the sums of `count` columns from j on.
///
/// # Safety
/// The rows of `out` have room for V·16 columns from j on.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<T: Float, const M: usize, const V: usize>(
    columns: &Columns<T>,
    j: usize,
    sums: [[__m512; V]; M],
) {
    for (i, row) in sums.iter().enumerate() {
        for (v, &sum) in row.iter().enumerate() {
            // SAFETY: by the caller.
            unsafe { _mm512_storeu_ps(columns.out.add(i * columns.out_stride + j + 16 * v), sum) };
        }
    }
}

/// The word of step `step` for row i, in all lanes.
///
/// # Safety
/// Row i of A has that step.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn splat<T: Float>(columns: &Columns<T>, i: usize, step: usize) -> __m512 {
    // SAFETY: by the caller.
    unsafe { _mm512_set1_ps(*columns.a.add(i * columns.a_stride + step)) }
}

/// How many rows of B ahead are asked for, `count` columns of each.
const fn rows_ahead<T>(count: usize) -> usize {
    AHEAD / (count * size_of::<T>())
}

/// Asks for the columns of a row of B that is further down.
#[inline]
#[target_feature(enable = "avx512f")]
fn ask<T>(row: *const T, count: usize) {
    for at in (0..count * size_of::<T>()).step_by(64) {
        _mm_prefetch::<_MM_HINT_T0>(row.cast::<i8>().wrapping_add(at));
    }
}

/// `count` columns side by side, V·16 of them if FULL.
///
/// # Safety
/// As [`columns_f32`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn across_f32<T: Float, const M: usize, const V: usize, const FULL: bool>(
    columns: &Columns<T>,
    j: usize,
    count: usize,
) {
    let mut sums = [[_mm512_setzero_ps(); V]; M];
    for l in 0..columns.depth {
        // SAFETY: row l of B has `count` columns from j on.
        unsafe {
            let row = columns.b.add(l * columns.row_stride + j);
            ask(
                row.wrapping_add(rows_ahead::<T>(16 * V) * columns.row_stride),
                16 * V,
            );
            let mut y = [_mm512_setzero_ps(); V];
            for v in 0..V {
                y[v] = load16(row.add(16 * v), if FULL { 16 } else { count });
            }
            for i in 0..M {
                let x = splat(columns, i, l);
                for v in 0..V {
                    sums[i][v] = _mm512_fmadd_ps(x, y[v], sums[i][v]);
                }
            }
        }
    }
    // SAFETY: by the caller.
    unsafe { store(columns, j, sums) };
}

/// As [`across_f32`], in pairs.
///
/// # Safety
/// As [`columns_pairs`]; V is even.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn across_pairs<T: Float, const M: usize, const V: usize, const FULL: bool>(
    columns: &Columns<T>,
    j: usize,
    count: usize,
) {
    let mut sums = [[_mm512_setzero_ps(); V]; M];
    let (low, high) = interleaving();
    let have = if FULL { 32 } else { count };
    for w in 0..columns.depth.div_ceil(2) {
        // SAFETY: rows 2w and, if it is there, 2w + 1 of B have `count` columns from j on.
        unsafe {
            let row = columns.b.add(2 * w * columns.row_stride + j);
            let ahead = row.wrapping_add(rows_ahead::<T>(16 * V) * columns.row_stride);
            ask(ahead, 16 * V);
            ask(ahead.wrapping_add(columns.row_stride), 16 * V);
            let mut y = [_mm512_setzero_ps(); V];
            for v in (0..V).step_by(2) {
                let even = load32(row.add(16 * v), have);
                let odd = if 2 * w + 1 < columns.depth {
                    load32(row.add(columns.row_stride + 16 * v), have)
                } else {
                    _mm512_setzero_si512()
                };
                y[v] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(even, low, odd));
                y[v + 1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(even, high, odd));
            }
            for i in 0..M {
                let x = splat(columns, i, w);
                for v in 0..V {
                    sums[i][v] = dot_pairs(x, y[v], sums[i][v]);
                }
            }
        }
    }
    // SAFETY: by the caller.
    unsafe { store(columns, j, sums) };
}

/// At most 16 columns whose elements lie along k: blocks of 16 steps are transposed in registers.
macro_rules! along {
    ($name:ident, $features:literal, $load:expr, $fma:ident, $step:literal) => {
        /// # Safety
        /// As [`columns_f32`] or [`columns_pairs`]; 1 <= count <= 16.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $name<T: Float, const M: usize>(columns: &Columns<T>, j: usize, count: usize) {
            let mut sums = [[_mm512_setzero_ps(); 1]; M];
            let stride = columns.col_stride;
            // SAFETY: the first column.
            let first = unsafe { columns.b.add(j * stride) };
            let next = if j + 16 < columns.cols {
                first.wrapping_add(16 * stride)
            } else {
                columns.then
            };
            for l in (0..columns.depth).step_by(16 * $step) {
                let deep = (columns.depth - l).min(16 * $step);
                let mut r = [_mm512_setzero_ps(); 16];
                for i in 0..16 {
                    if i < count {
                        // SAFETY: `deep` elements of column j + i.
                        unsafe {
                            r[i] = $load(first.add(i * stride + l), deep);
                        }
                    }
                }
                let out = transposed!(r);
                let step = l / $step;
                let ahead = AGAIN.map(|blocks| {
                    let l = l + blocks * 16 * $step;
                    match l.checked_sub(columns.depth) {
                        None => first.wrapping_add(l),
                        Some(over) => next.wrapping_add(over),
                    }
                });
                if deep == 16 * $step {
                    for s in 0..16 {
                        // Between sums that wait for each other: few at a time.
                        for column in ahead {
                            _mm_prefetch::<_MM_HINT_T0>(column.wrapping_add(s * stride).cast());
                        }
                        for i in 0..M {
                            // SAFETY: 16 steps from `step` on.
                            let x = unsafe { splat(columns, i, step + s) };
                            sums[i][0] = $fma(x, out[s], sums[i][0]);
                        }
                    }
                } else {
                    for s in 0..deep.div_ceil($step) {
                        for i in 0..M {
                            // SAFETY: as many steps from `step` on.
                            let x = unsafe { splat(columns, i, step + s) };
                            sums[i][0] = $fma(x, out[s], sums[i][0]);
                        }
                    }
                }
            }
            // SAFETY: by the caller.
            unsafe { store(columns, j, sums) };
        }
    };
}

along!(along_f32, "avx512f,avx512bw", load16, _mm512_fmadd_ps, 1);
along!(
    along_pairs,
    "avx512f,avx512bw,avx512vl,avx512bf16",
    |column, deep| _mm512_castsi512_ps(load32(column, deep)),
    dot_pairs,
    2
);
