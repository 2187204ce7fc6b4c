//! What a pretrained model is on disk, and how to read and write it: where it lies ([`source`]), its weights
//! ([`safetensors`]), its `config.json` ([`config`]), its tokenizer ([`tokenizer`]), and directories that are
//! replaced in one step ([`atomic`]).
//!
//! Files come from strangers. Every reader here treats its input as hostile: sizes are checked before anything is
//! allocated, names before they become paths, and whatever is refused is refused with the file, the place in it and
//! the reason.
#![forbid(unsafe_code)]

mod archive;
pub mod atomic;
pub mod config;
pub mod error;
mod json;
pub mod safetensors;
pub mod source;
pub mod tokenizer;

pub use config::{DropoutRates, Family, HiddenAct, Labels, ModelConfig, ProblemType};
pub use error::{Error, Result};
pub use safetensors::{Checkpoint, SafetensorsFile, TensorInfo};
pub use source::ModelSource;
pub use tokenizer::{Encoding, Tokenizer};
