//! Why a file was refused, before the file's name is known.

use crate::error::Error;

/// Shorthand for results of the parsers.
pub(crate) type Refused<T> = Result<T, Refusal>;

/// One thing to do where a checkpoint cannot be read but may be honest.
pub(crate) const CONVERT: &str = "load it with transformers where you trust it and save it with \
     save_pretrained(safe_serialization=True)";

/// One thing to do where the bytes contradict themselves.
pub(crate) const FETCH: &str =
    "the file is damaged or hostile, fetch it again from where you trust it";

/// A reason and its place.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// Bytes from the start of the file.
    pub offset: u64,
    /// What was found and what was expected.
    pub reason: String,
    /// One thing to do.
    pub help: &'static str,
    /// Whether the bytes just ended: more of them might help.
    pub truncated: bool,
}

impl Refusal {
    /// A refusal of what may be honest, to be converted by its owner.
    pub(crate) fn convert(offset: u64, reason: impl Into<String>) -> Refusal {
        Refusal {
            offset,
            reason: reason.into(),
            help: CONVERT,
            truncated: false,
        }
    }

    /// A refusal of what no writer writes.
    pub(crate) fn damaged(offset: u64, reason: impl Into<String>) -> Refusal {
        Refusal {
            offset,
            reason: reason.into(),
            help: FETCH,
            truncated: false,
        }
    }

    /// A refusal because the bytes end.
    pub(crate) fn truncated(offset: u64, reason: impl Into<String>) -> Refusal {
        Refusal {
            truncated: true,
            ..Refusal::damaged(offset, reason)
        }
    }

    /// The error to show.
    pub(crate) fn of(self, file: &str) -> Error {
        Error::Weights {
            file: file.to_string(),
            offset: self.offset,
            reason: self.reason,
            help: self.help.to_string(),
        }
    }
}
