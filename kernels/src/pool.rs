//! One vector per sequence from its tokens' vectors.

use crate::element::{Float, Real};
use crate::parallel::{self, rows};
use crate::sums::larger;

/// How a sequence's tokens become one vector. An empty sequence gives zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pool {
    /// The mean over the tokens.
    Mean,
    /// The first token (BERT's `[CLS]`).
    First,
    /// The last token (what a causal model has seen everything at).
    Last,
    /// The largest of each column.
    Max,
}

impl Pool {
    /// Every one.
    pub const ALL: [Pool; 4] = [Pool::Mean, Pool::First, Pool::Last, Pool::Max];
}

/// The tokens of sequence `s`.
fn tokens(offsets: &[i64], s: usize) -> std::ops::Range<usize> {
    offsets[s] as usize..offsets[s + 1] as usize
}

/// Columns that are summed together, so that sums stay in registers.
const COLUMNS: usize = 32;

/// `y[s, :]` from rows `offsets[s]..offsets[s + 1]` of `x`.
///
/// x: `[tokens, cols]`, offsets: `[sequences + 1]` rising from 0 to tokens, y: `[sequences, cols]`.
pub fn pool<T: Float>(kind: Pool, x: &[T], offsets: &[i64], y: &mut [T], cols: usize) {
    let sequences = offsets.len().saturating_sub(1);
    check("pool", x.len(), offsets, cols);
    assert_eq!(
        y.len(),
        sequences * cols,
        "pool: y is not [sequences, cols]"
    );
    if cols == 0 {
        return;
    }
    let one = |x: &[T], y: &mut [T]| {
        let count = x.len() / cols;
        if count == 0 {
            y.fill(T::default());
            return;
        }
        match kind {
            Pool::First => y.copy_from_slice(&x[..cols]),
            Pool::Last => y.copy_from_slice(&x[(count - 1) * cols..]),
            Pool::Mean | Pool::Max => {
                let by = T::Acc::from_f64(1.0 / count as f64);
                for (n, y) in y.chunks_mut(COLUMNS).enumerate() {
                    let mut best = [T::Acc::ZERO; COLUMNS];
                    if kind == Pool::Max {
                        best = [T::Acc::NEG_INFINITY; COLUMNS];
                    }
                    for row in x.chunks_exact(cols) {
                        let row = &row[n * COLUMNS..][..y.len()];
                        for (best, x) in best.iter_mut().zip(row) {
                            let x = x.widen();
                            *best = match kind {
                                Pool::Max => larger(x, *best),
                                _ => *best + x,
                            };
                        }
                    }
                    for (y, best) in y.iter_mut().zip(best) {
                        *y = T::narrow(if kind == Pool::Max { best } else { best * by });
                    }
                }
            }
        }
    };
    // A sequence costs its tokens; the mean length stands for each one's.
    let cost = x.len() / sequences.max(1);
    parallel::for_each_row_block(sequences, cost, rows(y, cols), |first, y| {
        for (n, y) in y.chunks_exact_mut(cols).enumerate() {
            let tokens = tokens(offsets, first + n);
            one(&x[tokens.start * cols..tokens.end * cols], y);
        }
    });
}

/// The gradient of [`pool`]: every element of `dx` is written. For [`Pool::Max`] it goes to the
/// first row that holds the largest; the other kinds do not read `x`, which may then be empty.
///
/// x, dx: `[tokens, cols]`, dy: `[sequences, cols]`.
pub fn pool_backward<T: Float>(
    kind: Pool,
    x: &[T],
    offsets: &[i64],
    dy: &[T],
    dx: &mut [T],
    cols: usize,
) {
    let sequences = offsets.len().saturating_sub(1);
    check("pool_backward", dx.len(), offsets, cols);
    assert_eq!(
        dy.len(),
        sequences * cols,
        "pool_backward: dy is not [sequences, cols]"
    );
    if kind == Pool::Max {
        assert_eq!(
            x.len(),
            dx.len(),
            "pool_backward: x and dx differ in length"
        );
    }
    let mut rest = dx;
    for s in 0..sequences {
        let tokens = tokens(offsets, s);
        let (dx, tail) = rest.split_at_mut(tokens.len() * cols);
        rest = tail;
        let dy = &dy[s * cols..(s + 1) * cols];
        if dx.is_empty() {
            continue;
        }
        match kind {
            Pool::Mean => {
                let by = T::Acc::from_f64(1.0 / tokens.len() as f64);
                let count = tokens.len();
                parallel::for_each_row_block(count, cols, rows(dx, cols), |_, dx| {
                    for dx in dx.chunks_exact_mut(cols) {
                        for (dx, dy) in dx.iter_mut().zip(dy) {
                            *dx = T::narrow(dy.widen() * by);
                        }
                    }
                });
            }
            Pool::First => {
                dx.fill(T::default());
                dx[..cols].copy_from_slice(dy);
            }
            Pool::Last => {
                dx.fill(T::default());
                let last = dx.len() - cols;
                dx[last..].copy_from_slice(dy);
            }
            Pool::Max => {
                dx.fill(T::default());
                let x = &x[tokens.start * cols..tokens.end * cols];
                for c in 0..cols {
                    let mut first = c;
                    for i in (c..x.len()).step_by(cols) {
                        if x[i] > x[first] {
                            first = i;
                        }
                    }
                    dx[first] = dy[c];
                }
            }
        }
    }
}

fn check(who: &str, len: usize, offsets: &[i64], cols: usize) {
    let total = offsets.last().map_or(0, |&last| last as usize);
    assert_eq!(
        len,
        total * cols,
        "{who}: the tokens are not [offsets.last(), cols]"
    );
    assert!(
        offsets.first().is_none_or(|&first| first == 0) && offsets.is_sorted(),
        "{who}: offsets do not rise from 0"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive(kind: Pool, x: &[f64], offsets: &[i64], cols: usize) -> Vec<f64> {
        let mut y = Vec::new();
        for pair in offsets.windows(2) {
            for c in 0..cols {
                let column: Vec<f64> = (pair[0]..pair[1])
                    .map(|t| x[t as usize * cols + c])
                    .collect();
                y.push(match (kind, column.len()) {
                    (_, 0) => 0.0,
                    (Pool::Mean, n) => column.iter().sum::<f64>() / n as f64,
                    (Pool::First, _) => column[0],
                    (Pool::Last, n) => column[n - 1],
                    (Pool::Max, _) => column.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                });
            }
        }
        y
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn forward_and_finite_differences(
            lengths in proptest::collection::vec(0usize..9, 0..5),
            cols in 1usize..70,
            seed in any::<u32>(),
        ) {
            let mut offsets = vec![0i64];
            offsets.extend(lengths.iter().scan(0, |sum, n| { *sum += *n as i64; Some(*sum) }));
            let tokens = *offsets.last().unwrap() as usize;
            let number = |i: usize| {
                let word = crate::philox::uniform(crate::philox::Key([seed, 0]), i as u64);
                f64::from(word) - 0.5
            };
            let x: Vec<f64> = (0..tokens * cols).map(number).collect();
            let dy: Vec<f64> = (0..lengths.len() * cols).map(|i| number(i + 9999)).collect();
            for kind in Pool::ALL {
                let mut y = vec![f64::NAN; dy.len()];
                pool(kind, &x, &offsets, &mut y, cols);
                let expected = naive(kind, &x, &offsets, cols);
                for (a, b) in y.iter().zip(&expected) {
                    prop_assert!((a - b).abs() < 1e-14);
                }
                let mut dx = vec![f64::NAN; x.len()];
                pool_backward(kind, &x, &offsets, &dy, &mut dx, cols);
                // Piecewise linear: a difference is exact but for rounding, away from ties.
                for i in (0..x.len()).step_by(x.len() / 7 + 1) {
                    let mut moved = x.clone();
                    moved[i] += 1e-9;
                    let up = naive(kind, &moved, &offsets, cols);
                    let slope: f64 =
                        up.iter().zip(&expected).zip(&dy).map(|((u, e), d)| (u - e) * d).sum();
                    prop_assert!((slope / 1e-9 - dx[i]).abs() < 1e-5, "{:?} {}", kind, i);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "pool: the tokens are not [offsets.last(), cols]")]
    fn sizes_are_checked() {
        pool(Pool::Mean, &[1.0f32; 7], &[0, 2], &mut [0.0; 4], 4);
    }
}
