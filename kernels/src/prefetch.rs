//! Hints to the processor's caches.

/// Bytes of a line of the caches.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Asks for `count` elements from `row` on to be brought close: a hint, which may point anywhere.
#[inline(always)]
pub(crate) fn prefetch<V>(row: *const V, count: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let first = row.cast::<i8>();
        // The row may begin inside a line.
        let lines = (first.addr() % LINE + count * size_of::<V>()).div_ceil(LINE);
        for line in 0..lines {
            // SAFETY: it never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(line * LINE)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (row, count);
}
