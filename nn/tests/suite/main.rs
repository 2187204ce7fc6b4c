//! Parameters, layers, losses, optimizers and policies: values against `ndarray` and naive formulas
//! in f64, gradients against finite differences.

mod adapters;
mod audit;
mod common;
mod dropout;
mod layers;
mod losses;
mod optimizer;
mod parameters;
mod policy;
mod schedule;
