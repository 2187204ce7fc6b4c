//! Products with codes have the bits of products with their numbers.

use graft_kernels::Float;
use graft_kernels::gemm::{
    Activation, CodesRef, Epilogue, Isa, MatRef, Operands, gemm_codes_with, gemm_with,
    gemm_workspace_with,
};
use graft_kernels::quantised::{Codes, Format, quantise, quantise_workspace};
use half::bf16;

/// Numbers in (-1, 1) that depend on the seed alone.
fn random<T: Float<Acc = f32>>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            T::narrow((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
        })
        .collect()
}

fn quantised(format: Format, x: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; format.bytes(x.len())];
    let mut workspace = vec![0.0; quantise_workspace(format, x.len())];
    quantise(format, x, &mut bytes, &mut workspace).unwrap();
    bytes
}

/// `x [m, k]` times the transpose of a weight `[n, k]`, or times a weight `[k, n]`, from codes and from their numbers.
fn compare<A, C>(isa: Isa, operands: Operands, format: Format, size: [usize; 3], transposed: bool)
where
    A: Float<Acc = f32>,
    C: Float<Acc = f32>,
{
    let [m, n, k] = size;
    let bytes = quantised(format, &random::<f32>(n * k, 5));
    let codes = Codes::new(format, n * k, &bytes);
    let mut numbers = vec![0.0f32; n * k];
    codes.read(0, &mut numbers);
    let (x, bias) = (random::<A>(m * k, 6), random::<f32>(n, 7));
    let start = random::<C>(m * n, 8);
    let need = gemm_workspace_with::<C>(isa, operands, m, n, k);
    let a = MatRef::row_major(&x, m, k);
    for (accumulate, activation) in [(false, None), (true, Some(Activation::Gelu))] {
        let run = |from_codes: bool| {
            let (mut c, mut pre) = (start.clone(), start.clone());
            let mut workspace = vec![f32::NAN; need];
            let epilogue = Epilogue {
                bias: Some(&bias),
                activation,
                pre_activation: activation.is_some().then_some(&mut pre[..]),
            };
            let w = &mut workspace;
            match (from_codes, transposed) {
                (true, true) => {
                    let b = CodesRef::row_major(codes, n, k).t();
                    gemm_codes_with(isa, operands, a, b, &mut c, accumulate, epilogue, w);
                }
                (true, false) => {
                    let b = CodesRef::row_major(codes, k, n);
                    gemm_codes_with(isa, operands, a, b, &mut c, accumulate, epilogue, w);
                }
                (false, true) => {
                    let b = MatRef::row_major(&numbers, n, k).t();
                    gemm_with(isa, operands, a, b, &mut c, accumulate, epilogue, w);
                }
                (false, false) => {
                    let b = MatRef::row_major(&numbers, k, n);
                    gemm_with(isa, operands, a, b, &mut c, accumulate, epilogue, w);
                }
            }
            (c, pre)
        };
        let place = format!("{isa:?} {operands:?} {format:?} {size:?} transposed {transposed}");
        assert!(run(true) == run(false), "{place}");
    }
}

#[test]
fn codes_and_numbers_give_the_same_bits() {
    // Rows that are no multiple of a block, of a panel or of a word; one and several blocks of k; few rows and many.
    let sizes = [
        [1, 100, 37],
        [3, 65, 129],
        [7, 33, 1101],
        [8, 200, 384],
        [9, 31, 64],
        [50, 150, 777],
        [130, 70, 1],
        [5, 1, 63],
        [2, 40, 2000],
    ];
    for isa in Isa::available() {
        for format in [Format::Nf4, Format::Int8] {
            for (size, transposed) in sizes.iter().flat_map(|&s| [(s, true), (s, false)]) {
                compare::<f32, f32>(isa, Operands::AsStored, format, size, transposed);
                compare::<f32, f32>(isa, Operands::Bf16, format, size, transposed);
                compare::<bf16, bf16>(isa, Operands::Bf16, format, size, transposed);
                compare::<bf16, f32>(isa, Operands::Bf16, format, size, transposed);
            }
        }
    }
}

/// A view that begins within the weight, with strides of its own.
#[test]
fn parts_of_a_weight_are_read_where_they_are() {
    let (rows, cols) = (40, 51);
    let x = random::<f32>(rows * cols, 1);
    for format in [Format::Nf4, Format::Int8] {
        let bytes = quantised(format, &x);
        let codes = Codes::new(format, rows * cols, &bytes);
        let mut numbers = vec![0.0f32; rows * cols];
        codes.read(0, &mut numbers);
        let (m, k, n) = (11, 13, 9);
        let a = random::<f32>(m * k, 2);
        let first = 5 * cols + 3;
        for (row_stride, col_stride) in [(cols, 1), (1, cols), (cols, 2)] {
            let mut want = vec![0.0f32; m * n];
            let mut have = want.clone();
            let mut workspace =
                vec![0.0; gemm_workspace_with::<f32>(Isa::detect(), Operands::AsStored, m, n, k)];
            let a = MatRef::row_major(&a, m, k);
            let b = MatRef {
                data: &numbers[first..],
                rows: k,
                cols: n,
                row_stride,
                col_stride,
            };
            let codes = CodesRef {
                data: codes.skip(first),
                rows: k,
                cols: n,
                row_stride,
                col_stride,
            };
            let (isa, as_stored) = (Isa::detect(), Operands::AsStored);
            let none = Epilogue::default();
            gemm_with(isa, as_stored, a, b, &mut want, false, none, &mut workspace);
            let none = Epilogue::default();
            gemm_codes_with(
                isa,
                as_stored,
                a,
                codes,
                &mut have,
                false,
                none,
                &mut workspace,
            );
            assert_eq!(have, want, "{format:?} {row_stride} {col_stride}");
        }
    }
}
