use graft_tensor::{Shape, ops};
use ndarray::{ArrayD, Axis, IxDyn, Slice};

use crate::common::*;

#[test]
fn rows_by_index() {
    cases(|case| {
        let rows = case.dims[0].max(1);
        let table = case.input(0, &[rows, case.columns]);
        let index = case.integers(1, case.dims[1] * case.dims[2], rows);
        let y = run1(|m| {
            let index = ids(m, &index).reshape(&case.dims[1..3])?;
            ops::gather_rows(m, &table.on(m), &index)
        });
        let at: Vec<usize> = index.iter().map(|&i| i as usize).collect();
        let shape = [case.dims[1], case.dims[2], case.columns];
        let want = table
            .values
            .select(Axis(0), &at)
            .into_shape_with_order(IxDyn(&shape))
            .unwrap();
        equal(&y, &want);
    });
}

#[test]
fn repeated_and_strided_indices() {
    let y = run1(|m| {
        let table = upload(m, graft_tensor::DType::I32, vec![1.0, 2.0, 3.0], &[3, 1]);
        let index = ids(m, &[2]).expand(&[4])?;
        ops::gather_rows(m, &table, &index)
    });
    equal(&y, &ArrayD::from_elem(IxDyn(&[4, 1]), 3.0));
}

/// `table` with the rows of `dy` added where the index says, and the same of the numbers' sizes.
fn added(table: ArrayD<f64>, dy: &ArrayD<f64>, index: &[i64]) -> (ArrayD<f64>, ArrayD<f64>) {
    let (mut size, mut want) = (table.mapv(f64::abs), table);
    for (&to, from) in index.iter().zip(dy.axis_iter(Axis(0))) {
        let (mut row, mut sum) = (
            want.index_axis_mut(Axis(0), to as usize),
            size.index_axis_mut(Axis(0), to as usize),
        );
        row += &from;
        sum += &from.mapv(f64::abs);
    }
    (want, size)
}

#[test]
fn rows_are_added_where_they_came_from() {
    cases(|case| {
        let rows = case.dims[0].max(1);
        let index = case.integers(1, case.dims[1], rows);
        let dy = case.input(0, &[case.dims[1], case.columns]);
        let y = run1(|m| ops::scatter_add_rows(m, &dy.on(m), &ids(m, &index), rows));
        let none = ArrayD::zeros(IxDyn(&[rows, case.columns]));
        let (want, size) = added(none, &dy.values, &index);
        // Each of up to 7 additions may round to the type.
        let roundings = case.dims[1] as f64 * unit(case.dtype) / unit(wide(case.dtype));
        near(&y, &want, roundings, &size);
    });
}

#[test]
fn rows_are_added_to_what_is_there() {
    cases(|case| {
        let rows = case.dims[0].max(1);
        let index = case.integers(1, case.dims[1], rows);
        let dy = case.input(0, &[case.dims[1], case.columns]);
        let table = case.input(2, &[rows, case.columns]);
        let found = run1(|m| ops::add_rows(m, table.on(m), &dy.on(m), &ids(m, &index)));
        let (want, size) = added(table.values.clone(), &dy.values, &index);
        let roundings = case.dims[1] as f64 * unit(case.dtype) / unit(wide(case.dtype));
        near(&found, &want, roundings, &size);
    });
}

#[test]
fn one_after_the_other() {
    cases(|case| {
        let axis = case.pick % 4;
        let parts: Vec<Input> = (0..1 + case.pick / 4 % 4)
            .map(|i| {
                let mut shape = case.dims;
                shape[axis] = (case.dims[axis] + 3 * i) % 8;
                case.input(i, &shape)
            })
            .collect();
        let y = run1(|m| {
            let parts: Vec<_> = parts.iter().map(|p| p.on(m)).collect();
            ops::concat(m, &parts.iter().collect::<Vec<_>>(), axis)
        });
        let views: Vec<_> = parts.iter().map(|p| p.values.view()).collect();
        equal(&y, &ndarray::concatenate(Axis(axis), &views).unwrap());
    });
}

#[test]
fn a_block_among_zeros() {
    cases(|case| {
        let (axis, start) = (case.pick % 4, case.pick / 4 % 3);
        let block = case.input(0, &case.dims);
        let mut shape = case.dims;
        shape[axis] += start + case.pick / 12 % 3;
        let to = Shape::new(&shape).unwrap();
        let y = run1(|m| ops::place(m, &block.on(m), &to, axis, start));
        let mut want = ArrayD::zeros(IxDyn(&shape));
        want.slice_axis_mut(Axis(axis), Slice::from(start..start + case.dims[axis]))
            .assign(&block.values);
        equal(&y, &want);
    });
}
