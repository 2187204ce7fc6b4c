//! Tensors: element type, shape, strides, storage, the allocator that counts them, and operations.
//!
//! This layer knows nothing of gradients. Every operation takes the [`Memory`] that its result is
//! allocated from, checks its inputs' shapes and types, and says in an [`Error`] what did not fit.
//! `tests/` holds each operation against an `ndarray` oracle in f64.
#![deny(unsafe_code)]

mod arena;
pub mod device;
mod dispatch;
pub mod dtype;
pub mod error;
pub mod memory;
pub mod ops;
mod ranges;
pub mod shape;
mod tensor;

pub use device::Device;
pub use dtype::DType;
pub use error::{Error, Result};
pub use graft_kernels::awake;
pub use memory::{Category, Memory, Usage};
pub use shape::Shape;
pub use tensor::{Item, Tensor, TensorElement};
