//! A tokenizer from texts: byte-level BPE (Sennrich et al. 2016; over bytes, as GPT-2 has it).

use std::collections::BTreeMap;

use serde_json::json;
use tokenizers::AddedToken;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::error::{Error, Result};
use crate::tokenizer::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, guarded};

/// The token that begins and ends a text in a tokenizer of [`train_bpe`]; its id is 0.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The fewest tokens of such a tokenizer: one for each byte, and [`END_OF_TEXT`].
pub const MIN_BPE_VOCAB: usize = 257;

/// How often a pair of tokens has to stand in the texts to become one.
const MIN_FREQUENCY: u64 = 2;

/// Trains a tokenizer of at most `vocab_size` tokens on texts. Its files, by name: what transformers loads as a
/// tokenizer. The same texts give the same tokenizer.
///
/// # Errors
/// [`Error::Encode`] for fewer than [`MIN_BPE_VOCAB`] tokens; [`Error::Tokenizer`] if training fails.
pub fn train_bpe<'a>(
    texts: impl Iterator<Item = &'a str> + Send,
    vocab_size: usize,
) -> Result<BTreeMap<&'static str, Vec<u8>>> {
    if vocab_size < MIN_BPE_VOCAB {
        return Err(Error::Encode {
            reason: format!("a vocabulary of {vocab_size} tokens has no room for every byte"),
            help: format!("ask for {MIN_BPE_VOCAB} at least"),
        });
    }
    let written = guarded(|| {
        let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
        // No space in front of a text; spans without the space in front of a word; split as GPT-2 does.
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
        let trainer = BpeTrainer::builder()
            .vocab_size(vocab_size)
            .min_frequency(MIN_FREQUENCY)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts)?;
        tokenizer.to_string(true)
    })
    .map_err(|reason| Error::Tokenizer {
        file: TOKENIZER_FILE.to_string(),
        reason,
        help: "train it on other texts".to_string(),
    })?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": false,
    });
    let config = format!("{config:#}\n");
    Ok([
        (TOKENIZER_FILE, (written + "\n").into_bytes()),
        (TOKENIZER_CONFIG_FILE, config.into_bytes()),
    ]
    .into())
}
