//! Work over slices, split into parts that depend on sizes alone.
//!
//! Whether a part runs on this thread or another never shows in the result: every part does the
//! same arithmetic on the same elements, whoever runs it. Problems below [`GRAIN`] stay on the
//! calling thread, because waking another costs more than they do.

use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Element-operations below which a problem stays on the calling thread.
pub const GRAIN: usize = 32 * 1024;

/// Elements of a part: large enough to hide the cost of handing it out, small enough that a few
/// slices of it stay in a core's own cache.
pub const CHUNK: usize = 16 * 1024;

/// Slices, or tuples and options of them, that are cut at the same row.
pub trait Split: Send + Sized {
    /// What the work is given: the slices.
    type Part;
    /// The first `rows` rows, and the rest.
    fn split(self, rows: usize) -> (Self, Self);
    /// Unwraps the slices.
    fn part(self) -> Self::Part;
}

/// A slice with a number of elements for each row; made by [`rows`].
#[derive(Debug)]
pub struct Rows<S> {
    slice: S,
    width: usize,
}

/// Says that `slice` holds `width` elements for each row.
pub fn rows<S>(slice: S, width: usize) -> Rows<S> {
    Rows { slice, width }
}

impl<'a, T: Sync> Split for &'a [T] {
    type Part = &'a [T];
    #[inline]
    fn split(self, rows: usize) -> (Self, Self) {
        self.split_at(rows)
    }
    #[inline]
    fn part(self) -> Self::Part {
        self
    }
}

impl<'a, T: Send> Split for &'a mut [T] {
    type Part = &'a mut [T];
    #[inline]
    fn split(self, rows: usize) -> (Self, Self) {
        self.split_at_mut(rows)
    }
    #[inline]
    fn part(self) -> Self::Part {
        self
    }
}

impl<S: Split> Split for Rows<S> {
    type Part = S::Part;
    #[inline]
    fn split(self, count: usize) -> (Self, Self) {
        let (head, tail) = self.slice.split(count * self.width);
        (rows(head, self.width), rows(tail, self.width))
    }
    #[inline]
    fn part(self) -> Self::Part {
        self.slice.part()
    }
}

impl<S: Split> Split for Option<S> {
    type Part = Option<S::Part>;
    #[inline]
    fn split(self, rows: usize) -> (Self, Self) {
        match self {
            Some(slice) => {
                let (head, tail) = slice.split(rows);
                (Some(head), Some(tail))
            }
            None => (None, None),
        }
    }
    #[inline]
    fn part(self) -> Self::Part {
        self.map(Split::part)
    }
}

/// A slice cut where [`block_range`] cuts its rows; made by [`in_blocks`].
#[derive(Debug)]
pub(crate) struct InBlocks<S> {
    slice: S,
    width: usize,
    count: usize,
    blocks: usize,
    /// The block that the slice begins with.
    first: usize,
}

/// Says that `slice` holds `count` rows of `width` elements, of which a "row" of the loop is one of
/// `blocks` parts.
pub(crate) fn in_blocks<S>(slice: S, width: usize, count: usize, blocks: usize) -> InBlocks<S> {
    InBlocks {
        slice,
        width,
        count,
        blocks,
        first: 0,
    }
}

impl<S: Split> Split for InBlocks<S> {
    type Part = S::Part;
    #[inline]
    fn split(self, parts: usize) -> (Self, Self) {
        let InBlocks {
            slice,
            width,
            count,
            blocks,
            first,
        } = self;
        let begin = |block| block_range(count, blocks, block).start * width;
        let (head, tail) = slice.split(begin(first + parts) - begin(first));
        let from = |slice, first| InBlocks {
            slice,
            width,
            count,
            blocks,
            first,
        };
        (from(head, first), from(tail, first + parts))
    }
    #[inline]
    fn part(self) -> Self::Part {
        self.slice.part()
    }
}

macro_rules! tuple {
    ($($s:ident $v:ident),*) => {
        impl<$($s: Split),*> Split for ($($s,)*) {
            type Part = ($($s::Part,)*);
            #[inline]
            fn split(self, rows: usize) -> (Self, Self) {
                let ($($v,)*) = self;
                $(let $v = $v.split(rows);)*
                (($($v.0,)*), ($($v.1,)*))
            }
            #[inline]
            fn part(self) -> Self::Part {
                let ($($v,)*) = self;
                ($($v.part(),)*)
            }
        }
    };
}
tuple!(A a);
tuple!(A a, B b);
tuple!(A a, B b, C c);
tuple!(A a, B b, C c, D d);
tuple!(A a, B b, C c, D d, E e);
tuple!(A a, B b, C c, D d, E e, F f);
tuple!(A a, B b, C c, D d, E e, F f, G g);

/// Calls `work(first, part)` for parts of `CHUNK` elements of slices of `count` elements each.
/// `first` is the index of the part's first element.
pub fn for_each_chunk<P: Split, F>(count: usize, slices: P, work: F)
where
    F: Fn(usize, P::Part) + Sync,
{
    for_each_block(count, CHUNK, count, slices, work);
}

/// Calls `work(first_row, part)` for blocks of whole rows, about `CHUNK` elements of `width` to
/// the row. Wrap slices with another number of elements for each row in [`rows`]: a slice given
/// bare has one.
pub fn for_each_row_block<P: Split, F>(count: usize, width: usize, slices: P, work: F)
where
    F: Fn(usize, P::Part) + Sync,
{
    let block = (CHUNK / width.max(1)).max(1);
    for_each_block(
        count,
        block,
        count.saturating_mul(width.max(1)),
        slices,
        work,
    );
}

/// Calls `work(first_row, part)` for blocks of `block` rows, the last one perhaps shorter.
/// `cost` is the number of element-operations of the whole, by which it is decided whether
/// other threads are asked.
pub fn for_each_block<P: Split, F>(count: usize, block: usize, cost: usize, slices: P, work: F)
where
    F: Fn(usize, P::Part) + Sync,
{
    let block = block.max(1);
    if cost < GRAIN {
        let (mut first, mut rest) = (0, slices);
        while count - first > block {
            let (head, tail) = rest.split(block);
            work(first, head.part());
            (first, rest) = (first + block, tail);
        }
        if first < count {
            work(first, rest.part());
        }
    } else {
        halve(0, count, block, slices, &work);
    }
}

/// Rows `first .. first + count`, of which `slices` begin at `first`.
fn halve<P: Split, F>(first: usize, count: usize, block: usize, slices: P, work: &F)
where
    F: Fn(usize, P::Part) + Sync,
{
    let blocks = count.div_ceil(block);
    if blocks <= 1 {
        if count > 0 {
            work(first, slices.part());
        }
        return;
    }
    let left = blocks / 2 * block;
    let (head, tail) = slices.split(left);
    rayon::join(
        || halve(first, left, block, head, work),
        || halve(first + left, count - left, block, tail, work),
    );
}

/// `leaf` of each part of `CHUNK` elements, joined as a balanced tree that depends on the length
/// alone; `leaf` of nothing if there is nothing.
pub fn reduce_chunks<T: Sync, R: Send>(
    x: &[T],
    leaf: &(impl Fn(&[T]) -> R + Sync),
    join: &(impl Fn(R, R) -> R + Sync),
) -> R {
    if x.len() <= CHUNK {
        return leaf(x);
    }
    let (head, tail) = x.split_at(x.len().div_ceil(CHUNK) / 2 * CHUNK);
    let (a, b) = rayon::join(
        || reduce_chunks(head, leaf, join),
        || reduce_chunks(tail, leaf, join),
    );
    join(a, b)
}

/// Calls `work` for each of `0..count`, in order on this thread or, if `parallel`, on any.
pub(crate) fn each(count: usize, parallel: bool, work: impl Fn(usize) + Sync) {
    in_lanes(count, parallel, |claim| {
        let mut i = claim();
        while i < count {
            work(i);
            i = claim();
        }
    });
}

/// Runs `lane` on this thread and, if `parallel`, on others, at most `most` at a time. Lanes share
/// pieces of work by asking for the number of the next one, which rises from 0.
pub(crate) fn in_lanes(
    most: usize,
    parallel: bool,
    lane: impl Fn(&(dyn Fn() -> usize + Sync)) + Sync,
) {
    let next = AtomicUsize::new(0);
    let claim = || next.fetch_add(1, Ordering::Relaxed);
    let lanes = most.min(rayon::current_num_threads());
    if parallel && lanes > 1 {
        (0..lanes)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|_| lane(&claim));
    } else {
        lane(&claim);
    }
}

/// How many pieces of work are finished, for pieces that need the results of earlier ones.
#[derive(Default)]
pub(crate) struct Finished(AtomicUsize);

impl Finished {
    /// One more is.
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    /// Waits for the first `count`. These must have been claimed: then somebody is at work on them,
    /// and the wait ends, however many lanes have begun.
    pub(crate) fn wait(&self, count: usize) {
        let mut turns = 0;
        while self.0.load(Ordering::Acquire) < count {
            turns += 1;
            if turns < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Looks at a counter before a waiting thread offers its core to others: about 50 µs.
const SPINS: usize = 2048;

/// The rows of block `index` when `count` rows are cut into `blocks` parts that differ in size
/// by at most one. For reductions with a fixed number of partial sums.
pub fn block_range(count: usize, blocks: usize, index: usize) -> std::ops::Range<usize> {
    let (size, longer) = (count / blocks, count % blocks);
    let start = index * size + index.min(longer);
    start..start + size + usize::from(index < longer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_row_is_visited_once(
            count in 0usize..200, block in 0usize..40, wide in any::<bool>(), width in 0usize..4
        ) {
            let x: Vec<usize> = (0..count * width).collect();
            let mut y = vec![0; count * width];
            let mut seen = vec![0; count];
            let cost = if wide { GRAIN } else { 0 };
            let slices = (rows(&x[..], width), Some(rows(&mut y[..], width)), &mut seen[..]);
            for_each_block(count, block, cost, slices, |first, (x, y, seen)| {
                let y = y.unwrap();
                assert!(seen.len() <= block.max(1) && !seen.is_empty());
                assert_eq!(x.len(), seen.len() * width);
                for (i, seen) in seen.iter_mut().enumerate() {
                    *seen += first + i + 1;
                }
                for (x, y) in x.iter().zip(y) {
                    *y += x + 1;
                }
            });
            prop_assert!(seen.iter().enumerate().all(|(i, &s)| s == i + 1));
            prop_assert!(y.iter().enumerate().all(|(i, &y)| y == i + 1));
        }

        #[test]
        fn blocks_cover_all_rows_evenly(count in 0usize..1000, blocks in 1usize..70) {
            let mut next = 0;
            for i in 0..blocks {
                let range = block_range(count, blocks, i);
                prop_assert_eq!(range.start, next);
                prop_assert!(range.len() == count / blocks || range.len() == count / blocks + 1);
                next = range.end;
            }
            prop_assert_eq!(next, count);
        }
    }

    #[test]
    fn chunks_know_where_they_are() {
        for n in [0, 5, CHUNK, GRAIN + 5] {
            let mut y = vec![0; n];
            for_each_chunk(n, &mut y[..], |first, part: &mut [usize]| {
                for (i, y) in part.iter_mut().enumerate() {
                    *y = first + i;
                }
            });
            assert!(y.iter().enumerate().all(|(i, &y)| i == y), "{n}");
        }
    }

    #[test]
    fn a_reduction_sees_every_element_in_order() {
        for n in [0, 1, CHUNK, CHUNK + 1, 7 * CHUNK + 3] {
            let x: Vec<usize> = (0..n).collect();
            let all = reduce_chunks(&x, &|x: &[usize]| x.to_vec(), &|mut a: Vec<_>, b| {
                a.extend(b);
                a
            });
            assert_eq!(all, x);
        }
    }

    #[test]
    fn an_option_that_is_none_stays_none() {
        let y: Option<&mut [f32]> = None;
        for_each_chunk(3 * GRAIN, (y,), |_, (y,)| assert!(y.is_none()));
    }
}
