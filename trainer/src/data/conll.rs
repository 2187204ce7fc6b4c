//! A word and its label on each line, a blank line between texts, as the CoNLL tasks have it: the word is the first
//! column, the label the last, and tabs or spaces stand between them. Lines that begin with `-DOCSTART-` are no words.

use std::path::Path;

use super::Example;
use super::label::Label;
use super::words::{Form, Words};
use crate::error::{Error, Result};

const AS_LINES: &str = "write a word and its label on each line, with a tab between them";

/// The names' endings, in small letters.
pub(super) const ENDINGS: [&str; 8] =
    ["conll", "bio", "iob", "iob2", "bioes", "tsv", "txt", "tags"];

const BETWEEN_DOCUMENTS: &str = "-DOCSTART-";

/// The texts of a file, each with the line of its first word; with `labels` or the words alone.
pub(super) fn parse(path: &Path, text: &str, labels: bool) -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    let mut rows: Vec<(&str, &str)> = Vec::new();
    // Of the first word's line, for all lines.
    let mut columns: Option<(usize, usize)> = None;
    let mut begun = 0;
    let mut end = |rows: &mut Vec<(&str, &str)>, line: usize| {
        if rows.is_empty() {
            return;
        }
        let words: Vec<&str> = rows.iter().map(|(word, _)| *word).collect();
        let (text, words) = Words::joined(&words, Form::Lines);
        let tags = rows.iter().map(|(_, label)| (*label).to_owned());
        examples.push(Example {
            text,
            text_pair: None,
            label: labels.then(|| Label::Words(tags.collect())),
            words: Some(words),
            line,
        });
        rows.clear();
    };
    for (line, content) in (1..).zip(text.lines()) {
        let content = content.trim_end();
        if content.is_empty() || content.starts_with(BETWEEN_DOCUMENTS) {
            end(&mut rows, begun);
            continue;
        }
        let fields: Vec<&str> = match content.contains('\t') {
            true => content.split('\t').map(str::trim).collect(),
            false => content
                .split(' ')
                .filter(|field| !field.is_empty())
                .collect(),
        };
        let wrong = |what: String| Err(Error::data(path, Some(line), what, AS_LINES));
        let (first, expected) = *columns.get_or_insert((line, fields.len()));
        let count = fields.len();
        if count != expected {
            let what = format!("the line has {count} columns, expected {expected} as line {first}");
            return wrong(what);
        }
        if labels && count < 2 {
            let what = format!("`{}` has no label", fields[0].escape_debug());
            return wrong(what);
        }
        let (word, label) = (fields[0], fields[count - 1]);
        if word.is_empty() || label.is_empty() {
            let which = if word.is_empty() { "word" } else { "label" };
            let what = format!("the {which} is empty");
            return wrong(what);
        }
        if rows.is_empty() {
            begun = line;
        }
        rows.push((word, label));
    }
    end(&mut rows, begun);
    Ok(examples)
}

#[cfg(test)]
mod tests {
    use super::super::Columns;
    use super::super::tests::{of_words, read, refusal};

    #[test]
    fn files_of_the_conll_tasks() {
        let four = "-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\nPeter NNP B-NP B-PER\nBlackburn NNP I-NP I-PER\n";
        let two = "EU\tB-ORG\r\nrejects\tO\r\n\r\nPeter\tB-PER\r\nBlackburn\tI-PER";
        for (name, text, lines) in [
            ("d.conll", four, [3, 7]),
            ("d.TXT", two, [1, 4]),
            ("d.tsv", two, [1, 4]),
            ("d.iob2", &two.replace('\t', "   "), [1, 4]),
        ] {
            let data = read(name, text.as_bytes(), &of_words()).unwrap();
            let found = data.examples.iter();
            let found: Vec<_> = found
                .map(|e| (e.line, e.text.as_str(), e.label.as_ref().unwrap().names()))
                .collect();
            let labels = [["B-ORG", "O"], ["B-PER", "I-PER"]].map(|all| all.map(str::to_owned));
            let expected = [
                (lines[0], "EU rejects", &labels[0][..]),
                (lines[1], "Peter Blackburn", &labels[1][..]),
            ];
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn words_alone_are_enough_where_no_label_is_asked_for() {
        let columns = Columns {
            label: None,
            ..of_words()
        };
        let data = read("d.conll", b"one\ntwo\n\nthree\n", &columns).unwrap();
        let texts: Vec<&str> = data.examples.iter().map(|e| e.text.as_str()).collect();
        assert_eq!(texts, ["one two", "three"]);
    }

    #[test]
    fn lines_that_do_not_fit_are_named() {
        for (text, want) in [
            (
                "a O\nb\n",
                ":2: the line has 1 columns, expected 2 as line 1",
            ),
            (
                "a O\n\nthe quick fox\n",
                ":3: the line has 3 columns, expected 2 as line 1",
            ),
            ("a\nb\n", ":1: `a` has no label"),
            ("a\tO\n\tO\n", ":2: the word is empty"),
            ("a\tx\tO\nb\t\t\n", ":2: the line has 1 columns"),
            ("-DOCSTART- O\n\n", ": the file holds no example"),
            ("", ": the file is empty"),
        ] {
            let said = refusal("d.conll", text.as_bytes(), &of_words());
            assert!(said.starts_with(want), "{text:?}: {said}");
        }
    }
}
