//! Hints to the processor's caches.

/// Bytes of a line of the caches.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const LINE: usize = 64;

/// Where [`prefetch_to`] brings elements.
#[derive(Clone, Copy)]
pub(crate) enum Near {
    /// The first cache level, to be read.
    First,
    /// The second cache level, to be read.
    Second,
    /// The first cache level, to be written.
    Written,
}

/// Asks for `count` elements from `row` on to be brought close: a hint, which may point anywhere.
#[inline(always)]
pub(crate) fn prefetch<V>(row: *const V, count: usize) {
    prefetch_to(Near::First, row, count);
}

/// [`prefetch`] into one of the cache levels.
#[inline(always)]
pub(crate) fn prefetch_to<V>(near: Near, row: *const V, count: usize) {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    {
        let first = row.cast::<i8>();
        // The row may begin inside a line.
        let lines = (first.addr() % LINE + count * size_of::<V>()).div_ceil(LINE);
        for line in 0..lines {
            ask(near, first.wrapping_add(line * LINE));
        }
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = (near, row, count);
}

/// Asks for a line.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ask(near: Near, line: *const i8) {
    use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    // SAFETY: it never faults.
    unsafe {
        match near {
            Near::First => _mm_prefetch::<_MM_HINT_T0>(line),
            Near::Second => _mm_prefetch::<_MM_HINT_T1>(line),
            Near::Written => _mm_prefetch::<_MM_HINT_ET0>(line),
        }
    }
}

/// Asks for a line.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn ask(near: Near, line: *const i8) {
    use std::arch::asm;
    // Rust has no stable name for the instruction yet.
    macro_rules! hint {
        ($kind:literal) => {
            // SAFETY: it never faults, and changes nothing but caches.
            unsafe {
                asm!(concat!("prfm ", $kind, ", [{}]"), in(reg) line.addr(), options(nomem, nostack, preserves_flags))
            }
        };
    }
    match near {
        Near::First => hint!("pldl1keep"),
        Near::Second => hint!("pldl2keep"),
        Near::Written => hint!("pstl1keep"),
    }
}
