//! Elements in registers of AVX-512: reading and rounding.

use crate::element::{Float, same};
use crate::gemm::rounded::Rounded;
use half::bf16;
use std::arch::x86_64::*;

/// Rounds to bf16: to nearest, ties to even; what is not a number stays so.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn round16(x: __m512) -> __m512 {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let rounded = _mm512_mask_mov_epi32(up, nan, quiet);
    _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(-0x1_0000)))
}

/// Up to 16 elements, widened; the rest is 0.
///
/// # Safety
/// T is `f32`, `bf16`, `f16` or [`Rounded`]; `count` elements are read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn load16<T: Float>(src: *const T, count: usize) -> __m512 {
    let mask = ((1u32 << count) - 1) as u16;
    // SAFETY: masked elements are not touched.
    unsafe {
        if size_of::<T>() == size_of::<f32>() {
            let x = match count {
                16 => _mm512_loadu_ps(src.cast()),
                _ => _mm512_maskz_loadu_ps(mask, src.cast()),
            };
            return if same::<T, Rounded>() { round16(x) } else { x };
        }
        let short = match count {
            16 => _mm256_loadu_si256(src.cast()),
            _ => _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(u32::from(mask), src.cast())),
        };
        if same::<T, bf16>() {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(short)))
        } else {
            _mm512_cvtph_ps(short)
        }
    }
}
