//! Every instruction set against `ndarray` in f64.

use graft_kernels::Float;
use graft_kernels::gemm::{
    Activation, Batch, Epilogue, Isa, MatRef, Operands, gemm, gemm_batched, gemm_batched_workspace,
    gemm_with, gemm_workspace, gemm_workspace_with,
};
use half::{bf16, f16};
use ndarray::Array2;
use proptest::prelude::*;

use crate::support::*;

/// The operand as it is multiplied: rounded to bf16 if so asked.
fn to_array<T: Float<Acc: Into<f64>>>(x: MatRef<T>, operands: Operands) -> Array2<f64> {
    Array2::from_shape_fn((x.rows, x.cols), |(i, j)| {
        let x = wide(x.data[i * x.row_stride + j * x.col_stride]);
        match operands {
            Operands::AsStored => x,
            Operands::Bf16 => bf16::from_f32(x as f32).to_f64(),
        }
    })
}

/// erf to about 1e-12: its Maclaurin series, and far from 0 the continued fraction of erfc.
fn erf(x: f64) -> f64 {
    if x.abs() < 3.0 {
        let (mut term, mut sum) = (x, x);
        for i in 1..80 {
            term *= -x * x / f64::from(i);
            sum += term / f64::from(2 * i + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let mut tail = x.abs();
        for i in (1..60).rev() {
            tail = x.abs() + f64::from(i) / 2.0 / tail;
        }
        let rest = (-x * x).exp() / tail * std::f64::consts::FRAC_2_SQRT_PI / 2.0;
        (1.0 - rest).copysign(x)
    }
}

fn activate(kind: Option<Activation>, x: f64) -> f64 {
    match kind {
        None => x,
        Some(Activation::Gelu) => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        Some(Activation::GeluTanh) => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            0.5 * x * (1.0 + (c * (x + 0.044715 * x.powi(3))).tanh())
        }
        Some(Activation::Relu) => x.max(0.0),
        Some(Activation::Tanh) => x.tanh(),
        Some(Activation::Silu) => x / (1.0 + (-x).exp()),
    }
}

fn compare(what: &str, have: f64, want: f64, tolerance: f64) {
    assert!(
        (have - want).abs() <= tolerance,
        "{what}: {have}, expected {want}, off by {:e}, allowed {tolerance:e}",
        (have - want).abs()
    );
}

/// Operands and result of one type, as they are stored and, where they can be, rounded to bf16.
fn check_case<T: Number>(m: usize, n: usize, k: usize, la: Layout, lb: Layout, extras: Extras) {
    check_types::<T, T, T>(Operands::AsStored, m, n, k, la, lb, extras);
    if T::COMPUTED > 1e-10 {
        check_types::<T, T, T>(Operands::Bf16, m, n, k, la, lb, extras);
    }
}

fn check_types<A, B, C>(
    operands: Operands,
    m: usize,
    n: usize,
    k: usize,
    la: Layout,
    lb: Layout,
    extras: Extras,
) where
    A: Number,
    B: Number<Acc = A::Acc>,
    C: Number<Acc = A::Acc>,
{
    for isa in Isa::available() {
        check_on::<A, B, C>(isa, operands, m, n, k, la, lb, extras);
    }
}

fn check_on<A: Number, B: Number<Acc = A::Acc>, C: Number<Acc = A::Acc>>(
    isa: Isa,
    operands: Operands,
    m: usize,
    n: usize,
    k: usize,
    la: Layout,
    lb: Layout,
    extras: Extras,
) {
    let (sa, sb) = (strides(la, m, k), strides(lb, k, n));
    let (a, b) = (
        random::<A>(span(m, k, sa), 1),
        random::<B>(span(k, n, sb), 2),
    );
    let (a, b) = (view(&a, m, k, sa), view(&b, k, n, sb));
    let start = random::<C>(m * n, 3);
    let bias = random::<C::Acc>(n, 4);
    let mut c = start.clone();
    // Written everywhere or the comparison below finds the NaN.
    let mut pre = vec![C::narrow(f32::NAN.into()); m * n];
    if !extras.accumulate {
        c.copy_from_slice(&pre);
    }
    let mut workspace = vec![f32::NAN.into(); gemm_workspace_with::<C>(isa, operands, m, n, k)];
    let epilogue = Epilogue {
        bias: extras.bias.then_some(&bias[..]),
        activation: extras.activation,
        pre_activation: extras.pre.then_some(&mut pre[..]),
    };
    gemm_with(
        isa,
        operands,
        a,
        b,
        &mut c,
        extras.accumulate,
        epilogue,
        &mut workspace,
    );

    let (a, b) = (to_array(a, operands), to_array(b, operands));
    let product = a.dot(&b);
    let size = a.mapv(f64::abs).dot(&b.mapv(f64::abs));
    for i in 0..m {
        for j in 0..n {
            let mut x = product[(i, j)];
            if extras.accumulate {
                x += wide(start[i * n + j]);
            }
            if extras.bias {
                x += bias[j].into();
            }
            let y = activate(extras.activation, x);
            // k + 3 roundings (the product of two bf16 is exact: a pair is rounded twice at most),
            // each at most eps times the sum of magnitudes; activations have slope below 1.13 and
            // add a few roundings of their own; then one rounding to storage.
            let summed = (k as f64 + 3.0) * C::COMPUTED * (size[(i, j)] + 2.0);
            let at =
                format!("{isa:?} ({i}, {j}) of {m}x{n}x{k} {la:?} {lb:?} {extras:?} {operands:?}");
            if extras.pre {
                let tolerance = summed + C::STORED * x.abs();
                compare(&at, wide(pre[i * n + j]), x, tolerance);
            }
            // The activation is taken of what is stored as its argument.
            let argument = match extras.activation {
                Some(_) if C::STORED > C::COMPUTED => 1.2 * C::STORED * (x.abs() + summed),
                _ => 0.0,
            };
            // The oracle's erf is good to 1e-12, times x/2.
            let own = 8.0 * C::COMPUTED * x.abs() + 1e-12 * (1.0 + x.abs());
            compare(
                &at,
                wide(c[i * n + j]),
                y,
                1.2 * summed + argument + own + C::STORED * (y.abs() + 1e-4),
            );
        }
    }
}

fn layout() -> impl Strategy<Value = Layout> {
    prop::sample::select(&LAYOUTS[..])
}

/// Sizes, how A and B lie, and what is done besides.
fn case() -> impl Strategy<Value = (usize, usize, usize, Layout, Layout, Extras)> {
    let size = || 0usize..=70;
    (size(), size(), size(), layout(), layout(), extras())
}

fn extras() -> impl Strategy<Value = Extras> {
    let kinds = [
        None,
        Some(Activation::Gelu),
        Some(Activation::GeluTanh),
        Some(Activation::Relu),
        Some(Activation::Tanh),
        Some(Activation::Silu),
    ];
    (
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
        prop::sample::select(kinds.to_vec()),
    )
        .prop_map(|(accumulate, bias, pre, activation)| Extras {
            accumulate,
            bias,
            pre,
            activation,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn f32_matches((m, n, k, la, lb, e) in case()) {
        check_case::<f32>(m, n, k, la, lb, e);
    }

    #[test]
    fn f64_matches((m, n, k, la, lb, e) in case()) {
        check_case::<f64>(m, n, k, la, lb, e);
    }

    #[test]
    fn bf16_matches((m, n, k, la, lb, e) in case()) {
        check_case::<bf16>(m, n, k, la, lb, e);
    }

    #[test]
    fn f16_matches((m, n, k, la, lb, e) in case()) {
        check_case::<f16>(m, n, k, la, lb, e);
    }

    /// As a step in bf16 has them: weights and their gradients in f32 beside bf16 activations.
    #[test]
    fn mixed_types_match((m, n, k, la, lb, e) in case(), as_stored in any::<bool>()) {
        let operands = if as_stored { Operands::AsStored } else { Operands::Bf16 };
        check_types::<bf16, f32, bf16>(operands, m, n, k, la, lb, e);
        check_types::<f32, bf16, bf16>(operands, m, n, k, la, lb, e);
        check_types::<bf16, bf16, f32>(operands, m, n, k, la, lb, e);
        check_types::<f32, f16, f32>(operands, m, n, k, la, lb, e);
    }

    #[test]
    fn batches_match(count in 0usize..40, m in 0usize..20, n in 0usize..20, k in 0usize..20, gap in 0usize..3, shared in any::<bool>(), accumulate in any::<bool>()) {
        let (a_stride, b_stride, c_stride) = (if shared { 0 } else { m * k + gap }, n * k, m * n + gap);
        let a = random::<f32>(count * (m * k + gap), 1);
        let b = random::<f32>(count * n * k, 2);
        let start = random::<f32>(count * c_stride, 3);
        let mut c = start.clone();
        let mut workspace = vec![f32::NAN; gemm_batched_workspace::<f32>(Operands::AsStored, count, m, n, k)];
        let first_a = MatRef::row_major(&a, m, k);
        let first_b = MatRef::row_major(&b, n, k).t();
        gemm_batched(Operands::AsStored, Batch { count, a_stride, b_stride, c_stride }, first_a, first_b, &mut c, accumulate, &mut workspace);
        for i in 0..count {
            let mut want = start[i * c_stride..][..c_stride].to_vec();
            let mut workspace = vec![f32::NAN; gemm_workspace::<f32>(Operands::AsStored, m, n, k)];
            gemm(
                Operands::AsStored,
                MatRef { data: &a[i * a_stride..], ..first_a },
                MatRef { data: &b[i * b_stride..], ..first_b },
                &mut want[..m * n],
                accumulate,
                Epilogue::default(),
                &mut workspace,
            );
            assert_eq!(&c[i * c_stride..][..c_stride], &want[..], "product {i}");
        }
    }
}

#[test]
fn big_products_with_edges_match() {
    let all = Extras {
        bias: true,
        pre: true,
        activation: Some(Activation::GeluTanh),
        accumulate: true,
    };
    for (m, n, k) in [
        (301, 131, 517),
        (1, 3001, 1100),
        (5, 12, 2300),
        (2101, 7, 40),
        (97, 2100, 33),
    ] {
        check_case::<f32>(m, n, k, Layout::Rows, Layout::Columns, Extras::default());
        check_case::<f32>(m, n, k, Layout::Columns, Layout::Rows, all);
        check_case::<bf16>(m, n, k, Layout::Rows, Layout::Rows, all);
        check_case::<f64>(m, n, k, Layout::Columns, Layout::Columns, all);
    }
}

#[test]
fn an_inner_size_of_zero_gives_the_bias() {
    let mut c = [9f32; 6];
    let epilogue = Epilogue {
        bias: Some(&[1.0, 2.0, 3.0]),
        ..Epilogue::default()
    };
    let (a, b) = (
        MatRef::row_major(&[0f32; 0], 2, 0),
        MatRef::row_major(&[0f32; 0], 0, 3),
    );
    let mut workspace = vec![0.0; gemm_workspace::<f32>(Operands::AsStored, 2, 3, 0)];
    gemm(
        Operands::AsStored,
        a,
        b,
        &mut c,
        false,
        epilogue,
        &mut workspace,
    );
    assert_eq!(c, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
}
