//! What can go wrong on a tape.

use graft_tensor::{DType, Error as TensorError, Shape};

/// A refused recording or backward pass.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum Error {
    /// The tensors do not fit the operation.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// An operation without a backward on a path from a trainable parameter.
    #[error(
        "{op} has no backward, and the gradient of the trainable parameter {parameter} would have \
         to pass through it; detach its input, or freeze the parameter"
    )]
    NoBackward {
        /// The operation
        op: String,
        /// A parameter that the operation's input depends on
        parameter: String,
    },
    /// A gradient of a parameter that is codes.
    #[error(
        "{parameter} is held in {dtype}, of which there is no gradient; freeze it, or hold it in f32"
    )]
    Quantised {
        /// The parameter
        parameter: String,
        /// What it is held in
        dtype: DType,
    },
    /// Trainable parameters that the loss does not depend on.
    #[error(
        "{} trainable parameter(s) received no gradient: {}; freeze them, or make the loss depend on \
         them",
        names.len(),
        names.join(", ")
    )]
    NoGradient {
        /// Their names
        names: Vec<String>,
    },
    /// A backward pass from something that is no scalar.
    #[error("backward starts at a scalar loss, found a tensor {shape}; sum it first")]
    NotScalar {
        /// The shape
        shape: Shape,
    },
    /// A second backward pass over the same recording.
    #[error(
        "this recording's saved tensors were consumed by a backward pass; record the step again"
    )]
    Consumed,
    /// The loss depends on nothing that is trained.
    #[error("the loss depends on no trainable parameter, so there is nothing to differentiate")]
    NothingTrainable,
    /// A gradient check that failed.
    #[error(
        "gradient of input {input}, element {element}: backward says {analytic:e}, finite \
         differences say {numeric:e} (error {error:e}, tolerance {tolerance:e})"
    )]
    GradCheck {
        /// Position of the input
        input: usize,
        /// Position of the element in row-major order
        element: usize,
        /// What backward computed
        analytic: f64,
        /// What finite differences give
        numeric: f64,
        /// Their distance, relative to the larger of 1 and the gradient
        error: f64,
        /// What was allowed
        tolerance: f64,
    },
    /// A gradient that is there and must not be, or the other way round.
    #[error("input {input} {found} a gradient although it {expected} one")]
    NeedMask {
        /// Position of the input
        input: usize,
        /// "has" or "has not"
        found: &'static str,
        /// "needs" or "does not need"
        expected: &'static str,
    },
    /// A leaf without a value in a replay.
    #[error("replay: leaf {leaf} has shape {expected} on the tape and was given {found}")]
    Replay {
        /// Number of the node
        leaf: usize,
        /// Shape on the tape
        expected: String,
        /// Shape that was fed
        found: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
