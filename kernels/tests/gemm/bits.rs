//! What never changes a bit: the number of threads, and other rows and columns.

use graft_kernels::gemm::{
    Activation, Epilogue, Isa, MatRef, Operands, gemm_with, gemm_workspace_with,
};
use half::{bf16, f16};

use crate::support::*;

/// The same product on pools of several sizes: same bits.
#[test]
fn threads_do_not_change_a_bit() {
    fn product<T: Number>(
        isa: Isa,
        operands: Operands,
        m: usize,
        n: usize,
        k: usize,
        across: bool,
        threads: usize,
    ) -> Vec<T> {
        let (a, b) = (random::<T>(m * k, 1), random::<T>(k * n, 2));
        let mut c = random::<T>(m * n, 3);
        let mut workspace = vec![f32::NAN.into(); gemm_workspace_with::<T>(isa, operands, m, n, k)];
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let epilogue = Epilogue {
                activation: Some(Activation::Gelu),
                ..Epilogue::default()
            };
            // Across k A is packed, along it most kernels read it in place.
            let (a, b) = match across {
                true => (MatRef::row_major(&a, k, m).t(), MatRef::row_major(&b, k, n)),
                false => (MatRef::row_major(&a, m, k), MatRef::row_major(&b, n, k).t()),
            };
            gemm_with(isa, operands, a, b, &mut c, true, epilogue, &mut workspace);
        });
        c
    }
    fn same<T: Number>(operands: Operands, m: usize, n: usize, k: usize) {
        // Products of few rows read B in ways of each instruction set's own.
        let sets = if m <= 8 {
            Isa::available()
        } else {
            vec![Isa::detect()]
        };
        for (isa, across) in sets.into_iter().flat_map(|isa| [(isa, false), (isa, true)]) {
            let one = product::<T>(isa, operands, m, n, k, across, 1);
            for threads in [2, 3, 7] {
                assert!(
                    one == product::<T>(isa, operands, m, n, k, across, threads),
                    "{isa:?} {m}x{n}x{k} on {threads} threads, k apart: {across}"
                );
            }
        }
    }
    for (m, n, k) in [
        (150, 170, 130),
        (384, 96, 1200),
        (1, 4000, 300),
        (6, 1000, 900),
        (3, 5, 9000),
        (700, 40, 64),
        (190, 230, 4100), // several blocks of k, one packed while the one before is summed
        (4200, 70, 90),   // of rows, which share a packed B
    ] {
        same::<f32>(Operands::AsStored, m, n, k);
        same::<bf16>(Operands::AsStored, m, n, k);
        same::<f32>(Operands::Bf16, m, n, k);
        same::<bf16>(Operands::Bf16, m, n, k);
    }
    same::<f64>(Operands::AsStored, 130, 90, 700);
}

/// A row of C has the same bits whatever other rows and columns are computed with it: products of
/// few rows go another way than those of many.
#[test]
fn neighbours_do_not_change_a_bit() {
    for isa in Isa::available() {
        for layout in [Layout::Rows, Layout::Columns, Layout::Wide] {
            neighbours::<f32, f32, f32>(isa, Operands::AsStored, layout);
            neighbours::<f32, f32, f32>(isa, Operands::Bf16, layout);
            neighbours::<f32, f16, f32>(isa, Operands::AsStored, layout);
            neighbours::<bf16, f32, bf16>(isa, Operands::Bf16, layout);
            neighbours::<bf16, bf16, f32>(isa, Operands::Bf16, layout);
            neighbours::<f32, bf16, f32>(isa, Operands::Bf16, layout);
            neighbours::<bf16, bf16, bf16>(isa, Operands::AsStored, layout);
            neighbours::<f16, f16, f16>(isa, Operands::AsStored, layout);
            neighbours::<f64, f64, f64>(isa, Operands::AsStored, layout);
        }
    }
}

fn neighbours<A, B, C>(isa: Isa, operands: Operands, layout: Layout)
where
    A: Number,
    B: Number<Acc = A::Acc>,
    C: Number<Acc = A::Acc>,
{
    let (m, n, k) = (50, 150, 1101);
    let strides = strides(layout, k, n);
    let (a, b) = (random::<A>(m * k, 1), random::<B>(span(k, n, strides), 2));
    let (start, bias) = (random::<C>(m * n, 3), random::<C::Acc>(n, 4));
    let product = |first: usize, rows: usize, cols: usize| {
        let old = (first..first + rows).flat_map(|i| &start[i * n..][..cols]);
        let mut c: Vec<C> = old.copied().collect();
        let need = gemm_workspace_with::<C>(isa, operands, rows, cols, k);
        let mut workspace = vec![f32::NAN.into(); need];
        let a = MatRef {
            rows,
            ..MatRef::row_major(&a[first * k..], rows, k)
        };
        let epilogue = Epilogue {
            bias: Some(&bias[..cols]),
            activation: Some(Activation::Gelu),
            pre_activation: None,
        };
        let b = view(&b, k, cols, strides);
        gemm_with(isa, operands, a, b, &mut c, true, epilogue, &mut workspace);
        c
    };
    let whole = product(0, m, n);
    let few = (1..=9).map(|rows| (40, rows, n));
    let others = [(0, 1, 1), (7, 2, 97), (3, 5, 16), (0, 13, 33), (0, m, 7)];
    for (first, rows, cols) in few.chain(others) {
        let part = product(first, rows, cols);
        for i in 0..rows {
            let (have, want) = (&part[i * cols..][..cols], &whole[(first + i) * n..][..cols]);
            assert!(
                have == want,
                "{isa:?} {operands:?} {layout:?}: row {i} of {rows} x {cols}: {have:?}, {want:?}"
            );
        }
    }
}

/// Instruction sets that add a product with one rounding add in the same order, and so have the same bits. On 64-bit ARM
/// portable code is one of them, elsewhere it rounds twice.
#[test]
fn fused_sums_are_the_same_on_all_instruction_sets() {
    let fuses = |isa: &Isa| *isa != Isa::Portable || cfg!(target_arch = "aarch64");
    let sets: Vec<Isa> = Isa::available().into_iter().filter(fuses).collect();
    fn product<T: Number>(isa: Isa, (m, n, k): (usize, usize, usize), layout: Layout) -> Vec<T> {
        let (sa, sb) = (strides(layout, m, k), strides(layout, k, n));
        let (a, b) = (
            random::<T>(span(m, k, sa), 1),
            random::<T>(span(k, n, sb), 2),
        );
        let mut c = random::<T>(m * n, 3);
        let need = gemm_workspace_with::<T>(isa, Operands::AsStored, m, n, k);
        let mut workspace = vec![f32::NAN.into(); need];
        let (a, b) = (view(&a, m, k, sa), view(&b, k, n, sb));
        let none = Epilogue::default();
        gemm_with(
            isa,
            Operands::AsStored,
            a,
            b,
            &mut c,
            true,
            none,
            &mut workspace,
        );
        c
    }
    fn same<T: Number>(sets: &[Isa], size: (usize, usize, usize), layout: Layout) {
        for pair in sets.windows(2) {
            let [one, other] = [0, 1].map(|i| product::<T>(pair[i], size, layout));
            assert!(one == other, "{pair:?}: {size:?}, {layout:?}");
        }
    }
    for (m, n, k) in [
        (1, 77, 1033),
        (2, 50, 40),
        (3, 9, 530),
        (4, 130, 260),
        (61, 83, 700),
        (30, 7, 5),
    ] {
        for layout in LAYOUTS {
            same::<f32>(&sets, (m, n, k), layout);
            same::<f64>(&sets, (m, n, k), layout);
            same::<bf16>(&sets, (m, n, k), layout);
            same::<f16>(&sets, (m, n, k), layout);
        }
    }
}

/// Numbers that are rounded while they are read, between two that bf16 has, too large for it, and none at all: few rows
/// and many, all columns at once and one by one.
#[test]
fn rounding_knows_all_numbers() {
    let special = [
        f32::from_bits(0x3f80_8000), // halfway, to the even one below
        f32::from_bits(0x3f81_8000), // halfway, to the even one above
        f32::from_bits(0x3f80_8001),
        f32::from_bits(0xbf80_7fff),
        f32::MAX,
        f32::MIN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::from_bits(0x7f80_0001), // not a number by its last bit
        f32::from_bits(0xffff_ffff),
        -0.0,
    ];
    let (n, k) = (43, 37);
    for (isa, layout) in Isa::available()
        .into_iter()
        .flat_map(|isa| [(isa, Layout::Rows), (isa, Layout::Columns)])
    {
        let strides = strides(layout, k, n);
        // Of row 5 alone, so that each sum is the number as it was rounded.
        let mut b = vec![0.0f32; span(k, n, strides)];
        for j in 0..n {
            b[5 * strides.0 + j * strides.1] = special[j % special.len()];
        }
        for m in [1, 2, 3, 4, 7, 20] {
            let mut a = vec![0.0f32; m * k];
            a.iter_mut().skip(5).step_by(k).for_each(|x| *x = 1.0);
            let need = gemm_workspace_with::<f32>(isa, Operands::Bf16, m, n, k);
            let mut workspace = vec![f32::NAN; need];
            let mut c = vec![0.0f32; m * n];
            let (a, b) = (MatRef::row_major(&a, m, k), view(&b, k, n, strides));
            let none = Epilogue::default();
            gemm_with(
                isa,
                Operands::Bf16,
                a,
                b,
                &mut c,
                false,
                none,
                &mut workspace,
            );
            for (i, have) in c.iter().enumerate() {
                let want = bf16::from_f32(special[i % n % special.len()]).to_f32();
                assert!(
                    *have == want || have.is_nan() && want.is_nan(),
                    "{isa:?} {layout:?}: {have} for {want}, number {i} of {m} rows"
                );
            }
        }
    }
}
