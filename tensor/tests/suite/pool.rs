use graft_tensor::ops::{self, Pool};
use ndarray::{ArrayD, Axis, Ix2, IxDyn, s};

use crate::common::*;

#[test]
fn one_row_per_sequence() {
    for kind in Pool::ALL {
        cases(|case| {
            let offsets = case.offsets(1);
            let x = case.input(0, &[offsets[4] as usize, case.columns]);
            let y = run1(|m| ops::pool(m, kind, &x.on(m), &ids(m, &offsets)));
            let rows = x.values.view().into_dimensionality::<Ix2>().unwrap();
            let mut want = ndarray::Array2::zeros((4, case.columns));
            for (to, ends) in want.rows_mut().into_iter().zip(offsets.windows(2)) {
                let part = rows.slice(s![ends[0] as usize..ends[1] as usize, ..]);
                match kind {
                    Pool::Mean => part.mean_axis(Axis(0)).unwrap(),
                    Pool::First => part.row(0).to_owned(),
                    Pool::Last => part.row(part.nrows() - 1).to_owned(),
                    Pool::Max => part.fold_axis(Axis(0), f64::NEG_INFINITY, |a, b| a.max(*b)),
                }
                .assign_to(to);
            }
            match kind {
                Pool::Mean => near_by(&y, &want.into_dyn(), 9.0, 2.0),
                _ => equal(&y, &want.into_dyn()),
            }
        });
    }
}

#[test]
fn gradients() {
    for kind in Pool::ALL {
        cases(|case| {
            let offsets = case.offsets(1);
            let tokens = offsets[4] as usize;
            let x = case.input(0, &[tokens, case.columns]);
            let dy = case.input(1, &[4, case.columns]);
            let dx = run1(|m| {
                let x = (kind == Pool::Max).then(|| x.on(m));
                ops::pool_backward(m, kind, x.as_ref(), &ids(m, &offsets), &dy.on(m))
            });
            let mut want = ArrayD::zeros(IxDyn(&[tokens, case.columns]));
            for (s, ends) in offsets.windows(2).enumerate() {
                let (start, end) = (ends[0] as usize, ends[1] as usize);
                for c in 0..case.columns {
                    let dy = dy.values[[s, c]];
                    let column = x.values.slice(s![start..end, c]).to_vec();
                    let max = column.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
                    let first = start + column.iter().position(|&x| x == max).unwrap();
                    match kind {
                        Pool::Mean => {
                            (start..end).for_each(|t| want[[t, c]] = dy / (end - start) as f64)
                        }
                        Pool::First => want[[start, c]] = dy,
                        Pool::Last => want[[end - 1, c]] = dy,
                        Pool::Max => want[[first, c]] = dy,
                    }
                }
            }
            near_by(&dx, &want, 2.0, 0.0);
        });
    }
}
