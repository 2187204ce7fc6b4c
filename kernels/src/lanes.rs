//! Loops compiled for each instruction set, and the functions that vectorise inside them.
//!
//! A [`Job`] is one generic, always-inlined body; [`call`] runs it inside a function that has the
//! instructions enabled, so that the compiler vectorises plain loops with them.

use crate::element::{Float, Real};
use crate::gemm::Isa;
use half::{bf16, f16};
use std::any::TypeId;
use std::mem::transmute_copy;

/// An instruction set as a type.
pub(crate) trait Arch: Copy + Send + Sync {
    /// Which one it is.
    const ISA: Isa;

    /// `a * b + c`: rounded once where the processor has an instruction for it, else twice.
    #[inline(always)]
    fn fma<R: Real>(a: R, b: R, c: R) -> R {
        if Self::ISA != Isa::Portable || cfg!(target_arch = "aarch64") {
            a.mul_add(b, c)
        } else {
            a * b + c
        }
    }
}

macro_rules! arch {
    ($($name:ident)*) => {$(
        #[derive(Clone, Copy)]
        pub(crate) struct $name;
        impl Arch for $name {
            const ISA: Isa = Isa::$name;
        }
    )*};
}
arch!(Portable);
#[cfg(target_arch = "x86_64")]
arch!(Avx2 Avx512);

/// Something to run with an instruction set. `run` must be `#[inline(always)]`.
pub(crate) trait Job {
    fn run<A: Arch>(self);
}

/// Runs the job on an instruction set, or in portable form if the processor does not have it.
#[inline]
pub(crate) fn call<J: Job>(isa: Isa, job: J) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn avx512<J: Job>(job: J) {
            job.run::<Avx512>();
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<J: Job>(job: J) {
            job.run::<Avx2>();
        }
        let narrow = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        let wide = narrow
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match isa {
            // SAFETY: the processor has just been asked for each of the features.
            Isa::Avx512 if wide => return unsafe { avx512(job) },
            // SAFETY: as above.
            Isa::Avx2 | Isa::Avx512 if narrow => return unsafe { avx2(job) },
            _ => (),
        }
    }
    let _ = isa;
    job.run::<Portable>();
}

/// Whether two types are the same; decided while compiling.
#[inline(always)]
pub(crate) fn same<S: 'static, T: 'static>() -> bool {
    TypeId::of::<S>() == TypeId::of::<T>()
}

/// [`Float::widen`] without branches, which would keep the short types from being vectorised.
#[inline(always)]
pub(crate) fn widen<T: Float>(x: T) -> T::Acc {
    if same::<T, bf16>() {
        // SAFETY: T is bf16, T::Acc therefore f32.
        unsafe {
            let bits = transmute_copy::<T, u16>(&x);
            transmute_copy::<f32, T::Acc>(&f32::from_bits(u32::from(bits) << 16))
        }
    } else if same::<T, f16>() {
        // SAFETY: T is f16, T::Acc therefore f32.
        unsafe {
            let bits = u32::from(transmute_copy::<T, u16>(&x));
            // The exponent's bias differs by 112, which a product mends for subnormal numbers
            // too; infinity and NaN need the largest exponent instead.
            let small = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
            let special = if bits & 0x7c00 == 0x7c00 {
                0x7f80_0000
            } else {
                0
            };
            let wide = f32::from_bits(small.to_bits() | special | (bits & 0x8000) << 16);
            transmute_copy::<f32, T::Acc>(&wide)
        }
    } else {
        x.widen()
    }
}

/// e^x without branches for `f32`, by the standard library for `f64`.
///
/// `f32`: x is reduced by a multiple of ln 2 in two parts, the rest goes through the polynomial
/// of S. L. Moshier's Cephes library (`expf`). Error at most 2 ulp for -87.3 <= x <= 88; below
/// that the result is 0, -infinity included, above 88.3 it is infinity. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<A: Arch, R: Real>(x: R) -> R {
    if same::<R, f32>() {
        // SAFETY: R is f32.
        unsafe { transmute_copy::<f32, R>(&exp_f32::<A>(transmute_copy::<R, f32>(&x))) }
    } else {
        R::from_f64(x.to_f64().exp())
    }
}

#[inline(always)]
fn exp_f32<A: Arch>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > 88.3 { 88.3 } else { x };
    let clamped = if clamped < -87.3 { -87.3 } else { clamped };
    let sum = A::fma(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = sum - ROUND;
    let r = A::fma(n, -LN2_HIGH, clamped);
    let r = A::fma(n, -LN2_LOW, r);
    let mut poly = 1.987_569_1e-4;
    for c in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        poly = A::fma(poly, r, c);
    }
    let y = A::fma(poly, r * r, r) + 1.0;
    let power = f32::from_bits((sum.to_bits() << 23).wrapping_add(127 << 23));
    let y = y * power;
    let y = if x < -87.3 { 0.0 } else { y };
    if x > 88.3 { f32::INFINITY } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Distance in units of the last place of the f32 next to the true value.
    fn ulps(got: f32, truth: f64) -> f64 {
        let near = truth as f32;
        let unit = f64::from(f32::from_bits(near.to_bits() & 0x7fff_ffff).next_up())
            - f64::from(near.abs());
        (f64::from(got) - truth).abs() / unit
    }

    #[test]
    fn functions_are_accurate() {
        let mut worst = [0.0f64; 2];
        for i in 0..400_000 {
            let x = -87.2 + i as f32 * (175.2 / 400_000.0);
            worst[0] = worst[0].max(ulps(exp_f32::<Portable>(x), f64::from(x).exp()));
            #[cfg(target_arch = "x86_64")]
            if Isa::detect() != Isa::Portable {
                worst[1] = worst[1].max(ulps(exp_f32::<Avx2>(x), f64::from(x).exp()));
            }
        }
        assert!(worst.iter().all(|&w| w <= 2.0), "{worst:?}");
    }

    #[test]
    fn functions_at_the_ends() {
        assert_eq!(exp_f32::<Portable>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32::<Portable>(-1e30), 0.0);
        assert_eq!(exp_f32::<Portable>(0.0), 1.0);
        assert_eq!(exp_f32::<Portable>(1e30), f32::INFINITY);
        assert!(exp_f32::<Portable>(f32::NAN).is_nan());
    }

    #[test]
    fn widening_is_exact() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            let same = |got: f32, want: f32| {
                got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan()
            };
            assert!(same(widen(b), b.to_f32()), "bf16 {bits:#x}");
            assert!(same(widen(h), h.to_f32()), "f16 {bits:#x}");
        }
    }
}
