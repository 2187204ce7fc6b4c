//! Packing for AVX512_BF16: panels `[depth / 2, width, 2]` of bf16, the two elements of a lane
//! being neighbours in k. A word is such a pair, its lower half the first.

use super::transposed;
use crate::element::{Float, Real, same};
use crate::gemm::pack::{DEEP, Pack};
use crate::gemm::tile::Kernel;
use crate::prefetch::prefetch;
use half::bf16;
use std::arch::x86_64::*;
use std::mem::transmute;

/// A block of a matrix, as in [`Pack`].
pub(super) struct Block<T> {
    src: *const T,
    stride: usize,
    k_stride: usize,
    len: usize,
    depth: usize,
    dst: *mut u32,
}

impl<T: Float, K: Kernel> From<&Pack<T, K>> for Block<T> {
    fn from(pack: &Pack<T, K>) -> Self {
        Block {
            src: pack.src,
            stride: pack.stride,
            k_stride: pack.k_stride,
            len: pack.len,
            depth: pack.depth,
            dst: pack.dst.cast(),
        }
    }
}

/// How far ahead of a transposition its rows are asked for, in bytes.
const AHEAD: usize = 512;

/// The lowest `count` bits, all of them from 32 on.
#[inline(always)]
fn mask(count: usize) -> u32 {
    ((1u64 << count.min(32)) - 1) as u32
}

/// Up to 32 neighbours as bf16, in order; the rest is 0.
///
/// # Safety
/// T is `f32` or `bf16`; `count` elements are read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn load32<T: Float>(src: *const T, count: usize) -> __m512i {
    // SAFETY: masked elements are not touched; a bf16 register is 512 bits.
    unsafe {
        if same::<T, bf16>() {
            return match count {
                32.. => _mm512_loadu_si512(src.cast()),
                _ => _mm512_maskz_loadu_epi16(mask(count), src.cast()),
            };
        }
        let src = src.cast::<f32>();
        let (low, high) = if count >= 32 {
            (_mm512_loadu_ps(src), _mm512_loadu_ps(src.add(16)))
        } else {
            let bits = mask(count);
            let high = _mm512_maskz_loadu_ps((bits >> 16) as u16, src.wrapping_add(16));
            (_mm512_maskz_loadu_ps(bits as u16, src), high)
        };
        transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// Packs a block into panels of WIDTH.
///
/// # Safety
/// The block's elements lie inside its buffers; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn pack<T: Float, const WIDTH: usize>(block: Block<T>) {
    let fast = same::<T, f32>() || same::<T, bf16>();
    // SAFETY: by the caller.
    unsafe {
        if fast && block.k_stride == 1 {
            transpose::<T, WIDTH>(block);
        } else if fast && block.stride == 1 {
            interleave::<T, WIDTH>(block);
        } else {
            strided::<T, WIDTH>(block);
        }
    }
}

/// k is contiguous: a word is read as it will be written, and blocks of 16 rows and 16 words are
/// transposed in registers.
///
/// # Safety
/// As [`pack`]; T is `f32` or `bf16`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn transpose<T: Float, const WIDTH: usize>(block: Block<T>) {
    let words = block.depth.div_ceil(2);
    for first in (0..block.len).step_by(WIDTH) {
        // SAFETY: panel `first / WIDTH` holds `words` rows.
        let panel = unsafe { block.dst.add(first * words) };
        let have = WIDTH.min(block.len - first);
        for w in (0..words).step_by(16) {
            for i in (0..WIDTH).step_by(16) {
                let keep = (WIDTH - i).min(16);
                let rows = have.saturating_sub(i).min(16);
                // SAFETY: elements of rows i.. and of depth 2w.. inside both buffers; where there
                // are no rows, none is read.
                unsafe {
                    let from = block.src.wrapping_add((first + i) * block.stride + 2 * w);
                    let to = panel.add(w * WIDTH + i);
                    let deep = block.depth - 2 * w;
                    if rows == keep && deep >= 32 {
                        if keep == 16 {
                            square::<T, WIDTH, 16>(from, block.stride, 16, 32, to, 16);
                        } else {
                            square::<T, WIDTH, 12>(from, block.stride, 12, 32, to, 12);
                        }
                    } else {
                        square::<T, WIDTH, 0>(from, block.stride, rows, deep.min(32), to, keep);
                    }
                }
            }
        }
    }
}

/// At most 16 rows x 32 elements: `dst[w · WIDTH + i]` = the word w of row i for i < keep, with 0
/// where i >= rows. ROWS is 0, or 12 or 16 if that is both `rows` and `keep` and there are 32
/// elements.
///
/// # Safety
/// What is addressed so is inside the buffers; T is `f32` or `bf16`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn square<T: Float, const WIDTH: usize, const ROWS: usize>(
    src: *const T,
    stride: usize,
    rows: usize,
    depth: usize,
    dst: *mut u32,
    keep: usize,
) {
    let (rows, depth, keep) = if ROWS > 0 {
        (ROWS, 32, ROWS)
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
                r[i] = _mm512_castsi512_ps(load32(row, depth));
            }
        }
    }
    let out = transposed!(r);
    let kept = mask(keep) as u16;
    for w in 0..16 {
        if 2 * w < depth {
            // SAFETY: `keep` words of row w.
            unsafe {
                let to = dst.add(w * WIDTH).cast::<f32>();
                match keep {
                    16 => _mm512_storeu_ps(to, out[w]),
                    _ => _mm512_mask_storeu_ps(to, kept, out[w]),
                }
            }
        }
    }
}

/// The orders in which the elements of two rows become words, the first 16 and the last 16: element
/// 2i of a result comes from element i of the first row, 2i + 1 from that of the second.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn interleaving() -> (__m512i, __m512i) {
    let mut order = [[0u16; 32]; 2];
    for i in 0..32u16 {
        order[0][i as usize] = i / 2 + i % 2 * 32;
        order[1][i as usize] = 16 + i / 2 + i % 2 * 32;
    }
    // SAFETY: 64 bytes each.
    unsafe {
        (
            _mm512_loadu_si512(order[0].as_ptr().cast()),
            _mm512_loadu_si512(order[1].as_ptr().cast()),
        )
    }
}

/// Rows of k are contiguous across the panel: two of them make a row of words.
///
/// # Safety
/// As [`pack`]; T is `f32` or `bf16`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn interleave<T: Float, const WIDTH: usize>(block: Block<T>) {
    let words = block.depth.div_ceil(2);
    let panels = block.len.div_ceil(WIDTH);
    let (low, high) = interleaving();
    for w in (0..words).step_by(DEEP) {
        let last = words.min(w + DEEP);
        for p in 0..panels {
            let have = WIDTH.min(block.len - p * WIDTH);
            for w in w..last {
                // SAFETY: `have` elements of rows 2w and, if it is there, 2w + 1; row w of panel p.
                unsafe {
                    let from = block.src.add(2 * w * block.k_stride + p * WIDTH);
                    let ahead = from.wrapping_add(2 * DEEP * block.k_stride);
                    prefetch(ahead, WIDTH);
                    prefetch(ahead.wrapping_add(block.k_stride), WIDTH);
                    let even = load32(from, have);
                    let odd = if 2 * w + 1 < block.depth {
                        load32(from.add(block.k_stride), have)
                    } else {
                        _mm512_setzero_si512()
                    };
                    let to = block.dst.add((p * words + w) * WIDTH);
                    let words = _mm512_permutex2var_epi16(even, low, odd);
                    if WIDTH >= 16 {
                        _mm512_storeu_si512(to.cast(), words);
                    } else {
                        _mm512_mask_storeu_epi32(to.cast(), mask(WIDTH) as u16, words);
                    }
                    if WIDTH == 32 {
                        let words = _mm512_permutex2var_epi16(even, high, odd);
                        _mm512_storeu_si512(to.add(16).cast(), words);
                    }
                }
            }
        }
    }
}

/// Any strides and any type, element by element.
///
/// # Safety
/// As [`pack`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn strided<T: Float, const WIDTH: usize>(block: Block<T>) {
    let words = block.depth.div_ceil(2);
    for j in 0..block.len.next_multiple_of(WIDTH) {
        // SAFETY: column j % WIDTH of a panel of `words` rows.
        let to = unsafe { block.dst.add(j / WIDTH * words * WIDTH + j % WIDTH) };
        for w in 0..words {
            let mut word = 0;
            for half in 0..2 {
                let l = 2 * w + half;
                if j < block.len && l < block.depth {
                    // SAFETY: element (j, l) of the block.
                    let x = unsafe { *block.src.add(j * block.stride + l * block.k_stride) };
                    let x = bf16::narrow(Real::to_f64(x.widen()) as f32);
                    word |= u32::from(x.to_bits()) << (16 * half);
                }
            }
            // SAFETY: row w of the column.
            unsafe { to.add(w * WIDTH).write(word) };
        }
    }
}
