//! What can be wrong with a safetensors file or with an index of shards.

use crate::error::{Shown, some_of};

/// What is wrong with one safetensors file. Offsets are in bytes from the start of the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// Fewer bytes than the header length takes.
    #[error(
        "the file is {found} bytes long, but the header length alone takes 8; it is empty or was cut off, fetch it again"
    )]
    TooShort {
        /// Bytes in the file.
        found: u64,
    },
    /// Not safetensors at all, but a format that is known by its first bytes.
    #[error("this is {kind}, not a safetensors file; {help}")]
    OtherFormat {
        /// What it is.
        kind: &'static str,
        /// One thing to do.
        help: &'static str,
    },
    /// The header length is beyond the format's limit.
    #[error(
        "offset 0: the header claims {claimed} bytes, the limit is {limit}; this is not a safetensors file, or a hostile one"
    )]
    HeaderTooLarge {
        /// Length stated.
        claimed: u64,
        /// Largest length accepted.
        limit: u64,
    },
    /// The header length is beyond the end of the file.
    #[error(
        "offset 0: the header claims {claimed} bytes, but only {available} follow; the file was cut off, fetch it again"
    )]
    HeaderTruncated {
        /// Length stated.
        claimed: u64,
        /// Bytes after the length.
        available: u64,
    },
    /// The header does not begin with `{`.
    #[error(
        "offset 8: the header must begin with `{{`, found {found}; this is not a safetensors file"
    )]
    HeaderStart {
        /// The first byte, printable.
        found: String,
    },
    /// The header is not text.
    #[error("offset {offset}: the header is not valid UTF-8; the file is damaged, fetch it again")]
    NotUtf8 {
        /// The first bad byte.
        offset: u64,
    },
    /// The header is not the JSON expected.
    #[error(
        "offset {offset}: {}{reason}; the file was not written by a safetensors library, or is damaged",
        in_tensor(tensor)
    )]
    Json {
        /// Where the parser stopped.
        offset: u64,
        /// The tensor whose description it is in.
        tensor: Option<String>,
        /// What the parser met and wanted.
        reason: String,
    },
    /// One name for two tensors, or a key given twice.
    #[error(
        "offset {offset}: {}`{}` occurs twice; readers would disagree on which one counts",
        in_tensor(tensor),
        Shown(key)
    )]
    DuplicateKey {
        /// Just behind the second occurrence.
        offset: u64,
        /// The tensor whose description it is in; `None` for a tensor's name itself.
        tensor: Option<String>,
        /// The key.
        key: String,
    },
    /// A key other than `dtype`, `shape` and `data_offsets`.
    #[error(
        "tensor `{}`: unknown key `{}`, expected `dtype`, `shape` and `data_offsets` only",
        Shown(tensor),
        Shown(key)
    )]
    UnknownKey {
        /// The tensor.
        tensor: String,
        /// The key.
        key: String,
    },
    /// One of the three keys is not there.
    #[error("tensor `{}`: the key `{key}` is missing", Shown(tensor))]
    MissingKey {
        /// The tensor.
        tensor: String,
        /// The key.
        key: &'static str,
    },
    /// An element type that the format does not have.
    #[error(
        "tensor `{}`: unknown dtype `{}`, expected one of {}",
        Shown(tensor),
        Shown(found),
        super::FileDtype::names()
    )]
    UnknownDtype {
        /// The tensor.
        tensor: String,
        /// What stands there.
        found: String,
    },
    /// More dimensions than any model has.
    #[error(
        "tensor `{}`: the shape has more than {limit} dimensions, at most {limit} are read",
        Shown(tensor)
    )]
    RankTooHigh {
        /// The tensor.
        tensor: String,
        /// Most dimensions accepted.
        limit: usize,
    },
    /// The number of bytes does not fit 64 bits.
    #[error(
        "tensor `{}`: the size of shape {shape:?} in dtype {dtype} overflows 64 bits",
        Shown(tensor)
    )]
    SizeOverflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its element type.
        dtype: super::FileDtype,
    },
    /// Elements smaller than a byte that do not fill whole bytes.
    #[error(
        "tensor `{}`: shape {shape:?} in dtype {dtype} does not fill whole bytes",
        Shown(tensor)
    )]
    PartialByte {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its element type.
        dtype: super::FileDtype,
    },
    /// The end of a range lies before its start.
    #[error(
        "tensor `{}`: data_offsets [{start}, {end}] run backwards",
        Shown(tensor)
    )]
    ReversedRange {
        /// The tensor.
        tensor: String,
        /// Start of the range in the data section.
        start: u64,
        /// End of the range in the data section.
        end: u64,
    },
    /// Shape and element type need another number of bytes than the range has.
    #[error("tensor `{}`: shape {shape:?} in dtype {dtype} takes {expected} bytes, but data_offsets [{start}, {end}] give {}", Shown(tensor), end - start)]
    WrongLength {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
        /// Its element type.
        dtype: super::FileDtype,
        /// Bytes that those take.
        expected: u64,
        /// Start of the range in the data section.
        start: u64,
        /// End of the range in the data section.
        end: u64,
    },
    /// A tensor begins before the one in front of it ends.
    #[error(
        "tensor `{}`: its data begin at {start} of the data section, inside the previous tensor, which ends at {previous_end}",
        Shown(tensor)
    )]
    Overlap {
        /// The tensor.
        tensor: String,
        /// Start of its range in the data section.
        start: u64,
        /// End of the tensor before it.
        previous_end: u64,
    },
    /// Bytes between two tensors that belong to none.
    #[error(
        "tensor `{}`: its data begin at {start} of the data section, but the tensor before it ends at {previous_end}; bytes that belong to no tensor are refused",
        Shown(tensor)
    )]
    Hole {
        /// The tensor behind the hole.
        tensor: String,
        /// Start of its range in the data section.
        start: u64,
        /// End of the tensor before it.
        previous_end: u64,
    },
    /// The file ends before the tensors do.
    #[error(
        "tensor `{}` ends at offset {end}, but the file ends at {file_len}; it was cut off, fetch it again",
        Shown(tensor)
    )]
    DataTruncated {
        /// The first tensor that is not whole.
        tensor: String,
        /// Offset of its end.
        end: u64,
        /// Length of the file.
        file_len: u64,
    },
    /// The file goes on after the last tensor.
    #[error("offset {offset}: {extra} bytes follow the last tensor; trailing bytes are refused")]
    TrailingBytes {
        /// End of the last tensor.
        offset: u64,
        /// Bytes behind it.
        extra: u64,
    },
    /// A tensor that is well described, but in an element type that Graft does not compute with.
    #[error(
        "tensor `{}` has dtype {dtype}, which is not supported (F64, F32, F16, BF16, I64, I32 and U8 are); convert the checkpoint to one of those",
        Shown(tensor)
    )]
    UnsupportedDtype {
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: super::FileDtype,
    },
}

/// What is wrong with `model.safetensors.index.json`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexProblem {
    /// A key is missing or of the wrong kind.
    #[error("`{key}`: found {found}, expected {expected}")]
    Malformed {
        /// The key.
        key: String,
        /// What stands there.
        found: String,
        /// What could stand there.
        expected: &'static str,
    },
    /// A shard's file is not there.
    #[error(
        "the shard `{}` (for tensor `{}`) does not exist; fetch the whole checkpoint",
        Shown(shard),
        Shown(tensor)
    )]
    MissingShard {
        /// The file named.
        shard: String,
        /// A tensor that it should hold.
        tensor: String,
    },
    /// The index promises tensors that the shard does not hold.
    #[error(
        "the shard `{}` does not hold {}, which the index places there; index and shards are of different checkpoints",
        Shown(shard),
        some_of(tensors)
    )]
    NotInShard {
        /// The shard.
        shard: String,
        /// The tensors, sorted.
        tensors: Vec<String>,
    },
    /// A shard holds tensors that the index does not place there.
    #[error(
        "the shard `{}` holds {}, which the index does not place there; index and shards are of different checkpoints",
        Shown(shard),
        some_of(tensors)
    )]
    NotInIndex {
        /// The shard.
        shard: String,
        /// The tensors, sorted.
        tensors: Vec<String>,
    },
    /// The sum of all tensors' bytes is not what the index states.
    #[error(
        "`metadata.total_size` is {stated}, but the tensors take {actual} bytes; index and shards are of different checkpoints"
    )]
    TotalSize {
        /// Stated bytes.
        stated: u64,
        /// Bytes of all tensors in all shards.
        actual: u64,
    },
}

/// `in tensor x: `, or nothing.
fn in_tensor(tensor: &Option<String>) -> String {
    tensor.as_ref().map_or_else(String::new, |tensor| {
        format!("in tensor `{}`: ", Shown(tensor))
    })
}
