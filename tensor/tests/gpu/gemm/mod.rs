//! Matrix products: each kernel against sums in f64, the operations against the CPU's.

mod cases;
mod general;
mod hopper;
mod operations;
mod pairs;
mod split;

use graft_kernels::activation::{Activation, activation, activation_backward};
use graft_kernels::cuda::gemm::{
    Epilogue, Kernels, Layout, Products, gemm, gemm_pair, pair_workspace,
};
use graft_kernels::cuda::{Gpu, Scalar};
use graft_kernels::gemm::{Batch, Operands};
use graft_tensor::DType;
use half::{bf16, f16};

use crate::common::{gpu, normal};

/// One call of the kernels.
#[derive(Clone, Copy, Debug)]
struct Call {
    kernels: Kernels,
    sizes: [usize; 3],
    /// Types of A, B and C
    types: [Scalar; 3],
    operands: Operands,
    /// A and B column-major
    transposed: [bool; 2],
    /// Elements before the first of A and of B, and unused ones between their rows
    gaps: [usize; 2],
    batches: usize,
    /// Unused elements between the matrices of C
    c_gap: usize,
    /// One B for the whole batch
    shared: bool,
    accumulate: bool,
    bias: bool,
    activation: Option<Activation>,
    save: bool,
    /// C is multiplied with the activation's slope
    slope: bool,
    /// C is f16, less a number of its row
    relative: bool,
}

const PLAIN: Call = Call {
    kernels: Kernels::Auto,
    sizes: [1, 1, 1],
    types: [Scalar::F32; 3],
    operands: Operands::AsStored,
    transposed: [false; 2],
    gaps: [0; 2],
    batches: 1,
    c_gap: 8,
    shared: false,
    accumulate: false,
    bias: false,
    activation: None,
    save: false,
    slope: false,
    relative: false,
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

/// Factors beside those of a call.
struct Beside<'a> {
    products: Products,
    call: &'a Call,
    numbers: &'a Numbers,
}

fn run(gpu: &Gpu, call: &Call, numbers: &Numbers) -> Found {
    run_beside(gpu, call, numbers, None)
}

/// Runs a call twice, on outputs that hold other numbers before, and returns what it wrote.
fn run_beside(gpu: &Gpu, call: &Call, numbers: &Numbers, beside: Option<Beside>) -> Found {
    let Numbers {
        a,
        b,
        c,
        bias,
        of,
        less,
    } = numbers;
    let (products, _) = describe(call);
    let [ta, tb, tc] = call.types;
    let target = gpu.limits().target;
    let needed = match &beside {
        None => products.workspace(target).unwrap(),
        Some(beside) => pair_workspace([&products, &beside.products], target).unwrap(),
    };
    let place = |values: &[f32], scalar: Scalar| {
        let bytes = bytes(values, scalar);
        let buffer = gpu.allocate(bytes.len().max(1)).unwrap();
        gpu.upload(&bytes, buffer.slice_mut(0, bytes.len(), Scalar::U8))
            .unwrap();
        buffer
    };
    let (a_there, b_there) = (place(a, ta), place(b, tb));
    let bias_there = place(bias, Scalar::F32);
    let (of_there, less_there) = (place(of, tc), place(less, Scalar::F32));
    let second = beside.as_ref().map(|beside| {
        let Numbers { a, b, .. } = beside.numbers;
        (place(a, ta), place(b, tb))
    });
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
            slope_of: call.slope.then(|| of_there.slice(0, of.len(), tc)),
            relative_to: call
                .relative
                .then(|| less_there.slice(0, less.len(), Scalar::F32)),
        };
        let a = a_there.slice(call.gaps[0] * ta.size(), a.len() - call.gaps[0], ta);
        let b = b_there.slice(call.gaps[1] * tb.size(), b.len() - call.gaps[1], tb);
        let c_mut = c_there.slice_mut(0, c.len(), tc);
        let (adds, room) = (call.accumulate, workspace.slice_mut(0, needed, Scalar::U8));
        match (&beside, &second) {
            (Some(beside), Some((a2, b2))) => {
                let (own, gaps) = (beside.numbers, beside.call.gaps);
                let a2 = a2.slice(gaps[0] * ta.size(), own.a.len() - gaps[0], ta);
                let b2 = b2.slice(gaps[1] * tb.size(), own.b.len() - gaps[1], tb);
                let pair = [&products, &beside.products];
                gemm_pair(gpu, pair, [a, a2], [b, b2], c_mut, adds, epilogue, room)
            }
            _ => gemm(gpu, &products, a, b, c_mut, adds, epilogue, room),
        }
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
    let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
    Found {
        c: match call.relative {
            true => runs[0].0.chunks(2).map(half).collect(),
            false => values(&runs[0].0, tc),
        },
        pre: values(&runs[0].1, tc),
    }
}

/// The call's products, and how many elements C has with a gap between matrices.
fn describe(call: &Call) -> (Products, usize) {
    let [m, n, k] = call.sizes;
    let a = layout(call.types[0], m, k, call.transposed[0], call.gaps[0]);
    let b = layout(call.types[1], k, n, call.transposed[1], call.gaps[1]);
    let c_stride = m * n + if call.batches > 1 { call.c_gap } else { 0 };
    let batch = Batch {
        count: call.batches,
        a_stride: room(&a),
        b_stride: if call.shared { 0 } else { room(&b) },
        c_stride,
    };
    let products = Products {
        kernels: call.kernels,
        operands: call.operands,
        batch,
        a,
        b,
        c: call.types[2],
    };
    (products, call.batches * c_stride)
}

/// What a call is checked with.
struct Numbers {
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    bias: Vec<f32>,
    /// What slopes are of, one for each element of C
    of: Vec<f32>,
    /// What is taken from each row
    less: Vec<f32>,
}

/// For each element of C what is summed, with bias and old C; nothing between matrices.
fn sums(call: &Call, numbers: &Numbers) -> Vec<Option<f64>> {
    let (products, count) = describe(call);
    let (batch, [m, n, k]) = (products.batch, call.sizes);
    let multiplied = match call.operands {
        Operands::Bf16 => Scalar::Bf16,
        Operands::AsStored => Scalar::F32,
    };
    let mut sums = vec![None; count];
    for i in 0..call.batches {
        let a = &numbers.a[call.gaps[0] + i * batch.a_stride..];
        let b = &numbers.b[call.gaps[1] + i * batch.b_stride..];
        for row in 0..m {
            for column in 0..n {
                let at = i * batch.c_stride + row * n + column;
                let mut sum = 0.0;
                for depth in 0..k {
                    let x = a[row * products.a.row_stride + depth * products.a.col_stride];
                    let y = b[depth * products.b.row_stride + column * products.b.col_stride];
                    sum += f64::from(round(x, multiplied)) * f64::from(round(y, multiplied));
                }
                if call.accumulate {
                    sum += f64::from(numbers.c[at]);
                }
                if call.bias {
                    sum += f64::from(numbers.bias[column]);
                }
                if call.relative {
                    sum -= f64::from(numbers.less[row]);
                }
                sums[at] = Some(sum);
            }
        }
    }
    sums
}

/// Numbers for a call.
fn draw(call: &Call, seed: u64) -> Numbers {
    let (products, count) = describe(call);
    let [ta, tb, tc] = call.types;
    let matrices = if call.shared { 1 } else { call.batches };
    Numbers {
        a: numbers(call.gaps[0] + call.batches * room(&products.a), ta, seed),
        b: numbers(call.gaps[1] + matrices * room(&products.b), tb, seed + 1),
        c: numbers(count, tc, seed + 2),
        bias: numbers(call.sizes[1], Scalar::F32, seed + 3),
        of: numbers(count, tc, seed + 4),
        less: numbers(call.sizes[0], Scalar::F32, seed + 5),
    }
}

/// Checks a call against sums in f64.
fn check(call: Call) {
    let gpu = gpu().opened_gpu().unwrap();
    let numbers = draw(&call, 1);
    let sums = sums(&call, &numbers);
    let found = run(gpu, &call, &numbers);
    compare(&call, &found, &sums, &numbers);
}

fn compare(call: &Call, found: &Found, sums: &[Option<f64>], numbers: &Numbers) {
    let before = &numbers.c;
    let [m, n, k] = call.sizes;
    // Sums in f32 of k products of about 1 have lost up to so much, in any order.
    let root = (k as f64).sqrt();
    let lost = 4e-7 * root * (root + 4.0) + 1e-6;
    // A result in bf16 that was next to the middle of two may be rounded to the other.
    let rounding = match call.types[2] {
        // f16 has three bits more.
        Scalar::Bf16 if call.relative => 1.0 / 1024.0,
        Scalar::Bf16 => 1.0 / 128.0,
        _ => 2e-7,
    };
    for (at, sum) in sums.iter().enumerate() {
        let y = found.c[at];
        let Some(sum) = *sum else {
            assert_eq!(y, before[at], "{call:?}: {at} is no element of C");
            continue;
        };
        let place = at % (m * n + call.c_gap);
        let place = [place / n, place % n];
        let mut expected = [sum as f32];
        let mut allowed = lost + rounding * sum.abs();
        if call.save {
            let pre = f64::from(found.pre[at]);
            let near = (pre - sum).abs() <= allowed;
            assert!(
                near,
                "{call:?} {place:?}: {pre} kept, not {sum} +- {allowed:.1e}"
            );
            // The activation of what was kept, up to its own rounding.
            expected = [found.pre[at]];
            allowed = 1e-6 + rounding * pre.abs();
        }
        if let Some(kind) = call.activation.filter(|_| call.slope) {
            activation_backward(kind, &[numbers.of[at]], &mut expected);
            allowed = 1.2 * allowed + rounding * f64::from(expected[0]).abs();
        } else if let Some(kind) = call.activation {
            let x = expected;
            activation(kind, &x, &mut expected);
            // No activation is steeper than 1.2.
            allowed = 1.2 * allowed + rounding * f64::from(expected[0]).abs();
        }
        let expected = f64::from(expected[0]);
        let near = (f64::from(y) - expected).abs() <= allowed;
        assert!(
            near,
            "{call:?} {place:?}: {y}, not {expected} +- {allowed:.1e}"
        );
    }
}
