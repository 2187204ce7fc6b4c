//! The products of one token of GPT-2 with 124 million weights, one after the other as in decoding, set
//! against what memory gives: how much of it do products lose where one ends and the next begins?
//!
//! ```text
//! GLIBC_TUNABLES=glibc.malloc.hugetlb=1 cargo bench -p graft-kernels --bench token [-- f32|bf16 ... [avx2|portable|...]]
//! ```
//! With the name of an instruction set, products are those of that one. Weights in f32 and in bf16, threads that sleep between products and threads that are kept awake, in
//! turns, with a reading of the memory's bandwidth before each. Medians.

mod bandwidth;
mod instructions;

use bandwidth::bandwidth;
use graft_kernels::gemm::{Epilogue, Isa, MatRef, Operands, gemm_with, gemm_workspace_with};
use graft_kernels::{Float, awake};
use half::bf16;
use instructions::instructions;
use std::hint::black_box;
use std::time::Instant;

const LAYERS: usize = 12;
const TOKENS: usize = 8;
const ROUNDS: usize = 7;
/// Bytes of a line of the caches.
const LINE: usize = 64;

/// Inputs and outputs of a layer's products, of the weights `[in, out]`.
const LAYER: [(usize, usize); 4] = [(768, 2304), (768, 768), (768, 3072), (3072, 768)];
/// The logits', of a weight `[out, in]`.
const HEAD: (usize, usize) = (768, 50257);

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

struct Weights<T> {
    /// All in one, so that they lie in large pages as they do in a model
    all: Vec<T>,
    /// Where they begin: at a line of the caches, as tensors do
    skip: usize,
}

impl<T: Float<Acc = f32>> Weights<T> {
    fn new() -> Self {
        let layer: usize = LAYER.iter().map(|(k, n)| k * n).sum();
        let count = LAYERS * layer + HEAD.0 * HEAD.1;
        let all = vec![T::narrow(0.01); count + LINE];
        let skip = all.as_ptr().align_offset(LINE);
        Weights { all, skip }
    }

    fn bytes(&self) -> f64 {
        size_of_val(&self.all[LINE..]) as f64
    }

    /// Seconds of a token, and of it those of each product of a layer, and of the head.
    fn token(&self, isa: Isa, operands: Operands, scratch: &mut [f32]) -> [f64; 6] {
        let x = [T::narrow(0.5); 3072];
        let mut y = [T::default(); HEAD.1];
        let mut seconds = [0.0; 6];
        let mut one = |place: usize, w: MatRef<T>| {
            let started = Instant::now();
            let y = &mut y[..w.cols];
            let x = MatRef::row_major(&x[..w.rows], 1, w.rows);
            let none = Epilogue::default();
            gemm_with(isa, operands, x, w, y, false, none, scratch);
            black_box(y);
            seconds[place] += started.elapsed().as_secs_f64();
        };
        let started = Instant::now();
        let mut rest = &self.all[self.skip..];
        for _ in 0..LAYERS {
            for (i, (k, n)) in LAYER.into_iter().enumerate() {
                let (w, behind) = rest.split_at(k * n);
                one(i, MatRef::row_major(w, k, n));
                rest = behind;
            }
        }
        one(
            4,
            MatRef::row_major(&rest[..HEAD.0 * HEAD.1], HEAD.1, HEAD.0).t(),
        );
        seconds[5] = started.elapsed().as_secs_f64();
        seconds
    }
}

fn measure<T: Float<Acc = f32>>(name: &str, isa: Isa, operands: Operands, numbers: &[i64]) {
    let weights = Weights::<T>::new();
    let need = LAYER.iter().chain([&HEAD]);
    let need = need
        .map(|&(k, n)| gemm_workspace_with::<T>(isa, operands, 1, n, k))
        .max();
    let mut scratch = vec![0.0; need.unwrap_or(0)];
    let mut memory = Vec::new();
    let mut times = [(); 2].map(|()| [(); 6].map(|()| Vec::new()));
    for round in 0..2 * ROUNDS {
        memory.push(bandwidth(numbers));
        let kept = round % 2;
        let mut some = || {
            for _ in 0..TOKENS {
                let seconds = weights.token(isa, operands, &mut scratch);
                for (times, seconds) in times[kept].iter_mut().zip(seconds) {
                    times.push(seconds);
                }
            }
        };
        if kept == 1 { awake(some) } else { some() }
    }
    let memory = median(&mut memory);
    for (what, times) in ["asleep between", "kept awake"].iter().zip(&mut times) {
        let seconds = times.each_mut().map(|times| median(times));
        let speed = 1e-9 * weights.bytes() / seconds[5];
        println!(
            "{name:<5} {what:<15} {:>6.0} µs: {speed:.1} of {memory:.1} GB/s, {:.0} %",
            1e6 * seconds[5],
            100.0 * speed / memory
        );
        let sizes = LAYER
            .iter()
            .map(|&(k, n)| (k * n * LAYERS, format!("{k}x{n}")));
        let sizes = sizes.chain([(HEAD.0 * HEAD.1, "head".into())]);
        for ((count, size), seconds) in sizes.zip(seconds) {
            let speed = 1e-9 * (count * size_of::<T>()) as f64 / seconds;
            println!(
                "      {size:>10} {:>7.1} µs {speed:>6.1} GB/s",
                1e6 * seconds
            );
        }
    }
}

fn main() {
    let (isa, wanted) = instructions();
    let chosen = |name: &str| wanted.is_empty() || wanted.iter().any(|x| x == name);
    // On a thread of those that compute, as all work of the trainer is.
    rayon::scope(|_| {
        let numbers = vec![1i64; 64 << 20];
        println!("{} threads, {isa:?}", rayon::current_num_threads());
        if chosen("f32") {
            measure::<f32>("f32", isa, Operands::AsStored, &numbers);
        }
        if chosen("bf16") {
            measure::<bf16>("bf16", isa, Operands::Bf16, &numbers);
        }
    });
}
