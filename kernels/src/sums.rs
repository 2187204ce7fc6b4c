//! Sums inside kernels: many lanes, then one value, always in the same order.
//!
//! Element i of a row goes to lane i mod [`LANES`]; the lanes are then added as a balanced tree.
//! Rounding errors so grow with n / LANES instead of n, and the compiler keeps the lanes in a few
//! vector registers, whose latencies overlap.

use crate::element::{Float, Real};
use crate::math::exp;
use crate::simd::Arch;
use std::{array, hint::black_box};

/// Partial sums of a row.
pub(crate) const LANES: usize = 64;

/// Lanes that are joined by whole vectors: an AVX-512 register of f32.
const VECTOR: usize = 16;

/// All lanes as one, pairwise; their number is a power of 2.
#[inline(always)]
pub(crate) fn fold<R: Real, const N: usize>(lanes: [R; N], join: impl Fn(R, R) -> R) -> R {
    if N <= VECTOR {
        return halve(lanes, 1, &join)[0];
    }
    let lanes = halve(lanes, VECTOR, &join);
    let lanes: [R; VECTOR] = array::from_fn(|i| lanes[i]);
    // The compiler forms vectors of what is stored; where nothing is, it starts from the last join,
    // and all of them go by vectors of two.
    halve(black_box(lanes), 1, &join)[0]
}

/// Joins the second half of the lanes to the first, and so on until the first `end` hold all.
#[inline(always)]
fn halve<R: Real, const N: usize>(
    mut lanes: [R; N],
    end: usize,
    join: &impl Fn(R, R) -> R,
) -> [R; N] {
    let mut width = N;
    while width > end {
        width /= 2;
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
    }
    lanes
}

/// The sum of the lanes.
#[inline(always)]
pub(crate) fn total<R: Real, const N: usize>(lanes: [R; N]) -> R {
    fold(lanes, |a, b| a + b)
}

/// The largest lane; NaN if one is.
#[inline(always)]
pub(crate) fn largest<R: Real, const N: usize>(lanes: [R; N]) -> R {
    fold(lanes, |a, b| larger(a, b))
}

/// The larger of two; NaN if one is.
#[inline(always)]
#[allow(clippy::eq_op)] // a number that is not itself is NaN
pub(crate) fn larger<R: Real>(a: R, b: R) -> R {
    if a > b || a != a { a } else { b }
}

/// How [`each_lane!`] reads whole chunks of lanes: where they lie.
#[inline(always)]
pub(crate) fn in_place<T>(chunk: &T) -> &T {
    chunk
}

/// How [`each_lane!`] reads whole chunks of lanes: from a copy, where the compiler cannot tell that
/// the sums lie elsewhere. It then proves nothing at run time, and the copy is made in registers.
#[inline(always)]
pub(crate) fn copied<T: Copy>(chunk: &T) -> T {
    *chunk
}

/// Runs a statement for each index of slices of equal length: `each_lane!([sums], [a = x, b = y],
/// |lane| { … })` has `a` and `b` stand for the elements of x and y that belong to `lane`. The
/// statement writes to elements `lane` of the arrays `sums` alone, one or several. A number of
/// lanes other than [`LANES`] and a way to read them come first:
/// `each_lane!(16, copied; [sums], [a = x], |lane| { … })`.
///
/// The slices are taken apart into arrays, so that no bounds check keeps the loop from being
/// vectorised. A macro and not a function with a closure, because a closure that is not inlined
/// would be compiled without the kernel's instructions.
///
/// Elements after the last whole chunk are added to a copy of the sums that has to lie in memory:
/// an array that is indexed by a number which only runs tell lies there in all loops that use it,
/// and each step of the main one would load and store all sums.
macro_rules! each_lane {
    ([$($sums:ident),*], [$($slices:tt)*], |$lane:ident| $body:block) => {
        $crate::sums::each_lane!(
            $crate::sums::LANES, in_place; [$($sums),*], [$($slices)*], |$lane| $body
        )
    };
    (
        $lanes:expr, $read:ident; [$($sums:ident),*],
        [$first:ident = $slice:expr $(, $other:ident = $more:expr)* $(,)?], |$lane:ident| $body:block
    ) => {{
        let $first = $slice.as_chunks::<{ $lanes }>();
        $(let $other = $more.as_chunks::<{ $lanes }>();)*
        {
            let $first = $first.0;
            $(let $other = &$other.0[..$first.len()];)*
            for chunk in 0..$first.len() {
                let $first = $crate::sums::$read(&$first[chunk]);
                $(let $other = $crate::sums::$read(&$other[chunk]);)*
                for $lane in 0..$lanes {
                    let $first = $first[$lane];
                    $(let $other = $other[$lane];)*
                    $body
                }
            }
        }
        let $first = $first.1;
        $(let $other = &$other.1[..$first.len()];)*
        if !$first.is_empty() {
            ($($sums,)*) = {
                $(let mut $sums = std::hint::black_box($sums);)*
                for $lane in 0..$first.len().min($lanes) {
                    let $first = $first[$lane];
                    $(let $other = $other[$lane];)*
                    $body
                }
                ($($sums,)*)
            };
        }
    }};
}
pub(crate) use each_lane;

/// Σ x over a row.
#[inline(always)]
pub(crate) fn row_sum<T: Float>(x: &[T]) -> T::Acc {
    let mut lanes = [T::Acc::ZERO; LANES];
    each_lane!([lanes], [x = x], |lane| {
        lanes[lane] += x.widen();
    });
    total(lanes)
}

/// Σ a·b over a row.
#[inline(always)]
pub(crate) fn row_dot<A: Arch, T: Float>(a: &[T], b: &[T]) -> T::Acc {
    let b = &b[..a.len()];
    let mut lanes = [T::Acc::ZERO; LANES];
    each_lane!([lanes], [a = a, b = b], |lane| {
        lanes[lane] = A::fma(a.widen(), b.widen(), lanes[lane]);
    });
    total(lanes)
}

/// The largest element of a row; NaN if there is one.
#[inline(always)]
pub(crate) fn row_max<T: Float>(x: &[T]) -> T::Acc {
    let mut lanes = [T::Acc::NEG_INFINITY; LANES];
    each_lane!([lanes], [x = x], |lane| {
        lanes[lane] = larger(lanes[lane], x.widen());
    });
    largest(lanes)
}

/// Σ e^(x - shift) over a row.
#[inline(always)]
pub(crate) fn row_exp_sum<A: Arch, T: Float>(x: &[T], shift: T::Acc) -> T::Acc {
    let mut lanes = [T::Acc::ZERO; LANES];
    each_lane!([lanes], [x = x], |lane| {
        lanes[lane] += exp::<A, T::Acc>(x.widen() - shift);
    });
    total(lanes)
}
