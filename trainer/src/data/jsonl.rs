//! JSON Lines: one object per line.

use std::fmt;
use std::path::Path;

use rayon::prelude::*;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;

use super::label::{Label, Place};
use super::{Columns, DEFAULT_PAIR, Example, missing_column};
use crate::error::{Error, Result};

/// Lines that are worth a task of their own.
pub(super) const LINES_EACH: usize = 64;

/// The examples of a JSON Lines text, parsed on all cores. Blank lines are skipped.
pub(super) fn parse(path: &Path, text: &str, columns: &Columns) -> Result<Vec<Example>> {
    let lines = lines_of(text);
    const EXAMPLE: &str = "{\"text\": \"...\", \"label\": \"...\"}";
    let row = |line: usize, content: &str| Row::parse(path, line, content, EXAMPLE);
    // Whether there are second texts: said by the columns, else by the first row, for all rows.
    let pair = match (columns.text_pair.as_deref(), lines.first()) {
        (Some(name), _) => Some(name),
        (None, Some(&(line, content))) => {
            row(line, content)?.get(DEFAULT_PAIR).map(|_| DEFAULT_PAIR)
        }
        (None, None) => None,
    };
    let example = |&(line, content): &(usize, &str)| -> Result<Example> {
        let row = row(line, content)?;
        Ok(Example {
            text: row.text(path, line, "text", &columns.text)?,
            text_pair: pair
                .map(|name| row.text(path, line, "text_pair", name))
                .transpose()?,
            label: columns
                .label
                .as_deref()
                .map(|column| {
                    let value = row.column(path, line, "label", column)?;
                    let place = Place { path, line, column };
                    Label::of_json(columns.problem, value, place)
                })
                .transpose()?,
            words: None,
            line,
        })
    };
    let rows: Vec<Result<Example>> = lines
        .par_iter()
        .with_min_len(LINES_EACH)
        .map(example)
        .collect();
    // The first error of the file, whichever was found first.
    rows.into_iter().collect()
}

/// The lines that are not blank, with their numbers from 1.
pub(super) fn lines_of(text: &str) -> Vec<(usize, &str)> {
    (1..)
        .zip(text.lines())
        .filter(|(_, content)| !content.trim().is_empty())
        .collect()
}

fn malformed(
    path: &Path,
    line: usize,
    content: &str,
    example: &str,
    error: &serde_json::Error,
) -> Error {
    // The parser saw one line only: its own "at line 1" would mislead.
    let said = error.to_string();
    let message = said
        .rfind(" at line ")
        .map_or(said.as_str(), |end| &said[..end]);
    let help = if content.trim_start().starts_with('[') {
        "expected one JSON object per line, not an array; write each row on a line of its own"
            .to_owned()
    } else {
        format!("correct the line; each is one JSON object such as {example}")
    };
    Error::data(
        path,
        Some(line),
        format!("malformed JSON in column {}: {message}", error.column()),
        help,
    )
}

/// An object's members in their order, each key once.
pub(super) struct Row(Vec<(String, Value)>);

impl Row {
    /// Of a line; `example` is one.
    pub(super) fn parse(path: &Path, line: usize, content: &str, example: &str) -> Result<Row> {
        serde_json::from_str(content).map_err(|e| malformed(path, line, content, example, &e))
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value)
    }

    pub(super) fn column(&self, path: &Path, line: usize, key: &str, name: &str) -> Result<&Value> {
        self.get(name).ok_or_else(|| {
            missing_column(
                path,
                line,
                key,
                name,
                self.0.iter().map(|(key, _)| key.as_str()),
            )
        })
    }

    fn text(&self, path: &Path, line: usize, key: &str, name: &str) -> Result<String> {
        match self.column(path, line, key, name)? {
            Value::String(text) => Ok(text.clone()),
            other => Err(wrong_type(path, line, name, other, "a string")),
        }
    }
}

pub(super) fn wrong_type(
    path: &Path,
    line: usize,
    name: &str,
    found: &Value,
    expected: &str,
) -> Error {
    let help = format!("write {expected} there, or remove the row");
    wrong_type_with(path, line, name, found, expected, help)
}

/// [`wrong_type`] where something else is to be done than to correct the row.
pub(super) fn wrong_type_with(
    path: &Path,
    line: usize,
    name: &str,
    found: &Value,
    expected: &str,
    help: impl Into<String>,
) -> Error {
    let found = match found {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => format!("the number {number}"),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    let name = name.escape_debug();
    let what = format!("the column `{name}` is {found}, expected {expected}");
    Error::data(path, Some(line), what, help)
}

impl<'de> Deserialize<'de> for Row {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Row;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row, A::Error> {
                let mut row = Row(Vec::new());
                while let Some(key) = map.next_key::<String>()? {
                    if row.get(&key).is_some() {
                        return Err(A::Error::custom(format!("the key `{key}` stands twice")));
                    }
                    row.0.push((key, map.next_value()?));
                }
                Ok(row)
            }
        }
        from.deserialize_map(Members)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{read, refusal};
    use super::*;

    fn refused(text: &str) -> String {
        refusal("d.jsonl", text.as_bytes(), &Columns::default())
    }

    #[test]
    fn rows_with_pairs_escapes_and_gaps() {
        let text = "\n{\"label\": -3, \"text\": \"a\\u00e9\\n\", \"text_pair\": \"\", \"id\": [1, {\"text\": 2}]}\n \
                    \n{\"text\": \"b\", \"text_pair\": \"c\", \"label\": \"18446744073709551615\"}";
        let rows = read("d.jsonl", text.as_bytes(), &Columns::default())
            .unwrap()
            .examples;
        assert_eq!(
            rows,
            [
                Example {
                    text: "aé\n".into(),
                    text_pair: Some(String::new()),
                    label: Some(Label::One("-3".into())),
                    words: None,
                    line: 2,
                },
                Example {
                    text: "b".into(),
                    text_pair: Some("c".into()),
                    label: Some(Label::One("18446744073709551615".into())),
                    words: None,
                    line: 4,
                },
            ]
        );
    }

    #[test]
    fn named_columns_are_read_and_labels_only_when_asked_for() {
        let columns = Columns {
            text_pair: Some("p".into()),
            ..Columns::texts("q")
        };
        let text = "{\"q\": \"1\", \"p\": \"2\", \"label\": null, \"text_pair\": 7}\n";
        let rows = read("d.jsonl", text.as_bytes(), &columns).unwrap().examples;
        assert_eq!(
            rows,
            [Example {
                text: "1".into(),
                text_pair: Some("2".into()),
                label: None,
                words: None,
                line: 1,
            }]
        );
    }

    #[test]
    fn malformed_rows_name_their_line() {
        let good = "{\"text\": \"a\", \"label\": 1}\n";
        for (bad, want) in [
            ("{\"text\": \"a\"", "malformed JSON"),
            (
                "{\"text\": \"a\", \"label\": 1}}",
                "malformed JSON in column 26",
            ),
            ("{\"text\": \"a\", \"label\": 1,}", "malformed JSON"),
            ("{'text': 'a'}", "malformed JSON in column 2"),
            ("{\"text\": \"\\ud800\", \"label\": 1}", "malformed JSON"),
            ("[1, 2]", "expected an object"),
            ("3", "expected an object"),
            ("null", "expected an object"),
            (
                "{\"text\": \"a\", \"text\": \"b\", \"label\": 1}",
                "the key `text` stands twice",
            ),
            (
                "{\"text\": 3, \"label\": 1}",
                "the column `text` is the number 3, expected a string",
            ),
            (
                "{\"text\": null, \"label\": 1}",
                "the column `text` is null",
            ),
            (
                "{\"text\": \"a\", \"label\": 1.5}",
                "the column `label` is the number 1.5",
            ),
            (
                "{\"text\": \"a\", \"label\": 99999999999999999999}",
                "expected a string or an integer",
            ),
            (
                "{\"text\": \"a\", \"label\": true}",
                "the column `label` is true",
            ),
            (
                "{\"text\": \"a\", \"label\": []}",
                "the column `label` is an array",
            ),
            (
                "{\"text\": \"a\", \"label\": \"\"}",
                "the label in column `label` is empty",
            ),
            (
                "{\"text\": \"a\"}",
                "the column `label` is missing; there is `text`",
            ),
            ("{}", "the column `text` is missing; there is nothing"),
        ] {
            let said = refused(&format!("{good}\n{bad}\n{good}"));
            assert!(
                said.starts_with(":3: ") && said.contains(want),
                "{bad}: {said}"
            );
            assert!(!said.contains("at line"), "{said}");
        }
        let deep = format!(
            "{{\"text\": \"a\", \"label\": 1, \"x\": {}",
            "[".repeat(100_000)
        );
        assert!(refused(&deep).starts_with(":1: malformed JSON"));
    }

    #[test]
    fn a_second_text_is_in_all_rows_or_in_none() {
        let with = "{\"text\": \"a\", \"text_pair\": \"b\", \"label\": 1}\n";
        let without = "{\"text\": \"a\", \"label\": 1}\n";
        assert!(
            refused(&format!("{with}{without}"))
                .starts_with(":2: the column `text_pair` is missing")
        );
        let text = format!("{without}{with}");
        let rows = read("d.jsonl", text.as_bytes(), &Columns::default())
            .unwrap()
            .examples;
        assert!(rows.iter().all(|row| row.text_pair.is_none()));
    }
}
