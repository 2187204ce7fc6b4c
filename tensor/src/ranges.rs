//! Which bytes of which segment are taken: bookkeeping without memory, the same for a real run and
//! for a plan.
//!
//! A request takes the smallest free range that holds it (best fit), among those that were in use
//! before; only if there is none does a segment grow into bytes that were never touched. Neighbours
//! that are free become one range. What a loop of similar steps needs is then found where the last
//! step left it, whatever the shapes are, and nothing goes back to the system in between.

use std::collections::BTreeMap;

/// Every range begins at a multiple of this many bytes: a cache line, and a vector register.
pub(crate) const ALIGN: usize = 64;

/// Requests below this are kept in segments of their own, so that a few long-lived bytes do not
/// stand between large ranges.
const SMALL: usize = 256 << 10;
/// Bytes of a segment for small requests, and of one for the others. Address space: what is never
/// touched is never obtained.
const SMALL_SEGMENT: usize = 8 << 20;
const LARGE_SEGMENT: usize = 512 << 20;

/// A range that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub segment: usize,
    pub start: usize,
    /// A multiple of [`ALIGN`], above 0
    pub bytes: usize,
}

struct Segment {
    bytes: usize,
    small: bool,
    /// No byte from here on was ever taken.
    touched: usize,
    /// Start and length of each free range below `touched`; no two are neighbours.
    free: BTreeMap<usize, usize>,
}

/// The ranges of all segments.
#[derive(Default)]
pub(crate) struct Ranges {
    segments: Vec<Segment>,
}

impl Ranges {
    /// Takes `bytes`, which are rounded up to [`ALIGN`]. `grow(bytes)` is asked for a further
    /// segment, and says whether there is one; without, the result is `None`.
    pub fn take(&mut self, bytes: usize, grow: impl FnMut(usize) -> bool) -> Option<Range> {
        let bytes = bytes.checked_next_multiple_of(ALIGN)?.max(ALIGN);
        let small = bytes < SMALL;
        if let Some((segment, start)) = self.best_fit(bytes, small) {
            return Some(self.cut(segment, start, bytes));
        }
        let segment = match self.extendable(bytes, small) {
            Some(segment) => segment,
            None => self.add(bytes, small, grow)?,
        };
        Some(self.extend(segment, bytes))
    }

    /// Gives a range back.
    pub fn release(&mut self, range: Range) {
        let free = &mut self.segments[range.segment].free;
        let (mut start, mut bytes) = (range.start, range.bytes);
        if let Some((&before, &length)) = free.range(..start).next_back()
            && before + length == start
        {
            free.remove(&before);
            start = before;
            bytes += length;
        }
        if let Some(length) = free.remove(&(range.start + range.bytes)) {
            bytes += length;
        }
        free.insert(start, bytes);
    }

    /// Bytes that were ever taken: what the process holds.
    pub fn touched(&self) -> usize {
        self.segments.iter().map(|s| s.touched).sum()
    }

    fn best_fit(&self, bytes: usize, small: bool) -> Option<(usize, usize)> {
        let fits = self.segments.iter().enumerate().flat_map(|(i, segment)| {
            let free = (segment.small == small).then_some(&segment.free);
            let free = free.into_iter().flatten();
            free.filter(move |(_, length)| **length >= bytes)
                .map(move |(&start, &length)| (length, i, start))
        });
        fits.min().map(|(_, i, start)| (i, start))
    }

    /// Takes the front of a free range.
    fn cut(&mut self, segment: usize, start: usize, bytes: usize) -> Range {
        let free = &mut self.segments[segment].free;
        let length = free.remove(&start).expect("the range is free");
        if length > bytes {
            free.insert(start + bytes, length - bytes);
        }
        Range {
            segment,
            start,
            bytes,
        }
    }

    /// The segment that has to grow least to hold `bytes` at its end.
    fn extendable(&self, bytes: usize, small: bool) -> Option<usize> {
        let mut best: Option<(usize, usize)> = None;
        for (i, segment) in self.segments.iter().enumerate() {
            let start = segment.tail();
            let room = segment.bytes - start;
            let growth = (start + bytes.min(room)).saturating_sub(segment.touched);
            let better = best.is_none_or(|(least, _)| growth < least);
            if segment.small == small && room >= bytes && better {
                best = Some((growth, i));
            }
        }
        best.map(|(_, i)| i)
    }

    /// Takes `bytes` from where the segment's last free range begins, into what was never touched.
    fn extend(&mut self, index: usize, bytes: usize) -> Range {
        let segment = &mut self.segments[index];
        let start = segment.tail();
        segment.free.remove(&start);
        segment.touched = start + bytes;
        Range {
            segment: index,
            start,
            bytes,
        }
    }

    fn add(
        &mut self,
        bytes: usize,
        small: bool,
        mut grow: impl FnMut(usize) -> bool,
    ) -> Option<usize> {
        let usual = if small { SMALL_SEGMENT } else { LARGE_SEGMENT };
        // A system that counts address space may refuse the usual size, and have what is needed.
        let size = [bytes.max(usual), bytes]
            .into_iter()
            .find(|&size| grow(size))?;
        self.segments.push(Segment {
            bytes: size,
            small,
            touched: 0,
            free: BTreeMap::new(),
        });
        Some(self.segments.len() - 1)
    }
}

impl Segment {
    /// Where the free bytes at the end begin.
    fn tail(&self) -> usize {
        match self.free.last_key_value() {
            Some((&start, &length)) if start + length == self.touched => start,
            _ => self.touched,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(ranges: &mut Ranges, bytes: usize) -> Range {
        ranges.take(bytes, |_| true).unwrap()
    }

    #[test]
    fn what_is_free_is_used_before_anything_grows() {
        let mut r = Ranges::default();
        let sizes = [3 << 20, 1 << 20, 2 << 20, 1 << 20];
        let taken = sizes.map(|bytes| take(&mut r, bytes));
        assert_eq!(r.touched(), 7 << 20);
        r.release(taken[0]);
        r.release(taken[2]);
        assert_eq!(take(&mut r, 2 << 20), taken[2], "the smallest that fits");
        let first = take(&mut r, 1 << 20);
        let second = take(&mut r, 2 << 20);
        assert_eq!((first.start, second.start), (0, 1 << 20), "a range is cut");
        assert_eq!(r.touched(), 7 << 20);
        for range in [first, second, taken[1]] {
            r.release(range);
        }
        assert_eq!(take(&mut r, 4 << 20).start, 0, "neighbours become one");
    }

    #[test]
    fn a_free_end_grows_instead_of_being_left() {
        let mut r = Ranges::default();
        for bytes in (1..40).map(|n| n << 20) {
            let range = take(&mut r, bytes);
            r.release(range);
        }
        assert_eq!(r.touched(), 39 << 20);
    }

    #[test]
    fn small_requests_stand_apart() {
        let mut r = Ranges::default();
        let large = take(&mut r, 1 << 20);
        let small = take(&mut r, 100);
        assert_ne!(large.segment, small.segment);
        assert_eq!(small.bytes, 128);
    }

    #[test]
    fn a_refused_segment_is_asked_for_in_its_own_size_and_then_given_up() {
        let mut r = Ranges::default();
        let mut asked = Vec::new();
        let range = r.take(1 << 20, |bytes| {
            asked.push(bytes);
            bytes <= 1 << 20
        });
        assert!(range.is_some());
        assert_eq!(asked, [LARGE_SEGMENT, 1 << 20]);
        assert_eq!(r.take(2 << 20, |_| false), None);
        assert_eq!(r.take(usize::MAX, |_| true), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Ranges that are taken never overlap, lie inside what was touched, and all come back.
        #[test]
        fn taken_ranges_are_disjoint(steps in prop::collection::vec((any::<bool>(), 1usize..3 << 20), 1..200)) {
            let mut r = Ranges::default();
            let mut taken: Vec<Range> = Vec::new();
            let mut most = 0;
            for (free, bytes) in steps {
                if free && !taken.is_empty() {
                    r.release(taken.swap_remove(bytes % taken.len()));
                    continue;
                }
                let new = take(&mut r, bytes);
                prop_assert!(new.bytes >= bytes && new.start.is_multiple_of(ALIGN));
                let segment = &r.segments[new.segment];
                prop_assert!(new.start + new.bytes <= segment.touched);
                prop_assert!(segment.touched <= segment.bytes);
                for old in taken.iter().filter(|old| old.segment == new.segment) {
                    let apart = old.start + old.bytes <= new.start || new.start + new.bytes <= old.start;
                    prop_assert!(apart, "{old:?} and {new:?}");
                }
                taken.push(new);
                most = most.max(taken.iter().map(|r| r.bytes).sum());
                prop_assert!(r.touched() >= most);
            }
            for range in taken {
                r.release(range);
            }
            for segment in &r.segments {
                prop_assert_eq!(segment.free.iter().collect::<Vec<_>>(), [(&0, &segment.touched)]);
            }
        }
    }
}
