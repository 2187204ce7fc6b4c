//! The time of something that is done again and again.

use std::time::Instant;

/// Repeats at least, however long they take.
const REPEATS: usize = 5;

/// Seconds of the fastest of the repeats in so many `seconds`, since other programs may be running. The first, which finds
/// caches cold, does not count.
pub fn best(seconds: f64, mut run: impl FnMut()) -> f64 {
    run();
    let (start, mut best, mut count) = (Instant::now(), f64::INFINITY, 0);
    while count < REPEATS || start.elapsed().as_secs_f64() < seconds {
        let begin = Instant::now();
        run();
        best = best.min(begin.elapsed().as_secs_f64());
        count += 1;
    }
    best
}
