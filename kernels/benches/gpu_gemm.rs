//! Matrix products of the sizes of fine-tuning steps on a GPU, in TFLOP/s.
//!
//! `cargo bench -p graft-kernels --bench gpu_gemm [-- part-of-a-name ...]`
//!
//! Each number is the median of repeats that the GPU's own clock times, on random numbers; packing
//! of operands and the sum over splits are part of a product. `general` are the kernels of
//! `gemm.cu`, on tensor cores where there are any; `simt` are those for f32 without, `hopper` those of
//! `gemm_hopper.cu`, for bf16; `cublaslt` is NVIDIA's library, if it is found (the variable
//! GRAFT_CUBLASLT may name its file).

use std::process::ExitCode;

use graft_kernels::activation::Activation;
use graft_kernels::cuda::gemm::{Epilogue, Kernels, Layout, Products, gemm};
use graft_kernels::cuda::{self, Buffer, Error, Gpu, Scalar};
use graft_kernels::gemm::{Batch, Operands};

const KERNELS: [(&str, Kernels); 4] = [
    ("general", Kernels::General),
    ("simt", Kernels::Simt),
    ("hopper", Kernels::Hopper),
    ("cublaslt", Kernels::CublasLt),
];

/// What is timed.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    sizes: [usize; 3],
    transposed: [bool; 2],
    /// Types of A, B and C
    types: [Scalar; 3],
    /// Bias, GELU and the pre-activation, or its slope
    rich: bool,
    /// The old C is added
    accumulate: bool,
}

fn cases() -> Vec<Case> {
    const SHORT: [Scalar; 3] = [Scalar::Bf16; 3];
    // f32 weights beside bf16 activations, and their gradients
    const MIXED: [Scalar; 3] = [Scalar::Bf16, Scalar::F32, Scalar::Bf16];
    const GRADIENT: [Scalar; 3] = [Scalar::Bf16, Scalar::Bf16, Scalar::F32];
    const WIDE: [Scalar; 3] = [Scalar::F32; 3];
    let mut cases = Vec::new();
    let mut case = |name, sizes, [a, b]: [u8; 2], types, rich| {
        let transposed = [a == b't', b == b't'];
        cases.push(Case {
            name,
            sizes,
            transposed,
            types,
            rich,
            accumulate: name.contains("+="),
        });
    };
    case("f32 4096", [4096; 3], *b"nn", WIDE, false);
    case("f32 4096", [4096; 3], *b"nt", WIDE, false);
    case("f32 4096", [4096; 3], *b"tn", WIDE, false);
    case("f32 4096", [4096; 3], *b"tt", WIDE, false);
    case("f32 bert up gelu", [4096, 3072, 768], *b"nt", WIDE, true);
    case("f32 bert down", [4096, 768, 3072], *b"nt", WIDE, false);
    case("f32 bert d(up)", [4096, 768, 3072], *b"nn", WIDE, false);
    case("f32 bert dW up", [3072, 768, 4096], *b"tn", WIDE, false);
    case("f32 classifier", [4096, 3, 768], *b"nt", WIDE, false);
    case("square 8192", [8192; 3], *b"nn", SHORT, false);
    case("square 8192", [8192; 3], *b"nt", SHORT, false);
    case("square 8192", [8192; 3], *b"tn", SHORT, false);
    case("square 8192", [8192; 3], *b"tt", SHORT, false);
    case("bert qkv", [16384, 2304, 768], *b"nt", SHORT, false);
    case("bert up gelu", [16384, 3072, 768], *b"nt", SHORT, true);
    case("bert down", [16384, 768, 3072], *b"nt", SHORT, false);
    let m = 65536;
    case("gpt2 qkv", [m, 2304, 768], *b"nn", SHORT, false);
    case("gpt2 qkv f32 weight", [m, 2304, 768], *b"nn", MIXED, false);
    case("gpt2 out", [m, 768, 768], *b"nn", SHORT, false);
    case("gpt2 up", [m, 3072, 768], *b"nn", SHORT, false);
    case("gpt2 up gelu", [m, 3072, 768], *b"nn", SHORT, true);
    case("gpt2 down", [m, 768, 3072], *b"nn", SHORT, false);
    // A chunk of rows of the language model's loss
    let (rows, classes) = (4224, 50304);
    case("gpt2 head", [rows, classes, 768], *b"nt", GRADIENT, false);
    case(
        "gpt2 head relative",
        [rows, classes, 768],
        *b"nt",
        SHORT,
        false,
    );
    case("gpt2 d(qkv)", [m, 768, 2304], *b"nt", SHORT, false);
    case("gpt2 d(up)", [m, 768, 3072], *b"nt", SHORT, false);
    case("gpt2 d(down) slope", [m, 3072, 768], *b"nt", SHORT, true);
    case(
        "gpt2 d(head)",
        [rows, 768, classes],
        *b"nn",
        GRADIENT,
        false,
    );
    case(
        "gpt2 dW head +=",
        [classes, 768, rows],
        *b"tn",
        GRADIENT,
        false,
    );
    case("bert d(q) +=", [4096, 768, 768], *b"nn", SHORT, false);
    case("bert small q", [4096, 768, 768], *b"nt", SHORT, false);
    case("bert small dW q", [768, 768, 4096], *b"tn", GRADIENT, false);
    case(
        "bert small dW up",
        [3072, 768, 4096],
        *b"tn",
        GRADIENT,
        false,
    );
    case("bert small up gelu", [4096, 3072, 768], *b"nt", SHORT, true);
    case("bert small down", [4096, 768, 3072], *b"nt", SHORT, false);
    case("gpt2 dW out", [768, 768, m], *b"tn", GRADIENT, false);
    case("gpt2 dW qkv", [768, 2304, m], *b"tn", GRADIENT, false);
    case("gpt2 dW up", [768, 3072, m], *b"tn", GRADIENT, false);
    case("lora down", [m, 16, 768], *b"nt", SHORT, false);
    case("lora dW", [16, 768, m], *b"tn", GRADIENT, false);
    let m = 16384;
    case("8b q", [m, 4096, 4096], *b"nt", SHORT, false);
    case("8b up", [m, 14336, 4096], *b"nt", SHORT, false);
    case("8b down", [m, 4096, 14336], *b"nt", SHORT, false);
    case("8b dx down", [m, 14336, 4096], *b"nn", SHORT, false);
    case("8b dW up", [14336, 4096, m], *b"tn", SHORT, false);
    case("decode", [1, 4096, 4096], *b"nt", SHORT, false);
    cases
}

/// A buffer of so many elements: normal numbers, nearly.
fn filled(gpu: &Gpu, count: usize, scalar: Scalar) -> cuda::Result<Buffer> {
    let bytes = count * scalar.size();
    let buffer = gpu.allocate(bytes)?;
    let mut state = 1u64;
    let mut next = move || {
        // The sum of eight bytes of a counter that is stirred (splitmix64).
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        let sum: u32 = z.to_le_bytes().iter().map(|&b| u32::from(b)).sum();
        (sum as f32 - 1020.0) / 209.0
    };
    let block: Vec<u8> = match scalar {
        Scalar::F32 => (0..1 << 20).flat_map(|_| next().to_le_bytes()).collect(),
        _ => (0..1 << 21)
            .flat_map(|_| half::bf16::from_f32(next()).to_le_bytes())
            .collect(),
    };
    for first in (0..bytes).step_by(block.len()) {
        let length = block.len().min(bytes - first);
        gpu.upload(
            &block[..length],
            buffer.slice_mut(first, length, Scalar::U8),
        )?;
    }
    Ok(buffer)
}

/// Median seconds of a case.
fn time(gpu: &Gpu, case: &Case, kernels: Kernels) -> cuda::Result<f64> {
    let [m, n, k] = case.sizes;
    let layout = |scalar, rows, cols, transposed| {
        let (row_stride, col_stride) = if transposed { (1, rows) } else { (cols, 1) };
        Layout {
            scalar,
            rows,
            cols,
            row_stride,
            col_stride,
            aligned: true,
        }
    };
    let [ta, tb, tc] = case.types;
    let products = Products {
        kernels,
        operands: match ta {
            Scalar::Bf16 => Operands::Bf16,
            _ => Operands::AsStored,
        },
        batch: Batch {
            count: 1,
            a_stride: 0,
            b_stride: 0,
            c_stride: m * n,
        },
        a: layout(ta, m, k, case.transposed[0]),
        b: layout(tb, k, n, case.transposed[1]),
        c: tc,
    };
    let (a, b) = (filled(gpu, m * k, ta)?, filled(gpu, k * n, tb)?);
    let bias = filled(gpu, n, Scalar::F32)?;
    let relative = filled(gpu, m, Scalar::F32)?;
    let c = gpu.allocate(m * n * tc.size())?;
    let pre = filled(gpu, m * n, tc)?;
    let bytes = products.workspace(gpu.limits().target)?;
    let workspace = gpu.allocate(bytes.max(1))?;
    let run = || {
        let gelu = Some(Activation::GeluTanh);
        let epilogue = match case.rich {
            true if case.name.contains("slope") => Epilogue {
                activation: gelu,
                slope_of: Some(pre.slice(0, m * n, tc)),
                ..Epilogue::default()
            },
            true => Epilogue {
                bias: Some(bias.slice(0, n, Scalar::F32)),
                activation: gelu,
                pre_activation: Some(pre.slice_mut(0, m * n, tc)),
                ..Epilogue::default()
            },
            false if case.name.contains("relative") => Epilogue {
                relative_to: Some(relative.slice(0, m, Scalar::F32)),
                ..Epilogue::default()
            },
            false => Epilogue::default(),
        };
        gemm(
            gpu,
            &products,
            a.slice(0, m * k, ta),
            b.slice(0, k * n, tb),
            c.slice_mut(0, m * n, tc),
            case.accumulate,
            epilogue,
            workspace.slice_mut(0, bytes, Scalar::U8),
        )
    };
    for _ in 0..3 {
        run()?;
    }
    let mut seconds = Vec::new();
    for _ in 0..21 {
        seconds.push(gpu.seconds(run)?);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

fn run() -> cuda::Result<()> {
    let gpu = Gpu::open(0)?;
    println!("{}: TFLOP/s (milliseconds)", gpu.limits().name);
    print!("{:20} {:>6} {:>6} {:>6}    ", "", "m", "n", "k");
    KERNELS.iter().for_each(|(name, _)| print!("{name:>17}"));
    println!();
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"))
        .collect();
    for case in cases() {
        if !wanted.is_empty() && !wanted.iter().any(|w| case.name.contains(w.as_str())) {
            continue;
        }
        let [m, n, k] = case.sizes;
        let order = case.transposed.map(|t| if t { 't' } else { 'n' });
        print!(
            "{:20} {m:6} {n:6} {k:6} {}{}",
            case.name, order[0], order[1]
        );
        for (_, kernels) in KERNELS {
            let other = match case.types[0] {
                Scalar::F32 => Kernels::Hopper,
                _ => Kernels::Simt,
            };
            let seconds = match kernels == other {
                true => None,
                false => match time(&gpu, &case, kernels) {
                    Err(Error::Unsupported { .. }) => None,
                    seconds => Some(seconds?),
                },
            };
            let Some(seconds) = seconds else {
                print!("{:>17}", "-");
                continue;
            };
            let flops = 2.0 * (m * n * k) as f64 / seconds / 1e12;
            print!("  {flops:6.1} ({:6.3})", seconds * 1e3);
        }
        println!();
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
