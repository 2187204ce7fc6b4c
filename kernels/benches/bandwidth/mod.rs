//! The yardstick of what reads all of a model for each token: what memory gives.

use std::hint::black_box;
use std::time::Instant;

/// Gigabytes that all threads together read in a second from memory that no cache holds, each in four streams.
pub fn bandwidth(numbers: &[i64]) -> f64 {
    const STREAMS: usize = 4;
    let part = numbers.len() / rayon::current_num_threads();
    let started = Instant::now();
    rayon::broadcast(|context| {
        let mine = &numbers[context.index() * part..][..part];
        let stream = part / STREAMS / 32 * 32;
        let mut sums = [0i64; 32];
        for at in (0..stream).step_by(32) {
            for first in (0..STREAMS).map(|i| i * stream + at) {
                for (sum, x) in sums.iter_mut().zip(&mine[first..first + 32]) {
                    *sum = sum.wrapping_add(*x);
                }
            }
        }
        black_box(sums)
    });
    1e-9 * size_of_val(numbers) as f64 / started.elapsed().as_secs_f64()
}
