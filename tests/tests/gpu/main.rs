//! Whole models on a GPU. Ignored where there is no GPU: `scripts/test-gpu` runs them on a machine that has one,
//! `scripts/test-simulation` those that are quick on a simulated one.

mod graphs;
mod model;
mod resume;
mod steps;
mod trainer;
mod whole;
