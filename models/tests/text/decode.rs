//! Text from tokens: token by token, without special tokens, and ids that are none.

use std::fs;

use graft_models::{Error, ModelSource, Tokenizer};
use proptest::prelude::*;

use crate::families::{KINDS, tokenizer};
use crate::lines::{fixture, lines};

/// The pieces of a stream, the last of them from its end.
fn pieces(t: &Tokenizer, ids: &[u32], skip: bool) -> Vec<String> {
    let mut stream = t.stream(skip);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    pieces
}

#[test]
fn streams_add_up_to_the_text() {
    let lines = lines();
    for kind in KINDS {
        let t = tokenizer(kind);
        // Single lines, and long texts of many.
        let singles = lines.iter().step_by(23).cloned();
        let long = lines.chunks(40).step_by(50).map(|chunk| chunk.join("\n"));
        for text in singles.chain(long) {
            let ids = t.encode_bare(&text).unwrap();
            for skip in [false, true] {
                let parts = pieces(&t, &ids, skip);
                let whole = t.decode(&ids, skip).unwrap();
                assert_eq!(parts.concat(), whole, "{kind}: {text:?}");
                // No half character: what replaces one is in the text itself.
                let replaced = parts.concat().matches('\u{fffd}').count();
                assert_eq!(replaced, whole.matches('\u{fffd}').count());
                assert!(
                    whole.contains('\u{fffd}') == text.contains('\u{fffd}'),
                    "{kind}: {text:?}"
                );
            }
        }
    }
}

#[test]
fn a_character_waits_for_its_last_byte() {
    for kind in KINDS {
        let t = tokenizer(kind);
        // Characters that no tokenizer here knows whole.
        let text = "a\u{10ffff}b\u{f0123}c\u{e0abc}d\u{10abcd}";
        let ids = t.encode_bare(text).unwrap();
        assert!(ids.len() >= 10, "{kind}: {ids:?}");
        let parts = pieces(&t, &ids, false);
        assert_eq!(parts.concat(), text, "{kind}");
        assert!(
            parts.iter().all(|part| !part.contains('\u{fffd}')),
            "{kind}: {parts:?}"
        );
        assert!(
            parts.iter().filter(|part| part.is_empty()).count() >= 6,
            "{kind}: {parts:?}"
        );
        // Cut within a character: the end says so, as decoding the whole does.
        for cut in 1..ids.len() {
            let parts = pieces(&t, &ids[..cut], false);
            assert_eq!(
                parts.concat(),
                t.decode(&ids[..cut], false).unwrap(),
                "{kind} cut to {cut}"
            );
            let (end, certain) = parts.split_last().unwrap();
            assert!(
                certain.iter().all(|part| !part.contains('\u{fffd}')),
                "{kind}: {parts:?}"
            );
            assert_eq!(
                end.contains('\u{fffd}'),
                t.decode(&ids[..cut], false).unwrap().contains('\u{fffd}')
            );
        }
    }
}

#[test]
fn spaces_survive_special_tokens_in_a_stream() {
    for kind in KINDS {
        let t = tokenizer(kind);
        let special = (0..t.tokens() as u32).find(|&id| t.is_special(id)).unwrap();
        let word = t.encode_bare("the river is quiet").unwrap();
        let ids = [&word[..], &vec![special; 80], &word, &[special], &word].concat();
        for skip in [false, true] {
            assert_eq!(
                pieces(&t, &ids, skip).concat(),
                t.decode(&ids, skip).unwrap(),
                "{kind}"
            );
        }
    }
}

#[test]
fn ids_that_are_none() {
    for kind in KINDS {
        let t = tokenizer(kind);
        for id in [t.tokens() as u32, u32::MAX] {
            let error = t.decode(&[5, id], true).unwrap_err();
            assert!(matches!(&error, Error::Decode { .. }), "{error}");
            let text = error.to_string();
            assert!(
                text.contains(kind) && text.contains(&format!("no token {id}")),
                "{text}"
            );
            let mut stream = t.stream(true);
            let before = stream.push(5).unwrap();
            assert!(matches!(stream.push(id), Err(Error::Decode { .. })));
            // The stream goes on as if nothing had been asked.
            let after = stream.push(6).unwrap() + &stream.finish().unwrap();
            assert_eq!(before + &after, t.decode(&[5, 6], true).unwrap());
        }
        assert_eq!(t.decode(&[], false).unwrap(), "");
        assert_eq!(t.stream(false).finish().unwrap(), "");
        assert!(t.encode_bare("").unwrap().is_empty());
    }
}

#[test]
fn special_tokens_have_roles() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixture("llama3.json"), dir.path().join("tokenizer.json")).unwrap();
    let source = ModelSource::directory(dir.path()).unwrap();
    let load = || Tokenizer::load(&source, 1000).unwrap();
    assert!(load().special_tokens().is_empty());
    fs::write(
        dir.path().join("special_tokens_map.json"),
        r#"{"bos_token": "<s>", "unk_token": "<unk>", "additional_special_tokens": ["<x>"]}"#,
    )
    .unwrap();
    fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"bos_token": {"content": "<|begin_of_text|>", "lstrip": false}, "eos_token": "<|eot_id|>",
            "pad_token": null, "add_bos_token": true, "chat_template": "x"}"#,
    )
    .unwrap();
    let t = load();
    let bos = t.token_to_id("<|begin_of_text|>");
    assert!(bos.is_some() && t.is_special(bos.unwrap()) && !t.is_special(0));
    assert_eq!(
        t.special_token("bos_token"),
        Some(("<|begin_of_text|>", bos))
    );
    assert_eq!(
        t.special_token("eos_token"),
        Some(("<|eot_id|>", t.token_to_id("<|eot_id|>")))
    );
    // Named, but not in the vocabulary.
    assert_eq!(t.special_token("unk_token"), Some(("<unk>", None)));
    assert_eq!(t.special_token("pad_token"), None);
    assert_eq!(t.special_tokens().len(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Tokens in no order that a tokenizer would give, so that most bytes are no characters.
    #[test]
    fn any_tokens_can_be_streamed(
        kind in prop::sample::select(&KINDS), picks in prop::collection::vec(any::<prop::sample::Index>(), 0..120),
        skip in any::<bool>(),
    ) {
        let t = tokenizer(kind);
        let ids: Vec<u32> = picks.iter().map(|pick| pick.index(t.tokens()) as u32).collect();
        let text = pieces(&t, &ids, skip).concat();
        let whole = t.decode(&ids, skip).unwrap();
        // With byte fallback a stream may keep characters that the whole run undoes.
        if matches!(kind, "gpt2" | "llama3" | "qwen2") {
            prop_assert_eq!(text, whole);
        } else {
            let replaced = |text: &str| text.matches('\u{fffd}').count();
            let (fewer, all) = (replaced(&text), replaced(&whole));
            prop_assert!(fewer <= all);
        }
    }

    #[test]
    fn any_text_survives(text in any::<String>()) {
        for kind in ["gpt2", "llama3"] {
            let t = tokenizer(kind);
            let ids = t.encode_bare(&text).unwrap();
            prop_assert_eq!(&t.decode(&ids, false).unwrap(), &text);
            prop_assert_eq!(pieces(&t, &ids, false).concat(), text.as_str());
        }
    }
}
