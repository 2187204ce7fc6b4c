//! Counter-based random numbers: Philox4x32-10.
//!
//! Source: J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy
//! as 1, 2, 3", SC 2011. A number is a pure function of a [`Key`] and a counter, so element `i`
//! of a mask is the same however the work is split, on whichever device, and whether it is drawn
//! once in the forward pass or again in the backward pass.

use crate::parallel;
use crate::simd::{Isa, kernel};

pub(crate) const MULTIPLIER_0: u32 = 0xD251_1F53;
pub(crate) const MULTIPLIER_1: u32 = 0xCD9E_8D57;
pub(crate) const WEYL_0: u32 = 0x9E37_79B9;
pub(crate) const WEYL_1: u32 = 0xBB67_AE85;
pub(crate) const ROUNDS: usize = 10;

/// How many blocks are computed side by side, so that the rounds vectorise.
const WIDE: usize = 16;

/// The key of one stream of random numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key(pub [u32; 2]);

impl Key {
    /// The key for operation number `op` of step `step` in a run seeded with `seed`.
    ///
    /// The three numbers are mixed one after the other: `z = mix(seed)`, `z = mix(z ^ step)`,
    /// `z = mix(z ^ op)`, where `mix` adds 0x9E3779B97F4A7C15 and applies the finaliser of
    /// SplitMix64 (G. L. Steele, D. Lea, C. H. Flood, OOPSLA 2014), which is a bijection: for a
    /// given seed and step, different operations get different keys. The low half is word 0.
    pub fn new(seed: u64, step: u64, op: u64) -> Key {
        let z = mix(mix(mix(seed) ^ step) ^ op);
        Key([z as u32, (z >> 32) as u32])
    }
}

fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The four random words for one counter.
#[inline]
pub fn block(key: Key, counter: [u32; 4]) -> [u32; 4] {
    let words = rounds(key, counter.map(|word| [u64::from(word)]));
    words.map(|word| word[0] as u32)
}

/// Ten rounds over `N` counters at once: word `w` of counter `n` is the low half of
/// `words[w][n]`, before and after.
///
/// Words live in 64 bits because the products do: vector instructions multiply the low halves of
/// 64-bit lanes, so whatever the high halves hold need not be cleared.
#[inline(always)]
fn rounds<const N: usize>(key: Key, words: [[u64; N]; 4]) -> [[u64; N]; 4] {
    const LOW: u64 = u32::MAX as u64;
    let [mut key_0, mut key_1] = key.0;
    let [mut c0, mut c1, mut c2, mut c3] = words;
    for _ in 0..ROUNDS {
        for n in 0..N {
            let product_0 = (c0[n] & LOW) * u64::from(MULTIPLIER_0);
            let product_1 = (c2[n] & LOW) * u64::from(MULTIPLIER_1);
            c0[n] = (product_1 >> 32) ^ c1[n] ^ u64::from(key_0);
            c1[n] = product_1;
            c2[n] = (product_0 >> 32) ^ c3[n] ^ u64::from(key_1);
            c3[n] = product_0;
        }
        key_0 = key_0.wrapping_add(WEYL_0);
        key_1 = key_1.wrapping_add(WEYL_1);
    }
    [c0, c1, c2, c3]
}

/// The blocks with counters `[first + n, rest..]` (the first word wrapping), in words: item
/// `4 * n + w` is word `w` of block `n`.
#[inline(always)]
pub(crate) fn wide_blocks(key: Key, first: u32, rest: [u32; 3]) -> [u32; 4 * WIDE] {
    let mut words = [[0; WIDE]; 4];
    for n in 0..WIDE {
        words[0][n] = u64::from(first.wrapping_add(n as u32));
        words[1][n] = u64::from(rest[0]);
        words[2][n] = u64::from(rest[1]);
        words[3][n] = u64::from(rest[2]);
    }
    let [w0, w1, w2, w3] = rounds(key, words);
    let mut pairs = [0u64; 2 * WIDE];
    for n in 0..WIDE {
        pairs[2 * n] = ((w0[n] & u64::from(u32::MAX)) | w1[n] << 32).to_le();
        pairs[2 * n + 1] = ((w2[n] & u64::from(u32::MAX)) | w3[n] << 32).to_le();
    }
    bytemuck::cast::<_, [u32; 4 * WIDE]>(pairs).map(u32::from_le)
}

/// Items that one [`wide_blocks`] gives.
pub(crate) const WIDE_ITEMS: usize = 4 * WIDE;
// Parts of a buffer that tasks fill begin with a whole group.
const _: () = assert!(parallel::CHUNK.is_multiple_of(WIDE_ITEMS));

/// Elements whose random words come from one block.
pub(crate) const GROUP: usize = 4;

/// The random words of elements `first .. first + WIDE_ITEMS` of a stream, `first` divisible by
/// [`GROUP`].
#[inline(always)]
pub(crate) fn wide_words(key: Key, first: u64) -> [u32; WIDE_ITEMS] {
    debug_assert!(first.is_multiple_of(4));
    let number = first / 4;
    let (low, high) = (number as u32, (number >> 32) as u32);
    if low.checked_add(WIDE as u32).is_some() {
        return wide_blocks(key, low, [high, 0, 0]);
    }
    let mut items = [0; WIDE_ITEMS];
    for (n, four) in items.chunks_exact_mut(4).enumerate() {
        let number = number.wrapping_add(n as u64);
        four.copy_from_slice(&block(key, [number as u32, (number >> 32) as u32, 0, 0]));
    }
    items
}

/// The random word of element `index`: word `index % 4` of the block with counter
/// `[low and high half of index / 4, 0, 0]`.
#[inline]
fn word(key: Key, index: u64) -> u32 {
    let number = index / 4;
    block(key, [number as u32, (number >> 32) as u32, 0, 0])[(index % 4) as usize]
}

/// The top 24 bits of a word as a number in [0, 1): a multiple of 2^-24.
#[inline(always)]
pub(crate) fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

/// The least `word >> 8` for which [`unit`] is at least `p`: so `(word >> 8) >= keep_from(p)` is
/// `unit(word) >= p` without a conversion. 2^24 (nothing is kept) for `p >= 1`.
pub(crate) fn keep_from(p: f64) -> u32 {
    (p * f64::from(1 << 24))
        .ceil()
        .clamp(0.0, f64::from(1 << 24)) as u32
}

/// Element `index` of the uniform stream of `key`: a multiple of 2^-24 in [0, 1).
pub fn uniform(key: Key, index: u64) -> f32 {
    unit(word(key, index))
}

/// `y[i] = lo + (hi - lo) * uniform(key, i)`.
pub fn fill_uniform(key: Key, y: &mut [f32], lo: f32, hi: f32) {
    let isa = Isa::detect();
    parallel::for_each_chunk(y.len(), y, |first, chunk: &mut [f32]| {
        uniform_chunk(isa, key, first, chunk, lo, hi)
    });
}

kernel! {
    fn uniform_chunk[A: Arch](
        isa: Isa, key: Key, first: usize, y: &mut [f32], lo: f32, hi: f32,
    ) {
        let width = hi - lo;
        for (n, part) in y.chunks_mut(WIDE_ITEMS).enumerate() {
            let words = wide_words(key, (first + n * WIDE_ITEMS) as u64);
            for (y, word) in part.iter_mut().zip(words) {
                *y = lo + width * unit(word);
            }
        }
    }
}

/// Normally distributed numbers by the method of G. E. P. Box and M. E. Muller (1958): the two
/// pairs of words of block `i / 4` give elements `4 * (i / 4) ..`, computed in f64. As the radius
/// comes from 32 bits, no number lies farther than 6.67 deviations from the mean.
pub fn fill_normal(key: Key, y: &mut [f32], mean: f32, std: f32) {
    let pair = |a: u32, b: u32| {
        let unit = 1.0 / f64::from(u32::MAX).mul_add(1.0, 1.0);
        let radius = (-2.0 * ((f64::from(a) + 1.0) * unit).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * f64::from(b) * unit).sin_cos();
        [radius * cos, radius * sin]
    };
    parallel::for_each_chunk(y.len(), y, |first, chunk: &mut [f32]| {
        for (n, part) in chunk.chunks_mut(4).enumerate() {
            let number = (first / 4 + n) as u64;
            let [a, b, c, d] = block(key, [number as u32, (number >> 32) as u32, 0, 0]);
            let ([w, x], [y, z]) = (pair(a, b), pair(c, d));
            for (y, normal) in part.iter_mut().zip([w, x, y, z]) {
                *y = (f64::from(mean) + f64::from(std) * normal) as f32;
            }
        }
    });
}

/// A random permutation in place: the shuffle of R. A. Fisher and F. Yates from the last element
/// down, each draw unbiased by rejecting the 64-bit numbers beyond the last whole multiple.
pub fn shuffle(key: Key, items: &mut [usize]) {
    let mut draws = 0u64;
    let mut draw = || {
        let [a, b, ..] = block(key, [draws as u32, (draws >> 32) as u32, 0, 0]);
        draws += 1;
        u64::from(a) | u64::from(b) << 32
    };
    for last in (1..items.len()).rev() {
        let choices = last as u64 + 1;
        // 2^64 mod choices: numbers below it would make the small remainders more likely.
        let excess = choices.wrapping_neg() % choices;
        let number = loop {
            let number = draw();
            if number >= excess {
                break number;
            }
        };
        items.swap(last, (number % choices) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // The vectors published with the paper's reference library for philox4x32-10.
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
            ),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(block(Key(key), counter), expected);
        }
    }

    #[test]
    fn wide_words_are_the_single_ones() {
        let key = Key::new(1, 2, 3);
        // The second start makes the low counter word overflow inside the group.
        for first in [0u64, 64, 4 * ((1 << 32) - 3)] {
            let words = wide_words(key, first);
            for (i, &wide) in words.iter().enumerate() {
                assert_eq!(
                    wide,
                    word(key, first + i as u64),
                    "element {i} after {first}"
                );
            }
        }
    }

    #[test]
    fn keys_differ_in_every_part() {
        let base = Key::new(1, 2, 3);
        for other in [
            Key::new(2, 2, 3),
            Key::new(1, 3, 3),
            Key::new(1, 2, 4),
            Key::new(2, 1, 3),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn threshold_agrees_with_the_comparison() {
        for p in [0.0, 1e-9, 0.1, 0.25, 0.5, 1.0 / 3.0, 0.9, 1.0 - 1e-9, 1.0] {
            let from = keep_from(p);
            for n in [0, 1, from.saturating_sub(1), from, from + 1, (1 << 24) - 1] {
                if n < 1 << 24 {
                    assert_eq!(n >= from, f64::from(unit(n << 8)) >= p, "{n} at {p}");
                }
            }
        }
    }

    #[test]
    fn moments() {
        // Standard errors at n = 2^18: mean of uniform 5.6e-4, of normal 2.0e-3, variance of
        // normal 2.8e-3, fourth moment 1.9e-2; each bound is five of them. The key is fixed.
        let n = 1 << 18;
        let mut y = vec![0.0; n];
        fill_uniform(Key::new(7, 0, 0), &mut y, -1.0, 3.0);
        assert!(y.iter().all(|&y| (-1.0..3.0).contains(&y)));
        let mean = y.iter().map(|&y| f64::from(y)).sum::<f64>() / n as f64;
        assert!((mean - 1.0).abs() < 5.0 * 4.0 * 5.6e-4, "{mean}");
        fill_normal(Key::new(7, 0, 1), &mut y, 0.0, 1.0);
        let moment = |k| y.iter().map(|&y| f64::from(y).powi(k)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 1e-2 && (moment(2) - 1.0).abs() < 1.4e-2);
        assert!((moment(4) - 3.0).abs() < 9.6e-2, "{}", moment(4));
        // A pair's two members must not be correlated.
        let product = y
            .chunks_exact(2)
            .map(|p| f64::from(p[0] * p[1]))
            .sum::<f64>();
        assert!((product / (n / 2) as f64).abs() < 5.0 * 2.8e-3);
    }

    #[test]
    fn shuffles_evenly() {
        let mut counts = [[0u32; 5]; 5];
        let rounds = 20_000;
        for round in 0..rounds {
            let mut items = [0, 1, 2, 3, 4];
            shuffle(Key::new(3, round, 0), &mut items);
            for (place, &item) in items.iter().enumerate() {
                counts[place][item] += 1;
            }
        }
        // Each count is binomial with mean 4000 and deviation 57.
        assert!(
            counts.iter().flatten().all(|&c| c.abs_diff(4000) < 5 * 57),
            "{counts:?}"
        );
    }
}
