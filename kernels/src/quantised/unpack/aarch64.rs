//! Runs of codes to f32 by NEON.

use super::{Codes, Format, NF4, blocks};
use std::arch::aarch64::*;
use std::array::from_fn;

/// Elements that are written at a time.
const RUN: usize = 32;

/// Byte n of each of the table's numbers.
const PLANES: [[u8; 16]; 4] = {
    let mut planes = [[0; 16]; 4];
    let mut code = 0;
    while code < 16 {
        let bytes = NF4[code].to_le_bytes();
        let mut n = 0;
        while n < 4 {
            planes[n][code] = bytes[n];
            n += 1;
        }
        code += 1;
    }
    planes
};

/// The numbers of 16 codes, a byte each, of which `planes` are the table.
#[inline]
#[target_feature(enable = "neon")]
fn look_up(planes: &[uint8x16_t; 4], codes: uint8x16_t) -> [float32x4_t; 4] {
    // A number is put together from its bytes, the lowest first.
    let [b0, b1, b2, b3] = planes.map(|plane| vqtbl1q_u8(plane, codes));
    let low = [vzip1q_u8(b0, b1), vzip2q_u8(b0, b1)].map(|x| vreinterpretq_u16_u8(x));
    let high = [vzip1q_u8(b2, b3), vzip2q_u8(b2, b3)].map(|x| vreinterpretq_u16_u8(x));
    [
        vzip1q_u16(low[0], high[0]),
        vzip2q_u16(low[0], high[0]),
        vzip1q_u16(low[1], high[1]),
        vzip2q_u16(low[1], high[1]),
    ]
    .map(|x| vreinterpretq_f32_u16(x))
}

/// # Safety
/// As [`super::read`].
#[target_feature(enable = "neon")]
pub(super) unsafe fn read(codes: &Codes, first: usize, out: *mut f32, len: usize) {
    let bytes = codes.bytes.as_ptr();
    // SAFETY: 16 bytes each.
    let planes: [_; 4] = from_fn(|n| unsafe { vld1q_u8(PLANES[n].as_ptr()) });
    let nf4 = |at: usize, scale: f32, out: *mut f32, n: usize| {
        let whole = n / RUN * RUN;
        for i in (0..whole).step_by(RUN) {
            // SAFETY: 32 elements of n are in 16 bytes from here on.
            unsafe {
                let both = vld1q_u8(bytes.add(at + i / 2));
                let (even, odd) = (vshrq_n_u8::<4>(both), vandq_u8(both, vdupq_n_u8(15)));
                for (half, codes) in [vzip1q_u8(even, odd), vzip2q_u8(even, odd)]
                    .into_iter()
                    .enumerate()
                {
                    for (quarter, x) in look_up(&planes, codes).into_iter().enumerate() {
                        vst1q_f32(out.add(i + 16 * half + 4 * quarter), vmulq_n_f32(x, scale));
                    }
                }
            }
        }
        whole
    };
    let int8 = |at: usize, scale: f32, out: *mut f32, n: usize| {
        let whole = n / RUN * RUN;
        for i in (0..whole).step_by(8) {
            // SAFETY: 8 elements of n from here on.
            unsafe {
                let short = vmovl_s8(vld1_s8(bytes.add(at + i).cast()));
                for (half, code) in [vget_low_s16(short), vget_high_s16(short)]
                    .into_iter()
                    .enumerate()
                {
                    let x = vcvtq_f32_s32(vmovl_s16(code));
                    vst1q_f32(out.add(i + 4 * half), vmulq_n_f32(x, scale));
                }
            }
        }
        whole
    };
    // SAFETY: by the caller.
    unsafe {
        match codes.format {
            Format::Nf4 => blocks(codes, first, out, len, nf4),
            Format::Int8 => blocks(codes, first, out, len, int8),
        }
    }
}
