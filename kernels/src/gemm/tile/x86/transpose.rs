//! Transposing in registers of AVX-512.

use crate::avx512::load16;
use crate::element::Float;
use std::arch::x86_64::*;

/// How far ahead of a transposition its rows are asked for, in bytes.
const AHEAD: usize = 512;

/// The transpose of 16 registers of 16 lanes of 32 bits. A macro, because a function that is not
/// inlined would pass them through memory, and a closure would lose the instruction set.
macro_rules! transposed {
    ($r:ident) => {{
        // Pairs of rows, then fours; afterwards u[4g + j] has, in its 128-bit lane q, the elements
        // 4q + j of rows 4g..4g + 4.
        let mut t = [_mm512_setzero_pd(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_castps_pd(_mm512_unpacklo_ps($r[2 * i], $r[2 * i + 1]));
            t[2 * i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps($r[2 * i], $r[2 * i + 1]));
        }
        let mut u = [_mm512_setzero_ps(); 16];
        for g in 0..4 {
            u[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(t[4 * g], t[4 * g + 2]));
            u[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(t[4 * g], t[4 * g + 2]));
            u[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(t[4 * g + 1], t[4 * g + 3]));
            u[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(t[4 * g + 1], t[4 * g + 3]));
        }
        // Lanes 0 and 2, or 1 and 3, of two at a time, twice.
        let mut out = [_mm512_setzero_ps(); 16];
        for j in 0..4 {
            let even = _mm512_shuffle_f32x4::<0x88>(u[j], u[4 + j]);
            let odd = _mm512_shuffle_f32x4::<0xdd>(u[j], u[4 + j]);
            let even_low = _mm512_shuffle_f32x4::<0x88>(u[8 + j], u[12 + j]);
            let odd_low = _mm512_shuffle_f32x4::<0xdd>(u[8 + j], u[12 + j]);
            out[j] = _mm512_shuffle_f32x4::<0x88>(even, even_low);
            out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even, even_low);
            out[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd, odd_low);
            out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_low);
        }
        out
    }};
}
pub(super) use transposed;

/// As [`Kernel::transpose`](crate::gemm::tile::Kernel::transpose).
///
/// # Safety
/// As there; T is `f32`, `bf16` or `f16`; the processor has the instructions.
#[inline(always)]
pub(super) unsafe fn transpose<T: Float>(
    src: *const T,
    stride: usize,
    rows: usize,
    depth: usize,
    dst: *mut f32,
    width: usize,
) {
    let mut l = 0;
    while l < depth {
        let mut i = 0;
        while i < width {
            // SAFETY: elements of rows i.. and of depth l.. inside both buffers.
            unsafe {
                let (from, to) = (src.add(i.min(rows) * stride + l), dst.add(l * width + i));
                let (have, deep) = (rows.saturating_sub(i).min(16), (depth - l).min(16));
                if deep == 16 && have == 16 {
                    transpose16::<T, 16>(from, stride, 16, 16, to, width, 16);
                } else if deep == 16 && have == 12 && width == 12 {
                    transpose16::<T, 12>(from, stride, 12, 16, to, width, 12);
                } else {
                    let keep = (width - i).min(16);
                    transpose16::<T, 0>(from, stride, have, deep, to, width, keep);
                }
            }
            i += 16;
        }
        l += 16;
    }
}

/// A block of at most 16 rows x 16 deep: `dst[l · width + i] = src[i · stride + l]` for i < keep,
/// with 0 where i >= rows. ROWS is 0, or 12 or 16 if that is both `rows` and `keep` and the block
/// is 16 deep.
///
/// # Safety
/// What is addressed so is inside the buffers; T is `f32`, `bf16` or `f16`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn transpose16<T: Float, const ROWS: usize>(
    src: *const T,
    stride: usize,
    rows: usize,
    depth: usize,
    dst: *mut f32,
    width: usize,
    keep: usize,
) {
    let (rows, depth, keep) = if ROWS > 0 {
        (ROWS, 16, ROWS)
    } else {
        (rows, depth, keep)
    };
    let mut r = [_mm512_setzero_ps(); 16];
    for i in 0..16 {
        if i < rows {
            // SAFETY: row i has `depth` elements. The hint may point past the end.
            unsafe {
                let row = src.add(i * stride);
                _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(AHEAD / size_of::<T>()).cast());
                r[i] = load16(row, depth);
            }
        }
    }
    let out = transposed!(r);
    let mask = ((1u32 << keep) - 1) as u16;
    for l in 0..16 {
        if l < depth {
            // SAFETY: `keep` elements of row l.
            unsafe {
                match keep {
                    16 => _mm512_storeu_ps(dst.add(l * width), out[l]),
                    _ => _mm512_mask_storeu_ps(dst.add(l * width), mask, out[l]),
                }
            }
        }
    }
}
