//! Rows of an output over threads, in chunks that depend on the sizes alone.

use rayon::prelude::*;

/// Element operations worth a task of their own; less than twice as many stay on the calling
/// thread, because waking another one costs more.
pub(crate) const GRAIN: usize = 16 * 1024;

/// Calls `work(first, chunk)` for each chunk of `len` elements of `y`, the last one shorter,
/// where `first` is the index of the chunk's first element in `y`.
pub(crate) fn chunks_mut<T: Send>(y: &mut [T], len: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    if y.len() <= len {
        if !y.is_empty() {
            work(0, y);
        }
        return;
    }
    y.par_chunks_mut(len)
        .enumerate()
        .for_each(|(n, chunk)| work(n * len, chunk));
}

/// Rows of `cols` elements for a task of about [`GRAIN`] operations, at least 1.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    GRAIN.div_ceil(cols.max(1))
}

/// A pointer to an output whose parts different tasks write.
pub(crate) struct Shared<T>(*mut T, usize);

// SAFETY: `part` is the only access, and its caller promises that parts do not overlap.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    /// Borrows the output for as long as the caller keeps `y` borrowed.
    pub(crate) fn new(y: &mut [T]) -> Self {
        Shared(y.as_mut_ptr(), y.len())
    }

    /// Elements `first .. first + len`.
    ///
    /// # Safety
    /// No two parts that live at the same time overlap, and the slice that this was made from
    /// outlives them, unused.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, first: usize, len: usize) -> &mut [T] {
        assert!(
            first <= self.1 && len <= self.1 - first,
            "part outside of its output"
        );
        // SAFETY: inside the slice by the assertion, alone by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), len) }
    }
}
