//! Kernels for NVIDIA GPUs, through the driver that is found at run time.
//!
//! The binary needs no CUDA to be built and none to start: [`Gpu::open`] looks for the driver and
//! says what is missing. The sources (`*.cu`, beside the CPU kernels of the same name, and `*.cuh`
//! here) are compiled to PTX by `cargo run -p xtask -- ptx`; the PTX is committed and part of the
//! binary. Each file of this folder launches the kernels of one source.
//!
//! A launcher takes [`Slice`]s: ranges of device memory with their element type. It checks lengths
//! and types, chooses the kernel, and returns before the kernel has run. Everything that one [`Gpu`]
//! does happens in the order of the calls.

pub mod activation;
pub mod attention;
mod backend;
pub mod binary;
pub mod copy;
pub mod cross_entropy;
mod driver;
pub mod dropout;
mod environment;
mod error;
pub mod gemm;
mod gpu;
mod graph;
pub mod index;
mod kept;
mod launch;
mod module;
pub mod norm;
pub mod norm_held;
pub mod nvrtc;
pub mod optimizer;
mod pointwise;
pub mod pool;
mod profile;
pub mod quantised;
mod queue;
mod record;
pub mod reduce;
pub mod rope;
mod rows;
mod simulation;
mod slice;
pub mod softcap;
pub mod softmax;
mod staging;
mod tensor_map;
mod timer;
mod work;

pub use error::{Error, Result};
pub use gpu::{Buffer, Gpu, Limits, Readback};
pub use launch::{Arg, Launch};
pub use module::{SOURCES, Source, Target};
pub use queue::Sent;
pub use record::Asked;
pub use slice::{Scalar, Slice, SliceMut};
