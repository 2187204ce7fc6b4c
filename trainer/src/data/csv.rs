//! CSV (RFC 4180) and TSV, both with a header.
//!
//! The parser is our own because it has to refuse what a lenient one mends: a quoted field that is never closed
//! swallows the rest of the file into one text, and a stray quote moves columns. The `csv` crate is its oracle in
//! the tests. Lines may end in LF, CRLF or CR.

use std::path::Path;

use super::label::{Label, Place};
use super::{Columns, DEFAULT_PAIR, Example, missing_column};
use crate::error::{Error, Result};

/// The examples of a comma-separated text with quoted fields.
pub(super) fn parse_csv(path: &Path, text: &str, columns: &Columns) -> Result<Vec<Example>> {
    examples(Records::new(path, text, b',', true), columns)
}

/// The examples of a tab-separated text. It has no quotes (IANA text/tab-separated-values): a `"` is a letter, as
/// in the GLUE files, and a field holds no tab and no line break.
pub(super) fn parse_tsv(path: &Path, text: &str, columns: &Columns) -> Result<Vec<Example>> {
    examples(Records::new(path, text, b'\t', false), columns)
}

fn examples(mut records: Records<'_>, columns: &Columns) -> Result<Vec<Example>> {
    let path = records.path;
    let Some((header_line, header)) = records.next()? else {
        return Ok(Vec::new());
    };
    let find = |key: &str, name: &str| -> Result<usize> {
        let mut places = header
            .iter()
            .enumerate()
            .filter(|(_, column)| *column == name);
        match (places.next(), places.next()) {
            (Some((place, _)), None) => Ok(place),
            (Some(_), Some(_)) => Err(Error::data(
                path,
                Some(header_line),
                format!(
                    "the column `{}` stands twice in the header",
                    name.escape_debug()
                ),
                "rename one of the two",
            )),
            (None, _) => Err(missing_column(
                path,
                header_line,
                key,
                name,
                header.iter().map(String::as_str),
            )),
        }
    };
    let text = find("text", &columns.text)?;
    let pair = match columns.text_pair.as_deref() {
        Some(name) => Some(find("text_pair", name)?),
        None if header.iter().any(|name| name == DEFAULT_PAIR) => {
            Some(find("text_pair", DEFAULT_PAIR)?)
        }
        None => None,
    };
    let label = match columns.label.as_deref() {
        Some(name) => Some((find("label", name)?, name)),
        None => None,
    };

    let mut examples = Vec::new();
    while let Some((line, mut fields)) = records.next()? {
        if fields.len() != header.len() {
            let help = if records.quotes {
                "put quotes around a field that holds a comma"
            } else {
                "a field of a .tsv file holds no tab"
            };
            return Err(Error::data(
                path,
                Some(line),
                format!(
                    "the row has {} fields, expected {} as in the header",
                    fields.len(),
                    header.len()
                ),
                help,
            ));
        }
        let label = match label {
            Some((place, column)) => {
                let at = Place { path, line, column };
                Some(Label::of_field(columns.problem, &fields[place], at)?)
            }
            None => None,
        };
        // No two of them are the same column unless the user named one twice; then each gets a copy.
        let text_pair = pair.map(|place| fields[place].clone());
        examples.push(Example {
            text: std::mem::take(&mut fields[text]),
            text_pair,
            label,
            words: None,
            line,
        });
    }
    Ok(examples)
}

/// A cursor over the records of a text.
struct Records<'a> {
    path: &'a Path,
    text: &'a str,
    /// Byte at which the next record begins.
    place: usize,
    /// Its line, from 1.
    line: usize,
    separator: u8,
    quotes: bool,
}

impl<'a> Records<'a> {
    fn new(path: &'a Path, text: &'a str, separator: u8, quotes: bool) -> Records<'a> {
        Records {
            path,
            text,
            place: 0,
            line: 1,
            separator,
            quotes,
        }
    }

    /// The next record that is not blank, with the line on which it begins.
    fn next(&mut self) -> Result<Option<(usize, Vec<String>)>> {
        loop {
            if self.place >= self.text.len() {
                return Ok(None);
            }
            let (line, begin) = (self.line, self.place);
            let mut fields = Vec::new();
            while self.field(&mut fields)? {}
            let content = &self.text[begin..self.place];
            if !content.trim_matches(['\r', '\n', ' ']).is_empty() {
                return Ok(Some((line, fields)));
            }
        }
    }

    /// Reads one field and what ends it; whether the record goes on.
    fn field(&mut self, fields: &mut Vec<String>) -> Result<bool> {
        let quoted = self.quotes && self.peek() == Some(b'"');
        let field = if quoted {
            self.quoted(fields.len() + 1)?
        } else {
            self.plain(fields.len() + 1)?
        };
        fields.push(field);
        match self.peek() {
            Some(byte) if byte == self.separator => {
                self.place += 1;
                return Ok(true);
            }
            Some(b'\r') => {
                self.place += 1;
                if self.peek() == Some(b'\n') {
                    self.place += 1;
                }
                self.line += 1;
            }
            Some(b'\n') => {
                self.place += 1;
                self.line += 1;
            }
            Some(_) => {
                return Err(self.malformed(
                    self.line,
                    format!("field {} goes on after its closing quote", fields.len()),
                ));
            }
            None => {}
        }
        Ok(false)
    }

    /// A field without quotes, up to what ends it.
    fn plain(&mut self, number: usize) -> Result<String> {
        let rest = &self.text.as_bytes()[self.place..];
        let ends = |&byte: &u8| byte == self.separator || byte == b'\n' || byte == b'\r';
        let length = rest.iter().position(ends).unwrap_or(rest.len());
        let field = &self.text[self.place..self.place + length];
        if self.quotes && field.contains('"') {
            return Err(self.malformed(
                self.line,
                format!("field {number} holds a quote but does not begin with one"),
            ));
        }
        self.place += length;
        Ok(field.to_owned())
    }

    /// A field in quotes, a doubled quote standing for one; up to after its closing quote.
    fn quoted(&mut self, number: usize) -> Result<String> {
        let opened = self.line;
        let mut field = String::new();
        self.place += 1;
        loop {
            let rest = &self.text[self.place..];
            let Some(length) = rest.find('"') else {
                return Err(self.malformed(
                    opened,
                    format!("field {number} opens a quote that is never closed"),
                ));
            };
            let part = &rest[..length];
            field.push_str(part);
            // CRLF is one line end, and so is a CR alone.
            self.line += part.matches('\n').count() + part.matches('\r').count()
                - part.matches("\r\n").count();
            self.place += length + 1;
            if self.peek() != Some(b'"') {
                return Ok(field);
            }
            field.push('"');
            self.place += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.place).copied()
    }

    fn malformed(&self, line: usize, what: String) -> Error {
        Error::data(
            self.path,
            Some(line),
            format!("malformed CSV: {what}"),
            "put the whole field in quotes and double each quote inside it, as RFC 4180 says",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{read, refusal};
    use super::*;

    fn refused(text: &str) -> String {
        refusal("d.csv", text.as_bytes(), &Columns::default())
    }

    fn one(label: Option<Label>) -> String {
        match label {
            Some(Label::One(name)) => name,
            other => panic!("{other:?}"),
        }
    }

    /// `text`, `label` and line of each row.
    fn rows(name: &str, text: &str) -> Vec<(String, String, usize)> {
        let data = read(name, text.as_bytes(), &Columns::default()).unwrap();
        data.examples
            .into_iter()
            .map(|e| (e.text, one(e.label), e.line))
            .collect()
    }

    fn row(text: &str, label: &str, line: usize) -> (String, String, usize) {
        (text.into(), label.into(), line)
    }

    #[test]
    fn quotes_commas_and_line_breaks() {
        let text = "text,label\n\"a, \"\"b\"\"\nc\r\nd\",1\n\n\"\",\"2\"\r\ne,3\rf,4";
        assert_eq!(
            rows("d.csv", text),
            [
                row("a, \"b\"\nc\r\nd", "1", 2),
                row("", "2", 6),
                row("e", "3", 7),
                row("f", "4", 8)
            ]
        );
    }

    #[test]
    fn tsv_has_no_quotes() {
        let text = "text\tlabel\n\"a\" b, c\t1\n\"d\t2\n";
        assert_eq!(
            rows("d.tsv", text),
            [row("\"a\" b, c", "1", 2), row("\"d", "2", 3)]
        );
    }

    #[test]
    fn malformed_rows_name_their_line() {
        for (text, line, want) in [
            (
                "text,label\na,1\n\"b,2\nc,3\n",
                3,
                "field 1 opens a quote that is never closed",
            ),
            (
                "text,label\n\"a\nb\",1\nc,\"2",
                4,
                "field 2 opens a quote that is never closed",
            ),
            ("text,label\na \"b\",1\n", 2, "field 1 holds a quote"),
            (
                "text,label\n\"a\" b,1\n",
                2,
                "field 1 goes on after its closing quote",
            ),
            ("text,label\na,b,1\n", 2, "the row has 3 fields, expected 2"),
            (
                "text,label\r\na,1\r\n\r\nb\r\n",
                4,
                "the row has 1 fields, expected 2",
            ),
            (
                "text,label\na,1\nb,\n",
                3,
                "the label in column `label` is empty",
            ),
            (
                "text,lable\na,1\n",
                1,
                "the column `label` is missing; there is `text` and `lable`",
            ),
            ("text;label\na;1\n", 1, "there is `text;label`"),
            (
                "\ntext,label,text\na,1,b\n",
                2,
                "the column `text` stands twice in the header",
            ),
        ] {
            let said = refused(text);
            assert!(
                said.starts_with(&format!(":{line}: ")) && said.contains(want),
                "{text:?}: {said}"
            );
        }
    }

    #[test]
    fn a_misspelt_column_is_suggested() {
        use miette::Diagnostic;
        let error = read("d.csv", b"text,lable\na,1\n", &Columns::default()).unwrap_err();
        assert!(error.help().unwrap().to_string().contains("`lable`"));
    }

    #[test]
    fn agrees_with_the_csv_crate_on_what_it_writes() {
        let pieces = [
            "a", ",", "\"", "\n", "\r\n", "\r", "é", " ", "\"\"", "\t", "",
        ];
        let mut state = 12345u64;
        let mut draw = |below: usize| {
            // Knuth's linear congruential generator; the high bits are good enough to mix pieces.
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        for _ in 0..300 {
            let mut table = Vec::new();
            for _ in 0..1 + draw(6) {
                let mut field = || {
                    (0..draw(6))
                        .map(|_| pieces[draw(pieces.len())])
                        .collect::<String>()
                };
                table.push((field(), format!("{}x", field())));
            }
            let mut writer = csv::Writer::from_writer(Vec::new());
            writer.write_record(["text", "label"]).unwrap();
            for (text, label) in &table {
                writer.write_record([text, label]).unwrap();
            }
            let bytes = writer.into_inner().unwrap();
            let got: Vec<(String, String)> = read("d.csv", &bytes, &Columns::default())
                .unwrap()
                .examples
                .into_iter()
                .map(|e| (e.text, one(e.label)))
                .collect();
            assert_eq!(got, table, "{:?}", String::from_utf8_lossy(&bytes));
        }
    }
}
