//! Threads that stay awake through a string of short pieces of work, as decoding is: dozens of products
//! a token, each of which takes less time than waking a thread.

use crate::course::{self, Asked, Next};
use rayon::Yield;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Looks for work between two hints that others may have the core: about 10 µs.
const LOOKS: u32 = 64;
/// Looks without any work after which a thread naps: about a millisecond.
const PATIENCE: u32 = 4096;
/// How long a nap is. Who hands out work in that time does it alone.
const NAP: Duration = Duration::from_micros(50);

/// Calls `work` on this thread, if it is one of a pool's, while the pool's others look for what it hands
/// out and do not sleep in between. Between products of few rows they ask for the beginning of the weight
/// that is likely to come next. With nothing to do for long they nap, so that cores are not kept busy for
/// a thread that waits. No result depends on it.
pub fn awake<R>(work: impl FnOnce() -> R) -> R {
    let threads = rayon::current_num_threads();
    let Some(me) = rayon::current_thread_index().filter(|_| threads > 1) else {
        return work();
    };
    let (over, next) = (AtomicBool::new(false), Arc::new(Next::new(me, threads)));
    rayon::in_place_scope(|scope| {
        // Each thread's own: nobody takes another's, least of all the one that works.
        scope.spawn_broadcast(|_, context| {
            if context.index() != me {
                look_for_work(context.index(), &over, &next);
            }
        });
        let _end = End(&over);
        course::follow(&next, work)
    })
}

/// Ends what others do when it goes, however that comes about.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// On thread `me`.
fn look_for_work(me: usize, over: &AtomicBool, next: &Next) {
    let (mut looks, mut asked) = (0, Asked::default());
    while !over.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(Yield::Executed) || next.ask(me, &mut asked) {
            looks = 0;
            continue;
        }
        looks += 1;
        if looks > PATIENCE {
            std::thread::sleep(NAP);
        } else if looks % LOOKS == 0 {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::AssertUnwindSafe;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn others_take_part_and_are_let_go() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            for _ in 0..3 {
                let sum = pool.install(|| {
                    awake(|| {
                        let sum = AtomicUsize::new(0);
                        for i in 0..100 {
                            crate::parallel::each(7, true, |j| {
                                sum.fetch_add(i * j, Ordering::Relaxed);
                            });
                        }
                        // Within another, and after a pause in which the others nap.
                        std::thread::sleep(Duration::from_millis(5));
                        awake(|| crate::parallel::each(1, true, |_| ()));
                        sum.into_inner()
                    })
                });
                assert_eq!(sum, 99 * 50 * 21);
            }
        }
        assert_eq!(awake(|| 3), 3, "outside of a pool");
    }

    #[test]
    fn a_panic_lets_the_others_go() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
        let pool = pool.unwrap();
        let caught = std::panic::catch_unwind(AssertUnwindSafe(|| {
            pool.install(|| awake(|| panic!("on purpose")))
        }));
        assert!(caught.is_err());
        assert_eq!(pool.install(|| rayon::join(|| 1, || 2)), (1, 2));
    }
}
