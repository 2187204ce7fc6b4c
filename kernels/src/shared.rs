//! One output, many tasks, where no slice can be cut: columns of a matrix, heads of a token.

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

    /// Where it begins, for hints.
    pub(crate) fn pointer(&self) -> *const T {
        self.0
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

/// A pointer that lanes share.
#[derive(Clone, Copy)]
pub(crate) struct Pointer<P>(pub P);

// SAFETY: using the pointer is unsafe on its own; who does so vouches that nobody else writes there.
unsafe impl<P> Sync for Pointer<P> {}
// SAFETY: as above.
unsafe impl<P> Send for Pointer<P> {}

impl<P: Copy> Pointer<P> {
    /// The pointer. A method, so that closures capture the whole.
    pub(crate) fn get(&self) -> P {
        self.0
    }
}
