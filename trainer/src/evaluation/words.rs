//! One label for each word: the entities that labels make, or the labels by themselves.

use std::collections::HashSet;
use std::ops::Range;

use graft_models::WordPlace;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::classes::table;
use super::{Measure, Measured, best_label, probabilities};
use crate::metrics::{ClassMetrics, ratio};
use crate::report::Table;
use crate::tags::Tags;
use crate::targets::TaggedText;

/// How a model does where each word has a label.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WordsEvaluation {
    /// Number of texts
    pub texts: u64,
    /// Mean cross-entropy over the words' first tokens
    pub loss: f64,
    /// Whether the labels are tags of entities
    pub entities: bool,
    /// The kinds of entities, or else the labels
    pub names: Vec<String>,
    /// Of the predictions
    pub score: WordScore,
    /// The same for giving every word one label
    pub baseline: WordScore,
}

/// How often words have the right label, and entities are found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WordScore {
    words: u64,
    /// Words whose label is right
    right: u64,
    /// Of each kind of entities, or each label, how often it was predicted rightly, predicted, and right. An entity is
    /// right as a whole or not at all.
    kinds: Vec<[u64; 3]>,
}

/// The labels of a text's words by the logits of its tokens, `[tokens, labels]`: the best one at its first token. A word
/// without one goes on with the word before; one that was cut off has none, which is `O` where labels are tags of
/// entities.
pub fn labels_of_words(
    tags: &Tags,
    logits: &[Vec<f32>],
    places: impl IntoIterator<Item = WordPlace>,
) -> Vec<Option<u32>> {
    let mut last = tags.outside();
    let label = |place| {
        last = match place {
            WordPlace::At(token) => Some(best_label(&logits[token as usize])),
            WordPlace::Joined => last.map(|label| tags.continued(label)),
            WordPlace::Cut => tags.outside(),
        };
        last
    };
    places.into_iter().map(label).collect()
}

/// What is right or wrong as a whole in a text, by kind and words: its entities, or where labels are no tags each word.
fn things(tags: &Tags, labels: &[Option<u32>]) -> HashSet<(usize, Range<usize>)> {
    if tags.kinds().is_some() {
        let entities = tags.entities(labels).into_iter();
        return entities.map(|entity| (entity.kind, entity.words)).collect();
    }
    let each = labels.iter().enumerate();
    each.filter_map(|(word, label)| Some(((*label)? as usize, word..word + 1)))
        .collect()
}

impl WordScore {
    fn new(tags: &Tags) -> WordScore {
        let kinds = tags.kinds().unwrap_or(tags.labels()).len();
        WordScore {
            words: 0,
            right: 0,
            kinds: vec![[0; 3]; kinds],
        }
    }

    /// Counts a text: the true and the predicted label of each word, as far as it has one.
    fn add(&mut self, tags: &Tags, truth: &[Option<u32>], predicted: &[Option<u32>]) {
        self.words += truth.len() as u64;
        let right = truth.iter().zip(predicted).filter(|(t, p)| t == p);
        self.right += right.count() as u64;
        let (truth, predicted) = (things(tags, truth), things(tags, predicted));
        for (kind, _) in &truth {
            self.kinds[*kind][2] += 1;
        }
        for thing in predicted {
            self.kinds[thing.0][1] += 1;
            self.kinds[thing.0][0] += u64::from(truth.contains(&thing));
        }
    }

    /// Fraction of words whose label is right: seqeval's `accuracy_score`.
    pub fn accuracy(&self) -> f64 {
        ratio(self.right, self.words)
    }

    /// Precision, recall and F1 of all kinds together.
    pub fn micro(&self) -> ClassMetrics {
        let sum = |i: usize| self.kinds.iter().map(|counts| counts[i]).sum::<u64>();
        ClassMetrics::of(sum(0), sum(1), sum(2))
    }

    /// Unweighted mean of F1 over the kinds that occur among the true or the predicted ones; 0 without any.
    pub fn macro_f1(&self) -> f64 {
        let seen = self.kinds.iter().filter(|counts| counts[1] + counts[2] > 0);
        let all: Vec<f64> = seen
            .map(|&[h, g, s]| ClassMetrics::of(h, g, s).f1)
            .collect();
        all.iter().sum::<f64>() / all.len().max(1) as f64
    }

    /// Precision, recall and F1 of each kind.
    pub fn per_kind(&self) -> Vec<ClassMetrics> {
        let of = |&[hits, guessed, support]: &[u64; 3]| ClassMetrics::of(hits, guessed, support);
        self.kinds.iter().map(of).collect()
    }
}

impl WordsEvaluation {
    /// Of given logits of all tokens of some texts, one text after the other, and the labels of their words.
    pub fn new(logits: &[Vec<f32>], tags: &Tags, texts: &[TaggedText], guess: u32) -> Self {
        let (mut score, mut baseline) = (WordScore::new(tags), WordScore::new(tags));
        let (mut loss, mut supervised) = (0.0, 0);
        let mut rest = logits;
        for text in texts {
            let (rows, behind) = rest.split_at(text.tokens);
            rest = behind;
            for (token, label) in text.firsts() {
                loss -= probabilities(&rows[token])[label as usize].ln();
                supervised += 1;
            }
            let truth: Vec<Option<u32>> = text.words.iter().map(|&(_, l)| Some(l)).collect();
            let places = text.words.iter().map(|&(place, _)| place);
            score.add(tags, &truth, &labels_of_words(tags, rows, places));
            baseline.add(tags, &truth, &vec![Some(guess); truth.len()]);
        }
        WordsEvaluation {
            texts: texts.len() as u64,
            loss: loss / f64::from(supervised.max(1)),
            entities: tags.kinds().is_some(),
            names: tags.kinds().unwrap_or(tags.labels()).to_vec(),
            score,
            baseline,
        }
    }
}

impl Measured for WordsEvaluation {
    fn loss(&self) -> f64 {
        self.loss
    }

    fn rank(&self) -> [f64; 3] {
        match self.entities {
            true => [self.score.micro().f1, self.score.accuracy(), -self.loss],
            false => [self.score.accuracy(), self.score.macro_f1(), -self.loss],
        }
    }

    fn measures(&self) -> Vec<Measure> {
        let (of, guess) = (&self.score, &self.baseline);
        let accuracy = Measure::new("accuracy", "accuracy", of.accuracy(), guess.accuracy());
        let macro_f1 = Measure::new("macro_f1", "macro-F1", of.macro_f1(), guess.macro_f1());
        if !self.entities {
            return vec![accuracy, macro_f1];
        }
        let (m, g) = (of.micro(), guess.micro());
        vec![
            Measure::new("precision", "precision", m.precision, g.precision),
            Measure::new("recall", "recall", m.recall, g.recall),
            Measure::new("f1", "F1", m.f1, g.f1),
            macro_f1,
            accuracy,
        ]
    }

    fn guessing(&self) -> &'static str {
        "usual label"
    }

    fn examples(&self) -> u64 {
        self.texts
    }

    fn details(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("words".into(), self.score.words.into());
        let kinds = self.score.per_kind();
        match self.entities {
            true => {
                let named = self.names.iter().cloned();
                let named = named.zip(kinds.into_iter().map(|kind| json!(kind)));
                map.insert("entities".into(), Value::Object(named.collect()));
            }
            false => {
                map.insert("classes".into(), json!(kinds));
            }
        }
        map
    }

    fn by_label(&self, _: &[String]) -> Option<Table> {
        Some(table(&self.names, &self.score.per_kind()))
    }
}

#[cfg(test)]
mod tests {
    use WordPlace::{At, Cut, Joined};

    use super::*;
    use crate::tags::tests::tags;

    /// `tests/fixtures/make_tokens.py`: seqeval's default mode over random tags, of which not all follow on what they should.
    #[test]
    fn entities_and_their_scores_are_those_of_seqeval() {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/seqeval.json"
        );
        let cases: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        for case in cases.as_array().unwrap() {
            let rows = |key: &str| -> Vec<Vec<String>> {
                serde_json::from_value(case[key].clone()).unwrap()
            };
            let (truth, predicted) = (rows("truth"), rows("predicted"));
            let mut labels: Vec<String> =
                truth.iter().chain(&predicted).flatten().cloned().collect();
            labels.sort();
            labels.dedup();
            let tags = Tags::of(&labels);
            let numbers = |row: &[String]| -> Vec<Option<u32>> {
                let number = |label| labels.binary_search(label).unwrap() as u32;
                row.iter().map(|label| Some(number(label))).collect()
            };
            let mut score = WordScore::new(&tags);
            let kinds = tags.kinds().unwrap();
            for (i, (right, guess)) in truth.iter().zip(&predicted).enumerate() {
                score.add(&tags, &numbers(right), &numbers(guess));
                // seqeval's ends are the last words.
                let found = tags.entities(&numbers(right)).into_iter();
                let found = found.map(|e| json!([kinds[e.kind], e.words.start, e.words.end - 1]));
                assert_eq!(Value::from_iter(found), case["entities"][i], "{right:?}");
            }
            let near = |found: f64, expected: &Value| {
                let expected = expected.as_f64().unwrap();
                assert!((found - expected).abs() < 1e-12, "{found} {expected}");
            };
            let report = &case["report"];
            near(score.accuracy(), &case["accuracy"]);
            let micro = score.micro();
            near(micro.precision, &report["micro avg"]["precision"]);
            near(micro.recall, &report["micro avg"]["recall"]);
            near(micro.f1, &report["micro avg"]["f1-score"]);
            near(score.macro_f1(), &report["macro avg"]["f1-score"]);
            for (kind, of) in kinds.iter().zip(score.per_kind()) {
                near(of.precision, &report[kind]["precision"]);
                near(of.recall, &report[kind]["recall"]);
                near(of.f1, &report[kind]["f1-score"]);
                near(of.support as f64, &report[kind]["support"]);
            }
        }
    }

    /// Logits whose best labels are these.
    fn logits(labels: &[usize], count: usize) -> Vec<Vec<f32>> {
        let row = |&best: &usize| (0..count).map(|i| f32::from(u8::from(i == best))).collect();
        labels.iter().map(row).collect()
    }

    #[test]
    fn words_have_the_label_of_their_first_token() {
        let entities = tags(&["O", "B-x", "I-x"]);
        let rows = logits(&[0, 1, 0, 2, 0], 3);
        let places = [At(1), Joined, At(3), At(4), Joined, Cut];
        let found = labels_of_words(&entities, &rows, places);
        let expected = [Some(1), Some(2), Some(2), Some(0), Some(0), Some(0)];
        assert_eq!(found, expected);
        let plain = tags(&["NOUN", "VERB"]);
        let rows = logits(&[1, 0], 2);
        let found = labels_of_words(&plain, &rows, [Joined, At(0), Joined, Cut, Joined]);
        assert_eq!(found, [None, Some(1), Some(1), None, None]);
    }

    #[test]
    fn an_entity_is_right_as_a_whole() {
        let tags = tags(&["O", "B-x", "I-x"]);
        // Two texts of four and two tokens, the special ones not in it.
        let texts = [
            TaggedText {
                tokens: 4,
                words: vec![(At(0), 1), (At(1), 2), (At(2), 0), (At(3), 1)],
            },
            TaggedText {
                tokens: 2,
                words: vec![(At(1), 1), (Cut, 1)],
            },
        ];
        let rows = logits(&[1, 0, 0, 1, 0, 1], 3);
        let of = WordsEvaluation::new(&rows, &tags, &texts, 0);
        // Found: the first word (of two), the fourth and the fifth; the sixth was cut off.
        assert_eq!(of.score.kinds, [[2, 3, 4]]);
        assert_eq!((of.score.words, of.score.right), (6, 4));
        assert_eq!((of.baseline.right, of.baseline.micro().f1), (1, 0.0));
        // Five of the tokens are supervised, one of them with another label than the best.
        let e = 1f64.exp();
        let (best, other) = ((1.0 + 2.0 / e).ln(), (2.0 + e).ln());
        assert!(
            (of.loss - (4.0 * best + other) / 5.0).abs() < 1e-7,
            "{}",
            of.loss
        );
        assert_eq!(of.rank()[0], of.score.micro().f1);
        assert_eq!(of.details()["entities"]["x"]["support"], 4);
    }

    #[test]
    fn labels_that_are_no_tags_are_counted_word_by_word() {
        let tags = tags(&["DET", "NOUN", "VERB"]);
        let text = TaggedText {
            tokens: 3,
            words: vec![(At(0), 0), (At(1), 1), (At(2), 1), (Cut, 1)],
        };
        let of = WordsEvaluation::new(&logits(&[0, 1, 0], 3), &tags, &[text], 1);
        assert_eq!(of.score.kinds, [[1, 2, 1], [1, 1, 3], [0; 3]]);
        assert_eq!(of.score.accuracy(), 0.5);
        // (2/3 + 1/2) / 2: what occurs nowhere does not count.
        assert!((of.score.macro_f1() - 7.0 / 12.0).abs() < 1e-15);
        assert_eq!(of.baseline.accuracy(), 0.75);
        assert_eq!(of.measures().len(), 2);
    }
}
