use crate::support::*;
use graft_kernels::parallel;
use graft_kernels::softmax::*;
use proptest::prelude::*;

fn oracle(x: &[f64], cols: usize, log: bool) -> Vec<f64> {
    let mut y = Vec::new();
    for row in x.chunks(cols.max(1)) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
        y.extend(row.iter().map(|x| {
            if log {
                x - max - sum.ln()
            } else {
                (x - max).exp() / sum
            }
        }));
    }
    y
}

fn forward<T: Stored>(rows: usize, cols: usize, seed: u64, width: f64) {
    let x: Vec<T> = stored(rows * cols, seed, -width, width);
    let wide = widen(&x);
    let (want, want_log) = (oracle(&wide, cols, false), oracle(&wide, cols, true));
    on_each(|isa| {
        let mut y = vec![T::default(); x.len()];
        softmax_with(isa, &x, &mut y, cols);
        // The rounding of x - max, at most 2·width, is a relative error of its exponential.
        let slack = 8.0 + 4.0 * width;
        close("softmax", &y, &want, slack, |i| want[i]);
        log_softmax_with(isa, &x, &mut y, cols);
        close("log_softmax", &y, &want_log, 8.0, |_| 2.0 * width + 8.0);
    });
}

/// The backward formulas against differences of the oracle.
fn backward(rows: usize, cols: usize, seed: u64) {
    let n = rows * cols;
    let (x, dy) = (random(n, seed, -3.0, 3.0), random(n, seed + 1, -1.0, 1.0));
    for log in [false, true] {
        let y = oracle(&x, cols, log);
        on_each(|isa| {
            let mut dx = vec![0.0; n];
            if log {
                log_softmax_backward_with(isa, &y, &dy, &mut dx, cols);
            } else {
                softmax_backward_with(isa, &y, &dy, &mut dx, cols);
            }
            finite_differences("softmax backward", &x, &dx, |x| {
                weighted(&oracle(x, cols, log), &dy)
            });
        });
    }
}

/// And the other types against the same in f64.
fn backward_of<T: Stored>(rows: usize, cols: usize, seed: u64) {
    let n = rows * cols;
    let dy: Vec<T> = stored(n, seed + 1, -1.0, 1.0);
    for log in [false, true] {
        let y: Vec<T> = store(&oracle(&random(n, seed, -3.0, 3.0), cols, log));
        let (wy, wdy) = (widen(&y), widen(&dy));
        let mut want = vec![0.0; n];
        let run = if log {
            log_softmax_backward
        } else {
            softmax_backward
        };
        run(&wy, &wdy, &mut want, cols);
        on_each(|isa| {
            let mut dx = vec![T::default(); n];
            let run = if log {
                log_softmax_backward_with
            } else {
                softmax_backward_with
            };
            run(isa, &y, &dy, &mut dx, cols);
            close("softmax backward", &dx, &want, 8.0, |_| {
                1.0 + (cols as f64).sqrt()
            });
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_match(rows in 0usize..8, cols in 1usize..300, seed in any::<u32>(), wide in any::<bool>()) {
        let width = if wide { 80.0 } else { 4.0 };
        for_all_types!(forward(rows, cols, u64::from(seed), width));
    }

    #[test]
    fn gradients_match(rows in 1usize..4, cols in 1usize..12, seed in any::<u32>()) {
        backward(rows, cols, u64::from(seed));
    }

    #[test]
    fn gradients_of_all_types(rows in 0usize..5, cols in 1usize..200, seed in any::<u32>()) {
        for_all_types!(backward_of(rows, cols, u64::from(seed)));
    }
}

#[test]
fn extreme_rows() {
    const INF: f32 = f32::INFINITY;
    on_each(|isa| {
        let mut y = [9.0f32; 4];
        softmax_with(isa, &[1e38, -1e38, 1e38, 0.0], &mut y, 4);
        assert_eq!(y, [0.5, 0.0, 0.5, 0.0]);
        softmax_with(isa, &[-INF, 3.0, -INF, 3.0], &mut y, 4);
        assert_eq!(y, [0.0, 0.5, 0.0, 0.5]);
        log_softmax_with(isa, &[-INF, 3.0, -INF, -INF], &mut y, 4);
        assert_eq!(y, [-INF, 0.0, -INF, -INF]);
        for bad in [[-INF; 4], [1.0, f32::NAN, 0.0, 0.0], [INF, 0.0, 0.0, 0.0]] {
            softmax_with(isa, &bad, &mut y, 4);
            assert!(y.iter().any(|y| y.is_nan()), "{bad:?} on {isa:?}: {y:?}");
        }
    });
    softmax::<f32>(&[], &mut [], 0);
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let (rows, cols) = (731, 129);
    let x: Vec<f32> = stored(rows * cols, 1, -5.0, 5.0);
    assert!(x.len() > 2 * parallel::GRAIN);
    same_on_any_pool("softmax", || {
        let (mut y, mut log) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        softmax(&x, &mut y, cols);
        log_softmax(&x, &mut log, cols);
        let mut dx = vec![0.0; x.len()];
        softmax_backward(&y, &x, &mut dx, cols);
        (bits(&y), bits(&log), bits(&dx))
    });
}

#[test]
#[should_panic(expected = "softmax: 7 elements are not whole rows of 3")]
fn rows_are_whole() {
    softmax(&[0f32; 7], &mut [0.0; 7], 3);
}

#[test]
#[should_panic(expected = "softmax_backward: dy and dx differ in length")]
fn lengths_are_checked() {
    softmax_backward(&[0f32; 4], &[0.0; 3], &mut [0.0; 4], 2);
}
