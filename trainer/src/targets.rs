//! What a head should give for examples, and the loss by which it learns to.

use std::sync::Arc;

use graft_autograd::Var;
use graft_models::WordPlace;
use graft_nn::{Forward, losses};
use graft_tensor::ops::loss::IGNORE;
use graft_tensor::{DType, Tensor};

use crate::error::Result;
use crate::tags::Tags;

/// What is right for each of some examples.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// One label
    Classes {
        /// How many labels there are
        classes: usize,
        /// The number of the one for each example, below these
        right: Vec<u32>,
    },
    /// Any number of labels
    Sets {
        /// How many labels there are
        labels: usize,
        /// The numbers for each example, rising, below these
        right: Vec<Vec<u32>>,
    },
    /// A number
    Numbers(Vec<f32>),
    /// One label for each word
    Words {
        /// The labels
        tags: Arc<Tags>,
        /// Those of each example's words
        right: Vec<TaggedText>,
    },
}

/// What is right for the words of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaggedText {
    /// Tokens of the text
    pub tokens: usize,
    /// Where each word is among them, and the number of its label
    pub words: Vec<(WordPlace, u32)>,
}

impl TaggedText {
    /// Tokens that are supervised: the first of each word.
    pub fn supervised(&self) -> usize {
        self.firsts().count()
    }

    /// These, and their labels.
    pub fn firsts(&self) -> impl Iterator<Item = (usize, u32)> {
        self.words.iter().filter_map(|&(place, label)| match place {
            WordPlace::At(token) => Some((token as usize, label)),
            WordPlace::Joined | WordPlace::Cut => None,
        })
    }
}

/// What one would answer without reading a text.
#[derive(Debug, Clone, PartialEq)]
pub enum Guess {
    /// The most frequent class, or label of a word, of equals the first
    Class(u32),
    /// The labels that at least half of the examples have, or else the most frequent one
    Set(Vec<u32>),
    /// The mean
    Number(f64),
}

impl Targets {
    /// Number of examples.
    pub fn len(&self) -> usize {
        match self {
            Targets::Classes { right, .. } => right.len(),
            Targets::Sets { right, .. } => right.len(),
            Targets::Numbers(numbers) => numbers.len(),
            Targets::Words { right, .. } => right.len(),
        }
    }

    /// What of an example is supervised, counted: itself, or its words.
    ///
    /// # Panics
    /// When it is not among them.
    pub fn supervised(&self, example: usize) -> usize {
        match self {
            Targets::Words { right, .. } => right[example].supervised(),
            Targets::Classes { .. } | Targets::Sets { .. } | Targets::Numbers(_) => 1,
        }
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Those of some examples, in this order.
    ///
    /// # Panics
    /// When one is not among them.
    pub fn select(&self, examples: &[usize]) -> Targets {
        let examples = examples.iter();
        match self {
            Targets::Classes { classes, right } => Targets::Classes {
                classes: *classes,
                right: examples.map(|&i| right[i]).collect(),
            },
            Targets::Sets { labels, right } => Targets::Sets {
                labels: *labels,
                right: examples.map(|&i| right[i].clone()).collect(),
            },
            Targets::Numbers(numbers) => Targets::Numbers(examples.map(|&i| numbers[i]).collect()),
            Targets::Words { tags, right } => Targets::Words {
                tags: tags.clone(),
                right: examples.map(|&i| right[i].clone()).collect(),
            },
        }
    }

    /// What to guess for others of their kind.
    pub fn guess(&self) -> Guess {
        let most = |counts: &[usize]| {
            let rank = |&i: &usize| (counts[i], std::cmp::Reverse(i));
            (0..counts.len()).max_by_key(rank).map(|i| i as u32)
        };
        match self {
            Targets::Classes { classes, right } => {
                let mut counts = vec![0; *classes];
                right.iter().for_each(|&id| counts[id as usize] += 1);
                Guess::Class(most(&counts).unwrap_or(0))
            }
            Targets::Sets { labels, right } => {
                let mut counts = vec![0; *labels];
                right
                    .iter()
                    .flatten()
                    .for_each(|&id| counts[id as usize] += 1);
                let often = |id: &u32| 2 * counts[*id as usize] >= right.len();
                let usual: Vec<u32> = (0..*labels as u32).filter(often).collect();
                Guess::Set(match usual.is_empty() {
                    true => most(&counts).into_iter().collect(),
                    false => usual,
                })
            }
            Targets::Numbers(numbers) => {
                let sum: f64 = numbers.iter().map(|&x| f64::from(x)).sum();
                Guess::Number(sum / numbers.len().max(1) as f64)
            }
            Targets::Words { tags, right } => {
                let mut counts = vec![0; tags.labels().len()];
                let words = right.iter().flat_map(|text| &text.words);
                words.for_each(|&(_, label)| counts[label as usize] += 1);
                Guess::Class(most(&counts).unwrap_or(0))
            }
        }
    }

    /// Their share of the loss of a step in which so many are [supervised](Targets::supervised), given their `outputs
    /// [examples, labels]`, for words `[tokens, labels]`: the mean over the step's examples, or words, of cross-entropy, of
    /// binary cross-entropy over the labels, or of the squared error. Those of transformers' classification heads
    /// (`loss/loss_utils.py`).
    ///
    /// # Errors
    /// Outputs of another shape.
    pub(crate) fn loss(&self, f: &mut Forward, outputs: &Var, supervised: f64) -> Result<Var> {
        let rows = self.len();
        match self {
            Targets::Classes { right, .. } => {
                let right = right.iter().map(|&id| i64::from(id)).collect();
                let right = f.input(Tensor::from_vec(f.memory(), right, &[rows])?);
                Ok(losses::cross_entropy(f, outputs, &right, 0.0, supervised)?)
            }
            Targets::Words { right, .. } => {
                let mut each = Vec::new(); // [tokens]
                for text in right {
                    let begin = each.len();
                    each.resize(begin + text.tokens, IGNORE);
                    for (token, label) in text.firsts() {
                        each[begin + token] = i64::from(label);
                    }
                }
                let tokens = each.len();
                let each = f.input(Tensor::from_vec(f.memory(), each, &[tokens])?);
                Ok(losses::cross_entropy(f, outputs, &each, 0.0, supervised)?)
            }
            Targets::Sets { labels, right } => {
                let mut each = vec![0f32; rows * labels]; // [rows, labels]
                for (row, right) in each.chunks_exact_mut(*labels).zip(right) {
                    right.iter().for_each(|&id| row[id as usize] = 1.0);
                }
                let each = f.input(Tensor::from_vec(f.memory(), each, &[rows, *labels])?);
                let outputs = wide(f, outputs)?;
                let elements = supervised * *labels as f64;
                Ok(losses::binary_cross_entropy(f, &outputs, &each, elements)?)
            }
            Targets::Numbers(numbers) => {
                let numbers = Tensor::from_vec(f.memory(), numbers.clone(), &[rows, 1])?;
                let numbers = f.input(numbers);
                let outputs = wide(f, outputs)?;
                Ok(losses::mean_squared_error(
                    f, &outputs, &numbers, supervised,
                )?)
            }
        }
    }
}

/// The outputs as f32: targets are not to be rounded to what activations are.
fn wide(f: &mut Forward, outputs: &Var) -> Result<Var> {
    match outputs.value().dtype() {
        DType::F32 => Ok(outputs.clone()),
        _ => Ok(f.tape.cast(outputs, DType::F32)?),
    }
}

#[cfg(test)]
mod tests {
    use graft_autograd::Gradients;
    use graft_nn::{FreezePolicy, Init, Parameters};
    use graft_tensor::Memory;

    use super::*;

    #[test]
    fn guesses() {
        let classes = |right: &[u32]| Targets::Classes {
            classes: 3,
            right: right.to_vec(),
        };
        assert_eq!(classes(&[2, 1, 2]).guess(), Guess::Class(2));
        assert_eq!(
            classes(&[2, 1]).guess(),
            Guess::Class(1),
            "of equals the first"
        );
        let sets = |right: &[&[u32]]| Targets::Sets {
            labels: 3,
            right: right.iter().map(|set| set.to_vec()).collect(),
        };
        let often = sets(&[&[0, 2], &[0, 1], &[2], &[0]]);
        assert_eq!(often.guess(), Guess::Set(vec![0, 2]));
        let rare = sets(&[&[1], &[], &[2], &[], &[2]]);
        assert_eq!(rare.guess(), Guess::Set(vec![2]));
        assert_eq!(Targets::Numbers(vec![1.0, 4.0]).guess(), Guess::Number(2.5));
    }

    /// Of outputs `[2, labels]`.
    fn loss(targets: &Targets, outputs: &[f32], dtype: DType) -> f64 {
        let memory = Memory::cpu();
        let parameters = Parameters::new(&memory, DType::F32);
        let mut f = Forward::evaluate(&parameters);
        let shape = [2, outputs.len() / 2];
        let outputs = Tensor::from_vec(&memory, outputs.to_vec(), &shape).unwrap();
        let outputs = f.input(graft_tensor::ops::cast(&memory, &outputs, dtype).unwrap());
        let loss = targets.loss(&mut f, &outputs, 4.0).unwrap();
        loss.value().item().unwrap()
    }

    #[test]
    fn losses_are_means_over_the_examples_of_the_step() {
        let near = |found: f64, expected: f64| {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        };
        let classes = Targets::Classes {
            classes: 2,
            right: vec![0, 1],
        };
        let e = f64::exp;
        // ln(1 + e^-1) and ln(1 + e^2), over the four of the step
        let expected = ((1.0 + e(-1.0)).ln() + (1.0 + e(2.0)).ln()) / 4.0;
        near(loss(&classes, &[1.0, 0.0, 2.0, 0.0], DType::F32), expected);
        let sets = Targets::Sets {
            labels: 2,
            right: vec![vec![0, 1], vec![]],
        };
        // -ln of sigmoid(1), sigmoid(-2), 1 - sigmoid(0.5), 1 - sigmoid(0), over four examples of two labels
        let softplus = |x: f64| (1.0 + e(x)).ln();
        let expected = (softplus(-1.0) + softplus(2.0) + softplus(0.5) + softplus(0.0)) / 8.0;
        near(loss(&sets, &[1.0, -2.0, 0.5, 0.0], DType::F32), expected);
        // In bf16 the outputs are what they are, and the target keeps its bits.
        let numbers = Targets::Numbers(vec![1.001, -2.0]);
        let expected = (0.999f64.powi(2) + 1.0) / 4.0;
        near(loss(&numbers, &[2.0, -1.0], DType::Bf16), expected);
    }

    /// `tests/fixtures/make_problems.py`. Sums of five rows in f32 are off by a few 1e-7.
    #[test]
    fn losses_and_their_gradients_are_those_of_transformers() {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/problems.json"
        );
        let cases: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        let rows = |value: &serde_json::Value| -> Vec<Vec<f64>> {
            serde_json::from_value(value.clone()).unwrap()
        };
        for (problem, case) in cases.as_object().unwrap() {
            let outputs = rows(&case["outputs"]);
            let right = &case["targets"];
            let numbers = || -> Vec<f64> { serde_json::from_value(right.clone()).unwrap() };
            let (count, labels) = (outputs.len(), outputs[0].len());
            let targets = match problem.as_str() {
                "single_label_classification" => Targets::Classes {
                    classes: labels,
                    right: numbers().into_iter().map(|id| id as u32).collect(),
                },
                "multi_label_classification" => {
                    let set = |row: Vec<f64>| {
                        let on = (0..).zip(row).filter(|&(_, on)| on == 1.0);
                        on.map(|(id, _)| id).collect()
                    };
                    Targets::Sets {
                        labels,
                        right: rows(right).into_iter().map(set).collect(),
                    }
                }
                "regression" => Targets::Numbers(numbers().into_iter().map(|x| x as f32).collect()),
                other => panic!("{other}"),
            };
            let memory = Memory::cpu();
            let mut parameters = Parameters::new(&memory, DType::F32);
            let id = parameters
                .declare("outputs", &[count, labels], Init::Zeros)
                .unwrap();
            let flat = outputs.iter().flatten().map(|&x| x as f32).collect();
            let value = Tensor::from_vec(&memory, flat, &[count, labels]).unwrap();
            parameters.set(id, value).unwrap();
            let set = FreezePolicy::default().resolve(&parameters).unwrap();
            let mut f = Forward::train(&parameters, &set, 0, 0);
            let outputs = f.parameter(id).unwrap();
            let loss = targets.loss(&mut f, &outputs, count as f64).unwrap();
            let value = loss.value().item().unwrap();
            let expected = case["loss"].as_f64().unwrap();
            assert!(
                (value - expected).abs() < 1e-6 * expected,
                "{problem}: {value}"
            );
            let mut gradients = Gradients::new();
            f.backward(loss, &mut gradients).unwrap();
            let found = gradients.get(id.key()).unwrap().to_f64().unwrap();
            let expected: Vec<f64> = rows(&case["gradient"]).concat();
            let largest = expected.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    (found - expected).abs() < 1e-6 * largest,
                    "{problem}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn words_are_supervised_at_their_first_tokens() {
        use WordPlace::{At, Cut, Joined};
        let labels: Vec<String> = ["O", "B-x", "I-x"].map(str::to_owned).into();
        let text = |tokens, words: &[(WordPlace, u32)]| TaggedText {
            tokens,
            words: words.to_vec(),
        };
        let targets = Targets::Words {
            tags: Arc::new(Tags::of(&labels)),
            right: vec![
                text(3, &[(At(1), 1), (Joined, 2), (At(2), 0)]),
                text(1, &[(Cut, 1)]),
                text(2, &[(At(1), 2), (Cut, 1)]),
            ],
        };
        let supervised = [0, 1, 2].map(|i| targets.supervised(i));
        assert_eq!(supervised, [2, 0, 1]);
        assert_eq!(targets.guess(), Guess::Class(1));
        let outputs = |rows: usize| -> Vec<f32> { (0..3 * rows).map(|i| (i % 5) as f32).collect() };
        let of = |targets: &Targets, outputs: &[f32]| {
            let memory = Memory::cpu();
            let parameters = Parameters::new(&memory, DType::F32);
            let mut f = Forward::evaluate(&parameters);
            let shape = [outputs.len() / 3, 3];
            let outputs = Tensor::from_vec(&memory, outputs.to_vec(), &shape).unwrap();
            let outputs = f.input(outputs);
            let loss = targets.loss(&mut f, &outputs, 4.0).unwrap();
            loss.value().item().unwrap()
        };
        let all = outputs(6);
        let row = |i: usize, label: usize| {
            let row = &all[3 * i..3 * i + 3];
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            sum.ln() - f64::from(row[label])
        };
        let expected = (row(1, 1) + row(2, 0) + row(5, 2)) / 4.0;
        assert!((of(&targets, &all) - expected).abs() < 1e-6);
        // Those of a text are found wherever it stands.
        let swapped = targets.select(&[2, 0]);
        assert_eq!(swapped.len(), 2);
        let moved: Vec<f32> = all[12..].iter().chain(&all[..9]).copied().collect();
        assert!((of(&swapped, &moved) - expected).abs() < 1e-6);
    }

    #[test]
    fn examples_are_selected_in_order() {
        let sets = Targets::Sets {
            labels: 2,
            right: vec![vec![0], vec![], vec![0, 1]],
        };
        let expected = Targets::Sets {
            labels: 2,
            right: vec![vec![0, 1], vec![0]],
        };
        assert_eq!(sets.select(&[2, 0]), expected);
        assert_eq!(
            Targets::Numbers(vec![1.0, 2.0]).select(&[1]),
            Targets::Numbers(vec![2.0])
        );
    }
}
