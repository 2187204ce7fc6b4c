//! Softmax and its logarithm along the last axis.
//!
//! The largest element is subtracted first, so that no exponential overflows. A row of nothing but
//! negative infinity gives NaN.

use crate::element::{Float, Real};
use crate::math;
use crate::parallel::{for_each_row_block, rows};
use crate::simd::{kernel, public};
use crate::sums::{row_dot, row_exp_sum, row_max, row_sum};

kernel! {
    fn softmax_rows[A: Arch, T: Float](isa: Isa, x: &[T], y: &mut [T], cols: usize) {
        // A stored type that is also computed in keeps the exponentials in y.
        let keeps = size_of::<T>() == size_of::<T::Acc>();
        for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
            let max = row_max(x);
            if keeps {
                for (x, y) in x.iter().zip(&mut *y) {
                    *y = T::narrow(math::exp::<A, T::Acc>(x.widen() - max));
                }
                let scale = T::Acc::ONE / row_sum(y);
                for y in y {
                    *y = T::narrow(y.widen() * scale);
                }
            } else {
                let scale = T::Acc::ONE / row_exp_sum::<A, T>(x, max);
                for (x, y) in x.iter().zip(y) {
                    *y = T::narrow(math::exp::<A, T::Acc>(x.widen() - max) * scale);
                }
            }
        }
    }
}

kernel! {
    fn softmax_backward_rows[A: Arch, T: Float](
        isa: Isa, y: &[T], dy: &[T], dx: &mut [T], cols: usize
    ) {
        let slices = y.chunks_exact(cols).zip(dy.chunks_exact(cols));
        for ((y, dy), dx) in slices.zip(dx.chunks_exact_mut(cols)) {
            let dot = row_dot::<A, T>(y, dy);
            for ((y, dy), dx) in y.iter().zip(dy).zip(dx) {
                *dx = T::narrow(y.widen() * (dy.widen() - dot));
            }
        }
    }
}

kernel! {
    fn log_softmax_rows[A: Arch, T: Float](isa: Isa, x: &[T], y: &mut [T], cols: usize) {
        for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
            let max = row_max(x);
            let log = math::ln::<A, T::Acc>(row_exp_sum::<A, T>(x, max));
            for (x, y) in x.iter().zip(y) {
                *y = T::narrow(x.widen() - max - log);
            }
        }
    }
}

kernel! {
    fn log_softmax_backward_rows[A: Arch, T: Float](
        isa: Isa, y: &[T], dy: &[T], dx: &mut [T], cols: usize
    ) {
        let slices = y.chunks_exact(cols).zip(dy.chunks_exact(cols));
        for ((y, dy), dx) in slices.zip(dx.chunks_exact_mut(cols)) {
            let sum = row_sum(dy);
            for ((y, dy), dx) in y.iter().zip(dy).zip(dx) {
                *dx = T::narrow(A::fma(-math::exp::<A, T::Acc>(y.widen()), sum, dy.widen()));
            }
        }
    }
}

/// Number of rows, after checking that they are whole.
fn count_rows(what: &str, len: usize, cols: usize) -> usize {
    if cols == 0 {
        assert_eq!(len, 0, "{what}: {len} elements in rows of 0");
        return 0;
    }
    assert_eq!(
        len % cols,
        0,
        "{what}: {len} elements are not whole rows of {cols}"
    );
    len / cols
}

public! {
    /// `y[r, :] = e^x[r, :] / Σ e^x[r, :]`; x and y `[rows, cols]`.
    pub fn softmax, softmax_with[T: Float](isa: Isa, x: &[T], y: &mut [T], cols: usize) {
        assert_eq!(x.len(), y.len(), "softmax: x and y differ in length");
        let count = count_rows("softmax", y.len(), cols);
        for_each_row_block(count, cols, (rows(x, cols), rows(y, cols)), |_, (x, y)| {
            softmax_rows(isa, x, y, cols);
        });
    }
}

public! {
    /// `dx = y·(dy - Σ y·dy)`, row by row, with `y = softmax(x)`; all `[rows, cols]`.
    pub fn softmax_backward, softmax_backward_with[T: Float](
        isa: Isa, y: &[T], dy: &[T], dx: &mut [T], cols: usize
    ) {
        assert_eq!(y.len(), dx.len(), "softmax_backward: y and dx differ in length");
        assert_eq!(dy.len(), dx.len(), "softmax_backward: dy and dx differ in length");
        let count = count_rows("softmax_backward", dx.len(), cols);
        let slices = (rows(y, cols), rows(dy, cols), rows(dx, cols));
        for_each_row_block(count, cols, slices, |_, (y, dy, dx)| {
            softmax_backward_rows(isa, y, dy, dx, cols);
        });
    }
}

public! {
    /// `y[r, :] = x[r, :] - ln Σ e^x[r, :]`; x and y `[rows, cols]`.
    pub fn log_softmax, log_softmax_with[T: Float](isa: Isa, x: &[T], y: &mut [T], cols: usize) {
        assert_eq!(x.len(), y.len(), "log_softmax: x and y differ in length");
        let count = count_rows("log_softmax", y.len(), cols);
        for_each_row_block(count, cols, (rows(x, cols), rows(y, cols)), |_, (x, y)| {
            log_softmax_rows(isa, x, y, cols);
        });
    }
}

public! {
    /// `dx = dy - e^y·Σ dy`, row by row, with `y = log_softmax(x)`; all `[rows, cols]`.
    pub fn log_softmax_backward, log_softmax_backward_with[T: Float](
        isa: Isa, y: &[T], dy: &[T], dx: &mut [T], cols: usize
    ) {
        assert_eq!(y.len(), dx.len(), "log_softmax_backward: y and dx differ in length");
        assert_eq!(dy.len(), dx.len(), "log_softmax_backward: dy and dx differ in length");
        let count = count_rows("log_softmax_backward", dx.len(), cols);
        let slices = (rows(y, cols), rows(dy, cols), rows(dx, cols));
        for_each_row_block(count, cols, slices, |_, (y, dy, dx)| {
            log_softmax_backward_rows(isa, y, dy, dx, cols);
        });
    }
}
