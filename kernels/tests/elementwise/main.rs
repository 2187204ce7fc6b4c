//! The elementwise and row-wise kernels against oracles in f64.

mod activation;
mod binary;
mod copy;
mod layer_norm;
mod norm;
mod optimizer;
mod reduce;
mod softmax;
mod support;
