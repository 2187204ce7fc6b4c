//! The contract clauses are what their README says they are.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use graft_models::{ModelConfig, ModelSource, Tokenizer};
use graft_tests::minilm_wheel;
use graft_trainer::data::{Columns, Dataset, Example, Label};

const CLASSES: [&str; 12] = [
    "assignment",
    "confidentiality",
    "dispute_resolution",
    "force_majeure",
    "governing_law",
    "indemnity",
    "insurance",
    "intellectual_property",
    "limitation_of_liability",
    "payment",
    "termination",
    "warranty",
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/contracts")
}

fn clauses(file: &str) -> Vec<Example> {
    let data = Dataset::read(&folder().join(file), &Columns::default()).unwrap();
    data.examples
}

#[test]
fn every_class_has_its_share_of_rows() {
    for (file, rows, each) in [("train.jsonl", 600, 50), ("test.jsonl", 192, 16)] {
        let clauses = clauses(file);
        assert_eq!(clauses.len(), rows);
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for clause in &clauses {
            let Some(Label::One(class)) = &clause.label else {
                panic!("{file}:{}: {:?}", clause.line, clause.label);
            };
            *counts.entry(class).or_default() += 1;
            assert_eq!(clause.text, clause.text.trim(), "{file}:{}", clause.line);
            assert_eq!(clause.text_pair, None);
        }
        let expected: BTreeMap<&str, usize> = CLASSES.map(|class| (class, each)).into();
        assert_eq!(counts, expected, "{file}");
    }
}

/// Lower-case words without punctuation.
fn words(text: &str) -> Vec<String> {
    text.to_lowercase()
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

fn trigrams(words: &[String]) -> HashSet<&[String]> {
    words.windows(3).collect()
}

fn jaccard(a: &HashSet<&[String]>, b: &HashSet<&[String]>) -> f64 {
    let shared = a.intersection(b).count();
    shared as f64 / (a.len() + b.len() - shared).max(1) as f64
}

#[test]
fn no_clause_is_another_one_in_disguise() {
    let (train, test) = (clauses("train.jsonl"), clauses("test.jsonl"));
    let all: Vec<(&str, &Example)> = train
        .iter()
        .map(|clause| ("train.jsonl", clause))
        .chain(test.iter().map(|clause| ("test.jsonl", clause)))
        .collect();
    let texts: Vec<Vec<String>> = all.iter().map(|(_, clause)| words(&clause.text)).collect();
    let distinct: HashSet<String> = texts.iter().map(|words| words.join(" ")).collect();
    assert_eq!(distinct.len(), all.len(), "two clauses have the same words");
    let trigrams: Vec<HashSet<&[String]>> = texts.iter().map(|words| trigrams(words)).collect();
    for i in 0..all.len() {
        for j in 0..i {
            let (file, clause) = all[i];
            let (other_file, other) = all[j];
            let most = if file == other_file { 0.2 } else { 0.12 };
            let shared = jaccard(&trigrams[i], &trigrams[j]);
            assert!(
                shared < most,
                "{file}:{} and {other_file}:{} share {shared:.3} of their trigrams",
                clause.line,
                other.line
            );
        }
    }
}

#[test]
fn every_clause_fits_the_models_positions() {
    let source = ModelSource::resolve(minilm_wheel().to_str().unwrap()).unwrap();
    let config = ModelConfig::load(&source).unwrap();
    let tokenizer = Tokenizer::load(&source, config.vocab_size).unwrap();
    let mut longest = 0;
    for file in ["train.jsonl", "test.jsonl"] {
        for clause in clauses(file) {
            let encoding = tokenizer.encode(&clause.text, None, 512).unwrap();
            assert!(!encoding.truncated, "{file}:{}", clause.line);
            longest = longest.max(encoding.ids.len());
        }
    }
    // Far below 64, the texts would not have been read as what they are.
    assert!(longest > 64, "the longest has {longest} tokens");
}
