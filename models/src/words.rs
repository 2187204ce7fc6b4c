//! Words of a text among its tokens.
//!
//! A text is tokenised as it stands, so that a word has the tokens that a pretrained model knows it by, whatever the
//! tokenizer puts in front of it; the bytes that tokens stand for say which of them are a word's.

use std::ops::Range;

use tokenizers::EncodeInput;

use crate::error::Result;
use crate::tokenizer::{Encoding, Tokenizer, guarded};

/// Where a word is among the tokens of its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WordPlace {
    /// It begins at the token of this number, the first one that is its own: no word before has a part of it.
    At(u32),
    /// It has no token of its own: its characters are in tokens of the word before, or in none.
    Joined,
    /// Its tokens were cut off.
    Cut,
}

impl Tokenizer {
    /// Encodes texts in parallel as [`Tokenizer::encode_batch`] does, each with the bytes of its words, which rise and do
    /// not overlap; says where each of them is.
    ///
    /// # Errors
    /// As there.
    pub fn encode_words(
        &self,
        texts: &[(&str, &[Range<usize>])],
        max_length: usize,
    ) -> Result<Vec<(Encoding, Vec<WordPlace>)>> {
        let inputs = texts.iter().map(|(text, _)| EncodeInput::from(*text));
        let inputs = inputs.collect::<Vec<_>>();
        let encoded = guarded(|| self.inner().encode_batch(inputs, false))
            .map_err(|reason| self.failed(reason))?;
        let all = encoded.into_iter().zip(texts);
        all.map(|(bare, (_, words))| {
            let (whole, truncated) = self.whole(bare, None, max_length)?;
            let tokens = whole.get_offsets().iter();
            let tokens = tokens.zip(whole.get_special_tokens_mask());
            // Special tokens stand for no bytes.
            let spans: Vec<Option<Range<usize>>> = tokens
                .map(|(&(start, end), &special)| (special == 0).then_some(start..end))
                .collect();
            let encoding = Encoding {
                ids: whole.get_ids().to_vec(),
                type_ids: whole.get_type_ids().to_vec(),
                truncated,
            };
            Ok((encoding, places(&spans, words, truncated)))
        })
        .collect()
    }
}

/// Where words are among tokens that stand for `spans` of the text, in their order.
fn places(
    spans: &[Option<Range<usize>>],
    words: &[Range<usize>],
    truncated: bool,
) -> Vec<WordPlace> {
    let kept = || spans.iter().flatten().filter(|span| !span.is_empty());
    let begin = kept().map(|span| span.start).min().unwrap_or(0);
    let end = kept().map(|span| span.end).max().unwrap_or(0);
    let mut places = Vec::with_capacity(words.len());
    let (mut token, mut before) = (0, 0);
    for word in words {
        // The first token that reaches into the word, and not into the one before.
        let is_behind = |span: &Option<Range<usize>>| {
            span.as_ref()
                .is_some_and(|span| span.end > word.start && span.start >= before)
        };
        let skipped = spans[token..].iter().position(is_behind);
        let found = skipped.map(|skipped| token + skipped);
        let own = found.filter(|&i| spans[i].as_ref().is_some_and(|span| span.start < word.end));
        let gone = truncated && (word.end <= begin || word.start >= end);
        places.push(match own {
            Some(i) => WordPlace::At(i as u32),
            None if gone => WordPlace::Cut,
            None => WordPlace::Joined,
        });
        token = own.unwrap_or(token);
        before = word.end;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::WordPlace::{At, Cut, Joined};
    use super::*;

    /// Of tokens that stand for these bytes, a special one in front.
    fn of(tokens: &[Range<usize>], words: &[Range<usize>], truncated: bool) -> Vec<WordPlace> {
        let spans = tokens.iter().cloned().map(Some);
        let spans: Vec<_> = [None].into_iter().chain(spans).collect();
        places(&spans, words, truncated)
    }

    #[test]
    fn a_word_begins_at_the_first_token_of_its_own() {
        // "the bridge," in pieces with the space in front or not.
        let words = [0..3, 4..10, 10..11];
        let tokens = [0..3, 4..7, 7..10, 10..11];
        assert_eq!(of(&tokens, &words, false), [At(1), At(2), At(4)]);
        let spaced = [0..3, 3..7, 7..10, 10..11];
        assert_eq!(of(&spaced, &words, false), [At(1), At(2), At(4)]);
        // A token of the space alone is no word's.
        let apart = [0..3, 3..4, 4..10, 10..11];
        assert_eq!(of(&apart, &words, false), [At(1), At(3), At(4)]);
        // Tokens that share a character each have all of it.
        let bytes = [0..3, 4..10, 4..10, 10..11];
        assert_eq!(of(&bytes, &words, false), [At(1), At(2), At(4)]);
    }

    #[test]
    fn a_word_without_a_token_of_its_own_is_joined_or_was_cut() {
        let words = [0..2, 2..3, 3..4, 5..8];
        // The second is in the token of the first, and the third in no token.
        assert_eq!(
            of(&[0..3, 5..8], &words, false),
            [At(1), Joined, Joined, At(2)]
        );
        // A token that two words have a part of is the first one's; the second has one more.
        assert_eq!(of(&[0..2, 2..3], &[0..1, 1..3], false), [At(1), At(2)]);
        assert_eq!(of(&[0..1, 1..2], &words, true), [At(1), Cut, Cut, Cut]);
        // Cut on the left.
        assert_eq!(of(&[5..6, 6..8], &words, true), [Cut, Cut, Cut, At(1)]);
        assert_eq!(of(&[], &words, false), [Joined; 4]);
    }
}
