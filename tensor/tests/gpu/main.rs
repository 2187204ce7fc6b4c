//! Each operation on a GPU against the same operation on the CPU. Ignored where there is no GPU:
//! `scripts/test-gpu` runs them on a machine that has one.

mod attention;
mod common;
mod copy;
mod elementwise;
mod gemm;
mod index;
mod later;
mod loss;
mod near;
mod norm;
mod optimizer;
mod pool;
mod quantised;
mod reduce;
mod rope;
mod rounded;
mod within;
