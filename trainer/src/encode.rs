//! Texts of a data set as token ids.

use graft_models::{Encoding, ProblemType, TokenBatch, Tokenizer, WordPlace};
use rayon::prelude::*;

use crate::data::{Dataset, Example};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::text_classifier::TextClassifier;

/// Texts that are worth a task of their own.
const TEXTS_EACH: usize = 64;

/// A tokenized data set.
#[derive(Debug, Clone, Default)]
pub struct Encoded {
    /// One for each example
    pub encodings: Vec<Encoding>,
    /// Tokens of each example
    pub lengths: Vec<usize>,
    /// Examples whose tokens were cut to the longest length allowed
    pub truncated: usize,
    /// Of each example, where its words are among the tokens; nothing where words are not what is labelled
    pub words: Vec<Vec<WordPlace>>,
}

/// Most tokens of one text: `asked`, or as many as the model has positions, of which virtual tokens take some.
///
/// # Errors
/// More than the model has positions.
pub fn longest_text<N: TextClassifier>(config: &N::Config, asked: Option<usize>) -> Result<usize> {
    let (all, free) = (N::positions_in_all(config), N::max_tokens(config));
    match asked {
        Some(length) if length > all => Err(too_long(length, all)),
        Some(length) => Ok(length.min(free)),
        None => Ok(free),
    }
}

/// A length that was asked for and that is more than the model's positions.
pub(crate) fn too_long(asked: usize, positions: usize) -> Error {
    let what = format!("it is {asked}, but the model has {positions} positions");
    let help = format!("ask for {positions} at most");
    Error::config("--max-length or data.max_length", what, help)
}

impl Encoded {
    /// Tokenizes `data`. Texts are cut to `max_length` tokens, and earlier where virtual tokens take of the positions.
    ///
    /// # Errors
    /// More than the model has positions; a length that leaves no room beside the special tokens.
    pub fn new<N: TextClassifier>(
        model: &Model<N>,
        data: &Dataset,
        max_length: Option<usize>,
    ) -> Result<Encoded> {
        let limit = longest_text::<N>(&model.config, max_length)?;
        Encoded::with(limit, &model.tokenizer, data)
    }

    /// Tokenizes `data`, cut to `limit` tokens.
    ///
    /// # Errors
    /// A length that leaves no room beside the special tokens; a text without a token, where the tokenizer adds none.
    pub fn with(limit: usize, tokenizer: &Tokenizer, data: &Dataset) -> Result<Encoded> {
        if tokenizer.added_tokens(false) == 0 {
            let says_nothing = |e: &&Example| {
                e.text.is_empty() && e.text_pair.as_deref().is_none_or(str::is_empty)
            };
            if let Some(example) = data.examples.iter().find(says_nothing) {
                let what = "the text is empty, and this model's tokenizer adds no token to a text";
                let help = "remove the row, or give it some text";
                return Err(Error::data(&data.path, Some(example.line), what, help));
            }
        }
        // A task of its own for some texts at a time: what the tokenizer remembers of a text while it works on it is
        // many times larger than what stays.
        let parts = data
            .examples
            .par_chunks(TEXTS_EACH)
            .map(|part| match data.problem {
                ProblemType::Tokens => {
                    let texts = part.iter().map(|example| {
                        let words = example.words.as_ref();
                        (
                            example.text.as_str(),
                            words.map_or(&[][..], |words| &words.spans),
                        )
                    });
                    let encoded = tokenizer.encode_words(&texts.collect::<Vec<_>>(), limit)?;
                    Ok(encoded.into_iter().unzip())
                }
                _ => {
                    let texts = part
                        .iter()
                        .map(|example| (example.text.as_str(), example.text_pair.as_deref()));
                    let texts: Vec<_> = texts.collect();
                    Ok((tokenizer.encode_batch(&texts, limit)?, Vec::new()))
                }
            })
            .collect::<Vec<Result<_>>>();
        let mut encodings = Vec::with_capacity(data.examples.len());
        let mut words = Vec::new();
        for part in parts {
            // The first error of the data, whichever was found first.
            let (part, places): (Vec<Encoding>, Vec<Vec<WordPlace>>) = part?;
            encodings.extend(part);
            words.extend(places);
        }
        Ok(Encoded {
            lengths: encodings.iter().map(|e| e.ids.len()).collect(),
            truncated: encodings.iter().filter(|e| e.truncated).count(),
            encodings,
            words,
        })
    }

    /// The examples of those numbers, packed in that order.
    pub fn pack(&self, batch: &[usize]) -> TokenBatch {
        TokenBatch::pack(batch.iter().map(|&i| &self.encodings[i]))
    }
}

#[cfg(test)]
mod tests {
    use graft_models::{ModelConfig, ModelSource};

    use super::*;

    #[test]
    fn texts_keep_their_order_and_the_first_that_fails_is_reported() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tiny-bert");
        let source = ModelSource::resolve(tiny).unwrap();
        let config = ModelConfig::load(&source).unwrap();
        let tokenizer = Tokenizer::load(&source, config.vocab_size).unwrap();
        let words = ["water", "the bridge", "one two three", "a"];
        let data = Dataset {
            path: "d.jsonl".into(),
            examples: (0..3 * TEXTS_EACH + 5)
                .map(|i| Example {
                    text: vec![words[i % 4]; 1 + i % 7].join(" "),
                    text_pair: (i % 3 == 0).then(|| words[i % 2].to_owned()),
                    label: None,
                    words: None,
                    line: i + 1,
                })
                .collect(),
            problem: ProblemType::SingleLabel,
            notes: Vec::new(),
        };
        let encoded = Encoded::with(12, &tokenizer, &data).unwrap();
        assert_eq!(encoded.encodings.len(), data.examples.len());
        for (example, encoding) in data.examples.iter().zip(&encoded.encodings) {
            let pair = example.text_pair.as_deref();
            let alone = tokenizer.encode(&example.text, pair, 12).unwrap();
            assert_eq!(&alone, encoding);
        }
        assert!(encoded.truncated > 0);
        let error = Encoded::with(3, &tokenizer, &data).unwrap_err();
        // The first text is a pair, for which three tokens have no room; the second is none, and would fit.
        assert!(error.to_string().contains("3 special tokens"), "{error}");
    }
}
