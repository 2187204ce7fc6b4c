//! Layer norm with dropout in front of it, and all of its gradients in one pass, against the same one
//! after the other: to the bit.

use crate::support::*;
use graft_kernels::Real;
use graft_kernels::dropout::{Dropout, dropout, dropout_in_place};
use graft_kernels::norm::*;
use graft_kernels::philox::Key;
use graft_kernels::reduce::{sum_rows_with, sum_rows_workspace};
use proptest::prelude::*;

const EPS: f64 = 1e-5;

fn words<T: Stored>(x: &[T]) -> Vec<u64> {
    widen(x).iter().map(|x| x.to_bits()).collect()
}

/// `[residual, sum, weight, bias]` say what is given.
fn dropped<T: Stored>(rows: usize, cols: usize, given: [bool; 4], p: f64, seed: u64) {
    let n = rows * cols;
    let x: Vec<T> = stored(n, seed, -2.0, 2.0);
    let residual: Vec<T> = stored(n, seed + 1, -1.0, 1.0);
    let weight: Vec<T::Acc> = stored(cols, seed + 2, 0.5, 1.5);
    let bias: Vec<T::Acc> = stored(cols, seed + 3, -1.0, 1.0);
    let residual = given[0].then_some(&residual[..]);
    let (weight, bias) = (
        given[2].then_some(&weight[..]),
        given[3].then_some(&bias[..]),
    );
    let key = Key::new(seed, 5, 6);
    let mut thin = vec![T::default(); n];
    dropout(&x, &mut thin, p, key);
    on_each(|isa| {
        let new = || (vec![T::default(); n], vec![T::default(); n]);
        let rest = || (vec![T::Acc::ONE; rows], vec![T::Acc::ONE; rows]);
        let ((mut y, mut sum), (mut mean, mut rstd)) = (new(), rest());
        let ((mut want, mut want_sum), (mut want_mean, mut want_rstd)) = (new(), rest());
        let save = given[1].then_some(&mut sum[..]);
        layer_norm_dropped_with(
            isa,
            &x,
            Dropout { p, key },
            residual,
            weight,
            bias,
            EPS,
            &mut y,
            save,
            &mut mean,
            &mut rstd,
            cols,
        );
        let save = given[1].then_some(&mut want_sum[..]);
        layer_norm_with(
            isa,
            &thin,
            residual,
            weight,
            bias,
            EPS,
            &mut want,
            save,
            &mut want_mean,
            &mut want_rstd,
            cols,
        );
        assert_eq!(words(&y), words(&want));
        assert_eq!(words(&sum), words(&want_sum));
        assert_eq!((mean, rstd), (want_mean, want_rstd));
    });
}

/// `[ds, dx, dweight, dbias]` say what is wanted.
fn gradients<T: Stored>(rows: usize, cols: usize, wanted: [bool; 4], weighted: bool, seed: u64) {
    let n = rows * cols;
    let (s, dy): (Vec<T>, Vec<T>) = (stored(n, seed, -2.0, 2.0), stored(n, seed + 1, -1.0, 1.0));
    let weight: Vec<T::Acc> = stored(cols, seed + 2, 0.5, 1.5);
    let weight = weighted.then_some(&weight[..]);
    let mean: Vec<T::Acc> = stored(rows, seed + 3, -0.5, 0.5);
    let rstd: Vec<T::Acc> = stored(rows, seed + 4, 0.5, 1.5);
    let dropout = Dropout {
        p: 0.3,
        key: Key::new(seed, 1, 2),
    };
    on_each(|isa| {
        let mut work = vec![T::Acc::from_f64(f64::NAN); layer_norm_backward_workspace(rows, cols)];
        let (mut ds, mut dx) = (vec![T::default(); n], vec![T::default(); n]);
        let (mut dweight, mut dbias) = (vec![T::Acc::ONE; cols], vec![T::Acc::ONE; cols]);
        let gradients = Gradients {
            ds: wanted[0].then_some(&mut ds[..]),
            dx: wanted[1].then_some((&mut dx[..], dropout)),
            dweight: wanted[2].then_some(&mut dweight[..]),
            dbias: wanted[3].then_some(&mut dbias[..]),
        };
        layer_norm_backward_with(
            isa, &s, weight, &mean, &rstd, &dy, gradients, cols, &mut work,
        );

        let mut want = vec![T::default(); n];
        layer_norm_backward_input_with(isa, &s, weight, &mean, &rstd, &dy, &mut want, cols);
        if wanted[0] {
            assert_eq!(words(&ds), words(&want));
        }
        if wanted[1] {
            dropout_in_place(&mut want, dropout.p, dropout.key);
            assert_eq!(words(&dx), words(&want));
        }
        let (mut want, work) = (vec![T::Acc::ONE; cols], &mut work);
        let one = Some(&mut want[..]);
        layer_norm_backward_params_with(isa, &s, &mean, &rstd, &dy, one, None, cols, work);
        if wanted[2] {
            assert_eq!(words(&dweight), words(&want));
        }
        let mut work = vec![T::Acc::ONE; sum_rows_workspace(rows, cols)];
        sum_rows_with::<T>(isa, &dy, rows, cols, &mut want, false, &mut work);
        if wanted[3] {
            assert_eq!(words(&dbias), words(&want));
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn dropout_in_front(
        rows in 0usize..70, cols in 1usize..600, given in any::<[bool; 4]>(), p in 0.0f64..0.9,
        seed in any::<u32>()
    ) {
        for_all_types!(dropped(rows, cols, given, p, u64::from(seed)));
    }

    #[test]
    fn all_gradients_in_one_pass(
        rows in 1usize..300, cols in 1usize..600, wanted in any::<[bool; 4]>(), weighted in any::<bool>(),
        seed in any::<u32>()
    ) {
        for_all_types!(gradients(rows, cols, wanted, weighted, u64::from(seed)));
    }
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let (rows, cols) = (1031, 77);
    let n = rows * cols;
    let (s, dy): (Vec<f32>, Vec<f32>) = (stored(n, 1, -5.0, 5.0), stored(n, 2, -1.0, 1.0));
    let weight: Vec<f32> = stored(cols, 3, 0.5, 1.5);
    let dropout = Dropout {
        p: 0.1,
        key: Key::new(7, 8, 9),
    };
    same_on_any_pool("a fused layer norm", || {
        let new = |n: usize| vec![0f32; n];
        let (mut y, mut sum, mut ds, mut dx) = (new(n), new(n), new(n), new(n));
        let (mut mean, mut rstd) = (new(rows), new(rows));
        let (mut dweight, mut dbias) = (new(cols), new(cols));
        let w = Some(&weight[..]);
        layer_norm_dropped(
            &s,
            dropout,
            Some(&dy),
            w,
            w,
            EPS,
            &mut y,
            Some(&mut sum),
            &mut mean,
            &mut rstd,
            cols,
        );
        let gradients = Gradients {
            ds: Some(&mut ds),
            dx: Some((&mut dx, dropout)),
            dweight: Some(&mut dweight),
            dbias: Some(&mut dbias),
        };
        let mut work = new(layer_norm_backward_workspace(rows, cols));
        layer_norm_backward(&sum, w, &mean, &rstd, &dy, gradients, cols, &mut work);
        [&y, &ds, &dx, &dweight, &dbias].map(|x| bits(x)).concat()
    });
}

#[test]
#[should_panic(expected = "layer_norm_backward: workspace of 5 elements, 6 needed")]
fn the_workspace_is_checked() {
    let gradients = Gradients {
        ds: None,
        dx: None,
        dweight: None,
        dbias: None,
    };
    let (s, two) = ([0f32; 6], [0.0; 2]);
    layer_norm_backward(&s, None, &two, &two, &s, gradients, 3, &mut [0.0; 5]);
}
