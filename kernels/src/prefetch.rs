//! Hints to the processor's caches.

/// Asks for `count` elements from `row` on to be brought close: a hint, which may point anywhere.
#[inline(always)]
pub(crate) fn prefetch<V>(row: *const V, count: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let bytes = count * size_of::<V>();
        // The row may begin inside a line, so its last element is asked for too.
        for at in (0..bytes).step_by(64).chain([bytes.saturating_sub(1)]) {
            // SAFETY: it never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(row.cast::<i8>().wrapping_add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (row, count);
}
