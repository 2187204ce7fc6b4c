//! The operations against an independent `ndarray` oracle in f64: random shapes, all float types,
//! strided and repeated views. Every operation runs over a real and over a planned memory, which
//! must agree on shapes and on every byte; what it takes, it must give back.

mod attention;
mod common;
mod elementwise;
mod errors;
mod index;
mod linalg;
mod lora;
mod loss;
mod memory;
mod mixed;
mod norm;
mod optimizer;
mod pool;
mod product;
mod quantised;
mod random;
mod reduce;
mod rope;
mod softmax;
mod views;
