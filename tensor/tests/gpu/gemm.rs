//! Matrix products: the kernels against sums in f64, the operations against the CPU's.

use graft_kernels::activation::{Activation, activation};
use graft_kernels::cuda::gemm::{Epilogue, Layout, Products, gemm};
use graft_kernels::cuda::{Gpu, Scalar};
use graft_kernels::gemm::{Batch, Operands};
use graft_tensor::ops::{Linear, WeightLayout, input_gradient, linear, matmul, weight_gradient};
use graft_tensor::{DType, Tensor};
use half::bf16;
use proptest::prelude::*;

use crate::common::{assert_same, cpu, gpu, normal, on_gpu};

/// One call of the kernels.
#[derive(Clone, Copy, Debug)]
struct Call {
    sizes: [usize; 3],
    /// Types of A, B and C
    types: [Scalar; 3],
    operands: Operands,
    /// A and B column-major
    transposed: [bool; 2],
    /// Elements before the first of A and of B, and unused ones between their rows
    gaps: [usize; 2],
    batches: usize,
    /// One B for the whole batch
    shared: bool,
    accumulate: bool,
    bias: bool,
    activation: Option<Activation>,
    save: bool,
}

const PLAIN: Call = Call {
    sizes: [1, 1, 1],
    types: [Scalar::F32; 3],
    operands: Operands::AsStored,
    transposed: [false; 2],
    gaps: [0; 2],
    batches: 1,
    shared: false,
    accumulate: false,
    bias: false,
    activation: None,
    save: false,
};

const SHORT: Call = Call {
    types: [Scalar::Bf16; 3],
    operands: Operands::Bf16,
    ..PLAIN
};

fn round(x: f32, scalar: Scalar) -> f32 {
    match scalar {
        Scalar::Bf16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

fn bytes(values: &[f32], scalar: Scalar) -> Vec<u8> {
    match scalar {
        Scalar::Bf16 => values
            .iter()
            .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
            .collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn values(bytes: &[u8], scalar: Scalar) -> Vec<f32> {
    match scalar {
        Scalar::Bf16 => bytes
            .chunks(2)
            .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        _ => bytes
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect(),
    }
}

/// Normal numbers that `scalar` holds.
fn numbers(count: usize, scalar: Scalar, seed: u64) -> Vec<f32> {
    let x = normal(DType::F32, &[count], seed).to_vec::<f32>().unwrap();
    x.into_iter().map(|x| round(x, scalar)).collect()
}

/// A matrix among `gap` elements before it and after each of its rows (columns, if transposed).
fn layout(scalar: Scalar, rows: usize, cols: usize, transposed: bool, gap: usize) -> Layout {
    let (row_stride, col_stride) = match transposed {
        false => (cols + gap, 1),
        true => (1, rows + gap),
    };
    Layout {
        scalar,
        rows,
        cols,
        row_stride,
        col_stride,
        aligned: (gap * scalar.size()).is_multiple_of(16),
    }
}

/// Elements that a matrix with its gaps takes.
fn room(x: &Layout) -> usize {
    (x.rows * x.row_stride).max(x.cols * x.col_stride)
}

struct Found {
    c: Vec<f32>,
    pre: Vec<f32>,
}

/// Runs a call twice, on outputs that hold other numbers before, and returns what it wrote.
fn run(gpu: &Gpu, call: &Call, a: &[f32], b: &[f32], c: &[f32], bias: &[f32]) -> Found {
    let (products, _) = describe(call);
    let [ta, tb, tc] = call.types;
    let target = gpu.limits().target;
    let needed = products.workspace(target).unwrap();
    let place = |values: &[f32], scalar: Scalar| {
        let bytes = bytes(values, scalar);
        let buffer = gpu.allocate(bytes.len().max(1)).unwrap();
        gpu.upload(&bytes, buffer.slice_mut(0, bytes.len(), Scalar::U8))
            .unwrap();
        buffer
    };
    let (a_there, b_there) = (place(a, ta), place(b, tb));
    let bias_there = place(bias, Scalar::F32);
    let workspace = gpu.allocate(needed.max(1)).unwrap();
    let runs = [0, 1].map(|_| {
        let (c_there, pre_there) = (place(c, tc), place(&vec![f32::NAN; c.len()], tc));
        gpu.set_bytes(workspace.slice_mut(0, needed, Scalar::U8), 255)
            .unwrap();
        let epilogue = Epilogue {
            bias: call
                .bias
                .then(|| bias_there.slice(0, bias.len(), Scalar::F32)),
            activation: call.activation,
            pre_activation: call.save.then(|| pre_there.slice_mut(0, c.len(), tc)),
        };
        gemm(
            gpu,
            &products,
            a_there.slice(call.gaps[0] * ta.size(), a.len() - call.gaps[0], ta),
            b_there.slice(call.gaps[1] * tb.size(), b.len() - call.gaps[1], tb),
            c_there.slice_mut(0, c.len(), tc),
            call.accumulate,
            epilogue,
            workspace.slice_mut(0, needed, Scalar::U8),
        )
        .unwrap();
        let read = |buffer: &graft_kernels::cuda::Buffer| {
            let mut bytes = vec![0; c.len() * tc.size()];
            gpu.download(buffer.slice(0, c.len(), tc), &mut bytes)
                .unwrap();
            bytes
        };
        (read(&c_there), read(&pre_there))
    });
    assert_eq!(
        runs[0], runs[1],
        "{call:?}: the same call gives the same bits"
    );
    Found {
        c: values(&runs[0].0, tc),
        pre: values(&runs[0].1, tc),
    }
}

/// The call's products, and how many elements C has with a gap of 3 between matrices.
fn describe(call: &Call) -> (Products, usize) {
    let [m, n, k] = call.sizes;
    let a = layout(call.types[0], m, k, call.transposed[0], call.gaps[0]);
    let b = layout(call.types[1], k, n, call.transposed[1], call.gaps[1]);
    let c_stride = if call.batches > 1 { m * n + 3 } else { m * n };
    let batch = Batch {
        count: call.batches,
        a_stride: room(&a),
        b_stride: if call.shared { 0 } else { room(&b) },
        c_stride,
    };
    let products = Products {
        operands: call.operands,
        batch,
        a,
        b,
        c: call.types[2],
    };
    (products, call.batches * c_stride)
}

/// Checks a call against sums in f64.
fn check(call: Call) {
    let gpu = gpu().opened_gpu().unwrap();
    let (products, count) = describe(&call);
    let (batch, [m, n, k]) = (products.batch, call.sizes);
    let [ta, tb, tc] = call.types;
    let a = numbers(call.gaps[0] + call.batches * batch.a_stride, ta, 1);
    let b_matrices = if call.shared { 1 } else { call.batches };
    let b = numbers(call.gaps[1] + b_matrices * room(&products.b), tb, 2);
    let (c, bias) = (numbers(count, tc, 3), numbers(n, Scalar::F32, 4));
    let found = run(gpu, &call, &a, &b, &c, &bias);
    let multiplied = match call.operands {
        Operands::Bf16 => Scalar::Bf16,
        Operands::AsStored => Scalar::F32,
    };
    // Sums in f32 of k products of about 1 have lost up to so much, in any order.
    let lost = 4e-7 * (k as f64).sqrt() * ((k as f64).sqrt() + 4.0) + 1e-6;
    // A result in bf16 that was next to the middle of two may be rounded to the other.
    let rounding = if tc == Scalar::Bf16 {
        1.0 / 128.0
    } else {
        2e-7
    };
    let mut written = vec![false; count];
    for i in 0..call.batches {
        let (a, b) = (
            &a[call.gaps[0] + i * batch.a_stride..],
            &b[call.gaps[1] + i * batch.b_stride..],
        );
        for row in 0..m {
            for column in 0..n {
                let at = i * batch.c_stride + row * n + column;
                written[at] = true;
                let mut sum = 0.0;
                for depth in 0..k {
                    let x = a[row * products.a.row_stride + depth * products.a.col_stride];
                    let y = b[depth * products.b.row_stride + column * products.b.col_stride];
                    sum += f64::from(round(x, multiplied)) * f64::from(round(y, multiplied));
                }
                sum += if call.accumulate {
                    f64::from(c[at])
                } else {
                    0.0
                };
                sum += if call.bias {
                    f64::from(bias[column])
                } else {
                    0.0
                };
                let mut expected = [sum as f32];
                let mut allowed = lost + rounding * sum.abs();
                if call.save {
                    let pre = f64::from(found.pre[at]);
                    assert!(
                        (pre - sum).abs() <= allowed,
                        "{call:?} pre [{row}, {column}]: {pre} {sum}"
                    );
                    // The activation of what was kept, up to its own rounding.
                    expected = [pre as f32];
                    allowed = 1e-6 + rounding * pre.abs();
                }
                if let Some(kind) = call.activation {
                    let x = expected;
                    activation(kind, &x, &mut expected);
                    // No activation is steeper than 1.2.
                    allowed *= 1.2;
                    allowed += rounding * f64::from(expected[0]).abs();
                }
                let (found, expected) = (f64::from(found.c[at]), f64::from(expected[0]));
                assert!(
                    (found - expected).abs() <= allowed,
                    "{call:?} [{i}, {row}, {column}]: {found}, not {expected} +- {allowed:.1e}"
                );
            }
        }
    }
    for (at, written) in written.iter().enumerate() {
        assert!(
            *written || found.c[at] == c[at],
            "{call:?}: {at} is no element of C"
        );
    }
}

/// Sizes that are no multiples of anything, that are, and that need several blocks.
const SIZES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [3, 5, 7],
    [128, 128, 64],
    [64, 72, 16],
    [129, 127, 33],
    [16, 256, 96],
    [1, 300, 130],
    [300, 1, 65],
    [257, 200, 8],
    [200, 264, 200],
    [128, 256, 512],
    [40, 24, 0],
];

fn orders() -> impl Iterator<Item = [bool; 2]> {
    (0..4).map(|order| [order & 1 > 0, order & 2 > 0])
}

#[test]
#[ignore = "needs a GPU"]
fn products_in_f32() {
    for sizes in SIZES {
        for transposed in orders() {
            for gaps in [[0, 0], [4, 4], [3, 1]] {
                check(Call {
                    sizes,
                    transposed,
                    gaps,
                    ..PLAIN
                });
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn products_in_bf16() {
    for sizes in SIZES {
        for transposed in orders() {
            for gaps in [[0, 0], [8, 8], [3, 1]] {
                for c in [Scalar::Bf16, Scalar::F32] {
                    let types = [Scalar::Bf16, Scalar::Bf16, c];
                    check(Call {
                        sizes,
                        transposed,
                        gaps,
                        types,
                        ..SHORT
                    });
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn products_of_other_types() {
    let scalars = [Scalar::F32, Scalar::Bf16];
    for sizes in [[70, 130, 50], [128, 64, 96]] {
        for transposed in orders() {
            for types in 0..8 {
                let types = [0, 1, 2].map(|i| scalars[types >> i & 1]);
                for operands in [Operands::AsStored, Operands::Bf16] {
                    check(Call {
                        sizes,
                        transposed,
                        types,
                        operands,
                        ..PLAIN
                    });
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn epilogues() {
    let kinds = [
        None,
        Some(Activation::Gelu),
        Some(Activation::GeluTanh),
        Some(Activation::Relu),
        Some(Activation::Tanh),
        Some(Activation::Silu),
    ];
    for sizes in [[130, 70, 40], [128, 256, 64], [256, 512, 64], [5, 3, 600]] {
        for call in [PLAIN, SHORT] {
            for activation in kinds {
                for flags in 0..8 {
                    let [accumulate, bias, save] = [0, 1, 2].map(|i| flags >> i & 1 > 0);
                    check(Call {
                        sizes,
                        activation,
                        accumulate,
                        bias,
                        save,
                        ..call
                    });
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn batches() {
    for sizes in [[33, 65, 40], [128, 128, 64], [1, 64, 8], [200, 136, 72]] {
        for transposed in orders() {
            for shared in [false, true] {
                for call in [PLAIN, SHORT] {
                    for accumulate in [false, true] {
                        let batches = 7;
                        check(Call {
                            sizes,
                            transposed,
                            shared,
                            batches,
                            accumulate,
                            ..call
                        });
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn long_sums_are_split() {
    for sizes in [
        [48, 40, 5000],
        [130, 257, 3001],
        [8, 768, 4096],
        [1, 1, 20000],
    ] {
        for transposed in orders() {
            for (call, c) in [
                (PLAIN, Scalar::F32),
                (SHORT, Scalar::Bf16),
                (SHORT, Scalar::F32),
            ] {
                let types = [call.types[0], call.types[1], c];
                let rich = Call {
                    sizes,
                    transposed,
                    types,
                    ..call
                };
                check(rich);
                check(Call {
                    accumulate: true,
                    bias: true,
                    save: true,
                    activation: Some(Activation::Gelu),
                    ..rich
                });
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn any_product(
        sizes in [1usize..400, 1usize..400, 0usize..300], types in 0usize..8, ta in any::<bool>(),
        tb in any::<bool>(), gap_a in 0usize..10, gap_b in 0usize..10, flags in 0usize..16,
        batches in 1usize..4, shared in any::<bool>(), kind in 0usize..6,
    ) {
        let [accumulate, bias, save, round] = [0, 1, 2, 3].map(|i| flags >> i & 1 > 0);
        let kinds = [Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Tanh, Activation::Silu];
        check(Call {
            sizes,
            types: [0, 1, 2].map(|i| [Scalar::F32, Scalar::Bf16][types >> i & 1]),
            operands: if round { Operands::Bf16 } else { Operands::AsStored },
            transposed: [ta, tb],
            gaps: [gap_a, gap_b],
            batches,
            shared,
            accumulate,
            bias,
            activation: kinds.get(kind).copied(),
            save: save && batches == 1,
        });
    }
}

/// What a result in `dtype` of sums of `k` products may differ by from the CPU's, relative to its
/// root mean square: the order of sums, and one unit in the last place of its largest elements.
fn tolerance(dtype: DType, k: usize) -> f64 {
    match dtype {
        DType::Bf16 => 6.0 / 128.0,
        _ => 1e-6 * (k as f64).sqrt().max(4.0),
    }
}

#[track_caller]
fn assert_near(what: &str, found: &Tensor, expected: &Tensor, k: usize) {
    crate::common::assert_close(what, found, expected, tolerance(expected.dtype(), k));
}

#[test]
#[ignore = "needs a GPU"]
fn linear_and_its_gradients_as_here() {
    for (rows, inputs, outputs) in [(37, 48, 80), (300, 768, 130), (4000, 65, 33)] {
        for (x_type, w_type) in [
            (DType::F32, DType::F32),
            (DType::Bf16, DType::Bf16),
            (DType::Bf16, DType::F32),
        ] {
            for layout in [WeightLayout::OutIn, WeightLayout::InOut] {
                let shape = match layout {
                    WeightLayout::OutIn => [outputs, inputs],
                    WeightLayout::InOut => [inputs, outputs],
                };
                let x = normal(x_type, &[rows, inputs], 1);
                let dy = normal(x_type, &[rows, outputs], 2);
                let (w, bias) = (normal(w_type, &shape, 3), normal(w_type, &[outputs], 4));
                let (gx, gdy, gw, gbias) = (on_gpu(&x), on_gpu(&dy), on_gpu(&w), on_gpu(&bias));
                for (activation, save, with_bias) in [
                    (None, false, false),
                    (None, true, true),
                    (Some(Activation::Gelu), true, true),
                    (Some(Activation::GeluTanh), false, true),
                    (Some(Activation::Silu), true, false),
                ] {
                    let p = Linear { layout, activation };
                    let (b, gb) = (with_bias.then_some(&bias), with_bias.then_some(&gbias));
                    let (y, pre) = linear(cpu(), &p, &x, &w, b, save).unwrap();
                    let (gy, gpre) = linear(gpu(), &p, &gx, &gw, gb, save).unwrap();
                    assert_near("linear", &gy, &y, inputs);
                    assert_eq!(pre.is_some(), gpre.is_some());
                    if let (Some(pre), Some(gpre)) = (&pre, &gpre) {
                        assert_near("the pre-activation", gpre, pre, inputs);
                    }
                    let again = linear(gpu(), &p, &gx, &gw, gb, save).unwrap().0;
                    assert_same("linear again", &again, &gy);
                }
                let p = Linear {
                    layout,
                    activation: None,
                };
                let dx = input_gradient(cpu(), &p, &w, &dy, x.shape()).unwrap();
                let gdx = input_gradient(gpu(), &p, &gw, &gdy, x.shape()).unwrap();
                assert_near("the input's gradient", &gdx, &dx, outputs);
                let dw = weight_gradient(cpu(), layout, &x, &dy, w_type).unwrap();
                let gdw = weight_gradient(gpu(), layout, &gx, &gdy, w_type).unwrap();
                assert_near("the weight's gradient", &gdw, &dw, rows);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn matmul_broadcasts_as_here() {
    for dtype in [DType::F32, DType::Bf16] {
        let a = normal(dtype, &[2, 3, 40, 24], 1);
        let (ga, none) = (on_gpu(&a), normal(dtype, &[0, 24], 5));
        for shape in [
            &[24, 56][..],
            &[3, 24, 56],
            &[2, 1, 24, 56],
            &[5, 1, 1, 24, 56],
        ] {
            let b = normal(dtype, shape, 2);
            let c = matmul(cpu(), &a, &b).unwrap();
            let found = matmul(gpu(), &ga, &on_gpu(&b)).unwrap();
            assert_near("matmul", &found, &c, 24);
            // Views: every other matrix dimension exchanged, and a part of the columns.
            let rank = shape.len();
            let view = |x: &Tensor| x.narrow(rank - 1, 3, 24).unwrap().t().unwrap();
            let c = matmul(cpu(), &a, &view(&b)).unwrap();
            let found = matmul(gpu(), &ga, &view(&on_gpu(&b))).unwrap();
            assert_near("matmul of views", &found, &c, 24);
        }
        let empty = matmul(gpu(), &on_gpu(&none), &on_gpu(&normal(dtype, &[24, 8], 6))).unwrap();
        assert_eq!(empty.shape()[..], [0, 8]);
        let nothing = |m| Tensor::empty(m, dtype, &[5, 0]).unwrap();
        let zeros = matmul(gpu(), &nothing(gpu()), &nothing(gpu()).t().unwrap()).unwrap();
        assert!(zeros.to_f64().unwrap().iter().all(|&x| x == 0.0));
    }
}
