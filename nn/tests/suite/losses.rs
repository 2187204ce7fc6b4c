use graft_autograd::{Gradients, Var};
use graft_nn::layers::{Embedding, LayerNorm, Linear, SelfAttention};
use graft_nn::{Forward, Parameters, Result, losses};
use graft_tensor::ops::loss::IGNORE;
use graft_tensor::ops::{Attention, Pool};
use ndarray::{Axis, Ix2};

use crate::common::*;

const CLOSE: f64 = 1e-12;

#[test]
fn cross_entropy_by_the_rows_of_the_step() {
    cases(|seed, [rows, classes, ..], [smooth, ignore, _]| {
        let (x, smoothing) = (
            values(seed, &[rows, classes]),
            if smooth { 0.1 } else { 0.0 },
        );
        let mut targets: Vec<i64> = (0..rows)
            .map(|r| ((seed as usize >> r) % classes) as i64)
            .collect();
        if ignore {
            targets[0] = IGNORE;
        }
        let t = ids(&targets);
        let y = checked(&parameters(), &[tensor(&x), t], seed, |f, v| {
            losses::cross_entropy(f, &v[0], &v[1], smoothing, 7.0)
        });
        let x = x.into_dimensionality::<Ix2>().unwrap();
        let lse = x.mapv(f64::exp).sum_axis(Axis(1)).mapv(f64::ln);
        let want: f64 = (0..rows)
            .filter(|&r| targets[r] != IGNORE)
            .map(|r| {
                let hit = x[[r, targets[r] as usize]];
                lse[r] - (1.0 - smoothing) * hit - smoothing * x.row(r).mean().unwrap()
            })
            .sum();
        near(&y, &ndarray::arr0(want / 7.0).into_dyn(), CLOSE);
    });
}

#[test]
fn squared_error_and_binary_cross_entropy() {
    cases(|seed, dims, _| {
        let (x, t) = (values(seed, &dims[..2]) * 3.0, values(!seed, &dims[..2]));
        let y = checked(&parameters(), &[tensor(&x), tensor(&t)], seed, |f, v| {
            losses::mean_squared_error(f, &v[0], &v[1], 11.0)
        });
        let want = (&x - &t).mapv(|d| d * d).sum() / 11.0;
        near(&y, &ndarray::arr0(want).into_dyn(), CLOSE);
        // Targets between 0 and 1, which no gradient goes to.
        let t = t.mapv(|t| 0.5 + 0.5 * t);
        let fixed = tensor(&t);
        let y = checked(&parameters(), &[tensor(&x)], seed, |f, v| {
            let t = f.input(fixed.clone());
            losses::binary_cross_entropy(f, &v[0], &t, 11.0)
        });
        let term = |x: f64, t: f64| t * (1.0 + (-x).exp()).ln() + (1.0 - t) * (1.0 + x.exp()).ln();
        let want: f64 = x.iter().zip(&t).map(|(&x, &t)| term(x, t)).sum();
        near(&y, &ndarray::arr0(want / 11.0).into_dyn(), CLOSE);
    });
}

/// Embedding, attention, norm, and a head on pooled sequences and on tokens.
struct Model {
    embedding: Embedding,
    attention: SelfAttention,
    norm: LayerNorm,
    head: Linear,
}

impl Model {
    fn new(p: &mut Parameters) -> Model {
        let mut linear = |name: &str, outputs| Linear::new(p, name, 4, outputs, 0.02).unwrap();
        let attention = SelfAttention {
            query: linear("query", 4),
            key: linear("key", 4),
            value: linear("value", 4),
            output: linear("output", 4),
            attention: Attention::bidirectional(2, 2),
        };
        let head = linear("head", 3);
        Model {
            embedding: Embedding::new(p, "embedding", 10, 4, 0.02).unwrap(),
            attention,
            norm: LayerNorm::new(p, "norm", 4, 1e-5).unwrap(),
            head,
        }
    }

    /// Logits of each sequence or, if not `pooled`, of each token.
    fn forward(&self, f: &mut Forward, sequences: &[Vec<i64>], pooled: bool) -> Result<Var> {
        let mut ends = vec![0];
        for s in sequences {
            ends.push(ends[ends.len() - 1] + s.len() as i64);
        }
        let (tokens, offsets) = (f.input(ids(&sequences.concat())), f.input(ids(&ends)));
        let x = self.embedding.forward(f, &tokens)?;
        let attended = self.attention.forward(f, &x, &offsets)?;
        let x = self.norm.forward(f, &attended, Some(&x))?;
        let x = if pooled {
            f.tape.pool(Pool::Mean, &x, &offsets)?
        } else {
            x
        };
        self.head.forward(f, &x)
    }
}

#[test]
fn a_step_does_not_depend_on_how_it_was_split() {
    cases(|seed, _, [pooled, ..]| {
        let mut p = parameters();
        let model = Model::new(&mut p);
        fill(&mut p, seed);
        let set = everything(&p);
        // Eight sequences of 1 to 9 tokens; a label for each, or for about half of the tokens.
        let digit = |i: usize| {
            seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .rotate_left(7 * i as u32)
                % 9973
        };
        let batch: Vec<Vec<i64>> = (0..8)
            .map(|s| {
                (0..1 + digit(s) as usize % 9)
                    .map(|t| (digit(s + t + 8) % 10) as i64)
                    .collect()
            })
            .collect();
        let label = |i: usize| {
            if digit(i) % 2 == 0 && !pooled {
                IGNORE
            } else {
                (digit(i + 3) % 3) as i64
            }
        };
        let mut count = 0;
        let mut next = |n: usize| -> Vec<i64> {
            count += n;
            (count - n..count).map(label).collect()
        };
        let labels: Vec<Vec<i64>> = batch
            .iter()
            .map(|s| next(if pooled { 1 } else { s.len() }))
            .collect();
        let supervised = labels
            .iter()
            .flatten()
            .filter(|&&t| t != IGNORE)
            .count()
            .max(1) as f64;

        let step = |size: usize| {
            let mut found = Gradients::new();
            let mut total = 0.0;
            for (sequences, labels) in batch.chunks(size).zip(labels.chunks(size)) {
                let mut f = Forward::train(&p, &set, 0, 0);
                let logits = model.forward(&mut f, sequences, pooled).unwrap();
                let targets = f.input(ids(&labels.concat()));
                let loss =
                    losses::cross_entropy(&mut f, &logits, &targets, 0.1, supervised).unwrap();
                total += loss.value().item().unwrap();
                drop(logits);
                f.backward(loss, &mut found).unwrap();
            }
            (total, found)
        };
        let (loss, whole) = step(8);
        for size in [1, 2, 4] {
            let (split_loss, split) = step(size);
            assert!((split_loss - loss).abs() < 1e-12);
            assert_eq!(split.len(), p.len());
            for (key, gradient) in whole.iter() {
                near(&array(split.get(key).unwrap()), &array(gradient), 1e-12);
            }
        }
    });
}
