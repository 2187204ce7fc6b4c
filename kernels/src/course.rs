//! Which weight is read after which, so that threads with nothing to do bring the beginning of the next
//! one close while another computes what lies between two products.
//!
//! A decoder multiplies by the same weights in the same order for each token. What came after a weight
//! the last time is what will come: a guess that only hints are made of, which may be wrong, or point
//! to memory that is no longer there.

use crate::prefetch::prefetch;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a weight that are asked for before its product begins, at most: what one core reads while
/// another does attention, of which enough stays in the caches.
const MOST: usize = 512 << 10;
/// Bytes that are asked for between two looks for work.
const PIECE: usize = 4 << 10;
/// Weights that are remembered.
const WEIGHTS: usize = 4096;

/// What threads that have nothing to do should ask for.
#[derive(Default)]
pub(crate) struct Next {
    address: AtomicUsize,
    /// Bytes that are not asked for yet, from the end.
    left: AtomicUsize,
}

impl Next {
    fn set(&self, (address, bytes): (usize, usize)) {
        let bytes = bytes.min(MOST);
        self.left.store(0, Ordering::Relaxed);
        self.address.store(address + bytes, Ordering::Relaxed);
        self.left.store(bytes, Ordering::Release);
    }

    /// Asks for a piece; false if there is none. Whoever reads an address and a number that do not
    /// belong together asks for something else, for nothing.
    pub fn ask(&self) -> bool {
        let left = self.left.load(Ordering::Acquire);
        let piece = left.min(PIECE);
        if piece == 0 {
            return false;
        }
        let rest = left - piece;
        let taken = self
            .left
            .compare_exchange(left, rest, Ordering::Relaxed, Ordering::Relaxed);
        if taken.is_ok() {
            let end = self.address.load(Ordering::Relaxed);
            prefetch(
                std::ptr::without_provenance::<u8>(end.wrapping_sub(left)),
                piece,
            );
        }
        true
    }
}

/// What is known on the thread that begins products.
struct Course {
    next: Arc<Next>,
    /// Address of a weight to address and bytes of the one that came after it.
    after: HashMap<usize, (usize, usize)>,
    last: usize,
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
        after: HashMap::new(),
        last: 0,
    };
    let _before = Before(COURSE.replace(Some(course)));
    work()
}

/// A product that has begun; what is likely to come next is asked for when it is dropped.
pub(crate) struct Begun(usize);

/// Begins a product with a weight of so many bytes at an address.
pub(crate) fn begin(place: (usize, usize)) -> Begun {
    COURSE.with_borrow_mut(|course| {
        if let Some(course) = course {
            course.next.set((0, 0));
            if course.after.len() == WEIGHTS {
                course.after.clear();
            }
            course.after.insert(course.last, place);
            course.last = place.0;
        }
    });
    Begun(place.0)
}

impl Drop for Begun {
    fn drop(&mut self) {
        COURSE.with_borrow(|course| {
            if let Some(course) = course
                && let Some(&place) = course.after.get(&self.0)
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
        let next = Arc::new(Next::default());
        let places = [(1 << 20, 5000), (2 << 20, 100), (3 << 20, 9 << 20)];
        let expected = || {
            let left = next.left.load(Ordering::Relaxed);
            (
                next.address.load(Ordering::Relaxed).wrapping_sub(left),
                left,
            )
        };
        follow(&next, || {
            for round in 0..3 {
                for (i, place) in places.into_iter().enumerate() {
                    let begun = begin(place);
                    assert_eq!(expected().1, 0, "not while products run");
                    drop(begun);
                    let (address, bytes) = places[(i + 1) % 3];
                    if round > 0 {
                        assert_eq!(expected(), (address, bytes.min(MOST)));
                    }
                }
            }
            // In pieces, of which the last is a short one.
            let mut pieces = 0;
            while next.ask() {
                pieces += 1;
            }
            assert_eq!((pieces, expected().1), (2, 0));
            // Another thread's products are not followed.
            std::thread::scope(|scope| scope.spawn(|| drop(begin((7, 7)))).join().unwrap());
            assert_eq!(expected().1, 0);
        });
        drop(begin(places[0]));
        assert_eq!(expected().1, 0, "nothing is followed any more");
    }
}
