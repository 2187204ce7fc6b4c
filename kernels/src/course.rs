//! Which weight is read after which, so that threads with nothing to do bring the beginning of the next
//! one close while another computes what lies between two products: each that of its own part, where the product gives it one.
//!
//! A decoder multiplies by the same weights in the same order for each token. What came after a weight
//! the last time is what will come: a guess that only hints are made of, which may be wrong, or point
//! to memory that is no longer there.

use crate::parallel::block_range;
use crate::prefetch::prefetch;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Bytes of a weight that a thread asks for before its product begins, at most: what one core reads while
/// another does attention, of which enough stays in the caches.
const MOST: usize = 512 << 10;
/// Bytes that are asked for between two looks for work.
const PIECE: usize = 4 << 10;
/// Weights that are remembered.
const WEIGHTS: usize = 4096;

/// Where a weight lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub address: usize,
    pub bytes: usize,
    /// Whether its product gives each thread a part that lies without gaps
    pub in_parts: bool,
}

/// What threads that have nothing to do should ask for.
pub(crate) struct Next {
    address: AtomicUsize,
    /// 0: there is nothing to ask for.
    bytes: AtomicUsize,
    in_parts: AtomicBool,
    /// Rises with each weight.
    turn: AtomicUsize,
    /// The thread that begins products, of so many
    begins: usize,
    threads: usize,
}

/// How far a thread has come with the weight of a turn.
#[derive(Default)]
pub(crate) struct Asked {
    turn: usize,
    bytes: usize,
}

impl Next {
    /// For thread `begins` of so many, which begins the products.
    pub fn new(begins: usize, threads: usize) -> Self {
        Next {
            address: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            in_parts: AtomicBool::new(false),
            turn: AtomicUsize::new(0),
            begins,
            threads,
        }
    }

    fn set(&self, place: Place) {
        self.clear();
        self.address.store(place.address, Ordering::Relaxed);
        self.in_parts.store(place.in_parts, Ordering::Relaxed);
        self.turn.fetch_add(1, Ordering::Relaxed);
        self.bytes.store(place.bytes, Ordering::Release);
    }

    fn clear(&self) {
        self.bytes.store(0, Ordering::Relaxed);
    }

    /// What thread `me` asks for, in bytes from the first on: of its own part of the weight the beginning, which it
    /// will read itself, or else of the weight's beginning what is left of it for this thread by the others that wait.
    fn range(&self, bytes: usize, me: usize) -> Range<usize> {
        if self.in_parts.load(Ordering::Relaxed) {
            let part = block_range(bytes, self.threads, me);
            return part.start..part.end.min(part.start + MOST);
        }
        let others = (self.threads - 1).max(1);
        let index = me - usize::from(me > self.begins);
        block_range(bytes.min(MOST), others, index.min(others - 1))
    }

    /// Asks for a piece on behalf of thread `me`; false if there is none. Whoever reads numbers that do not belong
    /// together asks for something else, for nothing.
    pub fn ask(&self, me: usize, asked: &mut Asked) -> bool {
        let bytes = self.bytes.load(Ordering::Acquire);
        if bytes == 0 {
            return false;
        }
        let turn = self.turn.load(Ordering::Relaxed);
        if asked.turn != turn {
            *asked = Asked { turn, bytes: 0 };
        }
        let range = self.range(bytes, me);
        let piece = PIECE.min(range.len().saturating_sub(asked.bytes));
        if piece > 0 {
            let first = self.address.load(Ordering::Relaxed);
            let first = first.wrapping_add(range.start + asked.bytes);
            prefetch(std::ptr::without_provenance::<u8>(first), piece);
            asked.bytes += piece;
        }
        piece > 0
    }
}

/// What is known on the thread that begins products.
struct Course {
    next: Arc<Next>,
    weights: Vec<Weight>,
    /// Their numbers, by address
    numbers: HashMap<usize, usize>,
    last: Option<usize>,
}

struct Weight {
    place: Place,
    /// The number of the one that came after it.
    then: Option<usize>,
}

impl Course {
    /// The number of a weight: as a rule it is the one that came here the last time.
    fn number(&mut self, place: Place) -> usize {
        let then = self.last.and_then(|last| self.weights[last].then);
        if let Some(then) = then.filter(|&then| self.weights[then].place == place) {
            return then;
        }
        if let Some(&number) = self.numbers.get(&place.address) {
            self.weights[number].place = place;
            return number;
        }
        if self.weights.len() == WEIGHTS {
            self.weights.clear();
            self.numbers.clear();
            self.last = None;
        }
        let number = self.weights.len();
        self.weights.push(Weight { place, then: None });
        self.numbers.insert(place.address, number);
        number
    }

    /// The place of what came after a weight.
    fn after(&self, number: usize) -> Option<Place> {
        let then = self.weights.get(number)?.then?;
        Some(self.weights[then].place)
    }
}

thread_local! {
    /// Of the innermost [`follow`] on this thread.
    static COURSE: RefCell<Option<Course>> = const { RefCell::new(None) };
}

/// Calls `work` and follows the products that it begins on this thread.
pub(crate) fn follow<R>(next: &Arc<Next>, work: impl FnOnce() -> R) -> R {
    /// Puts back what was there, however `work` ends.
    struct Before(Option<Course>);
    impl Drop for Before {
        fn drop(&mut self) {
            COURSE.set(self.0.take());
        }
    }
    let course = Course {
        next: Arc::clone(next),
        weights: Vec::new(),
        numbers: HashMap::new(),
        last: None,
    };
    let _before = Before(COURSE.replace(Some(course)));
    work()
}

/// A product that has begun; what is likely to come next is asked for when it is dropped.
pub(crate) struct Begun(Option<usize>);

/// Begins a product with a weight.
pub(crate) fn begin(place: Place) -> Begun {
    let number = COURSE.with_borrow_mut(|course| {
        let course = course.as_mut()?;
        course.next.clear();
        let number = course.number(place);
        if let Some(last) = course.last.replace(number) {
            course.weights[last].then = Some(number);
        }
        Some(number)
    });
    Begun(number)
}

impl Drop for Begun {
    fn drop(&mut self) {
        COURSE.with_borrow(|course| {
            if let (Some(course), Some(number)) = (course, self.0)
                && let Some(place) = course.after(number)
            {
                course.next.set(place);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_next_is_expected_next() {
        let next = Arc::new(Next::new(0, 2));
        let places = [(1 << 20, 5000), (2 << 20, 100), (3 << 20, 9 << 20)];
        let places = places.map(|(address, bytes)| Place {
            address,
            bytes,
            in_parts: false,
        });
        let expected = || {
            let bytes = next.bytes.load(Ordering::Relaxed);
            (bytes > 0).then(|| Place {
                address: next.address.load(Ordering::Relaxed),
                bytes,
                in_parts: next.in_parts.load(Ordering::Relaxed),
            })
        };
        let mut asked = Asked::default();
        follow(&next, || {
            for round in 0..3 {
                for (i, place) in places.into_iter().enumerate() {
                    let begun = begin(place);
                    assert_eq!(expected(), None, "not while products run");
                    assert!(!next.ask(1, &mut asked));
                    drop(begun);
                    if round > 0 {
                        assert_eq!(expected(), Some(places[(i + 1) % 3]));
                    }
                }
            }
            // In pieces, of which the last is a short one.
            let mut pieces = 0;
            while next.ask(1, &mut asked) {
                pieces += 1;
            }
            assert_eq!((pieces, asked.bytes), (2, 5000));
            // The next weight is begun from its own beginning.
            drop(begin(places[0]));
            assert!(next.ask(1, &mut asked));
            assert_eq!(asked.bytes, 100);
            // Another thread's products are not followed.
            let before = expected();
            std::thread::scope(|scope| scope.spawn(|| drop(begin(places[2]))).join().unwrap());
            assert_eq!(expected(), before);
        });
        next.clear();
        drop(begin(places[0]));
        assert_eq!(expected(), None, "nothing is followed any more");
    }

    #[test]
    fn threads_that_wait_ask_for_parts_of_their_own() {
        let next = Next::new(1, 3);
        let place = |bytes, in_parts| Place {
            address: 1 << 20,
            bytes,
            in_parts,
        };
        // Each thread's third; of a large one the beginning.
        next.set(place(3000, true));
        assert_eq!([0, 2].map(|me| next.range(3000, me)), [0..1000, 2000..3000]);
        next.set(place(6 * MOST, true));
        let ranges = [0, 2].map(|me| next.range(6 * MOST, me));
        assert_eq!(ranges, [0..MOST, 4 * MOST..5 * MOST]);
        // The two that wait share the beginning of what nobody has a part of.
        next.set(place(6 * MOST, false));
        let ranges = [0, 2].map(|me| next.range(6 * MOST, me));
        assert_eq!(ranges, [0..MOST / 2, MOST / 2..MOST]);
    }
}
