//! Runs of codes to f32, on each instruction set. A product with one rounding is all the arithmetic there is, so that they
//! have the same bits.

use super::{BLOCK, Codes, Format, NF4};
use crate::simd::Isa;

#[cfg(target_arch = "aarch64")]
mod aarch64;

/// Writes elements `first .. first + len` to `out`.
///
/// # Safety
/// So many elements are there, and may be written.
#[inline(always)]
pub(super) unsafe fn read(codes: &Codes, first: usize, out: *mut f32, len: usize) {
    // SAFETY: by the caller; the instructions were found when the codes were made.
    unsafe {
        match codes.isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => x86::read_avx512(codes, first, out, len),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::read_avx2(codes, first, out, len),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon | Isa::NeonBf16 => aarch64::read(codes, first, out, len),
            _ => blocks(codes, first, out, len, |_, _, _, _| 0),
        }
    }
}

/// Goes through the blocks of a run. `some(at, scale, out, n)` writes some elements of n from byte `at` on, a whole number
/// of bytes of codes, and says how many; the rest is done one by one.
///
/// # Safety
/// As [`read`]; `some` writes at most n.
#[inline(always)]
unsafe fn blocks(
    codes: &Codes,
    first: usize,
    out: *mut f32,
    len: usize,
    some: impl Fn(usize, f32, *mut f32, usize) -> usize,
) {
    let mut done = 0;
    while done < len {
        let element = first + done;
        let n = (BLOCK - element % BLOCK).min(len - done);
        let scale = codes.scale(element / BLOCK);
        // SAFETY: n elements from `done` on are part of the run.
        unsafe {
            let out = out.add(done);
            let mut i = match codes.format {
                // A run that begins within a byte.
                Format::Nf4 => element % 2,
                Format::Int8 => 0,
            };
            if i == 1 {
                out.write(value(codes, element, scale));
            }
            if i < n {
                let at = match codes.format {
                    Format::Nf4 => (element + i) / 2,
                    Format::Int8 => element,
                };
                i += some(codes.parts.codes + at, scale, out.add(i), n - i);
            }
            for i in i..n {
                out.add(i).write(value(codes, element + i, scale));
            }
        }
        done += n;
    }
}

/// One element.
#[inline(always)]
fn value(codes: &Codes, element: usize, scale: f32) -> f32 {
    let bytes = &codes.bytes[codes.parts.codes..];
    match codes.format {
        Format::Nf4 => {
            let shift = if element.is_multiple_of(2) { 4 } else { 0 };
            NF4[usize::from(bytes[element / 2] >> shift & 15)] * scale
        }
        Format::Int8 => f32::from(bytes[element] as i8) * scale,
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Codes, Format, NF4, blocks};
    use std::arch::x86_64::*;

    /// The codes of 32 elements in 16 bytes of NF4, a byte each, in order.
    ///
    /// # Safety
    /// 16 bytes are read.
    #[inline]
    #[target_feature(enable = "sse2")]
    unsafe fn nibbles(from: *const u8) -> [__m128i; 2] {
        // SAFETY: by the caller.
        let bytes = unsafe { _mm_loadu_si128(from.cast()) };
        let mask = _mm_set1_epi8(15);
        let even = _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask);
        let odd = _mm_and_si128(bytes, mask);
        [_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)]
    }

    /// # Safety
    /// As [`super::read`]; the processor has AVX-512 F.
    #[target_feature(enable = "avx512f,avx2,fma")]
    pub(super) unsafe fn read_avx512(codes: &Codes, first: usize, out: *mut f32, len: usize) {
        // SAFETY: 16 numbers.
        let table = unsafe { _mm512_loadu_ps(NF4.as_ptr()) };
        let bytes = codes.bytes.as_ptr();
        let nf4 = |at: usize, scale: f32, out: *mut f32, n: usize| {
            let scale = _mm512_set1_ps(scale);
            let whole = n / 32 * 32;
            for i in (0..whole).step_by(32) {
                // SAFETY: 32 elements of n are in 16 bytes from here on.
                unsafe {
                    for (half, code) in nibbles(bytes.add(at + i / 2)).into_iter().enumerate() {
                        let code = _mm512_cvtepi8_epi32(code);
                        let value = _mm512_mul_ps(_mm512_permutexvar_ps(code, table), scale);
                        _mm512_storeu_ps(out.add(i + 16 * half), value);
                    }
                }
            }
            whole
        };
        let int8 = |at: usize, scale: f32, out: *mut f32, n: usize| {
            let scale = _mm512_set1_ps(scale);
            let whole = n / 16 * 16;
            for i in (0..whole).step_by(16) {
                // SAFETY: 16 elements of n from here on.
                unsafe {
                    let code = _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.add(at + i).cast()));
                    let value = _mm512_mul_ps(_mm512_cvtepi32_ps(code), scale);
                    _mm512_storeu_ps(out.add(i), value);
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

    /// # Safety
    /// As [`super::read`]; the processor has AVX2.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn read_avx2(codes: &Codes, first: usize, out: *mut f32, len: usize) {
        // SAFETY: 8 numbers each.
        let [low, high] = unsafe { [0, 8].map(|i| _mm256_loadu_ps(NF4.as_ptr().add(i))) };
        let bytes = codes.bytes.as_ptr();
        let nf4 = |at: usize, scale: f32, out: *mut f32, n: usize| {
            let scale = _mm256_set1_ps(scale);
            let whole = n / 32 * 32;
            for i in (0..whole).step_by(32) {
                // SAFETY: 32 elements of n are in 16 bytes from here on.
                unsafe {
                    let [first, second] = nibbles(bytes.add(at + i / 2));
                    let quarters = [
                        first,
                        _mm_srli_si128::<8>(first),
                        second,
                        _mm_srli_si128::<8>(second),
                    ];
                    for (quarter, code) in quarters.into_iter().enumerate() {
                        let code = _mm256_cvtepi8_epi32(code);
                        // The lower three bits choose within a half of the table, the fourth the half.
                        let which = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code));
                        let value = _mm256_blendv_ps(
                            _mm256_permutevar8x32_ps(low, code),
                            _mm256_permutevar8x32_ps(high, code),
                            which,
                        );
                        _mm256_storeu_ps(out.add(i + 8 * quarter), _mm256_mul_ps(value, scale));
                    }
                }
            }
            whole
        };
        let int8 = |at: usize, scale: f32, out: *mut f32, n: usize| {
            let scale = _mm256_set1_ps(scale);
            let whole = n / 8 * 8;
            for i in (0..whole).step_by(8) {
                // SAFETY: 8 elements of n from here on.
                unsafe {
                    let code = _mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes.add(at + i).cast()));
                    let value = _mm256_mul_ps(_mm256_cvtepi32_ps(code), scale);
                    _mm256_storeu_ps(out.add(i), value);
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
}
