//! The kernels of `gemm_hopper.cu`; on other GPUs, and where the copy engine cannot read or write the
//! operands, those of `gemm.cu` do the same.

use graft_kernels::activation::Activation;
use graft_kernels::cuda::Scalar;
use graft_kernels::cuda::gemm::Kernels;

use super::cases::{self, orders};
use super::{Call, Numbers, SHORT, compare, numbers, run};
use crate::common::gpu;

/// Calls with both types of C.
fn calls() -> [Call; 2] {
    [Scalar::Bf16, Scalar::F32].map(|c| Call {
        kernels: Kernels::Hopper,
        types: [Scalar::Bf16, Scalar::Bf16, c],
        ..SHORT
    })
}

#[test]
#[ignore = "needs a GPU"]
fn products_on_warpgroups() {
    cases::short_products(calls()[0]);
}

#[test]
#[ignore = "needs a GPU"]
fn epilogues_of_warpgroups() {
    calls().into_iter().for_each(cases::epilogues);
}

#[test]
#[ignore = "needs a GPU"]
fn slopes_on_warpgroups() {
    calls().into_iter().for_each(cases::slopes);
}

#[test]
#[ignore = "needs a GPU"]
fn relative_sums_on_warpgroups() {
    cases::relative(calls()[0]);
}

#[test]
#[ignore = "needs a GPU"]
fn batches_on_warpgroups() {
    calls().into_iter().for_each(cases::batches);
}

#[test]
#[ignore = "needs a GPU"]
fn long_sums_on_warpgroups_are_split() {
    calls().into_iter().for_each(cases::long_sums);
}

/// Many tiles to each multiprocessor: sums of the kernels differ in their order alone.
#[test]
#[ignore = "needs a GPU"]
fn large_products_agree() {
    let gpu = gpu().opened_gpu().unwrap();
    for sizes in [[5000, 3000, 712], [2900, 8200, 136]] {
        for transposed in orders() {
            for types in [[Scalar::Bf16; 3], [Scalar::Bf16, Scalar::Bf16, Scalar::F32]] {
                let call = |kernels| Call {
                    kernels,
                    sizes,
                    transposed,
                    types,
                    bias: true,
                    save: true,
                    activation: Some(Activation::Silu),
                    ..SHORT
                };
                let (general, [m, n, k]) = (call(Kernels::General), sizes);
                let numbers = Numbers {
                    a: numbers(m * k, Scalar::Bf16, 1),
                    b: numbers(k * n, Scalar::Bf16, 2),
                    c: numbers(m * n, types[2], 3),
                    bias: numbers(n, Scalar::F32, 4),
                    of: Vec::new(),
                    less: Vec::new(),
                };
                let expected = run(gpu, &general, &numbers);
                let sums: Vec<_> = expected.pre.iter().map(|&x| Some(f64::from(x))).collect();
                let call = call(Kernels::Hopper);
                compare(&call, &run(gpu, &call, &numbers), &sums, &numbers);
            }
        }
    }
}
