//! Byte-pair encoding in the pipelines of GPT-2, Llama 2, Mistral, Llama 3, Qwen and Gemma: 10,000 lines of mixed
//! scripts, emoji and control characters give exactly the ids, and the texts of these, that the reference gives.

use std::collections::{BTreeMap, HashSet};
use std::fs;

use graft_models::Tokenizer;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::lines::{COUNT, fixture, lines};

const BLOCK: usize = 100;

pub const KINDS: [&str; 6] = ["gpt2", "llama2", "mistral", "llama3", "qwen2", "gemma"];

#[derive(Deserialize)]
struct Expected {
    lines: String,
    vocabulary: usize,
    tokens: usize,
    used: usize,
    round_trips: usize,
    ids: Vec<String>,
    decoded: Vec<String>,
    decoded_without_specials: Vec<String>,
    samples: BTreeMap<usize, Vec<u32>>,
}

fn expected(kind: &str) -> Expected {
    serde_json::from_slice(&fs::read(fixture(&format!("{kind}.expected.json"))).unwrap()).unwrap()
}

pub fn tokenizer(kind: &str) -> Tokenizer {
    let bytes = fs::read(fixture(&format!("{kind}.json"))).unwrap();
    Tokenizer::from_bytes(kind, &bytes, expected(kind).vocabulary).unwrap()
}

fn hash_texts<S: AsRef<str>>(texts: &[S]) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.as_ref().len() as u32).to_le_bytes());
        hash.update(text.as_ref());
    }
    hex(&hash.finalize())
}

fn hash_ids(lists: &[Vec<u32>]) -> String {
    let mut hash = Sha256::new();
    for ids in lists {
        hash.update((ids.len() as u32).to_le_bytes());
        ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    }
    hex(&hash.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes[..8].iter().map(|b| format!("{b:02x}")).collect()
}

fn check(kind: &str) {
    let lines = lines();
    let expected = expected(kind);
    assert_eq!(
        hash_texts(&lines),
        expected.lines,
        "the lines themselves are others"
    );
    let t = tokenizer(kind);
    assert_eq!(t.tokens(), expected.vocabulary);
    let texts: Vec<(&str, Option<&str>)> = lines.iter().map(|line| (line.as_str(), None)).collect();
    // Lines that give nothing are refused by `encode`; each of these gives something.
    let ids: Vec<Vec<u32>> = t
        .encode_batch(&texts, usize::MAX)
        .unwrap()
        .into_iter()
        .map(|encoding| encoding.ids)
        .collect();
    for (&at, sample) in &expected.samples {
        assert_eq!(&ids[at], sample, "line {at}: {:?}", lines[at]);
    }
    assert_eq!(expected.samples.len(), 20);
    let used: HashSet<u32> = ids.iter().flatten().copied().collect();
    let bare: Vec<Vec<u32>> = lines
        .iter()
        .map(|line| t.encode_bare(line).unwrap())
        .collect();
    let whole: Vec<String> = bare
        .iter()
        .map(|ids| t.decode(ids, false).unwrap())
        .collect();
    let clean: Vec<String> = ids.iter().map(|ids| t.decode(ids, true).unwrap()).collect();
    for block in 0..COUNT / BLOCK {
        let range = block * BLOCK..(block + 1) * BLOCK;
        let at = format!("{kind}: lines {range:?}");
        assert_eq!(
            hash_ids(&ids[range.clone()]),
            expected.ids[block],
            "{at}: ids"
        );
        assert_eq!(
            hash_texts(&whole[range.clone()]),
            expected.decoded[block],
            "{at}: texts"
        );
        assert_eq!(
            hash_texts(&clean[range]),
            expected.decoded_without_specials[block],
            "{at}: texts without special tokens"
        );
    }
    assert_eq!(ids.iter().map(Vec::len).sum::<usize>(), expected.tokens);
    assert_eq!(used.len(), expected.used);
    let round_trips = lines.iter().zip(&whole).filter(|(a, b)| a == b).count();
    assert_eq!(round_trips, expected.round_trips);
    // Where nothing is normalised, every text survives.
    if matches!(kind, "gpt2" | "llama3") {
        assert_eq!(round_trips, COUNT);
    }
    // Spans: the same ids, in order, on borders of characters; nothing of the text is left out, but where NFC reorders
    // the marks of a letter.
    for (line, ids) in lines.iter().zip(&bare) {
        let tokens = t.encode_spans(line).unwrap();
        let same = tokens.iter().map(|token| token.id);
        assert!(same.eq(ids.iter().copied()), "{line:?}");
        let mut reached = 0;
        for token in &tokens {
            assert!(line.get(token.span.clone()).is_some(), "{line:?}");
            assert!(kind == "qwen2" || token.span.start <= reached, "{line:?}");
            reached = reached.max(token.span.end);
        }
        assert_eq!(reached, line.len(), "{line:?}");
    }
}

#[test]
fn gpt2() {
    check("gpt2");
}

#[test]
fn llama2() {
    check("llama2");
}

#[test]
fn mistral() {
    check("mistral");
}

#[test]
fn llama3() {
    check("llama3");
}

#[test]
fn qwen2() {
    check("qwen2");
}

#[test]
fn gemma() {
    check("gemma");
}

#[test]
fn a_vocabulary_larger_than_the_models_is_refused() {
    for kind in KINDS {
        let bytes = fs::read(fixture(&format!("{kind}.json"))).unwrap();
        let tokens = expected(kind).vocabulary;
        assert!(Tokenizer::from_bytes("t.json", &bytes, tokens).is_ok());
        // A padded embedding is fine.
        assert!(Tokenizer::from_bytes("t.json", &bytes, tokens + 50).is_ok());
        let error = Tokenizer::from_bytes("t.json", &bytes, tokens - 1)
            .unwrap_err()
            .to_string();
        let last = format!(
            "has id {}, but the model's vocab_size is {}",
            tokens - 1,
            tokens - 1
        );
        assert!(error.contains(&last), "{error}");
    }
}
