//! Products of one pair of factors with that of another beside it.

use graft_kernels::cuda::Scalar;
use graft_kernels::cuda::gemm::Kernels;
use graft_kernels::gemm::Operands;

use super::cases::orders;
use super::{Beside, Call, PLAIN, SHORT, describe, draw, run_beside, sums};
use crate::common::gpu;

/// Checks a call with factors so deep beside it against sums in f64.
fn check(call: Call, depth: usize) {
    let [m, n, k] = call.sizes;
    let second = Call {
        sizes: [m, n, depth],
        accumulate: false,
        bias: false,
        ..call
    };
    let (own, other) = (draw(&call, 1), draw(&second, 5));
    let beside = Beside {
        products: describe(&second).0,
        call: &second,
        numbers: &other,
    };
    let device = gpu().opened_gpu().unwrap();
    let found = run_beside(device, &call, &own, Some(beside)).c;
    let root = ((k + depth) as f64).sqrt();
    let lost = 4e-7 * root * (root + 4.0) + 1e-6;
    // Where the second product is written before, it is rounded by itself, with what it is added to.
    let rounding = match call.types[2] {
        Scalar::Bf16 => 1.0 / 128.0,
        _ => 2e-7,
    };
    let before = own.c.clone();
    let (own, other) = (sums(&call, &own), sums(&second, &other));
    for (at, (own, other)) in own.iter().zip(&other).enumerate() {
        let (own, other) = (own.unwrap(), other.unwrap());
        let (sum, y) = (own + other, f64::from(found[at]));
        let first = match call.accumulate {
            true => other + f64::from(before[at]),
            false => other,
        };
        let allowed = lost + rounding * (sum.abs() + first.abs());
        assert!(
            (y - sum).abs() <= allowed,
            "{call:?} beside {depth}, {at}: {y}, not {sum} +- {allowed:.1e}"
        );
    }
}

fn all(base: Call, sizes: &[[usize; 3]], depths: &[usize]) {
    for &sizes in sizes {
        for transposed in orders() {
            for &depth in depths {
                for flags in [0, 3] {
                    check(
                        Call {
                            sizes,
                            transposed,
                            accumulate: flags & 1 > 0,
                            bias: flags & 2 > 0,
                            ..base
                        },
                        depth,
                    );
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn pairs_of_any_kernel() {
    let sizes = [[33, 40, 70], [130, 136, 64]];
    all(PLAIN, &sizes, &[3]);
    all(SHORT, &sizes, &[8, 5]);
    let mixed = Call {
        types: [Scalar::Bf16, Scalar::F32, Scalar::Bf16],
        operands: Operands::Bf16,
        ..PLAIN
    };
    all(mixed, &[[70, 80, 24]], &[8]);
}

/// Whole tiles and parts of them; depths of less than a stage, of one, of more; sums that are split.
#[test]
#[ignore = "needs a GPU"]
fn pairs_on_warpgroups() {
    for c in [Scalar::Bf16, Scalar::F32] {
        let base = Call {
            kernels: Kernels::Hopper,
            types: [Scalar::Bf16, Scalar::Bf16, c],
            ..SHORT
        };
        all(base, &[[128, 192, 64]], &[8, 16, 64, 136, 5]);
        all(base, &[[264, 200, 72], [136, 400, 8]], &[16, 72]);
        all(base, &[[130, 200, 1500]], &[16]);
    }
}
