//! Examples from files: JSON Lines, CSV and TSV; words with labels, also one on each line; conversations.
//!
//! The format follows from the extension: `.jsonl`, `.ndjson` and `.json` hold one JSON object per line, `.csv` is
//! RFC 4180 with a header, `.tsv` is tab-separated with a header and knows no quotes. A byte order mark, CRLF line
//! ends and blank lines are tolerated; everything else that is wrong is refused with the file and the line.

mod chat;
mod conll;
mod csv;
mod jsonl;
mod label;
mod labels;
mod spans;
mod words;

use std::path::{Path, PathBuf};

use graft_models::ProblemType;

pub use chat::{Chats, Conversation};
pub use label::Label;
pub use labels::{encode_labels, training_labels};
pub use words::{Form, LABELS, TOKENS, Words};

use crate::error::{Error, Result, list_names};
use crate::nearest::nearest;

/// One row of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The text, as it stands in the file.
    pub text: String,
    /// The second text, where the file has one.
    pub text_pair: Option<String>,
    /// What the text is. None when labels were not asked for.
    pub label: Option<Label>,
    /// Its words, where these are what has labels.
    pub words: Option<Words>,
    /// The line on which the row begins, from 1.
    pub line: usize,
}

/// The names of the columns to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// Of the text.
    pub text: String,
    /// Of the second text. None: `text_pair` where the first row (or the header) has such a column.
    pub text_pair: Option<String>,
    /// Of the label. None: labels are not read, and need not be there.
    pub label: Option<String>,
    /// What a label is.
    pub problem: ProblemType,
}

impl Columns {
    /// Texts alone, from this column.
    pub fn texts(text: impl Into<String>) -> Columns {
        Columns {
            text: text.into(),
            label: None,
            ..Columns::default()
        }
    }
}

impl Default for Columns {
    /// `text`, `text_pair` where there is one, and `label`, one for each text.
    fn default() -> Self {
        Columns {
            text: "text".into(),
            text_pair: None,
            label: Some("label".into()),
            problem: ProblemType::SingleLabel,
        }
    }
}

/// The column of the second text when none is named.
const DEFAULT_PAIR: &str = "text_pair";

/// All examples of one file; there is at least one.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// The file.
    pub path: PathBuf,
    /// Its rows in their order.
    pub examples: Vec<Example>,
    /// What their labels are.
    pub problem: ProblemType,
    /// What the user should know of them.
    pub notes: Vec<String>,
}

impl Dataset {
    /// Reads a data file whole.
    ///
    /// # Errors
    /// An unknown extension, a file that cannot be read, is not UTF-8 or holds no example, a malformed row, a missing
    /// column, a text that is no string, or a label that is not [as its kind is written](Label).
    pub fn read(path: &Path, columns: &Columns) -> Result<Dataset> {
        let endings = match columns.problem {
            ProblemType::Tokens => ".jsonl, .conll, .bio, .iob2, .tsv or .txt",
            _ => ".jsonl, .csv or .tsv",
        };
        Self::read_rows(path, columns, endings)
    }

    /// [`Dataset::read`]; `endings` are those of the names that the caller reads.
    fn read_rows(path: &Path, columns: &Columns, endings: &str) -> Result<Dataset> {
        let of_words = columns.problem == ProblemType::Tokens;
        let parse: Parse = match extension(path).as_deref() {
            _ if is_jsonl(path) && of_words => words::parse,
            Some(ending) if of_words && conll::ENDINGS.contains(&ending) => {
                |path, text, columns| {
                    let examples = conll::parse(path, text, columns.label.is_some())?;
                    Ok((examples, Vec::new()))
                }
            }
            _ if is_jsonl(path) => |path, text, columns| plain(jsonl::parse(path, text, columns)),
            Some("csv") if !of_words => {
                |path, text, columns| plain(csv::parse_csv(path, text, columns))
            }
            Some("tsv") => |path, text, columns| plain(csv::parse_tsv(path, text, columns)),
            _ if path.is_dir() => {
                let what = "it is a directory, expected a file";
                return Err(Error::data(path, None, what, "name a file in it"));
            }
            _ => {
                return Err(Error::data(
                    path,
                    None,
                    format!("the format is unknown: expected a name ending in {endings}"),
                    match extension(path).as_deref() {
                        Some("gz" | "xz" | "zst" | "bz2" | "zip") => "decompress the file",
                        _ => "rename the file after what it holds",
                    },
                ));
            }
        };
        let text = read_text(path)?;
        let (examples, notes) = parse(path, &text, columns)?;
        if examples.is_empty() {
            return Err(Error::data(
                path,
                None,
                if text.trim().is_empty() {
                    "the file is empty"
                } else {
                    "the file holds no example"
                },
                format!("expected at least one row with {}", wanted(columns)),
            ));
        }
        Ok(Dataset {
            path: path.to_path_buf(),
            examples,
            problem: columns.problem,
            notes,
        })
    }

    /// Reads documents: a `.txt` file is one, every row of the other formats is one, in that column.
    ///
    /// # Errors
    /// As [`Dataset::read`].
    pub fn documents(path: &Path, text: &str) -> Result<Dataset> {
        if has_columns(path, false) {
            let columns = Columns::texts(text);
            return Self::read_rows(path, &columns, ".txt, .jsonl, .csv or .tsv");
        }
        let example = Example {
            text: read_text(path)?,
            text_pair: None,
            label: None,
            words: None,
            line: 1,
        };
        Ok(Dataset {
            path: path.to_path_buf(),
            examples: vec![example],
            problem: ProblemType::SingleLabel,
            notes: Vec::new(),
        })
    }

    /// How many examples have a text of nothing but white space (and such a second text, if any). They are kept:
    /// the model sees their special tokens alone.
    pub fn empty_texts(&self) -> usize {
        let blank = |text: &str| text.trim().is_empty();
        self.examples
            .iter()
            .filter(|e| blank(&e.text) && e.text_pair.as_deref().is_none_or(blank))
            .count()
    }
}

/// The examples of a text, and what the user should know of them.
type Parse = fn(&Path, &str, &Columns) -> Result<(Vec<Example>, Vec<String>)>;

/// Examples of which there is nothing to be said.
fn plain(examples: Result<Vec<Example>>) -> Result<(Vec<Example>, Vec<String>)> {
    Ok((examples?, Vec::new()))
}

/// What a file's name ends in, in small letters.
fn extension(path: &Path) -> Option<String> {
    let extension = path.extension()?;
    Some(extension.to_string_lossy().to_ascii_lowercase())
}

/// Whether a data file has columns with names: a `.txt` file is a text, and where `words` are labelled, files other than
/// JSON Lines have a word a line.
pub fn has_columns(path: &Path, words: bool) -> bool {
    match words {
        true => is_jsonl(path),
        false => extension(path).as_deref() != Some("txt"),
    }
}

/// Why a file has none.
pub(crate) fn without_columns(words: bool) -> &'static str {
    match words {
        true => "a file with a word a line has no columns with names",
        false => "a .txt file has no columns",
    }
}

fn is_jsonl(path: &Path) -> bool {
    matches!(
        extension(path).as_deref(),
        Some("jsonl" | "ndjson" | "json")
    )
}

/// A file's text, without its byte order mark.
fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    decode(path, &bytes).map(str::to_owned)
}

/// The text of a file without its byte order mark.
fn decode<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(Error::data(
            path,
            Some(1),
            "the file is UTF-16, expected UTF-8",
            "convert it to UTF-8",
        ));
    }
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    std::str::from_utf8(bytes).map_err(|e| {
        let before = &bytes[..e.valid_up_to()];
        let line = 1 + before.iter().filter(|&&b| b == b'\n').count();
        let byte = bytes[e.valid_up_to()];
        Error::data(
            path,
            Some(line),
            format!("not UTF-8: byte 0x{byte:02x} does not fit there"),
            "convert the file to UTF-8",
        )
    })
}

/// The columns in words.
fn wanted(columns: &Columns) -> String {
    let mut names = vec![columns.text.as_str()];
    names.extend(columns.text_pair.as_deref());
    names.extend(columns.label.as_deref());
    list_names(&names, 8)
}

/// The error for a column that is not there, given those that are.
fn missing_column<'a>(
    path: &Path,
    line: usize,
    key: &str,
    name: &str,
    present: impl Iterator<Item = &'a str> + Clone,
) -> Error {
    let names: Vec<&str> = present.clone().collect();
    let flag = key.replace('_', "-");
    let setting =
        format!("name the column with --{flag}-column, or as data.{key} in the configuration");
    let separator = match names[..] {
        [only] => [';', '\t', ',', '|'].into_iter().find(|&c| {
            let mut parts = only.split(c).map(|part| part.trim().trim_matches('"'));
            only.contains(c) && parts.any(|part| part == name)
        }),
        _ => None,
    };
    let help = match nearest(name, present) {
        _ if separator == Some('\t') => "columns are separated by tabs in a file named .tsv".to_owned(),
        _ if separator.is_some() => {
            "columns are separated by commas in a file named .csv, by tabs in one named .tsv: write it so".to_owned()
        }
        Some(near) => format!("did you mean `{}`? If so, {setting}", near.escape_debug()),
        None => setting,
    };
    Error::data(
        path,
        Some(line),
        format!(
            "the column `{}` is missing; there is {}",
            name.escape_debug(),
            list_names(&names, 12)
        ),
        help,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `bytes` from a file of that name.
    pub(super) fn read(name: &str, bytes: &[u8], columns: &Columns) -> Result<Dataset> {
        let dir = tempfile::tempdir().unwrap();
        read_at(&dir.path().join(name), bytes, columns)
    }

    fn read_at(path: &Path, bytes: &[u8], columns: &Columns) -> Result<Dataset> {
        std::fs::write(path, bytes).unwrap();
        Dataset::read(path, columns)
    }

    /// What follows the file's path in the message of the error.
    pub(super) fn refusal(name: &str, bytes: &[u8], columns: &Columns) -> String {
        let dir = tempfile::tempdir().unwrap();
        // The whole path: the directory's random name may hold that of the file.
        let path = dir.path().join(name);
        let message = read_at(&path, bytes, columns).unwrap_err().to_string();
        let rest = message.strip_prefix(&path.display().to_string());
        rest.expect("the file is named first").to_owned()
    }

    /// Those of words with labels.
    pub(super) fn of_words() -> Columns {
        Columns {
            label: Some(LABELS.into()),
            problem: ProblemType::Tokens,
            ..Columns::texts(TOKENS)
        }
    }

    #[test]
    fn formats_agree() {
        let columns = Columns::default();
        let jsonl = b"{\"text\": \"a b\", \"label\": 1}\n{\"text\": \"c\", \"label\": \"x\"}\n";
        let from_json = read("d.jsonl", jsonl, &columns).unwrap().examples;
        // The header of the others takes a line.
        let shifted: Vec<Example> = from_json
            .iter()
            .cloned()
            .map(|e| Example {
                line: e.line + 1,
                ..e
            })
            .collect();
        for (name, text) in [
            ("d.csv", &b"text,label\na b,1\nc,x\n"[..]),
            ("d.csv", b"label,other,text\r\n1,,a b\r\nx,,c"),
            ("d.CSV", b"\xef\xbb\xbftext,label\n\"a b\",1\n\"c\",x\n"),
            ("d.tsv", b"text\tlabel\na b\t1\nc\tx\n"),
            ("d.tsv", b"text\tlabel\r\na b\t1\r\nc\tx\r\n"),
        ] {
            assert_eq!(
                read(name, text, &columns).unwrap().examples,
                shifted,
                "{name}"
            );
        }
        let bom = [b"\xef\xbb\xbf", &jsonl[..]].concat();
        assert_eq!(read("d.json", &bom, &columns).unwrap().examples, from_json);
        let crlf = String::from_utf8_lossy(jsonl).replace('\n', "\r\n");
        assert_eq!(
            read("d.jsonl", crlf.as_bytes(), &columns).unwrap().examples,
            from_json
        );
    }

    #[test]
    fn files_without_examples_are_refused() {
        let columns = Columns::default();
        for name in ["d.jsonl", "d.csv", "d.tsv"] {
            for empty in [&b""[..], b"\n\r\n\n", b"\xef\xbb\xbf", b"  \n"] {
                assert_eq!(
                    refusal(name, empty, &columns),
                    ": the file is empty",
                    "{name}"
                );
            }
        }
        for (name, text) in [
            ("d.csv", &b"text,label\n"[..]),
            ("d.tsv", b"text\tlabel\n\n"),
        ] {
            assert_eq!(refusal(name, text, &columns), ": the file holds no example");
        }
    }

    #[test]
    fn unreadable_files_are_refused() {
        let columns = Columns::default();
        for name in ["d.txt", "d"] {
            assert_eq!(
                refusal(name, b"x", &columns),
                ": the format is unknown: expected a name ending in .jsonl, .csv or .tsv"
            );
        }
        assert!(refusal("d.csv", b"\xff\xfet\0", &columns).starts_with(":1: the file is UTF-16"));
        let bad = b"{\"text\": \"a\", \"label\": 1}\n{\"text\": \"\xe9\", \"label\": 1}\n";
        assert_eq!(
            refusal("d.jsonl", bad, &columns),
            ":2: not UTF-8: byte 0xe9 does not fit there"
        );
        assert!(refusal("d.jsonl", b"{\"text\": \"\xe9", &columns).starts_with(":1: not UTF-8"));
        let missing = Dataset::read(Path::new("/nowhere/d.csv"), &columns).unwrap_err();
        assert!(
            missing
                .to_string()
                .starts_with("/nowhere/d.csv: cannot read"),
            "{missing}"
        );
    }

    #[test]
    fn a_text_file_is_one_document() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.TXT");
        std::fs::write(&path, b"\xef\xbb\xbfone\n\n two\n").unwrap();
        let data = Dataset::documents(&path, "text").unwrap();
        assert_eq!(data.examples.len(), 1);
        assert_eq!(data.examples[0].text, "one\n\n two\n");
        std::fs::write(&path, b"a\nb\xe9\n").unwrap();
        let said = Dataset::documents(&path, "text").unwrap_err().to_string();
        assert!(said.contains("d.TXT:2: not UTF-8"), "{said}");
        let rows = dir.path().join("d.jsonl");
        std::fs::write(&rows, "{\"body\": \"a\"}\n{\"body\": \"b\"}\n").unwrap();
        let data = Dataset::documents(&rows, "body").unwrap();
        assert_eq!((data.examples.len(), data.examples[1].line), (2, 2));
        let said = Dataset::documents(&rows, "text").unwrap_err().to_string();
        assert!(said.contains("the column `text` is missing"), "{said}");
        for name in ["d.doc", "d"] {
            let said = Dataset::documents(&dir.path().join(name), "text").unwrap_err();
            let expected = "expected a name ending in .txt, .jsonl, .csv or .tsv";
            assert!(said.to_string().ends_with(expected), "{said}");
        }
    }

    #[test]
    fn empty_texts_are_counted_and_kept() {
        let columns = Columns {
            label: None,
            ..Columns::default()
        };
        let text = b"{\"text\": \"\"}\n{\"text\": \" \\t\"}\n{\"text\": \"a\"}\n";
        let data = read("d.jsonl", text, &columns).unwrap();
        assert_eq!((data.examples.len(), data.empty_texts()), (3, 2));
        let pairs = b"text,text_pair\n,b\n,\na,\n";
        let data = read("d.csv", pairs, &columns).unwrap();
        assert_eq!((data.examples.len(), data.empty_texts()), (3, 1));
    }
}
