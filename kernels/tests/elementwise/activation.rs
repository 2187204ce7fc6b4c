use crate::support::*;
use graft_kernels::activation::*;
use graft_kernels::{Isa, Real, parallel};
use proptest::prelude::*;
use std::f64::consts::PI;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn oracle(kind: Unary, x: f64) -> f64 {
    match kind {
        Unary::Exp => x.exp(),
        Unary::Ln => x.ln(),
        Unary::Sqrt => x.sqrt(),
        Unary::Tanh => x.tanh(),
        Unary::Sigmoid => sigmoid(x),
        Unary::Relu => x.max(0.0),
        Unary::Gelu => 0.5 * x * erfc(-x / 2f64.sqrt()),
        // (1 + tanh u) / 2 is sigmoid(2u)
        Unary::GeluTanh => x * sigmoid(2.0 * (2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))),
        Unary::Silu => x * sigmoid(x),
        Unary::Neg => -x,
        Unary::Abs => x.abs(),
        Unary::Square => x * x,
        Unary::Reciprocal => 1.0 / x,
        Unary::Erf => erf(x),
        Unary::Sin => x.sin(),
        Unary::Cos => x.cos(),
    }
}

fn as_unary(kind: Activation) -> Unary {
    match kind {
        Activation::Gelu => Unary::Gelu,
        Activation::GeluTanh => Unary::GeluTanh,
        Activation::Relu => Unary::Relu,
        Activation::Tanh => Unary::Tanh,
        Activation::Silu => Unary::Silu,
    }
}

/// The derivative by differences of fourth order: off by h⁴/30 = 3e-14 of a fifth derivative
/// (below 100 in the domains) and by 1e-13 of the values.
fn slope(kind: Unary, x: f64) -> f64 {
    let h = 1e-3;
    let difference = |h: f64| oracle(kind, x + h) - oracle(kind, x - h);
    (8.0 * difference(h) - difference(2.0 * h)) / (12.0 * h)
}

/// How many roundings of its result a function may be off in f32: where an exponential's
/// argument is computed, by some four roundings, these count as often as it is large.
fn slack(kind: Unary, x: f64) -> f64 {
    match kind {
        Unary::GeluTanh => 8.0 + 4.0 * (1.6 * x * (1.0 + 0.045 * x * x)).abs(),
        _ => 8.0,
    }
}

/// Where the function is defined, smooth, and within the range of f16.
fn domain(kind: Unary) -> (f64, f64) {
    match kind {
        Unary::Ln | Unary::Sqrt | Unary::Reciprocal => (0.8, 9.0),
        Unary::Relu | Unary::Abs => (0.01, 9.0),
        _ => (-9.0, 9.0),
    }
}

fn forward<T: Stored>(n: usize, seed: u64) {
    for kind in Unary::ALL {
        let (lo, hi) = domain(kind);
        let x: Vec<T> = stored(n, seed, lo, hi);
        let want: Vec<f64> = widen(&x).into_iter().map(|x| oracle(kind, x)).collect();
        // A few roundings of the value; math.rs asserts how few they really are. In f64 the
        // oracle itself loses as much of x, where it adds erf to 1.
        let lost = if size_of::<T>() == 8 { 2.0 } else { 0.0 };
        let wide = widen(&x);
        let scale =
            |i: usize| want[i].abs() * slack(kind, wide[i]) + 8.0 * lost * (1.0 + wide[i].abs());
        on_each(|isa| {
            let mut y = vec![T::default(); n];
            unary_with(isa, kind, &x, &mut y);
            close(&format!("{kind:?} on {isa:?}"), &y, &want, 1.0, scale);
        });
    }
    for kind in Activation::ALL {
        let x: Vec<T> = stored(n, seed, -9.0, 9.0);
        let (mut a, mut b) = (vec![T::default(); n], vec![T::default(); n]);
        activation(kind, &x, &mut a);
        unary(as_unary(kind), &x, &mut b);
        assert_eq!(a, b, "{kind:?}");
    }
}

fn backward<T: Stored>(n: usize, seed: u64) {
    for kind in Unary::ALL {
        let (lo, hi) = domain(kind);
        let (x, dy): (Vec<T>, Vec<T>) = (stored(n, seed, lo, hi), stored(n, seed + 1, -2.0, 2.0));
        let mut y = vec![T::default(); n];
        unary(kind, &x, &mut y);
        // From the value as stored: where that is short, its rounding shows in the slope.
        let (wx, wy) = (widen(&x), widen(&y));
        let want: Vec<f64> = (0..n)
            .map(|i| {
                let s = match kind {
                    Unary::Exp => wy[i],
                    Unary::Sqrt => 0.5 / wy[i],
                    Unary::Tanh => 1.0 - wy[i] * wy[i],
                    Unary::Sigmoid => wy[i] * (1.0 - wy[i]),
                    Unary::Reciprocal => -wy[i] * wy[i],
                    _ => slope(kind, wx[i]),
                };
                s * dy[i].widen().to_f64()
            })
            .collect();
        let differences = if size_of::<T>() == 8 { 3e4 } else { 8.0 };
        on_each(|isa| {
            let mut dx = vec![T::default(); n];
            let (none, some): (&[T], &[T]) = (&[], &x);
            let (x, y) = match kind.backward_needs() {
                Needs::Input => (some, none),
                Needs::Output => (none, &y[..]),
                Needs::Neither => (none, none),
            };
            unary_backward_with(isa, kind, x, y, &dy, &mut dx);
            let what = format!("{kind:?} backward on {isa:?}");
            close(&what, &dx, &want, differences, |i| 2.0 + want[i].abs());
        });
    }
    for kind in Activation::ALL {
        let (x, dy): (Vec<T>, Vec<T>) =
            (stored(n, seed, -9.0, 9.0), stored(n, seed + 1, -2.0, 2.0));
        let want: Vec<f64> = widen(&x)
            .into_iter()
            .zip(widen(&dy))
            .map(|(x, dy)| {
                dy * match kind {
                    Activation::Relu => f64::from(u8::from(x > 0.0)),
                    _ => slope(as_unary(kind), x),
                }
            })
            .collect();
        let differences = if size_of::<T>() == 8 { 3e4 } else { 8.0 };
        on_each(|isa| {
            let mut dx = dy.clone();
            activation_backward_with(isa, kind, &x, &mut dx);
            let what = format!("{kind:?} backward on {isa:?}");
            close(&what, &dx, &want, differences, |i| 2.0 + want[i].abs());
        });
    }
}

fn gated<T: Stored>(n: usize, seed: u64) {
    let (gate, up): (Vec<T>, Vec<T>) = (stored(n, seed, -6.0, 6.0), stored(n, seed + 1, -2.0, 2.0));
    let dy: Vec<T> = stored(n, seed + 2, -2.0, 2.0);
    let (g, u, d) = (widen(&gate), widen(&up), widen(&dy));
    for (kind, inner) in [
        (Glu::Swiglu, Unary::Silu),
        (Glu::Geglu, Unary::Gelu),
        (Glu::GegluTanh, Unary::GeluTanh),
    ] {
        let want: Vec<f64> = (0..n).map(|i| oracle(inner, g[i]) * u[i]).collect();
        let want_gate: Vec<f64> = (0..n).map(|i| slope(inner, g[i]) * u[i] * d[i]).collect();
        let want_up: Vec<f64> = (0..n).map(|i| oracle(inner, g[i]) * d[i]).collect();
        let differences = if size_of::<T>() == 8 { 3e4 } else { 16.0 };
        on_each(|isa| {
            let new = || vec![T::default(); n];
            let (mut y, mut dgate, mut dup) = (new(), new(), new());
            glu_with(isa, kind, &gate, &up, &mut y);
            close(&format!("{kind:?}"), &y, &want, 8.0, |i| {
                6.0 + (g[i] * u[i]).abs()
            });
            glu_backward_with(isa, kind, &gate, &up, &dy, Some(&mut dgate), Some(&mut dup));
            close(
                &format!("{kind:?} dgate"),
                &dgate,
                &want_gate,
                differences,
                |_| 4.0,
            );
            close(&format!("{kind:?} dup"), &dup, &want_up, 8.0, |i| {
                6.0 + (g[i] * d[i]).abs()
            });
            // One alone gives the same bits.
            let (mut one, mut other) = (new(), new());
            glu_backward_with(isa, kind, &gate, &up, &dy, Some(&mut one), None);
            glu_backward_with(isa, kind, &gate, &up, &dy, None, Some(&mut other));
            assert_eq!((one, other), (dgate, dup), "{kind:?} on {isa:?}");
            glu_backward_with(isa, kind, &gate, &up, &dy, None, None);
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_match_the_oracle(n in 0usize..300, seed in any::<u32>()) {
        for_all_types!(forward(n, u64::from(seed)));
    }

    #[test]
    fn derivatives_match_differences(n in 0usize..200, seed in any::<u32>()) {
        for_all_types!(backward(n, u64::from(seed)));
    }

    #[test]
    fn gates_match_the_oracle(n in 0usize..200, seed in any::<u32>()) {
        for_all_types!(gated(n, u64::from(seed)));
    }

    #[test]
    fn affine_matches(n in 0usize..300, seed in any::<u32>(), a in -3.0..3.0, b in -3.0..3.0) {
        fn check<T: Stored>(n: usize, seed: u32, a: f64, b: f64) {
            let x: Vec<T> = stored(n, u64::from(seed), -5.0, 5.0);
            let want: Vec<f64> = widen(&x).into_iter().map(|x| x * a + b).collect();
            on_each(|isa| {
                let mut y = vec![T::default(); n];
                affine_with(isa, &x, a, b, &mut y);
                close("affine", &y, &want, 4.0, |_| 5.0 * a.abs() + b.abs());
            });
        }
        for_all_types!(check(n, seed, a, b));
    }
}

#[test]
fn special_values() {
    const INF: f32 = f32::INFINITY;
    const NAN: f32 = f32::NAN;
    let tiny = f32::from_bits(1);
    let x = [NAN, INF, -INF, 0.0, -0.0, tiny, 1e30, -1e30];
    let table: [(Unary, [f32; 8]); 9] = [
        (Unary::Relu, [NAN, INF, 0.0, 0.0, -0.0, tiny, 1e30, 0.0]),
        (Unary::Gelu, [NAN, INF, NAN, 0.0, -0.0, 0.0, 1e30, -0.0]),
        (Unary::GeluTanh, [NAN, INF, NAN, 0.0, -0.0, 0.0, 1e30, -0.0]),
        (Unary::Silu, [NAN, INF, NAN, 0.0, -0.0, 0.0, 1e30, -0.0]),
        (Unary::Abs, [NAN, INF, INF, 0.0, 0.0, tiny, 1e30, 1e30]),
        (Unary::Neg, [NAN, -INF, INF, -0.0, 0.0, -tiny, -1e30, 1e30]),
        (Unary::Square, [NAN, INF, INF, 0.0, 0.0, 0.0, INF, INF]),
        (
            Unary::Sqrt,
            [NAN, INF, NAN, 0.0, -0.0, tiny.sqrt(), 1e15, NAN],
        ),
        (
            Unary::Reciprocal,
            [NAN, 0.0, -0.0, INF, -INF, INF, 1e-30, -1e-30],
        ),
    ];
    for isa in Isa::available() {
        for (kind, want) in &table {
            let mut y = [0.0; 8];
            unary_with(isa, *kind, &x, &mut y);
            for i in 0..8 {
                let same = y[i].to_bits() == want[i].to_bits() || y[i].is_nan() && want[i].is_nan();
                assert!(
                    same,
                    "{kind:?}({:e}) on {isa:?}: {:e}, not {:e}",
                    x[i], y[i], want[i]
                );
            }
        }
        // No NaN from a large finite argument, and the right limits.
        for kind in [
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Silu,
            Activation::Tanh,
        ] {
            let mut dx = [1f32; 4];
            activation_backward_with(isa, kind, &[1e30, -1e30, 50.0, -50.0], &mut dx);
            let far = if kind == Activation::Tanh { 0.0 } else { 1.0 };
            assert_eq!((dx[0], dx[2]), (far, far), "{kind:?} on {isa:?}");
            assert!(
                dx[1].abs() < 1e-20 && dx[3].abs() < 1e-19,
                "{kind:?} on {isa:?}: {dx:?}"
            );
        }
    }
    let mut dx = [1.0f32; 3];
    unary_backward(Unary::Abs, &[0.0, -2.0, 2.0], &[], &[1.0; 3], &mut dx);
    assert_eq!(dx, [0.0, -1.0, 1.0]);
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let n = 3 * parallel::GRAIN + 17;
    let (x, dy): (Vec<f32>, Vec<f32>) = (stored(n, 1, -5.0, 5.0), stored(n, 2, -1.0, 1.0));
    same_on_any_pool("activation", || {
        let (mut y, mut dx) = (vec![0.0; n], dy.clone());
        activation(Activation::Gelu, &x, &mut y);
        activation_backward(Activation::Gelu, &x, &mut dx);
        (bits(&y), bits(&dx))
    });
    // And where a chunk begins does not show.
    let mut y = vec![0.0; n];
    activation(Activation::Gelu, &x, &mut y);
    let mut part = vec![0.0; n - 5];
    activation(Activation::Gelu, &x[5..], &mut part);
    assert_eq!(bits(&y[5..]), bits(&part));
}

#[test]
#[should_panic(expected = "activation: x and y differ in length")]
fn lengths_are_checked() {
    activation(Activation::Gelu, &[1.0f32; 3], &mut [0.0; 4]);
}

#[test]
#[should_panic(expected = "unary_backward: Tanh needs its Output as long as dx")]
fn a_missing_output_is_noticed() {
    unary_backward(Unary::Tanh, &[1.0f32], &[], &[1.0], &mut [0.0]);
}

#[test]
#[should_panic(expected = "glu_backward: dup and dy differ in length")]
fn lengths_of_gates_are_checked() {
    glu_backward(
        Glu::Geglu,
        &[1.0f32],
        &[1.0],
        &[1.0],
        None,
        Some(&mut [0.0; 2]),
    );
}
