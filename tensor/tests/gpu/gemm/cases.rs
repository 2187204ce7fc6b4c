//! Calls that kernels are checked with.

use graft_kernels::activation::Activation;
use graft_kernels::cuda::Scalar;

use super::{Call, check};
use crate::common::is_simulated;

/// Sizes that are no multiples of anything, that are, and that need several blocks.
pub const SIZES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [3, 5, 7],
    [128, 128, 64],
    [64, 72, 16],
    [129, 127, 33],
    [16, 256, 96],
    [1, 300, 130],
    [300, 1, 65],
    [257, 200, 8],
    [200, 264, 200],
    [128, 256, 512],
    [40, 24, 0],
];

pub fn orders() -> impl Iterator<Item = [bool; 2]> {
    (0..4).map(|order| [order & 1 > 0, order & 2 > 0])
}

/// What a call may do on the way into C.
pub const KINDS: [Option<Activation>; 6] = [
    None,
    Some(Activation::Gelu),
    Some(Activation::GeluTanh),
    Some(Activation::Relu),
    Some(Activation::Tanh),
    Some(Activation::Silu),
];

/// Every size and order of bf16 operands, in place and not.
pub fn short_products(base: Call) {
    for sizes in SIZES {
        for transposed in orders() {
            for gaps in [[0, 0], [8, 8], [3, 1]] {
                for c in [Scalar::Bf16, Scalar::F32] {
                    let types = [Scalar::Bf16, Scalar::Bf16, c];
                    check(Call {
                        sizes,
                        transposed,
                        gaps,
                        types,
                        ..base
                    });
                }
            }
        }
    }
}

/// Every epilogue.
pub fn epilogues(base: Call) {
    for sizes in [[130, 70, 40], [128, 256, 64], [256, 512, 64], [5, 8, 600]] {
        for activation in KINDS {
            for flags in 0..8 {
                let [accumulate, bias, save] = [0, 1, 2].map(|i| flags >> i & 1 > 0);
                check(Call {
                    sizes,
                    activation,
                    accumulate,
                    bias,
                    save,
                    ..base
                });
            }
        }
    }
}

/// Products with the slope of each activation.
pub fn slopes(base: Call) {
    for sizes in [[130, 70, 40], [300, 200, 64], [5, 8, 600]] {
        for transposed in orders() {
            for activation in KINDS.into_iter().filter(Option::is_some) {
                for (accumulate, bias) in [(false, false), (true, true)] {
                    check(Call {
                        sizes,
                        transposed,
                        activation,
                        slope: true,
                        accumulate,
                        bias,
                        ..base
                    });
                }
            }
        }
    }
}

/// Sums less a number of their row.
pub fn relative(base: Call) {
    for sizes in [[130, 70, 40], [300, 200, 64], [5, 8, 600], [200, 264, 72]] {
        for transposed in orders() {
            for bias in [false, true] {
                check(Call {
                    sizes,
                    transposed,
                    bias,
                    relative: true,
                    ..base
                });
            }
        }
    }
}

/// Batches with and without a B of their own.
pub fn batches(base: Call) {
    for sizes in [[33, 65, 40], [128, 128, 64], [1, 64, 8], [200, 136, 72]] {
        for transposed in orders() {
            for shared in [false, true] {
                for accumulate in [false, true] {
                    for c_gap in [3, 8] {
                        check(Call {
                            sizes,
                            transposed,
                            shared,
                            batches: 3,
                            c_gap,
                            accumulate,
                            ..base
                        });
                    }
                }
            }
        }
    }
}

/// Sums that are long beside the size of C; on a simulated GPU not longer than it takes for k to be split.
pub fn long_sums(base: Call) {
    let sizes = match is_simulated() {
        false => [
            [48, 40, 5000],
            [130, 257, 3001],
            [8, 768, 4096],
            [1, 1, 20000],
        ],
        true => [[48, 40, 1500], [130, 70, 801], [8, 200, 1100], [1, 1, 2000]],
    };
    for sizes in sizes {
        for transposed in orders() {
            let call = Call {
                sizes,
                transposed,
                ..base
            };
            check(call);
            check(Call {
                accumulate: true,
                bias: true,
                save: true,
                activation: Some(Activation::Gelu),
                ..call
            });
        }
    }
}
