//! Exact differences between two weight files.
//!
//! A delta holds what it takes to make one file out of the other, in either direction, down to the last bit: for each
//! tensor of one file, whether it is a tensor of the other, or how it differs from one (exclusive or of their bytes), or
//! all of it. Equal tensors cost a few bytes, wherever they stand and whatever they are called; small changes of floats
//! leave sign, exponent and upper digits alone, so that those bytes of the difference, kept apart from the others, are
//! mostly zero and shrink.
//!
//! # The file
//! A zip archive, whose entries are
//!
//! - `delta.json`: the SHA-256 of both files and of each of their tensors, in the order of their bytes, and where each
//!   tensor comes from;
//! - `base.header` and `tuned.header`: the files' headers, length and padding included;
//! - `xor/I/P`, `tuned/I/P`, `base/I/P`: byte P of each element of tensor I: of its difference, or of itself.
//!
//! What is restored is held against the hash before it gets its name: a file appears right or not at all.

mod make;
mod packed;
mod restore;
mod weights;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use make::{Made, diff};
pub use restore::{Restored, apply, revert};

use crate::error::{Error, Result};

/// What `format` says in the deltas that this module reads and writes.
const FORMAT: &str = "graft-delta/1";

/// The entry of the [`Manifest`].
const MANIFEST: &str = "delta.json";

/// What a delta says of itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: String,
    base: Described,
    tuned: Described,
    /// Where each tensor of the tuned file comes from
    forward: Vec<Origin>,
    /// Where each tensor of the base comes from
    backward: Vec<Origin>,
}

/// One of the two files.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    /// Of the whole file
    sha256: String,
    bytes: u64,
    /// Of each tensor, in the order of their bytes
    tensors: Vec<String>,
}

/// Where a tensor comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Origin {
    /// It is this tensor of the other file
    Same(usize),
    /// This tensor of the other file, and the difference that has the number of the tuned file's tensor
    Xor(usize),
    /// The delta holds all of it
    Whole,
}

/// Which of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Base,
    Tuned,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Base => Side::Tuned,
            Side::Tuned => Side::Base,
        }
    }

    /// In the names of entries.
    fn name(self) -> &'static str {
        match self {
            Side::Base => "base",
            Side::Tuned => "tuned",
        }
    }
}

impl Manifest {
    fn of(&self, side: Side) -> (&Described, &[Origin]) {
        match side {
            Side::Base => (&self.base, &self.backward),
            Side::Tuned => (&self.tuned, &self.forward),
        }
    }
}

/// The error for a file that cannot be used as asked.
fn refuse(file: impl AsRef<Path>, reason: impl Into<String>, help: impl Into<String>) -> Error {
    Error::Delta {
        file: file.as_ref().display().to_string(),
        reason: reason.into(),
        help: help.into(),
    }
}

/// Refuses an output that is one of the inputs.
fn check_output(out: &Path, inputs: &[&Path]) -> Result<()> {
    let Ok(real) = out.canonicalize() else {
        return Ok(());
    };
    let same = |input: &&&Path| -> bool {
        let files = [
            input.to_path_buf(),
            input.join(crate::safetensors::SINGLE_FILE),
        ];
        let is_out = |path: PathBuf| path.canonicalize().is_ok_and(|path| path == real);
        files.into_iter().any(is_out)
    };
    match inputs.iter().find(same) {
        None => Ok(()),
        Some(input) => Err(Error::Output {
            path: out.to_path_buf(),
            reason: format!("it would replace {}, which is read", input.display()),
            help: "name another file".to_owned(),
        }),
    }
}
