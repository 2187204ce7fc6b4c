//! The number types that kernels compute on.
//!
//! [`Float`] is what is stored (`f32`, `f64`, `bf16`, `f16`), [`Real`] is what is computed in
//! (`f32` for the three short types, `f64` for `f64`).

use crate::math::Functions;
use half::{bf16, f16};
use std::any::TypeId;
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// Whether two types are the same; decided while compiling.
#[inline(always)]
pub(crate) fn same<A: 'static, B: 'static>() -> bool {
    TypeId::of::<A>() == TypeId::of::<B>()
}

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

// Both conversions are branch-free, so that loops over them are vectorised.

impl Float for bf16 {
    type Acc = f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let quiet = bits >> 16 | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }
}

impl Float for f16 {
    type Acc = f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        // The biases of the exponents differ by 112; a product shifts it, also for subnormals.
        let scaled = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        let special = if bits & 0x7c00 == 0x7c00 {
            0x7f80_0000
        } else {
            0
        };
        f32::from_bits(scaled.to_bits() | special | (bits & 0x8000) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> f16 {
        let bits = value.to_bits();
        let size = bits & 0x7fff_ffff;
        let normal = size
            .wrapping_add(0xfff + (size >> 13 & 1))
            .wrapping_sub(112 << 23)
            >> 13;
        // Beside 0.5, an f32 has the spacing of f16 subnormals: the addition rounds to it.
        let small = (f32::from_bits(size) + 0.5)
            .to_bits()
            .wrapping_sub(0.5f32.to_bits());
        let below = if size < 113 << 23 { small } else { normal };
        let finite = if size > 0x477f_efff { 0x7c00 } else { below };
        let nan = 0x7e00 | (size >> 13 & 0x3ff);
        let result = if value.is_nan() { nan } else { finite };
        f16::from_bits((result | bits >> 16 & 0x8000) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alike(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
    }

    #[test]
    fn widening_is_exact() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert!(alike(b.widen(), b.to_f32()), "bf16 {bits:#x}");
            assert!(alike(h.widen(), h.to_f32()), "f16 {bits:#x}");
        }
    }

    /// Against the `half` crate: every 251st f32, and all that lie at or next to the middle
    /// between two numbers, where rounding turns.
    #[test]
    fn narrowing_rounds_to_nearest_even() {
        let check = |bits: u32| {
            let x = f32::from_bits(bits);
            assert_eq!(
                bf16::narrow(x).to_bits(),
                bf16::from_f32(x).to_bits(),
                "bf16 of {x:e}"
            );
            assert_eq!(
                f16::narrow(x).to_bits(),
                f16::from_f32(x).to_bits(),
                "f16 of {x:e}"
            );
        };
        (0..=u32::MAX).step_by(251).for_each(check);
        for bits in 0..u16::MAX {
            for middle in [
                (u32::from(bits) << 16) + 0x8000,
                ((f16::from_bits(bits).to_f32() + f16::from_bits(bits + 1).to_f32()) / 2.0)
                    .to_bits(),
            ] {
                (middle.saturating_sub(1)..=middle.saturating_add(1)).for_each(check);
            }
        }
    }
}
