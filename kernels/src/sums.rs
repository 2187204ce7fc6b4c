//! Sums inside kernels: many lanes, then one value, always in the same order.
//!
//! Element i of a row goes to lane i mod [`LANES`]; the lanes are then added as a balanced tree.
//! Rounding errors so grow with n / LANES instead of n, and the compiler keeps the lanes in a few
//! vector registers, whose latencies overlap.

use crate::element::Real;

/// Partial sums of a row.
pub(crate) const LANES: usize = 64;

/// All lanes as one, pairwise.
#[inline(always)]
pub(crate) fn total<R: Real>(mut lanes: [R; LANES]) -> R {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest lane; NaN if one is.
#[inline(always)]
pub(crate) fn largest<R: Real>(mut lanes: [R; LANES]) -> R {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = larger(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The larger of two; NaN if one is.
#[inline(always)]
#[allow(clippy::eq_op)] // a number that is not itself is NaN
pub(crate) fn larger<R: Real>(a: R, b: R) -> R {
    if a > b || a != a { a } else { b }
}

/// Runs a statement for each index of slices of equal length: `each_lane!([a = x, b = y], |lane|
/// { … })` has `a` and `b` stand for the elements of x and y that belong to `lane`.
///
/// The slices are taken apart into arrays, so that no bounds check keeps the loop from being
/// vectorised. A macro and not a function with a closure, because a closure that is not inlined
/// would be compiled without the kernel's instructions.
macro_rules! each_lane {
    ([$first:ident = $slice:expr $(, $other:ident = $more:expr)* $(,)?], |$lane:ident| $body:block) => {{
        let $first = $slice.as_chunks::<{ $crate::sums::LANES }>();
        $(let $other = $more.as_chunks::<{ $crate::sums::LANES }>();)*
        {
            let $first = $first.0;
            $(let $other = &$other.0[..$first.len()];)*
            for chunk in 0..$first.len() {
                let $first = &$first[chunk];
                $(let $other = &$other[chunk];)*
                for $lane in 0..$crate::sums::LANES {
                    let $first = $first[$lane];
                    $(let $other = $other[$lane];)*
                    $body
                }
            }
        }
        let $first = $first.1;
        $(let $other = &$other.1[..$first.len()];)*
        for $lane in 0..$first.len().min($crate::sums::LANES) {
            let $first = $first[$lane];
            $(let $other = $other[$lane];)*
            $body
        }
    }};
}
pub(crate) use each_lane;
