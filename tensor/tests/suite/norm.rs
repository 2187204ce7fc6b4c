use graft_tensor::ops::norm;
use graft_tensor::{DType, Memory, Tensor};
use ndarray::{ArrayD, Axis};

use crate::common::*;

const EPS: f64 = 1e-5;

fn per_row(x: &ArrayD<f64>, f: impl Fn(&[f64]) -> f64) -> ArrayD<f64> {
    let last = Axis(x.ndim() - 1);
    x.map_axis(last, |row| f(&row.to_vec())).insert_axis(last)
}

fn mean(row: &[f64]) -> f64 {
    row.iter().sum::<f64>() / row.len() as f64
}

fn flat(x: &ArrayD<f64>) -> ArrayD<f64> {
    x.iter()
        .copied()
        .collect::<ndarray::Array1<f64>>()
        .into_dyn()
}

fn optional(there: bool, x: &Input, dtype: DType, m: &Memory) -> Option<Tensor> {
    there.then(|| x.cast_on(dtype, m))
}

/// Roundings in a normalised element, in units of `max|s| / deviation`: those of mean and variance
/// grow with the row.
fn roundings(case: &Case, residual: bool) -> f64 {
    let sum = if residual {
        // The sum may be rounded to the type before it is normalised.
        2.0 * unit(case.dtype) / unit(wide(case.dtype))
    } else {
        0.0
    };
    (case.columns as f64 + 8.0 + sum) * (case.columns as f64).sqrt().max(1.0)
}

#[test]
fn layer_norm() {
    cases(|case| {
        let shape = [case.dims[0], case.dims[1], case.columns];
        let (x, residual) = (case.input(0, &shape), case.input(1, &shape));
        let (weight, bias) = (case.input(2, &shape[2..]), case.input(3, &shape[2..]));
        let [r, w, b, save] = case.flags;
        let parts = run(|m| {
            let t = case.dtype;
            let n = norm::layer_norm(
                m,
                &x.on(m),
                optional(r, &residual, t, m).as_ref(),
                optional(w, &weight, t, m).as_ref(),
                optional(b, &bias, t, m).as_ref(),
                EPS,
                save,
            )?;
            assert_eq!(n.sum.is_some(), r && save);
            Ok([n.y, n.mean.unwrap(), n.scale]
                .into_iter()
                .chain(n.sum)
                .collect())
        });
        if case.columns == 0 {
            return assert_eq!(parts[0].values.shape(), shape);
        }
        let s = if r {
            &x.values + &residual.values
        } else {
            x.values.clone()
        };
        let mu = per_row(&s, mean);
        let centred = &s - &mu;
        let scale = per_row(&centred, |row| {
            1.0 / (mean(&row.iter().map(|x| x * x).collect::<Vec<_>>()) + EPS).sqrt()
        });
        let ones = ArrayD::from_elem(weight.values.raw_dim(), 1.0);
        let factor = if w { &weight.values } else { &ones };
        let shift = if b { bias.values.clone() } else { &ones * 0.0 };
        let want = &centred * &scale * factor + &shift;
        // Relative to the largest of the row: that is what mean and deviation are made from.
        let largest = per_row(&s, |row| row.iter().fold(0.0, |a, x| x.abs().max(a)));
        let size = &largest * &scale * &factor.mapv(f64::abs) + &shift.mapv(f64::abs);
        near(&parts[0], &want, roundings(case, r), &size);
        let n = case.columns as f64;
        near(
            &parts[1],
            &flat(&mu),
            n + 2.0 + roundings(case, r),
            &flat(&largest),
        );
        let size = &scale * (&largest * &scale + 1.0);
        near(&parts[2], &flat(&scale), roundings(case, r), &flat(&size));
        if let Some(sum) = parts.get(3) {
            near(sum, &s, 1.0, &s.mapv(f64::abs));
        }
    });
}

#[test]
fn rms_norm() {
    cases(|case| {
        let shape = [case.dims[0], case.dims[1], case.columns];
        let (x, residual) = (case.input(0, &shape), case.input(1, &shape));
        let weight = case.input(2, &shape[2..]);
        let [r, unit_offset, save, _] = case.flags;
        let offset = f64::from(unit_offset);
        let parts = run(|m| {
            let residual = optional(r, &residual, case.dtype, m);
            let (x, weight) = (x.on(m), weight.on(m));
            let n = norm::rms_norm(m, &x, residual.as_ref(), &weight, offset, EPS, save)?;
            assert!(n.mean.is_none() && n.sum.is_some() == (r && save));
            Ok([n.y, n.scale].into_iter().chain(n.sum).collect())
        });
        if case.columns == 0 {
            return assert_eq!(parts[0].values.shape(), shape);
        }
        let s = if r {
            &x.values + &residual.values
        } else {
            x.values.clone()
        };
        let scale = per_row(&s, |row| {
            1.0 / (mean(&row.iter().map(|x| x * x).collect::<Vec<_>>()) + EPS).sqrt()
        });
        let want = &s * &scale * (&weight.values + offset);
        let largest = per_row(&s, |row| row.iter().fold(0.0, |a, x| x.abs().max(a)));
        // weight + offset may cancel.
        let size = &largest * &scale * (weight.values.mapv(f64::abs) + offset);
        near(&parts[0], &want, roundings(case, r), &size);
        let size = &scale * (&largest * &scale + 1.0);
        near(&parts[1], &flat(&scale), roundings(case, r), &flat(&size));
        if let Some(sum) = parts.get(2) {
            near(sum, &s, 1.0, &s.mapv(f64::abs));
        }
    });
}

#[test]
fn unit_length() {
    cases(|case| {
        let x = case.input(0, &[case.dims[0], case.dims[1], case.columns]);
        let parts = run(|m| {
            let n = norm::l2_normalize(m, &x.on(m), 1e-12)?;
            Ok(vec![n.y, n.scale])
        });
        if case.columns == 0 {
            return;
        }
        let length = per_row(&x.values, |row| {
            row.iter().map(|x| x * x).sum::<f64>().sqrt()
        });
        let n = case.columns as f64;
        near_by(&parts[0], &(&x.values / &length), n + 4.0, 0.0);
        near_by(&parts[1], &flat(&length.mapv(|x| 1.0 / x)), n + 4.0, 0.0);
    });
    let zero = run(|m| {
        Ok(vec![
            norm::l2_normalize(m, &upload(m, DType::F32, vec![0.0; 3], &[3]), 1e-12)?.y,
        ])
    });
    assert_eq!(
        zero[0].values.as_slice().unwrap(),
        [0.0; 3],
        "no division by zero"
    );
}

/// Rows of spread values, so that deviations are of the order of 1 and gradients well conditioned.
fn spread(case: &Case, which: usize, shape: &[usize; 2]) -> Input {
    let mut x = case.between(which, shape, -0.25, 0.25).plain();
    for ((_, c), x) in x
        .values
        .view_mut()
        .into_dimensionality::<ndarray::Ix2>()
        .unwrap()
        .indexed_iter_mut()
    {
        *x = round(case.dtype, *x + if c % 2 == 0 { 1.0 } else { -1.0 });
    }
    x
}

#[test]
fn gradients_of_norms() {
    cases(|case| {
        let shape = [case.dims[0], case.columns.max(2)];
        let (x, dy) = (spread(case, 0, &shape), case.input(1, &shape));
        let weight = case.input(2, &shape[1..]);
        let [w, needs0, needs1, unit_offset] = case.flags;
        // Statistics as the type's own forward has them would differ by its rounding of y alone;
        // they are kept in the wide type.
        let size = (shape[1] + 2 * shape[0]) as f64 + 16.0;
        let layer = |m: &Memory, t: DType| {
            let (x, dy) = (x.cast_on(t, m), dy.cast_on(t, m));
            let weight = optional(w, &weight, t, m);
            let n = norm::layer_norm(m, &x, None, weight.as_ref(), None, EPS, true)?;
            let mu = n.mean.unwrap();
            let dx = norm::layer_norm_backward_input(m, &x, weight.as_ref(), &mu, &n.scale, &dy)?;
            let wanted = [needs0, needs1];
            let rest =
                norm::layer_norm_backward_params(m, &x, &mu, &n.scale, &dy, wanted, x.dtype())?;
            assert_eq!(rest.each_ref().map(Option::is_some), wanted);
            Ok([dx].into_iter().chain(rest.into_iter().flatten()).collect())
        };
        near_f64(case, layer, size, 16.0 * (1.0 + shape[0] as f64));
        let rms = |m: &Memory, t: DType| {
            let (x, dy, weight) = (x.cast_on(t, m), dy.cast_on(t, m), weight.cast_on(t, m));
            let offset = f64::from(unit_offset);
            let n = norm::rms_norm(m, &x, None, &weight, offset, EPS, true)?;
            let wanted = [needs0, needs1];
            let parts = norm::rms_norm_backward(m, &x, &weight, offset, &n.scale, &dy, wanted)?;
            assert_eq!(parts.each_ref().map(Option::is_some), wanted);
            Ok(parts.into_iter().flatten().collect())
        };
        near_f64(case, rms, size, 16.0 * (1.0 + shape[0] as f64));
        let l2 = |m: &Memory, t: DType| {
            // The output as the case's type rounds it, whichever type it is computed in.
            let narrow = x
                .values
                .mapv(|x| round(case.dtype, x / (shape[1] as f64).sqrt()));
            let y = upload(m, t, narrow.iter().copied().collect(), &shape);
            let n = norm::l2_normalize(m, &x.cast_on(t, m), 1e-12)?;
            norm::l2_normalize_backward(m, &y, &n.scale, &dy.cast_on(t, m)).map(|g| vec![g])
        };
        near_f64(case, l2, size, 16.0);
    });
}
