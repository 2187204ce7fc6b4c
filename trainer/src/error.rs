//! One error type for everything a user can get wrong.
//!
//! A message says where (file and line, flag or tensor), what was found and what was expected; the help says
//! one thing to do. The command line prints both and exits with code 1.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use miette::Diagnostic;
use thiserror::Error;

/// What the trainer reports instead of panicking.
#[derive(Debug, Error, Diagnostic)]
pub enum Error {
    /// A setting that is unknown, of the wrong type or out of range.
    #[error("{place}: {what}")]
    Config {
        /// Where the setting was given: `run.toml:12`, `--lr`, `--set optimizer.lr=-1`.
        place: String,
        /// What was found and what was expected.
        what: String,
        /// One thing to do.
        #[help]
        help: String,
    },
    /// A data file, or one row of it, that cannot be used.
    #[error("{}{}: {what}", file.display(), Line(*line))]
    Data {
        /// The file as it was named by the user.
        file: PathBuf,
        /// The line of the row, from 1; none when the whole file is meant.
        line: Option<usize>,
        /// What was found and what was expected.
        what: String,
        /// One thing to do.
        #[help]
        help: String,
    },
    /// The operating system refused a file operation.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The verb: `read`, `write`, `create`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's own error.
        source: io::Error,
        /// One thing to do.
        #[help]
        help: String,
    },
    /// A certificate that cannot be read, or whose run fails its check.
    #[error("{}: {what}", path.display())]
    Certificate {
        /// The certificate's file, or the run directory.
        path: PathBuf,
        /// What is wrong: for a failed check, one line per tensor.
        what: String,
        /// One thing to do.
        #[help]
        help: String,
    },
    /// A run that was told to stop.
    #[error("stopped after step {step}")]
    Stopped {
        /// Optimizer steps done.
        step: u64,
        /// One thing to do.
        #[help]
        help: String,
    },
    /// The first steps did not do what the policy says.
    #[error(
        "step {step} of training is not what it should be:{}",
        listed(findings)
    )]
    Audit {
        /// The optimizer step, from 1.
        step: u64,
        /// What is wrong.
        findings: Vec<graft_nn::Finding>,
        /// One thing to do.
        #[help]
        help: &'static str,
    },
    /// A model's files cannot be read or written; the message has its own help.
    #[error(transparent)]
    Model(#[from] graft_models::Error),
}

impl From<graft_nn::Error> for Error {
    fn from(error: graft_nn::Error) -> Error {
        Error::Model(error.into())
    }
}

impl From<graft_tensor::Error> for Error {
    fn from(error: graft_tensor::Error) -> Error {
        Error::Model(error.into())
    }
}

impl From<graft_autograd::Error> for Error {
    fn from(error: graft_autograd::Error) -> Error {
        Error::Model(error.into())
    }
}

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A setting given at `place` that cannot be used.
    pub fn config(place: impl Display, what: impl Into<String>, help: impl Into<String>) -> Error {
        Error::Config {
            place: place.to_string(),
            what: what.into(),
            help: help.into(),
        }
    }

    /// A data file that cannot be used, at `line` when one row is to blame.
    pub fn data(
        file: &Path,
        line: Option<usize>,
        what: impl Into<String>,
        help: impl Into<String>,
    ) -> Error {
        Error::Data {
            file: file.to_path_buf(),
            line,
            what: what.into(),
            help: help.into(),
        }
    }

    /// A failed file operation; the help follows from the kind of failure.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Error {
        let help = match source.kind() {
            io::ErrorKind::NotFound => "check the path; it does not exist".to_owned(),
            io::ErrorKind::PermissionDenied => {
                "check who owns the file and what it permits".to_owned()
            }
            io::ErrorKind::StorageFull => "free some space on that disk".to_owned(),
            io::ErrorKind::IsADirectory => "name a file, not a directory".to_owned(),
            _ => format!("check that this path allows to {action} there"),
        };
        Error::Io {
            action,
            path: path.to_path_buf(),
            source,
            help,
        }
    }
}

impl Error {
    /// A model that computes something else than numbers.
    pub(crate) fn not_numbers() -> Error {
        Error::config(
            "model",
            "its logits are not numbers",
            "check its weights: `trainer inspect` lists them, `trainer verify` checks a run",
        )
    }

    /// This error as one of the row that led to it.
    pub(crate) fn of_row(self, path: &Path, line: usize) -> Error {
        let (what, help) = match self {
            Error::Model(graft_models::Error::Template { file, reason, help }) => {
                (format!("{file}: {reason}"), help)
            }
            Error::Config { place, what, help } => (format!("{place}: {what}"), help),
            other => (
                other.to_string(),
                "correct the row, or remove it".to_owned(),
            ),
        };
        Error::data(path, Some(line), what, help)
    }

    /// A run at `out` that was told to stop, with or without a checkpoint.
    pub fn stopped(step: u64, out: &Path, checkpoint: bool) -> Error {
        let out = out.display();
        let help = match checkpoint {
            true => format!("`trainer resume {out}` goes on from there"),
            false => "nothing of it is kept, as train.checkpoint is \"never\"".to_owned(),
        };
        Error::Stopped { step, help }
    }

    /// What the audit of a step found; the help follows from the gravest finding.
    pub fn audit(step: u64, findings: Vec<graft_nn::Finding>) -> Error {
        use graft_nn::Finding;
        let any = |wanted: fn(&Finding) -> bool| findings.iter().any(wanted);
        let help = if any(|f| matches!(f, Finding::FrozenMoved { .. })) {
            "this is a defect of the trainer: please report it with the configuration"
        } else if any(|f| matches!(f, Finding::NotFinite { .. })) {
            "lower optimizer.lr, or raise optimizer.warmup"
        } else if any(|f| matches!(f, Finding::ZeroGradient { .. })) {
            "freeze it with a rule, or look at what lies between it and the loss; train.audit=false trains all the same"
        } else {
            "raise optimizer.lr, optimizer.clip_norm or the rate of the rule, or freeze it; train.audit=false trains all \
             the same"
        };
        Error::Audit {
            step,
            findings,
            help,
        }
    }
}

/// One line for each finding, the first few.
fn listed(findings: &[graft_nn::Finding]) -> String {
    const FEW: usize = 8;
    let mut lines: String = findings
        .iter()
        .take(FEW)
        .map(|finding| format!("\n  {finding}"))
        .collect();
    if findings.len() > FEW {
        lines += &format!("\n  and {} more", findings.len() - FEW);
    }
    lines
}

/// `:12` after a file name, or nothing.
struct Line(Option<usize>);

impl Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(line) => write!(f, ":{line}"),
            None => Ok(()),
        }
    }
}

/// Names in a message: `a`, `b` and `c`, or at most `limit` of them and how many more there are.
pub fn list_names<S: AsRef<str>>(names: &[S], limit: usize) -> String {
    let quoted: Vec<String> = names
        .iter()
        .take(limit)
        .map(|name| format!("`{}`", name.as_ref().escape_debug()))
        .collect();
    match names.len() {
        0 => "nothing".to_owned(),
        1 => quoted[0].clone(),
        n if n > limit => format!("{} and {} more", quoted.join(", "), n - limit),
        n => format!("{} and {}", quoted[..n - 1].join(", "), quoted[n - 1]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_stand_before_the_message() {
        let error = Error::data(Path::new("a/b.jsonl"), Some(3), "no text", "add one");
        assert_eq!(error.to_string(), "a/b.jsonl:3: no text");
        let error = Error::data(Path::new("b.csv"), None, "is empty", "add rows");
        assert_eq!(error.to_string(), "b.csv: is empty");
        assert_eq!(error.help().unwrap().to_string(), "add rows");
    }

    #[test]
    fn long_lists_are_cut() {
        assert_eq!(list_names::<&str>(&[], 3), "nothing");
        assert_eq!(list_names(&["a"], 3), "`a`");
        assert_eq!(list_names(&["a", "b", "c"], 3), "`a`, `b` and `c`");
        assert_eq!(list_names(&["a", "b", "c", "d"], 2), "`a`, `b` and 2 more");
        assert_eq!(list_names(&["a\nb"], 2), "`a\\nb`");
    }
}
