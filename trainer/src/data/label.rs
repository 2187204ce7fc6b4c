//! The label of a row: how files write what a text is.

use std::path::Path;

use graft_models::ProblemType;
use serde_json::Value;

use super::jsonl::{wrong_type, wrong_type_with};
use crate::error::{Error, Result};

/// What a text is.
#[derive(Debug, Clone, PartialEq)]
pub enum Label {
    /// The one label that is right. In JSON a string or an integer, which is then its decimal digits.
    One(String),
    /// All labels that are right, each once, perhaps none. In JSON a list of such, or the one as it is; in a field of a
    /// table names joined by `|`, with white space beside it or not.
    Any(Vec<String>),
    /// The number to predict, in f32's range.
    Number(f32),
    /// The label of each of its words.
    Words(Vec<String>),
}

/// What stands between the names of a field.
const SEPARATOR: char = '|';

/// What JSON has where one label is right...
const ONE: &str = "a string or an integer";
/// ...and where any number of them is.
const ANY: &str = "a list of strings or integers";

/// Where a label stands, for messages.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub path: &'a Path,
    pub line: usize,
    pub column: &'a str,
}

impl Place<'_> {
    fn refuse(self, what: String, help: &str) -> Error {
        Error::data(self.path, Some(self.line), what, help)
    }

    fn column(self) -> String {
        format!("column `{}`", self.column.escape_debug())
    }

    fn empty(self) -> Error {
        let what = format!("the label in {} is empty", self.column());
        self.refuse(what, "give the row a label or remove it")
    }

    fn wrong(self, found: &Value, expected: &str) -> Error {
        wrong_type(self.path, self.line, self.column, found, expected)
    }

    fn other_task(self, found: &Value, help: &str) -> Error {
        wrong_type_with(self.path, self.line, self.column, found, ONE, help)
    }
}

impl Label {
    /// Of a field of a table.
    pub(super) fn of_field(problem: ProblemType, field: &str, at: Place) -> Result<Label> {
        match problem {
            ProblemType::SingleLabel if field.is_empty() => Err(at.empty()),
            ProblemType::SingleLabel => Ok(Label::One(field.to_owned())),
            ProblemType::MultiLabel if field.trim().is_empty() => Ok(Label::Any(Vec::new())),
            ProblemType::MultiLabel => {
                let names = field.split(SEPARATOR).map(|name| match name.trim() {
                    "" => Err(at.refuse(
                        format!("a label in {} is empty", at.column()),
                        "remove the separator that has no name beside it",
                    )),
                    name => Ok(name.to_owned()),
                });
                any(names, at)
            }
            ProblemType::Tokens => panic!("no field of a table has labels of words"),
            ProblemType::Regression => match field.trim().parse() {
                Ok(number) => in_range(number, at),
                Err(_) => {
                    let column = at.column();
                    let found = field.escape_debug();
                    let what = format!("the {column} is `{found}`, expected a number");
                    Err(at.refuse(what, "write a number such as 3.5 there, or remove the row"))
                }
            },
        }
    }

    /// Of a member of an object.
    pub(super) fn of_json(problem: ProblemType, value: &Value, at: Place) -> Result<Label> {
        match (problem, value) {
            (ProblemType::SingleLabel, Value::Array(_)) => {
                let help = "any number of labels for a text is what --task multilabel learns";
                Err(at.other_task(value, help))
            }
            (ProblemType::SingleLabel, Value::Number(number)) if number.is_f64() => {
                Err(at.other_task(value, "numbers are what --task regression learns"))
            }
            (ProblemType::SingleLabel, value) => Ok(Label::One(name(value, ONE, at)?)),
            (ProblemType::MultiLabel, Value::Array(names)) => {
                any(names.iter().map(|value| name(value, ANY, at)), at)
            }
            (ProblemType::MultiLabel, value) => any([name(value, ANY, at)], at),
            (ProblemType::Tokens, _) => panic!("labels of words are read with their words"),
            (ProblemType::Regression, value) => match value.as_f64() {
                Some(number) => in_range(number, at),
                None => Err(at.wrong(value, "a number")),
            },
        }
    }

    /// The labels that are right, where labels are what is learnt.
    pub fn names(&self) -> &[String] {
        match self {
            Label::One(name) => std::slice::from_ref(name),
            Label::Any(names) | Label::Words(names) => names,
            Label::Number(_) => &[],
        }
    }
}

/// The name that a JSON value is, or is a part of what is `expected`.
fn name(value: &Value, expected: &str, at: Place) -> Result<String> {
    match value {
        Value::String(name) if name.is_empty() => Err(at.empty()),
        Value::String(name) => Ok(name.clone()),
        Value::Number(number) if number.is_i64() || number.is_u64() => Ok(number.to_string()),
        other => Err(at.wrong(other, expected)),
    }
}

fn any(names: impl IntoIterator<Item = Result<String>>, at: Place) -> Result<Label> {
    let mut all: Vec<String> = Vec::new();
    for name in names {
        let name = name?;
        if all.contains(&name) {
            let column = at.column();
            let what = format!(
                "the label `{}` stands twice in {column}",
                name.escape_debug()
            );
            return Err(at.refuse(what, "remove one of the two"));
        }
        all.push(name);
    }
    Ok(Label::Any(all))
}

fn in_range(number: f64, at: Place) -> Result<Label> {
    let short = number as f32;
    if !short.is_finite() {
        let what = format!("the {} is {number}, expected a finite number", at.column());
        let help = "write a number whose magnitude is at most 3e38, or remove the row";
        return Err(at.refuse(what, help));
    }
    Ok(Label::Number(short))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{read, refusal};
    use super::super::{Columns, Dataset};
    use super::*;

    fn columns(problem: ProblemType) -> Columns {
        Columns {
            problem,
            ..Columns::default()
        }
    }

    fn labels(data: Dataset) -> Vec<Label> {
        data.examples
            .into_iter()
            .map(|e| e.label.unwrap())
            .collect()
    }

    /// A file whose one row has this label is refused in words with `want` among them.
    fn refuses(name: &str, label: &str, columns: &Columns, want: &str) {
        let text = match name {
            "d.csv" => format!("text,label\nx,{label}\n"),
            _ => format!("{{\"text\": \"x\", \"label\": {label}}}\n"),
        };
        let said = refusal(name, text.as_bytes(), columns);
        assert!(said.contains(want), "{label}: {said}");
    }

    #[test]
    fn any_number_of_labels() {
        let columns = columns(ProblemType::MultiLabel);
        let any = |names: &[&str]| Label::Any(names.iter().map(|&name| name.into()).collect());
        let expected = [any(&["a", "b c"]), any(&[]), any(&["7"])];
        for (name, text) in [
            (
                "d.jsonl",
                "{\"text\": \"x\", \"label\": [\"a\", \"b c\"]}\n{\"text\": \"y\", \"label\": []}\n\
                 {\"text\": \"z\", \"label\": 7}\n",
            ),
            ("d.csv", "text,label\nx,a | b c\ny,\nz,7\n"),
            ("d.tsv", "text\tlabel\nx\ta|b c\ny\t \nz\t7\n"),
        ] {
            let data = read(name, text.as_bytes(), &columns).unwrap();
            assert_eq!(labels(data), expected, "{name}");
        }
        for (name, row, want) in [
            ("d.csv", "a||b", ":2: a label in column `label` is empty"),
            (
                "d.csv",
                "a|b|a",
                ":2: the label `a` stands twice in column `label`",
            ),
            (
                "d.jsonl",
                "[\"a\", \"\"]",
                ":1: the label in column `label` is empty",
            ),
            (
                "d.jsonl",
                "[\"a\", 1.5]",
                "is the number 1.5, expected a list of strings",
            ),
            (
                "d.jsonl",
                "null",
                "is null, expected a list of strings or integers",
            ),
            ("d.jsonl", "[1, \"1\"]", "the label `1` stands twice"),
        ] {
            refuses(name, row, &columns, want);
        }
    }

    #[test]
    fn numbers() {
        let columns = columns(ProblemType::Regression);
        let expected = [3.5, -2.0, 1e3].map(Label::Number);
        for (name, text) in [
            (
                "d.jsonl",
                "{\"text\": \"x\", \"label\": 3.5}\n{\"text\": \"y\", \"label\": -2}\n\
                 {\"text\": \"z\", \"label\": 1e3}\n",
            ),
            ("d.csv", "text,label\nx,3.5\ny, -2 \nz,1e3\n"),
        ] {
            let data = read(name, text.as_bytes(), &columns).unwrap();
            assert_eq!(labels(data), expected, "{name}");
        }
        for (name, row, want) in [
            (
                "d.csv",
                "high",
                ":2: the column `label` is `high`, expected a number",
            ),
            (
                "d.csv",
                "",
                ":2: the column `label` is ``, expected a number",
            ),
            ("d.csv", "NaN", "is NaN, expected a finite number"),
            ("d.csv", "1e39", "expected a finite number"),
            (
                "d.jsonl",
                "\"3.5\"",
                "the column `label` is a string, expected a number",
            ),
            ("d.jsonl", "[3.5]", "is an array, expected a number"),
        ] {
            refuses(name, row, &columns, want);
        }
    }

    #[test]
    fn what_is_no_single_label_is_said_to_be_another_task() {
        use miette::Diagnostic;
        for (label, task) in [
            ("[\"a\"]", "--task multilabel"),
            ("1.5", "--task regression"),
        ] {
            let text = format!("{{\"text\": \"x\", \"label\": {label}}}\n");
            let error = read("d.jsonl", text.as_bytes(), &Columns::default()).unwrap_err();
            assert!(error.help().unwrap().to_string().contains(task), "{error}");
        }
    }
}
