//! Memory from the system, handed out as ranges of bytes. The one module of this crate with
//! `unsafe`: a range is a part of a larger allocation, which the borrow checker cannot see.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::Device;
use crate::ranges::{ALIGN, End, Range, Ranges};

/// Where segments begin: Linux backs such memory with pages of this size, a fault and a TLB entry
/// for each instead of for 4 KiB.
const PAGE: usize = 2 << 20;

/// One allocation of the system, zeroed: every byte is initialised.
struct Segment {
    /// As the system gave it
    memory: NonNull<u8>,
    layout: Layout,
    /// Where ranges are counted from; a multiple of [`ALIGN`]
    start: NonNull<u8>,
}

// SAFETY: a segment is plain memory; who reads and writes which bytes is governed by regions.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// `bytes`, or `None` if the system refuses.
    fn new(bytes: usize) -> Option<Segment> {
        let align = if bytes >= PAGE { PAGE } else { ALIGN };
        // Aligned by hand: an aligned request for zeroed memory would be written to at once.
        let layout = Layout::from_size_align(bytes.checked_add(align)?, 1).ok()?;
        // SAFETY: the layout's size is above 0.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let skip = memory.as_ptr().align_offset(align);
        // SAFETY: skip < align, and `bytes` follow within the allocation.
        let start = unsafe { memory.add(skip) };
        #[cfg(target_os = "linux")]
        if align == PAGE {
            // SAFETY: advice about whole pages of this allocation; it changes no contents, and a
            // refusal changes nothing at all.
            unsafe {
                libc::madvise(
                    start.as_ptr().cast(),
                    bytes / PAGE * PAGE,
                    libc::MADV_HUGEPAGE,
                )
            };
        }
        Some(Segment {
            memory,
            layout,
            start,
        })
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`, and no region is left.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) }
    }
}

/// Bytes that nobody else holds.
pub(crate) struct Region {
    segment: Arc<Segment>,
    range: Range,
}

impl Region {
    /// The bytes; they begin at a multiple of [`ALIGN`].
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: inside the segment, initialised, and written through this region only.
        unsafe {
            let start = self.segment.start.add(self.range.start).as_ptr();
            std::slice::from_raw_parts(start, self.range.bytes)
        }
    }

    /// The bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the region is borrowed alone.
        unsafe {
            let start = self.segment.start.add(self.range.start).as_ptr();
            std::slice::from_raw_parts_mut(start, self.range.bytes)
        }
    }
}

/// Segments, and what is taken of them.
pub(crate) struct Arena {
    ranges: Ranges,
    /// By number
    segments: Vec<Arc<Segment>>,
}

impl Arena {
    pub fn new() -> Arena {
        Arena {
            ranges: Ranges::of(Device::Cpu),
            segments: Vec::new(),
        }
    }

    /// Takes at least `bytes`, or `None` if the system refuses. The contents are unspecified.
    pub fn take(&mut self, bytes: usize, end: End) -> Option<Region> {
        let segments = &mut self.segments;
        let range = self.ranges.take(bytes, end, |bytes| {
            let segment = Segment::new(bytes);
            segment.map(|new| segments.push(Arc::new(new))).is_some()
        })?;
        // Regions are made here alone, of ranges that are disjoint while they are taken, and a
        // range is given back by `release` alone, which consumes its region.
        let segment = Arc::clone(&self.segments[range.segment]);
        Some(Region { segment, range })
    }

    /// Gives a region back.
    ///
    /// # Panics
    /// If it is another arena's.
    pub fn release(&mut self, region: Region) {
        let Region { segment, range } = region;
        let own = self.segments.get(range.segment);
        assert!(
            own.is_some_and(|own| Arc::ptr_eq(own, &segment)),
            "a region goes back to the arena that it came from"
        );
        self.ranges.release(range);
    }

    /// Bytes that the process holds.
    pub fn touched(&self) -> usize {
        self.ranges.touched()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_hold_what_was_written_to_them() {
        let mut arena = Arena::new();
        let mut regions: Vec<Region> = [100, 1 << 20, 3 << 20, 64]
            .into_iter()
            .map(|bytes| arena.take(bytes, End::Low).unwrap())
            .collect();
        for (i, region) in regions.iter_mut().enumerate() {
            assert!(region.bytes().iter().all(|&b| b == 0));
            assert_eq!(region.bytes().as_ptr().align_offset(ALIGN), 0);
            region.bytes_mut().fill(i as u8 + 1);
        }
        for (i, region) in regions.iter().enumerate() {
            assert!(region.bytes().iter().all(|&b| b == i as u8 + 1));
        }
        let region = regions.remove(1);
        let range = region.range;
        arena.release(region);
        let region = arena.take(1 << 20, End::Low).unwrap();
        assert_eq!(region.range, range);
        assert!(region.bytes().iter().all(|&b| b == 2), "contents stay");
    }

    #[test]
    fn regions_outlive_their_arena() {
        let mut arena = Arena::new();
        let mut region = arena.take(1000, End::Low).unwrap();
        drop(arena);
        region.bytes_mut().fill(7);
        assert_eq!(region.bytes()[999], 7);
    }

    #[test]
    #[should_panic(expected = "the arena that it came from")]
    fn a_region_of_another_arena_is_not_taken_back() {
        let (mut one, mut other) = (Arena::new(), Arena::new());
        drop(other.take(100, End::Low).unwrap());
        let region = one.take(100, End::Low).unwrap();
        other.release(region);
    }

    #[test]
    fn what_no_system_has_is_refused() {
        assert!(Arena::new().take(usize::MAX / 2, End::Low).is_none());
        assert!(
            Arena::new()
                .take(isize::MAX as usize - 100, End::Low)
                .is_none()
        );
    }
}
