//! The kernels of `gemm.cu`.

use graft_kernels::activation::Activation;
use graft_kernels::cuda::Scalar;
use graft_kernels::cuda::gemm::Kernels;
use graft_kernels::gemm::Operands;
use proptest::prelude::*;

use super::cases::{self, SIZES, orders};
use super::{Call, PLAIN, SHORT, check};

const WIDE_SUMS: Call = Call {
    types: [Scalar::Bf16, Scalar::Bf16, Scalar::F32],
    ..SHORT
};

#[test]
#[ignore = "needs a GPU"]
fn products_in_f32() {
    for sizes in SIZES {
        for transposed in orders() {
            for gaps in [[0, 0], [4, 4], [3, 1]] {
                check(Call {
                    sizes,
                    transposed,
                    gaps,
                    ..PLAIN
                });
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn products_in_bf16() {
    cases::short_products(SHORT);
}

#[test]
#[ignore = "needs a GPU"]
fn products_of_other_types() {
    let scalars = [Scalar::F32, Scalar::Bf16];
    for sizes in [[70, 130, 50], [128, 64, 96]] {
        for transposed in orders() {
            for types in 0..8 {
                let types = [0, 1, 2].map(|i| scalars[types >> i & 1]);
                for operands in [Operands::AsStored, Operands::Bf16] {
                    check(Call {
                        sizes,
                        transposed,
                        types,
                        operands,
                        ..PLAIN
                    });
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn epilogues() {
    cases::epilogues(PLAIN);
    cases::epilogues(SHORT);
}

#[test]
#[ignore = "needs a GPU"]
fn slopes() {
    cases::slopes(PLAIN);
    cases::slopes(SHORT);
}

#[test]
#[ignore = "needs a GPU"]
fn relative_sums() {
    cases::relative(SHORT);
}

#[test]
#[ignore = "needs a GPU"]
fn batches() {
    cases::batches(PLAIN);
    cases::batches(SHORT);
}

#[test]
#[ignore = "needs a GPU"]
fn long_sums_are_split() {
    cases::long_sums(PLAIN);
    cases::long_sums(SHORT);
    cases::long_sums(WIDE_SUMS);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn any_product(
        sizes in [1usize..400, 1usize..400, 0usize..300], types in 0usize..8, ta in any::<bool>(),
        tb in any::<bool>(), gap_a in 0usize..10, gap_b in 0usize..10, flags in 0usize..16,
        batches in 1usize..4, shared in any::<bool>(), kind in 0usize..6, which in 0usize..3,
    ) {
        let [accumulate, bias, save, round] = [0, 1, 2, 3].map(|i| flags >> i & 1 > 0);
        let kinds = [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh, Activation::Silu];
        check(Call {
            kernels: Kernels::General,
            c_gap: [0, 3, 8][which],
            sizes,
            types: [0, 1, 2].map(|i| [Scalar::F32, Scalar::Bf16][types >> i & 1]),
            operands: if round { Operands::Bf16 } else { Operands::AsStored },
            transposed: [ta, tb],
            gaps: [gap_a, gap_b],
            batches,
            shared,
            accumulate,
            bias,
            activation: kinds.get(kind).copied(),
            save: save && batches == 1,
            slope: false,
            relative: false,
        });
    }
}

/// The kernels for at most 16 rows or columns: parts of what they read at a time, sums that are split, batches.
#[test]
#[ignore = "needs a GPU"]
fn few_rows_or_columns() {
    for sizes in [
        [300, 16, 72],
        [129, 7, 33],
        [130, 1, 1500],
        [16, 264, 100],
        [5, 130, 1500],
        [9, 12, 40],
    ] {
        for transposed in cases::orders() {
            for (gaps, flags) in [([0, 0], 0), ([8, 8], 7), ([3, 1], 1)] {
                let [accumulate, save, wide] = [0, 1, 2].map(|i| flags >> i & 1 > 0);
                let c = if wide { Scalar::F32 } else { Scalar::Bf16 };
                let call = Call {
                    sizes,
                    transposed,
                    gaps,
                    types: [Scalar::Bf16, Scalar::Bf16, c],
                    accumulate,
                    save,
                    bias: save,
                    activation: save.then_some(Activation::Silu),
                    ..SHORT
                };
                check(call);
            }
            check(Call {
                sizes,
                transposed,
                batches: 3,
                ..SHORT
            });
        }
    }
}
