//! Numeric kernels over slices.
//!
//! A kernel takes slices and sizes, writes every element of its outputs, allocates nothing and
//! knows no tensor. Where it needs scratch memory, a `*_workspace` function beside it says how
//! much. Work is split into partitions that depend on the sizes alone, never on the number of
//! threads: the same input gives the same bits on one thread and on sixty-four.

pub mod activation;
pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod awake;
pub mod binary;
pub mod copy;
mod course;
pub mod cross_entropy;
pub mod cuda;
pub mod dropout;
pub mod element;
pub mod gather;
pub mod gemm;
pub mod math;
pub mod norm;
pub mod optimizer;
pub mod parallel;
pub mod philox;
pub mod pool;
mod prefetch;
pub mod quantised;
pub mod reduce;
pub mod rope;
mod shared;
pub mod simd;
pub mod softcap;
pub mod softmax;
mod strided;
mod sums;

pub use awake::awake;
pub use element::{Element, Float, Real};
pub use simd::Isa;
