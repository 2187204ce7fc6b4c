//! Texts in which some tokens are hidden, for an encoder to fill in (Devlin et al. 2018).
//!
//! Of each sequence 15 % of the tokens are supervised, at least one: four of five of them are replaced by the mask token,
//! one of ten by a random one, and the others stay. Which ones is a function of (seed, epoch, sequence, token), so it
//! differs from epoch to epoch and does not depend on how the sequences are spread over batches. A text that is longer
//! than a sequence is cut into several, each between the special tokens of a text.

use std::ops::Range;
use std::path::Path;

use graft_models::{MaskedConfig, MaskedLm, TokenBatch, Tokenizer};
use graft_tensor::ops::loss::IGNORE;
use graft_tensor::ops::random::{Key, uniform_at};

use crate::corpus::{Corpus, Pass};
use crate::data::Dataset;
use crate::documents::{encode_all, left_out, sequence_length, with_text};
use crate::error::{Error, Result};
use crate::report::{counted, thousands};

/// Longest sequence where the configuration names none.
const DEFAULT_LENGTH: usize = 512;

/// Share of a sequence's tokens that are supervised.
const SUPERVISED: f64 = 0.15;
/// Below this, a supervised token is hidden by the mask token; from there to [`RANDOM`], by a random one.
const MASKED: f32 = 0.8;
const RANDOM: f32 = 0.9;

/// Keeps the choice of tokens apart from other uses of a run's seed.
const STREAM: u64 = 0x4d41_534b_4544_0001;

/// Tokenized texts and what hides their tokens.
#[derive(Debug)]
pub struct Hidden {
    /// Of all sequences, one after the other
    ids: Vec<u32>,
    sequences: Vec<Range<usize>>,
    lengths: Vec<usize>,
    /// Supervised tokens of each sequence
    targets: Vec<usize>,
    /// The mask token
    mask: u32,
    /// By id, whether a token may be supervised, and take the place of one: it is no special one
    ordinary: Vec<bool>,
    /// Those that may
    others: Vec<u32>,
    documents: usize,
    empty: usize,
    length: usize,
}

impl Hidden {
    /// How many documents there are, those without text left out.
    pub fn documents(&self) -> usize {
        self.documents
    }

    /// Appends a sequence's tokens as they are shown to the model, and what is supervised.
    fn hide(&self, pass: Pass, sequence: usize, shown: &mut Vec<i64>, supervised: &mut Vec<i64>) {
        let key = match pass {
            Pass::Epoch { epoch, seed } => Key::new(seed ^ STREAM, epoch as u64, sequence as u64),
            // The same for every run, so that runs can be compared.
            Pass::Evaluation => Key::new(STREAM, 0, sequence as u64),
        };
        let ids = &self.ids[self.sequences[sequence].clone()];
        let draw = |what: usize, token: usize| uniform_at(key, (3 * token + what) as u64);
        let mut places: Vec<usize> = (0..ids.len())
            .filter(|&place| self.ordinary[ids[place] as usize])
            .collect();
        places.sort_by(|&a, &b| draw(0, a).total_cmp(&draw(0, b)).then(a.cmp(&b)));
        places.truncate(self.targets[sequence]);
        let first = shown.len();
        shown.extend(ids.iter().map(|&id| i64::from(id)));
        supervised.resize(shown.len(), IGNORE);
        for place in places {
            supervised[first + place] = i64::from(ids[place]);
            let lot = draw(1, place);
            if lot < MASKED {
                shown[first + place] = self.mask.into();
            } else if lot < RANDOM {
                let other = (draw(2, place) * self.others.len() as f32) as usize;
                shown[first + place] = self.others[other.min(self.others.len() - 1)].into();
            }
        }
    }
}

/// Supervised tokens of a sequence with so many that may be.
fn supervised(candidates: usize) -> usize {
    ((candidates as f64 * SUPERVISED).round() as usize).max(1)
}

/// The token that hides others.
fn mask_token(tokenizer: &Tokenizer) -> Result<u32> {
    let named = tokenizer.special_token("mask_token").and_then(|(_, id)| id);
    let usual = || {
        ["[MASK]", "<mask>"]
            .into_iter()
            .find_map(|t| tokenizer.token_to_id(t))
    };
    named.or_else(usual).ok_or_else(|| {
        let what = "the tokenizer has no mask token";
        let help = "name it as `mask_token` in the model's tokenizer_config.json";
        Error::config("model.path", what, help)
    })
}

impl Corpus for Hidden {
    type Network = MaskedLm;
    type Rows = Dataset;

    fn read(path: &Path, column: &str) -> Result<Dataset> {
        Dataset::documents(path, column)
    }

    /// # Errors
    /// A tokenizer without a mask token; no document with text; a length without room beside the special tokens.
    fn new(
        config: &MaskedConfig,
        tokenizer: &Tokenizer,
        data: &Dataset,
        max_length: Option<usize>,
    ) -> Result<Hidden> {
        let length = sequence_length(config.0.max_tokens(), max_length, Some(DEFAULT_LENGTH))?;
        let mask = mask_token(tokenizer)?;
        let (before, behind) = tokenizer.frame()?;
        let frame = before.len() + behind.len();
        if length <= frame {
            let what = format!("it is {length}, which has no room beside {frame} special tokens");
            let help = format!("ask for {} at least", frame + 1);
            return Err(Error::config("--max-length or data.max_length", what, help));
        }
        let ordinary: Vec<bool> = (0..config.0.vocab_size as u32)
            .map(|id| tokenizer.id_to_token(id).is_some() && !tokenizer.is_special(id))
            .collect();
        let texts = with_text(data)?;
        let mut hidden = Hidden {
            ids: Vec::new(),
            sequences: Vec::new(),
            lengths: Vec::new(),
            targets: Vec::new(),
            mask,
            others: (0..)
                .zip(&ordinary)
                .filter(|(_, o)| **o)
                .map(|(id, _)| id)
                .collect(),
            ordinary,
            documents: texts.len(),
            empty: data.examples.len() - texts.len(),
            length,
        };
        for document in encode_all(&texts, |text| tokenizer.encode_long_bare(text))? {
            for part in document.chunks(length - frame) {
                let candidates = part
                    .iter()
                    .filter(|&&id| hidden.ordinary[id as usize])
                    .count();
                if candidates == 0 {
                    continue;
                }
                let first = hidden.ids.len();
                for ids in [before.as_slice(), part, behind.as_slice()] {
                    hidden.ids.extend(ids);
                }
                hidden.sequences.push(first..hidden.ids.len());
                hidden.lengths.push(part.len() + frame);
                hidden.targets.push(supervised(candidates));
            }
        }
        if hidden.sequences.is_empty() {
            let what = "no document has a token to fill in";
            let help = "name a file with text in it";
            return Err(Error::data(&data.path, None, what, help));
        }
        Ok(hidden)
    }

    fn note(&self, path: &Path) -> String {
        let count = |n: usize| thousands(n as u64);
        format!(
            "{}: {}, {} in {} of at most {}, {} of them to fill in{}",
            path.display(),
            counted(self.documents, "document"),
            counted(self.ids.len(), "token"),
            counted(self.sequences.len(), "sequence"),
            count(self.length),
            count(self.targets.iter().sum()),
            left_out(self.empty),
        )
    }

    fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    fn targets(&self, sequence: usize) -> usize {
        self.targets[sequence]
    }

    fn pack(&self, pass: Pass, sequences: &[usize]) -> (TokenBatch, Vec<i64>) {
        let mut batch = TokenBatch::new();
        let mut targets = Vec::new();
        for &sequence in sequences {
            self.hide(pass, sequence, &mut batch.ids, &mut targets);
            batch.offsets.push(batch.ids.len() as i64);
        }
        batch.type_ids = vec![0; batch.ids.len()];
        (batch, targets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sequences of so many tokens between two special ones; ids 0 to 3 are special, 3 hides.
    fn hidden(lengths: &[usize]) -> Hidden {
        let (mut ids, mut sequences, mut next) = (Vec::new(), Vec::new(), 4);
        for &n in lengths {
            let first = ids.len();
            ids.push(1);
            ids.extend((0..n).map(|_| {
                next = 4 + (next * 7 + 1) % 996;
                next
            }));
            ids.push(2);
            sequences.push(first..ids.len());
        }
        let ordinary: Vec<bool> = (0..1000).map(|id| id >= 4).collect();
        Hidden {
            ids,
            sequences,
            lengths: lengths.iter().map(|n| n + 2).collect(),
            targets: lengths.iter().map(|&n| supervised(n)).collect(),
            mask: 3,
            ordinary,
            others: (4..1000).collect(),
            documents: lengths.len(),
            empty: 0,
            length: 10_000,
        }
    }

    const EPOCH: Pass = Pass::Epoch { epoch: 1, seed: 5 };

    #[test]
    fn one_in_seven_is_supervised_and_hidden_as_bert_does() {
        let data = hidden(&[20_000, 3, 1, 40]);
        for (i, count) in [3000, 1, 1, 6].into_iter().enumerate() {
            assert_eq!(data.targets(i), count);
            let (batch, targets) = data.pack(EPOCH, &[i]);
            let original = &data.ids[data.sequences[i].clone()];
            let mut kinds = [0usize; 3];
            for ((&shown, &target), &id) in batch.ids.iter().zip(&targets).zip(original) {
                if target == IGNORE {
                    assert_eq!(shown, i64::from(id));
                    continue;
                }
                assert_eq!(target, i64::from(id));
                assert!(id >= 4, "no special token is supervised");
                kinds[match shown {
                    3 => 0,
                    other if other != target => 1,
                    _ => 2,
                }] += 1;
            }
            assert_eq!(kinds.iter().sum::<usize>(), count);
            if count == 3000 {
                // Three standard deviations of a binomial.
                for (found, share) in kinds.into_iter().zip([0.8, 0.1, 0.1]) {
                    let (mean, variance) = (share * 3000.0, share * (1.0 - share) * 3000.0);
                    assert!(
                        (found as f64 - mean).abs() < 3.0 * f64::sqrt(variance),
                        "{kinds:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_choice_depends_on_epoch_seed_and_sequence_alone() {
        let data = hidden(&[50, 60, 70, 50]);
        let (together, all) = data.pack(EPOCH, &[2, 0, 3]);
        let mut apart = (Vec::new(), Vec::new());
        for i in [2, 0, 3] {
            let (batch, targets) = data.pack(EPOCH, &[i]);
            apart.0.extend(batch.ids);
            apart.1.extend(targets);
        }
        assert_eq!((together.ids, all), apart);
        let places = |pass: Pass, i: usize| -> Vec<usize> {
            let (_, targets) = data.pack(pass, &[i]);
            (0..targets.len())
                .filter(|&t| targets[t] != IGNORE)
                .collect()
        };
        let other = |epoch, seed| places(Pass::Epoch { epoch, seed }, 0);
        assert_eq!(other(1, 5), places(EPOCH, 0));
        assert_ne!(other(1, 5), other(2, 5));
        assert_ne!(other(1, 5), other(1, 6));
        assert_ne!(
            places(EPOCH, 0),
            places(EPOCH, 3),
            "as long, and chosen otherwise"
        );
        assert_eq!(places(Pass::Evaluation, 1), places(Pass::Evaluation, 1));
    }

    #[test]
    fn every_place_has_its_turn() {
        let data = hidden(&[40]);
        let mut times = [0usize; 42];
        for epoch in 1..=1000 {
            let (_, targets) = data.pack(Pass::Epoch { epoch, seed: 0 }, &[0]);
            for (count, _) in times.iter_mut().zip(targets).filter(|(_, t)| *t != IGNORE) {
                *count += 1;
            }
        }
        assert_eq!((times[0], times[41]), (0, 0));
        // 150 expected of each, with a standard deviation of 11.
        assert!(
            times[1..41].iter().all(|n| (100..200).contains(n)),
            "{times:?}"
        );
    }
}
