//! `tokenizer.json` through the `tokenizers` crate, without padding, and with truncation decided per call.
//!
//! A batch in Graft is ragged, so padding that a file asks for is dropped, and so is the truncation: many published
//! tokenizers cut at 128 tokens without a word. Truncation here follows transformers: special tokens stay, the
//! longer of two texts is cut first (`longest_first`), and the side is the file's.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::Value;
use tokenizers::utils::truncation::{
    TruncationDirection, TruncationParams, TruncationStrategy, truncate_encodings,
};
use tokenizers::{EncodeInput, PostProcessor};

use crate::atomic;
use crate::error::{Error, Result, Shown};
use crate::json::{null_top_level, parse_object};
use crate::source::ModelSource;

/// The tokenizer's file.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Settings of the tokenizer that its file does not hold: the roles of special tokens, the chat template.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// A chat template in a file of its own.
pub const CHAT_TEMPLATE_FILE: &str = "chat_template.jinja";

/// How the model is continued: among others, which tokens end a text.
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Files that go with a tokenizer beside `tokenizer.json`: kept and saved as they are.
pub const COMPANIONS: [&str; 8] = [
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    CHAT_TEMPLATE_FILE,
    GENERATION_CONFIG_FILE,
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
];

/// One text, or a pair of texts, as the model sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids, special tokens included, each below the model's vocabulary size; never empty.
    pub ids: Vec<u32>,
    /// For each token 0 or 1: whether it belongs to the second text of a pair.
    pub type_ids: Vec<u32>,
    /// Whether tokens were cut off.
    pub truncated: bool,
}

/// A token and the bytes of the text that it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its id, below the model's vocabulary size.
    pub id: u32,
    /// Bytes of the text, on borders of characters: tokens that share a character each have all of it.
    pub span: Range<usize>,
}

/// A tokenizer, checked against the size of the model's vocabulary.
pub struct Tokenizer {
    file: String,
    inner: tokenizers::Tokenizer,
    direction: TruncationDirection,
    vocab_size: usize,
    /// Special tokens added to one text, and to a pair.
    added: [usize; 2],
    /// Special tokens by role: `eos_token` to its text.
    roles: BTreeMap<String, String>,
    /// The files to save, by name.
    files: Vec<(String, Vec<u8>)>,
}

impl Tokenizer {
    /// Loads a model's tokenizer. `vocab_size` is the model's: no id may be as large.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Json`], [`Error::Tokenizer`], those of [`ModelSource::read_file`].
    pub fn load(source: &ModelSource, vocab_size: usize) -> Result<Tokenizer> {
        let help =
            "save one with AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers";
        let json = source.require_file(TOKENIZER_FILE, help)?;
        let mut companions = Vec::new();
        for name in COMPANIONS {
            if let Some(bytes) = source.read_file(name)? {
                companions.push((name.to_string(), bytes));
            }
        }
        Self::from_files(
            &source.display_file(TOKENIZER_FILE),
            &json,
            companions,
            vocab_size,
        )
    }

    /// Builds a tokenizer from the bytes of a `tokenizer.json`; `file` stands for it in messages.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_bytes(file: &str, json: &[u8], vocab_size: usize) -> Result<Tokenizer> {
        Self::from_files(file, json, Vec::new(), vocab_size)
    }

    fn from_files(
        file: &str,
        json: &[u8],
        companions: Vec<(String, Vec<u8>)>,
        vocab_size: usize,
    ) -> Result<Tokenizer> {
        let wrong = |reason: String, help: &str| Error::Tokenizer {
            file: file.to_string(),
            reason,
            help: help.to_string(),
        };
        let map = parse_object(file, json)?;
        let mut direction =
            side(map.get("truncation").and_then(|t| t.get("direction"))).unwrap_or_default();
        if let Some((name, text)) = companions
            .iter()
            .find(|(name, _)| name == TOKENIZER_CONFIG_FILE)
        {
            // transformers lets this file overrule the other.
            direction = side(parse_object(name, text)?.get("truncation_side")).unwrap_or(direction);
        }
        drop(map);
        let roles = roles(&companions)?;
        let stripped = null_top_level(json, &["truncation", "padding"]);
        let inner = guarded(|| tokenizers::Tokenizer::from_bytes(&stripped)).map_err(|reason| {
            wrong(
                reason,
                "save it again with a current version of transformers",
            )
        })?;
        let added = [false, true].map(|pair| {
            inner
                .get_post_processor()
                .map_or(0, |processor| processor.added_tokens(pair))
        });
        let largest = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        match largest {
            None => {
                return Err(wrong(
                    "the vocabulary is empty".to_string(),
                    "take the tokenizer of the model",
                ));
            }
            Some((token, id)) if id as usize >= vocab_size => {
                let token = Shown(&token).to_string();
                let reason = format!(
                    "the token \"{token}\" has id {id}, but the model's vocab_size is {vocab_size}"
                );
                return Err(wrong(
                    reason,
                    "take tokenizer and config.json of the same model",
                ));
            }
            Some(_) => {}
        }
        let mut files = vec![(TOKENIZER_FILE.to_string(), stripped)];
        files.extend(companions);
        Ok(Tokenizer {
            file: file.to_string(),
            inner,
            direction,
            vocab_size,
            added,
            roles,
            files,
        })
    }

    /// Encodes one text, or a pair, into at most `max_length` tokens, special tokens included.
    ///
    /// # Errors
    /// [`Error::Encode`] if `max_length` has no room for text beside the special tokens, or nothing comes out;
    /// [`Error::Tokenizer`] if the tokenizer fails or gives an id that the model does not have.
    pub fn encode(&self, text: &str, pair: Option<&str>, max_length: usize) -> Result<Encoding> {
        let mut encoded = self.encode_batch(&[(text, pair)], max_length)?;
        encoded
            .pop()
            .ok_or_else(|| self.failed("it returned nothing".to_string()))
    }

    /// Encodes many texts or pairs in parallel; the result has their order and does not depend on the threads.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], for the first text that has one.
    pub fn encode_batch(
        &self,
        texts: &[(&str, Option<&str>)],
        max_length: usize,
    ) -> Result<Vec<Encoding>> {
        // Each text by itself and without special tokens: truncation comes between the two steps.
        let inputs: Vec<EncodeInput> = texts
            .iter()
            .flat_map(|(text, pair)| [Some(*text), *pair])
            .flatten()
            .map(EncodeInput::from)
            .collect();
        let mut single = guarded(|| match inputs.len() {
            // Not worth the threads.
            1 | 2 => inputs
                .into_iter()
                .map(|input| self.inner.encode_fast(input, false))
                .collect(),
            _ => self.inner.encode_batch_fast(inputs, false),
        })
        .map_err(|reason| self.failed(reason))?
        .into_iter();
        let mut next = || {
            single
                .next()
                .ok_or_else(|| self.failed("it returned too few encodings".to_string()))
        };
        texts
            .iter()
            .map(|(_, pair)| {
                let first = next()?;
                let second = pair.map(|_| next()).transpose()?;
                self.finish(first, second, max_length)
            })
            .collect()
    }

    /// Truncates, adds the special tokens, checks the ids.
    fn finish(
        &self,
        first: tokenizers::Encoding,
        second: Option<tokenizers::Encoding>,
        max_length: usize,
    ) -> Result<Encoding> {
        let (whole, truncated) = self.whole(first, second, max_length)?;
        Ok(Encoding {
            type_ids: whole.get_type_ids().to_vec(),
            ids: whole.get_ids().to_vec(),
            truncated,
        })
    }

    /// A text or a pair, cut and between its special tokens, the ids checked, and whether tokens were cut off.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(crate) fn whole(
        &self,
        first: tokenizers::Encoding,
        second: Option<tokenizers::Encoding>,
        max_length: usize,
    ) -> Result<(tokenizers::Encoding, bool)> {
        let is_pair = second.is_some();
        let added = self.added[usize::from(is_pair)];
        let least = added + 1 + usize::from(is_pair);
        if max_length < least {
            return Err(Error::Encode {
                reason: format!(
                    "a length of {max_length} has no room for text beside {added} special tokens"
                ),
                help: format!("allow at least {least} tokens"),
            });
        }
        let before = first.len() + second.as_ref().map_or(0, |second| second.len());
        let params = TruncationParams {
            direction: self.direction,
            max_length: max_length - added,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        let mut truncated = false;
        let whole = guarded(|| {
            let (mut first, mut second) = truncate_encodings(first, second, &params)?;
            truncated = first.len() + second.as_ref().map_or(0, |second| second.len()) < before;
            // What was cut off would be given special tokens too, in every combination of the two texts.
            first.take_overflowing();
            if let Some(second) = &mut second {
                second.take_overflowing();
            }
            self.inner.post_process(first, second, true)
        })
        .map_err(|reason| self.failed(reason))?;
        let ids = whole.get_ids();
        if ids.is_empty() {
            return Err(Error::Encode {
                reason: "the text gives no token at all".to_string(),
                help: "remove empty texts, or use a tokenizer that adds special tokens".to_string(),
            });
        }
        // A post-processor may name any id, whatever the vocabulary says.
        self.check_ids(ids)?;
        if ids.len() > max_length {
            return Err(self.failed(format!(
                "it gave {} tokens where {max_length} were allowed",
                ids.len()
            )));
        }
        Ok((whole, truncated))
    }

    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|id| **id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => Err(self.failed(format!(
                "it gave the id {id}, but the model's vocab_size is {}",
                self.vocab_size
            ))),
        }
    }

    /// How messages call the tokenizer's file.
    pub(crate) fn file(&self) -> &str {
        &self.file
    }

    /// The content of a file that came with the tokenizer.
    pub(crate) fn companion(&self, name: &str) -> Option<&[u8]> {
        let (_, bytes) = self.files.iter().find(|(file, _)| file == name)?;
        Some(bytes)
    }

    pub(crate) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// Number of tokens, those added to the vocabulary included.
    pub fn tokens(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Special tokens that are added to one text, or to a pair.
    pub fn added_tokens(&self, pair: bool) -> usize {
        self.added[usize::from(pair)]
    }

    /// The ids of a text as it stands: no special tokens are added, nothing is cut, and nothing may come out. Special
    /// tokens that the text names are those tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer fails or gives an id that the model does not have.
    pub fn encode_bare(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = guarded(|| self.inner.encode_fast(text, false))
            .map_err(|reason| self.failed(reason))?;
        let ids = encoded.get_ids().to_vec();
        self.check_ids(&ids)?;
        Ok(ids)
    }

    /// [`Tokenizer::encode_bare`], with the bytes of the text that each token stands for.
    ///
    /// # Errors
    /// As there, and if the tokenizer gives spans that are not in the text.
    pub fn encode_spans(&self, text: &str) -> Result<Vec<Token>> {
        let encoded =
            guarded(|| self.inner.encode(text, false)).map_err(|reason| self.failed(reason))?;
        self.check_ids(encoded.get_ids())?;
        let ids = encoded.get_ids().iter();
        ids.zip(encoded.get_offsets())
            .map(|(&id, &(start, end))| match text.get(start..end) {
                Some(_) => Ok(Token {
                    id,
                    span: start..end,
                }),
                None => Err(self.failed(format!(
                    "it gave the bytes {start}..{end} of a text of {}",
                    text.len()
                ))),
            })
            .collect()
    }

    /// The special token of a role that tokenizer_config.json (or special_tokens_map.json) names: `bos_token`,
    /// `eos_token`, `pad_token`. Its text, and its id if it has one.
    pub fn special_token(&self, role: &str) -> Option<(&str, Option<u32>)> {
        let text = self.roles.get(role)?;
        Some((text, self.token_to_id(text)))
    }

    /// The roles of special tokens, each with its text.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.roles
    }

    /// Whether a token is one of the special ones, which [`Tokenizer::decode`] can leave out.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|token| token.special)
    }

    /// The id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, for showing.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The files that [`Tokenizer::save`] writes, by name.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files
            .iter()
            .map(|(name, bytes)| (&name[..], &bytes[..]))
    }

    /// Writes the tokenizer's files into a directory: `tokenizer.json` without padding and truncation and otherwise
    /// byte for byte as it was read, and the other files of the tokenizer unchanged.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        self.files.iter().try_for_each(|(name, bytes)| {
            atomic::write_file(dir.as_ref().join(name), |out| out.write_all(bytes))
        })
    }

    pub(crate) fn failed(&self, reason: String) -> Error {
        let help = "take tokenizer and config.json of the same model".to_string();
        Error::Tokenizer {
            file: self.file.clone(),
            reason,
            help,
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("file", &self.file)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

/// The texts of special tokens by role, from the files beside `tokenizer.json`; the later of them overrules.
fn roles(companions: &[(String, Vec<u8>)]) -> Result<BTreeMap<String, String>> {
    let mut roles = BTreeMap::new();
    for name in ["special_tokens_map.json", TOKENIZER_CONFIG_FILE] {
        let Some((file, bytes)) = companions.iter().find(|(file, _)| file == name) else {
            continue;
        };
        for (key, value) in parse_object(file, bytes)? {
            // A string, or an object that describes an added token.
            let text = value.as_str().or_else(|| value.get("content")?.as_str());
            if let Some(text) = text.filter(|_| key.ends_with("_token") && !key.starts_with("add_"))
            {
                roles.insert(key, text.to_string());
            }
        }
    }
    Ok(roles)
}

/// `left` or `right`, in either file's capitals.
fn side(value: Option<&Value>) -> Option<TruncationDirection> {
    match value?.as_str()? {
        "left" | "Left" => Some(TruncationDirection::Left),
        "right" | "Right" => Some(TruncationDirection::Right),
        _ => None,
    }
}

/// Runs code of the `tokenizers` crate, with its errors as text. It asserts some things that a file can violate;
/// such a panic becomes an error here.
pub(crate) fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Shown(&error.to_string()).to_string()),
        Err(_) => Err("the tokenizer stopped with an internal error".to_string()),
    }
}
