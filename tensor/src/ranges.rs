//! Which bytes of which segment are taken: bookkeeping without memory, the same for a real run and
//! for a plan.
//!
//! A request takes the lowest free range that holds it, among those that were in use before; only if
//! there is none does a segment grow into bytes that were never touched. Neighbours that are free
//! become one range. What a loop of similar steps needs is then found where the last step left it,
//! whatever the shapes are, and nothing goes back to the system in between.
//!
//! What a forward pass keeps piles up from the low end, and goes in the other order. Gradients come
//! while it goes, and outlast it: they take the high end, above all else, and meet it as it goes. Among
//! the rest, even a small one would cut in two what is about to be free, and the largest requests
//! would find no place there.

use std::collections::BTreeMap;

use crate::Device;

/// Every range begins at a multiple of this many bytes: a cache line, and a vector register.
pub(crate) const ALIGN: usize = 64;

/// Requests below this are kept in segments of their own, so that a few long-lived bytes do not
/// stand between large ranges.
const SMALL: usize = 256 << 10;
/// Bytes of a segment for small requests.
const SMALL_SEGMENT: usize = 8 << 20;
/// Bytes of a segment for the others. Between two segments there is a gap whatever they hold, and on a
/// CPU they are address space: what is never touched is never obtained. A GPU's memory is obtained whole.
const LARGE_SEGMENT: usize = 512 << 20;
#[cfg(target_pointer_width = "64")]
const CPU_SEGMENT: usize = 16 << 30;
#[cfg(not(target_pointer_width = "64"))]
const CPU_SEGMENT: usize = LARGE_SEGMENT;

/// Which end of what is free a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Low,
    /// Above everything that was taken from the low end
    High,
}

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
    /// Free below `touched`, in order: few, as no two are neighbours
    free: Vec<Span>,
    /// Where the highest range ends that was taken from the low end, 0 without any
    low_end: usize,
    /// End and start of each range that was taken from the high end
    high: BTreeMap<usize, usize>,
}

/// Bytes of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: usize,
    end: usize,
}

impl Span {
    fn bytes(&self) -> usize {
        self.end - self.start
    }
}

/// The ranges of all segments.
pub(crate) struct Ranges {
    segments: Vec<Segment>,
    /// Bytes of a segment for large requests
    usual: usize,
}

impl Ranges {
    /// Of a device, nothing taken.
    pub fn of(device: Device) -> Ranges {
        let usual = match device {
            Device::Cpu => CPU_SEGMENT,
            Device::Cuda(_) => LARGE_SEGMENT,
        };
        Ranges {
            segments: Vec::new(),
            usual,
        }
    }

    /// Takes `bytes`, which are rounded up to [`ALIGN`]. `grow(bytes)` is asked for a further
    /// segment, and says whether there is one; without, the result is `None`.
    pub fn take(
        &mut self,
        bytes: usize,
        end: End,
        grow: impl FnMut(usize) -> bool,
    ) -> Option<Range> {
        let bytes = bytes.checked_next_multiple_of(ALIGN)?.max(ALIGN);
        let small = bytes < SMALL;
        let found = self.find(bytes, small, end);
        let (segment, start) = match found.or_else(|| self.extendable(bytes, small)) {
            Some(place) => place,
            None => (self.add(bytes, small, grow)?, 0),
        };
        self.segments[segment].take(start, bytes, end);
        Some(Range {
            segment,
            start,
            bytes,
        })
    }

    /// Gives a range back.
    pub fn release(&mut self, range: Range) {
        self.segments[range.segment].release(range.start, range.start + range.bytes);
    }

    /// Bytes that were ever taken: what the process holds.
    pub fn touched(&self) -> usize {
        self.segments.iter().map(|s| s.touched).sum()
    }

    /// Where `bytes` are free that were in use before: segment and start.
    fn find(&self, bytes: usize, small: bool, end: End) -> Option<(usize, usize)> {
        let segments = self.segments.iter().enumerate();
        let mut segments = segments.filter(|(_, segment)| segment.small == small);
        match end {
            End::Low => segments.find_map(|(i, segment)| {
                let span = segment.free.iter().find(|span| span.bytes() >= bytes)?;
                Some((i, span.start))
            }),
            End::High => segments.rev().find_map(|(i, segment)| {
                let above = |span: &&Span| span.start >= segment.low_end;
                let mut spans = segment.free.iter().rev().take_while(above);
                let span = spans.find(|span| span.bytes() >= bytes)?;
                Some((i, span.end - bytes))
            }),
        }
    }

    /// The segment that has to grow least to hold `bytes` at its end, and where they begin.
    fn extendable(&self, bytes: usize, small: bool) -> Option<(usize, usize)> {
        let segments = self.segments.iter().enumerate();
        segments
            .map(|(i, segment)| (i, segment, segment.tail()))
            .filter(|(_, segment, start)| segment.small == small && segment.bytes - start >= bytes)
            .min_by_key(|(_, segment, start)| (start + bytes).saturating_sub(segment.touched))
            .map(|(i, _, start)| (i, start))
    }

    fn add(
        &mut self,
        bytes: usize,
        small: bool,
        mut grow: impl FnMut(usize) -> bool,
    ) -> Option<usize> {
        // A system that counts address space may refuse the usual size, and have what is needed.
        let sizes = match small {
            true => [SMALL_SEGMENT, SMALL_SEGMENT, 0],
            false => [self.usual, LARGE_SEGMENT, 0],
        };
        let mut sizes = sizes.map(|size| size.max(bytes)).to_vec();
        sizes.dedup();
        let size = sizes.into_iter().find(|&size| grow(size))?;
        self.segments.push(Segment {
            bytes: size,
            small,
            touched: 0,
            free: Vec::new(),
            low_end: 0,
            high: BTreeMap::new(),
        });
        Some(self.segments.len() - 1)
    }
}

impl Segment {
    /// Where the free bytes at the end begin.
    fn tail(&self) -> usize {
        match self.free.last() {
            Some(span) if span.end == self.touched => span.start,
            _ => self.touched,
        }
    }

    /// Takes bytes of a free range, or from the tail on into what was never touched.
    fn take(&mut self, start: usize, bytes: usize, from: End) {
        let end = start + bytes;
        let around = self.free.partition_point(|span| span.end <= start);
        if let Some(&span) = self.free.get(around).filter(|span| span.start <= start) {
            let rest = Span { start: end, ..span };
            match (span.start < start, end < span.end) {
                (false, false) => drop(self.free.remove(around)),
                (false, true) => self.free[around] = rest,
                (true, after) => {
                    self.free[around].end = start;
                    if after {
                        self.free.insert(around + 1, rest);
                    }
                }
            }
        }
        self.touched = self.touched.max(end);
        match from {
            End::Low => self.low_end = self.low_end.max(end),
            End::High => drop(self.high.insert(end, start)),
        }
    }

    fn release(&mut self, start: usize, end: usize) {
        let next = self.free.partition_point(|span| span.start < start);
        let before = next > 0 && self.free[next - 1].end == start;
        let behind = self.free.get(next).is_some_and(|span| span.start == end);
        match (before, behind) {
            (false, false) => self.free.insert(next, Span { start, end }),
            (true, false) => self.free[next - 1].end = end,
            (false, true) => self.free[next].start = start,
            (true, true) => self.free[next - 1].end = self.free.remove(next).end,
        }
        if end == self.low_end {
            self.low_end = self.below(start);
        } else {
            self.high.remove(&end);
        }
    }

    /// Where the highest range ends, of those that were taken from the low end, if none ends above `end`.
    fn below(&self, mut end: usize) -> usize {
        loop {
            let next = self.free.partition_point(|span| span.start < end);
            let free = next.checked_sub(1).map(|last| self.free[last]);
            end = match (free, self.high.get(&end)) {
                (Some(span), _) if span.end >= end => span.start,
                (_, Some(&start)) => start,
                _ => return end,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(ranges: &mut Ranges, bytes: usize) -> Range {
        ranges.take(bytes, End::Low, |_| true).unwrap()
    }

    fn take_high(ranges: &mut Ranges, bytes: usize) -> Range {
        ranges.take(bytes, End::High, |_| true).unwrap()
    }

    #[test]
    fn what_is_free_is_used_before_anything_grows() {
        let mut r = Ranges::of(Device::Cpu);
        let sizes = [3 << 20, 1 << 20, 2 << 20, 1 << 20];
        let taken = sizes.map(|bytes| take(&mut r, bytes));
        assert_eq!(r.touched(), 7 << 20);
        r.release(taken[0]);
        r.release(taken[2]);
        let first = take(&mut r, 1 << 20);
        let second = take(&mut r, 2 << 20);
        assert_eq!((first.start, second.start), (0, 1 << 20), "a range is cut");
        assert_eq!(take(&mut r, 2 << 20), taken[2]);
        assert_eq!(r.touched(), 7 << 20);
        for range in [first, second, taken[1]] {
            r.release(range);
        }
        assert_eq!(take(&mut r, 4 << 20).start, 0, "neighbours become one");
    }

    #[test]
    fn a_free_end_grows_instead_of_being_left() {
        let mut r = Ranges::of(Device::Cpu);
        for bytes in (1..40).map(|n| n << 20) {
            let range = take(&mut r, bytes);
            r.release(range);
        }
        assert_eq!(r.touched(), 39 << 20);
    }

    #[test]
    fn small_requests_stand_apart() {
        let mut r = Ranges::of(Device::Cpu);
        let large = take(&mut r, 1 << 20);
        let small = take(&mut r, 100);
        assert_ne!(large.segment, small.segment);
        assert_eq!(small.bytes, 128);
    }

    #[test]
    fn the_high_end_lies_above_all_that_was_taken_from_the_low_one() {
        let mut r = Ranges::of(Device::Cpu);
        let taken = [4 << 20, 1 << 20, 4 << 20].map(|bytes| take(&mut r, bytes));
        r.release(taken[0]);
        let first = take_high(&mut r, 1 << 20);
        assert_eq!(first.start, 9 << 20, "not in what is free below");
        r.release(taken[2]);
        let second = take_high(&mut r, 1 << 20);
        assert_eq!(second.start, 8 << 20, "the end of what is free");
        r.release(taken[1]);
        assert_eq!(take_high(&mut r, 1 << 20).start, 7 << 20);
        assert_eq!(take(&mut r, 7 << 20).start, 0, "one range below it");
        r.release(first);
        assert_eq!(take_high(&mut r, 1 << 20), first);
        assert_eq!(r.touched(), 10 << 20);
    }

    #[test]
    fn a_refused_segment_is_asked_for_in_its_own_size_and_then_given_up() {
        let mut r = Ranges::of(Device::Cpu);
        let mut asked = Vec::new();
        let range = r.take(1 << 20, End::Low, |bytes| {
            asked.push(bytes);
            bytes <= 1 << 20
        });
        assert!(range.is_some());
        assert_eq!(asked, [CPU_SEGMENT, LARGE_SEGMENT, 1 << 20]);
        assert_eq!(r.take(2 << 20, End::High, |_| false), None);
        assert_eq!(r.take(usize::MAX, End::Low, |_| true), None);
        let mut gpu = Ranges::of(Device::Cuda(0));
        let range = gpu.take(1 << 20, End::Low, |bytes| bytes <= LARGE_SEGMENT);
        assert!(range.is_some());
        assert_eq!(gpu.segments[0].bytes, LARGE_SEGMENT);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Ranges that are taken never overlap, lie inside what was touched, and all come back; the high end lies above
        /// the low one.
        #[test]
        fn taken_ranges_are_disjoint(steps in prop::collection::vec((any::<bool>(), any::<bool>(), 1usize..3 << 20), 1..200)) {
            let mut r = Ranges::of(Device::Cpu);
            let (mut taken, mut lows) = (Vec::<Range>::new(), Vec::<Range>::new());
            let low_end = |lows: &[Range], segment| {
                let lows = lows.iter().filter(|low| low.segment == segment);
                lows.map(|low| low.start + low.bytes).max().unwrap_or(0)
            };
            let mut most = 0;
            for (free, high, bytes) in steps {
                if free && !taken.is_empty() {
                    let old = taken.swap_remove(bytes % taken.len());
                    lows.retain(|low| *low != old);
                    r.release(old);
                    prop_assert_eq!(r.segments[old.segment].low_end, low_end(&lows, old.segment));
                    continue;
                }
                let end = if high { End::High } else { End::Low };
                let new = r.take(bytes, end, |_| true).unwrap();
                match high {
                    true => prop_assert!(new.start >= low_end(&lows, new.segment)),
                    false => lows.push(new),
                }
                prop_assert_eq!(r.segments[new.segment].low_end, low_end(&lows, new.segment));
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
                prop_assert!(segment.high.is_empty() && segment.low_end == 0);
                let all = Span { start: 0, end: segment.touched };
                prop_assert_eq!(&segment.free, &[all]);
            }
        }
    }
}
