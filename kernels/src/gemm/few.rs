//! Products of few rows, as in decoding: B is read once, where it lies, at the speed of memory.
//!
//! Packing pays when an element of B meets many rows. Here it would be written and read again to
//! meet one. The sums are those of the tiles in the same order, in the same blocks of k, so that a
//! row has the same bits whichever way it was computed.

use super::plan::Plan;
use super::right::{Right, Sums};
use super::task::{Pass, complete};
use super::tile::{Job, Kernel};
use super::{Epilogue, MatRef};
use crate::element::{Float, Real, same};
use crate::parallel::{Finished, in_lanes};
use crate::shared::Pointer;
use half::bf16;
use std::mem::MaybeUninit;

/// Products of more rows are packed.
pub(super) const FEW: usize = 2 * ROWS;
/// Rows that are multiplied at once. The others find their part of B in the second cache level.
pub(super) const ROWS: usize = 4;
/// Columns of B whose sums are carried from one block of k to the next, at most.
const STRIP: usize = 128;
/// Bytes of a row of B that a task reads at least, where its columns lie side by side.
const ROW_BYTES: usize = 512;
/// Elements of B of a task at least, about 5 µs of a core's memory bandwidth...
const TASK: usize = 1 << 15;
/// ...and more where there would be more tasks than this: each begins with reads that nobody asked
/// for early.
const TASKS: usize = 128;

/// Columns of B from one on, over a block of k, and what rows of A they meet.
pub(super) struct Columns<T: Float> {
    /// At most [`ROWS`], `a_stride` apart, of packed steps.
    pub rows: usize,
    pub a: *const f32,
    pub a_stride: usize,
    /// Element (l, j) at `l · row_stride + j · col_stride`, one of which is 1.
    pub b: *const T,
    pub row_stride: usize,
    pub col_stride: usize,
    pub depth: usize,
    /// At most [`STRIP`].
    pub cols: usize,
    /// Whether the columns behind these come next.
    pub goes_on: bool,
    /// Rows of [`STRIP`], `out_stride` apart.
    pub out: *mut f32,
    pub out_stride: usize,
}

/// Workspace, in elements: A in steps.
pub(super) fn workspace(m: usize, steps: usize) -> usize {
    if m <= FEW { m * steps } else { 0 }
}

/// One product, m, n >= 1; sizes have been checked.
pub(super) fn product<A, B, C, K>(
    kernel: K,
    plan: &Plan,
    a: MatRef<A>,
    b: B,
    c: &mut [C],
    accumulate: bool,
    epilogue: Epilogue<C>,
    workspace: &mut [C::Acc],
    parallel: bool,
) where
    A: Float,
    B: Right<Acc = A::Acc>,
    C: Float<Acc = A::Acc>,
    K: Kernel,
{
    let (m, n, k) = (a.rows, b.size().1, a.cols);
    let steps = k.div_ceil(K::STEP);
    let pre = epilogue
        .pre_activation
        .map_or(std::ptr::null_mut(), |pre| pre.as_mut_ptr());
    let (c, pre) = (Pointer(c.as_mut_ptr()), Pointer(pre));
    let words = Pointer(workspace[..m * steps].as_mut_ptr());
    let (bias, activation) = (epilogue.bias, epilogue.activation);
    let strip = (ROW_BYTES / B::BYTES).min(STRIP);
    let cols = (TASK / k.max(1)).max(n / TASKS);
    let cols = cols.next_multiple_of(strip).max(strip);
    let tasks = n.div_ceil(cols);
    let finished = Finished::default();
    in_lanes(tasks, parallel, |claim| {
        let words = words.get();
        let pass = Pass {
            kernel,
            a: words.cast_const(),
            b: std::ptr::null(),
            a_stride: steps,
            steps,
            c: c.get(),
            pre: pre.get(),
            ldc: n,
            partial: std::ptr::null_mut(),
            ldp: 0,
            first: true,
            last: true,
            accumulate,
            bias,
            activation,
        };
        // The first piece packs A.
        let mut piece = claim();
        if piece == 0 {
            // SAFETY: the workspace has been cut to this size, and is read when this is finished.
            let words = unsafe { std::slice::from_raw_parts_mut(words, m * steps) };
            pack::<A, K>(&a, words, steps);
            finished.add();
            piece = claim();
        }
        while piece <= tasks {
            finished.wait(1);
            let first = (piece - 1) * cols;
            let last = n.min(first + cols);
            for j in (first..last).step_by(strip) {
                let width = strip.min(last - j);
                kernel.call(Strip {
                    pass: &pass,
                    plan,
                    b: &b,
                    m,
                    j,
                    width,
                    goes_on: j + width < last,
                });
            }
            piece = claim();
        }
    });
}

/// A in steps, row after row: widened numbers, or pairs of bf16.
fn pack<A: Float, K: Kernel>(a: &MatRef<A>, words: &mut [A::Acc], steps: usize) {
    for (i, row) in words.chunks_exact_mut(steps.max(1)).enumerate() {
        let at = |l: usize| a.data[i * a.row_stride + l * a.col_stride];
        for (step, word) in row.iter_mut().enumerate() {
            *word = if K::STEP == 1 {
                at(step).widen()
            } else {
                let half = |l: usize| {
                    let x = if l < a.cols {
                        at(l).widen()
                    } else {
                        A::Acc::ZERO
                    };
                    u32::from(bf16::narrow(x.to_f64() as f32).to_bits())
                };
                let bits = half(2 * step) | half(2 * step + 1) << 16;
                // SAFETY: only the kernel of `f32` multiplies in pairs; the bits are moved as they are.
                unsafe { std::mem::transmute_copy::<u32, A::Acc>(&bits) }
            };
        }
    }
}

/// Columns j.. of all rows.
struct Strip<'a, B, C: Float, K> {
    pass: &'a Pass<'a, C, K>,
    plan: &'a Plan,
    b: &'a B,
    m: usize,
    j: usize,
    width: usize,
    goes_on: bool,
}

#[repr(align(64))]
struct Totals<R>(#[allow(dead_code)] [R; ROWS * STRIP]);

impl<B: Right, C: Float<Acc = B::Acc>, K: Kernel> Job for Strip<'_, B, C, K> {
    #[inline(always)]
    fn run(self) {
        let Self {
            pass,
            plan,
            b,
            m,
            j,
            width,
            goes_on,
        } = self;
        let k = b.size().0;
        let wide = same::<C, C::Acc>();
        let mut totals = [const { MaybeUninit::<Totals<C::Acc>>::uninit() }; FEW / ROWS];
        let mut sums = MaybeUninit::<Totals<C::Acc>>::uninit();
        let sums = sums.as_mut_ptr().cast::<C::Acc>();
        // One block even if k is 0, which gives zeros.
        for step in (0..pass.steps.max(1)).step_by(plan.kb.max(1)) {
            let l0 = step * K::STEP;
            for (group, totals) in totals.iter_mut().enumerate().take(m.div_ceil(ROWS)) {
                let i = group * ROWS;
                let rows = ROWS.min(m - i);
                let totals = totals.as_mut_ptr().cast::<C::Acc>();
                let out = if step == 0 { totals } else { sums };
                // SAFETY: the maker of the pass vouches for its pointers; columns j.. j + width of B
                // and rows i.. i + rows of A lie inside them; a row of sums is STRIP long. Row r of
                // totals has been written by the first block, where later ones add to it.
                unsafe {
                    let part = Sums {
                        rows,
                        a: pass.a.add(i * pass.a_stride + step).cast(),
                        a_stride: pass.a_stride,
                        depth: (plan.kb * K::STEP).min(k - l0),
                        cols: width,
                        goes_on,
                        out: out.cast(),
                        out_stride: STRIP,
                    };
                    b.columns(pass.kernel, (l0, j), part);
                    for r in 0..rows {
                        let total = std::slice::from_raw_parts_mut(totals.add(r * STRIP), width);
                        if step > 0 {
                            let more = std::slice::from_raw_parts(sums.add(r * STRIP), width);
                            for (x, &y) in total.iter_mut().zip(more) {
                                *x += y;
                            }
                        } else if pass.accumulate && wide {
                            let old = pass.c.add((i + r) * pass.ldc + j);
                            let old = std::slice::from_raw_parts(old, width);
                            for (x, y) in total.iter_mut().zip(old) {
                                *x += y.widen();
                            }
                        }
                    }
                }
            }
        }
        for i in 0..m {
            let totals = totals[i / ROWS].as_mut_ptr().cast::<C::Acc>();
            // SAFETY: row i has been written by the first block.
            unsafe {
                let row = std::slice::from_raw_parts_mut(totals.add(i % ROWS * STRIP), width);
                complete(pass, row, i, j);
            }
        }
    }
}
