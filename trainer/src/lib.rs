//! Fine-tuning of pretrained language models: data, tasks, strategies, the loop, runs and the command line.
//!
//! The library holds everything; the binary `trainer` only calls it.
#![forbid(unsafe_code)]

pub mod batch;
pub mod certificate;
pub mod cli;
pub mod config;
pub mod data;
pub mod error;
pub mod metrics;
mod nearest;
pub mod progress;
pub mod report;
pub mod run_dir;
pub mod verify;

pub use error::{Error, Result};
pub use nearest::nearest;
