//! Tokenizers trained here, long texts in parts, and the tokens that end a text.

use std::fs;
use std::path::Path;

use graft_models::{
    DecoderConfig, END_OF_TEXT, Error, ModelSource, Tokenizer, end_tokens, train_bpe,
};

use crate::families::{KINDS, tokenizer};
use crate::lines::lines;

#[test]
fn a_long_text_has_the_ids_of_one_piece() {
    let text = lines().join("\n");
    assert!(text.len() > 200_000);
    for kind in KINDS {
        let tokenizer = tokenizer(kind);
        let whole = tokenizer.encode(&text, None, usize::MAX).unwrap().ids;
        assert!(tokenizer.encode_long(&text).unwrap() == whole, "{kind}");
        let bare = tokenizer.encode_bare(&text).unwrap();
        assert!(tokenizer.encode_long_bare(&text).unwrap() == bare, "{kind}");
    }
}

#[test]
fn a_frame_is_what_stands_around_a_text() {
    for (kind, front) in [("gpt2", 0), ("llama2", 1), ("llama3", 1), ("qwen2", 0)] {
        let tokenizer = tokenizer(kind);
        let (before, behind) = tokenizer.frame().unwrap();
        assert_eq!((before.len(), behind.len()), (front, 0), "{kind}");
        let bare = tokenizer.encode_bare("some text").unwrap();
        let whole = tokenizer.encode("some text", None, 100).unwrap().ids;
        assert_eq!(whole, [before, bare, behind].concat(), "{kind}");
    }
}

#[test]
fn a_tokenizer_is_trained_on_texts() {
    let lines = lines();
    let texts = || lines[..2000].iter().map(String::as_str);
    let files = train_bpe(texts(), 600).unwrap();
    let again = train_bpe(texts(), 600).unwrap();
    assert!(files == again, "the same texts give the same tokenizer");
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in &files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let source = ModelSource::directory(dir.path()).unwrap();
    let tokenizer = Tokenizer::load(&source, 600).unwrap();
    assert_eq!(tokenizer.tokens(), 600);
    assert_eq!(
        tokenizer.special_token("eos_token"),
        Some((END_OF_TEXT, Some(0)))
    );
    let mut tokens = 0;
    for text in &lines {
        let ids = tokenizer.encode_bare(text).unwrap();
        tokens += ids.len();
        assert_eq!(&tokenizer.decode(&ids, false).unwrap(), text);
    }
    // It has learnt something: fewer tokens than bytes.
    let bytes: usize = lines.iter().map(String::len).sum();
    assert!(
        2 * tokens < bytes + bytes / 2,
        "{tokens} tokens of {bytes} bytes"
    );
    // Small texts have no more pairs than they have.
    let few = train_bpe(["abab abab"].into_iter(), 1000).unwrap();
    let few = Tokenizer::from_bytes("few", &few["tokenizer.json"], 1000).unwrap();
    assert!((258..270).contains(&few.tokens()), "{}", few.tokens());
    let error = train_bpe(texts(), 256).unwrap_err();
    assert!(matches!(error, Error::Encode { .. }) && error.to_string().contains("257"));
}

/// A model directory with that generation_config.json, if any.
fn ends(generation: Option<&str>) -> Result<Vec<u32>, Error> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        fixtures.join("bpe/gpt2.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    if let Some(text) = generation {
        fs::write(dir.path().join("generation_config.json"), text).unwrap();
    }
    let tokenizer = Tokenizer::load(&ModelSource::directory(dir.path()).unwrap(), 1 << 20).unwrap();
    let model = ModelSource::directory(fixtures.join("tiny-llama")).unwrap();
    let mut config = DecoderConfig::load(&model).unwrap();
    config.eos_token_ids = vec![2, 1000];
    let found = end_tokens(&config, &tokenizer);
    // It goes with the model.
    let out = tempfile::tempdir().unwrap();
    tokenizer.save(out.path()).unwrap();
    let saved = fs::read_to_string(out.path().join("generation_config.json")).ok();
    assert_eq!(saved.as_deref(), generation);
    found
}

#[test]
fn generation_config_says_what_ends_a_text() {
    // What is not in the vocabulary of 101 tokens is never said.
    assert_eq!(ends(None).unwrap(), [2]);
    assert_eq!(ends(Some("{}")).unwrap(), [2]);
    assert_eq!(ends(Some("{\"eos_token_id\": null}")).unwrap(), [2]);
    assert_eq!(ends(Some("{\"eos_token_id\": 7}")).unwrap(), [7]);
    assert_eq!(ends(Some("{\"eos_token_id\": [7, 9]}")).unwrap(), [7, 9]);
    for wrong in ["\"</s>\"", "101", "-1", "[7, 1.5]"] {
        let error = ends(Some(&format!("{{\"eos_token_id\": {wrong}}}"))).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("generation_config.json: `eos_token_id`") && error.contains("below 101"),
            "{error}"
        );
    }
    assert!(ends(Some("{")).unwrap_err().to_string().contains("line 1"));
}
