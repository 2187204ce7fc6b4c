//! Attention of one new token over the keys and values that were kept of those before it, in each of the layers of
//! GPT-2 with 124 million weights and of a model with grouped heads.
//!
//! ```text
//! GLIBC_TUNABLES=glibc.malloc.hugetlb=1 cargo bench -p graft-kernels --bench attention_cached [-- avx2|portable|...]
//! ```
//! A layer's keys and values are read from memory, since others are read between, and, in the second column, from the
//! caches, where the same layer is read again and again. Threads are kept awake; medians of µs, and how much is read, of
//! what memory gives in the same moments.

mod bandwidth;
mod instructions;

use bandwidth::bandwidth;
use graft_kernels::attention::{
    Attention, Kept, Packed, attention_cached_with, attention_cached_workspace,
};
use graft_kernels::gemm::Isa;
use graft_kernels::philox::{self, Key};
use graft_kernels::{Float, awake};
use half::bf16;
use instructions::instructions;
use std::hint::black_box;
use std::time::Instant;

/// Rows of keys that each layer keeps.
const KEYS: usize = 277;
const ROUNDS: usize = 21;
/// More bytes of keys and values than any cache holds.
const BYTES: usize = 256 << 20;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn bench<T: Float<Acc = f32>>(
    name: &str,
    isa: Isa,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    numbers: &[i64],
) {
    let p = Attention {
        heads,
        kv_heads,
        head_dim,
        causal: true,
        window: None,
        softcap: None,
        scale: 1.0 / (head_dim as f64).sqrt(),
        dropout: 0.0,
        key: Key::new(0, 0, 0),
    };
    let width = kv_heads * head_dim;
    let table = KEYS * width;
    let layers = BYTES / (2 * table * size_of::<T>());
    let mut normal = vec![0.0f32; heads * head_dim + table];
    philox::fill_normal(Key::new(0, 0, 1), &mut normal, 0.0, 1.0);
    let normal: Vec<T> = normal.into_iter().map(T::narrow).collect();
    let (query, row) = normal.split_at(heads * head_dim);
    let mut kept = Vec::with_capacity(layers * 2 * table);
    for _ in 0..2 * layers {
        kept.extend_from_slice(row);
    }
    let places = Kept {
        starts: &[0],
        lengths: &[KEYS as i64],
    };
    let mut workspace = vec![0.0; attention_cached_workspace(&p, 1, places)];
    let mut out = vec![T::default(); heads * head_dim];
    let mut layer = |n: usize| {
        let [k, v] = [2 * n, 2 * n + 1].map(|n| Packed {
            data: &kept[n * table..][..table],
            row_stride: width,
        });
        let q = Packed {
            data: query,
            row_stride: heads * head_dim,
        };
        let started = Instant::now();
        attention_cached_with(isa, &p, &[0, 1], places, q, k, v, &mut out, &mut workspace);
        black_box(&mut out);
        started.elapsed().as_secs_f64()
    };
    let (mut memory, mut cached, mut readings) = (Vec::new(), Vec::new(), Vec::new());
    awake(|| {
        for _ in 0..ROUNDS {
            readings.push(bandwidth(numbers));
            memory.extend((0..layers).map(&mut layer));
            cached.extend((0..layers).map(|_| layer(0)));
        }
    });
    let [memory, cached, reading] = [memory, cached, readings].map(median);
    let speed = |seconds| 1e-9 * (2 * table * size_of::<T>()) as f64 / seconds;
    println!(
        "{name:<24} from memory {:6.1} µs {:6.1} of {reading:.1} GB/s   from the caches {:6.1} µs {:6.1} GB/s",
        1e6 * memory,
        speed(memory),
        1e6 * cached,
        speed(cached)
    );
}

fn main() {
    let (isa, _) = instructions();
    // On a thread of those that compute, as all work of the trainer is.
    rayon::scope(|_| {
        println!(
            "{} threads, {isa:?}, {KEYS} keys",
            rayon::current_num_threads()
        );
        let numbers = vec![1i64; 32 << 20];
        bench::<f32>("12 heads of 64, f32", isa, 12, 12, 64, &numbers);
        bench::<bf16>("12 heads of 64, bf16", isa, 12, 12, 64, &numbers);
        bench::<bf16>("32 heads of 64 over 8", isa, 32, 8, 64, &numbers);
    });
}
