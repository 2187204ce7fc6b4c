//! Text from token ids, whole or token by token.

use crate::error::{Error, Result};
use crate::tokenizer::{Tokenizer, guarded};

/// Tokens that a stream decodes again with each new one before it forgets the older half.
const WINDOW: usize = 32;

/// Tokens that may wait for the rest of a character. A character has at most four bytes; what waits for longer is
/// none.
const MOST_WAITING: usize = 64;

/// What a decoder makes of bytes that are no character, or not yet.
const REPLACEMENT: char = '\u{fffd}';

impl Tokenizer {
    /// The text of token ids; special tokens are left out if `skip_special`.
    ///
    /// # Errors
    /// [`Error::Decode`] for an id that the tokenizer does not have; [`Error::Tokenizer`] if it fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        ids.iter().try_for_each(|&id| self.check(id))?;
        self.decode_known(ids, skip_special)
    }

    /// A stream that turns tokens into text as they come; special tokens are left out if `skip_special`.
    pub fn stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream {
            tokenizer: self,
            skip_special,
            ids: Vec::new(),
            emitted: String::new(),
            settled: 0,
        }
    }

    fn check(&self, id: u32) -> Result<()> {
        match self.id_to_token(id) {
            Some(_) => Ok(()),
            None => Err(Error::Decode {
                file: self.file().to_string(),
                id,
                tokens: self.tokens(),
            }),
        }
    }

    fn decode_known(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner().decode(ids, skip_special)).map_err(|reason| self.failed(reason))
    }
}

/// Text from tokens one by one: each piece is complete UTF-8, and all of them together are what
/// [`Tokenizer::decode`] gives for all tokens.
///
/// A token may hold a part of a character only, so a piece can be empty and a later one hold more than one character.
/// One exception to the sum: a decoder with byte fallback (Llama 2, Mistral, Gemma) takes a run of byte tokens as text
/// only if the whole run is, so bytes that follow a character and are none undo that character. A stream has let it
/// go by then, and keeps it.
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    /// The last tokens: enough to decode what follows as in the whole.
    ids: Vec<u32>,
    /// The text of these tokens that has been handed out.
    emitted: String,
    /// How many of the tokens it stands for.
    settled: usize,
}

impl DecodeStream<'_> {
    /// Takes the next token; gives the text that is now certain, often of one token, or empty.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.tokenizer.check(id)?;
        self.ids.push(id);
        let text = self.text()?;
        let waiting = self.ids.len() - self.settled;
        if text.ends_with(REPLACEMENT) && waiting < MOST_WAITING {
            return Ok(String::new());
        }
        let piece = self.emit(text)?;
        self.forget()?;
        Ok(piece)
    }

    /// Ends the stream: the text of what still waited, bytes that are no character as U+FFFD.
    ///
    /// # Errors
    /// Those of [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String> {
        let text = self.text()?;
        self.emit(text)
    }

    fn text(&self) -> Result<String> {
        self.tokenizer.decode_known(&self.ids, self.skip_special)
    }

    /// What `text` adds to what has been handed out.
    fn emit(&mut self, text: String) -> Result<String> {
        let piece = match text.strip_prefix(&self.emitted) {
            Some(piece) => piece.to_string(),
            // The new tokens undid an earlier character: see the type's description.
            None => {
                self.ids.drain(..self.settled);
                let text = self.text()?;
                self.settled = self.ids.len();
                self.emitted.clone_from(&text);
                return Ok(text);
            }
        };
        self.settled = self.ids.len();
        self.emitted = text;
        Ok(piece)
    }

    /// Drops the older half of the tokens, unless the rest decodes otherwise without them: a decoder treats the start
    /// of a text in its own way.
    fn forget(&mut self) -> Result<()> {
        if self.ids.len() < WINDOW {
            return Ok(());
        }
        let rest = &self.ids[self.ids.len() - WINDOW / 2..];
        let text = self.tokenizer.decode_known(rest, self.skip_special)?;
        let whole =
            !text.is_empty() && !text.starts_with(REPLACEMENT) && self.emitted.ends_with(&text);
        if whole {
            self.ids.drain(..self.ids.len() - WINDOW / 2);
            self.settled = self.ids.len();
            self.emitted = text;
        }
        Ok(())
    }
}
