use crate::support::*;
use graft_kernels::norm::*;
use graft_kernels::{Float, Real, parallel};
use proptest::prelude::*;

/// One row of LayerNorm: (y, mean, rstd).
fn layer(
    s: &[f64],
    weight: Option<&[f64]>,
    bias: Option<&[f64]>,
    eps: f64,
) -> (Vec<f64>, f64, f64) {
    let n = s.len() as f64;
    let mean = s.iter().sum::<f64>() / n;
    let variance = s.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n;
    let rstd = 1.0 / (variance + eps).sqrt();
    let y = (0..s.len())
        .map(|i| (s[i] - mean) * rstd * weight.map_or(1.0, |w| w[i]) + bias.map_or(0.0, |b| b[i]))
        .collect();
    (y, mean, rstd)
}

fn layer_all(
    x: &[f64],
    cols: usize,
    weight: Option<&[f64]>,
    bias: Option<&[f64]>,
    eps: f64,
) -> Vec<f64> {
    x.chunks(cols)
        .flat_map(|row| layer(row, weight, bias, eps).0)
        .collect()
}

fn rms_all(x: &[f64], cols: usize, weight: &[f64], offset: f64, eps: f64) -> Vec<f64> {
    let row = |row: &[f64]| -> Vec<f64> {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / cols as f64;
        let rstd = 1.0 / (mean + eps).sqrt();
        row.iter()
            .zip(weight)
            .map(|(x, w)| x * rstd * (w + offset))
            .collect()
    };
    x.chunks(cols).flat_map(row).collect()
}

fn unit_all(x: &[f64], cols: usize, eps: f64) -> Vec<f64> {
    let row = |row: &[f64]| -> Vec<f64> {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(eps);
        row.iter().map(|x| x / norm).collect()
    };
    x.chunks(cols).flat_map(row).collect()
}

/// Which optional arguments are given.
#[derive(Clone, Copy, Debug)]
struct Given {
    residual: bool,
    sum: bool,
    weight: bool,
    bias: bool,
}

fn given() -> impl Strategy<Value = Given> {
    any::<(bool, bool, bool, bool)>().prop_map(|(residual, sum, weight, bias)| Given {
        residual,
        sum,
        weight,
        bias,
    })
}

/// x + residual as T stores it.
fn added<T: Float>(x: &[T], residual: Option<&[T]>) -> Vec<T> {
    match residual {
        Some(r) => x
            .iter()
            .zip(r)
            .map(|(x, r)| T::narrow(x.widen() + r.widen()))
            .collect(),
        None => x.to_vec(),
    }
}

fn layer_forward<T: Stored>(rows: usize, cols: usize, given: Given, mean_of_x: f64, seed: u64) {
    let n = rows * cols;
    let x: Vec<T> = stored(n, seed, mean_of_x - 2.0, mean_of_x + 2.0);
    let residual: Option<Vec<T>> = given.residual.then(|| stored(n, seed + 1, -1.0, 1.0));
    let weight: Option<Vec<T::Acc>> = given.weight.then(|| stored(cols, seed + 2, 0.5, 1.5));
    let bias: Option<Vec<T::Acc>> = given.bias.then(|| stored(cols, seed + 3, -1.0, 1.0));
    let s = added(&x, residual.as_deref());
    let (ws, ww, wb) = (
        widen(&s),
        weight.as_deref().map(widen),
        bias.as_deref().map(widen),
    );
    let eps = 1e-5;
    let rows_of = |r: usize| {
        layer(
            &ws[r * cols..(r + 1) * cols],
            ww.as_deref(),
            wb.as_deref(),
            eps,
        )
    };
    let want: Vec<f64> = (0..rows).flat_map(|r| rows_of(r).0).collect();
    on_each(|isa| {
        let nan = T::Acc::from_f64(f64::NAN);
        let (mut mean, mut rstd) = (vec![nan; rows], vec![nan; rows]);
        let mut y: Vec<T> = vec![T::default(); n];
        let mut sum: Option<Vec<T>> = given.sum.then(|| vec![T::default(); n]);
        layer_norm_with(
            isa,
            &x,
            residual.as_deref(),
            weight.as_deref(),
            bias.as_deref(),
            eps,
            &mut y,
            sum.as_deref_mut(),
            &mut mean,
            &mut rstd,
            cols,
        );
        if let Some(sum) = sum {
            assert_eq!(sum, s);
        }
        // The deviation from the mean carries a rounding of the row's size, scaled up by rstd; the
        // variance of deviations that are wrong by d is wrong by d².
        let size = mean_of_x.abs() + 3.0;
        close("layer_norm", &y, &want, 4.0, |i| {
            let (_, _, rstd) = rows_of(i / cols);
            8.0 + want[i].abs() * 4.0 + size.min(4.0 + size * 0.25) * rstd
        });
        for r in 0..rows {
            let (_, m, s) = rows_of(r);
            let error = (mean[r].to_f64() - m).abs();
            // The oracle adds one by one.
            let limit = (2.0 * unit::<T>() + 1e-16 * cols as f64) * size;
            assert!(error <= limit, "mean {} of {m}", mean[r].to_f64());
            let error = (rstd[r].to_f64() / s - 1.0).abs();
            let limit =
                unit::<T>() * (10.0 + 4.0 * size.min(4.0) * s) + 1e-16 * cols as f64 * size * s;
            assert!(
                error <= limit,
                "rstd {} of {s}: {error:e} > {limit:e}",
                rstd[r].to_f64()
            );
        }
    });
}

fn layer_backward(rows: usize, cols: usize, with_weight: bool, seed: u64) {
    let n = rows * cols;
    let (x, dy) = (random(n, seed, -2.0, 2.0), random(n, seed + 1, -1.0, 1.0));
    let (weight, bias) = (
        random(cols, seed + 2, 0.5, 1.5),
        random(cols, seed + 3, -1.0, 1.0),
    );
    let weight = with_weight.then_some(&weight[..]);
    let eps = 1e-2;
    let (mut y, mut mean, mut rstd) = (vec![0.0; n], vec![0.0; rows], vec![0.0; rows]);
    layer_norm(
        &x,
        None,
        weight,
        Some(&bias),
        eps,
        &mut y,
        None,
        &mut mean,
        &mut rstd,
        cols,
    );
    on_each(|isa| {
        let mut dx = vec![9.0; n];
        layer_norm_backward_input_with(isa, &x, weight, &mean, &rstd, &dy, &mut dx, cols);
        finite_differences("layer_norm dx", &x, &dx, |x| {
            weighted(&layer_all(x, cols, weight, Some(&bias), eps), &dy)
        });
        let mut workspace = vec![f64::NAN; layer_norm_backward_workspace(rows, cols)];
        let (mut dweight, mut dbias) = (vec![9.0; cols], vec![9.0; cols]);
        let both = (Some(&mut dweight[..]), Some(&mut dbias[..]));
        layer_norm_backward_params_with(
            isa,
            &x,
            &mean,
            &rstd,
            &dy,
            both.0,
            both.1,
            cols,
            &mut workspace,
        );
        finite_differences("layer_norm dbias", &bias, &dbias, |bias| {
            weighted(&layer_all(&x, cols, weight, Some(bias), eps), &dy)
        });
        if let Some(weight) = weight {
            finite_differences("layer_norm dweight", weight, &dweight, |weight| {
                weighted(&layer_all(&x, cols, Some(weight), Some(&bias), eps), &dy)
            });
        }
        // Each alone is the same.
        let (mut one, mut other) = (vec![9.0; cols], vec![9.0; cols]);
        let work = &mut workspace;
        layer_norm_backward_params_with(
            isa,
            &x,
            &mean,
            &rstd,
            &dy,
            Some(&mut one),
            None,
            cols,
            work,
        );
        layer_norm_backward_params_with(
            isa,
            &x,
            &mean,
            &rstd,
            &dy,
            None,
            Some(&mut other),
            cols,
            work,
        );
        layer_norm_backward_params_with(isa, &x, &mean, &rstd, &dy, None, None, cols, work);
        assert_eq!((one, other), (dweight, dbias));
    });
}

/// The other types against the same in f64, with the same statistics.
fn layer_backward_of<T: Stored>(rows: usize, cols: usize, with_weight: bool, seed: u64) {
    let n = rows * cols;
    let (s, dy): (Vec<T>, Vec<T>) = (stored(n, seed, -2.0, 2.0), stored(n, seed + 1, -1.0, 1.0));
    let weight: Option<Vec<T::Acc>> = with_weight.then(|| stored(cols, seed + 2, 0.5, 1.5));
    let (ws, wdy, ww) = (widen(&s), widen(&dy), weight.as_deref().map(widen));
    let stats: Vec<_> = ws
        .chunks(cols)
        .map(|row| layer(row, None, None, 1e-2))
        .collect();
    let to_acc = |x: f64| T::Acc::from_f64(x);
    let mean: Vec<T::Acc> = stats.iter().map(|s| to_acc(s.1)).collect();
    let rstd: Vec<T::Acc> = stats.iter().map(|s| to_acc(s.2)).collect();
    let (wmean, wrstd) = (widen(&mean), widen(&rstd));
    let mut want = vec![0.0; n];
    layer_norm_backward_input(&ws, ww.as_deref(), &wmean, &wrstd, &wdy, &mut want, cols);
    let (mut want_weight, mut want_bias) = (vec![0.0; cols], vec![0.0; cols]);
    let mut workspace = vec![0.0; layer_norm_backward_workspace(rows, cols)];
    let both = (Some(&mut want_weight[..]), Some(&mut want_bias[..]));
    layer_norm_backward_params(
        &ws,
        &wmean,
        &wrstd,
        &wdy,
        both.0,
        both.1,
        cols,
        &mut workspace,
    );
    on_each(|isa| {
        let mut dx = vec![T::default(); n];
        let weight = weight.as_deref();
        layer_norm_backward_input_with(isa, &s, weight, &mean, &rstd, &dy, &mut dx, cols);
        // Each of g, shift and slope·deviation is below 4 and comes with a few roundings.
        close("layer_norm dx", &dx, &want, 16.0, |i| {
            4.0 * wrstd[i / cols].max(1.0)
        });
        let (mut dweight, mut dbias) = (vec![T::Acc::ZERO; cols], vec![T::Acc::ZERO; cols]);
        let mut workspace = vec![to_acc(f64::NAN); layer_norm_backward_workspace(rows, cols)];
        let both = (Some(&mut dweight[..]), Some(&mut dbias[..]));
        layer_norm_backward_params_with(
            isa,
            &s,
            &mean,
            &rstd,
            &dy,
            both.0,
            both.1,
            cols,
            &mut workspace,
        );
        let scale = wrstd.iter().fold(1.0, |a: f64, &b| a.max(b)) * rows as f64;
        close("layer_norm dweight", &dweight, &want_weight, 8.0, |_| {
            4.0 * scale
        });
        close("layer_norm dbias", &dbias, &want_bias, 8.0, |_| rows as f64);
    });
}

fn rms<T: Stored>(rows: usize, cols: usize, given: Given, offset: f64, seed: u64) {
    let n = rows * cols;
    let x: Vec<T> = stored(n, seed, -2.0, 2.0);
    let residual: Option<Vec<T>> = given.residual.then(|| stored(n, seed + 1, -1.0, 1.0));
    let weight: Vec<T::Acc> = stored(cols, seed + 2, 0.5, 1.5);
    let s = added(&x, residual.as_deref());
    let want = rms_all(&widen(&s), cols, &widen(&weight), offset, 1e-3);
    let dy: Vec<T> = stored(n, seed + 3, -1.0, 1.0);
    on_each(|isa| {
        let mut y = vec![T::default(); n];
        let mut sum: Option<Vec<T>> = given.sum.then(|| vec![T::default(); n]);
        let mut rstd = vec![T::Acc::ZERO; rows];
        rms_norm_with(
            isa,
            &x,
            residual.as_deref(),
            &weight,
            offset,
            1e-3,
            &mut y,
            sum.as_deref_mut(),
            &mut rstd,
            cols,
        );
        if let Some(sum) = sum {
            assert_eq!(sum, s);
        }
        close("rms_norm", &y, &want, 12.0, |i| want[i]);
        // The gradients against the same in f64.
        let wide_rstd = widen(&rstd);
        let (ws, wdy, ww) = (widen(&s), widen(&dy), widen(&weight));
        let (mut want_dx, mut want_dw) = (vec![0.0; n], vec![0.0; cols]);
        rms_norm_backward_input(&ws, &ww, offset, &wide_rstd, &wdy, &mut want_dx, cols);
        let mut workspace = vec![0.0; rms_norm_backward_workspace(rows, cols)];
        rms_norm_backward_params(&ws, &wide_rstd, &wdy, &mut want_dw, cols, &mut workspace);
        let (mut dx, mut dw) = (vec![T::default(); n], vec![T::Acc::ZERO; cols]);
        rms_norm_backward_input_with(isa, &s, &weight, offset, &rstd, &dy, &mut dx, cols);
        let mut workspace = vec![T::Acc::from_f64(f64::NAN); workspace.len()];
        rms_norm_backward_params_with(isa, &s, &rstd, &dy, &mut dw, cols, &mut workspace);
        let largest = wide_rstd.iter().fold(1.0, |a: f64, &b| a.max(b));
        close("rms_norm dx", &dx, &want_dx, 16.0, |i| {
            4.0 * wide_rstd[i / cols].max(1.0)
        });
        close("rms_norm dweight", &dw, &want_dw, 8.0, |_| {
            3.0 * largest * rows as f64
        });
    });
}

fn rms_differences(rows: usize, cols: usize, offset: f64, seed: u64) {
    let n = rows * cols;
    let (x, dy) = (random(n, seed, -2.0, 2.0), random(n, seed + 1, -1.0, 1.0));
    let weight = random(cols, seed + 2, 0.5, 1.5);
    let (mut y, mut rstd) = (vec![0.0; n], vec![0.0; rows]);
    rms_norm(
        &x, None, &weight, offset, 1e-2, &mut y, None, &mut rstd, cols,
    );
    let (mut dx, mut dw) = (vec![0.0; n], vec![0.0; cols]);
    let mut workspace = vec![0.0; rms_norm_backward_workspace(rows, cols)];
    rms_norm_backward_input(&x, &weight, offset, &rstd, &dy, &mut dx, cols);
    rms_norm_backward_params(&x, &rstd, &dy, &mut dw, cols, &mut workspace);
    let loss = |x: &[f64], weight: &[f64]| weighted(&rms_all(x, cols, weight, offset, 1e-2), &dy);
    finite_differences("rms_norm dx", &x, &dx, |x| loss(x, &weight));
    finite_differences("rms_norm dweight", &weight, &dw, |weight| loss(&x, weight));
}

fn l2<T: Stored>(rows: usize, cols: usize, eps: f64, seed: u64) {
    let n = rows * cols;
    let (x, dy): (Vec<T>, Vec<T>) = (stored(n, seed, -2.0, 2.0), stored(n, seed + 1, -1.0, 1.0));
    let want = unit_all(&widen(&x), cols, eps);
    on_each(|isa| {
        let (mut y, mut inv_norm) = (vec![T::default(); n], vec![T::Acc::ZERO; rows]);
        l2_normalize_with(isa, &x, eps, &mut y, &mut inv_norm, cols);
        close("l2_normalize", &y, &want, 8.0, |i| want[i]);
        let (wide, wide_dy, wide_inv) = (widen(&y), widen(&dy), widen(&inv_norm));
        let mut want_dx = vec![0.0; n];
        l2_normalize_backward(&wide, &wide_inv, &wide_dy, &mut want_dx, cols);
        let mut dx = vec![T::default(); n];
        l2_normalize_backward_with(isa, &y, &inv_norm, &dy, &mut dx, cols);
        close("l2 dx", &dx, &want_dx, 8.0, |i| {
            wide_inv[i / cols].abs() * (2.0 + (cols as f64).sqrt())
        });
    });
}

fn l2_differences(rows: usize, cols: usize, eps: f64, seed: u64) {
    let n = rows * cols;
    let (x, dy) = (random(n, seed, 0.5, 2.0), random(n, seed + 1, -1.0, 1.0));
    let (mut y, mut inv_norm, mut dx) = (vec![0.0; n], vec![0.0; rows], vec![0.0; n]);
    l2_normalize(&x, eps, &mut y, &mut inv_norm, cols);
    l2_normalize_backward(&y, &inv_norm, &dy, &mut dx, cols);
    finite_differences("l2 dx", &x, &dx, |x| weighted(&unit_all(x, cols, eps), &dy));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layer_norm_matches(rows in 0usize..6, cols in 1usize..400, given in given(), seed in any::<u32>()) {
        for_all_types!(layer_forward(rows, cols, given, 0.5, u64::from(seed)));
    }

    #[test]
    fn layer_norm_gradients(rows in 1usize..4, cols in 2usize..9, w in any::<bool>(), seed in any::<u32>()) {
        layer_backward(rows, cols, w, u64::from(seed));
    }

    #[test]
    fn layer_norm_gradients_of_all_types(
        rows in 1usize..300, cols in 2usize..70, w in any::<bool>(), seed in any::<u32>()
    ) {
        for_all_types!(layer_backward_of(rows, cols, w, u64::from(seed)));
    }

    #[test]
    fn rms_norm_matches(
        rows in 1usize..200, cols in 1usize..100, given in given(), gemma in any::<bool>(),
        seed in any::<u32>(),
    ) {
        let offset = if gemma { 1.0 } else { 0.0 };
        for_all_types!(rms(rows, cols, given, offset, u64::from(seed)));
    }

    #[test]
    fn rms_norm_gradients(rows in 1usize..4, cols in 1usize..9, gemma in any::<bool>(), seed in any::<u32>()) {
        rms_differences(rows, cols, if gemma { 1.0 } else { 0.0 }, u64::from(seed));
    }

    #[test]
    fn l2_matches(rows in 0usize..20, cols in 1usize..200, limited in any::<bool>(), seed in any::<u32>()) {
        // No row of these reaches a length of 100, so that all or none are limited.
        let eps = if limited { 100.0 } else { 1e-6 };
        for_all_types!(l2(rows, cols, eps, u64::from(seed)));
    }

    #[test]
    fn l2_gradients(rows in 1usize..4, cols in 1usize..9, limited in any::<bool>(), seed in any::<u32>()) {
        l2_differences(rows, cols, if limited { 50.0 } else { 1e-6 }, u64::from(seed));
    }
}

#[test]
fn rows_far_from_zero_keep_their_variance() {
    let given = Given {
        residual: false,
        sum: false,
        weight: true,
        bias: true,
    };
    for cols in [64, 384, 1000] {
        layer_forward::<f32>(3, cols, given, 1e4, 11);
        layer_forward::<f32>(3, cols, given, -3e5, 12);
    }
    // Constant rows have no variance at all.
    let (mut y, mut mean, mut rstd) = ([9f32; 384], [0.0], [0.0]);
    layer_norm(
        &[1e4f32 + 0.3; 384],
        None,
        None,
        None,
        1e-12,
        &mut y,
        None,
        &mut mean,
        &mut rstd,
        384,
    );
    assert!(
        y.iter().all(|y| y.is_finite() && y.abs() < 1e-2),
        "{:?}",
        &y[..4]
    );
}

#[test]
fn a_zero_row_has_a_direction_of_zero() {
    let (mut y, mut inv_norm, mut dx) = ([9f32; 3], [0.0], [0.0; 3]);
    l2_normalize(&[0.0; 3], 1e-4, &mut y, &mut inv_norm, 3);
    l2_normalize_backward(&y, &inv_norm, &[1.0, 2.0, 3.0], &mut dx, 3);
    assert_eq!(y, [0.0; 3]);
    for (i, dx) in dx.iter().enumerate() {
        assert!((dx - 1e4 * (i + 1) as f32).abs() < 0.01, "{dx}");
    }
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let (rows, cols) = (1031, 77);
    let n = rows * cols;
    assert!(n > 2 * parallel::GRAIN);
    let (x, dy): (Vec<f32>, Vec<f32>) = (stored(n, 1, -5.0, 5.0), stored(n, 2, -1.0, 1.0));
    let weight: Vec<f32> = stored(cols, 3, 0.5, 1.5);
    same_on_any_pool("norms", || {
        let new = |n: usize| vec![0f32; n];
        let (mut y, mut s, mut dx) = (new(n), new(n), new(n));
        let (mut mean, mut rstd) = (new(rows), new(rows));
        let w = Some(&weight[..]);
        layer_norm(
            &x,
            Some(&dy),
            w,
            w,
            1e-5,
            &mut y,
            Some(&mut s),
            &mut mean,
            &mut rstd,
            cols,
        );
        layer_norm_backward_input(&s, w, &mean, &rstd, &dy, &mut dx, cols);
        let (mut dweight, mut dbias) = (new(cols), new(cols));
        let mut workspace = new(layer_norm_backward_workspace(rows, cols));
        let both = (Some(&mut dweight[..]), Some(&mut dbias[..]));
        layer_norm_backward_params(&s, &mean, &rstd, &dy, both.0, both.1, cols, &mut workspace);
        let mut first = [&y, &dx, &dweight, &dbias].map(|x| bits(x)).concat();
        rms_norm(&x, None, &weight, 1.0, 1e-5, &mut y, None, &mut rstd, cols);
        rms_norm_backward_params(&x, &rstd, &dy, &mut dweight, cols, &mut workspace);
        first.extend([&y, &dweight].map(|x| bits(x)).concat());
        first
    });
}

#[test]
#[should_panic(expected = "layer_norm: bias is not [cols]")]
fn shapes_are_checked() {
    let (mut y, mut mean, mut rstd) = ([0f32; 6], [0.0; 2], [0.0; 2]);
    layer_norm(
        &[0f32; 6],
        None,
        None,
        Some(&[0.0; 2]),
        0.0,
        &mut y,
        None,
        &mut mean,
        &mut rstd,
        3,
    );
}

#[test]
#[should_panic(expected = "layer_norm_backward_params: workspace of 5 elements, 6 needed")]
fn the_workspace_is_checked() {
    let mut workspace = [0f32; 5];
    layer_norm_backward_params(
        &[0f32; 6],
        &[0.0; 2],
        &[0.0; 2],
        &[0.0; 6],
        None,
        None,
        3,
        &mut workspace,
    );
}
