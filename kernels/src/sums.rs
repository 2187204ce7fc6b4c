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
            lanes[i] = lanes[i] + lanes[i + width];
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

/// Runs a statement for each element of slices of equal length, as `index` in `lane`: whole
/// groups of [`LANES`] first, so that the inner loop has a fixed length, then what is left.
///
/// A macro and not a function with a closure, because a closure that is not inlined would be
/// compiled without the kernel's instructions.
macro_rules! each_lane {
    ($n:expr, |$lane:ident, $index:ident| $body:block) => {{
        let n = $n;
        let whole = n - n % $crate::sums::LANES;
        let mut start = 0;
        while start < whole {
            for $lane in 0..$crate::sums::LANES {
                let $index = start + $lane;
                $body
            }
            start += $crate::sums::LANES;
        }
        for $lane in 0..n - whole {
            let $index = whole + $lane;
            $body
        }
    }};
}
pub(crate) use each_lane;
