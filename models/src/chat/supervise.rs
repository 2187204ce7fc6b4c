//! Which tokens of a conversation to learn from: those that the assistant would write, the end of its turn included.

use std::ops::Range;

use serde_json::{Value, json};

use super::{ChatOptions, ChatTemplate, error};
use crate::error::{Error, Result, Shown};
use crate::tokenizer::{Token, Tokenizer};

/// A conversation as tokens, and which of them are the assistant's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supervised {
    /// The text that the template made.
    pub text: String,
    /// Its tokens, each with the bytes of the text that it stands for. Special tokens are those that the template
    /// wrote: the tokenizer adds none.
    pub tokens: Vec<Token>,
    /// For each token, whether the assistant writes it; at least one is true.
    pub mask: Vec<bool>,
}

impl Supervised {
    /// The ids of the tokens.
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }
}

impl ChatTemplate {
    /// Renders and tokenises a conversation, and finds the assistant's tokens. `add_generation_prompt` of the options
    /// is ignored.
    ///
    /// A template may mark them with `{% generation %}`: every token that has a part in such a block is the
    /// assistant's, as in transformers. For other templates, a message of the assistant reaches from the end of what
    /// a model is given when it is to write that message (the messages before it, rendered with the generation
    /// prompt) to the end of the conversation up to it. Behind the last special token of that stretch, which ends
    /// the turn, white space is the template's and not the assistant's. Where a template leaves something out of an
    /// answer once others follow (what the assistant thought), the answer is what remains of its end.
    ///
    /// A message without words, where the template writes what is in front of it otherwise than in front of an answer, is
    /// not learnt from.
    ///
    /// The whole is tokenised once, so the tokens are those of the conversation in one piece.
    ///
    /// # Errors
    /// Those of [`ChatTemplate::render`]; [`Error::Template`] if the template writes the beginning of a conversation
    /// otherwise when more follows, so that prefixes tell nothing, or if no token is the assistant's; those of
    /// [`Tokenizer::encode_spans`].
    pub fn supervise(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Value],
        options: &ChatOptions,
    ) -> Result<Supervised> {
        let whole = ChatOptions {
            add_generation_prompt: false,
            ..options.clone()
        };
        let (text, marked) = self.render_marked(messages, &whole)?;
        let tokens = tokenizer.encode_spans(&text)?;
        let overlaps = |token: &Token, span: &Range<usize>| {
            token.span.start < span.end && token.span.end > span.start
        };
        let mut mask = vec![false; tokens.len()];
        match marked {
            Some(spans) => {
                for (token, supervised) in tokens.iter().zip(&mut mask) {
                    *supervised = spans.iter().any(|span| overlaps(token, span));
                }
            }
            None => {
                let special = tokens.iter().filter(|t| tokenizer.is_special(t.id));
                let ends: Vec<usize> = special.map(|token| token.span.end).collect();
                for span in self.turns(messages, &whole, &text, &ends)? {
                    let first = tokens.partition_point(|token| token.span.end <= span.start);
                    let behind = first
                        + tokens[first..]
                            .iter()
                            .take_while(|token| overlaps(token, &span))
                            .count();
                    let turn = &tokens[first..behind];
                    let end = turn
                        .iter()
                        .rposition(|token| tokenizer.is_special(token.id));
                    let kept = match end {
                        // Only white space behind the token that ends the turn.
                        Some(end) if text[turn[end].span.end..span.end].trim().is_empty() => {
                            end + 1
                        }
                        _ => turn.len(),
                    };
                    mask[first..first + kept].fill(true);
                }
            }
        }
        if !mask.contains(&true) {
            let reason = "no token of the conversation is the assistant's";
            let help = "give it a message with the role `assistant`, or leave it out";
            return Err(error(&self.file, reason.to_string(), help));
        }
        Ok(Supervised { text, tokens, mask })
    }

    /// The bytes of the text that each of the assistant's messages takes, by rendering the conversation up to it. `ends`
    /// are those of the text's special tokens.
    fn turns(
        &self,
        messages: &[Value],
        options: &ChatOptions,
        text: &str,
        ends: &[usize],
    ) -> Result<Vec<Range<usize>>> {
        let prompt = ChatOptions {
            add_generation_prompt: true,
            ..options.clone()
        };
        let mut spans = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            if message.get("role").and_then(Value::as_str) != Some("assistant") {
                continue;
            }
            let before = self.render(&messages[..i], &prompt)?;
            let end = match i + 1 == messages.len() {
                true => text.len(),
                false => {
                    let up_to = self.render(&messages[..=i], options)?;
                    match shortened(&before, &up_to, text, ends) {
                        Some(end) => end,
                        None => {
                            self.check_prefix(i, "the conversation up to it", &up_to, text)?;
                            up_to.len()
                        }
                    }
                }
            };
            if is_empty(message) && !text[..end].starts_with(&before) {
                // Some templates write an answer without words otherwise than one with words. A model is never given what
                // stands in front of it there, and has nothing to say.
                continue;
            }
            self.check_prefix(
                i,
                "what a model is given to write it",
                &before,
                &text[..end],
            )?;
            spans.push(before.len()..end);
        }
        Ok(spans)
    }

    /// The special token with which the assistant ends its turn, if the template writes one.
    pub fn end_of_turn(&self, tokenizer: &Tokenizer) -> Option<u32> {
        let message = |role: &str| json!({"role": role, "content": "a"});
        let turn = [message("user"), message("assistant")];
        // A template that refuses this conversation says so where it is used.
        let found = self
            .supervise(tokenizer, &turn, &ChatOptions::default())
            .ok()?;
        let last = found.mask.iter().rposition(|&supervised| supervised)?;
        let id = found.tokens[last].id;
        tokenizer.is_special(id).then_some(id)
    }

    fn check_prefix(&self, message: usize, what: &str, part: &str, whole: &str) -> Result<()> {
        if whole.starts_with(part) {
            return Ok(());
        }
        let at = part
            .char_indices()
            .zip(whole.chars())
            .find(|((_, a), b)| a != b);
        let at = at.map_or(part.len().min(whole.len()), |((at, _), _)| at);
        let near = |text: &str| {
            let text: String = text[at..].chars().take(20).collect();
            format!("`{}`", Shown(&text))
        };
        Err(Error::Template {
            file: self.file.clone(),
            reason: format!(
                "message {message}: {what} is no prefix of the whole: at byte {at} the part has {}, the whole {}; \
                 this template writes messages otherwise when others follow, so the assistant's tokens cannot be \
                 found by prefixes",
                near(part),
                near(whole)
            ),
            help: "mark the assistant's part in the template with {% generation %} and {% endgeneration %}".to_string(),
        })
    }
}

/// Where an answer ends in `text` that `up_to` has with more in front of it, behind `before`: what remains must be all that
/// follows what was left out, up to the special token that ends the turn.
fn shortened(before: &str, up_to: &str, text: &str, ends: &[usize]) -> Option<usize> {
    if text.starts_with(up_to) {
        return None;
    }
    let (whole, rest) = (up_to.strip_prefix(before)?, text.strip_prefix(before)?);
    let end = before.len() + overlap(whole, rest);
    let last = ends[..ends.partition_point(|&e| e <= end)].last()?;
    (*last > before.len() && text[*last..end].trim().is_empty()).then_some(end)
}

/// Bytes of the longest end of `a` that `b` begins with, by the algorithm of Knuth, Morris and Pratt.
fn overlap(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let b = &b[..b.len().min(a.len())];
    // Of each beginning of `b`, the longest shorter one that it ends with.
    let mut borders = vec![0; b.len()];
    let next = |borders: &[usize], mut held: usize, byte: u8| {
        while held > 0 && b.get(held) != Some(&byte) {
            held = borders[held - 1];
        }
        held + usize::from(b.get(held) == Some(&byte))
    };
    for i in 1..b.len() {
        borders[i] = next(&borders, borders[i - 1], b[i]);
    }
    a.iter().fold(0, |held, &byte| next(&borders, held, byte))
}

/// Whether a message says nothing and calls no tool.
fn is_empty(message: &Value) -> bool {
    let nothing = |key: &str| match message.get(key) {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(_) => false,
    };
    nothing("content") && nothing("tool_calls")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_end_that_begins_the_other() {
        for (a, b) in [
            ("", "a"),
            ("a", ""),
            ("xab", "abc"),
            ("aabaa", "aabaaab"),
            ("abab", "babab"),
            ("aaaa", "aa"),
            ("thought\u{e9}s", "\u{e9}s and"),
            ("abcabcabd", "abcabd"),
            ("ab", "ba"),
        ] {
            let longest = (0..=a.len())
                .filter(|&k| a.is_char_boundary(k))
                .find(|&k| b.starts_with(&a[k..]));
            assert_eq!(overlap(a, b), a.len() - longest.unwrap(), "{a} {b}");
        }
    }
}
