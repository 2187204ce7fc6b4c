//! Bytes on their way to a device and back, for whose arrival nobody waits. They lie in memory of this machine that is
//! pinned, which a device reads and writes by itself when it gets there, so that a copy is a task like any other: asked for
//! behind one launch and before the next, sent with them, part of their graph.
//!
//! What is sent goes through a ring, of which a part is used again once a device has read it; each thing that is read back
//! has a place of its own until it is looked at. When that is, the numbers of sends say: bytes belong to one, and have
//! arrived when the device is behind it.

use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of the ring.
const RING: usize = 16 << 20;
/// What is larger (weights, when they are loaded) does not go this way.
const LONGEST: usize = RING / 4;
/// Every address is a multiple of it.
const ALIGN: usize = 256;
/// Bytes of a place for what is read back.
const PLACE: usize = 256;
/// How many there are.
const PLACES: usize = 64;

/// The number of a send: each is one more than the one before it.
pub(super) type Number = u64;

/// What to do where there is no room: to wait for this send.
pub(super) type Full = Number;

/// Which parts of the ring are on their way.
#[derive(Debug, Default)]
struct Ring {
    /// Where the next bytes go
    head: usize,
    /// Parts, in the order in which they were taken, each with the send that reads it
    taken: VecDeque<(Range<usize>, Number)>,
}

impl Ring {
    /// A place for `bytes`, at most [`LONGEST`], that send `number` will read.
    fn take(&mut self, bytes: usize, number: Number) -> Result<usize, Full> {
        let length = bytes.next_multiple_of(ALIGN);
        let first = match self.head + length <= RING {
            true => self.head,
            false => 0,
        };
        let wanted = first..first + length;
        let overlaps = |taken: &Range<usize>| taken.start < wanted.end && wanted.start < taken.end;
        let in_the_way = self.taken.iter().filter(|(taken, _)| overlaps(taken));
        if let Some(last) = in_the_way.map(|(_, number)| *number).max() {
            return Err(last);
        }
        self.head = wanted.end;
        self.taken.push_back((wanted, number));
        Ok(first)
    }

    fn arrived(&mut self, number: Number) {
        self.taken.retain(|(_, of)| *of > number);
    }
}

/// Who has a place for what is read back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Free,
    /// Somebody will look at it.
    Held(Number),
    /// Nobody will, but this send writes to it.
    Left(Number),
}

#[derive(Debug)]
struct Places([Place; PLACES]);

impl Default for Places {
    fn default() -> Places {
        Places([Place::Free; PLACES])
    }
}

impl Places {
    /// A place that send `number` will write to; nothing if all are held.
    fn take(&mut self, number: Number) -> Option<Result<usize, Full>> {
        if let Some(free) = self.0.iter().position(|place| *place == Place::Free) {
            self.0[free] = Place::Held(number);
            return Some(Ok(free));
        }
        let left = self.0.iter().filter_map(|place| match *place {
            Place::Left(number) => Some(number),
            Place::Free | Place::Held(_) => None,
        });
        left.min().map(Err)
    }

    /// Told that nobody will look at a place any more.
    fn leave(&mut self, place: usize, arrived: Number) {
        self.0[place] = match self.0[place] {
            Place::Held(number) if number > arrived => Place::Left(number),
            _ => Place::Free,
        };
    }

    fn arrived(&mut self, number: Number) {
        for place in &mut self.0 {
            if matches!(*place, Place::Left(of) if of <= number) {
                *place = Place::Free;
            }
        }
    }
}

/// Pinned memory, and who uses what of it.
#[derive(Debug)]
pub(super) struct Staging {
    /// Of [`Staging::BYTES`]
    memory: *mut u8,
    ring: Ring,
    places: Places,
    arrived: Number,
}

// SAFETY: the memory is nobody else's; who has the device's queue has this.
unsafe impl Send for Staging {}

impl Staging {
    /// Bytes that it takes.
    pub const BYTES: usize = RING + PLACES * PLACE;

    /// Over so many pinned bytes, which the backend that gave them frees when nobody uses this any more.
    pub fn over(memory: *mut u8) -> Staging {
        Staging {
            memory,
            ring: Ring::default(),
            places: Places::default(),
            arrived: 0,
        }
    }

    /// The memory that it is over.
    pub fn memory(&self) -> *mut u8 {
        self.memory
    }

    /// Whether uploads of so many bytes go this way.
    pub fn sends(bytes: usize) -> bool {
        bytes <= LONGEST
    }

    /// Whether so many bytes are read back this way.
    pub fn reads(bytes: usize) -> bool {
        bytes <= PLACE
    }

    /// Puts bytes, as many as [`Staging::sends`], where send `number` will read them: at the address that comes back.
    pub fn put(&mut self, from: &[u8], number: Number) -> Result<u64, Full> {
        let first = self.ring.take(from.len(), number)?;
        // SAFETY: the place lies within the memory, and the device does not read it: what was there before has arrived.
        unsafe {
            let place = self.memory.add(first);
            std::ptr::copy_nonoverlapping(from.as_ptr(), place, from.len());
            Ok(place as u64)
        }
    }

    /// A place that send `number` will write to, and its address; nothing if there is none until somebody looks at what
    /// was read.
    pub fn place(&mut self, number: Number) -> Option<Result<(usize, u64), Full>> {
        let place = self.places.take(number)?;
        Some(place.map(|place| (place, self.address(place) as u64)))
    }

    fn address(&self, place: usize) -> *mut u8 {
        // SAFETY: it lies within the memory.
        unsafe { self.memory.add(RING + place * PLACE) }
    }

    /// Copies what has arrived in a place.
    ///
    /// # Panics
    /// If a place is shorter, or its send is still on the way.
    pub fn read(&self, place: usize, to: &mut [u8]) {
        assert!(to.len() <= PLACE, "a place of {PLACE} bytes");
        let Place::Held(number) = self.places.0[place] else {
            panic!("a place that nobody holds");
        };
        assert!(number <= self.arrived, "bytes that have not arrived");
        // SAFETY: within the memory, and nothing writes to it any more.
        unsafe { std::ptr::copy_nonoverlapping(self.address(place), to.as_mut_ptr(), to.len()) };
    }

    /// Told that nobody will look at a place any more.
    pub fn leave(&mut self, place: usize) {
        self.places.leave(place, self.arrived);
    }

    /// Told that a device is behind send `number`.
    pub fn arrived(&mut self, number: Number) {
        self.arrived = self.arrived.max(number);
        self.ring.arrived(number);
        self.places.arrived(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// No byte is written over before its send was waited for, and places are aligned.
        #[test]
        fn what_is_on_its_way_is_not_written_over(
            uploads in prop::collection::vec((1usize..=LONGEST, 0u64..3), 1..100)
        ) {
            let mut ring = Ring::default();
            let mut on_the_way: Vec<(Range<usize>, Number)> = Vec::new();
            let mut number = 1;
            for (bytes, sends) in uploads {
                number += sends;
                let first = loop {
                    match ring.take(bytes, number) {
                        Ok(first) => break first,
                        Err(full) => {
                            prop_assert!(full <= number);
                            prop_assert!(on_the_way.iter().any(|(_, of)| *of <= full), "no progress");
                            // What has that number is sent first, and the next has another.
                            number = number.max(full + 1);
                            ring.arrived(full);
                            on_the_way.retain(|(_, of)| *of > full);
                        }
                    }
                };
                let range = first..first + bytes;
                prop_assert!(range.end <= RING && range.start.is_multiple_of(ALIGN));
                for (other, _) in &on_the_way {
                    prop_assert!(range.end <= other.start || other.end <= range.start);
                }
                on_the_way.push((range, number));
            }
        }

        /// Nothing is waited for while there is room: a step's inputs beside those of the step before.
        #[test]
        fn steps_side_by_side_wait_for_nothing(bytes in 1usize..=RING / 16) {
            let mut ring = Ring::default();
            for number in 1..100 {
                for _ in 0..4 {
                    prop_assert!(ring.take(bytes, number).is_ok());
                }
                ring.arrived(number - 1);
            }
        }
    }

    #[test]
    fn a_place_is_used_again_when_nothing_writes_to_it() {
        let mut places = Places::default();
        for number in 1..=PLACES as Number {
            assert_eq!(places.take(number), Some(Ok(number as usize - 1)));
        }
        assert_eq!(places.take(99), None, "all are held");
        places.leave(3, 4); // written by send 4
        assert_eq!(places.take(100), Some(Ok(3)));
        places.leave(7, 4);
        places.leave(5, 4);
        assert_eq!(
            places.take(101),
            Some(Err(6)),
            "send 6 still writes to place 5"
        );
        places.arrived(6);
        assert_eq!(places.take(101), Some(Ok(5)));
        assert_eq!(places.take(102), Some(Err(8)));
    }
}
