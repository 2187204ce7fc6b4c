use crate::support::*;
use graft_kernels::copy::*;
use graft_kernels::parallel;
use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use proptest::prelude::*;

/// A permuted, partly broadcast view of an array, and ndarray's reading of it.
fn view(shape: &[usize], order: &[usize]) -> (Vec<i64>, Vec<usize>, Vec<usize>, Vec<i64>) {
    let n: usize = shape.iter().product();
    let array = ArrayD::from_shape_vec(IxDyn(shape), (0..n as i64).collect()).unwrap();
    let permuted = array.view().permuted_axes(IxDyn(order));
    let strides = permuted.strides().iter().map(|&s| s as usize).collect();
    let want = permuted.iter().copied().collect();
    let data = array.as_slice().unwrap().to_vec();
    (data, permuted.shape().to_vec(), strides, want)
}

fn permutation(rank: usize) -> impl Strategy<Value = Vec<usize>> {
    Just((0..rank).collect::<Vec<_>>()).prop_shuffle()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn permuted_views_are_gathered_and_scattered_back(
        (shape, order) in prop::collection::vec(1usize..8, 0..=6)
            .prop_flat_map(|s| (Just(s.clone()), permutation(s.len()))),
        grow in (0usize..40, 0usize..40),
    ) {
        let mut shape = shape;
        if shape.len() == 2 {
            shape[0] += grow.0;
            shape[1] += grow.1;
        }
        let (data, shape, strides, want) = view(&shape, &order);
        let mut got = vec![-1; want.len()];
        copy_strided(&shape, &data, &strides, &mut got);
        prop_assert_eq!(&got, &want);
        let mut back = vec![-1; data.len()];
        scatter_strided(&shape, &got, &mut back, &strides);
        prop_assert_eq!(back, data);
    }

    #[test]
    fn broadcast_views(
        dims in prop::collection::vec((1usize..6, any::<bool>()), 0..=6), wide in 0usize..70,
    ) {
        let mut shape: Vec<usize> = dims.iter().map(|d| d.0).collect();
        if let Some(last) = shape.last_mut() {
            *last += wide;
        }
        let own: Vec<usize> =
            shape.iter().zip(&dims).map(|(&n, d)| if d.1 { 1 } else { n }).collect();
        let n: usize = own.iter().product();
        let data: Vec<i64> = (0..n as i64).collect();
        let array = ArrayD::from_shape_vec(IxDyn(&own), data.clone()).unwrap();
        let wide = array.broadcast(IxDyn(&shape)).unwrap();
        let strides: Vec<usize> = wide.strides().iter().map(|&s| s as usize).collect();
        let mut got = vec![-1; shape.iter().product()];
        copy_strided(&shape, &data, &strides, &mut got);
        prop_assert_eq!(got, wide.iter().copied().collect::<Vec<_>>());
    }
}

#[test]
fn large_transpositions() {
    // Blocks of rows begin and end in the middle of the dimension around them.
    for (batch, rows, cols) in [(1, 517, 301), (7, 130, 67), (3, 16, 2048), (5, 2048, 9)] {
        let data: Vec<f32> = (0..batch * rows * cols).map(|i| i as f32).collect();
        let mut got = vec![0.0; data.len()];
        let strides = [rows * cols, 1, cols];
        copy_strided(&[batch, cols, rows], &data, &strides, &mut got);
        for (i, got) in got.iter().enumerate() {
            let (b, j, k) = (i / (rows * cols), i / rows % cols, i % rows);
            assert_eq!(*got, data[b * rows * cols + k * cols + j]);
        }
    }
}

#[test]
fn scattering_leaves_the_rest_alone() {
    let mut dst = vec![9; 10];
    scatter_strided(&[2, 2], &[1, 2, 3, 4], &mut dst, &[5, 2]);
    assert_eq!(dst, [1, 9, 2, 9, 9, 3, 9, 4, 9, 9]);
}

#[test]
fn conversions_round_once() {
    let x: Vec<f32> = stored(70_000, 3, -9.0, 9.0);
    on_each(|isa| {
        let mut short = vec![bf16::ZERO; x.len()];
        convert_with(isa, &x, &mut short);
        let mut half = vec![f16::ZERO; x.len()];
        convert_with(isa, &x, &mut half);
        let mut double = vec![0f64; x.len()];
        convert_with(isa, &x, &mut double);
        let mut back = vec![0f32; x.len()];
        convert_with(isa, &double, &mut back);
        let mut across = vec![f16::ZERO; x.len()];
        convert_with(isa, &short, &mut across);
        for i in 0..x.len() {
            assert_eq!(short[i], bf16::from_f32(x[i]));
            assert_eq!(half[i], f16::from_f32(x[i]));
            assert_eq!((double[i], back[i]), (f64::from(x[i]), x[i]));
            assert_eq!(across[i], f16::from_f32(short[i].to_f32()));
        }
    });
    let mut y = [0f32; 3];
    convert(&[1e300f64, -f64::INFINITY, f64::NAN], &mut y);
    assert_eq!(y[..2], [f32::INFINITY, f32::NEG_INFINITY]);
    assert!(y[2].is_nan());
}

#[test]
fn filling() {
    for n in [0, 1, 3 * parallel::GRAIN + 1] {
        let mut x = vec![0u8; n];
        fill(&mut x, 7);
        assert!(x.iter().all(|&x| x == 7));
    }
}

#[test]
#[should_panic(expected = "copy_strided: src has 5 elements, element 5 is addressed")]
fn what_is_addressed_must_exist() {
    copy_strided(&[2, 3], &[0i64; 5], &[3, 1], &mut [0; 6]);
}

#[test]
#[should_panic(expected = "convert: src and dst differ in length")]
fn lengths_are_checked() {
    convert(&[1f32], &mut [bf16::ZERO; 2]);
}
