//! Texts whose words have labels, in JSON Lines: a list of words and one of labels, or a text and labelled spans of it.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde_json::Value;

use super::jsonl::{LINES_EACH, Row, lines_of, wrong_type};
use super::label::Label;
use super::spans::{self, Span};
use super::{Columns, Example};
use crate::error::{Error, Result};
use crate::tags::OUTSIDE;

/// Column of the words where none is named...
pub const TOKENS: &str = "tokens";
/// ...and of a text, where a row has no such column.
const TEXT: &str = "text";
/// Column of the labels where none is named...
pub const LABELS: &str = "labels";
/// ...and others, in place of a column that a row does not have.
const OTHER_LABELS: [&str; 5] = ["ner_tags", "tags", "spans", "entities", "label"];

/// The words of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words {
    /// The bytes of each in the row's text; they rise and do not overlap.
    pub spans: Vec<Range<usize>>,
    /// How the file has them.
    pub form: Form,
}

/// How a file has words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// In a text, where they were found.
    Text,
    /// In a list.
    List,
    /// Each on a line of its own.
    Lines,
}

impl Words {
    /// The words of a list, and the text that they make with a space between each two.
    pub(super) fn joined(words: &[impl AsRef<str>], form: Form) -> (String, Words) {
        let mut text = String::new();
        let mut spans = Vec::with_capacity(words.len());
        for (i, word) in words.iter().enumerate() {
            if i > 0 {
                text.push(' ');
            }
            let start = text.len();
            text.push_str(word.as_ref());
            spans.push(start..text.len());
        }
        (text, Words { spans, form })
    }

    /// The words of a text: runs of letters, runs of digits, and every other character but white space by itself; an
    /// ideograph is a word. No tokenizer has a part in it, so that the same text has the same words for every model.
    pub fn of_text(text: &str) -> Words {
        #[derive(PartialEq, Clone, Copy)]
        enum Kind {
            Letter,
            Digit,
            Alone,
        }
        let mut spans: Vec<Range<usize>> = Vec::new();
        let mut last = None;
        for (at, c) in text.char_indices() {
            let kind = match c {
                c if c.is_whitespace() => {
                    last = None;
                    continue;
                }
                c if is_ideograph(c) => Kind::Alone,
                c if c.is_numeric() => Kind::Digit,
                c if c.is_alphabetic() => Kind::Letter,
                // It belongs to the character before.
                c if is_mark(c) => last.unwrap_or(Kind::Alone),
                _ => Kind::Alone,
            };
            let end = at + c.len_utf8();
            let joins = last == Some(kind) && (kind != Kind::Alone || is_mark(c));
            match spans.last_mut().filter(|_| joins) {
                Some(span) => span.end = end,
                None => spans.push(at..end),
            }
            last = Some(kind);
        }
        let form = Form::Text;
        Words { spans, form }
    }
}

/// Characters that no white space separates from the next word, and that tokenizers of the BERT family take apart.
fn is_ideograph(c: char) -> bool {
    matches!(c, '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{2fa1f}')
}

/// Marks on letters that are no letters themselves.
fn is_mark(c: char) -> bool {
    matches!(c,
        '\u{300}'..='\u{36f}' | '\u{483}'..='\u{489}' | '\u{591}'..='\u{5bd}' | '\u{64b}'..='\u{65f}'
        | '\u{900}'..='\u{963}' | '\u{966}'..='\u{dff}' | '\u{e31}' | '\u{e34}'..='\u{e3a}' | '\u{e47}'..='\u{e4e}'
        | '\u{1ab0}'..='\u{1aff}' | '\u{1dc0}'..='\u{1dff}' | '\u{200d}' | '\u{20d0}'..='\u{20ff}' | '\u{fe00}'..='\u{fe0f}'
        | '\u{fe20}'..='\u{fe2f}')
}

/// The examples of a JSON Lines text, and what the user should know of them.
pub(super) fn parse(
    path: &Path,
    text: &str,
    columns: &Columns,
) -> Result<(Vec<Example>, Vec<String>)> {
    let rows: Vec<Result<(Example, bool)>> = lines_of(text)
        .par_iter()
        .with_min_len(LINES_EACH)
        .map(|&(line, content)| example(path, line, content, columns))
        .collect();
    // The first error of the file, whichever was found first.
    let rows = rows.into_iter().collect::<Result<Vec<_>>>()?;
    let mut widened = rows.iter().filter(|(_, widened)| *widened);
    let note = widened.next().map(|(first, _)| {
        format!(
            "{}: {} rows have spans that begin or end inside a word, the first in line {}; they were taken as whole words",
            path.display(),
            1 + widened.count(),
            first.line
        )
    });
    let examples = rows.into_iter().map(|(example, _)| example).collect();
    Ok((examples, note.into_iter().collect()))
}

/// The value of a column: of `name`, or if that is the usual one and not there, of one of some others.
fn column<'r>(
    row: &'r Row,
    (path, line): (&Path, usize),
    (key, name): (&str, &'r str),
    (usual, others): (&str, &[&'static str]),
) -> Result<(&'r str, &'r Value)> {
    if name == usual && row.get(name).is_none() {
        let other = others.iter().find_map(|&other| {
            let value = row.get(other)?;
            Some((other, value))
        });
        if let Some(found) = other {
            return Ok(found);
        }
    }
    Ok((name, row.column(path, line, key, name)?))
}

/// A row, and whether a span of it was widened.
fn example(path: &Path, line: usize, content: &str, columns: &Columns) -> Result<(Example, bool)> {
    const EXAMPLE: &str =
        "{\"tokens\": [\"Graft\", \"Ltd\"], \"labels\": [\"B-party\", \"I-party\"]}";
    let row = Row::parse(path, line, content, EXAMPLE)?;
    let place = (path, line);
    let named = ("text", columns.text.as_str());
    let (name, value) = column(&row, place, named, (TOKENS, &[TEXT]))?;
    let (text, words) = match value {
        Value::String(text) => (text.clone(), Words::of_text(text)),
        Value::Array(words) => {
            let words: Vec<&str> = words
                .iter()
                .map(|word| match word {
                    Value::String(word) => Ok(word.as_str()),
                    other => Err(wrong_type(path, line, name, other, "a list of strings")),
                })
                .collect::<Result<_>>()?;
            Words::joined(&words, Form::List)
        }
        other => {
            let expected = "a list of words, or a text";
            return Err(wrong_type(path, line, name, other, expected));
        }
    };
    let mut widened = false;
    let label = match columns.label.as_deref() {
        None => None,
        Some(label) => {
            if words.spans.is_empty() {
                return Err(without_words(path, line));
            }
            let named = ("label", label);
            let (name, value) = column(&row, place, named, (LABELS, &OTHER_LABELS))?;
            let labels = match (given(value, name, place)?, words.form) {
                (Given::Spans(spans), Form::Text) => {
                    let (labels, wider) = spans::labels(&text, &words.spans, spans, place)?;
                    widened = wider;
                    labels
                }
                (Given::Labels(none), Form::Text) if none.is_empty() => {
                    vec![OUTSIDE.to_owned(); words.spans.len()]
                }
                (Given::Labels(labels), Form::List | Form::Lines) => {
                    let (found, expected) = (labels.len(), words.spans.len());
                    if found != expected {
                        let what = format!("the row has {expected} words and {found} labels");
                        let help = "give each word one label; `O` where it has none";
                        return Err(Error::data(path, Some(line), what, help));
                    }
                    labels
                }
                (Given::Labels(_), Form::Text) => {
                    let what = format!(
                        "`{}` has a label for each word, and the row has a text and no list of words",
                        name.escape_debug()
                    );
                    let help = "give the words as a list in `tokens`, or spans of the text with start, end and label";
                    return Err(Error::data(path, Some(line), what, help));
                }
                (Given::Spans(_), _) => {
                    let what = format!(
                        "`{}` has spans of a text, and the row has a list of words",
                        name.escape_debug()
                    );
                    let help = "give the text in `text`, or a label for each word in `labels`";
                    return Err(Error::data(path, Some(line), what, help));
                }
            };
            Some(Label::Words(labels))
        }
    };
    let example = Example {
        text,
        text_pair: None,
        label,
        words: Some(words),
        line,
    };
    Ok((example, widened))
}

/// The error for a row whose labels would be those of no word.
pub(super) fn without_words(path: &Path, line: usize) -> Error {
    let what = "the row has no word";
    Error::data(path, Some(line), what, "give it words, or remove it")
}

/// What a row gives labels to.
enum Given {
    /// Each word, one
    Labels(Vec<String>),
    /// Spans of the text
    Spans(Vec<Span>),
}

fn given(value: &Value, name: &str, (path, line): (&Path, usize)) -> Result<Given> {
    let expected = "a list of labels, or of spans with start, end and label";
    let wrong = |found: &Value| wrong_type(path, line, name, found, expected);
    let Value::Array(list) = value else {
        return Err(wrong(value));
    };
    match list.first() {
        Some(Value::Object(_) | Value::Array(_)) => {
            let spans = list.iter().enumerate();
            let spans = spans.map(|(i, span)| Span::read(span, i + 1, (path, line)));
            Ok(Given::Spans(spans.collect::<Result<_>>()?))
        }
        _ => {
            let labels = list.iter().enumerate().map(|(i, label)| match label {
                Value::String(label) if label.is_empty() => {
                    let what = format!("the label of word {} is empty", i + 1);
                    let help = "give it a label; `O` where it has none";
                    Err(Error::data(path, Some(line), what, help))
                }
                Value::String(label) => Ok(label.clone()),
                Value::Number(n) if n.is_i64() || n.is_u64() => Ok(n.to_string()),
                other => Err(wrong(other)),
            });
            Ok(Given::Labels(labels.collect::<Result<_>>()?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Dataset;
    use super::super::tests::{of_words, read, refusal};
    use super::*;

    fn words(example: &Example) -> Vec<&str> {
        let words = example.words.as_ref().unwrap();
        let spans = words.spans.iter();
        spans.map(|span| &example.text[span.clone()]).collect()
    }

    fn labels(example: &Example) -> &[String] {
        example.label.as_ref().unwrap().names()
    }

    fn of(row: &str) -> Dataset {
        read("d.jsonl", row.as_bytes(), &of_words()).unwrap()
    }

    #[test]
    fn lists_of_words_and_labels() {
        for name in ["labels", "ner_tags", "tags"] {
            let row = format!(
                "{{\"tokens\": [\"Graft\", \"Ltd\", \"é\"], \"{name}\": [\"B-p\", \"I-p\", \"O\"]}}"
            );
            let data = of(&row);
            let example = &data.examples[0];
            assert_eq!(example.text, "Graft Ltd é");
            assert_eq!(words(example), ["Graft", "Ltd", "é"]);
            assert_eq!(labels(example), ["B-p", "I-p", "O"]);
            assert_eq!(example.words.as_ref().unwrap().form, Form::List);
        }
        // Numbers are names, as they are elsewhere.
        assert_eq!(
            labels(&of("{\"tokens\": [\"a\"], \"labels\": [7]}").examples[0]),
            ["7"]
        );
        // A column that is named is the one that is read.
        let named = Columns {
            text: "words".into(),
            label: Some("pos".into()),
            ..of_words()
        };
        let row = "{\"words\": [\"a\"], \"pos\": [\"x\"], \"tokens\": 1, \"labels\": 2}";
        let data = read("d.jsonl", row.as_bytes(), &named).unwrap();
        assert_eq!(labels(&data.examples[0]), ["x"]);
        let said = refusal("d.jsonl", b"{\"text\": \"a\", \"labels\": []}", &named);
        assert!(said.contains("the column `words` is missing"), "{said}");
    }

    #[test]
    fn spans_of_a_text_count_characters() {
        for spans in [
            "[{\"start\": 3, \"end\": 11, \"label\": \"party\"}]",
            "[{\"start_offset\": 3, \"end_offset\": 11, \"label\": \"party\", \"id\": 4}]",
            "[[3, 11, \"party\"]]",
            // White space at its ends is no part of a word.
            "[[2, 12, \"party\"]]",
        ] {
            for name in ["spans", "entities", "labels", "label"] {
                let row = format!("{{\"text\": \"né Ärzte AG pays 5,000\", \"{name}\": {spans}}}");
                let data = of(&row);
                let example = &data.examples[0];
                assert_eq!(
                    words(example),
                    ["né", "Ärzte", "AG", "pays", "5", ",", "000"]
                );
                let expected = ["O", "B-party", "I-party", "O", "O", "O", "O"];
                assert_eq!(labels(example), expected, "{row}");
                assert!(data.notes.is_empty());
            }
        }
        assert_eq!(
            labels(&of("{\"text\": \"a b\", \"spans\": []}").examples[0]),
            ["O", "O"]
        );
        // Two beside each other, in any order.
        let data = of("{\"text\": \"a b c\", \"spans\": [[2, 5, \"y\"], [0, 1, \"y\"]]}");
        assert_eq!(labels(&data.examples[0]), ["B-y", "B-y", "I-y"]);
    }

    #[test]
    fn a_span_that_ends_inside_a_word_has_all_of_it() {
        let text = "{\"text\": \"a\", \"spans\": []}\n{\"text\": \"the Lessors pay\", \"spans\": [[4, 10, \"role\"]]}\n";
        let data = of(text);
        assert_eq!(labels(&data.examples[1]), ["O", "B-role", "O"]);
        assert!(
            data.notes[0].contains("1 rows have spans"),
            "{:?}",
            data.notes
        );
        assert!(data.notes[0].contains("line 2"), "{:?}", data.notes);
    }

    #[test]
    fn words_of_texts() {
        let of = |text: &'static str| -> Vec<&str> {
            let words = Words::of_text(text);
            words.spans.into_iter().map(|span| &text[span]).collect()
        };
        assert_eq!(
            of("it's 12km, ok?"),
            ["it", "'", "s", "12", "km", ",", "ok", "?"]
        );
        assert_eq!(of("e\u{301}te\u{301} --"), ["e\u{301}te\u{301}", "-", "-"]);
        assert_eq!(of("हिन्दी में"), ["हिन्दी", "में"]);
        assert_eq!(of("在北京abc"), ["在", "北", "京", "abc"]);
        assert_eq!(of(" \t\n"), [""; 0]);
        assert_eq!(of("\u{301}a"), ["\u{301}", "a"]);
    }

    #[test]
    fn what_does_not_fit_names_its_line() {
        let good = "{\"tokens\": [\"a\"], \"labels\": [\"O\"]}\n";
        for (bad, want) in [
            (
                "{\"tokens\": [\"a\", \"b\"], \"labels\": [\"O\"]}",
                "the row has 2 words and 1 labels",
            ),
            (
                "{\"tokens\": [\"a\"], \"labels\": []}",
                "the row has 1 words and 0 labels",
            ),
            ("{\"tokens\": [], \"labels\": []}", "the row has no word"),
            ("{\"text\": \" \", \"spans\": []}", "the row has no word"),
            (
                "{\"tokens\": [\"a\", 3], \"labels\": [\"O\", \"O\"]}",
                "is the number 3, expected a list of strings",
            ),
            (
                "{\"tokens\": 3, \"labels\": []}",
                "is the number 3, expected a list of words, or a text",
            ),
            (
                "{\"tokens\": [\"a\"]}",
                "the column `labels` is missing; there is `tokens`",
            ),
            (
                "{\"labels\": [\"O\"]}",
                "the column `tokens` is missing; there is `labels`",
            ),
            (
                "{\"tokens\": [\"a\"], \"labels\": [\"\"]}",
                "the label of word 1 is empty",
            ),
            (
                "{\"tokens\": [\"a\"], \"labels\": [null]}",
                "is null, expected a list of labels",
            ),
            (
                "{\"tokens\": [\"a\"], \"labels\": \"O\"}",
                "is a string, expected a list of labels",
            ),
            (
                "{\"tokens\": [\"a\"], \"labels\": [[0, 1, \"x\"]]}",
                "`labels` has spans of a text, and the row has a list of words",
            ),
            (
                "{\"text\": \"a b\", \"labels\": [\"O\", \"O\"]}",
                "`labels` has a label for each word, and the row has a text",
            ),
            (
                "{\"text\": \"a b\", \"spans\": [[0, 9, \"x\"]]}",
                "span 1 (0..9) lies outside of the text, which has 3 characters",
            ),
            (
                "{\"text\": \"a b\", \"spans\": [[1, 1, \"x\"]]}",
                "span 1 (1..1) is empty",
            ),
            (
                "{\"text\": \"a b\", \"spans\": [[2, 1, \"x\"]]}",
                "span 1 (2..1) is empty",
            ),
            (
                "{\"text\": \"a  b\", \"spans\": [[1, 3, \"x\"]]}",
                "span 1 (1..3) is `  `, which has no word in it",
            ),
            (
                "{\"text\": \"a b\", \"spans\": [[0, 3, \"x\"], [2, 3, \"y\"]]}",
                "span 1 (0..3) and span 2 (2..3) have the word `b` in common",
            ),
            (
                "{\"text\": \"ab c\", \"spans\": [[0, 1, \"x\"], [1, 2, \"y\"]]}",
                "have the word `ab` in common",
            ),
            (
                "{\"text\": \"a b\", \"spans\": [[0, 1]]}",
                "span 1 is [0,1], expected start and end in characters, and a label",
            ),
            (
                "{\"text\": \"a b\", \"spans\": [{\"start\": -1, \"end\": 1, \"label\": \"x\"}]}",
                "span 1 is {",
            ),
            (
                "{\"text\": \"a b\", \"spans\": [[0, 1, \"\"]]}",
                "span 1 is [0,1,\"\"], expected",
            ),
        ] {
            let text = format!("{good}{bad}\n{good}");
            let said = refusal("d.jsonl", text.as_bytes(), &of_words());
            assert!(
                said.starts_with(":2: ") && said.contains(want),
                "{bad}: {said}"
            );
        }
    }

    #[test]
    fn texts_without_labels_may_be_empty() {
        let unlabelled = Columns {
            label: None,
            ..of_words()
        };
        let text = "{\"text\": \"\"}\n{\"tokens\": [\"a\", \"b\"], \"labels\": 3}\n";
        let data = read("d.jsonl", text.as_bytes(), &unlabelled).unwrap();
        assert_eq!(words(&data.examples[0]), [""; 0]);
        assert_eq!(words(&data.examples[1]), ["a", "b"]);
        assert!(data.examples.iter().all(|example| example.label.is_none()));
        let said = refusal("d.csv", b"text,label\na,b\n", &of_words());
        assert!(
            said.contains("expected a name ending in .jsonl, .conll"),
            "{said}"
        );
    }
}
