use graft_tensor::DType;
use graft_tensor::ops::norm;
use ndarray::Axis;

use crate::common::*;

#[test]
fn softmax_and_its_logarithm() {
    cases(|case| {
        let x = case.between(0, &[case.dims[0], case.dims[1], case.columns], -8.0, 8.0);
        let y = run1(|m| norm::softmax(m, &x.on(m), false));
        let log = run1(|m| norm::softmax(m, &x.on(m), true));
        if case.columns == 0 {
            return assert_eq!(y.values.shape(), x.shape());
        }
        let lse = x
            .values
            .map_axis(Axis(2), |row| row.mapv(f64::exp).sum().ln())
            .insert_axis(Axis(2));
        let want = &x.values - &lse;
        // The exponent's rounding is relative to distances of up to 16.
        let n = case.columns as f64 + 4.0 + 16.0;
        near_by(&log, &want, n, 16.0);
        near(&y, &want.mapv(f64::exp), 2.0 * n, &want.mapv(f64::exp));
    });
}

#[test]
fn large_and_infinite_logits() {
    let rows = [
        1e4,
        1e4 - 1.0,
        -1e4,
        f64::NEG_INFINITY,
        0.0,
        f64::NEG_INFINITY,
    ];
    for dtype in [DType::F32, DType::F64] {
        let x = |m: &_| upload(m, dtype, rows.to_vec(), &[2, 3]);
        let y = run1(|m| norm::softmax(m, &x(m), false));
        let e = (-1f64).exp();
        let want = [1.0 / (1.0 + e), e / (1.0 + e), 0.0, 0.0, 1.0, 0.0];
        near_by(
            &y,
            &ndarray::arr1(&want)
                .into_shape_with_order((2, 3))
                .unwrap()
                .into_dyn(),
            8.0,
            1.0,
        );
        let log = run1(|m| norm::softmax(m, &x(m), true));
        assert_eq!(log.values[[1, 1]], 0.0);
        assert!(log.values[[0, 1]] < -0.9 && log.values[[0, 2]] < -1.9e4);
    }
}

#[test]
fn gradients() {
    for log in [false, true] {
        cases(|case| {
            let shape = [case.dims[0], case.dims[1], case.columns.max(1)];
            // What the type keeps of the output is what its backward sees.
            let mut y = case.input(0, &shape).plain();
            for mut row in y.values.rows_mut() {
                let lse = row.mapv(f64::exp).sum().ln();
                row.mapv_inplace(|x| if log { x - lse } else { (x - lse).exp() });
                row.mapv_inplace(|x| round(case.dtype, x));
            }
            let dy = case.input(1, &shape);
            let gradient = |m: &_, t| {
                let (y, dy) = (y.cast_on(t, m), dy.cast_on(t, m));
                norm::softmax_backward(m, &y, &dy, log).map(|g| vec![g])
            };
            near_f64(
                case,
                gradient,
                case.columns as f64 + 12.0,
                4.0 * (1.0 + case.columns as f64),
            );
        });
    }
}
