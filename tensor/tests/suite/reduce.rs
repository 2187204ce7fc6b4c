use graft_tensor::ops::{self, Reduce};
use ndarray::{ArrayD, Axis};

use crate::common::*;

#[test]
fn along_each_dimension() {
    for kind in [Reduce::Sum, Reduce::Mean, Reduce::Max] {
        cases(|case| {
            let axis = case.pick % 4;
            let mut shape = case.dims;
            shape[axis] = case.columns;
            if kind != Reduce::Sum {
                shape[axis] = shape[axis].max(1);
            }
            let (x, keep) = (case.input(0, &shape), case.flags[0]);
            let y = run1(|m| ops::reduce(m, kind, &x.on(m), axis, keep));
            let at = Axis(axis);
            let length = shape[axis] as f64;
            let (mut want, mut size) = match kind {
                Reduce::Sum => (x.values.sum_axis(at), x.values.mapv(f64::abs).sum_axis(at)),
                Reduce::Mean => (
                    x.values.sum_axis(at) / length,
                    x.values.mapv(f64::abs).sum_axis(at) / length,
                ),
                Reduce::Max => {
                    let max = x.values.fold_axis(at, f64::NEG_INFINITY, |a, b| a.max(*b));
                    (max.clone(), max.mapv(|_| 0.0))
                }
            };
            if keep {
                want = want.insert_axis(at);
                size = size.insert_axis(at);
            }
            match kind {
                Reduce::Max => equal(&y, &want),
                _ => near(&y, &want, length + 1.0, &size),
            }
        });
    }
}

#[test]
fn maxima_go_back_to_the_first_of_equals() {
    cases(|case| {
        let axis = case.pick % 4;
        let mut shape = case.dims;
        shape[axis] = shape[axis].max(1);
        // Few distinct values: ties are the rule.
        let mut x = case.input(0, &shape).plain();
        x.values.mapv_inplace(f64::round);
        let mut reduced = shape;
        reduced[axis] = 1;
        let dy = case.between(1, &reduced, 0.5, 1.0);
        let dx = run1(|m| {
            let x = x.on(m);
            let y = ops::reduce(m, Reduce::Max, &x, axis, true)?;
            ops::max_backward(m, &x, &y, &dy.on(m), axis)
        });
        let mut want = ArrayD::zeros(x.values.raw_dim());
        let lanes = want.lanes_mut(Axis(axis)).into_iter();
        let from = x.values.lanes(Axis(axis)).into_iter().zip(dy.values.iter());
        for (mut to, (x, &dy)) in lanes.zip(from) {
            let max = x.fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            to[x.iter().position(|&x| x == max).unwrap()] = dy;
        }
        equal(&dx, &want);
    });
}

#[test]
fn the_first_maximum_of_a_row() {
    cases(|case| {
        let mut x = case
            .input(0, &[case.dims[0], case.dims[1], case.columns.max(1)])
            .plain();
        x.values.mapv_inplace(f64::round);
        let y = run1(|m| ops::argmax(m, &x.on(m)));
        let want = x.values.map_axis(Axis(2), |row| {
            let max = row.fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            row.iter().position(|&x| x == max).unwrap() as f64
        });
        equal(&y, &want);
    });
}
