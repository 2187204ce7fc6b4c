//! Encoding, pairs and truncation, against the tokenizers crate's own truncation; tokenizers that do not fit.

use std::fs;

use graft_models::{Encoding, Error, ModelSource, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::{TruncationDirection, TruncationParams, TruncationStrategy};

const WORDS: [&str; 6] = ["a", "b", "c", "d", "e", "##f"];

/// A tokenizer like BERT's over a handful of words: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then the words. It asks for
/// truncation and padding to 5, as many published ones do to 128.
fn small() -> Value {
    let specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];
    let vocab: serde_json::Map<_, _> = specials
        .iter()
        .chain(&WORDS)
        .enumerate()
        .map(|(i, w)| (w.to_string(), json!(i)))
        .collect();
    let special = |id: usize| {
        json!({"id": id, "content": specials[id], "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true})
    };
    let piece =
        |name: &str, type_id: u32| json!({"SpecialToken": {"id": name, "type_id": type_id}});
    let text = |name: &str, type_id: u32| json!({"Sequence": {"id": name, "type_id": type_id}});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 5}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [special(0), special(1), special(2), special(3)],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [piece("[CLS]", 0), text("A", 0), piece("[SEP]", 0)],
            "pair": [piece("[CLS]", 0), text("A", 0), piece("[SEP]", 0), text("B", 1), piece("[SEP]", 1)],
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab}
    })
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes("t.json", small().to_string().as_bytes(), 10).unwrap()
}

#[test]
fn nothing_is_cut_or_padded_unasked() {
    let t = tokenizer();
    let encoded = t.encode("A b, cf a b c d e", None, 512).unwrap();
    assert_eq!(encoded.ids, [2, 4, 5, 1, 6, 9, 4, 5, 6, 7, 8, 3]);
    assert_eq!(encoded.type_ids, [0; 12]);
    assert!(!encoded.truncated);
    assert_eq!(t.encode("", None, 512).unwrap().ids, [2, 3]);
    assert_eq!(t.added_tokens(false), 2);
    assert_eq!(t.added_tokens(true), 3);
    assert_eq!(
        (
            t.token_to_id("c"),
            t.token_to_id("zz"),
            t.id_to_token(6).as_deref()
        ),
        (Some(6), None, Some("c"))
    );
}

#[test]
fn pairs_have_types_and_are_cut_at_the_longer() {
    let t = tokenizer();
    let whole = t.encode("a b c d e", Some("a b"), 10).unwrap();
    assert_eq!(whole.ids, [2, 4, 5, 6, 7, 8, 3, 4, 5, 3]);
    assert_eq!(whole.type_ids, [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]);
    assert!(!whole.truncated);
    let cut = t.encode("a b c d e", Some("a b"), 9).unwrap();
    assert_eq!(cut.ids, [2, 4, 5, 6, 7, 3, 4, 5, 3]);
    assert!(cut.truncated);
    let both = t.encode("a b c d e", Some("e d c b a"), 8).unwrap();
    assert_eq!(both.ids, [2, 4, 5, 3, 8, 7, 6, 3]);
    let single = t.encode("a b c d e", None, 4).unwrap();
    assert_eq!(
        single,
        Encoding {
            ids: vec![2, 4, 5, 3],
            type_ids: vec![0; 4],
            truncated: true
        }
    );
}

#[test]
fn too_little_room_is_an_error() {
    let t = tokenizer();
    for (pair, least) in [(None, 3), (Some("b"), 5)] {
        assert!(t.encode("a", pair, least).is_ok());
        for length in 0..least {
            let error = t.encode("a", pair, length).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains(&format!("at least {least} tokens")),
                "{error}"
            );
        }
    }
}

/// The crate's own truncation, which works on the tokenizer as a whole.
fn oracle(max_length: usize, direction: TruncationDirection) -> tokenizers::Tokenizer {
    let mut oracle = tokenizers::Tokenizer::from_bytes(small().to_string().as_bytes()).unwrap();
    oracle.with_padding(None);
    let params = TruncationParams {
        direction,
        max_length,
        strategy: TruncationStrategy::LongestFirst,
        stride: 0,
    };
    oracle.with_truncation(Some(params)).unwrap();
    oracle
}

fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(
        prop::sample::select(vec!["a", "b", "cf", "d", "zz", "é", ",", "[SEP]"]),
        0..12,
    )
    .prop_map(|words| words.join(" "))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn truncation_is_that_of_the_crate(
        first in text(), second in prop::option::of(text()), max_length in 5usize..20, left in any::<bool>(),
    ) {
        let direction = if left { TruncationDirection::Left } else { TruncationDirection::Right };
        let mut json = small();
        json["truncation"]["direction"] = json!(if left { "Left" } else { "Right" });
        let ours = Tokenizer::from_bytes("t", json.to_string().as_bytes(), 10).unwrap();
        let encoded = ours.encode(&first, second.as_deref(), max_length).unwrap();
        let theirs = oracle(max_length, direction);
        let whole = oracle(10_000, direction);
        let (expected, full) = match second {
            Some(second) => (
                theirs.encode((first.clone(), second.clone()), true).unwrap(),
                whole.encode((first, second), true).unwrap(),
            ),
            None => (theirs.encode(first.clone(), true).unwrap(), whole.encode(first, true).unwrap()),
        };
        prop_assert_eq!(&encoded.ids, expected.get_ids());
        prop_assert_eq!(&encoded.type_ids, expected.get_type_ids());
        prop_assert_eq!(encoded.truncated, full.len() > max_length);
        prop_assert!(encoded.ids.len() <= max_length);
    }

    #[test]
    fn any_text_can_be_encoded(text in any::<String>(), pair in prop::option::of(any::<String>())) {
        let encoded = tokenizer().encode(&text, pair.as_deref(), 16).unwrap();
        prop_assert!(encoded.ids.len() >= 2 && encoded.ids.len() <= 16);
        prop_assert_eq!(encoded.ids.len(), encoded.type_ids.len());
    }

    #[test]
    fn damaged_files_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = small().to_string().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(t) = Tokenizer::from_bytes("t", &bytes, 10) {
            let _ = t.encode("a cf zz", Some("b"), 6);
        }
    }
}

#[test]
fn batches_keep_their_order() {
    let t = tokenizer();
    let texts: Vec<String> = (0..60)
        .map(|i| WORDS[i % 5].to_string() + &" a".repeat(i % 7))
        .collect();
    let batch: Vec<(&str, Option<&str>)> = texts
        .iter()
        .enumerate()
        .map(|(i, text)| (text.as_str(), (i % 3 == 0).then_some("e d")))
        .collect();
    let together = t.encode_batch(&batch, 8).unwrap();
    let apart: Vec<Encoding> = batch
        .iter()
        .map(|(text, pair)| t.encode(text, *pair, 8).unwrap())
        .collect();
    assert_eq!(together, apart);
    assert!(t.encode_batch(&[], 8).unwrap().is_empty());
}

#[test]
fn ids_stay_below_the_models_vocabulary() {
    let json = small().to_string();
    let error = Tokenizer::from_bytes("t.json", json.as_bytes(), 9)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("\"##f\" has id 9") && error.contains("vocab_size is 9"),
        "{error}"
    );
    // The post-processor names ids by itself.
    let mut json = small();
    json["post_processor"]["special_tokens"]["[SEP]"]["ids"] = json!([77]);
    let t = Tokenizer::from_bytes("t.json", json.to_string().as_bytes(), 10).unwrap();
    let error = t.encode("a", None, 8).unwrap_err();
    assert!(
        matches!(&error, Error::Tokenizer { .. }) && error.to_string().contains("77"),
        "{error}"
    );
}

#[test]
fn a_tokenizer_without_special_tokens_refuses_empty_text() {
    let mut json = small();
    json["post_processor"] = Value::Null;
    let t = Tokenizer::from_bytes("t.json", json.to_string().as_bytes(), 10).unwrap();
    assert_eq!(t.encode("a b", None, 1).unwrap().ids, [4]);
    assert!(matches!(t.encode("", None, 8), Err(Error::Encode { .. })));
}

#[test]
fn files_that_are_no_tokenizer() {
    for text in ["", "{}", "[]", "{\"model\": 1}", "not json"] {
        assert!(
            Tokenizer::from_bytes("t.json", text.as_bytes(), 10).is_err(),
            "{text}"
        );
    }
    let mut json = small();
    json["model"]["vocab"] = json!({});
    json["added_tokens"] = json!([]);
    assert!(Tokenizer::from_bytes("t.json", json.to_string().as_bytes(), 10).is_err());
}

#[test]
fn saving_keeps_every_file_but_padding_and_truncation() {
    let dir = tempfile::tempdir().unwrap();
    let source = ModelSource::directory(dir.path()).unwrap();
    let error = Tokenizer::load(&source, 10).unwrap_err();
    assert!(
        matches!(&error, Error::MissingFile { .. }) && error.to_string().contains("AutoTokenizer"),
        "{error}"
    );

    fs::write(
        dir.path().join("tokenizer.json"),
        serde_json::to_vec_pretty(&small()).unwrap(),
    )
    .unwrap();
    fs::write(
        dir.path().join("tokenizer_config.json"),
        "{\"truncation_side\": \"left\" , \"x\":1}",
    )
    .unwrap();
    fs::write(dir.path().join("vocab.txt"), "[PAD]\n[UNK]\n").unwrap();
    let t = Tokenizer::load(&source, 10).unwrap();
    assert_eq!(
        t.encode("a b c", None, 4).unwrap().ids,
        [2, 5, 6, 3],
        "cut at the left, as tokenizer_config.json says"
    );

    let out = tempfile::tempdir().unwrap();
    t.save(out.path()).unwrap();
    for name in ["tokenizer_config.json", "vocab.txt"] {
        assert_eq!(
            fs::read(out.path().join(name)).unwrap(),
            fs::read(dir.path().join(name)).unwrap()
        );
    }
    let mut expected = small();
    expected["truncation"] = Value::Null;
    expected["padding"] = Value::Null;
    let saved = fs::read(out.path().join("tokenizer.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&saved).unwrap(), expected);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 3);
    // And once more, byte for byte.
    let again = tempfile::tempdir().unwrap();
    Tokenizer::load(&ModelSource::directory(out.path()).unwrap(), 10)
        .unwrap()
        .save(again.path())
        .unwrap();
    assert_eq!(
        fs::read(again.path().join("tokenizer.json")).unwrap(),
        saved
    );
}
