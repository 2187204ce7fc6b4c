//! Predicted labels of words, and the entities that they make.

use std::ops::Range;

use graft_models::WordPlace;
use serde_json::{Map, Value, json};

use crate::data::{Example, Form, Words};
use crate::evaluation::{best_label, labels_of_words, probabilities};
use crate::tags::Tags;

/// What a row says of an example by the logits of its tokens, `[tokens, labels]`. Where labels are tags of entities, and the
/// words were found in a text: `text` and its `entities` with `start`, `end` (in characters), `label`, `text` and `score`;
/// otherwise `tokens`, `labels` and `scores`. Either is what a data file has. A score is the likelihood of the predicted
/// label, of an entity its mean over the words that have tokens of their own.
pub(super) fn row(
    tags: &Tags,
    example: &Example,
    logits: &[Vec<f32>],
    places: &[WordPlace],
) -> Map<String, Value> {
    let none = Words {
        spans: Vec::new(),
        form: Form::Text,
    };
    let words = example.words.as_ref().unwrap_or(&none);
    let labels = labels_of_words(tags, logits, places.iter().copied());
    let scores: Vec<Option<f64>> = places
        .iter()
        .map(|place| likelihood(logits, place))
        .collect();
    let text = &example.text;
    let mut row = Map::new();
    let Some(kinds) = tags.kinds().filter(|_| words.form == Form::Text) else {
        let tokens: Vec<&str> = words.spans.iter().map(|span| &text[span.clone()]).collect();
        let name = |label: &Option<u32>| label.map(|label| &tags.labels()[label as usize]);
        let names: Vec<Option<&String>> = labels.iter().map(name).collect();
        row.insert("tokens".into(), json!(tokens));
        row.insert("labels".into(), json!(names));
        row.insert("scores".into(), json!(scores));
        return row;
    };
    let entities = tags.entities(&labels).into_iter().map(|entity| {
        let span = bytes(&words.spans, &entity.words);
        let start = text[..span.start].chars().count();
        let found = &text[span];
        let known: Vec<f64> = scores[entity.words].iter().copied().flatten().collect();
        json!({
            "start": start,
            "end": start + found.chars().count(),
            "label": kinds[entity.kind],
            "text": found,
            "score": known.iter().sum::<f64>() / known.len().max(1) as f64,
        })
    });
    let entities: Vec<Value> = entities.collect();
    row.insert("text".into(), json!(text));
    row.insert("entities".into(), Value::Array(entities));
    row
}

/// The logits of each word with a token of its own.
pub(super) fn raw(logits: &[Vec<f32>], places: &[WordPlace]) -> Value {
    let of = |place: &WordPlace| match place {
        WordPlace::At(token) => json!(logits[*token as usize]),
        WordPlace::Joined | WordPlace::Cut => Value::Null,
    };
    places.iter().map(of).collect()
}

/// The likelihood of the best label at a word's first token.
fn likelihood(logits: &[Vec<f32>], place: &WordPlace) -> Option<f64> {
    match place {
        WordPlace::At(token) => {
            let row = &logits[*token as usize];
            Some(probabilities(row)[best_label(row) as usize])
        }
        WordPlace::Joined | WordPlace::Cut => None,
    }
}

/// The bytes from the first of some words to the last.
fn bytes(spans: &[Range<usize>], words: &Range<usize>) -> Range<usize> {
    spans[words.start].start..spans[words.end - 1].end
}
