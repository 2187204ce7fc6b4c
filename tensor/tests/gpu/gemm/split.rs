//! f32 products on tensor cores, of numbers in two parts, against those without: both beside sums in f64.

use graft_kernels::cuda::Scalar;
use graft_kernels::cuda::gemm::Kernels;

use super::cases::orders;
use super::{Call, Numbers, PLAIN, draw, numbers, run, sums};
use crate::common::gpu;

/// What is multiplied, made of normal numbers: each with its number along k, of so many.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Normal,
    /// All of one sign, of which errors that go one way add up
    Positive,
    /// The second half of k takes nearly all of the first away
    Cancelling,
    /// Over 2^-20 to 2^20
    Wide,
    /// Products of large numbers with such as have no 24 bits
    Subnormal,
}

const KINDS: [Kind; 4] = [Kind::Normal, Kind::Positive, Kind::Cancelling, Kind::Wide];

/// Numbers of a call in order, without gaps, of which A is `[m, k]` and B `[k, n]` or those transposed.
fn make(call: &Call, kind: Kind, seed: u64) -> Numbers {
    let [m, n, k] = call.sizes;
    let mut drawn = draw(call, seed);
    let extra = numbers((m + n) * k, Scalar::F32, seed + 50);
    let places = |transposed: bool, side: usize, i: usize, depth: usize| match transposed {
        false => i * k + depth,
        true => depth * side + i,
    };
    let [ta, tb] = call.transposed;
    for (x, transposed, side, sign, extra) in [
        (&mut drawn.a, ta, m, 1.0, &extra[..m * k]),
        (&mut drawn.b, !tb, n, -1.0, &extra[m * k..]),
    ] {
        for i in 0..side {
            for depth in 0..k {
                let at = places(transposed, side, i, depth);
                let (own, other) = (x[at], extra[at]);
                x[at] = match kind {
                    Kind::Normal => own,
                    Kind::Positive => own.abs() + 0.5,
                    Kind::Cancelling if depth >= k / 2 => {
                        let first = x[places(transposed, side, i, depth - k / 2)];
                        sign * first * (1.0 + other / 4096.0)
                    }
                    Kind::Cancelling => own,
                    Kind::Wide => own * (8.0 * other).clamp(-20.0, 20.0).exp2(),
                    Kind::Subnormal if sign > 0.0 => own * 2f32.powi(-131),
                    Kind::Subnormal => own * 2f32.powi(20),
                };
            }
        }
    }
    drawn
}

/// The mean square and the largest of errors, in units of 2^-24 of what was summed without signs.
fn errors(call: &Call, numbers: &Numbers) -> [f64; 2] {
    let found = run(gpu().opened_gpu().unwrap(), call, numbers).c;
    let sizes = |x: &[f32]| x.iter().map(|x| x.abs()).collect();
    let unsigned = Numbers {
        a: sizes(&numbers.a),
        b: sizes(&numbers.b),
        c: Vec::new(),
        bias: Vec::new(),
        of: Vec::new(),
        less: Vec::new(),
    };
    let (exact, summed) = (sums(call, numbers), sums(call, &unsigned));
    let [mut squares, mut most] = [0.0, 0f64];
    for ((found, exact), summed) in found.iter().zip(&exact).zip(&summed) {
        let apart = (f64::from(*found) - exact.unwrap()).abs() / summed.unwrap();
        let apart = apart * f64::from(1 << 24);
        squares += apart * apart;
        most = most.max(apart);
    }
    [(squares / found.len() as f64).sqrt(), most]
}

/// Errors of both kernels, of which the first are those on tensor cores.
fn both(call: Call, kind: Kind, seed: u64) -> [[f64; 2]; 2] {
    let numbers = make(&call, kind, seed);
    [Kernels::General, Kernels::Simt].map(|kernels| errors(&Call { kernels, ..call }, &numbers))
}

/// In the simulation, whose tensor cores cut a little more than real ones, root mean squares are 1.3 to 2.9 times those of
/// the other kernels for 8 products (which make errors of 0.3 to 0.7 units), 0.7 to 1.8 times for 33, and 0.4 to 1.2 times for
/// 120 and more; the largest error is one of 9.6 units, where others make one of 15.6.
#[test]
#[ignore = "needs a GPU"]
fn errors_are_those_of_f32() {
    for kind in KINDS {
        for (i, k) in [8, 33, 120, 500, 2000, 5000].into_iter().enumerate() {
            let call = Call {
                sizes: [24 + i, 40 - i, k],
                transposed: orders().nth(i % 4).unwrap(),
                ..PLAIN
            };
            let [split, simple] = both(call, kind, 7 + i as u64);
            println!("{kind:?}, {k} products: {split:.2?} of {simple:.2?}");
            let least = if k < 100 { [2.6, 12.0] } else { [0.0, 0.0] };
            for i in 0..2 {
                assert!(
                    split[i] <= (1.5 * simple[i]).max(least[i]),
                    "{kind:?}, {k} products: errors {split:?}, not {simple:?}"
                );
            }
        }
    }
}

/// What is left of a number below 2^-126 by TF32 is a multiple of 2^-136.
#[test]
#[ignore = "needs a GPU"]
fn small_numbers_keep_what_there_is_of_them() {
    let gpu = gpu().opened_gpu().unwrap();
    for transposed in orders() {
        let call = Call {
            kernels: Kernels::General,
            sizes: [20, 30, 40],
            transposed,
            ..PLAIN
        };
        let numbers = make(&call, Kind::Subnormal, 3);
        let found = run(gpu, &call, &numbers).c;
        let most = |x: &[f32]| x.iter().fold(0f32, |most, x| most.max(x.abs())).into();
        let (a, b): (f64, f64) = (most(&numbers.a), most(&numbers.b));
        let allowed = 40.0 * (a * b * 2f64.powi(-22) + b * 2f64.powi(-136));
        for (found, exact) in found.iter().zip(sums(&call, &numbers)) {
            let apart = (f64::from(*found) - exact.unwrap()).abs();
            assert!(
                apart <= allowed,
                "{transposed:?}: {apart:e}, {allowed:e} allowed"
            );
        }
    }
}

/// Infinities, what is not a number, and numbers that rounding to TF32 would make infinite, in a few rows and columns: sums
/// of those are the other kernels', to the bit, and sums of others as if there were none.
#[test]
#[ignore = "needs a GPU"]
fn what_cannot_be_split_is_summed_as_it_is() {
    let gpu = gpu().opened_gpu().unwrap();
    let special = [
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xffff_ffff),
        f32::MAX,
        -f32::MAX,
        f32::from_bits(0x7f7f_f000),
    ];
    for transposed in orders() {
        for accumulate in [false, true] {
            let call = Call {
                sizes: [150, 140, 37],
                transposed,
                accumulate,
                bias: accumulate,
                ..PLAIN
            };
            let [m, n, k] = call.sizes;
            let usual = make(&call, Kind::Normal, 5);
            let mut numbers = make(&call, Kind::Normal, 5);
            // Whole numbers, and zeros, of which small parts are 0.
            let [ta, tb] = transposed;
            for (i, x) in special.into_iter().enumerate() {
                let (row, depth) = (19 * i + 1, 4 * i + 2);
                numbers.a[if ta { depth * m + row } else { row * k + depth }] = x;
                let (column, depth) = (17 * i + 3, 3 * i + 5);
                numbers.b[if tb {
                    column * k + depth
                } else {
                    depth * n + column
                }] = x;
            }
            for (i, x) in [0.0, 1.0, -2.0, 0.5, 0.0].into_iter().enumerate() {
                for depth in 0..k {
                    let column = 40 + 5 * i;
                    numbers.b[if tb {
                        column * k + depth
                    } else {
                        depth * n + column
                    }] = x;
                }
            }
            let [split, simple, without] = [
                (Kernels::General, &numbers),
                (Kernels::Simt, &numbers),
                (Kernels::General, &usual),
            ]
            .map(|(kernels, numbers)| run(gpu, &Call { kernels, ..call }, numbers).c);
            let is_special = |row: usize, column: usize| {
                let [row, column] = [(row, 19, 1), (column, 17, 3)].map(|(at, each, first)| {
                    at >= first && (at - first) % each == 0 && (at - first) / each < special.len()
                });
                row || column
            };
            let mut infinite = 0;
            for at in 0..m * n {
                let (row, column) = (at / n, at % n);
                let (found, expected) = (split[at], simple[at]);
                if is_special(row, column) {
                    let same = found == expected || (found.is_nan() && expected.is_nan());
                    assert!(same, "{call:?} {row}, {column}: {found}, not {expected}");
                    infinite += usize::from(expected.is_infinite());
                } else if !(40..=60).contains(&column) {
                    assert_eq!(
                        found.to_bits(),
                        without[at].to_bits(),
                        "{call:?} {row}, {column}"
                    );
                }
            }
            assert!(infinite > 100, "{infinite} sums are infinite");
        }
    }
}
