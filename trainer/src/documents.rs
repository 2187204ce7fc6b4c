//! Documents as token ids, packed into sequences of nearly equal length.
//!
//! A document ends in the model's end-of-text token. One that is longer than a sequence is cut into pieces; pieces are
//! then put together, a short one where it fits best, so that few tokens of a sequence's length are left unused. Within
//! a sequence no piece sees another: each has its own offsets, and its positions begin at 0. A piece's last token is
//! supervised with the first token of the next piece, so every token but a document's first is predicted exactly once.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use graft_models::{CausalLm, DecoderConfig, TokenBatch, Tokenizer};
use graft_tensor::ops::loss::IGNORE;
use rayon::prelude::*;

use crate::corpus::{Corpus, Pass};
use crate::data::Dataset;
use crate::encode::too_long;
use crate::error::{Error, Result};
use crate::report::{counted, thousands};

/// Longest sequence where the configuration names none.
const DEFAULT_LENGTH: usize = 1024;

/// Texts that are worth a task of their own.
const TEXTS_EACH: usize = 64;

/// A run of tokens of one document.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    tokens: Range<usize>,
    /// The document ends with it
    last: bool,
}

impl Piece {
    /// Tokens that predict another.
    fn targets(&self) -> usize {
        self.tokens.len() - usize::from(self.last)
    }
}

/// Tokenized documents in sequences.
#[derive(Debug)]
pub struct Documents {
    /// Of all documents, one after the other
    ids: Vec<u32>,
    sequences: Vec<Vec<Piece>>,
    /// Tokens of each sequence
    lengths: Vec<usize>,
    documents: usize,
    /// Documents without any text, which are left out
    empty: usize,
    /// Most tokens of a sequence
    length: usize,
}

/// The length of sequences: `asked`, or the model's positions, at most `most`.
///
/// # Errors
/// More than the model's positions.
pub(crate) fn sequence_length(
    positions: usize,
    asked: Option<usize>,
    most: Option<usize>,
) -> Result<usize> {
    match asked {
        Some(length) if length > positions => Err(too_long(length, positions)),
        Some(length) => Ok(length),
        None => Ok(most.map_or(positions, |most| positions.min(most))),
    }
}

impl Documents {
    /// How many documents there are, those without text left out.
    pub fn documents(&self) -> usize {
        self.documents
    }
}

impl Corpus for Documents {
    type Network = CausalLm;
    type Rows = Dataset;

    fn read(path: &Path, column: &str) -> Result<Dataset> {
        Dataset::documents(path, column)
    }

    /// # Errors
    /// A model without an end-of-text token, or with one outside its vocabulary; no document with text.
    fn new(
        config: &DecoderConfig,
        tokenizer: &Tokenizer,
        data: &Dataset,
        max_length: Option<usize>,
    ) -> Result<Documents> {
        let length = sequence_length(config.max_tokens(), max_length, Some(DEFAULT_LENGTH))?;
        let end = end_of_text(config)?;
        let texts = with_text(data)?;
        let (mut ids, mut ends) = (Vec::new(), Vec::with_capacity(texts.len()));
        for document in encode_all(&texts, |text| tokenizer.encode_long(text))? {
            ids.extend(&document);
            // Some tokenizers put it there themselves.
            if document.last() != Some(&end) {
                ids.push(end);
            }
            ends.push(ids.len());
        }
        let sequences = pack(pieces(&ends, length), length);
        let tokens = |sequence: &Vec<Piece>| sequence.iter().map(|piece| piece.tokens.len()).sum();
        let documents = Documents {
            lengths: sequences.iter().map(tokens).collect(),
            sequences,
            ids,
            documents: texts.len(),
            empty: data.examples.len() - texts.len(),
            length,
        };
        if documents.sequences.is_empty() {
            let what = "no document has a token to predict";
            let help = "name a file with text in it";
            return Err(Error::data(&data.path, None, what, help));
        }
        Ok(documents)
    }

    fn note(&self, path: &Path) -> String {
        format!(
            "{}: {}, {} in {} of at most {}{}",
            path.display(),
            counted(self.documents, "document"),
            counted(self.lengths.iter().sum(), "token"),
            counted(self.sequences.len(), "sequence"),
            thousands(self.length as u64),
            left_out(self.empty),
        )
    }

    fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    fn targets(&self, sequence: usize) -> usize {
        self.sequences[sequence].iter().map(Piece::targets).sum()
    }

    fn texts(&self, sequence: usize) -> usize {
        self.sequences[sequence].len()
    }

    fn pack(&self, _: Pass, sequences: &[usize]) -> (TokenBatch, Vec<i64>) {
        let mut batch = TokenBatch::new();
        let mut next = Vec::new();
        for piece in sequences.iter().flat_map(|&i| &self.sequences[i]) {
            let Range { start, end } = piece.tokens;
            let widened = |ids: &[u32]| -> Vec<i64> { ids.iter().map(|&id| id.into()).collect() };
            batch.ids.extend(widened(&self.ids[start..end]));
            batch.offsets.push(batch.ids.len() as i64);
            next.extend(widened(&self.ids[start + 1..start + 1 + piece.targets()]));
            next.resize(batch.ids.len(), IGNORE);
        }
        batch.type_ids = vec![0; batch.ids.len()];
        (batch, next)
    }
}

/// The documents that hold any text.
///
/// # Errors
/// There is none.
pub(crate) fn with_text(data: &Dataset) -> Result<Vec<&str>> {
    let texts = data.examples.iter().map(|example| example.text.as_str());
    let texts: Vec<&str> = texts.filter(|text| !text.trim().is_empty()).collect();
    if texts.is_empty() {
        let what = "no document holds any text";
        let help = "name a file with text in it";
        return Err(Error::data(&data.path, None, what, help));
    }
    Ok(texts)
}

/// What is said about documents without text.
pub(crate) fn left_out(empty: usize) -> String {
    match empty {
        0 => String::new(),
        1 => "; 1 without text is left out".to_owned(),
        n => format!("; {} without text are left out", thousands(n as u64)),
    }
}

/// The ids of texts, in their order, on all cores.
///
/// # Errors
/// The first of the data, whichever was found first.
pub(crate) fn encode_all(
    texts: &[&str],
    encode: impl Fn(&str) -> graft_models::Result<Vec<u32>> + Sync,
) -> Result<Vec<Vec<u32>>> {
    // One after the other within a part: what the tokenizer remembers of a text while it works on it is many times larger
    // than what stays.
    let part = |texts: &[&str]| -> Vec<_> { texts.iter().map(|text| encode(text)).collect() };
    let parts: Vec<Vec<_>> = texts.par_chunks(TEXTS_EACH).map(part).collect();
    Ok(parts
        .into_iter()
        .flatten()
        .collect::<graft_models::Result<_>>()?)
}

/// The token that ends a document.
fn end_of_text(config: &DecoderConfig) -> Result<u32> {
    let help = "set eos_token_id in the model's config.json to the id of its end-of-text token";
    match config.eos_token_ids.first() {
        Some(&id) if id < config.vocab_size => Ok(id as u32),
        Some(id) => {
            let vocab = config.vocab_size;
            let what = format!("`eos_token_id` is {id}, outside the vocabulary of {vocab} tokens");
            Err(Error::config("config.json", what, help))
        }
        None => {
            let what = "`eos_token_id` is missing: nothing would end a document";
            Err(Error::config("config.json", what, help))
        }
    }
}

/// Documents that end there, cut into pieces of at most `length` tokens, each with a target.
fn pieces(ends: &[usize], length: usize) -> Vec<Piece> {
    let mut all = Vec::new();
    let mut start = 0;
    for &end in ends {
        // A last token alone predicts nothing, and has been predicted.
        while start + 1 < end {
            let stop = end.min(start + length);
            all.push(Piece {
                tokens: start..stop,
                last: stop == end,
            });
            start = stop;
        }
        start = end;
    }
    all
}

/// Puts pieces together into sequences of at most `length` tokens: each, in order, where it leaves the least room.
fn pack(pieces: Vec<Piece>, length: usize) -> Vec<Vec<Piece>> {
    let mut sequences: Vec<Vec<Piece>> = Vec::new();
    // Sequences that are not full, by their room.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for piece in pieces {
        let tokens = piece.tokens.len();
        let found = open.range_mut(tokens..).next().map(|(&room, list)| {
            let sequence = list.pop();
            (room, sequence, list.is_empty())
        });
        let (room, sequence) = match found {
            Some((room, Some(sequence), emptied)) => {
                if emptied {
                    open.remove(&room);
                }
                (room, sequence)
            }
            _ => {
                sequences.push(Vec::new());
                (length, sequences.len() - 1)
            }
        };
        sequences[sequence].push(piece);
        if room > tokens {
            open.entry(room - tokens).or_default().push(sequence);
        }
    }
    sequences
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn documents(lengths: &[usize], length: usize) -> Documents {
        let mut ends = Vec::new();
        for n in lengths {
            ends.push(ends.last().unwrap_or(&0) + n);
        }
        let sequences = pack(pieces(&ends, length), length);
        Documents {
            ids: (0..*ends.last().unwrap_or(&0) as u32).collect(),
            lengths: sequences
                .iter()
                .map(|s| s.iter().map(|p| p.tokens.len()).sum())
                .collect(),
            sequences,
            documents: lengths.len(),
            empty: 0,
            length,
        }
    }

    #[test]
    fn pieces_predict_across_a_cut_and_not_across_documents() {
        let data = documents(&[5, 3], 4);
        // The first document's fifth token is predicted by the fourth, and predicts nothing itself.
        let (batch, next) = data.pack(Pass::Evaluation, &[0, 1]);
        assert_eq!(batch.ids, [0, 1, 2, 3, 5, 6, 7]);
        assert_eq!(batch.offsets, [0, 4, 7]);
        assert_eq!(next, [1, 2, 3, 4, 6, 7, IGNORE]);
        assert_eq!((data.targets(0), data.targets(1)), (4, 2));
    }

    #[test]
    fn short_documents_share_a_sequence() {
        let data = documents(&[6, 3, 2, 4], 10);
        let (batch, next) = data.pack(Pass::Evaluation, &[0]);
        assert_eq!(batch.offsets, [0, 6, 9]);
        assert_eq!(next.iter().filter(|&&t| t == IGNORE).count(), 2);
        assert_eq!(data.lengths(), [9, 6]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_token_but_a_documents_first_is_predicted_once(
            lengths in prop::collection::vec(1usize..40, 1..60),
            length in 1usize..30,
        ) {
            let data = documents(&lengths, length);
            let all: Vec<usize> = (0..data.lengths.len()).collect();
            let (batch, next) = data.pack(Pass::Evaluation, &all);
            prop_assert!(data.lengths.iter().all(|&n| 0 < n && n <= length));
            let targets: usize = all.iter().map(|&i| data.targets(i)).sum();
            let mut predicted = Vec::new();
            for (id, next) in batch.ids.iter().zip(&next) {
                if *next != IGNORE {
                    prop_assert_eq!(id + 1, *next);
                    predicted.push(*next);
                }
            }
            prop_assert_eq!(targets, predicted.len());
            prop_assert!(all.iter().all(|&i| data.targets(i) > 0));
            predicted.sort_unstable();
            let mut expected = Vec::new();
            let mut start = 0;
            for n in &lengths {
                expected.extend(start + 1..start + *n as i64);
                start += *n as i64;
            }
            prop_assert_eq!(predicted, expected);
        }
    }
}
