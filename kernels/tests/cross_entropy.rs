//! Classification losses against their definition in f64, gradients against finite differences.

use graft_kernels::cross_entropy::*;
use graft_kernels::philox::{self, Key};
use graft_kernels::{Float, Isa, Real};
use half::{bf16, f16};
use proptest::prelude::*;

const IGNORE: i64 = -100;

#[derive(Clone, Debug)]
struct Case {
    logits: Vec<f64>,
    targets: Vec<i64>,
    classes: usize,
    smoothing: f64,
}

fn cases() -> impl Strategy<Value = Case> {
    let classes = prop_oneof![1usize..20, 60usize..70, 120usize..300];
    let smoothing = prop_oneof![Just(0.0), 0.01f64..0.9];
    (0usize..12, classes, smoothing, any::<u32>(), 1i32..40).prop_map(
        |(rows, classes, smoothing, seed, spread)| {
            let number = |i: usize| f64::from(philox::uniform(Key([seed, 3]), i as u64));
            // Multiples of 1/4 within -10..10 are exact in every type.
            let logits = (0..rows * classes)
                .map(|i| ((number(i) - 0.5) * f64::from(spread)).floor() / 4.0)
                .collect();
            let targets = (0..rows)
                .map(
                    |r| match (number(r + 100_000) * 1.25 * classes as f64) as i64 {
                        t if t < classes as i64 => t,
                        _ => IGNORE,
                    },
                )
                .collect();
            Case {
                logits,
                targets,
                classes,
                smoothing,
            }
        },
    )
}

impl Case {
    fn naive(&self) -> (Vec<f64>, Vec<f64>) {
        let rows = self.logits.chunks_exact(self.classes).zip(&self.targets);
        rows.map(|(x, &target)| {
            let lse = x.iter().map(|x| x.exp()).sum::<f64>().ln();
            let share = self.smoothing / self.classes as f64;
            let loss: f64 = x
                .iter()
                .enumerate()
                .map(|(c, x)| {
                    let hit = if c as i64 == target {
                        1.0 - self.smoothing
                    } else {
                        0.0
                    };
                    (hit + share) * (lse - x)
                })
                .sum();
            (if target == IGNORE { 0.0 } else { loss }, lse)
        })
        .unzip()
    }

    fn forward<T: Float>(&self, isa: Isa) -> (Vec<f64>, Vec<T::Acc>) {
        let nan = T::Acc::from_f64(f64::NAN);
        let mut losses = vec![nan; self.targets.len()];
        let mut lse = losses.clone();
        let (x, classes) = (round::<T>(&self.logits), self.classes);
        let targets = &self.targets;
        cross_entropy_with(
            isa,
            &x,
            targets,
            IGNORE,
            self.smoothing,
            &mut losses,
            &mut lse,
            classes,
        );
        (wide(&losses), lse)
    }

    fn backward<T: Float>(&self, scale: f64) -> Vec<T> {
        let (_, lse) = self.forward::<T>(Isa::detect());
        let x = round::<T>(&self.logits);
        let mut dx = vec![T::narrow(T::Acc::from_f64(f64::NAN)); x.len()];
        let (targets, classes) = (&self.targets, self.classes);
        cross_entropy_backward(
            &x,
            targets,
            IGNORE,
            self.smoothing,
            &lse,
            scale,
            &mut dx,
            classes,
        );
        dx
    }
}

fn round<T: Float>(x: &[f64]) -> Vec<T> {
    x.iter().map(|&x| T::narrow(T::Acc::from_f64(x))).collect()
}

fn wide<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.widen().to_f64()).collect()
}

/// The slope of a loss at 0 by the central difference of fourth order.
///
/// Its error is step^4 / 30 times the fifth derivative. For a logarithm of a sum of exponentials
/// that is a fifth cumulant of a yes or no, below 0.13, hence 5e-11. Errors of the losses come
/// out 1.5 / step = 150 times as large; with a smaller step they would prevail.
fn slope(loss: impl Fn(f64) -> f64) -> f64 {
    let step = 1e-2;
    let across = |by: f64| loss(by) - loss(-by);
    (8.0 * across(step) - across(2.0 * step)) / (12.0 * step)
}

#[track_caller]
fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let near = (g - w).abs() <= tolerance * (1.0 + w.abs());
        assert!(near, "{what}: element {i} is {g}, expected {w}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn forward_is_the_definition(case in cases()) {
        let (losses, lse) = case.naive();
        for isa in Isa::available() {
            let got = case.forward::<f64>(isa);
            close("f64 losses", &got.0, &losses, 1e-13);
            close("f64 lse", &got.1, &lse, 1e-13);
            // Inputs are exact in all types, sums are f32: 5 additions in each lane, 6 to join
            // the lanes, logits up to 10 at 6e-8 each.
            for got in [
                case.forward::<f32>(isa).0, case.forward::<bf16>(isa).0, case.forward::<f16>(isa).0,
            ] {
                close("f32 losses", &got, &losses, 5e-6);
            }
        }
    }

    #[test]
    fn gradient_is_the_slope(case in cases(), scale in 0.1f64..2.0) {
        let dx = case.backward::<f64>(scale);
        for i in (0..dx.len()).step_by(dx.len() / 9 + 1) {
            let slope = scale * slope(|by| {
                let mut case = case.clone();
                case.logits[i] += by;
                case.naive().0[i / case.classes]
            });
            // Besides the formula's own error, at most 300 roundings of a sum below 16: 6e-13 in
            // each loss. All of it times a scale below 2: 3e-10.
            prop_assert!((slope - dx[i]).abs() < 1e-9, "element {i}: {}, slope {slope}", dx[i]);
        }
        close("f32", &wide(&case.backward::<f32>(scale)), &dx, 2e-6);
        // One rounding to 8 bits, of values below 2.
        close("bf16", &wide(&case.backward::<bf16>(scale)), &dx, 4.1e-3);
    }

    #[test]
    fn chunks_are_the_whole(case in cases(), chunk in 1usize..100, scale in 0.1f64..2.0) {
        let (rows, classes) = (case.targets.len(), case.classes);
        // Whatever the state held before must not matter.
        let [mut max, mut sum, mut at, mut all] = [0; 4].map(|_| vec![f64::NAN; rows]);
        let part = |first: usize| {
            let count = chunk.min(classes - first);
            let rows = case.logits.chunks_exact(classes);
            (rows.flat_map(|x| x[first..first + count].to_vec()).collect::<Vec<f64>>(), count)
        };
        for first in (0..classes).step_by(chunk) {
            let (x, count) = part(first);
            cross_entropy_chunk(
                &x, first, &case.targets, &mut max, &mut sum, &mut at, &mut all, count,
            );
        }
        let [mut losses, mut lse] = [0; 2].map(|_| vec![f64::NAN; rows]);
        cross_entropy_chunk_finish(
            &max, &sum, &at, &all, &case.targets, IGNORE, case.smoothing, &mut losses, &mut lse,
            classes,
        );
        let whole = case.forward::<f64>(Isa::detect());
        close("losses", &losses, &whole.0, 1e-13);
        close("lse", &lse, &whole.1, 1e-13);
        let dx = case.backward::<f64>(scale);
        for first in (0..classes).step_by(chunk) {
            let (mut x, count) = part(first);
            cross_entropy_chunk_backward(
                &mut x, first, &case.targets, IGNORE, case.smoothing, &whole.1, scale, classes,
                count,
            );
            let rows = dx.chunks_exact(classes);
            let expected: Vec<f64> =
                rows.flat_map(|dx| dx[first..first + count].to_vec()).collect();
            // The same arithmetic on the same numbers.
            prop_assert_eq!(x, expected);
        }
    }

    #[test]
    fn binary_losses(x in proptest::collection::vec(-30.0f64..30.0, 0..50), t in 0.0f64..1.0) {
        let targets = vec![t; x.len()];
        let naive = |x: f64| {
            let p = 1.0 / (1.0 + (-x).exp());
            let q = 1.0 / (1.0 + x.exp());
            -(t * p.ln() + (1.0 - t) * q.ln())
        };
        let expected: Vec<f64> = x.iter().map(|&x| naive(x)).collect();
        let mut losses = vec![f64::NAN; x.len()];
        bce_with_logits(&x, &targets, &mut losses);
        close("losses", &losses, &expected, 1e-13);
        let mut dx = vec![f64::NAN; x.len()];
        bce_with_logits_backward(&x, &targets, 0.5, &mut dx);
        for (dx, &x) in dx.iter().zip(&x) {
            // A few roundings of losses up to 30 are 3e-14 in each.
            let slope = slope(|by| naive(x + by));
            prop_assert!((dx - 0.5 * slope).abs() < 1e-9);
        }
    }
}

#[test]
fn extreme_logits() {
    let x = [1e30f32, -1e30, 0.0, f32::NEG_INFINITY, 88.0, 3.0];
    let (mut losses, mut lse) = ([f32::NAN; 2], [f32::NAN; 2]);
    cross_entropy(&x, &[0, 1], IGNORE, 0.0, &mut losses, &mut lse, 3);
    assert_eq!(
        (losses[0], lse[0], losses[1], lse[1]),
        (0.0, 1e30, 0.0, 88.0)
    );
    let mut dx = [f32::NAN; 6];
    cross_entropy_backward(&x, &[0, 0], IGNORE, 0.0, &lse, 1.0, &mut dx, 3);
    assert_eq!(dx[..3], [0.0, 0.0, 0.0]);
    assert_eq!(dx[3..5], [-1.0, 1.0]);
    let mut losses = [f32::NAN; 2];
    bce_with_logits(&[1e30f32, -1e30], &[1.0, 1.0], &mut losses);
    assert_eq!(losses, [0.0, 1e30]);
    // What is not a number must show.
    let (mut losses, mut lse) = ([0.0f32], [0.0f32]);
    cross_entropy(
        &[0.0, f32::NAN, 1.0],
        &[0],
        IGNORE,
        0.0,
        &mut losses,
        &mut lse,
        3,
    );
    assert!(losses[0].is_nan());
}

#[test]
fn threads_do_not_change_a_bit() {
    let (rows, classes) = (37, 5000);
    let mut x = vec![0.0f32; rows * classes];
    philox::fill_normal(Key::new(1, 2, 3), &mut x, 0.0, 3.0);
    let targets: Vec<i64> = (0..rows as i64).collect();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let (mut losses, mut lse) = (vec![0.0f32; rows], vec![0.0f32; rows]);
            cross_entropy(&x, &targets, IGNORE, 0.1, &mut losses, &mut lse, classes);
            let mut dx = vec![0.0f32; x.len()];
            cross_entropy_backward(&x, &targets, IGNORE, 0.1, &lse, 1.0, &mut dx, classes);
            (losses, lse, dx)
        })
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert_eq!(one, run(threads), "{threads} threads");
    }
}

#[test]
#[should_panic(expected = "cross_entropy: logits are not [rows, classes]")]
fn sizes_are_checked() {
    cross_entropy(
        &[0.0f32; 5],
        &[0, 1],
        IGNORE,
        0.0,
        &mut [0.0; 2],
        &mut [0.0; 2],
        3,
    );
}
