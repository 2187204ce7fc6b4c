use graft_tensor::ops::loss::{self, IGNORE};
use graft_tensor::{DType, Memory, Tensor};
use ndarray::{Array1, ArrayD, Ix2, arr0};

use crate::common::*;
use crate::linalg::product;

/// Loss and log-sum-exp of each row of logits.
fn oracle(logits: &ArrayD<f64>, targets: &[i64], smoothing: f64) -> (Vec<f64>, Vec<f64>) {
    let logits = logits.view().into_dimensionality::<Ix2>().unwrap();
    let classes = logits.ncols() as f64;
    logits
        .rows()
        .into_iter()
        .zip(targets)
        .map(|(row, &target)| {
            let max = row.fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            let lse = max + row.mapv(|x| (x - max).exp()).sum().ln();
            let hit =
                |t: i64| (1.0 - smoothing) * row[t as usize] + smoothing / classes * row.sum();
            (
                if target == IGNORE {
                    0.0
                } else {
                    lse - hit(target)
                },
                lse,
            )
        })
        .unzip()
}

/// Class numbers, about one in four ignored.
fn targets(case: &Case, rows: usize, classes: usize) -> Vec<i64> {
    let skip = case.integers(9, rows, 4);
    let list = case.integers(8, rows, classes).into_iter().zip(skip);
    list.map(|(t, skip)| if skip == 0 { IGNORE } else { t })
        .collect()
}

fn vector(x: Vec<f64>) -> ArrayD<f64> {
    Array1::from(x).into_dyn()
}

fn scalar(x: f64) -> ArrayD<f64> {
    arr0(x).into_dyn()
}

#[test]
fn cross_entropy() {
    cases(|case| {
        let (rows, classes) = (case.dims[0] * case.dims[1], case.columns.max(1));
        let logits = case.between(0, &[rows, classes], -8.0, 8.0);
        let targets = targets(case, rows, classes);
        let smoothing = case.of(&[0.0, 0.1]);
        let parts = run(|m| {
            let (sum, lse) = loss::cross_entropy(m, &logits.on(m), &ids(m, &targets), smoothing)?;
            Ok(vec![sum, lse])
        });
        let (losses, lse) = oracle(&logits.values, &targets, smoothing);
        assert_eq!(parts[0].dtype, wide(case.dtype));
        let n = classes as f64 + 16.0;
        near_by(
            &parts[0],
            &scalar(losses.iter().sum()),
            n,
            16.0 * (1.0 + rows as f64),
        );
        near_by(&parts[1], &vector(lse), n, 16.0);
    });
}

#[test]
fn gradients_of_cross_entropy() {
    cases(|case| {
        let (rows, classes) = (case.dims[0] * case.dims[1], case.columns.max(1));
        let logits = case.between(0, &[rows, classes], -8.0, 8.0);
        let targets = targets(case, rows, classes);
        let smoothing = case.of(&[0.0, 0.1]);
        let dx = run1(|m| {
            let (logits, targets) = (logits.on(m), ids(m, &targets));
            let (_, lse) = loss::cross_entropy(m, &logits, &targets, smoothing)?;
            let dy = Tensor::full(m, wide(case.dtype), &[], -1.5)?;
            loss::cross_entropy_backward(m, &logits, &targets, smoothing, &lse, &dy)
        });
        let (_, lse) = oracle(&logits.values, &targets, smoothing);
        let mut want = logits.values.clone().into_dimensionality::<Ix2>().unwrap();
        for ((r, c), x) in want.indexed_iter_mut() {
            let hit = f64::from(targets[r] == c as i64);
            let slope = (*x - lse[r]).exp() - (1.0 - smoothing) * hit - smoothing / classes as f64;
            *x = if targets[r] == IGNORE {
                0.0
            } else {
                -1.5 * slope
            };
        }
        near_by(&dx, &want.into_dyn(), 16.0 * (classes as f64 + 16.0), 1.5);
    });
}

fn fused(
    case: &Case,
    rows: usize,
    inputs: usize,
    classes: usize,
    bias: bool,
) -> (Input, Input, Option<Input>, Vec<i64>) {
    let x = case.between(0, &[rows, inputs], -1.0, 1.0);
    let weight = case.between(1, &[classes, inputs], -1.0, 1.0);
    let bias = bias.then(|| case.between(2, &[classes], -1.0, 1.0));
    let targets = targets(case, rows, classes);
    (x, weight, bias, targets)
}

#[test]
fn cross_entropy_of_a_linear_layer() {
    cases(|case| {
        let (rows, inputs, classes) = (case.dims[0], case.dims[1].max(1), case.columns.max(1));
        let (x, weight, bias, targets) = fused(case, rows, inputs, classes, case.flags[0]);
        let (smoothing, cap) = (case.of(&[0.0, 0.1]), case.of(&[None, Some(2.0), Some(7.5)]));
        let parts = run(|m| {
            let bias = bias.as_ref().map(|b| b.on(m));
            let (sum, kept) = loss::linear_cross_entropy(
                m,
                &x.on(m),
                &weight.on(m),
                bias.as_ref(),
                &ids(m, &targets),
                smoothing,
                cap,
                [false; 3],
            )?;
            Ok([sum].into_iter().chain(kept).collect())
        });
        let mut logits = product(&x.values, &weight.values.clone().reversed_axes());
        if let Some(bias) = &bias {
            logits += &bias.values;
        }
        if let Some(cap) = cap {
            logits.mapv_inplace(|x| cap * (x / cap).tanh());
        }
        let (losses, lse) = oracle(&logits, &targets, smoothing);
        // Logits of at most inputs + 1 are rounded to the type.
        let n = 2.0 * unit(case.dtype) / unit(wide(case.dtype)) + classes as f64 + 32.0;
        let size = inputs as f64 + 1.0 + (classes as f64).ln();
        near_by(
            &parts[0],
            &scalar(losses.iter().sum()),
            n,
            size * (1.0 + rows as f64),
        );
        near_by(&parts[1], &vector(lse), n, size);
    });
}

#[test]
fn many_classes_in_chunks_are_the_plain_loss() {
    // Three chunks, the last of which is short; targets in each, and on their borders.
    let (rows, inputs, classes) = (7, 5, 2 * 4096 + 37);
    let targets = [0, 4095, 4096, IGNORE, 8191, 8192, classes as i64 - 1];
    let number = |i: usize| ((i * 7919 + 13) % 2003) as f64 / 1001.5 - 1.0;
    let data = |from: usize, count: usize| (0..count).map(|i| number(from + i)).collect::<Vec<_>>();
    for smoothing in [0.0, 0.1] {
        let inputs_on = |m: &Memory| {
            let x = upload(m, DType::F64, data(5, rows * inputs), &[rows, inputs]);
            let weight = upload(
                m,
                DType::F64,
                data(77, classes * inputs),
                &[classes, inputs],
            );
            (
                x,
                weight,
                upload(m, DType::F64, data(999, classes), &[classes]),
                ids(m, &targets),
            )
        };
        let dy = |m: &Memory| upload(m, DType::F64, vec![0.7], &[]);
        let chunked = run(|m| {
            let (x, w, b, t) = inputs_on(m);
            let needs = [true; 3];
            let (sum, kept) =
                loss::linear_cross_entropy(m, &x, &w, Some(&b), &t, smoothing, None, needs)?;
            let lse = kept[0].clone();
            let g = loss::linear_cross_entropy_backward(
                m,
                &x,
                &w,
                Some(&b),
                &t,
                smoothing,
                None,
                kept,
                &dy(m),
                needs,
            )?;
            Ok([sum, lse]
                .into_iter()
                .chain(g.into_iter().flatten())
                .collect())
        });
        let plain = run(|m| {
            let (x, w, b, t) = inputs_on(m);
            let p = graft_tensor::ops::Linear {
                layout: graft_tensor::ops::WeightLayout::OutIn,
                activation: None,
            };
            let (logits, _) = graft_tensor::ops::linear(m, &p, &x, &w, Some(&b), false)?;
            let (sum, lse) = loss::cross_entropy(m, &logits, &t, smoothing)?;
            let d = loss::cross_entropy_backward(m, &logits, &t, smoothing, &lse, &dy(m))?;
            let dx = graft_tensor::ops::matmul(m, &d, &w)?;
            let dw = graft_tensor::ops::weight_gradient(m, p.layout, &x, &d, x.dtype())?;
            Ok(vec![
                sum,
                lse,
                dx,
                dw,
                graft_tensor::ops::sum_to_columns(m, &d, d.dtype())?,
            ])
        });
        for (y, want) in chunked.iter().zip(&plain) {
            // Sums of 8229 terms of the order of 1 in another order.
            near_by(y, &want.values, 8229.0, 10.0);
        }
        let (x, w) = (data(5, rows * inputs), data(77, classes * inputs));
        let logits = ndarray::Array2::from_shape_fn((rows, classes), |(r, c)| {
            (0..inputs)
                .map(|i| x[r * inputs + i] * w[c * inputs + i])
                .sum::<f64>()
                + number(999 + c)
        });
        let (losses, _) = oracle(&logits.into_dyn(), &targets, smoothing);
        near_by(&chunked[0], &scalar(losses.iter().sum()), 8229.0, 100.0);
    }
}

/// The most bytes that the loss of so many rows takes beside its inputs, its gradients included, whichever are asked for.
fn peak_of_the_fused_loss(rows: usize, inputs: usize, classes: usize, needs: [bool; 3]) -> usize {
    let m = Memory::planned();
    let zeros = |shape: &[usize]| Tensor::zeros(&m, DType::F32, shape).unwrap();
    let (x, w) = (zeros(&[rows, inputs]), zeros(&[classes, inputs]));
    let (t, dy) = (ids(&m, &vec![1; rows]), zeros(&[]));
    m.reset_peak();
    let before = m.usage().peak_total;
    let (_, kept) = loss::linear_cross_entropy(&m, &x, &w, None, &t, 0.0, None, needs).unwrap();
    if needs != [false; 3] {
        loss::linear_cross_entropy_backward(&m, &x, &w, None, &t, 0.0, None, kept, &dy, needs)
            .unwrap();
    }
    m.usage().peak_total - before
}

#[test]
fn the_logits_of_many_classes_are_never_held() {
    let (rows, inputs) = (1024, 8);
    for needs in [
        [false; 3],
        [true, false, false],
        [false, true, false],
        [true, true, false],
    ] {
        // Beside the gradient of the weight, which has the vocabulary's size.
        let beside = |classes: usize| {
            let dw = if needs[1] { classes * inputs * 4 } else { 0 };
            peak_of_the_fused_loss(rows, inputs, classes, needs) - dw
        };
        let (some, many) = (16_384, 131_072);
        assert!(beside(many) < rows * many * 4 / 16, "{needs:?}");
        assert!(beside(many) <= beside(some), "{needs:?}");
    }
}

/// Next to it, the chunks that it is made of are small.
#[test]
fn the_gradient_of_many_classes_is_held_once() {
    let (rows, inputs, classes) = (16, 64, 131_072);
    let dw = classes * inputs * 4;
    let peak = peak_of_the_fused_loss(rows, inputs, classes, [true, true, false]);
    assert!(dw < peak && peak < dw + dw / 8, "{peak} for {dw}");
}

#[test]
fn gradients_of_the_fused_loss() {
    cases(|case| {
        let (rows, inputs, classes) = (case.dims[0], case.dims[1].max(1), case.columns.max(1));
        let (x, weight, bias, targets) = fused(case, rows, inputs, classes, case.flags[0]);
        let needs = [case.flags[1], case.flags[2], case.flags[3] && case.flags[0]];
        let cap = case.of(&[None, Some(2.0), Some(7.5)]);
        let gradient = |m: &Memory, t: DType| {
            let bias = bias.as_ref().map(|b| b.cast_on(t, m));
            let (x, w, targets) = (x.cast_on(t, m), weight.cast_on(t, m), ids(m, &targets));
            let (_, kept) =
                loss::linear_cross_entropy(m, &x, &w, bias.as_ref(), &targets, 0.1, cap, needs)?;
            let dy = Tensor::full(m, wide(t), &[], 1.0)?;
            let parts = loss::linear_cross_entropy_backward(
                m,
                &x,
                &w,
                bias.as_ref(),
                &targets,
                0.1,
                cap,
                kept,
                &dy,
                needs,
            )?;
            assert_eq!(parts.each_ref().map(Option::is_some), needs);
            Ok(parts.into_iter().flatten().collect())
        };
        // Logits of at most inputs + 1 are rounded to the type, and so are their gradients; those
        // of a row add up to 2 at most.
        let rounded = unit(case.dtype) / unit(wide(case.dtype));
        let n = rounded * (inputs as f64 + 3.0) + 2.0 * classes as f64 + 32.0;
        near_f64(case, gradient, n, 2.0 * (1.0 + rows as f64));
    });
}

#[test]
fn binary_cross_entropy() {
    cases(|case| {
        let x = case.between(0, &case.dims, -8.0, 8.0);
        let t = case.between(1, &case.dims, 0.0, 1.0);
        let y = run1(|m| loss::bce_with_logits(m, &x.on(m), &t.on(m)));
        let mut want = 0.0;
        let mut slope = x.values.clone();
        ndarray::Zip::from(&mut slope)
            .and(&t.values)
            .for_each(|x, &t| {
                let p = 1.0 / (1.0 + (-*x).exp());
                // -t ln p - (1 - t) ln (1 - p), with 1 - p = p(-x)
                want += t * (1.0 + (-*x).exp()).ln() + (1.0 - t) * (1.0 + x.exp()).ln();
                *x = 1.5 * (p - t);
            });
        let n = x.values.len() as f64;
        near_by(&y, &scalar(want), n.sqrt() + 16.0, 8.0 * (1.0 + n));
        let dx = run1(|m| {
            let dy = Tensor::full(m, wide(case.dtype), &[], 1.5)?;
            loss::bce_with_logits_backward(m, &x.on(m), &t.on(m), &dy)
        });
        near_by(&dx, &slope, 16.0, 1.5);
    });
}

#[test]
fn sum_of_all() {
    cases(|case| {
        let x = case.input(0, &case.dims);
        let y = run1(|m| loss::sum_all(m, &x.on(m)));
        assert_eq!(y.dtype, wide(case.dtype));
        let size = x.values.mapv(f64::abs).sum();
        near_by(
            &y,
            &scalar(x.values.sum()),
            x.values.len() as f64 + 1.0,
            size,
        );
    });
}
