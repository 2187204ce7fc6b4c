//! What happens to whole rows of operands and results: packing, products of rows, rounding to storage.

use super::tile::{COLS, Products};
use crate::element::{Float, Real};
use crate::gemm::{self, MatRef};
use crate::math::ln;
use crate::prefetch::{Near, prefetch_to};
use crate::shared::Shared;
use crate::simd::kernel;
use crate::sums::{each_lane, total};

#[cfg(target_arch = "x86_64")]
mod avx512;

/// Rows `stride` apart, of which `dim` elements count.
#[derive(Clone, Copy)]
pub(super) struct Source<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub rows: usize,
    pub dim: usize,
}

impl<'a, T> Source<'a, T> {
    #[inline(always)]
    pub fn row(&self, r: usize) -> &'a [T] {
        &self.data[r * self.stride..][..self.dim]
    }

    /// Rows `first .. first + rows`.
    pub fn rows(&self, first: usize, rows: usize) -> Self {
        Source {
            data: &self.data[first * self.stride..],
            rows,
            ..*self
        }
    }

    fn matrix(&self) -> MatRef<'a, T> {
        MatRef {
            data: self.data,
            rows: self.rows,
            cols: self.dim,
            row_stride: self.stride,
            col_stride: 1,
        }
    }
}

/// Rows that are read next, which are asked for while others are computed on.
pub(super) struct Ahead<'a, T, const N: usize> {
    pub sources: [Source<'a, T>; N],
    /// Those that have been asked for.
    at: usize,
}

impl<'a, T, const N: usize> Ahead<'a, T, N> {
    pub fn new(sources: [Source<'a, T>; N]) -> Self {
        Ahead { sources, at: 0 }
    }

    /// Asks for the next `rows` of each source to be brought into the second cache level.
    pub fn ask(&mut self, rows: usize) {
        let next = self.at + rows;
        for source in &self.sources {
            for r in self.at..next.min(source.rows) {
                let row = source.data.as_ptr().wrapping_add(r * source.stride);
                prefetch_to(Near::Second, row, source.dim);
            }
        }
        self.at = next;
    }
}

/// Rows as the left operand of a product over their elements: `[rows, padded / step]` slots, zeros
/// around them.
pub(super) fn pack_rows<T: Float>(
    products: &Products<T::Acc>,
    src: Source<'_, T>,
    dst: &mut [T::Acc],
    padded: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if avx512::pack_rows(products, src, dst, padded / products.step) {
        return;
    }
    widen_rows(products.isa, src, dst, padded);
}

kernel! {
    /// `dst[r, c] = src[r, c]`, `[rows_padded, dim_padded]`, zeros around it.
    fn widen_rows[A: Arch, T: Float](
        isa: Isa, src: Source<'_, T>, dst: &mut [T::Acc], dim_padded: usize,
    ) {
        for (r, dst) in dst.chunks_exact_mut(dim_padded).enumerate() {
            if r < src.rows {
                for (y, x) in dst.iter_mut().zip(src.row(r)) {
                    *y = x.widen();
                }
                dst[src.dim..].fill(T::Acc::ZERO);
            } else {
                dst.fill(T::Acc::ZERO);
            }
        }
    }
}

/// Rows as the right operand of a product over their elements, whose columns they are:
/// `[panels, dim / step, panel]` slots, zeros after the last row.
pub(super) fn pack_columns<T: Float>(
    products: &Products<T::Acc>,
    src: Source<'_, T>,
    dst: &mut [T::Acc],
) {
    gemm::pack_panels(products.isa, products.operands, src.matrix(), dst);
}

/// Rows as the right operand of a product over the rows, for slots that hold pairs:
/// `[panels, rows / 2, panel]`, zeros after the last element. (With one element in a slot that is
/// what [`pack_rows`] makes, one panel.)
pub(super) fn pack_depth<T: Float>(
    products: &Products<T::Acc>,
    src: Source<'_, T>,
    dst: &mut [T::Acc],
) {
    gemm::pack_panels(products.isa, products.operands, src.matrix().t(), dst);
}

kernel! {
    /// `out · dout` of each row, for the gradient of the softmax.
    pub(super) fn dots[A: Arch, T: Float](
        isa: Isa, out: Source<'_, T>, dout: Source<'_, T>, dots: &mut [T::Acc],
    ) {
        for r in 0..out.rows {
            let (x, y) = (out.row(r), dout.row(r));
            let mut sums = [T::Acc::ZERO; COLS];
            each_lane!(COLS, in_place; [sums], [x = x, y = y], |lane| {
                sums[lane] = A::fma(x.widen(), y.widen(), sums[lane]);
            });
            dots[r] = total(sums);
        }
    }
}

/// Rows of an output, each `dim` long, from element `first` on and `stride` apart.
#[derive(Clone, Copy)]
pub(super) struct Target<'a, T> {
    out: &'a Shared<T>,
    first: usize,
    stride: usize,
    dim: usize,
}

impl<'a, T> Target<'a, T> {
    /// # Safety
    /// Nobody else uses these rows as long as this exists.
    pub unsafe fn new(out: &'a Shared<T>, first: usize, stride: usize, dim: usize) -> Self {
        Target {
            out,
            first,
            stride,
            dim,
        }
    }

    /// Asks for rows `first .. first + rows`, which will be written.
    pub fn ask(&self, first: usize, rows: usize) {
        for r in first..first + rows {
            let first = self.out.pointer().wrapping_add(self.first);
            let row = first.wrapping_add(r * self.stride);
            prefetch_to(Near::Written, row, self.dim);
        }
    }

    #[inline(always)]
    fn row(&self, r: usize) -> &'a mut [T] {
        // SAFETY: by the maker of the target; one row is used at a time.
        unsafe { self.out.part(self.first + r * self.stride, self.dim) }
    }
}

kernel! {
    /// Rounds rows of sums to storage, times `by`; sums: `[rows, padded]`.
    pub(super) fn write[A: Arch, T: Float](
        isa: Isa, sums: &[T::Acc], padded: usize, by: T::Acc, target: Target<'_, T>,
    ) {
        for (r, sums) in sums.chunks_exact(padded).enumerate() {
            for (y, x) in target.row(r).iter_mut().zip(sums) {
                *y = T::narrow(*x * by);
            }
        }
    }
}

kernel! {
    /// The end of the online softmax: rows of `acc` (`[rows, padded]`) over their `sum`, times `grow`,
    /// rounded to storage, and ln of the sum of exponentials, of which `max` was taken off in
    /// units of `unit`.
    pub(super) fn finish[A: Arch, T: Float](
        isa: Isa, acc: &[T::Acc], padded: usize, max: &[T::Acc], sum: &[T::Acc], unit: T::Acc,
        grow: T::Acc, target: Target<'_, T>, lse: &mut [T::Acc],
    ) {
        let zero = T::Acc::ZERO;
        for (r, acc) in acc.chunks_exact(padded).take(lse.len()).enumerate() {
            let by = if sum[r] == zero { zero } else { grow / sum[r] };
            for (y, x) in target.row(r).iter_mut().zip(acc) {
                *y = T::narrow(*x * by);
            }
        }
        for (lse, (&max, &sum)) in lse.iter_mut().zip(max.iter().zip(sum)) {
            *lse = A::fma(max, unit, ln::<A, T::Acc>(sum));
        }
    }
}
