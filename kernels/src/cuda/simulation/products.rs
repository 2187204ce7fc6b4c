//! Products of TF32 numbers as the simulation has them (`products.cu`), and f32 products that are made of them.

use crate::cuda::gemm::{Epilogue, Kernels, Layout, Products, gemm};
use crate::cuda::launch::args;
use crate::cuda::{Buffer, Gpu, Launch, Scalar};
use crate::gemm::{Batch, Operands};

fn placed(gpu: &Gpu, values: &[f32]) -> Buffer {
    let buffer = gpu.allocate(4 * values.len()).unwrap();
    let to = buffer.slice_mut(0, 4 * values.len(), Scalar::U8);
    gpu.upload(bytemuck::cast_slice(values), to).unwrap();
    buffer
}

fn read(gpu: &Gpu, buffer: &Buffer, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    let from = buffer.slice(0, count, Scalar::F32);
    gpu.download(from, bytemuck::cast_slice_mut(&mut values))
        .unwrap();
    values
}

/// One instruction: `c [16, 8] + a [16, 8] * b [8, 8]`.
fn instruction(gpu: &Gpu, a: &[f32], b: &[f32], c: &[f32]) -> Vec<f32> {
    let [a, b, c] = [a, b, c].map(|x| placed(gpu, x));
    let d = gpu.allocate(4 * 128).unwrap();
    let at = |x: &Buffer| x.slice(0, 1, Scalar::F32).address();
    let args = args![at(&a), at(&b), at(&c), at(&d)];
    gpu.launch("products", "product_tf32", Launch::linear(1, 32), args)
        .unwrap();
    read(gpu, &d, 128)
}

/// A first row, beside zeros.
fn row(of: &[f32], count: usize) -> Vec<f32> {
    let mut values = of.to_vec();
    values.resize(count, 0.0);
    values
}

/// A first column of `[8, 8]`.
fn column(of: &[f32]) -> Vec<f32> {
    let mut values = vec![0.0; 64];
    of.iter().enumerate().for_each(|(i, &x)| values[8 * i] = x);
    values
}

#[test]
#[ignore = "needs the simulation"]
fn instruction_multiplies_matrices_and_cuts_sums() {
    let gpu = Gpu::open(0).unwrap();
    // Numbers of which all sums are exact, each another one.
    let a: Vec<f32> = (0..128).map(|i| ((37 * i) % 128 - 61) as f32).collect();
    let b: Vec<f32> = (0..64).map(|i| ((29 * i) % 64 - 30) as f32).collect();
    let c: Vec<f32> = (0..128).map(|i| (1000 * i) as f32).collect();
    let found = instruction(&gpu, &a, &b, &c);
    for (at, &sum) in found.iter().enumerate() {
        let (row, column) = (at / 8, at % 8);
        let products = (0..8).map(|k| a[8 * row + k] * b[8 * k + column]);
        assert_eq!(sum, c[at] + products.sum::<f32>(), "{row}, {column}");
    }
    let one = |c: f32, a: &[f32], b: &[f32]| {
        instruction(&gpu, &row(a, 128), &column(b), &row(&[c], 128))[0]
    };
    let (last, below) = (2f32.powi(-23), 2f32.powi(-24));
    // Factors end after ten bits; what is less than the last bit of the largest is cut, towards zero.
    assert_eq!(
        one(0.0, &[1.0 + 2f32.powi(-10) + last], &[1.0]),
        1.0 + 2f32.powi(-10)
    );
    assert_eq!(one(1.0, &[last * 1.5], &[1.0]), 1.0 + last);
    assert_eq!(one(-1.0, &[last * 1.5], &[-1.0]), -1.0 - last);
    assert_eq!(one(1.0, &[below; 4], &[1.0; 4]), 1.0);
    assert_eq!(one(1.0, &[below; 4], &[-1.0; 4]), 1.0);
    assert_eq!(
        one(0.0, &[2f32.powi(-149), 2f32.powi(-140)], &[1.0, 0.5]),
        0.0
    );
    assert_eq!(one(0.0, &[2f32.powi(-136)], &[0.5]), 2f32.powi(-137));
    assert_eq!(
        one(0.0, &[2f32.powi(100)], &[2f32.powi(100)]),
        f32::INFINITY
    );
    assert_eq!(one(0.0, &[f32::NEG_INFINITY], &[2.0]), f32::NEG_INFINITY);
    assert!(one(0.0, &[f32::INFINITY], &[0.0]).is_nan());
}

/// Over positive numbers, what tensor cores cut from long sums adds up; `gemm.cu` rounds in between.
#[test]
#[ignore = "needs the simulation"]
fn long_sums_are_not_left_to_tensor_cores() {
    const K: usize = 4096;
    let gpu = Gpu::open(0).unwrap();
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        0.5 + (state >> 40) as f32 / (1 << 24) as f32
    };
    let a: Vec<f32> = (0..16 * K).map(|_| next()).collect();
    let b: Vec<f32> = (0..8 * K).map(|_| next()).collect();
    let exact: Vec<f64> = (0..128)
        .map(|at| {
            let product = |k| f64::from(a[at / 8 * K + k]) * f64::from(b[8 * k + at % 8]);
            (0..K).map(product).sum()
        })
        .collect();
    // Mean error, in units of the last place of f32, relative to the sum.
    let mean = |found: Vec<f32>| {
        let apart = found
            .iter()
            .zip(&exact)
            .map(|(&f, &e)| (f64::from(f) - e) / e);
        apart.sum::<f64>() / 128.0 * f64::from(1 << 24)
    };
    let [a, b] = [&a, &b].map(|x| placed(&gpu, x));
    let d = gpu.allocate(4 * 128).unwrap();
    let at = |x: &Buffer| x.slice(0, 1, Scalar::F32).address();
    let args = args![at(&a), at(&b), at(&d), K];
    gpu.launch("products", "product_long", Launch::linear(1, 32), args)
        .unwrap();
    let long = mean(read(&gpu, &d, 128));
    let layout = |rows, cols| Layout {
        scalar: Scalar::F32,
        rows,
        cols,
        row_stride: cols,
        col_stride: 1,
        aligned: true,
    };
    let [split, simple] = [Kernels::General, Kernels::Simt].map(|kernels| {
        let products = Products {
            kernels,
            operands: Operands::AsStored,
            batch: Batch {
                count: 1,
                a_stride: 0,
                b_stride: 0,
                c_stride: 128,
            },
            a: layout(16, K),
            b: layout(K, 8),
            c: Scalar::F32,
        };
        let bytes = products.workspace(gpu.limits().target).unwrap();
        let room = gpu.allocate(bytes.max(1)).unwrap();
        gemm(
            &gpu,
            &products,
            a.slice(0, 16 * K, Scalar::F32),
            b.slice(0, 8 * K, Scalar::F32),
            d.slice_mut(0, 128, Scalar::F32),
            false,
            Epilogue::default(),
            room.slice_mut(0, bytes, Scalar::U8),
        )
        .unwrap();
        mean(read(&gpu, &d, 128))
    });
    println!("mean errors, units of 2^-24: long {long:.2}, split {split:.2}, simple {simple:.2}");
    assert!(long < -100.0, "{long}");
    assert!(split.abs() < 2.0, "{split}");
}
