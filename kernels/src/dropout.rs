//! Dropout with a mask that is recomputed, never stored.
//!
//! N. Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
//! JMLR 15 (2014), in the inverted form: what is kept is scaled up while training.

use crate::element::{Float, Real};
use crate::parallel;
use crate::philox::{self, GROUP, Key, WIDE_ITEMS};
use crate::simd::{Isa, kernel};

/// What a kept element is multiplied with: 1 / (1 - p), and 0 where nothing is kept.
pub(crate) fn kept_scale(p: f64) -> f64 {
    if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 }
}

/// A dropout within another operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of a zero.
    pub p: f64,
    /// Of the mask.
    pub key: Key,
}

impl Dropout {
    /// [`dropout`] of a part, which begins with element `first`.
    pub(crate) fn part<T: Float>(self, isa: Isa, x: &[T], y: &mut [T], first: usize) {
        let head = to_group(first).min(x.len());
        let scale = T::Acc::from_f64(kept_scale(self.p));
        for (i, (x, y)) in x.iter().zip(&mut *y).enumerate().take(head) {
            *y = if self.keeps(first + i) {
                T::narrow(x.widen() * scale)
            } else {
                T::default()
            };
        }
        drop(
            isa,
            &x[head..],
            &mut y[head..],
            first + head,
            self.p,
            self.key,
        );
    }

    /// [`Dropout::part`] over its input.
    pub(crate) fn part_in_place<T: Float>(self, isa: Isa, x: &mut [T], first: usize) {
        let head = to_group(first).min(x.len());
        let scale = T::Acc::from_f64(kept_scale(self.p));
        for (i, x) in x.iter_mut().enumerate().take(head) {
            *x = if self.keeps(first + i) {
                T::narrow(x.widen() * scale)
            } else {
                T::default()
            };
        }
        drop_in_place(isa, &mut x[head..], first + head, self.p, self.key);
    }

    fn keeps(self, index: usize) -> bool {
        f64::from(philox::uniform(self.key, index as u64)) >= self.p
    }
}

/// Elements until the next one that begins a group of random words.
fn to_group(first: usize) -> usize {
    first.next_multiple_of(GROUP) - first
}

/// `y[i] = x[i] / (1 - p)` where `philox::uniform(key, i) >= p`, else 0.
pub fn dropout<T: Float>(x: &[T], y: &mut [T], p: f64, key: Key) {
    assert_eq!(x.len(), y.len(), "dropout: x and y differ in length");
    let isa = Isa::detect();
    parallel::for_each_chunk(y.len(), (x, y), |first, (x, y)| {
        drop(isa, x, y, first, p, key);
    });
}

/// [`dropout`] over its input. The backward pass is this, with the same key, over the gradient.
pub fn dropout_in_place<T: Float>(x: &mut [T], p: f64, key: Key) {
    let isa = Isa::detect();
    parallel::for_each_chunk(x.len(), x, |first, x| drop_in_place(isa, x, first, p, key));
}

kernel! {
    fn drop_in_place[A: Arch, T: Float](isa: Isa, x: &mut [T], first: usize, p: f64, key: Key) {
        let from = philox::keep_from(p);
        let scale = T::Acc::from_f64(kept_scale(p));
        for (n, x) in x.chunks_mut(WIDE_ITEMS).enumerate() {
            let words = philox::wide_words(key, (first + n * WIDE_ITEMS) as u64);
            for (x, word) in x.iter_mut().zip(words) {
                let kept = T::narrow(x.widen() * scale);
                *x = if word >> 8 >= from { kept } else { T::default() };
            }
        }
    }
}

kernel! {
    fn drop[A: Arch, T: Float](
        isa: Isa, x: &[T], y: &mut [T], first: usize, p: f64, key: Key,
    ) {
        let from = philox::keep_from(p);
        let scale = T::Acc::from_f64(kept_scale(p));
        for (n, (x, y)) in x.chunks(WIDE_ITEMS).zip(y.chunks_mut(WIDE_ITEMS)).enumerate() {
            let words = philox::wide_words(key, (first + n * WIDE_ITEMS) as u64);
            for ((x, y), word) in x.iter().zip(y).zip(words) {
                let kept = T::narrow(x.widen() * scale);
                *y = if word >> 8 >= from { kept } else { T::default() };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_uniform_says_and_the_expected_share() {
        let n = 100_003;
        let key = Key::new(5, 6, 7);
        let x: Vec<f32> = (0..n).map(|i| 1.0 + (i % 7) as f32).collect();
        let mut y = vec![f32::NAN; n];
        for p in [0.0, 0.1, 0.5, 0.9, 1.0] {
            dropout(&x, &mut y, p, key);
            let mut in_place = x.clone();
            dropout_in_place(&mut in_place, p, key);
            assert_eq!(in_place, y);
            let scale = kept_scale(p) as f32;
            for i in 0..n {
                let kept = f64::from(philox::uniform(key, i as u64)) >= p;
                assert_eq!(
                    y[i],
                    if kept { x[i] * scale } else { 0.0 },
                    "element {i} at {p}"
                );
            }
            // The share that is dropped is binomial: five standard deviations.
            let dropped = y.iter().filter(|&&y| y == 0.0).count() as f64 / n as f64;
            let deviation = (p * (1.0 - p) / n as f64).sqrt();
            assert!(
                (dropped - p).abs() <= 5.0 * deviation,
                "{dropped} dropped at {p}"
            );
        }
    }

    #[test]
    fn parts_that_begin_anywhere_are_parts_of_the_whole() {
        let n = 1000;
        let dropout = Dropout {
            p: 0.3,
            key: Key::new(1, 2, 3),
        };
        let x: Vec<f32> = (0..n).map(|i| i as f32 - 400.0).collect();
        let mut whole = vec![f32::NAN; n];
        super::dropout(&x, &mut whole, dropout.p, dropout.key);
        for range in [0..n, 1..n, 2..3, 7..8, 5..900, 64..131] {
            let mut y = vec![f32::NAN; range.len()];
            dropout.part(Isa::detect(), &x[range.clone()], &mut y, range.start);
            assert_eq!(y, whole[range.clone()], "{range:?}");
            let mut in_place = x[range.clone()].to_vec();
            dropout.part_in_place(Isa::detect(), &mut in_place, range.start);
            assert_eq!(in_place, y, "{range:?}");
        }
    }

    #[test]
    #[should_panic(expected = "dropout: x and y differ in length")]
    fn sizes_are_checked() {
        dropout(&[1.0f32; 3], &mut [0.0; 4], 0.5, Key([0, 0]));
    }
}
