//! Fine-tuning of pretrained language models: data, tasks, strategies, the loop, runs and the command line.
//!
//! The library holds everything; the binary `trainer` only calls it.
#![forbid(unsafe_code)]

pub mod adapted;
pub mod adapter;
pub mod batch;
pub mod certificate;
mod checkpoint;
pub mod cli;
pub mod compare;
pub mod config;
pub mod conversations;
pub mod corpus;
pub mod course;
pub mod data;
pub mod device;
pub mod documents;
mod dropout;
pub mod encode;
pub mod error;
pub mod evaluate;
pub mod evaluation;
pub mod features;
pub mod generate;
pub mod hidden;
pub mod inspect;
pub mod merge;
pub mod metrics;
pub mod model;
mod nearest;
pub mod network;
pub mod perplexity;
pub mod plan;
pub mod predict;
pub mod progress;
pub mod record;
pub mod report;
pub mod run_dir;
pub mod show;
mod steps;
pub mod tags;
pub mod targets;
mod task;
pub mod text_classifier;
pub mod train;
pub mod verify;

pub use error::{Error, Result};
pub use nearest::nearest;
