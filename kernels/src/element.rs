//! The number types that kernels compute on.
//!
//! [`Float`] is what is stored (`f32`, `f64`, `bf16`, `f16`), [`Real`] is what is computed in
//! (`f32` for the three short types, `f64` for `f64`).

use crate::math::Functions;
use half::{bf16, f16};
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// Anything a buffer may hold.
pub trait Element: Copy + Default + Send + Sync + PartialEq + Debug + 'static {}

impl Element for f32 {}
impl Element for f64 {}
impl Element for bf16 {}
impl Element for f16 {}
impl Element for i64 {}
impl Element for i32 {}
impl Element for u8 {}

/// A stored floating-point type; arithmetic happens in [`Float::Acc`].
pub trait Float: Element + PartialOrd {
    /// The type that sums and products of this one are computed in.
    type Acc: Real;
    /// To the computing type, exactly.
    fn widen(self) -> Self::Acc;
    /// From the computing type, rounded to nearest, ties to even.
    fn narrow(value: Self::Acc) -> Self;
}

/// A type that arithmetic is done in: `f32` or `f64`.
pub trait Real:
    Float<Acc = Self>
    + Functions
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// Negative infinity
    const NEG_INFINITY: Self;
    /// Rounded from `f64`.
    fn from_f64(value: f64) -> Self;
    /// To `f64`, exactly.
    fn to_f64(self) -> f64;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// The larger of the two; the other one if one is NaN.
    fn max(self, other: Self) -> Self;
    /// The smaller of the two; the other one if one is NaN.
    fn min(self, other: Self) -> Self;
    /// `self * a + b` with one rounding. Slow where the processor has no such instruction.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
}

macro_rules! real {
    ($t:ident) => {
        impl Float for $t {
            type Acc = $t;
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(value: $t) -> $t {
                value
            }
        }
        impl Real for $t {
            const ZERO: $t = 0.0;
            const ONE: $t = 1.0;
            const NEG_INFINITY: $t = $t::NEG_INFINITY;
            #[inline(always)]
            fn from_f64(value: f64) -> $t {
                value as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn sqrt(self) -> $t {
                $t::sqrt(self)
            }
            #[inline(always)]
            fn ln(self) -> $t {
                $t::ln(self)
            }
            #[inline(always)]
            fn abs(self) -> $t {
                $t::abs(self)
            }
            #[inline(always)]
            fn max(self, other: $t) -> $t {
                $t::max(self, other)
            }
            #[inline(always)]
            fn min(self, other: $t) -> $t {
                $t::min(self, other)
            }
            #[inline(always)]
            fn mul_add(self, a: $t, b: $t) -> $t {
                $t::mul_add(self, a, b)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                $t::is_finite(self)
            }
        }
    };
}
real!(f32);
real!(f64);

macro_rules! short {
    ($t:ident) => {
        impl Float for $t {
            type Acc = f32;
            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn narrow(value: f32) -> $t {
                $t::from_f32(value)
            }
        }
    };
}
short!(bf16);
short!(f16);
