//! Texts of any length through a tokenizer: a long one in parts, on all cores.

use crate::error::Result;
use crate::tokenizer::{Tokenizer, guarded};

/// Bytes of a part.
const PART: usize = 1 << 16;

/// Bytes on either side of a cut with which it is tried.
const WINDOW: usize = 256;

impl Tokenizer {
    /// The special tokens that are put in front of a text, and behind it.
    ///
    /// # Errors
    /// [`crate::Error::Tokenizer`] if the tokenizer fails, or puts them elsewhere.
    pub fn frame(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let bare = self.encode_bare("a")?;
        let whole = self.encode("a", None, usize::MAX)?.ids;
        let place = whole
            .windows(bare.len().max(1))
            .position(|part| part == bare);
        match place {
            Some(place) if !bare.is_empty() => Ok((
                whole[..place].to_vec(),
                whole[place + bare.len()..].to_vec(),
            )),
            _ => Err(self.failed("it does not put its special tokens around a text".to_string())),
        }
    }

    /// The ids of one text with its special tokens, as [`Tokenizer::encode`] gives them without truncation. A long text is
    /// tokenised in parts, at once, where it can be seen that a cut changes nothing.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_long(&self, text: &str) -> Result<Vec<u32>> {
        if text.len() < PART {
            return Ok(self.encode(text, None, usize::MAX)?.ids);
        }
        match self.parts_of(text)? {
            Some(parts) => {
                let (before, behind) = self.frame()?;
                Ok([before, parts, behind].concat())
            }
            None => Ok(self.encode(text, None, usize::MAX)?.ids),
        }
    }

    /// [`Tokenizer::encode_long`] without special tokens, as [`Tokenizer::encode_bare`] gives them.
    ///
    /// # Errors
    /// As there.
    pub fn encode_long_bare(&self, text: &str) -> Result<Vec<u32>> {
        match self.parts_of(text)? {
            Some(ids) => Ok(ids),
            None => self.encode_bare(text),
        }
    }

    /// The ids of a text without special tokens, tokenised in parts; `None` if it is not to be cut.
    fn parts_of(&self, text: &str) -> Result<Option<Vec<u32>>> {
        let cuts = cuts(text, PART);
        if cuts.is_empty() || !self.allows(text, &cuts)? {
            return Ok(None);
        }
        let ends = cuts.iter().copied().chain([text.len()]);
        let starts = [0].into_iter().chain(cuts.iter().copied());
        let parts = starts.zip(ends).map(|(start, end)| &text[start..end]);
        Ok(Some(self.bare_parts(parts.collect())?.concat()))
    }

    /// The ids of texts as they stand, in their order.
    fn bare_parts(&self, texts: Vec<&str>) -> Result<Vec<Vec<u32>>> {
        let encoded = guarded(|| self.inner().encode_batch_fast(texts, false))
            .map_err(|reason| self.failed(reason))?;
        let parts: Vec<Vec<u32>> = encoded.iter().map(|e| e.get_ids().to_vec()).collect();
        parts.iter().try_for_each(|ids| self.check_ids(ids))?;
        Ok(parts)
    }

    /// Whether the tokens on both sides of every cut are those of the text in one piece. A tokenizer that splits a text
    /// before it looks for tokens decides by what is near; one that does not is never cut.
    fn allows(&self, text: &str, cuts: &[usize]) -> Result<bool> {
        if self.inner().get_pre_tokenizer().is_none() {
            return Ok(false);
        }
        let mut windows = Vec::with_capacity(3 * cuts.len());
        for &cut in cuts {
            let start = boundary_before(text, cut.saturating_sub(WINDOW));
            let end = boundary_from(text, cut + WINDOW).unwrap_or(text.len());
            windows.extend([&text[start..end], &text[start..cut], &text[cut..end]]);
        }
        let found = self.bare_parts(windows)?;
        Ok(found.chunks(3).all(|ids| {
            ids[0].len() == ids[1].len() + ids[2].len() && {
                let (left, right) = ids[0].split_at(ids[1].len());
                left == ids[1] && right == ids[2]
            }
        }))
    }
}

/// Where a text may be cut into parts of about `part` bytes: in front of a letter that begins a line.
fn cuts(text: &str, part: usize) -> Vec<usize> {
    let mut all = Vec::new();
    let mut from = part;
    // A part that would be short is no part.
    while from + part / 2 < text.len() {
        let Some(cut) = boundary_from(text, from) else {
            break;
        };
        all.push(cut);
        from = cut + part;
    }
    all
}

fn is_boundary(bytes: &[u8], at: usize) -> bool {
    at > 0 && bytes[at - 1] == b'\n' && bytes[at].is_ascii_alphabetic()
}

/// The first boundary from there on.
fn boundary_from(text: &str, from: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    (from..bytes.len()).find(|&at| is_boundary(bytes, at))
}

/// The last boundary up to there, or the beginning.
fn boundary_before(text: &str, to: usize) -> usize {
    let bytes = text.as_bytes();
    (0..=to)
        .rev()
        .find(|&at| is_boundary(bytes, at))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokenizers_that_split_a_text_first_are_cut_and_others_are_not() {
        let text =
            "The mill turns;\n\n  and the river's\r\nwater (cold) runs 12 miles\nto the sea.\n"
                .repeat(60);
        let cuts = cuts(&text, 500);
        assert!(cuts.len() > 5);
        for (kind, cut) in [
            ("gpt2", true),
            ("llama3", true),
            ("qwen2", true),
            ("llama2", false),
            ("mistral", false),
            ("gemma", true),
        ] {
            let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/bpe");
            let json = std::fs::read(format!("{fixtures}/{kind}.json")).unwrap();
            let tokenizer = Tokenizer::from_bytes(kind, &json, 1 << 20).unwrap();
            assert_eq!(tokenizer.allows(&text, &cuts).unwrap(), cut, "{kind}");
        }
    }

    #[test]
    fn cuts_are_in_front_of_letters_that_begin_lines() {
        let text = "ab\n\ncd\n ef\ngh\n".repeat(50);
        let found = cuts(&text, 100);
        assert!(found.len() >= 5, "{found:?}");
        assert!(found.windows(2).all(|pair| pair[1] >= pair[0] + 100));
        for cut in found {
            assert!(text[..cut].ends_with('\n'));
            assert!(text[cut..].starts_with(|c: char| c.is_ascii_alphabetic()));
        }
        assert!(cuts(&"\n \n".repeat(500), 100).is_empty());
        assert!(cuts(&"é".repeat(500), 100).is_empty());
        assert!(cuts("a\nb", 100).is_empty());
    }
}
