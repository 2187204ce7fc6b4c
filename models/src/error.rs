//! The errors of this crate.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::safetensors::{IndexProblem, Problem};

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

/// serde_json's message without its trailing position, which the error states in its own fields.
pub(crate) fn json_reason(source: &serde_json::Error) -> String {
    let text = source.to_string();
    let at = format!(" at line {} column {}", source.line(), source.column());
    let text = text.strip_suffix(&at).unwrap_or(&text);
    Shown(text).to_string()
}

/// A string from a file, made safe to print: control characters escaped, and cut after 120 characters, since a
/// hostile header may hold a name of many megabytes.
pub(crate) struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LIMIT: usize = 120;
        for (shown, c) in self.0.chars().enumerate() {
            if shown == LIMIT {
                return write!(f, "… ({} bytes)", self.0.len());
            }
            if c.is_control() {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        Ok(())
    }
}

/// `; the nearest is ...`, or nothing.
fn nearest(near: &Option<String>) -> String {
    match near {
        Some(name) => format!("; the nearest is `{}`", Shown(name)),
        None => String::new(),
    }
}

/// A heading and one line per entry, or nothing.
fn listed(heading: &str, entries: &[String]) -> String {
    match entries.len() {
        0 => String::new(),
        count => {
            let names: Vec<String> = entries.iter().map(|e| Shown(e).to_string()).collect();
            format!("\n{heading} ({count}):{}", bullets(&names))
        }
    }
}

/// One line per entry.
fn bullets(entries: &[String]) -> String {
    entries
        .iter()
        .map(|entry| format!("\n  - {entry}"))
        .collect()
}

/// The first few of a list of names, for messages: `a, b, c and 40 more`.
pub(crate) fn some_of<S: AsRef<str>>(names: &[S]) -> String {
    const FEW: usize = 8;
    let mut text = names
        .iter()
        .take(FEW)
        .map(|name| format!("`{}`", Shown(name.as_ref())))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > FEW {
        text.push_str(&format!(" and {} more", names.len() - FEW));
    }
    text
}

/// The candidate with the smallest edit distance to `name`, if it is near enough to be a likely mistake.
///
/// Long candidates are skipped: the distance costs the product of the lengths.
pub(crate) fn nearest_name<'a>(
    name: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<String> {
    const LONGEST: usize = 160;
    const MOST: usize = 4096;
    if name.len() > LONGEST {
        return None;
    }
    let (distance, best) = candidates
        .take(MOST)
        .filter(|candidate| candidate.len() <= LONGEST)
        .map(|candidate| (edit_distance(name, candidate), candidate))
        .min_by_key(|(distance, _)| *distance)?;
    (distance <= 2 + name.chars().count() / 4).then(|| best.to_string())
}

/// Levenshtein's distance between two strings, by characters (the two-row form of Wagner and Fischer 1974).
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_levenshtein() {
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("weight", "weight"), 0);
    }

    #[test]
    fn nearest_names_are_near() {
        let names = [
            "encoder.layer.0.attention.self.query.weight",
            "pooler.dense.bias",
        ];
        assert_eq!(
            nearest_name("pooler.dense.bais", names.into_iter()).as_deref(),
            Some("pooler.dense.bias")
        );
        assert_eq!(nearest_name("lm_head", names.into_iter()), None);
    }

    #[test]
    fn strings_from_files_are_cut_and_escaped_in_messages() {
        let long = "é".repeat(5000);
        let shown = Shown(&long).to_string();
        assert!(
            shown.ends_with("(10000 bytes)") && shown.chars().count() < 150,
            "{shown}"
        );
        assert_eq!(Shown("a\u{1b}[2J\n").to_string(), "a\\u{1b}[2J\\n");
    }

    #[test]
    fn lists_are_cut() {
        let names: Vec<String> = (0..20).map(|i| format!("t{i}")).collect();
        assert!(some_of(&names).ends_with("`t7` and 12 more"));
        assert_eq!(some_of(&names[..2]), "`t0`, `t1`");
    }
}
