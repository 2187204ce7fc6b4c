//! One generic body per kernel, compiled once for each instruction set and chosen at run time.
//!
//! A body is generic over [`Arch`] and written so that the compiler vectorises it: fixed-size
//! lanes, several accumulators, no branch that depends on the data. The `kernel!` macro compiles
//! it with the instructions of every [`Isa`] enabled and adds the safe function that picks one.
//!
//! Instruction sets may differ in the last bits, because only some fuse a multiplication with an
//! addition. On one machine the choice never changes while a program runs.

use crate::element::Real;
use std::sync::LazyLock;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// What every processor of the target has: SSE2 on x86-64.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with AVX512_BF16: products of bf16 matrices use it, all else is as in `Avx512`.
    Avx512Bf16,
    /// 64-bit ARM: NEON with fused multiply-add, which is always there.
    Neon,
    /// The same with FEAT_BF16: products of bf16 matrices use it, all else is as in `Neon`.
    NeonBf16,
}

impl Isa {
    /// All of them, the best last.
    const ALL: [Isa; 6] = [
        Isa::Portable,
        Isa::Neon,
        Isa::NeonBf16,
        Isa::Avx2,
        Isa::Avx512,
        Isa::Avx512Bf16,
    ];

    /// The best one this processor has: every kernel asks, so the answer is kept.
    #[inline]
    pub fn detect() -> Isa {
        static BEST: LazyLock<Isa> = LazyLock::new(|| {
            let mut best_first = Isa::ALL.into_iter().rev();
            best_first.find(|isa| isa.exists()).unwrap_or(Isa::Portable)
        });
        *BEST
    }

    /// Those this processor has, the best last.
    pub fn available() -> Vec<Isa> {
        Isa::ALL
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// Whether this processor has it.
    #[inline]
    pub fn is_available(self) -> bool {
        self == Isa::detect() || self.exists()
    }

    fn exists(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        match self {
            Isa::Portable => true,
            Isa::Neon | Isa::NeonBf16 => false,
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Isa::Avx512 => {
                Isa::Avx2.exists()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            Isa::Avx512Bf16 => Isa::Avx512.exists() && is_x86_feature_detected!("avx512bf16"),
        }
        #[cfg(target_arch = "aarch64")]
        match self {
            Isa::Portable | Isa::Neon => true,
            Isa::NeonBf16 => std::arch::is_aarch64_feature_detected!("bf16"),
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => false,
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        match self {
            Isa::Portable => true,
            Isa::Neon | Isa::NeonBf16 | Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 => false,
        }
    }

    /// Itself where the processor has it, else `Portable`: this is what makes it safe to ask for
    /// any of them.
    #[inline]
    pub fn or_portable(self) -> Isa {
        if self.is_available() {
            self
        } else {
            Isa::Portable
        }
    }
}

/// How arithmetic is done by an instruction set.
pub trait Arch: Copy + Send + Sync + 'static {
    /// `a * b + c`
    fn fma<R: Real>(a: R, b: R, c: R) -> R;
}

/// Multiplies, rounds, adds, rounds.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

/// Multiplies and adds with one rounding, in one instruction.
#[derive(Clone, Copy, Debug)]
pub struct Fused;

/// What every processor of the target does well: 64-bit ARM always has fused multiply-add.
#[cfg(target_arch = "aarch64")]
pub(crate) type Baseline = Fused;
/// What every processor of the target does well.
#[cfg(not(target_arch = "aarch64"))]
pub(crate) type Baseline = Plain;

impl Arch for Plain {
    #[inline(always)]
    fn fma<R: Real>(a: R, b: R, c: R) -> R {
        a * b + c
    }
}

impl Arch for Fused {
    #[inline(always)]
    fn fma<R: Real>(a: R, b: R, c: R) -> R {
        a.mul_add(b, c)
    }
}

/// Compiles a body for every instruction set.
///
/// ```text
/// kernel! {
///     /// What it does.
///     pub(crate) fn scale[A: Arch, T: Float](isa: Isa, x: &mut [T], by: T::Acc) { … }
/// }
/// ```
/// gives `scale(isa, x, by)`. What the body calls must be `#[inline(always)]`, because a function
/// that is not inlined is compiled without the instructions.
macro_rules! kernel {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident [$arch:ident : Arch $(, $g:ident : $bound:path)*]
        ($isa:ident : Isa $(, $arg:ident : $ty:ty)* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name<$($g: $bound),*>($isa: $crate::simd::Isa $(, $arg: $ty)*) $(-> $ret)? {
            // Some bodies only move data.
            #[allow(clippy::extra_unused_type_parameters)]
            #[inline(always)]
            #[allow(clippy::extra_unused_type_parameters)] // not all kernels fuse
            fn body<$arch: $crate::simd::Arch $(, $g: $bound)*>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<$($g: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Fused $(, $g)*>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512<$($g: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Fused $(, $g)*>($($arg),*)
            }

            match $isa.or_portable() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `or_portable` has found the instructions.
                $crate::simd::Isa::Avx2 => unsafe { avx2::<$($g),*>($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `or_portable` has found the instructions.
                $crate::simd::Isa::Avx512 | $crate::simd::Isa::Avx512Bf16 => unsafe { avx512::<$($g),*>($($arg),*) },
                $crate::simd::Isa::Neon | $crate::simd::Isa::NeonBf16 => body::<$crate::simd::Fused $(, $g)*>($($arg),*),
                _ => body::<$crate::simd::Plain $(, $g)*>($($arg),*),
            }
        }
    };
}
pub(crate) use kernel;

/// Declares a public function twice: as it is, on the best instruction set, and `_with` a given
/// one, so that tests and benchmarks can compare them.
macro_rules! public {
    (
        $(#[$meta:meta])*
        pub fn $name:ident, $with:ident [$($g:ident : $bound:path),*]
        ($isa:ident : Isa $(, $arg:ident : $ty:ty)* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        pub fn $name<$($g: $bound),*>($($arg: $ty),*) $(-> $ret)? {
            $with::<$($g),*>($crate::simd::Isa::detect() $(, $arg)*)
        }

        #[doc = concat!("[`", stringify!($name), "`] on a given instruction set.")]
        pub fn $with<$($g: $bound),*>($isa: $crate::simd::Isa $(, $arg: $ty)*) $(-> $ret)? $body
    };
}
pub(crate) use public;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Float;

    kernel! {
        fn multiply_add[A: Arch, T: Float](isa: Isa, x: &[T], y: &mut [T]) -> usize {
            for (x, y) in x.iter().zip(&mut *y) {
                *y = T::narrow(A::fma(x.widen(), x.widen(), y.widen()));
            }
            y.len()
        }
    }

    #[test]
    fn every_instruction_set_computes() {
        assert!(Isa::available().contains(&Isa::Portable));
        assert_eq!(Isa::available().last(), Some(&Isa::detect()));
        // One that is missing falls back to portable code.
        for isa in Isa::ALL {
            let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
            let mut y = vec![1.0f32; 37];
            assert_eq!(multiply_add(isa, &x, &mut y), 37);
            for (i, y) in y.iter().enumerate() {
                assert_eq!(*y, (i * i + 1) as f32, "{isa:?} element {i}");
            }
        }
    }

    #[test]
    fn fused_rounds_once() {
        let a = 1.0f32 + f32::EPSILON;
        let b = 1.0f32 - f32::EPSILON;
        assert_eq!(Plain::fma(a, b, -1.0), 0.0);
        assert_eq!(Fused::fma(a, b, -1.0), -f32::EPSILON * f32::EPSILON);
    }
}
