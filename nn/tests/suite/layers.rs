use graft_nn::layers::{Embedding, GatedMlp, LayerNorm, Linear, Mlp, RmsNorm, SelfAttention};
use graft_nn::{Error, Parameters};
use graft_tensor::Tensor;
use graft_tensor::ops::{Activation, Attention, Glu};
use ndarray::{Array2, ArrayD, Axis, Ix2, s};

use crate::common::*;

/// What f64 sums of a few dozen terms of the order of 1 may differ by.
const CLOSE: f64 = 1e-12;

fn matrix(x: &ArrayD<f64>) -> Array2<f64> {
    x.clone().into_dimensionality::<Ix2>().unwrap()
}

/// `x·w + b`, with the weight `[in, out]`.
fn affine(x: &ArrayD<f64>, w: Array2<f64>, b: Option<ArrayD<f64>>) -> ArrayD<f64> {
    let y = matrix(x).dot(&w).into_dyn();
    match b {
        Some(b) => y + b,
        None => y,
    }
}

/// `x` through a layer whose weight is `[out, in]`.
fn through(p: &Parameters, layer: &Linear, x: &ArrayD<f64>) -> ArrayD<f64> {
    let w = matrix(&value(p, layer.weight())).reversed_axes();
    affine(x, w, layer.bias().map(|b| value(p, b)))
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[test]
fn linear() {
    cases(
        |seed, [rows, inputs, outputs, _], [with_bias, activated, _]| {
            let mut p = parameters();
            let layer = match with_bias {
                true => Linear::new(&mut p, "a", inputs, outputs, 0.02),
                false => Linear::without_bias(&mut p, "a", inputs, outputs, 0.02),
            }
            .unwrap();
            assert_eq!(p.get(layer.weight()).shape()[..], [outputs, inputs]);
            assert_eq!(p.len(), 1 + usize::from(with_bias));
            fill(&mut p, seed);
            let x = values(seed, &[rows, inputs]);
            let y = checked(&p, &[tensor(&x)], seed, |f, v| match activated {
                true => layer.activated(f, &v[0], Activation::Silu),
                false => layer.forward(f, &v[0]),
            });
            let mut want = through(&p, &layer, &x);
            if activated {
                want.mapv_inplace(silu);
            }
            near(&y, &want, CLOSE);
        },
    );
}

#[test]
fn conv1d() {
    cases(|seed, [rows, inputs, outputs, _], _| {
        let mut p = parameters();
        let layer = Linear::conv1d(&mut p, "c_attn", inputs, outputs, 0.02).unwrap();
        let names: Vec<_> = p
            .iter()
            .map(|(_, one)| (one.name().to_owned(), one.shape().to_vec()))
            .collect();
        assert_eq!(
            names,
            [
                ("c_attn.weight".into(), vec![inputs, outputs]),
                ("c_attn.bias".into(), vec![outputs])
            ]
        );
        fill(&mut p, seed);
        let x = values(seed, &[rows, inputs]);
        let y = checked(&p, &[tensor(&x)], seed, |f, v| layer.forward(f, &v[0]));
        let bias = value(&p, layer.bias().unwrap());
        near(
            &y,
            &affine(&x, matrix(&value(&p, layer.weight())), Some(bias)),
            CLOSE,
        );
    });
}

#[test]
fn embedding() {
    cases(|seed, [rows, width, tokens, _], _| {
        let mut p = parameters();
        let layer = Embedding::new(&mut p, "tokens", rows, width, 0.02).unwrap();
        fill(&mut p, seed);
        let at: Vec<usize> = (0..tokens)
            .map(|t| (seed as usize / 8 + t * t) % rows)
            .collect();
        let index = ids(&at.iter().map(|&i| i as i64).collect::<Vec<_>>());
        let y = checked(&p, &[index], seed, |f, v| layer.forward(f, &v[0]));
        assert_eq!(y, value(&p, layer.weight()).select(Axis(0), &at));
    });
}

/// Each row through `f`.
fn per_row(x: &ArrayD<f64>, f: impl Fn(&[f64]) -> Vec<f64>) -> ArrayD<f64> {
    let mut y = matrix(x);
    for mut row in y.rows_mut() {
        let new = f(&row.to_vec());
        row.assign(&ndarray::Array1::from(new));
    }
    y.into_dyn()
}

fn mean(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = x.len() as f64;
    x.sum::<f64>() / n
}

/// Well away from a constant row, whose norm is all but a jump that differences cannot follow.
fn spread(seed: u64, shape: &[usize; 2]) -> ArrayD<f64> {
    let mut x = matrix(&values(seed, shape)) * 0.25;
    for ((_, c), x) in x.indexed_iter_mut() {
        *x += if c % 2 == 0 { 1.0 } else { -1.0 };
    }
    x.into_dyn()
}

/// `x`, a residual for one case in two, and their sum.
fn summands(seed: u64, shape: &[usize; 2], residual: bool) -> (Vec<Tensor>, ArrayD<f64>) {
    let (x, r) = (spread(seed, shape), values(!seed, shape) * 0.25);
    match residual {
        true => (vec![tensor(&x), tensor(&r)], x + r),
        false => (vec![tensor(&x)], x),
    }
}

const EPS: f64 = 1e-5;

#[test]
fn layer_norm() {
    cases(|seed, [rows, width, ..], [residual, declared, _]| {
        let mut p = parameters();
        let layer = LayerNorm::new(&mut p, "ln", width + 1, EPS).unwrap();
        match declared {
            true => p.initialise(0).unwrap(),
            false => fill(&mut p, seed),
        }
        let (inputs, s) = summands(seed, &[rows, width + 1], residual);
        let y = checked(&p, &inputs, seed, |f, v| layer.forward(f, &v[0], v.get(1)));
        let mut want = per_row(&s, |row| {
            let mu = mean(row.iter().copied());
            let deviation = (mean(row.iter().map(|x| (x - mu).powi(2))) + EPS).sqrt();
            row.iter().map(|x| (x - mu) / deviation).collect()
        });
        if !declared {
            let find = |name| value(&p, p.find(name).unwrap());
            want = want * find("ln.weight") + find("ln.bias");
        }
        near(&y, &want, CLOSE);
    });
}

#[test]
fn rms_norm() {
    cases(
        |seed, [rows, width, ..], [residual, declared, unit_offset]| {
            let mut p = parameters();
            let layer = match unit_offset {
                true => RmsNorm::with_unit_offset(&mut p, "rms", width + 1, EPS),
                false => RmsNorm::new(&mut p, "rms", width + 1, EPS),
            }
            .unwrap();
            match declared {
                true => p.initialise(0).unwrap(),
                false => fill(&mut p, seed),
            }
            let (inputs, s) = summands(seed, &[rows, width + 1], residual);
            let y = checked(&p, &inputs, seed, |f, v| layer.forward(f, &v[0], v.get(1)));
            let mut want = per_row(&s, |row| {
                let size = (mean(row.iter().map(|x| x * x)) + EPS).sqrt();
                row.iter().map(|x| x / size).collect()
            });
            if !declared {
                let weight = value(&p, p.find("rms.weight").unwrap());
                want = want * (weight + f64::from(unit_offset));
            }
            near(&y, &want, CLOSE);
        },
    );
}

#[test]
fn mlp() {
    cases(|seed, [rows, hidden, inner, _], _| {
        let mut p = parameters();
        let layer = Mlp {
            up: Linear::new(&mut p, "up", hidden, inner, 0.02).unwrap(),
            down: Linear::new(&mut p, "down", inner, hidden, 0.02).unwrap(),
            activation: Activation::Tanh,
        };
        fill(&mut p, seed);
        let x = values(seed, &[rows, hidden]);
        let y = checked(&p, &[tensor(&x)], seed, |f, v| layer.forward(f, &v[0]));
        let inner = through(&p, &layer.up, &x).mapv(f64::tanh);
        near(&y, &through(&p, &layer.down, &inner), CLOSE);
    });
}

#[test]
fn gated_mlp() {
    cases(|seed, [rows, hidden, inner, _], _| {
        let mut p = parameters();
        let layer = GatedMlp {
            gate: Linear::without_bias(&mut p, "gate", hidden, inner, 0.02).unwrap(),
            up: Linear::without_bias(&mut p, "up", hidden, inner, 0.02).unwrap(),
            down: Linear::without_bias(&mut p, "down", inner, hidden, 0.02).unwrap(),
            activation: Glu::Swiglu,
        };
        fill(&mut p, seed);
        let x = values(seed, &[rows, hidden]);
        let y = checked(&p, &[tensor(&x)], seed, |f, v| layer.forward(f, &v[0]));
        let inner = through(&p, &layer.gate, &x).mapv(silu) * through(&p, &layer.up, &x);
        near(&y, &through(&p, &layer.down, &inner), CLOSE);
    });
}

#[test]
fn self_attention() {
    cases(|seed, [first, second, head_dim, _], [causal, grouped, _]| {
        let (heads, kv_heads) = if grouped { (2, 1) } else { (2, 2) };
        let (hidden, tokens) = (heads * head_dim, first + second);
        let mut p = parameters();
        let mut linear =
            |name: &str, outputs| Linear::new(&mut p, name, hidden, outputs, 0.02).unwrap();
        let layer = SelfAttention {
            query: linear("query", hidden),
            key: linear("key", kv_heads * head_dim),
            value: linear("value", kv_heads * head_dim),
            output: linear("output", hidden),
            attention: Attention {
                kv_heads,
                causal,
                ..Attention::bidirectional(heads, head_dim)
            },
        };
        fill(&mut p, seed);
        let x = values(seed, &[tokens, hidden]);
        let offsets = ids(&[0, first as i64, tokens as i64]);
        let y = checked(&p, &[tensor(&x), offsets], seed, |f, v| {
            layer.forward(f, &v[0], &v[1])
        });

        let [q, k, v] =
            [&layer.query, &layer.key, &layer.value].map(|layer| matrix(&through(&p, layer, &x)));
        let mut mixed = Array2::zeros((tokens, hidden));
        for (h, sequence) in (0..heads).flat_map(|h| [(h, 0..first), (h, first..tokens)]) {
            let own = |of: usize| s![sequence.clone(), of * head_dim..(of + 1) * head_dim];
            let shared = h * kv_heads / heads;
            let mut scores =
                q.slice(own(h)).dot(&k.slice(own(shared)).t()) / (head_dim as f64).sqrt();
            for ((i, j), score) in scores.indexed_iter_mut() {
                *score = if causal && j > i { 0.0 } else { score.exp() };
            }
            let sums = scores.sum_axis(Axis(1)).insert_axis(Axis(1));
            let weights = scores / sums; // [queries, keys]
            mixed
                .slice_mut(own(h))
                .assign(&weights.dot(&v.slice(own(shared))));
        }
        near(&y, &through(&p, &layer.output, &mixed.into_dyn()), CLOSE);
    });
}

#[test]
fn declared_names_are_unique_across_layers() {
    let mut p = parameters();
    Linear::new(&mut p, "a", 2, 3, 0.02).unwrap();
    let error = Embedding::new(&mut p, "a", 2, 3, 0.02).unwrap_err();
    assert_eq!(
        error,
        Error::Duplicate {
            name: "a.weight".into()
        }
    );
    assert_eq!(p.len(), 2);
}
