//! Model families, and what a pretrained model is on disk.
//!
//! [`Encoder`], [`Classifier`] and [`MaskedLm`], [`Decoder`], [`CausalLm`] and [`DecoderClassifier`] build a family's layers from its
//! configuration; [`load_parameters`] fills them from a checkpoint and accounts for every tensor in it. The other
//! modules are about files: where a model lies ([`source`]), its weights ([`safetensors`]; also [`torch`] and
//! [`llmc`]), its `config.json` ([`config`]), its tokenizer ([`tokenizer`]), its template for conversations ([`chat`]),
//! exact differences between weights ([`delta`]), and directories that are replaced in one step ([`atomic`]).
//!
//! Files come from strangers. Every reader here treats its input as hostile: sizes are checked before anything is
//! allocated, names before they become paths, and whatever is refused is refused with the file, the place in it and
//! the reason.
#![forbid(unsafe_code)]

pub mod adapter;
mod archive;
pub mod atomic;
mod batch;
mod bpe;
pub mod chat;
mod classifier;
pub mod config;
mod decoder;
pub mod delta;
mod detokenize;
mod encoder;
pub mod error;
mod generation;
mod json;
pub mod llmc;
mod load;
mod long_text;
mod masked;
pub mod safetensors;
pub mod source;
mod strategy;
mod strided;
pub mod tokenizer;
pub mod torch;
mod weights;
mod words;

pub use adapter::{Adaptable, StoredAdapter, load_adapter, save_adapter};
pub use batch::TokenBatch;
pub use bpe::{END_OF_TEXT, MIN_BPE_VOCAB, train_bpe};
pub use chat::{ChatOptions, ChatTemplate, Supervised};
pub use classifier::{Classifier, Cut};
pub use config::{
    Config, DecoderConfig, DecoderFamily, DropoutRates, Family, HeadConfig, HiddenAct, Labels,
    ModelConfig, ProblemType,
};
pub use decoder::{CausalLm, Decoder, DecoderClassifier, KvCache};
pub use detokenize::DecodeStream;
pub use encoder::Encoder;
pub use error::{Error, Result};
pub use generation::end_tokens;
pub use load::{
    LoadReport, Stored, little_endian, load_parameters, load_parameters_with, load_some,
    save_parameters, save_trained,
};
pub use masked::{MaskedConfig, MaskedLm};
pub use safetensors::{Checkpoint, SafetensorsFile, TensorInfo};
pub use source::ModelSource;
pub use strategy::Strategy;
pub use tokenizer::{Encoding, Token, Tokenizer};
pub use words::WordPlace;
