//! Packing of left operands for AVX-512, a cache line at a time.

use super::Source;
use crate::attention::tile::Products;
use crate::element::{Float, same};
use crate::simd::Isa;
use half::bf16;
use std::arch::x86_64::*;

/// Copies rows into `slots` slots each, zeros around them; false if these are not elements that a
/// slot holds as they are.
pub(super) fn pack_rows<T: Float>(
    products: &Products<T::Acc>,
    src: Source<'_, T>,
    dst: &mut [T::Acc],
    slots: usize,
) -> bool {
    let wide = matches!(products.isa, Isa::Avx512 | Isa::Avx512Bf16) && same::<T, f32>();
    let pairs = products.pairs() && same::<T, bf16>();
    if !wide && !pairs {
        return false;
    }
    // SAFETY: the processor has the instructions, or `products` would be of others; a slot has the
    // 4 bytes of an f32, because that is what both types are computed in.
    unsafe { copy(src, dst.as_mut_ptr().cast(), slots, dst.len() / slots) };
    true
}

/// # Safety
/// T has 2 or 4 bytes; dst: `[rows, slots]`, with `slots` enough for a row of the source. The
/// processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn copy<T>(src: Source<'_, T>, dst: *mut i32, slots: usize, rows: usize) {
    let units = src.dim * size_of::<T>() / 2;
    for r in 0..rows {
        let have = if r < src.rows { units } else { 0 };
        let from = if have > 0 {
            src.row(r).as_ptr().cast::<i16>()
        } else {
            std::ptr::null()
        };
        for at in (0..slots).step_by(16) {
            let loads = have.saturating_sub(2 * at).min(32);
            let (from, to) = (from.wrapping_add(2 * at), dst.wrapping_add(r * slots + at));
            // SAFETY: masked elements are not touched; the others are inside the row and dst.
            unsafe {
                let x = match loads {
                    32 => _mm512_loadu_si512(from.cast()),
                    _ => _mm512_maskz_loadu_epi16(mask(loads), from),
                };
                // What was stored under a mask is not forwarded to the loads of a product.
                match slots - at {
                    16.. => _mm512_storeu_si512(to.cast(), x),
                    8.. => {
                        _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(x));
                    }
                    rest => _mm512_mask_storeu_epi32(to, mask(rest) as u16, x),
                }
            }
        }
    }
}

/// The lowest `count` bits, at most 32.
#[inline(always)]
fn mask(count: usize) -> u32 {
    ((1u64 << count) - 1) as u32
}
