//! Transposing in registers of NEON.

use crate::element::{Float, Real, same};
use crate::gemm::rounded::Rounded;
use half::{bf16, f16};
use std::arch::aarch64::*;
use std::array::from_fn;

/// The transpose of four registers of four lanes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn transposed(r: [float32x4_t; 4]) -> [float32x4_t; 4] {
    // Lanes 0 and 2, or 1 and 3, of two rows in turns, as pairs; then pairs of one step.
    let pair = |x, y| {
        [
            vreinterpretq_f64_f32(vtrn1q_f32(x, y)),
            vreinterpretq_f64_f32(vtrn2q_f32(x, y)),
        ]
    };
    let [top, low] = [pair(r[0], r[1]), pair(r[2], r[3])];
    [
        vreinterpretq_f32_f64(vtrn1q_f64(top[0], low[0])),
        vreinterpretq_f32_f64(vtrn1q_f64(top[1], low[1])),
        vreinterpretq_f32_f64(vtrn2q_f64(top[0], low[0])),
        vreinterpretq_f32_f64(vtrn2q_f64(top[1], low[1])),
    ]
}

/// Whether [`load4`] knows T.
#[inline(always)]
pub(super) fn loads<T: Float>() -> bool {
    same::<T, f32>() || same::<T, Rounded>() || same::<T, bf16>() || same::<T, f16>()
}

/// To bf16's digits, to nearest, ties to even.
#[inline]
#[target_feature(enable = "neon")]
fn rounded(x: float32x4_t) -> float32x4_t {
    let bits = vreinterpretq_u32_f32(x);
    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
    let near = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
    let either = vbslq_u32(vceqq_f32(x, x), near, quiet);
    vreinterpretq_f32_u32(vandq_u32(either, vdupq_n_u32(0xffff_0000)))
}

/// Widens 4 elements.
///
/// # Safety
/// They are read; [`loads`] knows T.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn load4<T: Float>(src: *const T) -> float32x4_t {
    // SAFETY: by the caller.
    unsafe {
        if same::<T, f32>() {
            return vld1q_f32(src.cast());
        }
        if same::<T, Rounded>() {
            return rounded(vld1q_f32(src.cast()));
        }
        let short = vld1_u16(src.cast());
        if same::<T, bf16>() {
            vreinterpretq_f32_u32(vshll_n_u16::<16>(short))
        } else {
            vcvt_f32_f16(vreinterpret_f16_u16(short))
        }
    }
}

/// As [`Kernel::transpose`](crate::gemm::tile::Kernel::transpose), for a width that is a multiple of 4.
///
/// # Safety
/// As there.
#[inline]
#[target_feature(enable = "neon")]
pub(super) unsafe fn transpose<T: Float>(
    src: *const T,
    stride: usize,
    rows: usize,
    depth: usize,
    dst: *mut T::Acc,
    width: usize,
) -> bool {
    if !loads::<T>() || !width.is_multiple_of(4) {
        return false;
    }
    let whole = depth / 4 * 4;
    for l in (0..whole).step_by(4) {
        for i in (0..width).step_by(4) {
            // SAFETY: elements l.. of rows i.. that there are, of all columns i.. of rows l.. of the panel.
            unsafe {
                let row = |n: usize| match i + n < rows {
                    true => load4(src.add((i + n) * stride + l)),
                    false => vdupq_n_f32(0.0),
                };
                for (n, x) in transposed(from_fn(row)).into_iter().enumerate() {
                    vst1q_f32(dst.add((l + n) * width + i).cast(), x);
                }
            }
        }
    }
    for l in whole..depth {
        for i in 0..width {
            // SAFETY: as above.
            unsafe {
                let x = match i < rows {
                    true => (*src.add(i * stride + l)).widen(),
                    false => T::Acc::ZERO,
                };
                dst.add(l * width + i).write(x);
            }
        }
    }
    true
}
