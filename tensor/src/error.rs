//! What can go wrong with tensors, said so that the reader can mend it.

use crate::{Category, DType, Device, Shape};

/// A refused tensor operation.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum Error {
    /// Shapes that do not fit the operation or each other.
    #[error("{op}: {what}; found {found}, expected {expected}")]
    Shape {
        /// The operation
        op: &'static str,
        /// Which input is wrong
        what: String,
        /// The shape as it is
        found: String,
        /// The shape as it must be
        expected: String,
    },
    /// An element type that the operation does not take.
    #[error("{op}: {what} is {found}, expected {expected}")]
    DType {
        /// The operation
        op: &'static str,
        /// Which input is wrong
        what: String,
        /// Its type
        found: DType,
        /// What the operation takes
        expected: String,
    },
    /// An index outside its table.
    #[error("{op}: index {index} at position {position} is outside 0..{limit}")]
    Index {
        /// The operation
        op: &'static str,
        /// The offending value
        index: i64,
        /// Where it stands in the index tensor
        position: usize,
        /// One past the largest valid value
        limit: usize,
    },
    /// Sequence offsets that do not describe a packed batch.
    #[error("{op}: sequence offsets must rise from 0 to {tokens} without falling: {found}")]
    Offsets {
        /// The operation
        op: &'static str,
        /// Rows of the packed tensor
        tokens: usize,
        /// What was found
        found: String,
    },
    /// A parameter of the operation outside its range.
    #[error("{op}: {what}")]
    Argument {
        /// The operation
        op: &'static str,
        /// Name, value and range
        what: String,
    },
    /// Writing to a tensor that others still hold.
    #[error(
        "cannot write in place: the tensor {shape} is shared; drop the tape and other clones first"
    )]
    Shared {
        /// The tensor's shape
        shape: Shape,
    },
    /// Reading or writing elements of a view as if they lay side by side.
    #[error("the tensor {shape} is a strided view; call contiguous() before reading its elements")]
    NotContiguous {
        /// The tensor's shape
        shape: Shape,
    },
    /// Reading elements of a tensor that only exists as a plan.
    #[error("the tensor {shape} belongs to a memory plan and holds no elements")]
    Planned {
        /// The tensor's shape
        shape: Shape,
    },
    /// Reading or writing elements that are on another device.
    #[error(
        "the tensor {shape} is on {found}, and {op} runs on {expected}; copy it there with \
         to_memory()"
    )]
    Device {
        /// The operation
        op: &'static str,
        /// The tensor's shape
        shape: Shape,
        /// Where it is
        found: Device,
        /// Where it must be
        expected: Device,
    },
    /// Something that went wrong on a GPU.
    #[error(transparent)]
    Cuda(#[from] graft_kernels::cuda::Error),
    /// The system has no more memory.
    #[error(
        "out of memory: {bytes} bytes for {category} are not to be had beside the {} in use \
         ({}{}); use smaller batches, or train fewer parameters: `trainer plan` says what each takes",
        live.iter().sum::<usize>(),
        breakdown(live),
        on_device(*device)
    )]
    OutOfMemory {
        /// Bytes that were asked for
        bytes: usize,
        /// What for
        category: Category,
        /// Bytes in use, in the order of [`Category::ALL`]
        live: [usize; 5],
        /// Of a GPU: bytes that this process obtained, that nobody has, and all
        device: Option<[usize; 3]>,
    },
}

fn breakdown(live: &[usize; 5]) -> String {
    let parts = Category::ALL.iter().zip(live);
    let parts: Vec<String> = parts.map(|(c, bytes)| format!("{c} {bytes}")).collect();
    parts.join(", ")
}

/// What is in use may be less than what a process holds, in pieces that are too small, and others may hold the rest.
fn on_device(device: Option<[usize; 3]>) -> String {
    device.map_or_else(String::new, |[obtained, free, all]| {
        format!("; of the GPU's {all} this process holds {obtained}, {free} are free")
    })
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A shape error from anything that prints.
    pub fn shape(
        op: &'static str,
        what: impl Into<String>,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Error {
        Error::Shape {
            op,
            what: what.into(),
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// An argument error.
    pub fn argument(op: &'static str, what: impl Into<String>) -> Error {
        Error::Argument {
            op,
            what: what.into(),
        }
    }
}
