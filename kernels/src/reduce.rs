//! Reductions along an axis of x viewed as `[outer, axis, inner]`.

use crate::element::{Float, Real};
use crate::optimizer::sum_in_f64;
use crate::parallel::{block_range, for_each_block, for_each_row_block, rows};
use crate::simd::{Isa, kernel, public};
use crate::sums::{LANES, larger, row_max, row_sum};

/// What becomes of the elements along the axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduce {
    /// Their sum
    Sum,
    /// Their mean; NaN if there are none.
    Mean,
    /// The largest; NaN if one is NaN. The axis must not be empty.
    Max,
}

/// Elements that are summed one after the other before they join the total: errors so grow with
/// the root of the length for long axes.
const RUN: usize = 128;

/// The sum of a row of any length.
#[inline(always)]
fn long_sum<T: Float>(x: &[T]) -> T::Acc {
    let mut sum = T::Acc::ZERO;
    for x in x.chunks(RUN * LANES) {
        sum += row_sum(x);
    }
    sum
}

kernel! {
    /// The axis is the last: x `[y.len(), axis]`.
    fn reduce_rows[A: Arch, T: Float](
        isa: Isa, kind: Reduce, x: &[T], axis: usize, scale: T::Acc, y: &mut [T]
    ) {
        for (row, y) in y.iter_mut().enumerate() {
            let x = &x[row * axis..(row + 1) * axis];
            *y = T::narrow(match kind {
                Reduce::Max => row_max(x),
                Reduce::Sum | Reduce::Mean => long_sum(x) * scale,
            });
        }
    }
}

kernel! {
    /// Up to LANES neighbours in y, which belong to one outer index; x starts at their first.
    fn reduce_strip[A: Arch, T: Float](
        isa: Isa, kind: Reduce, x: &[T], axis: usize, inner: usize, scale: T::Acc, y: &mut [T]
    ) {
        let n = y.len();
        if kind == Reduce::Max {
            let mut best = [T::Acc::NEG_INFINITY; LANES];
            for a in 0..axis {
                for (best, x) in best.iter_mut().zip(&x[a * inner..a * inner + n]) {
                    *best = larger(*best, x.widen());
                }
            }
            for (y, best) in y.iter_mut().zip(best) {
                *y = T::narrow(best);
            }
            return;
        }
        let mut sum = [T::Acc::ZERO; LANES];
        let mut first = 0;
        while first < axis {
            let mut part = [T::Acc::ZERO; LANES];
            for a in first..axis.min(first + RUN) {
                let x = &x[a * inner..a * inner + n];
                if let Ok(x) = <&[T; LANES]>::try_from(x) {
                    for i in 0..LANES {
                        part[i] += x[i].widen();
                    }
                } else {
                    for (part, x) in part.iter_mut().zip(x) {
                        *part += x.widen();
                    }
                }
            }
            for i in 0..LANES {
                sum[i] += part[i];
            }
            first += RUN;
        }
        for (y, sum) in y.iter_mut().zip(sum) {
            *y = T::narrow(sum * scale);
        }
    }
}

/// Cuts `first .. first + len` of `[outer, inner]` into strips of at most LANES neighbours with
/// one outer index; calls `run(outer, inner, range)`, where range counts from `first`.
fn for_strips(
    first: usize,
    len: usize,
    inner: usize,
    mut run: impl FnMut(usize, usize, std::ops::Range<usize>),
) {
    let mut done = 0;
    while done < len {
        let (o, i) = ((first + done) / inner, (first + done) % inner);
        let n = LANES.min(inner - i).min(len - done);
        run(o, i, done..done + n);
        done += n;
    }
}

public! {
    /// `y[o, i] = kind over a of x[o, a, i]`; x `[outer, axis, inner]`, y `[outer, inner]`.
    pub fn reduce, reduce_with[T: Float](
        isa: Isa, kind: Reduce, x: &[T], outer: usize, axis: usize, inner: usize, y: &mut [T]
    ) {
        assert_eq!(x.len(), outer * axis * inner, "reduce: x is not [outer, axis, inner]");
        assert_eq!(y.len(), outer * inner, "reduce: y is not [outer, inner]");
        assert!(kind != Reduce::Max || axis > 0 || y.is_empty(), "reduce: no maximum of nothing");
        let scale = match kind {
            Reduce::Mean => T::Acc::from_f64(1.0 / axis as f64),
            Reduce::Sum | Reduce::Max => T::Acc::ONE,
        };
        if axis == 0 {
            y.fill(T::narrow(T::Acc::ZERO * scale));
        } else if inner == 1 {
            for_each_row_block(outer, axis, (rows(x, axis), y), |_, (x, y)| {
                reduce_rows(isa, kind, x, axis, scale, y);
            });
        } else {
            let block = (crate::parallel::CHUNK / axis).next_multiple_of(LANES).max(LANES);
            for_each_block(y.len(), block, x.len(), y, |first, y| {
                for_strips(first, y.len(), inner, |o, i, range| {
                    let x = &x[o * axis * inner + i..];
                    reduce_strip(isa, kind, x, axis, inner, scale, &mut y[range]);
                });
            });
        }
    }
}

/// Whether x is the maximum y; NaN is that of a row with NaN.
#[inline(always)]
#[allow(clippy::eq_op)] // a number that is not itself is NaN
fn is_max<T: Float>(x: T, y: T) -> bool {
    x == y || (x != x && y != y)
}

/// The gradient of the maximum goes to the first element that is it: `dx[o, a, i] = dy[o, i]` for
/// the first a with `x[o, a, i] = y[o, i]`, else 0. Shapes as in [`reduce`].
pub fn reduce_max_backward<T: Float>(
    x: &[T],
    y: &[T],
    dy: &[T],
    dx: &mut [T],
    outer: usize,
    axis: usize,
    inner: usize,
) {
    let shape = "[outer, axis, inner]";
    assert_eq!(
        x.len(),
        outer * axis * inner,
        "reduce_max_backward: x is not {shape}"
    );
    assert_eq!(
        dx.len(),
        outer * axis * inner,
        "reduce_max_backward: dx is not {shape}"
    );
    assert_eq!(
        y.len(),
        outer * inner,
        "reduce_max_backward: y is not [outer, inner]"
    );
    assert_eq!(
        dy.len(),
        outer * inner,
        "reduce_max_backward: dy is not [outer, inner]"
    );
    let width = axis * inner;
    let slices = (
        rows(x, width),
        rows(y, inner),
        rows(dy, inner),
        rows(dx, width),
    );
    for_each_row_block(outer, width, slices, |_, (x, y, dy, dx)| {
        dx.fill(T::default());
        if width == 0 {
            return;
        }
        for (o, (x, dx)) in x
            .chunks_exact(width)
            .zip(dx.chunks_exact_mut(width))
            .enumerate()
        {
            for i in 0..inner {
                let at = o * inner + i;
                if let Some(a) = (0..axis).find(|a| is_max(x[a * inner + i], y[at])) {
                    dx[a * inner + i] = dy[at];
                }
            }
        }
    });
}

kernel! {
    fn argmax_rows[A: Arch, T: Float](isa: Isa, x: &[T], cols: usize, y: &mut [i64]) {
        for (x, y) in x.chunks_exact(cols).zip(y) {
            // Finding the maximum is a vector loop, finding its place then ends early.
            let max = T::narrow(row_max(x));
            *y = x.iter().position(|&x| is_max(x, max)).unwrap_or(0) as i64;
        }
    }
}

public! {
    /// `y[r]` = index of the first maximum of `x[r, :]`; of the first NaN if there is one. x
    /// `[rows, cols]` with cols > 0.
    pub fn argmax, argmax_with[T: Float](
        isa: Isa, x: &[T], count: usize, cols: usize, y: &mut [i64]
    ) {
        assert_eq!(x.len(), count * cols, "argmax: x is not [rows, cols]");
        assert_eq!(y.len(), count, "argmax: y is not [rows]");
        assert!(cols > 0 || count == 0, "argmax: no maximum of nothing");
        for_each_row_block(count, cols, (rows(x, cols), y), |_, (x, y)| {
            argmax_rows(isa, x, cols, y);
        });
    }
}

public! {
    /// Σ x, summed in f64 by a fixed tree.
    pub fn sum_all, sum_all_with[T: Float](isa: Isa, x: &[T]) -> f64 {
        sum_in_f64(isa, false, x)
    }
}

/// Blocks of rows whose sums are kept apart: enough for the threads of a desktop, few enough
/// that adding them up costs nothing. Depends on the number of rows alone.
pub(crate) fn partial_blocks(count: usize) -> usize {
    count.div_ceil(64).clamp(1, 32)
}

/// Elements of workspace for [`sum_rows`].
pub fn sum_rows_workspace(rows: usize, cols: usize) -> usize {
    partial_blocks(rows) * cols
}

kernel! {
    /// sums `[cols]` += Σ of the rows of x. Four rows at a time share the way to the sums, so that
    /// parts of x give the bits of the whole if each but the last has a multiple of four.
    pub(crate) fn add_rows[A: Arch, T: Float](isa: Isa, x: &[T], cols: usize, sums: &mut [T::Acc]) {
        let mut quads = x.chunks_exact(4 * cols);
        for quad in &mut quads {
            let (a, b) = quad.split_at(2 * cols);
            let ((a, b), (c, d)) = (a.split_at(cols), b.split_at(cols));
            for ((((sum, a), b), c), d) in sums.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                *sum += (a.widen() + b.widen()) + (c.widen() + d.widen());
            }
        }
        for row in quads.remainder().chunks_exact(cols) {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += x.widen();
            }
        }
    }
}

kernel! {
    /// y `[cols]` = or += the sum of the rows of partial `[blocks, cols]`, in order.
    fn join_rows[A: Arch, T: Float](
        isa: Isa, partial: &mut [T::Acc], cols: usize, y: &mut [T], accumulate: bool
    ) {
        let (sums, others) = partial.split_at_mut(cols);
        for other in others.chunks_exact(cols) {
            for (sum, x) in sums.iter_mut().zip(other) {
                *sum += *x;
            }
        }
        for (y, sum) in y.iter_mut().zip(sums) {
            let before = if accumulate { y.widen() } else { T::Acc::ZERO };
            *y = T::narrow(before + *sum);
        }
    }
}

/// Adds up the partial sums of all blocks; see `join_rows`.
pub(crate) fn join_partial<T: Float>(
    isa: Isa,
    partial: &mut [T::Acc],
    cols: usize,
    y: &mut [T],
    accumulate: bool,
) {
    join_rows(isa, partial, cols, y, accumulate);
}

public! {
    /// `y[c] = Σ over r of x[r, c]`, or `+=` if `accumulate`; x `[rows, cols]`, y `[cols]`,
    /// workspace of [`sum_rows_workspace`].
    pub fn sum_rows, sum_rows_with[T: Float](
        isa: Isa, x: &[T], count: usize, cols: usize, y: &mut [T::Acc], accumulate: bool,
        workspace: &mut [T::Acc]
    ) {
        assert_eq!(x.len(), count * cols, "sum_rows: x is not [rows, cols]");
        assert_eq!(y.len(), cols, "sum_rows: y is not [cols]");
        let need = sum_rows_workspace(count, cols);
        assert!(
            workspace.len() >= need,
            "sum_rows: workspace of {} elements, {need} needed",
            workspace.len()
        );
        if cols == 0 {
            return;
        }
        let blocks = partial_blocks(count);
        let partial = &mut workspace[..need];
        for_each_block(blocks, 1, x.len(), rows(&mut *partial, cols), |block, sums| {
            let range = block_range(count, blocks, block);
            sums.fill(T::Acc::ZERO);
            add_rows::<T>(isa, &x[range.start * cols..range.end * cols], cols, sums);
        });
        join_partial(isa, partial, cols, y, accumulate);
    }
}
