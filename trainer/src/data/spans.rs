//! Labelled spans of a text, as tools for annotation export them.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::tags::OUTSIDE;

/// A span as it stands in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    /// In characters (Unicode scalar values), the end behind the last one
    characters: Range<usize>,
    label: String,
    /// From 1, for messages
    number: usize,
}

impl Span {
    /// `{"start": 0, "end": 5, "label": "party"}` (also `start_offset` and `end_offset`), or `[0, 5, "party"]`.
    pub fn read(value: &Value, number: usize, (path, line): (&Path, usize)) -> Result<Span> {
        let parts = match value {
            Value::Object(map) => {
                let get = |names: [&str; 2]| names.into_iter().find_map(|name| map.get(name));
                let (start, end) = (get(["start", "start_offset"]), get(["end", "end_offset"]));
                (start, end, map.get("label"))
            }
            Value::Array(list) if list.len() == 3 => (list.first(), list.get(1), list.get(2)),
            _ => (None, None, None),
        };
        let whole = |value: Option<&Value>| usize::try_from(value?.as_u64()?).ok();
        let label = parts
            .2
            .and_then(Value::as_str)
            .filter(|label| !label.is_empty());
        match (whole(parts.0), whole(parts.1), label) {
            (Some(start), Some(end), Some(label)) => Ok(Span {
                characters: start..end,
                label: label.to_owned(),
                number,
            }),
            _ => {
                let found: String = value.to_string().chars().take(60).collect();
                let what = format!(
                    "span {number} is {found}, expected start and end in characters, and a label"
                );
                let help =
                    "write {\"start\": 0, \"end\": 5, \"label\": \"party\"} or [0, 5, \"party\"]";
                Err(Error::data(path, Some(line), what, help))
            }
        }
    }
}

/// The labels of the words of a text: `B-` and `I-` with the label of the span that a word has a part in, else `O`; and
/// whether a span begins or ends inside a word, which then belongs to it as a whole.
///
/// # Errors
/// A span outside of the text, without a word, or that has a word in common with another.
pub(super) fn labels(
    text: &str,
    words: &[Range<usize>],
    mut spans: Vec<Span>,
    (path, line): (&Path, usize),
) -> Result<(Vec<String>, bool)> {
    let wrong = |what: String, help: &str| Error::data(path, Some(line), what, help);
    // Where each character begins, and the end.
    let mut bytes: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    bytes.push(text.len());
    let count = bytes.len() - 1;
    spans.sort_by_key(|span| (span.characters.start, span.characters.end));
    let mut labels = vec![OUTSIDE.to_owned(); words.len()];
    let mut widened = false;
    let mut before: Option<(&Span, usize)> = None;
    for span in &spans {
        let Range { start, end } = span.characters;
        let shown = |span: &Span| {
            let Range { start, end } = span.characters;
            format!("span {} ({start}..{end})", span.number)
        };
        if end > count {
            let what = format!(
                "{} lies outside of the text, which has {count} characters",
                shown(span)
            );
            return Err(wrong(
                what,
                "count characters from 0, the end behind the last one",
            ));
        }
        if start >= end {
            let what = format!("{} is empty", shown(span));
            return Err(wrong(
                what,
                "give the end behind the last character, or remove it",
            ));
        }
        let bytes = bytes[start]..bytes[end];
        let first = words.partition_point(|word| word.end <= bytes.start);
        let behind = words.partition_point(|word| word.start < bytes.end);
        if first >= behind {
            let found = text[bytes].escape_debug().to_string();
            let what = format!("{} is `{found}`, which has no word in it", shown(span));
            return Err(wrong(what, "correct or remove it"));
        }
        if let Some((other, end)) = before.filter(|(_, end)| first < *end) {
            let shared = text[words[end - 1].clone()].escape_debug().to_string();
            let what = format!(
                "{} and {} have the word `{shared}` in common",
                shown(other),
                shown(span)
            );
            return Err(wrong(
                what,
                "a word has one label: remove or shorten one of the two",
            ));
        }
        widened |= words[first].start < bytes.start || words[behind - 1].end > bytes.end;
        for (place, label) in labels[first..behind].iter_mut().enumerate() {
            let letter = if place == 0 { 'B' } else { 'I' };
            *label = format!("{letter}-{}", span.label);
        }
        before = Some((span, behind));
    }
    Ok((labels, widened))
}
