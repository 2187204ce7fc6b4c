//! The real MiniLM tokenizer against the ids that Hugging Face's own gives.

use graft_models::{Encoding, ModelConfig, ModelSource, Tokenizer};
use graft_tests::{fixture, minilm_wheel};
use serde_json::Value;

fn integers(value: &Value) -> Vec<u32> {
    let list = value.as_array().expect("a list");
    list.iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

#[test]
fn four_hundred_texts_have_the_ids_of_hugging_face() {
    let source = ModelSource::resolve(minilm_wheel().to_str().unwrap()).unwrap();
    let config = ModelConfig::load(&source).unwrap();
    let tokenizer = Tokenizer::load(&source, config.vocab_size).unwrap();
    let file = std::fs::read_to_string(fixture("tokenizer").join("cases.jsonl")).unwrap();
    let cases: Vec<Value> = file
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(cases.len(), 400);
    let mut pairs = 0;
    let mut singles: Vec<(&str, Option<&str>)> = Vec::new();
    for case in &cases {
        let text = case["text"].as_str().unwrap();
        let whole = |encoding: Encoding| {
            assert!(!encoding.truncated);
            (encoding.ids, encoding.type_ids)
        };
        let (ids, types) = whole(tokenizer.encode(text, None, 1 << 20).unwrap());
        assert_eq!(ids, integers(&case["ids"]), "{text:?}");
        assert_eq!(types, vec![0; ids.len()], "{text:?}");
        singles.push((text, None));
        if let Some(pair) = case["pair"].as_str() {
            pairs += 1;
            let found = whole(tokenizer.encode(text, Some(pair), 1 << 20).unwrap());
            let expected = (integers(&case["pair_ids"]), integers(&case["pair_types"]));
            assert_eq!(found, expected, "{text:?} and {pair:?}");
        }
    }
    assert_eq!(pairs, 100);
    // All at once, on several threads, the texts keep their order.
    let batch = tokenizer.encode_batch(&singles, 1 << 20).unwrap();
    assert_eq!(batch.len(), cases.len());
    for (encoding, case) in batch.iter().zip(&cases) {
        assert_eq!(encoding.ids, integers(&case["ids"]), "{}", case["text"]);
    }
}
