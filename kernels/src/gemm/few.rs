//! Products of few rows, as in decoding: B is read once, where it lies, at the speed of memory.
//!
//! Packing pays when an element of B meets many rows. Here it would be written and read again to
//! meet one. The sums are those of the tiles in the same order, in the same blocks of k, so that a
//! row has the same bits whichever way it was computed.

use super::plan::Plan;
use super::right::{Right, Sums};
use super::task::{Pass, complete, narrow};
use super::tile::{Job, Kernel};
use super::{Epilogue, MatRef};
use crate::course::{self, Place};
use crate::element::{Float, Real, same};
use crate::parallel::{block_range, in_lanes};
use crate::shared::Pointer;
use half::bf16;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};

/// Products of more rows are packed by any kernel.
pub(super) const FEW: usize = 2 * ROWS;
/// Rows that are multiplied at once. The others find their part of B in the second cache level.
pub(super) const ROWS: usize = 4;
/// Columns of B whose sums are carried from one block of k to the next, at most.
const STRIP: usize = 128;
/// Bytes of a row of B that a task reads at least, where its columns lie side by side.
const ROW_BYTES: usize = 512;
/// Elements of B of a task at least, a few µs of a core's memory bandwidth...
const TASK: usize = 1 << 15;
/// ...and more where columns lie side by side and there would be more tasks than this: each begins with reads
/// that nobody asked for early.
const TASKS: usize = 128;
/// Columns that are multiplied at once where they lie along k.
const ALONG: usize = 16;

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
    /// What is likely to be read after these, for hints: the same rows of B from there on.
    pub then: *const T,
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
    rounds: bool,
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
    let words = &mut workspace[..m * steps];
    pack::<A, K>(kernel, rounds, &a, words, steps);
    let words = Pointer(words.as_ptr());
    let (bias, activation) = (epilogue.bias, epilogue.activation);
    let along = b.along();
    let (unit, cols) = if along {
        (ALONG, TASK / k.max(1))
    } else {
        let unit = (ROW_BYTES / B::BYTES).min(STRIP);
        (unit, (TASK / k.max(1)).max(n / TASKS))
    };
    let cols = cols.next_multiple_of(unit).max(unit);
    let strip = if along { cols.min(STRIP) } else { unit };
    let tasks = n.div_ceil(cols);
    let course = parallel.then(|| {
        let (address, bytes) = b.place();
        course::begin(Place {
            address,
            bytes,
            in_parts: along,
        })
    });
    // Where columns lie along k, a thread's tasks lie behind each other in memory.
    let shares = Shares::new(
        tasks,
        if parallel {
            rayon::current_num_threads()
        } else {
            1
        },
    );
    in_lanes(tasks, parallel, |_| {
        let pass = Pass {
            kernel,
            a: words.get(),
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
        let mine = rayon::current_thread_index().unwrap_or(0);
        while let Some(piece) = shares.take(mine) {
            let first = piece * cols;
            let last = n.min(first + cols);
            for j in (first..last).step_by(strip) {
                let width = strip.min(last - j);
                // Beyond the task, too: the next one is mostly this thread's.
                let goes_on = j + width < if along { n } else { last };
                kernel.call(Strip {
                    pass: &pass,
                    plan,
                    rounds,
                    b: &b,
                    m,
                    j,
                    width,
                    then: if goes_on { j + width } else { j },
                });
            }
        }
    });
    drop(course);
}

/// Tasks, a part of them for each thread, which takes its own from the first on, then what is left of others'
/// from the last on.
struct Shares {
    left: [Left; SHARES],
    count: usize,
}

/// Parts at most; more threads share them.
const SHARES: usize = 64;

/// Bounds of what is left, in the halves of a word. In a line of its own: threads would otherwise take it from
/// each other with each of their own tasks.
#[repr(align(64))]
struct Left(AtomicU64);

impl Shares {
    fn new(tasks: usize, threads: usize) -> Self {
        let count = threads.min(SHARES);
        let left = std::array::from_fn(|i| {
            let part = if i < count {
                block_range(tasks, count, i)
            } else {
                0..0
            };
            Left(AtomicU64::new((part.start as u64) << 32 | part.end as u64))
        });
        Shares { left, count }
    }

    /// A task that nobody else is given, of those of `thread` if there is one.
    fn take(&self, thread: usize) -> Option<usize> {
        (0..self.count).find_map(|i| {
            let own = i == 0;
            let taken = self.left[(thread + i) % self.count].0.try_update(
                Ordering::Relaxed,
                Ordering::Relaxed,
                |left| {
                    let (first, last) = (left >> 32, left & u64::from(u32::MAX));
                    (first < last).then(|| if own { left + (1 << 32) } else { left - 1 })
                },
            );
            let left = taken.ok()?;
            Some(if own {
                (left >> 32) as usize
            } else {
                (left as u32 - 1) as usize
            })
        })
    }
}

/// A in steps, row after row: widened numbers, or pairs of bf16.
fn pack<A: Float, K: Kernel>(
    kernel: K,
    rounds: bool,
    a: &MatRef<A>,
    words: &mut [A::Acc],
    steps: usize,
) {
    for (i, words) in words.chunks_exact_mut(steps.max(1)).enumerate() {
        let first = i * a.row_stride;
        if a.col_stride == 1 {
            pack_row(kernel, rounds, &a.data[first..first + a.cols], words);
            continue;
        }
        // As many at a time as there is room for.
        let mut row = [A::default(); GATHERED];
        let room = GATHERED / K::STEP;
        for (n, words) in words.chunks_mut(room).enumerate() {
            let l0 = n * GATHERED;
            let count = GATHERED.min(a.cols - l0);
            for (l, x) in row[..count].iter_mut().enumerate() {
                *x = a.data[first + (l0 + l) * a.col_stride];
            }
            pack_row(kernel, rounds, &row[..count], words);
        }
    }
}

/// Elements of a row of A, some distance apart, that are brought together.
const GATHERED: usize = 64;

/// Elements of A that lie side by side, in steps.
fn pack_row<A: Float, K: Kernel>(kernel: K, rounds: bool, row: &[A], words: &mut [A::Acc]) {
    if K::STEP == 1 {
        for (word, x) in words.iter_mut().zip(row) {
            *word = x.widen();
        }
        if rounds && !same::<A, bf16>() {
            for word in words {
                let x = bf16::narrow(word.to_f64() as f32);
                *word = A::Acc::from_f64(x.widen().into());
            }
        }
        return;
    }
    assert_eq!(words.len(), row.len().div_ceil(2));
    if let Some(word) = words.last_mut().filter(|_| row.len() % 2 == 1) {
        *word = A::Acc::ZERO;
    }
    // SAFETY: only the kernel of `f32` multiplies in pairs, two of which have a word's place; what is
    // behind the last one of an odd number has just been written.
    let pairs =
        unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<bf16>(), row.len()) };
    if same::<A, bf16>() {
        // SAFETY: A is bf16.
        pairs
            .copy_from_slice(unsafe { std::slice::from_raw_parts(row.as_ptr().cast(), row.len()) });
    } else {
        for (pairs, row) in pairs.chunks_mut(GATHERED).zip(row.chunks(GATHERED)) {
            let mut wide = [0.0; GATHERED];
            for (y, x) in wide.iter_mut().zip(row) {
                *y = x.widen().to_f64() as f32;
            }
            narrow(kernel, &wide[..row.len()], pairs);
        }
    }
}

/// Columns j.. of all rows.
struct Strip<'a, B, C: Float, K> {
    pass: &'a Pass<'a, C, K>,
    plan: &'a Plan,
    rounds: bool,
    b: &'a B,
    m: usize,
    j: usize,
    width: usize,
    /// The column that comes after these.
    then: usize,
}

#[repr(align(64))]
struct Totals<R>(#[allow(dead_code)] [R; ROWS * STRIP]);

impl<B: Right, C: Float<Acc = B::Acc>, K: Kernel> Job for Strip<'_, B, C, K> {
    #[inline(always)]
    fn run(self) {
        let Self {
            pass,
            plan,
            rounds,
            b,
            m,
            j,
            width,
            then,
        } = self;
        let k = b.size().0;
        let wide = same::<C, C::Acc>();
        let mut totals = [const { MaybeUninit::<Totals<C::Acc>>::uninit() }; FEW / ROWS];
        let mut sums = MaybeUninit::<Totals<C::Acc>>::uninit();
        let sums = sums.as_mut_ptr().cast::<C::Acc>();
        // One block even if k is 0, which gives zeros.
        for step in (0..pass.steps.max(1)).step_by(plan.kb.max(1)) {
            let l0 = step * K::STEP;
            let after = if step + plan.kb < pass.steps {
                (l0 + plan.kb * K::STEP, j)
            } else {
                (0, then)
            };
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
                        then: if i + rows < m { (l0, j) } else { after },
                        rounds,
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
