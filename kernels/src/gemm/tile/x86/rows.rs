//! Tiles of AVX-512 over rows of A as they are stored: where k is contiguous, packing would only
//! move them, and of bf16 two neighbours are a step already.

use super::dot_pairs;
use crate::gemm::ahead::Ahead;
use std::arch::x86_64::*;

/// Rows that share a pointer: an address holds at most two multiples of the stride.
const SHARED: usize = 3;

macro_rules! tile {
    ($name:ident, $choose:ident, $features:literal, $fma:ident, $($rows:literal)*) => {
        /// # Safety
        /// As [`Kernel::tile_rows`](crate::gemm::tile::Kernel::tile_rows) with rows = M; the processor has
        /// the instructions.
        #[target_feature(enable = $features)]
        unsafe fn $name<const M: usize, const V: usize>(
            steps: usize,
            a: *const f32,
            a_stride: usize,
            mut b: *const f32,
            out: *mut f32,
            stride: usize,
            add: bool,
            mut ahead: Ahead,
        ) {
            let mut sums = [[_mm512_setzero_ps(); V]; M];
            let mut rows = [a; 12 / SHARED];
            for (g, row) in rows.iter_mut().enumerate() {
                *row = a.wrapping_add(g * SHARED * a_stride);
            }
            for l in 0..steps {
                // SAFETY: a word of each row of A and a row of panel B.
                unsafe {
                    if l % Ahead::STEPS == 0 {
                        _mm_prefetch::<_MM_HINT_T1>(ahead.at);
                        ahead.at = ahead.at.wrapping_add(ahead.stride);
                    }
                    let mut y = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add((16 + v) * 16).cast());
                        y[v] = _mm512_loadu_ps(b.add(v * 16));
                    }
                    for i in 0..M {
                        let word = rows[i / SHARED].add(i % SHARED * a_stride);
                        let x = _mm512_set1_ps(word.read_unaligned());
                        for v in 0..V {
                            sums[i][v] = $fma(x, y[v], sums[i][v]);
                        }
                    }
                    for g in 0..M.div_ceil(SHARED) {
                        rows[g] = rows[g].add(1);
                    }
                    b = b.add(32);
                }
            }
            for i in 0..M {
                for v in 0..V {
                    // SAFETY: row i of out has V·16 elements.
                    unsafe {
                        let to = out.add(i * stride + v * 16);
                        let sum = if add {
                            _mm512_add_ps(_mm512_loadu_ps(to), sums[i][v])
                        } else {
                            sums[i][v]
                        };
                        _mm512_storeu_ps(to, sum);
                    }
                }
            }
        }

        /// # Safety
        /// As [`Kernel::tile_rows`](crate::gemm::tile::Kernel::tile_rows); the processor has the
        /// instructions.
        #[inline(always)]
        pub(super) unsafe fn $choose(
            steps: usize,
            a: *const f32,
            a_stride: usize,
            b: *const f32,
            (rows, cols): (usize, usize),
            out: *mut f32,
            stride: usize,
            add: bool,
            ahead: Ahead,
        ) {
            // SAFETY: passed on.
            unsafe {
                match (rows, cols <= 16) {
                    $(
                        ($rows, false) => {
                            $name::<$rows, 2>(steps, a, a_stride, b, out, stride, add, ahead)
                        }
                        ($rows, true) => {
                            $name::<$rows, 1>(steps, a, a_stride, b, out, stride, add, ahead)
                        }
                    )*
                    _ => unreachable!("gemm: a tile of {rows} rows"),
                }
            }
        }
    };
}

tile!(f32_rows, choose_f32, "avx512f", _mm512_fmadd_ps, 12 1 2 3 4 5 6 7 8 9 10 11);
tile!(bf16_rows, choose_bf16, "avx512f,avx512bf16", dot_pairs, 12 1 2 3 4 5 6 7 8 9 10 11);
