//! Matrix products of the sizes of a fine-tuning step, against the processor's peak.
//!
//! `cargo bench -p graft-kernels --bench gemm [-- part-of-a-name ...]`
//!
//! The peak is measured in the same run: every thread issues independent multiply-adds from
//! registers. Each number is the best of several repeats, since other programs may be running.

use graft_kernels::Float;
use graft_kernels::gemm::{Activation, Epilogue, Isa, MatRef, gemm, gemm_workspace};
use half::{bf16, f16};
use std::hint::black_box;
use std::time::Instant;

/// Best of repeats for about a second, in seconds.
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    let mut count = 0;
    while count < 5 || (start.elapsed().as_secs_f64() < 1.0 && count < 200) {
        let begin = Instant::now();
        f();
        best = best.min(begin.elapsed().as_secs_f64());
        count += 1;
    }
    best
}

#[cfg(target_arch = "x86_64")]
mod fma {
    use std::arch::x86_64::*;

    pub const FLOPS_512: f64 = 24.0 * 16.0 * 2.0;
    pub const FLOPS_256: f64 = 12.0 * 8.0 * 2.0;

    /// # Safety
    /// The processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(rounds: usize, x: f32) -> f32 {
        let (a, b) = (_mm512_set1_ps(x), _mm512_set1_ps(x * 0.5));
        let mut sums = [_mm512_setzero_ps(); 24];
        for _ in 0..rounds {
            for s in &mut sums {
                *s = _mm512_fmadd_ps(a, b, *s);
            }
        }
        sums.iter().map(|&s| _mm512_reduce_add_ps(s)).sum()
    }

    /// # Safety
    /// The processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(rounds: usize, x: f32) -> f32 {
        let (a, b) = (_mm256_set1_ps(x), _mm256_set1_ps(x * 0.5));
        let mut sums = [_mm256_setzero_ps(); 12];
        for _ in 0..rounds {
            for s in &mut sums {
                *s = _mm256_fmadd_ps(a, b, *s);
            }
        }
        sums.iter().map(|&s| _mm256_cvtss_f32(s)).sum()
    }
}

/// Multiply-adds per second of all threads together, in GFLOP/s; 0 where it is not known.
fn peak() -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        let rounds = 400_000;
        let isa = Isa::detect();
        let flops = match isa {
            Isa::Avx512 => fma::FLOPS_512,
            Isa::Avx2 => fma::FLOPS_256,
            _ => return 0.0,
        };
        let seconds = best(|| {
            rayon::broadcast(|_| {
                let x = black_box(1.0);
                // SAFETY: detected.
                black_box(unsafe {
                    if isa == Isa::Avx512 {
                        fma::avx512(rounds, x)
                    } else {
                        fma::avx2(rounds, x)
                    }
                });
            });
        });
        flops * rounds as f64 * rayon::current_num_threads() as f64 / seconds / 1e9
    }
    #[cfg(not(target_arch = "x86_64"))]
    0.0
}

/// One measured case.
struct Case {
    group: &'static str,
    sizes: [usize; 3],
    /// A, B given transposed.
    transposed: [bool; 2],
    activation: Option<Activation>,
}

fn product<T: Float<Acc: From<f32>>>(case: &Case) -> f64 {
    let [m, n, k] = case.sizes;
    let random = |len: usize| -> Vec<T> {
        (0..len)
            .map(|i| T::narrow((((i * 7919) % 1009) as f32 / 1009.0 - 0.5).into()))
            .collect()
    };
    let (a, b, mut c) = (random(m * k), random(k * n), vec![T::default(); m * n]);
    let (bias, mut pre) = (random(n), vec![T::default(); m * n]);
    let mut workspace = vec![T::Acc::default(); gemm_workspace::<T>(m, n, k)];
    let [a_t, b_t] = case.transposed;
    let a = if a_t {
        MatRef::row_major(&a, k, m).t()
    } else {
        MatRef::row_major(&a, m, k)
    };
    let b = if b_t {
        MatRef::row_major(&b, n, k).t()
    } else {
        MatRef::row_major(&b, k, n)
    };
    best(|| {
        let extra = case.activation.is_some();
        let epilogue = Epilogue {
            bias: extra.then_some(&bias[..]),
            activation: case.activation,
            pre_activation: extra.then_some(&mut pre[..]),
        };
        gemm(a, b, black_box(&mut c), false, epilogue, &mut workspace);
    })
}

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|x| !x.starts_with("--"))
        .collect();
    let mut peak_now = peak();
    println!(
        "{} threads, {:?}, peak {peak_now:.0} GFLOP/s",
        rayon::current_num_threads(),
        Isa::detect()
    );
    let mut cases = Vec::new();
    let mut add = |group, m, n, k| {
        // The gradient of a weight has the same three sizes as m = in, n = out, k = tokens.
        for (sizes, transposed) in [
            ([m, n, k], [false, false]),
            ([m, n, k], [false, true]),
            ([k, n, m], [true, false]),
        ] {
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
    add("vocabulary", 1024, 50257, 768);
    add("deep", 384, 384, 4096);
    for m in [1, 2, 4, 8] {
        add("generate", m, 3072, 768);
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
        let (sizes, transposed) = ([4096, 1536, 384], [false, true]);
        cases.push(Case {
            group: "activation",
            sizes,
            transposed,
            activation: Some(kind),
        });
    }
    println!(
        "{:<12} {:>16} {:>14} {:>9} {:>8} {:>6}",
        "", "m x n x k", "", "µs", "GFLOP/s", "peak"
    );
    for case in &cases {
        let [m, n, k] = case.sizes;
        let form = match case.transposed {
            [false, false] => "NN",
            [false, true] => "NT",
            _ => "TN",
        };
        for dtype in ["f32", "bf16", "f16", "f64"] {
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
            let seconds = match dtype {
                "f32" => product::<f32>(case),
                "f64" => product::<f64>(case),
                "f16" => product::<f16>(case),
                _ => product::<bf16>(case),
            };
            if case.group == "step" {
                // Another program may have disturbed the first measurement.
                peak_now = peak_now.max(peak());
            }
            let speed = 2.0 * (m * n) as f64 * k as f64 / seconds / 1e9;
            // f64 has half the lanes.
            let most = if dtype == "f64" {
                peak_now / 2.0
            } else {
                peak_now
            };
            println!(
                "{:<12} {size:>16} {what:>14} {:>9.1} {speed:>8.1} {:>5.1}%",
                case.group,
                seconds * 1e6,
                100.0 * speed / most
            );
        }
    }
}
