//! Hints to the processor's caches.

/// Bytes of a line of the caches.
#[cfg(target_arch = "x86_64")]
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
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        let first = row.cast::<i8>();
        // The row may begin inside a line.
        let lines = (first.addr() % LINE + count * size_of::<V>()).div_ceil(LINE);
        for line in 0..lines {
            let line = first.wrapping_add(line * LINE);
            // SAFETY: it never faults.
            unsafe {
                match near {
                    Near::First => _mm_prefetch::<_MM_HINT_T0>(line),
                    Near::Second => _mm_prefetch::<_MM_HINT_T1>(line),
                    Near::Written => _mm_prefetch::<_MM_HINT_ET0>(line),
                }
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (near, row, count);
}
