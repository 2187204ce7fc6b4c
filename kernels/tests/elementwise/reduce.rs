use crate::support::*;
use graft_kernels::reduce::*;
use graft_kernels::{Real, parallel};
use ndarray::{Array3, Axis};
use proptest::prelude::*;

fn axes<T: Stored>(outer: usize, axis: usize, inner: usize, seed: u64) {
    let x: Vec<T> = stored(outer * axis * inner, seed, -3.0, 3.0);
    let array = Array3::from_shape_vec((outer, axis, inner), widen(&x)).unwrap();
    let sums: Vec<f64> = array.sum_axis(Axis(1)).iter().copied().collect();
    let means: Vec<f64> = sums.iter().map(|s| s / axis as f64).collect();
    let largest = array.fold_axis(Axis(1), f64::NEG_INFINITY, |a, &b| a.max(b));
    let largest: Vec<f64> = largest.iter().copied().collect();
    on_each(|isa| {
        let mut y = vec![T::default(); outer * inner];
        reduce_with(isa, Reduce::Sum, &x, outer, axis, inner, &mut y);
        // Each partial sum is below 3·axis and is rounded once.
        close("sum", &y, &sums, 4.0, |_| 3.0 * axis as f64);
        reduce_with(isa, Reduce::Mean, &x, outer, axis, inner, &mut y);
        close("mean", &y, &means, 5.0, |_| 3.0);
        if axis > 0 {
            reduce_with(isa, Reduce::Max, &x, outer, axis, inner, &mut y);
            assert_eq!(widen(&y), largest, "max on {isa:?}");
        }
    });
}

fn maxima<T: Stored>(outer: usize, axis: usize, inner: usize, seed: u64) {
    // Few different values, so that there are ties.
    let x: Vec<f64> = random(outer * axis * inner, seed, 0.0, 4.0)
        .iter()
        .map(|x| x.floor())
        .collect();
    let x: Vec<T> = store(&x);
    let mut y = vec![T::default(); outer * inner];
    reduce(Reduce::Max, &x, outer, axis, inner, &mut y);
    let dy: Vec<T> = stored(outer * inner, seed + 1, 1.0, 2.0);
    let mut dx: Vec<T> = stored(x.len(), 7, 1.0, 2.0);
    reduce_max_backward(&x, &y, &dy, &mut dx, outer, axis, inner);
    for o in 0..outer {
        for i in 0..inner {
            let at = |a: usize| (o * axis + a) * inner + i;
            let mut first = 0;
            for a in 1..axis {
                if x[at(a)] > x[at(first)] {
                    first = a;
                }
            }
            for a in 0..axis {
                let want = if a == first {
                    dy[o * inner + i]
                } else {
                    T::default()
                };
                assert_eq!(dx[at(a)], want);
            }
            if inner == 1 {
                on_each(|isa| {
                    let mut index = vec![-1; outer];
                    argmax_with(isa, &x, outer, axis, &mut index);
                    assert_eq!(index[o], first as i64);
                });
            }
        }
    }
}

fn columns<T: Stored>(rows: usize, cols: usize, seed: u64) {
    let x: Vec<T> = stored(rows * cols, seed, -3.0, 3.0);
    let wide = widen(&x);
    let sums: Vec<f64> = (0..cols)
        .map(|c| (0..rows).map(|r| wide[r * cols + c]).sum())
        .collect();
    let before: Vec<T::Acc> = stored(cols, seed + 1, -3.0, 3.0);
    let more: Vec<f64> = sums
        .iter()
        .zip(widen(&before))
        .map(|(a, b)| a + b)
        .collect();
    on_each(|isa| {
        let mut workspace = vec![T::Acc::from_f64(f64::NAN); sum_rows_workspace(rows, cols)];
        let mut y = vec![T::Acc::from_f64(9.0); cols];
        sum_rows_with(isa, &x, rows, cols, &mut y, false, &mut workspace);
        close("sum_rows", &y, &sums, 6.0, |_| 3.0 * rows as f64);
        y.copy_from_slice(&before);
        sum_rows_with(isa, &x, rows, cols, &mut y, true, &mut workspace);
        close("sum_rows +=", &y, &more, 6.0, |_| 3.0 * rows as f64 + 3.0);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn axes_match_ndarray(
        outer in 0usize..6, axis in 0usize..200, inner in 1usize..90, last in any::<bool>(),
        seed in any::<u32>(),
    ) {
        let inner = if last { 1 } else { inner };
        for_all_types!(axes(outer, axis, inner, u64::from(seed)));
    }

    #[test]
    fn the_first_maximum_counts(
        outer in 0usize..6, axis in 1usize..90, inner in 1usize..20, last in any::<bool>(),
        seed in any::<u32>(),
    ) {
        let inner = if last { 1 } else { inner };
        for_all_types!(maxima(outer, axis, inner, u64::from(seed)));
    }

    #[test]
    fn columns_match(rows in 0usize..300, cols in 0usize..60, seed in any::<u32>()) {
        for_all_types!(columns(rows, cols, u64::from(seed)));
    }

    #[test]
    fn everything(n in 0usize..3000, seed in any::<u32>()) {
        fn check<T: Stored>(n: usize, seed: u32) {
            let x: Vec<T> = stored(n, u64::from(seed), -3.0, 3.0);
            let want: f64 = widen(&x).iter().sum();
            on_each(|isa| {
                // The oracle adds n numbers below 3 one by one.
                let got = sum_all_with(isa, &x);
                assert!((got - want).abs() <= 1e-16 * 3.0 * (n * n) as f64, "{got} != {want}");
            });
        }
        for_all_types!(check(n, seed));
    }
}

#[test]
fn long_axes_stay_accurate() {
    // A naive f32 sum of 2²⁰ numbers near 1 is off by far more than 2e-6 of itself.
    let (axis, inner) = (1 << 20, 3);
    let x: Vec<f32> = stored(axis * inner, 5, 0.5, 1.5);
    let mut y = vec![0f32; inner];
    reduce(Reduce::Mean, &x, 1, axis, inner, &mut y);
    for i in 0..inner {
        let want = (0..axis).map(|a| f64::from(x[a * inner + i])).sum::<f64>() / axis as f64;
        assert!((f64::from(y[i]) - want).abs() < 2e-6, "{} != {want}", y[i]);
    }
    let mut row = [0f32];
    reduce(Reduce::Mean, &x, 1, x.len(), 1, &mut row);
    assert!((f64::from(row[0]) - sum_all(&x) / x.len() as f64).abs() < 2e-6);
}

#[test]
fn nan_is_a_maximum() {
    let nan = f32::NAN;
    on_each(|isa| {
        for cols in [3, 70, 200] {
            let mut x = vec![1.0; 2 * cols];
            x[cols - 2] = nan;
            x[cols - 1] = nan;
            x[cols + 1] = f32::INFINITY;
            let (mut y, mut index) = ([0.0; 2], [0; 2]);
            reduce_with(isa, Reduce::Max, &x, 2, cols, 1, &mut y);
            assert!(
                y[0].is_nan() && y[1] == f32::INFINITY,
                "{isa:?} {cols}: {y:?}"
            );
            argmax_with(isa, &x, 2, cols, &mut index);
            assert_eq!(index, [cols as i64 - 2, 1]);
            let mut dx = vec![9.0; 2 * cols];
            reduce_max_backward(&x, &y, &[2.0, 3.0], &mut dx, 2, cols, 1);
            assert_eq!((dx[cols - 2], dx[cols - 1], dx[cols + 1]), (2.0, 0.0, 3.0));
        }
    });
    let mut index = [0];
    argmax(&[f32::NEG_INFINITY; 4], 1, 4, &mut index);
    assert_eq!(index, [0]);
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let (rows, cols) = (1031, 77);
    let x: Vec<f32> = stored(rows * cols, 1, -5.0, 5.0);
    assert!(x.len() > 2 * parallel::GRAIN);
    same_on_any_pool("reductions", || {
        let mut workspace = vec![0.0; sum_rows_workspace(rows, cols)];
        let (mut a, mut b, mut c) = (vec![0.0; cols], vec![0.0; cols], vec![0.0; rows]);
        sum_rows(&x, rows, cols, &mut a, false, &mut workspace);
        reduce(Reduce::Sum, &x, 1, rows, cols, &mut b);
        reduce(Reduce::Mean, &x, rows, cols, 1, &mut c);
        (bits(&a), bits(&b), bits(&c), sum_all(&x).to_bits())
    });
}

#[test]
#[should_panic(expected = "reduce: no maximum of nothing")]
fn no_maximum_of_nothing() {
    reduce(Reduce::Max, &[] as &[f32], 2, 0, 3, &mut [0.0; 6]);
}

#[test]
#[should_panic(expected = "sum_rows: workspace of 2 elements, 3 needed")]
fn the_workspace_is_checked() {
    sum_rows(&[0f32; 6], 2, 3, &mut [0.0; 3], false, &mut [0.0; 2]);
}
