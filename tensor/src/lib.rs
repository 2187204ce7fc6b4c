//! Tensors: element type, shape, strides, storage and the allocator that counts them.
#![forbid(unsafe_code)]

pub mod dtype;

pub use dtype::DType;
