//! Elementary functions inside kernels.
//!
//! For `f32` they are branch-free, so that a loop over them becomes vector instructions: a choice
//! is a select between two values that are both computed. The polynomials were fitted by weighted
//! least squares with Lawson's reweighting, which approaches the minimax solution. The errors
//! stated were measured over the whole range against `f64` and are asserted by the tests.
//!
//! For `f64`, which serves gradient checks and references, they are those of the system's
//! mathematical library, and [`erf`] is W. J. Cody's: "Rational Chebyshev approximations for the
//! error function", Mathematics of Computation 23 (1969).

use crate::element::Real;
use crate::simd::Arch;

/// The functions for one number type. Kernels call the free functions of this module.
pub trait Functions: Sized {
    /// See [`exp`].
    fn exp_on<A: Arch>(self) -> Self;
    /// See [`ln`].
    fn ln_on<A: Arch>(self) -> Self;
    /// See [`tanh`].
    fn tanh_on<A: Arch>(self) -> Self;
    /// See [`logistic`].
    fn logistic_on<A: Arch>(self) -> (Self, Self);
    /// See [`erf`].
    fn erf_on<A: Arch>(self) -> Self;
    /// See [`normal`].
    fn normal_on<A: Arch>(self) -> (Self, Self);
}

/// eˣ, at most 1.1 ulp from the true value for `f32`, denormal results included.
#[inline(always)]
pub fn exp<A: Arch, R: Real>(x: R) -> R {
    x.exp_on::<A>()
}

/// Natural logarithm, at most 1 ulp off for `f32`. NaN below 0, negative infinity at 0.
#[inline(always)]
pub fn ln<A: Arch, R: Real>(x: R) -> R {
    x.ln_on::<A>()
}

/// Hyperbolic tangent, at most 2.5 ulp off for `f32`.
#[inline(always)]
pub fn tanh<A: Arch, R: Real>(x: R) -> R {
    x.tanh_on::<A>()
}

/// 1 / (1 + e⁻ˣ), at most 3 ulp off for `f32`, also where it is tiny.
#[inline(always)]
pub fn sigmoid<A: Arch, R: Real>(x: R) -> R {
    x.logistic_on::<A>().0
}

/// ([`sigmoid`] of x, [`sigmoid`] of -x): the second is 1 minus the first, without the
/// cancellation.
#[inline(always)]
pub fn logistic<A: Arch, R: Real>(x: R) -> (R, R) {
    x.logistic_on::<A>()
}

/// The error function, at most 1.5 ulp off for `f32`.
#[inline(always)]
pub fn erf<A: Arch, R: Real>(x: R) -> R {
    x.erf_on::<A>()
}

/// The standard normal distribution function Φ(x) and its density φ(x), at most 4 and 2 ulp
/// off for `f32`, also in the tails: Φ(-10) does not drown in 1 - 1.
#[inline(always)]
pub fn normal<A: Arch, R: Real>(x: R) -> (R, R) {
    x.normal_on::<A>()
}

/// The smaller; NaN if x is. (`f32::min` would drop the NaN.)
#[inline(always)]
fn at_most(x: f32, limit: f32) -> f32 {
    if x > limit { limit } else { x }
}

/// 1.5 · 2²³: adding it leaves the nearest whole number in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;
const LN2_HI: f32 = 0.693_145_75; // 16 bits, so that a product with a whole number is exact
const LN2_LO: f32 = 1.428_606_8e-6;

/// Splits x + tail = n·ln 2 + r; returns (n, eʳ - 1). |x| must be below 2¹⁵, |tail| below 1e-2.
#[inline(always)]
fn exp_parts<A: Arch>(x: f32, tail: f32) -> (i32, f32) {
    let shifted = A::fma(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = A::fma(n, -LN2_LO, A::fma(n, -LN2_HI, x) + tail);
    let mut p = 0.001_381_455_5;
    for c in [0.008_368_736, 0.041_668_39, 0.166_665_21, 0.499_999_94] {
        p = A::fma(p, r, c);
    }
    let whole = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    (whole, A::fma(r * r, p, r))
}

/// 2ⁿ for -126 <= n <= 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// e^(x + tail) for x in -105 ..= 89.
#[inline(always)]
fn exp_sum<A: Arch>(x: f32, tail: f32) -> f32 {
    let (n, m) = exp_parts::<A>(x, tail);
    // In two steps, because 2ⁿ alone may be too small or too large to be a number.
    let half = n >> 1;
    (1.0 + m) * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// Φ(-t)·e^(t²/2) for t in 0 ..= 14.5, as u·P(1 - u) with u = 1/(1 + t/2): the smooth part of
/// the normal tail. Relative error of the polynomial: below 0.8 ulp.
#[inline(always)]
fn tail_ratio<A: Arch>(t: f32) -> f32 {
    let u = 1.0 / A::fma(0.5, t, 1.0);
    let v = 0.5 * t * u; // 1 - u, without the cancellation
    let mut p = -0.039_068_032;
    for c in [
        0.203_215_52,
        -0.382_264_3,
        0.342_726_92,
        -0.205_188_77,
        0.091_413_245,
        0.038_065_77,
        0.044_346_88,
        -0.095_885_13,
        -0.297_881_72,
        0.5,
    ] {
        p = A::fma(p, v, c);
    }
    u * p
}

/// e^(-t²/2) for 0 <= t <= 14.5, without the error that rounding t² would bring.
#[inline(always)]
fn bell<A: Arch>(t: f32) -> f32 {
    let high = f32::from_bits(t.to_bits() & 0xffff_f000); // its square is exact
    let rest = (t - high) * (t + high);
    exp_sum::<A>(-0.5 * high * high, -0.5 * rest)
}

impl Functions for f32 {
    #[inline(always)]
    fn exp_on<A: Arch>(self) -> f32 {
        let x = at_most(self, 89.0);
        let x = if x < -105.0 { -105.0 } else { x };
        exp_sum::<A>(x, 0.0)
    }

    #[inline(always)]
    fn ln_on<A: Arch>(self) -> f32 {
        let tiny = self < f32::MIN_POSITIVE;
        let x = if tiny { self * 8_388_608.0 } else { self };
        // x = m·2^e with m in √½ .. √2
        let offset = x
            .to_bits()
            .wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits());
        let e = ((offset as i32) >> 23) as f32 - if tiny { 23.0 } else { 0.0 };
        let m = (offset & 0x007f_ffff).wrapping_add(std::f32::consts::FRAC_1_SQRT_2.to_bits());
        let f = f32::from_bits(m) - 1.0;
        let mut p = -0.076_343_44;
        for c in [
            0.127_615_15,
            -0.131_602_11,
            0.142_017_68,
            -0.166_233_55,
            0.200_012_27,
            -0.250_008_23,
            0.333_333_3,
        ] {
            p = A::fma(p, f, c);
        }
        let f2 = f * f;
        let small = A::fma(f * f2, p, A::fma(-0.5, f2, e * LN2_LO));
        let y = A::fma(e, LN2_HI, f + small);
        let y = if self == f32::INFINITY { self } else { y };
        let y = if self == 0.0 { f32::NEG_INFINITY } else { y };
        if self >= 0.0 { y } else { f32::NAN }
    }

    #[inline(always)]
    fn tanh_on<A: Arch>(self) -> f32 {
        // (e^2x - 1) / (e^2x - 1 + 2), which is 1 in f32 from 9.02 on
        let (n, m) = exp_parts::<A>(at_most(2.0 * self.abs(), 20.0), 0.0);
        let scale = power_of_two(n);
        let e = A::fma(scale, m, scale - 1.0);
        (e / (e + 2.0)).copysign(self)
    }

    #[inline(always)]
    fn logistic_on<A: Arch>(self) -> (f32, f32) {
        let x = at_most(self.abs(), 105.0);
        let z = exp_sum::<A>(-x, 0.0);
        let s = 1.0 / (1.0 + z);
        if self < 0.0 { (z * s, s) } else { (s, z * s) }
    }

    #[inline(always)]
    fn erf_on<A: Arch>(self) -> f32 {
        let z = self * self;
        let mut p = 7.853_853_5e-5;
        for c in [
            -0.000_801_019_14,
            0.005_188_327_3,
            -0.026_853_811,
            0.112_835_854,
            -0.376_126_26,
            0.128_379_17,
        ] {
            p = A::fma(p, z, c);
        }
        let small = A::fma(self, p, self);
        // 1 - 2Φ(-√2 |x|)
        let a = at_most(self.abs(), 10.0);
        let high = f32::from_bits(a.to_bits() & 0xffff_f000);
        let e = exp_sum::<A>(-high * high, -(a - high) * (a + high));
        let large =
            A::fma(-2.0 * e, tail_ratio::<A>(std::f32::consts::SQRT_2 * a), 1.0).copysign(self);
        if a < 1.0 { small } else { large }
    }

    #[inline(always)]
    fn normal_on<A: Arch>(self) -> (f32, f32) {
        let t = at_most(self.abs(), 14.5);
        let e = bell::<A>(t);
        let tail = e * tail_ratio::<A>(t);
        let below = if self > 0.0 { 1.0 - tail } else { tail };
        (below, e * 0.398_942_3)
    }
}

impl Functions for f64 {
    #[inline(always)]
    fn exp_on<A: Arch>(self) -> f64 {
        self.exp()
    }
    #[inline(always)]
    fn ln_on<A: Arch>(self) -> f64 {
        self.ln()
    }
    #[inline(always)]
    fn tanh_on<A: Arch>(self) -> f64 {
        self.tanh()
    }
    #[inline(always)]
    fn logistic_on<A: Arch>(self) -> (f64, f64) {
        let z = (-self.abs()).exp();
        let s = 1.0 / (1.0 + z);
        if self < 0.0 { (z * s, s) } else { (s, z * s) }
    }
    #[inline(always)]
    fn erf_on<A: Arch>(self) -> f64 {
        erf_f64(self)
    }
    #[inline(always)]
    fn normal_on<A: Arch>(self) -> (f64, f64) {
        let below = 0.5 * erfc_f64(-self * std::f64::consts::FRAC_1_SQRT_2);
        (
            below,
            (-0.5 * self * self).exp() / std::f64::consts::TAU.sqrt(),
        )
    }
}

/// `numerator / denominator`, both in x; coefficients from the highest power down.
fn ratio(x: f64, numerator: &[f64], denominator: &[f64]) -> f64 {
    let at = |p: &[f64]| p.iter().fold(0.0, |sum, &c| sum * x + c);
    at(numerator) / at(denominator)
}

#[allow(clippy::excessive_precision)] // as published
/// The error function where |x| <= 0.46875.
fn erf_center(x: f64) -> f64 {
    x * ratio(
        x * x,
        &[
            1.85777706184603153e-1,
            3.16112374387056560,
            1.13864154151050156e2,
            3.77485237685302021e2,
            3.20937758913846947e3,
        ],
        &[
            1.0,
            2.36012909523441209e1,
            2.44024637934444173e2,
            1.28261652607737228e3,
            2.84423683343917062e3,
        ],
    )
}

#[allow(clippy::excessive_precision)] // as published
/// 1 - erf(x) where x > 0.46875.
fn erfc_tail(x: f64) -> f64 {
    let scaled = if x <= 4.0 {
        ratio(
            x,
            &[
                2.15311535474403846e-8,
                5.64188496988670089e-1,
                8.88314979438837594,
                6.61191906371416295e1,
                2.98635138197400131e2,
                8.81952221241769090e2,
                1.71204761263407058e3,
                2.05107837782607147e3,
                1.23033935479799725e3,
            ],
            &[
                1.0,
                1.57449261107098347e1,
                1.17693950891312499e2,
                5.37181101862009858e2,
                1.62138957456669019e3,
                3.29079923573345963e3,
                4.36261909014324716e3,
                3.43936767414372164e3,
                1.23033935480374942e3,
            ],
        )
    } else {
        let z = 1.0 / (x * x);
        let p = ratio(
            z,
            &[
                1.63153871373020978e-2,
                3.05326634961232344e-1,
                3.60344899949804439e-1,
                1.25781726111229246e-1,
                1.60837851487422766e-2,
                6.58749161529837803e-4,
            ],
            &[
                1.0,
                2.56852019228982242,
                1.87295284992346047,
                5.27905102951428412e-1,
                6.05183413124413191e-2,
                2.33520497626869185e-3,
            ],
        );
        (0.5 * std::f64::consts::FRAC_2_SQRT_PI - z * p) / x
    };
    // e^(-x²) from a part of x whose square is exact, and the rest.
    let high = (x * 16.0).trunc() / 16.0;
    (-high * high).exp() * (-(x - high) * (x + high)).exp() * scaled
}

fn erf_f64(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        x
    } else if a <= 0.46875 {
        erf_center(x)
    } else {
        (1.0 - erfc_tail(a.min(7.0))).copysign(x)
    }
}

fn erfc_f64(x: f64) -> f64 {
    if x.is_nan() {
        x
    } else if x.abs() <= 0.46875 {
        1.0 - erf_center(x)
    } else if x > 0.0 {
        // e^(-28²) is 0.
        erfc_tail(x.min(28.0))
    } else {
        2.0 - erfc_tail((-x).min(7.0))
    }
}

#[cfg(test)]
#[path = "math_tests.rs"]
mod tests;
