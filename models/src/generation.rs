//! `generation_config.json`: what a model says about how it is continued.

use serde_json::Value;

use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::json::{describe, parse_object};
use crate::tokenizer::{GENERATION_CONFIG_FILE, Tokenizer};

/// The tokens that end a text: those of generation_config.json, where it came with the tokenizer and states them, or else
/// those of config.json, as transformers has it. Each is in the vocabulary.
///
/// # Errors
/// [`Error::Json`]; [`Error::Config`] for something that is no token.
pub fn end_tokens(config: &DecoderConfig, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let stated = match tokenizer.companion(GENERATION_CONFIG_FILE) {
        Some(bytes) => parse_object(GENERATION_CONFIG_FILE, bytes)?.remove("eos_token_id"),
        None => None,
    };
    let vocab = config.vocab_size;
    match stated {
        None | Some(Value::Null) => {
            // Outside the vocabulary, they are never said.
            let ids = config.eos_token_ids.iter().filter(|&&id| id < vocab);
            Ok(ids.map(|&id| id as u32).collect())
        }
        Some(Value::Array(list)) => list.iter().map(|id| token(id, vocab)).collect(),
        Some(one) => Ok(vec![token(&one, vocab)?]),
    }
}

fn token(value: &Value, vocab: usize) -> Result<u32> {
    match value.as_u64().filter(|&id| id < vocab as u64) {
        Some(id) => Ok(id as u32),
        None => Err(Error::Config {
            file: GENERATION_CONFIG_FILE.to_string(),
            key: "eos_token_id".to_string(),
            found: describe(value),
            expected: format!("a token id below {vocab}, or a list of them"),
            help: "correct it, or remove the file".to_string(),
        }),
    }
}
