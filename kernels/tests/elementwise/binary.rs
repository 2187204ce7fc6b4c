use crate::support::*;
use graft_kernels::binary::*;
use graft_kernels::parallel;
use ndarray::{ArrayD, IxDyn};
use proptest::prelude::*;

fn oracle(kind: Binary, a: f64, b: f64) -> f64 {
    match kind {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Max => a.max(b),
        Binary::Min => a.min(b),
    }
}

fn flat<T: Stored>(n: usize, seed: u64) {
    let (a, b): (Vec<T>, Vec<T>) = (stored(n, seed, -3.0, 3.0), stored(n, seed + 1, 0.5, 3.0));
    let (wa, wb) = (widen(&a), widen(&b));
    for kind in Binary::ALL {
        let want: Vec<f64> = (0..n).map(|i| oracle(kind, wa[i], wb[i])).collect();
        on_each(|isa| {
            let mut y = vec![T::default(); n];
            binary_with(isa, kind, &a, &b, &mut y);
            close(&format!("{kind:?}"), &y, &want, 1.0, |i| want[i]);
        });
    }
    let by = 0.375;
    let want_sum: Vec<f64> = (0..n).map(|i| wa[i] + wb[i]).collect();
    let want_scaled: Vec<f64> = (0..n).map(|i| wa[i] + by * wb[i]).collect();
    let want_product: Vec<f64> = wa.iter().map(|a| a * by).collect();
    on_each(|isa| {
        let (mut sum, mut scaled, mut product) = (a.clone(), a.clone(), a.clone());
        add_assign_with(isa, &mut sum, &b);
        add_scaled_with(isa, &mut scaled, &b, by);
        scale_in_place_with(isa, &mut product, by);
        close("add_assign", &sum, &want_sum, 1.0, |_| 6.0);
        close("add_scaled", &scaled, &want_scaled, 2.0, |_| 6.0);
        close("scale_in_place", &product, &want_product, 1.0, |_| 3.0);
    });
}

/// Broadcasting as ndarray does it.
fn broadcast(kind: Binary, shape: &[usize], stretch: &[(bool, bool)], seed: u64) {
    let own = |of_a: bool| -> Vec<usize> {
        let keep = |(&n, &(a, b)): (&usize, &(bool, bool))| {
            if if of_a { a } else { b } { 1 } else { n }
        };
        shape.iter().zip(stretch).map(keep).collect()
    };
    let array = |shape: &[usize], seed| {
        let n = shape.iter().product();
        let x: Vec<f32> = stored(n, seed, 0.5, 3.0);
        ArrayD::from_shape_vec(IxDyn(shape), x).unwrap()
    };
    let (a, b) = (array(&own(true), seed), array(&own(false), seed + 1));
    let strides = |x: &ArrayD<f32>| -> Vec<usize> {
        x.broadcast(shape)
            .unwrap()
            .strides()
            .iter()
            .map(|&s| s as usize)
            .collect()
    };
    let (view_a, view_b) = (a.broadcast(shape).unwrap(), b.broadcast(shape).unwrap());
    let want: Vec<f64> = view_a
        .iter()
        .zip(&view_b)
        .map(|(&a, &b)| oracle(kind, f64::from(a), f64::from(b)))
        .collect();
    let (flat_a, flat_b) = (a.as_slice().unwrap(), b.as_slice().unwrap());
    on_each(|isa| {
        let mut y = vec![0f32; want.len()];
        binary_strided_with(
            isa,
            kind,
            shape,
            flat_a,
            &strides(&a),
            flat_b,
            &strides(&b),
            &mut y,
        );
        close("binary_strided", &y, &want, 1.0, |i| want[i]);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn same_shapes(n in 0usize..400, seed in any::<u32>()) {
        for_all_types!(flat(n, u64::from(seed)));
    }

    #[test]
    fn broadcast_shapes(
        dims in prop::collection::vec((1usize..6, any::<bool>(), any::<bool>()), 0..=6),
        wide in 0usize..80, kind in 0usize..6, seed in any::<u32>(),
    ) {
        let mut shape: Vec<usize> = dims.iter().map(|d| d.0).collect();
        if let Some(last) = shape.last_mut() {
            *last += wide;
        }
        let stretch: Vec<_> = dims.iter().map(|d| (d.1, d.2)).collect();
        broadcast(Binary::ALL[kind], &shape, &stretch, u64::from(seed));
    }
}

#[test]
fn transposed_operands() {
    // y = aᵀ + b with a [3, 5]
    let a: Vec<f32> = (0..15).map(|i| i as f32).collect();
    let b = vec![100.0; 15];
    let mut y = vec![0.0; 15];
    binary_strided(Binary::Add, &[5, 3], &a, &[1, 5], &b, &[3, 1], &mut y);
    for i in 0..5 {
        for j in 0..3 {
            assert_eq!(y[i * 3 + j], 100.0 + a[j * 5 + i]);
        }
    }
}

#[test]
fn nothing_to_do() {
    let mut y: [f32; 0] = [];
    binary_strided(
        Binary::Add,
        &[3, 0, 2],
        &[],
        &[0, 2, 1],
        &[1.0],
        &[0, 0, 0],
        &mut y,
    );
    let mut y = [0f32];
    binary_strided(Binary::Mul, &[], &[2.0], &[], &[3.0], &[], &mut y);
    assert_eq!(y, [6.0]);
}

#[test]
fn maximum_and_minimum_keep_nan() {
    let nan = f32::NAN;
    on_each(|isa| {
        for kind in [Binary::Max, Binary::Min] {
            let mut y = [0.0; 3];
            binary_with(isa, kind, &[nan, 1.0, nan], &[1.0, nan, nan], &mut y);
            assert!(y.iter().all(|y| y.is_nan()), "{kind:?} on {isa:?}: {y:?}");
        }
    });
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let (rows, cols) = (1201, 129);
    let (a, b): (Vec<f32>, Vec<f32>) =
        (stored(rows * cols, 1, -5.0, 5.0), stored(cols, 2, 1.0, 2.0));
    assert!(a.len() > parallel::GRAIN);
    same_on_any_pool("binary_strided", || {
        let mut y = vec![0.0; a.len()];
        binary_strided(
            Binary::Div,
            &[rows, cols],
            &a,
            &[cols, 1],
            &b,
            &[0, 1],
            &mut y,
        );
        bits(&y)
    });
    let mut y = vec![0.0; a.len()];
    binary_strided(
        Binary::Div,
        &[rows, cols],
        &a,
        &[cols, 1],
        &b,
        &[0, 1],
        &mut y,
    );
    for (i, y) in y.iter().enumerate() {
        assert_eq!(*y, a[i] / b[i % cols]);
    }
}

#[test]
#[should_panic(expected = "binary_strided: b has 3 elements, element 3 is addressed")]
fn what_is_addressed_must_exist() {
    binary_strided(
        Binary::Add,
        &[2, 4],
        &[0f32; 8],
        &[4, 1],
        &[0.0; 3],
        &[0, 1],
        &mut [0.0; 8],
    );
}

#[test]
#[should_panic(expected = "binary_strided: rank 7 above 6")]
fn the_rank_is_limited() {
    binary_strided(
        Binary::Add,
        &[1; 7],
        &[0f32],
        &[1; 7],
        &[0.0],
        &[1; 7],
        &mut [0.0],
    );
}

#[test]
#[should_panic(expected = "add_assign: x and y differ in length")]
fn lengths_are_checked() {
    add_assign(&mut [0f32; 2], &[1.0; 3]);
}
