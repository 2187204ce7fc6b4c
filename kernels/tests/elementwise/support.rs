//! What all tests here share: numbers, tolerances, finite differences, thread pools.

use graft_kernels::{Float, Isa, Real};
use half::{bf16, f16};
use std::fmt::Debug;

/// A stored type with the relative error of one rounding to it.
pub trait Rounded {
    const UNIT: f64;
    /// Half the smallest number above 0.
    const TINY: f64;
}

/// A stored type whose computing type is known as well.
pub trait Stored: Float<Acc: Rounded> + Rounded {}
impl<T: Float<Acc: Rounded> + Rounded> Stored for T {}

impl Rounded for f64 {
    const UNIT: f64 = f64::EPSILON / 2.0;
    const TINY: f64 = 5e-324;
}
impl Rounded for f32 {
    const UNIT: f64 = 6e-8;
    const TINY: f64 = 7.1e-46;
}
impl Rounded for bf16 {
    const UNIT: f64 = 1.0 / 256.0;
    const TINY: f64 = 4.6e-41;
}
impl Rounded for f16 {
    const UNIT: f64 = 1.0 / 2048.0;
    const TINY: f64 = 3e-8;
}

/// The relative error of one rounding in what is computed in.
pub fn unit<T: Float>() -> f64 {
    if size_of::<T>() == 8 {
        f64::EPSILON / 2.0
    } else {
        6e-8
    }
}

pub fn store<T: Float>(x: &[f64]) -> Vec<T> {
    x.iter().map(|&x| T::narrow(T::Acc::from_f64(x))).collect()
}

pub fn widen<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.widen().to_f64()).collect()
}

/// Evenly distributed in lo..hi, the same for the same seed.
pub fn random(n: usize, seed: u64, lo: f64, hi: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            lo + (hi - lo) * (state >> 11) as f64 / (1u64 << 53) as f64
        })
        .collect()
}

/// Random numbers as T stores them.
pub fn stored<T: Float>(n: usize, seed: u64, lo: f64, hi: f64) -> Vec<T> {
    store(&random(n, seed, lo, hi))
}

/// Compares within one rounding to T (two, where it is subnormal) and `slack` roundings of numbers of size `scale(i)`.
#[track_caller]
pub fn close<T: Float + Rounded>(
    what: &str,
    got: &[T],
    want: &[f64],
    slack: f64,
    scale: impl Fn(usize) -> f64,
) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (got, &want)) in widen(got).into_iter().zip(want).enumerate() {
        if got.is_nan() && want.is_nan() || got == want {
            continue;
        }
        let limit =
            1.01 * T::UNIT * want.abs() + 4.0 * T::TINY + slack * unit::<T>() * scale(i).abs();
        let error = (got - want).abs();
        assert!(
            error <= limit,
            "{what}[{i}]: {got:e}, expected {want:e}: off by {error:e} > {limit:e}"
        );
    }
}

/// Compares gradients with central differences of a loss.
#[track_caller]
pub fn finite_differences(what: &str, x: &[f64], gradient: &[f64], loss: impl Fn(&[f64]) -> f64) {
    assert_eq!(x.len(), gradient.len());
    let mut x = x.to_vec();
    for i in 0..x.len() {
        let (before, h) = (x[i], 1e-5);
        x[i] = before + h;
        let above = loss(&x);
        x[i] = before - h;
        let below = loss(&x);
        x[i] = before;
        let slope = (above - below) / (2.0 * h);
        // Truncation is about h² = 1e-10 times a third derivative, rounding 1e-16·loss / h.
        let error = (slope - gradient[i]).abs();
        assert!(
            error <= 1e-7 * (1.0 + slope.abs()),
            "{what}[{i}]: {:e}, by differences {slope:e}",
            gradient[i]
        );
    }
}

pub fn weighted(y: &[f64], w: &[f64]) -> f64 {
    y.iter().zip(w).map(|(y, w)| y * w).sum()
}

/// Runs with every instruction set this processor has.
pub fn on_each(mut run: impl FnMut(Isa)) {
    for isa in Isa::available() {
        run(isa);
    }
}

/// The same bits from 1, 2, 3 and 7 threads.
#[track_caller]
pub fn same_on_any_pool<R: PartialEq + Debug + Send>(what: &str, run: impl Fn() -> R + Sync) {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(&run)
    };
    let alone = on(1);
    for threads in [2, 3, 7] {
        assert!(on(threads) == alone, "{what} differs on {threads} threads");
    }
}

/// Bits, so that NaN and -0 compare too.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// erf, from its series of positive terms near 0 and its continued fraction far away (not how the
/// kernels do it).
pub fn erf(x: f64) -> f64 {
    if x.abs() < 2.5 {
        let (mut term, mut sum) = (x, x);
        for i in 1..80 {
            term *= 2.0 * x * x / f64::from(2 * i + 1);
            sum += term;
        }
        sum * (-x * x).exp() * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        (1.0 - erfc(x.abs())).copysign(x)
    }
}

/// 1 - erf(x), also where that is tiny.
pub fn erfc(x: f64) -> f64 {
    if x < 2.5 {
        return 1.0 - erf(x);
    }
    let mut tail = x;
    for i in (1..200).rev() {
        tail = x + f64::from(i) / 2.0 / tail;
    }
    (-x * x).exp() / tail * std::f64::consts::FRAC_2_SQRT_PI / 2.0
}

/// Runs a generic test function for all four stored types.
macro_rules! for_all_types {
    ($test:ident($($arg:expr),*)) => {{
        $test::<f32>($($arg),*);
        $test::<f64>($($arg),*);
        $test::<half::bf16>($($arg),*);
        $test::<half::f16>($($arg),*);
    }};
}
pub(crate) use for_all_types;
