//! What can go wrong on a GPU, said so that the reader can mend it.

use super::Scalar;

/// A refused or failed GPU operation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no driver on this machine, or one that cannot be loaded.
    #[error("no NVIDIA driver: {text}; install the driver, or use `--device cpu`")]
    NoDriver {
        /// What became of its library
        text: String,
    },
    /// The driver is there, and no device.
    #[error("no GPU: the driver reports {text}; check `nvidia-smi`, or use `--device cpu`")]
    NoDevice {
        /// What the driver says
        text: String,
    },
    /// A device number that the machine does not have.
    #[error("there is no cuda:{ordinal}: this machine has {count} GPU(s), numbered from 0")]
    Ordinal {
        /// The number that was asked for
        ordinal: usize,
        /// How many devices there are
        count: usize,
    },
    /// A device that is older than every kernel.
    #[error(
        "cuda:{ordinal} is a {name} of compute capability {major}.{minor}; 7.0 or later is needed"
    )]
    TooOld {
        /// The device's number
        ordinal: usize,
        /// Its name
        name: String,
        /// Compute capability, before the point
        major: i32,
        /// Compute capability, after the point
        minor: i32,
    },
    /// The driver does not know the PTX version of the kernels.
    #[error(
        "the driver (CUDA {}.{}) is older than the kernels' PTX: {text}; {help}",
        version / 1000,
        version % 1000 / 10
    )]
    Driver {
        /// The driver's version as it reports it: 1000 major + 10 minor
        version: i32,
        /// What it says
        text: String,
        /// What to do about it
        help: &'static str,
    },
    /// A variable of the environment with a value that means nothing.
    #[error("{name} is {found:?}; use {expected}, or leave it out")]
    Variable {
        /// The variable
        name: &'static str,
        /// Its value
        found: String,
        /// The values that there are
        expected: String,
    },
    /// The device has no more memory.
    #[error("the GPU has no {bytes} bytes left")]
    OutOfMemory {
        /// Bytes that were asked for
        bytes: usize,
    },
    /// An element type that a kernel does not take.
    #[error("{kernel} has no GPU kernel for {found}; it takes {expected}")]
    Scalar {
        /// The kernel
        kernel: &'static str,
        /// The type
        found: Scalar,
        /// The types that there are
        expected: &'static str,
    },
    /// Something that only the CPU computes.
    #[error("{kernel} on a GPU: {what}")]
    Unsupported {
        /// The kernel
        kernel: &'static str,
        /// What there is not
        what: String,
    },
    /// A call of the driver that failed.
    #[error("{call} failed: {text}")]
    Call {
        /// The driver's function, or the kernel
        call: &'static str,
        /// What the driver says
        text: String,
    },
    /// A source that does not compile.
    #[error("{file}.cu does not compile:\n{log}")]
    Compile {
        /// The source
        file: &'static str,
        /// What the compiler says
        log: String,
    },
}

/// Result with this module's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
