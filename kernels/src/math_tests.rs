use super::*;
use crate::simd::{Isa, kernel};

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Of {
    Exp,
    Ln,
    Tanh,
    Sigmoid,
    Opposite,
    Erf,
    Below,
    Density,
}

kernel! {
    fn apply[A: Arch, R: Real](isa: Isa, of: Of, x: &[R], y: &mut [R]) {
        let each = x.iter().zip(y);
        match of {
            Of::Exp => each.for_each(|(x, y)| *y = exp::<A, R>(*x)),
            Of::Ln => each.for_each(|(x, y)| *y = ln::<A, R>(*x)),
            Of::Tanh => each.for_each(|(x, y)| *y = tanh::<A, R>(*x)),
            Of::Sigmoid => each.for_each(|(x, y)| *y = sigmoid::<A, R>(*x)),
            Of::Opposite => each.for_each(|(x, y)| *y = logistic::<A, R>(*x).1),
            Of::Erf => each.for_each(|(x, y)| *y = erf::<A, R>(*x)),
            Of::Below => each.for_each(|(x, y)| *y = normal::<A, R>(*x).0),
            Of::Density => each.for_each(|(x, y)| *y = normal::<A, R>(*x).1),
        }
    }
}

/// The same in f64, from functions that are good to about 1e-15.
fn exact(of: Of, x: f64) -> f64 {
    match of {
        Of::Exp => x.exp(),
        Of::Ln => x.ln(),
        Of::Tanh => x.tanh(),
        Of::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Of::Opposite => 1.0 / (1.0 + x.exp()),
        Of::Erf => erf_f64(x),
        Of::Below => 0.5 * erfc_f64(-x / 2f64.sqrt()),
        Of::Density => (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt(),
    }
}

/// |got - exact| in units of the last place of an f32 of that size.
fn ulps(got: f32, exact: f64) -> f64 {
    let rounded = exact as f32;
    if got == rounded || got.is_nan() && rounded.is_nan() {
        return 0.0;
    }
    let exponent = (rounded.abs().max(f32::MIN_POSITIVE).to_bits() >> 23) as i32 - 127;
    (f64::from(got) - exact).abs() / 2f64.powi(exponent - 23)
}

/// Every 4001st of all f32 (a prime, so that no bit of the mantissa stays fixed), and half a
/// million evenly spaced where the functions do something.
fn sweep() -> Vec<f32> {
    let all = (0..=u32::MAX)
        .step_by(4001)
        .map(f32::from_bits)
        .filter(|x| !x.is_nan());
    let dense = (0..500_000u32).map(|i| (f64::from(i) * 220e-6 * 2.0 - 110.0) as f32);
    let center = (0..500_000u32).map(|i| (f64::from(i) * 8e-5 - 20.0) as f32);
    all.chain(dense).chain(center).collect()
}

#[test]
fn errors_are_as_stated() {
    let x = sweep();
    let mut y = vec![0f32; x.len()];
    for (of, limit) in [
        (Of::Exp, 1.1),
        (Of::Ln, 1.0),
        (Of::Tanh, 2.5),
        (Of::Sigmoid, 3.0),
        (Of::Opposite, 3.0),
        (Of::Erf, 1.5),
        (Of::Below, 4.0),
        (Of::Density, 2.0),
    ] {
        let reference: Vec<f64> = x.iter().map(|&x| exact(of, f64::from(x))).collect();
        for isa in Isa::available() {
            apply(isa, of, &x, &mut y);
            let (worst, at) = y
                .iter()
                .zip(&reference)
                .zip(&x)
                .map(|((&y, &exact), &x)| (ulps(y, exact), x))
                .fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a });
            println!("{of:?} on {isa:?}: {worst:.3} ulp at {at:e}");
            assert!(worst <= limit, "{of:?} on {isa:?}: {worst} ulp at {at:e}");
        }
    }
}

#[test]
fn special_values() {
    const INF: f32 = f32::INFINITY;
    let tiny = f32::from_bits(1);
    let table: [(Of, f32, f32); 30] = [
        (Of::Exp, INF, INF),
        (Of::Exp, -INF, 0.0),
        (Of::Exp, 0.0, 1.0),
        (Of::Exp, -0.0, 1.0),
        (Of::Exp, tiny, 1.0),
        (Of::Exp, 88.8, INF),
        (Of::Exp, -104.0, 0.0),
        (Of::Ln, 0.0, -INF),
        (Of::Ln, -0.0, -INF),
        (Of::Ln, -tiny, f32::NAN),
        (Of::Ln, -INF, f32::NAN),
        (Of::Ln, INF, INF),
        (Of::Ln, 1.0, 0.0),
        (Of::Tanh, INF, 1.0),
        (Of::Tanh, -INF, -1.0),
        (Of::Tanh, tiny, tiny),
        (Of::Tanh, -0.0, -0.0),
        (Of::Sigmoid, INF, 1.0),
        (Of::Sigmoid, -INF, 0.0),
        (Of::Sigmoid, 0.0, 0.5),
        (Of::Erf, INF, 1.0),
        (Of::Erf, -INF, -1.0),
        (Of::Erf, tiny, tiny),
        (Of::Erf, -0.0, -0.0),
        (Of::Below, INF, 1.0),
        (Of::Below, -INF, 0.0),
        (Of::Below, 0.0, 0.5),
        (Of::Density, INF, 0.0),
        (Of::Density, -INF, 0.0),
        (Of::Density, 0.0, 0.398_942_3),
    ];
    for isa in Isa::available() {
        for (of, x, expected) in table {
            let mut y = [0.0];
            apply(isa, of, &[x], &mut y);
            let same = y[0].to_bits() == expected.to_bits() || y[0].is_nan() && expected.is_nan();
            assert!(
                same,
                "{of:?}({x:e}) on {isa:?}: {:e}, expected {expected:e}",
                y[0]
            );
        }
        for of in [
            Of::Exp,
            Of::Ln,
            Of::Tanh,
            Of::Sigmoid,
            Of::Erf,
            Of::Below,
            Of::Density,
        ] {
            let mut y = [0.0, 0.0];
            apply(isa, of, &[f32::NAN, -f32::NAN], &mut y);
            assert!(
                y[0].is_nan() && y[1].is_nan(),
                "{of:?}(NaN) on {isa:?}: {y:?}"
            );
            let mut y = [0.0];
            apply(isa, of, &[f64::NAN], &mut y);
            assert!(y[0].is_nan(), "{of:?}(NaN) in f64: {y:?}");
        }
    }
}

/// Values computed with 40 digits (mpmath), rounded to f64.
#[test]
fn erf_in_f64() {
    for (x, erf, erfc) in ERF {
        for (got, expected) in [(erf_f64(x), erf), (erfc_f64(x), erfc), (erf_f64(-x), -erf)] {
            let error = ((got - expected) / expected).abs();
            assert!(
                error <= 1e-15,
                "at {x}: {got:e}, expected {expected:e}, off by {error:e}"
            );
        }
        assert!((erfc_f64(-x) - (1.0 + erf)).abs() <= 4e-16);
    }
    assert_eq!((erf_f64(0.0), erfc_f64(0.0)), (0.0, 1.0));
    assert_eq!(
        (erf_f64(f64::INFINITY), erfc_f64(f64::INFINITY)),
        (1.0, 0.0)
    );
    assert_eq!(
        (erf_f64(f64::NEG_INFINITY), erfc_f64(f64::NEG_INFINITY)),
        (-1.0, 2.0)
    );
}

const ERF: [(f64, f64, f64); 21] = [
    (1e-300, 1.1283791670955126e-300, 1.0),
    (1e-08, 1.1283791670955126e-08, 0.9999999887162083),
    (0.1, 0.1124629160182849, 0.887537083981715),
    (0.3, 0.3286267594591274, 0.6713732405408726),
    (0.46875, 0.49261347321793797, 0.507386526782062),
    (0.5, 0.5204998778130465, 0.4795001221869535),
    (0.75, 0.7111556336535151, 0.28884436634648486),
    (1.0, 0.8427007929497149, 0.15729920705028513),
    (1.5, 0.9661051464753108, 0.033894853524689274),
    (2.0, 0.9953222650189527, 0.004677734981047266),
    (2.7, 0.9998656672600594, 0.0001343327399405242),
    (3.5, 0.9999992569016276, 7.430983723414128e-07),
    (4.0, 0.9999999845827421, 1.541725790028002e-08),
    (4.0625, 0.9999999908210709, 9.178929024808192e-09),
    (5.0, 0.9999999999984626, 1.537459794428035e-12),
    (6.0, 1.0, 2.1519736712498913e-17),
    (7.5, 1.0, 2.776649386030569e-26),
    (10.0, 1.0, 2.088487583762545e-45),
    (15.0, 1.0, 7.212994172451207e-100),
    (20.0, 1.0, 5.395865611607901e-176),
    (26.0, 1.0, 5.663192408856143e-296),
];
