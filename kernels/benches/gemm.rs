//! Matrix products of the sizes of a fine-tuning step, against the processor's peak and, in f32,
//! against the crates `gemm` and `matrixmultiply`.
//!
//! `cargo bench -p graft-kernels --bench gemm [-- part-of-a-name ... [peers] [cold] [avx2|portable|...]]`
//!
//! The peaks are measured in the same run: every thread issues independent multiply-adds from
//! registers, and reads memory. Products of few rows (`generate`) are set against the latter: what they
//! cost is reading the weight. Each number is the best of several repeats, since other programs may be running.
//! `bf16` is bf16 throughout, `mixed` what a step in bf16 computes: f32 weights beside bf16
//! activations, and the gradients of weights (TN) in f32. With `peers`, f32 products are repeated
//! with the two crates. With `cold`, each repeat takes other operands, so that they come from memory,
//! as most do in a training step. With the name of an instruction set, products and peaks are those of that one.

mod best;
mod instructions;

use best::best;
use graft_kernels::Float;
use graft_kernels::gemm::{
    Activation, Epilogue, Isa, MatRef, Operands, gemm_with, gemm_workspace_with,
};
use half::{bf16, f16};
use instructions::instructions;
use std::hint::black_box;

#[cfg(target_arch = "x86_64")]
mod peak {
    use std::arch::asm;

    /// A loop of one instruction on independent registers of sums, in assembly: a compiler may
    /// merge sums that it sees to be equal, or spill them.
    macro_rules! probe {
        ($name:ident, $features:literal, $instruction:literal, $register:literal, $last:literal,
         $factor:literal, $list:literal, $($out:tt)*) => {
            /// # Safety
            /// The processor has the instructions.
            #[target_feature(enable = $features)]
            pub unsafe fn $name(rounds: usize) {
                // SAFETY: registers alone, all of them declared; rounds is at least 1.
                unsafe {
                    asm!(
                        concat!(".irp i, ", $list, ", ", $last, ", ", $factor),
                        concat!("vxorps ", $register, "\\i, ", $register, "\\i, ", $register, "\\i"),
                        ".endr",
                        "2:",
                        concat!(".irp i, ", $list),
                        concat!($instruction, " ", $register, "\\i, ", $register, $last, ", ", $register, $factor),
                        ".endr",
                        "dec {rounds}",
                        "jnz 2b",
                        rounds = inout(reg) rounds.max(1) => _,
                        $($out)*
                    );
                }
            }
        };
    }

    pub const SUMS_512: usize = 24;
    pub const SUMS_256: usize = 12;

    macro_rules! probe_512 {
        ($name:ident, $features:literal, $instruction:literal) => {
            probe!($name, $features, $instruction, "zmm", "30", "31",
                "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23",
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _,
                out("zmm5") _, out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _,
                out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _, out("zmm14") _,
                out("zmm15") _, out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _, out("zmm30") _,
                out("zmm31") _,);
        };
    }
    probe_512!(fma_512, "avx512f,avx512dq", "vfmadd231ps");
    probe_512!(dot_512, "avx512f,avx512dq,avx512bf16", "vdpbf16ps");
    probe!(fma_256, "avx2,fma", "vfmadd231ps", "ymm", "14", "15", "0,1,2,3,4,5,6,7,8,9,10,11",
        out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
        out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _,
        out("ymm11") _, out("ymm14") _, out("ymm15") _,);
}

/// Operations per second of all threads together, in GFLOP/s: of f32, and of products of bf16. 0
/// where it is not known.
fn peaks(isa: Isa) -> [f64; 2] {
    #[cfg(target_arch = "x86_64")]
    {
        let rounds = 400_000;
        let measure = |flops: usize, probe: unsafe fn(usize)| {
            let seconds = best(0.3, || {
                // SAFETY: the processor's instruction set was asked for.
                rayon::broadcast(|_| unsafe { probe(black_box(rounds)) });
            });
            (flops * rounds * rayon::current_num_threads()) as f64 / seconds / 1e9
        };
        let f32s = match isa {
            Isa::Avx512 | Isa::Avx512Bf16 => measure(peak::SUMS_512 * 16 * 2, peak::fma_512),
            Isa::Avx2 => measure(peak::SUMS_256 * 8 * 2, peak::fma_256),
            _ => 0.0,
        };
        let bf16s = match isa {
            Isa::Avx512Bf16 => measure(peak::SUMS_512 * 16 * 4, peak::dot_512),
            _ => f32s,
        };
        [f32s, bf16s]
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        [0.0; 2]
    }
}

/// Bytes that all threads together read in a second from memory that no cache holds, in GB/s.
fn memory() -> f64 {
    let numbers = vec![1u64; 64 << 20];
    let part = numbers.len() / rayon::current_num_threads();
    let seconds = best(0.3, || {
        rayon::broadcast(|context| {
            let mut sums = [0u64; 32];
            let numbers = &numbers[context.index() * part..][..part];
            for x in numbers.as_chunks::<32>().0 {
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = sum.wrapping_add(*x);
                }
            }
            black_box(sums)
        });
    });
    (part * rayon::current_num_threads() * 8) as f64 / seconds / 1e9
}

/// Bytes of operands and results that are gone through before one is met again: more than the last
/// level of caches holds.
const COLD: usize = 256 << 20;

/// One measured case.
struct Case {
    group: &'static str,
    sizes: [usize; 3],
    /// A, B given transposed.
    transposed: [bool; 2],
    activation: Option<Activation>,
}

fn random<T: Float<Acc: From<f32>>>(len: usize) -> Vec<T> {
    (0..len)
        .map(|i| T::narrow((((i * 7919) % 1009) as f32 / 1009.0 - 0.5).into()))
        .collect()
}

/// Row and column strides of `[rows, cols]`, stored transposed or not.
fn strides(rows: usize, cols: usize, transposed: bool) -> (usize, usize) {
    if transposed { (1, rows) } else { (cols, 1) }
}

fn view<T>(data: &[T], rows: usize, cols: usize, transposed: bool) -> MatRef<'_, T> {
    let (row_stride, col_stride) = strides(rows, cols, transposed);
    MatRef {
        data,
        rows,
        cols,
        row_stride,
        col_stride,
    }
}

fn product<A, B, C>(isa: Isa, operands: Operands, case: &Case, cold: bool) -> f64
where
    A: Float<Acc: From<f32>>,
    B: Float<Acc = A::Acc>,
    C: Float<Acc = A::Acc>,
{
    let [m, n, k] = case.sizes;
    let bytes = m * k * size_of::<A>() + k * n * size_of::<B>() + m * n * size_of::<C>();
    let sets = if cold { COLD.div_ceil(bytes).max(2) } else { 1 };
    let mut sets: Vec<(Vec<A>, Vec<B>, Vec<C>)> = (0..sets)
        .map(|_| (random(m * k), random(k * n), vec![C::default(); m * n]))
        .collect();
    let (bias, mut pre) = (random::<C::Acc>(n), vec![C::default(); m * n]);
    let mut workspace = vec![C::Acc::default(); gemm_workspace_with::<C>(isa, operands, m, n, k)];
    let [a_t, b_t] = case.transposed;
    let (mut next, count) = (0, sets.len());
    best(0.3, || {
        let (a, b, c) = &mut sets[next];
        next = (next + 1) % count;
        let (a, b) = (view(a, m, k, a_t), view(b, k, n, b_t));
        let extra = case.activation.is_some();
        let epilogue = Epilogue {
            bias: extra.then_some(&bias[..]),
            activation: case.activation,
            pre_activation: extra.then_some(&mut pre[..]),
        };
        let c = black_box(&mut c[..]);
        gemm_with(isa, operands, a, b, c, false, epilogue, &mut workspace);
    })
}

/// The same product by the crates `gemm` and `matrixmultiply`.
fn peers(case: &Case) -> [f64; 2] {
    let [m, n, k] = case.sizes;
    let (a, b, mut c) = (
        random::<f32>(m * k),
        random::<f32>(k * n),
        vec![0f32; m * n],
    );
    let [a_t, b_t] = case.transposed;
    let (sa, sb) = (strides(m, k, a_t), strides(k, n, b_t));
    let signed = |(rows, cols): (usize, usize)| (rows as isize, cols as isize);
    let ((ar, ac), (br, bc)) = (signed(sa), signed(sb));
    let threads = rayon::current_num_threads();
    let by_gemm = best(0.3, || {
        let c = black_box(&mut c[..]).as_mut_ptr();
        // SAFETY: all three matrices lie in their buffers.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c,
                1,
                n as isize,
                false,
                a.as_ptr(),
                ac,
                ar,
                b.as_ptr(),
                bc,
                br,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(threads),
            );
        }
    });
    let by_matrixmultiply = best(0.3, || {
        let c = black_box(&mut c[..]).as_mut_ptr();
        // SAFETY: all three matrices lie in their buffers.
        unsafe {
            let (a, b) = (a.as_ptr(), b.as_ptr());
            matrixmultiply::sgemm(m, k, n, 1.0, a, ar, ac, b, br, bc, 0.0, c, n as isize, 1);
        }
    });
    [by_gemm, by_matrixmultiply]
}

/// The cases, by group.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |group: &'static str, m, n, k| {
        // The gradient of a weight has the same three sizes as m = in, n = out, k = tokens.
        for (sizes, transposed) in [
            ([m, n, k], [false, false]),
            ([m, n, k], [false, true]),
            ([k, n, m], [true, false]),
        ] {
            if group == "generate" && transposed[0] {
                continue;
            }
            cases.push(Case {
                group,
                sizes,
                transposed,
                activation: None,
            });
        }
    };
    for (k, n) in [
        (384, 384),
        (384, 1536),
        (1536, 384),
        (768, 768),
        (768, 3072),
        (3072, 768),
    ] {
        add("step", 4096, n, k);
    }
    for (k, n) in [(768, 768), (768, 2304), (768, 3072), (3072, 768)] {
        add("context", 1024, n, k);
    }
    add("vocabulary", 1024, 50257, 768);
    add("deep", 384, 384, 4096);
    for m in [1, 2, 4, 8, 16] {
        for (k, n) in [(768, 768), (768, 3072), (3072, 768), (768, 50257)] {
            add("generate", m, n, k);
        }
    }
    add("head", 4096, 12, 768);
    add("head", 8, 2, 768);
    add("lora", 4096, 8, 768);
    add("lora", 4096, 768, 8);
    add("square", 1024, 1024, 1024);
    for kind in [
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Silu,
    ] {
        cases.push(Case {
            group: "activation",
            sizes: [4096, 1536, 384],
            transposed: [false, true],
            activation: Some(kind),
        });
    }
    cases
}

fn main() {
    let (isa, wanted) = instructions();
    let with_peers = wanted.iter().any(|part| part == "peers");
    let cold = wanted.iter().any(|part| part == "cold");
    let option = |part: &String| part == "peers" || part == "cold";
    let wanted: Vec<String> = wanted.into_iter().filter(|part| !option(part)).collect();
    let mut peak = peaks(isa);
    let memory = memory();
    println!(
        "{} threads, {:?}, peak {:.0} GFLOP/s in f32, {:.0} in bf16, {memory:.1} GB/s of memory",
        rayon::current_num_threads(),
        isa,
        peak[0],
        peak[1]
    );
    println!(
        "{:<12} {:>16} {:>14} {:>9} {:>8} {:>6}",
        "", "m x n x k", "", "µs", "GFLOP/s", "peak"
    );
    for case in &cases() {
        let [m, n, k] = case.sizes;
        let form = match case.transposed {
            [false, false] => "NN",
            [false, true] => "NT",
            _ => "TN",
        };
        for dtype in ["f32", "mixed", "bf16", "f16", "f64"] {
            let extra = case
                .activation
                .map_or(String::new(), |kind| format!(" {kind:?}"));
            let size = format!("{m}x{n}x{k}");
            let what = format!("{form} {dtype}{extra}");
            let name = format!("{} {size} {what}", case.group);
            let chosen = wanted.iter().all(|part| name.contains(&**part));
            if !chosen || wanted.is_empty() && (dtype == "f64" || dtype == "f16") {
                continue;
            }
            let (stored, short) = (Operands::AsStored, Operands::Bf16);
            let seconds = match dtype {
                "f32" => product::<f32, f32, f32>(isa, stored, case, cold),
                "f64" => product::<f64, f64, f64>(isa, stored, case, cold),
                "f16" => product::<f16, f16, f16>(isa, stored, case, cold),
                "bf16" => product::<bf16, bf16, bf16>(isa, short, case, cold),
                _ if form == "TN" => product::<bf16, bf16, f32>(isa, short, case, cold),
                _ => product::<bf16, f32, bf16>(isa, short, case, cold),
            };
            if case.group == "step" {
                // Another program may have disturbed the first measurement.
                let again = peaks(isa);
                peak = [peak[0].max(again[0]), peak[1].max(again[1])];
            }
            let most = match dtype {
                "bf16" | "mixed" => peak[1],
                // f64 has half the lanes.
                "f64" => peak[0] / 2.0,
                _ => peak[0],
            };
            if case.group == "generate" {
                // What counts is how fast the weight is read.
                let bytes = n
                    * k
                    * if dtype == "bf16" || dtype == "f16" {
                        2
                    } else {
                        4
                    };
                println!(
                    "{:<12} {size:>16} {what:>14} {:>9.1} {:>8.1} GB/s of {memory:.1}",
                    case.group,
                    seconds * 1e6,
                    bytes as f64 / seconds / 1e9
                );
                continue;
            }
            let line = |what: &str, seconds: f64| {
                let speed = 2.0 * (m * n) as f64 * k as f64 / seconds / 1e9;
                println!(
                    "{:<12} {size:>16} {what:>14} {:>9.1} {speed:>8.1} {:>5.1}%",
                    case.group,
                    seconds * 1e6,
                    100.0 * speed / most
                );
            };
            line(&what, seconds);
            if with_peers && dtype == "f32" && case.activation.is_none() {
                let [by_gemm, by_matrixmultiply] = peers(case);
                line("gemm", by_gemm);
                line("matrixmult.", by_matrixmultiply);
            }
        }
    }
}
