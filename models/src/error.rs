//! The errors of this crate.

use std::path::{Path, PathBuf};

use crate::safetensors::{IndexProblem, Problem};

mod text;

pub(crate) use text::{Shown, json_reason, nearest_name, some_of};
use text::{bullets, listed, nearest};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong between a model's files and its parameters in memory.
///
/// Every message says what was found, where, what was expected and one thing to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as an infinitive: "read", "rename to /x/y".
        action: String,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A safetensors file that does not keep to the format.
    #[error("{file}: {problem}")]
    Safetensors {
        /// The file, or the archive and the entry in it.
        file: String,
        /// What is wrong, and where in the file. Boxed: this is the largest variant by far.
        problem: Box<Problem>,
    },

    /// Weights in another format than safetensors, `pytorch_model.bin` or llm.c's `.bin`, that are refused.
    #[error("{file}: offset {offset}: {reason}; {help}")]
    Weights {
        /// The file, or the archive and the entry in it.
        file: String,
        /// Where, in bytes from the start of the file.
        offset: u64,
        /// What was found and what was expected.
        reason: String,
        /// One thing to do.
        help: String,
    },

    /// `model.safetensors.index.json` and the shards that it names disagree, or it is not such an index.
    #[error("{file}: {problem}")]
    Index {
        /// The index file.
        file: String,
        /// What is wrong.
        problem: IndexProblem,
    },

    /// A tensor that was asked for by name is not in the checkpoint.
    #[error("{file}: there is no tensor `{}`{}", Shown(tensor), nearest(near))]
    NoSuchTensor {
        /// The file or directory searched.
        file: String,
        /// The name asked for.
        tensor: String,
        /// The most similar name that exists.
        near: Option<String>,
    },

    /// The buffer for a tensor's bytes has the wrong length, or the tensor to write does not fill its shape.
    #[error(
        "{file}: tensor `{}` of shape {shape:?} has {expected} bytes, but a buffer of {found} bytes was given",
        Shown(tensor)
    )]
    ByteLength {
        /// The file read or written.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes that the shape and element type need.
        expected: u64,
        /// Bytes given.
        found: u64,
    },

    /// A tensor cannot be written under this name or with this shape.
    #[error("{file}: cannot write tensor `{}`: {reason}", Shown(tensor))]
    Unwritable {
        /// The file to write.
        file: String,
        /// The tensor.
        tensor: String,
        /// Why not.
        reason: String,
    },

    /// Text that is not the JSON it should be.
    #[error(
        "{file}: line {line}, column {column}: {reason}; take the file again from where the model came from, or mend it \
         there"
    )]
    Json {
        /// The file.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser met and wanted.
        reason: String,
    },

    /// A value in `config.json` that is missing, of the wrong kind, inconsistent or not supported.
    #[error("{file}: `{key}`: found {found}, expected {expected}; {help}")]
    Config {
        /// The file.
        file: String,
        /// The key in it.
        key: String,
        /// What stands there.
        found: String,
        /// What could stand there.
        expected: String,
        /// One thing to do.
        help: String,
    },

    /// A tokenizer that cannot be loaded or used.
    #[error("{file}: {reason}; {help}")]
    Tokenizer {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
        /// One thing to do.
        help: String,
    },

    /// A chat template that cannot be used, or a conversation that it does not take.
    #[error("{file}: {reason}; {help}")]
    Template {
        /// The template's file, and the key in it.
        file: String,
        /// What is wrong, and in which line of the template or in which message.
        reason: String,
        /// One thing to do.
        help: String,
    },

    /// A text that cannot be encoded as asked.
    #[error("cannot encode: {reason}; {help}")]
    Encode {
        /// What is wrong.
        reason: String,
        /// One thing to do.
        help: String,
    },

    /// A token id that the tokenizer does not have.
    #[error(
        "{file}: there is no token {id}, the tokenizer has {tokens}; take tokenizer and config.json of the same model"
    )]
    Decode {
        /// The tokenizer's file.
        file: String,
        /// The id.
        id: u32,
        /// Tokens that there are.
        tokens: usize,
    },

    /// No model was found for what the user named.
    #[error("no model at `{spec}`:{}\n{help}", bullets(tried))]
    NotFound {
        /// What the user wrote.
        spec: String,
        /// Each place that was looked at, and what was there.
        tried: Vec<String>,
        /// One thing to do.
        help: String,
    },

    /// A file that the model needs is not there.
    #[error("{place} has no {name}; {help}")]
    MissingFile {
        /// The directory or archive.
        place: String,
        /// The file's name.
        name: String,
        /// One thing to do.
        help: String,
    },

    /// A wheel or zip file that cannot be used.
    #[error("{file}: {reason}; {help}")]
    Archive {
        /// The archive, and the entry if it is about one.
        file: String,
        /// What is wrong.
        reason: String,
        /// One thing to do.
        help: String,
    },

    /// A difference between two weight files that cannot be used, or not with this file.
    #[error("{file}: {reason}; {help}")]
    Delta {
        /// The delta, or the file that does not belong to it.
        file: String,
        /// What is wrong.
        reason: String,
        /// One thing to do.
        help: String,
    },

    /// A file name that could lead out of the model's directory.
    #[error(
        "{file}: `{}` is not a plain file name ({reason}); refusing to follow it",
        Shown(name)
    )]
    UnsafePath {
        /// Where the name stands.
        file: String,
        /// The name.
        name: String,
        /// What makes it unsafe.
        reason: &'static str,
    },

    /// A checkpoint whose tensors are not those of the model that its configuration describes.
    #[error(
        "{file} does not fit its configuration:{}{}{}\ncheck that config.json and the weights belong \
         together",
        listed("missing", missing),
        listed("unexpected", unexpected),
        listed("wrong shape or type", shapes)
    )]
    Mismatch {
        /// The checkpoint.
        file: String,
        /// Parameters that it lacks.
        missing: Vec<String>,
        /// Tensors that the model has no place for.
        unexpected: Vec<String>,
        /// Tensors of the wrong shape or element type, each with what it is and what was expected.
        shapes: Vec<String>,
    },

    /// A tensor that the configuration ties to another and that holds something else.
    #[error(
        "{file}: `{copy}` holds other numbers than `{original}`, expected the same ones: config.json ties the two; set \
         `tie_word_embeddings` to false there if the model was trained so"
    )]
    Untied {
        /// The checkpoint.
        file: String,
        /// The tensor that ought to be a copy.
        copy: String,
        /// What it ought to be a copy of.
        original: String,
    },

    /// A sequence with more tokens than the model has positions.
    #[error("a sequence has {tokens} tokens, and the model has positions for {limit}; truncate it")]
    TooLong {
        /// Tokens of the sequence.
        tokens: usize,
        /// Positions of the model.
        limit: usize,
    },

    /// Targets of a language model that do not fit its batch.
    #[error("a batch of {tokens} tokens came with {targets} targets; give one for each token")]
    Targets {
        /// Targets given.
        targets: usize,
        /// Tokens of the batch.
        tokens: usize,
    },

    /// A batch of new tokens for another number of sequences than the cache holds.
    #[error(
        "a batch of {batch} sequences cannot go on from a cache of {cache}; give new tokens for each of these"
    )]
    CacheSequences {
        /// Sequences of the batch.
        batch: usize,
        /// Sequences of the cache.
        cache: usize,
    },

    /// More tokens than a cache has room for.
    #[error(
        "a sequence would have {tokens} tokens, and the cache has room for {capacity}; make a larger cache, or stop"
    )]
    CacheFull {
        /// Tokens with the new ones.
        tokens: usize,
        /// Room for each sequence.
        capacity: usize,
    },

    /// A cache of texts behind another number of virtual tokens than the adapter in use has.
    #[error(
        "the cache has {cache} virtual tokens in front of each text, and the adapter in use has {adapter}; make a cache \
         for it"
    )]
    CacheFront {
        /// Virtual tokens of the adapter in use.
        adapter: usize,
        /// Virtual tokens that the cache was made for.
        cache: usize,
    },

    /// Training with a cache, through which no gradient flows.
    #[error("a cache is for evaluation; train on whole sequences")]
    CacheInTraining,

    /// A strategy that trains more layers than there are.
    #[error(
        "the strategy last:{last} asks for {last} layers, and the model has {layers}; use at most last:{layers}"
    )]
    Strategy {
        /// Layers asked for.
        last: usize,
        /// Layers of the model.
        layers: usize,
    },

    /// A strategy that trains biases, for a model without any.
    #[error("the strategy bitfit trains biases, and the trunk of the model has none; use norms")]
    NoBiases,

    /// From a layer.
    #[error(transparent)]
    Nn(#[from] graft_nn::Error),

    /// An output directory or file that cannot be replaced as asked.
    #[error("cannot write {}: {reason}; {help}", path.display())]
    Output {
        /// The directory or file.
        path: PathBuf,
        /// What is in the way.
        reason: String,
        /// One thing to do.
        help: String,
    },
}

impl From<graft_tensor::Error> for Error {
    fn from(error: graft_tensor::Error) -> Error {
        Error::Nn(error.into())
    }
}

impl From<graft_autograd::Error> for Error {
    fn from(error: graft_autograd::Error) -> Error {
        Error::Nn(error.into())
    }
}

impl Error {
    /// Wraps an I/O error with what was attempted on which path.
    pub(crate) fn io(
        action: impl Into<String>,
        path: impl AsRef<Path>,
        source: std::io::Error,
    ) -> Error {
        Error::Io {
            action: action.into(),
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    /// Wraps a JSON error of a whole file; the position is the parser's.
    pub(crate) fn json(file: impl Into<String>, source: &serde_json::Error) -> Error {
        Error::Json {
            file: file.into(),
            line: source.line(),
            column: source.column(),
            reason: json_reason(source),
        }
    }
}
