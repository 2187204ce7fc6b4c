use graft_tensor::ops::random::Key;
use graft_tensor::ops::{self, Attention};
use graft_tensor::{DType, Tensor};
use ndarray::{Array2, ArrayD, Ix2};

use crate::common::*;

/// Heads and masks of all kinds, and a head's length.
fn options(case: &Case) -> (Attention, usize) {
    let head_dim = case.columns.clamp(1, 20);
    let (heads, kv_heads) = case.of(&[(1, 1), (2, 2), (4, 2), (3, 1)]);
    let [causal, windowed, capped, _] = case.flags;
    let p = Attention {
        heads,
        kv_heads,
        causal,
        window: windowed.then_some(1 + case.pick / 4 % 4),
        softcap: capped.then_some(2.0),
        ..Attention::bidirectional(heads, head_dim)
    };
    (p, head_dim)
}

/// Output and log-sum-exp, one query at a time.
fn oracle(
    p: &Attention,
    head_dim: usize,
    [q, k, v]: [&ArrayD<f64>; 3],
    offsets: &[i64],
) -> (ArrayD<f64>, ArrayD<f64>) {
    let view = |x: &ArrayD<f64>| x.clone().into_dimensionality::<Ix2>().unwrap();
    let (q, k, v) = (view(q), view(k), view(v));
    let tokens = q.nrows();
    let mut y = Array2::zeros((tokens, p.heads * head_dim));
    let mut lse = Array2::zeros((p.heads, tokens));
    for ends in offsets.windows(2) {
        let sequence = ends[0] as usize..ends[1] as usize;
        for (i, h) in sequence
            .clone()
            .flat_map(|i| (0..p.heads).map(move |h| (i, h)))
        {
            let own = h * head_dim..(h + 1) * head_dim;
            let shared = h / (p.heads / p.kv_heads);
            let other = shared * head_dim..(shared + 1) * head_dim;
            let seen: Vec<usize> = sequence
                .clone()
                .filter(|&j| !p.causal || j <= i)
                .filter(|&j| p.window.is_none_or(|w| i.abs_diff(j) < w))
                .collect();
            let scores: Vec<f64> = seen
                .iter()
                .map(|&j| {
                    let dot: f64 = own
                        .clone()
                        .zip(other.clone())
                        .map(|(a, b)| q[[i, a]] * k[[j, b]])
                        .sum();
                    let score = dot * p.scale;
                    p.softcap.map_or(score, |cap| cap * (score / cap).tanh())
                })
                .collect();
            let sum: f64 = scores.iter().map(|s| s.exp()).sum();
            lse[[h, i]] = sum.ln();
            for (&j, score) in seen.iter().zip(&scores) {
                for (a, b) in own.clone().zip(other.clone()) {
                    y[[i, a]] += score.exp() / sum * v[[j, b]];
                }
            }
        }
    }
    (y.into_dyn(), lse.into_dyn())
}

#[test]
fn within_packed_sequences() {
    cases(|case| {
        let (p, head_dim) = options(case);
        let offsets = case.offsets(0);
        let tokens = offsets[4] as usize;
        let q = case.input(0, &[tokens, p.heads * head_dim]);
        let k = case.input(1, &[tokens, p.kv_heads * head_dim]);
        let v = case.input(2, &[tokens, p.kv_heads * head_dim]);
        let parts = run(|m| {
            let (y, lse) = ops::attention(m, &p, &q.on(m), &k.on(m), &v.on(m), &ids(m, &offsets))?;
            Ok(vec![y, lse])
        });
        let (want, lse) = oracle(&p, head_dim, [&q.values, &k.values, &v.values], &offsets);
        // Scores: sums of head_dim products of at most 4, scaled by its root. Their errors are the
        // relative errors of the weights. Short types round the weights, too, at most once each.
        let score = 4.0 * (head_dim as f64).sqrt() * (head_dim as f64 + 4.0) + 16.0;
        let weights = 2.0 * unit(case.dtype) / unit(wide(case.dtype));
        near_by(&parts[0], &want, 2.0 * score + 16.0 + weights, 2.0);
        near_by(
            &parts[1],
            &lse,
            score + 16.0,
            1.0 + 4.0 * (head_dim as f64).sqrt(),
        );
    });
}

#[test]
fn slices_of_a_fused_projection_are_read_in_place() {
    cases(|case| {
        let (heads, head_dim) = (2, 4);
        let p = Attention::bidirectional(heads, head_dim);
        let offsets = case.offsets(1);
        let tokens = offsets[4] as usize;
        let fused = case.input(0, &[tokens, 24]).plain();
        let parts = |m: &graft_tensor::Memory, copy: bool| {
            let fused = fused.on(m);
            let part = |i: usize| {
                let part = fused.narrow(1, 8 * i, 8)?;
                if copy { part.copy(m) } else { Ok(part) }
            };
            let offsets = ids(m, &offsets);
            let (y, lse) = ops::attention(m, &p, &part(0)?, &part(1)?, &part(2)?, &offsets)?;
            Ok(vec![y, lse])
        };
        let (slices, copies) = (run(|m| parts(m, false)), run(|m| parts(m, true)));
        assert_eq!(slices[0].values, copies[0].values, "the same bits");
        assert_eq!(slices[1].values, copies[1].values);
    });
}

#[test]
fn gradients() {
    cases(|case| {
        let (p, head_dim) = options(case);
        let offsets = case.offsets(0);
        let tokens = offsets[4] as usize;
        let q = case.between(0, &[tokens, p.heads * head_dim], -1.0, 1.0);
        let k = case.between(1, &[tokens, p.kv_heads * head_dim], -1.0, 1.0);
        let v = case.between(2, &[tokens, p.kv_heads * head_dim], -1.0, 1.0);
        let dout = case.between(3, &[tokens, p.heads * head_dim], -1.0, 1.0);
        let needs = [case.flags[3], case.pick % 2 == 0, case.pick % 3 == 0];
        let gradient = |m: &graft_tensor::Memory, t: DType| {
            let (q, k, v) = (q.cast_on(t, m), k.cast_on(t, m), v.cast_on(t, m));
            let offsets = ids(m, &offsets);
            let (out, lse) = ops::attention(m, &p, &q, &k, &v, &offsets)?;
            let dout = dout.cast_on(t, m);
            let parts =
                ops::attention_backward(m, &p, [&q, &k, &v], &offsets, &out, &lse, &dout, needs)?;
            assert_eq!(parts.each_ref().map(Option::is_some), needs);
            Ok(parts.into_iter().flatten().collect())
        };
        // The output enters as the type rounds it: sums over head_dim of roundings of at most 1,
        // then over the sequence's up to 7 tokens and the heads that share a key.
        let rounded = 3.0 * unit(case.dtype) / unit(wide(case.dtype));
        let computed = 64.0 + 2.0 * head_dim as f64;
        near_f64(case, gradient, rounded + computed, head_dim as f64 * 8.0);
    });
}

#[test]
fn dropped_weights_are_those_of_the_key() {
    let (tokens, heads, p) = (64, 2, 0.25);
    let offsets = [0, tokens as i64];
    // Equal scores, and the identity as values: the output is the weights themselves.
    let attend = |key| {
        let y = run1(|m| {
            let zero = upload(
                m,
                DType::F32,
                vec![0.0; tokens * heads * tokens],
                &[tokens, heads * tokens],
            );
            let eye = (0..tokens * heads * tokens)
                .map(|i| f64::from(i / (heads * tokens) == i % tokens))
                .collect();
            let v = upload(m, DType::F32, eye, &[tokens, heads * tokens]);
            let options = Attention {
                dropout: p,
                key,
                ..Attention::bidirectional(heads, tokens)
            };
            Ok(ops::attention(m, &options, &zero, &zero, &v, &ids(m, &offsets))?.0)
        });
        y.values.into_raw_vec_and_offset().0
    };
    let weights = attend(Key::new(1, 2, 3));
    let kept = 1.0 / (1.0 - p) / tokens as f64;
    assert!(
        weights
            .iter()
            .all(|&w| w == 0.0 || (w - kept).abs() < 1e-6 * kept)
    );
    // 8192 binomial draws: a standard deviation of 0.0048; five of them.
    let share = weights.iter().filter(|&&w| w == 0.0).count() as f64 / weights.len() as f64;
    assert!((share - p).abs() < 0.024, "{share}");
    assert_eq!(weights, attend(Key::new(1, 2, 3)));
    assert_ne!(weights, attend(Key::new(1, 2, 4)));
    let (first, second): (Vec<f64>, Vec<f64>) = weights
        .chunks(2 * tokens)
        .map(|row| {
            (
                row[..tokens].iter().sum::<f64>(),
                row[tokens..].iter().sum::<f64>(),
            )
        })
        .unzip();
    assert_ne!(first, second, "heads draw for themselves");
}

/// The last tokens of each sequence over keys that lie apart give what the whole sequences give.
#[test]
fn the_last_tokens_over_kept_keys() {
    cases(|case| {
        let (mut p, head_dim) = options(case);
        p.causal = true;
        let offsets = case.offsets(1);
        let tokens = offsets[4] as usize;
        let q = case.input(0, &[tokens, p.heads * head_dim]).plain();
        let k = case.input(1, &[tokens, p.kv_heads * head_dim]).plain();
        let v = case.input(2, &[tokens, p.kv_heads * head_dim]).plain();
        // Up to two queries of each sequence; its keys stand in a slot of their own.
        let lengths: Vec<i64> = offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let slot = *lengths.iter().max().unwrap() + 1;
        let starts: Vec<i64> = (0..4).map(|s| (3 - s) * slot).collect();
        let queries: Vec<i64> = lengths.iter().map(|&n| n.min(2)).collect();
        let parts = run(|m| {
            let (q, k, v) = (q.on(m), k.on(m), v.on(m));
            let (whole, _) = ops::attention(m, &p, &q, &k, &v, &ids(m, &offsets))?;
            let rows = 4 * slot as usize;
            let mut kept = [
                Tensor::zeros(m, k.dtype(), &[rows, p.kv_heads * head_dim])?,
                Tensor::zeros(m, k.dtype(), &[rows, p.kv_heads * head_dim])?,
            ];
            let (mut last, mut ends) = (Vec::new(), vec![0]);
            for s in 0..4 {
                let (first, count) = (offsets[s] as usize, lengths[s] as usize);
                for (kept, x) in kept.iter_mut().zip([&k, &v]) {
                    ops::write_rows(m, kept, starts[s] as usize, &x.narrow(0, first, count)?)?;
                }
                last.extend(offsets[s + 1] - queries[s]..offsets[s + 1]);
                ends.push(last.len() as i64);
            }
            let last = ids(m, &last);
            let kept_rows = ops::Kept {
                starts: &starts,
                lengths: &lengths,
            };
            let q = ops::gather_rows(m, &q, &last)?;
            let [k, v] = &kept;
            let y = ops::attention_cached(m, &p, &q, k, v, &ids(m, &ends), kept_rows)?;
            Ok(vec![y, ops::gather_rows(m, &whole, &last)?])
        });
        let score = 4.0 * (head_dim as f64).sqrt() * (head_dim as f64 + 4.0) + 16.0;
        let weights = 4.0 * unit(case.dtype) / unit(wide(case.dtype));
        near_by(
            &parts[0],
            &parts[1].values,
            4.0 * score + 32.0 + weights,
            2.0,
        );
    });
}
