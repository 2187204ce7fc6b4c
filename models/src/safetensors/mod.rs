//! Safetensors: a strict reader and a writer of our own.
//!
//! The format (<https://github.com/huggingface/safetensors>): eight bytes of header length, little-endian; a JSON
//! object that gives each tensor's element type, shape and byte range; then the bytes, row-major and little-endian.
//! [`header`] says what is refused and why; [`reader`] reads from files and from entries of a zip archive;
//! [`writer`] lays tensors out as the reference implementation does; [`shards`] treats one file and many files
//! under an index alike.
//!
//! The `safetensors` crate is the oracle of this module's tests, not a part of it: it accepts duplicate names,
//! unknown keys and ranks without limit.

pub mod dtype;
pub mod header;
pub mod problem;
pub mod reader;
pub mod shards;
pub mod writer;

pub use dtype::FileDtype;
pub use header::{Header, MAX_HEADER_BYTES, MAX_RANK, TensorInfo};
pub use problem::{IndexProblem, Problem};
pub use reader::{ByteSource, SafetensorsFile};
pub use shards::{Checkpoint, INDEX_FILE, SINGLE_FILE, write_checkpoint};
pub use writer::{TensorView, pt_metadata, to_bytes, write};
