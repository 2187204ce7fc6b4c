//! Uploads that do not wait. What a device takes from ordinary memory of this machine, beyond a few KB, it takes when it
//! gets there, and the caller waits for that. So bytes are first copied to pinned memory, of which parts are used in
//! turn, each again when what was sent from it has arrived.

use cudarc::driver::sys::{self, CUevent, CUstream};

use super::driver::check;
use super::{Result, SliceMut};

/// What the driver copies at once by itself.
const DIRECT: usize = 64 << 10;
/// Bytes of a part: what is larger (weights, when they are loaded) goes without this.
const PART: usize = 2 << 20;
const PARTS: usize = 4;

/// Where the next bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// From the beginning of the pinned memory
    first: usize,
    /// A part that nothing more is sent from until it is used again: its end is to be noted
    left: Option<usize>,
    /// A part whose end was noted before, which is to be waited for
    entered: Option<usize>,
}

/// Which part is in use, and how much of it.
#[derive(Debug, Default)]
struct Ring {
    part: usize,
    used: usize,
    /// Parts whose end was noted
    noted: [bool; PARTS],
}

impl Ring {
    /// A place for `bytes`, at most [`PART`].
    fn place(&mut self, bytes: usize) -> Place {
        let (mut left, mut entered) = (None, None);
        if self.used + bytes > PART {
            left = Some(self.part);
            self.noted[self.part] = true;
            self.part = (self.part + 1) % PARTS;
            self.used = 0;
            entered = self.noted[self.part].then_some(self.part);
        }
        let first = self.part * PART + self.used;
        self.used = (self.used + bytes).next_multiple_of(256);
        Place {
            first,
            left,
            entered,
        }
    }
}

/// Pinned memory, and an event for the end of each part.
pub(super) struct Staging {
    memory: *mut u8,
    events: [CUevent; PARTS],
    ring: Ring,
}

impl Staging {
    /// Whether uploads of so many bytes go this way.
    pub fn takes(bytes: usize) -> bool {
        bytes > DIRECT && bytes <= PART
    }

    /// For the device that is this thread's.
    ///
    /// # Errors
    /// No more memory to pin.
    pub fn new() -> Result<Staging> {
        let mut staging = Staging {
            memory: std::ptr::null_mut(),
            events: [std::ptr::null_mut(); PARTS],
            ring: Ring::default(),
        };
        // Times are not asked for.
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: valid pointers; what is made before a failure is given back by `drop`.
        unsafe {
            for event in &mut staging.events {
                check("cuEventCreate", sys::cuEventCreate(event, flags))?;
            }
            let memory = (&raw mut staging.memory).cast();
            check(
                "cuMemAllocHost",
                sys::cuMemAllocHost_v2(memory, PARTS * PART),
            )?;
        }
        Ok(staging)
    }

    /// Copies bytes, as many as [`Staging::takes`], in the order of `stream`; `from` may be used again at once.
    ///
    /// # Errors
    /// A failed call.
    pub fn upload(&mut self, from: &[u8], to: SliceMut<'_>, stream: CUstream) -> Result<()> {
        let place = self.ring.place(from.len());
        // SAFETY: events and a stream of one device; the place lies within the pinned memory, and what was sent from it
        // before has arrived, which the event after it says.
        unsafe {
            if let Some(part) = place.left {
                check(
                    "cuEventRecord",
                    sys::cuEventRecord(self.events[part], stream),
                )?;
            }
            if let Some(part) = place.entered {
                check(
                    "cuEventSynchronize",
                    sys::cuEventSynchronize(self.events[part]),
                )?;
            }
            let pinned = self.memory.add(place.first);
            std::ptr::copy_nonoverlapping(from.as_ptr(), pinned, from.len());
            check(
                "cuMemcpyHtoDAsync",
                sys::cuMemcpyHtoDAsync_v2(
                    to.address(),
                    pinned.cast_const().cast(),
                    from.len(),
                    stream,
                ),
            )
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: made by `new`, or null; whoever drops this has waited for the stream. A failure leaves nothing to be
        // done.
        unsafe {
            for event in self.events {
                if !event.is_null() {
                    sys::cuEventDestroy_v2(event);
                }
            }
            if !self.memory.is_null() {
                sys::cuMemFreeHost(self.memory.cast());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// No byte is written over before the event behind it was waited for, and places are aligned.
        #[test]
        fn what_is_on_its_way_is_not_written_over(sizes in prop::collection::vec(1usize..=PART, 1..100)) {
            let mut ring = Ring::default();
            let mut on_the_way: Vec<std::ops::Range<usize>> = Vec::new();
            for bytes in sizes {
                let place = ring.place(bytes);
                if let Some(part) = place.left {
                    prop_assert_ne!(Some(part), place.entered);
                }
                if let Some(part) = place.entered {
                    on_the_way.retain(|range| range.start / PART != part);
                }
                let range = place.first..place.first + bytes;
                prop_assert!(range.end <= PARTS * PART && range.start.is_multiple_of(256));
                prop_assert_eq!(range.start / PART, (range.end - 1) / PART, "within one part");
                for other in &on_the_way {
                    prop_assert!(range.end <= other.start || other.end <= range.start);
                }
                on_the_way.push(range);
            }
        }

        /// The first round waits for nothing.
        #[test]
        fn nothing_is_waited_for_before_every_part_was_used(bytes in 1usize..=PART) {
            let mut ring = Ring::default();
            let rounds = PARTS * (PART / bytes.next_multiple_of(256)).max(1);
            let waits = (0..rounds).filter(|_| ring.place(bytes).entered.is_some()).count();
            prop_assert_eq!(waits, 0);
        }
    }
}
