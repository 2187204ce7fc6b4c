//! Whole training steps of MiniLM on 32 sequences of 128 tokens, the work that `bench/pytorch_peer.py`
//! measures in PyTorch: one strategy a process, so that its peak memory is its own.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo bench -p graft-tests --bench steps -- full
//! ```
//! Prints a JSON object: the median of the steps after the first three, the fastest, the time from
//! the start of the process to the first step and to its end, and the peak memory.

use std::time::Instant;

use graft_models::Strategy;
use graft_tensor::{Category, DType};
use graft_tests::steps::{Workload, batch};

const SEQUENCES: usize = 32;
const TOKENS: usize = 128;
const STEPS: usize = 12;
const WARM_UP: usize = 3;

/// On a thread of those that compute, as the trainer runs.
fn main() {
    let begun = Instant::now();
    rayon::scope(|_| run(begun));
}

fn run(begun: Instant) {
    let mode = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"))
        .unwrap_or_else(|| "full".into());
    let (strategy, compute) = match mode.as_str() {
        "full" => (Strategy::Full, DType::F32),
        "full_bf16" => (Strategy::Full, DType::Bf16),
        "head" => (Strategy::Head, DType::F32),
        "last2" => (Strategy::Last(2), DType::F32),
        "lora" => (Strategy::Head, DType::F32),
        other => {
            eprintln!("unknown mode {other}: use full, full_bf16, head, last2 or lora");
            std::process::exit(1);
        }
    };
    let mut work = Workload::minilm(strategy, compute, TOKENS);
    if mode == "lora" {
        work = work.with_lora(8);
    }
    let batch = batch(SEQUENCES, TOKENS);
    let startup = begun.elapsed().as_secs_f64();
    let mut steady: Vec<f64> = (0..STEPS).map(|_| work.step(&batch)).collect();
    let first = startup + steady[0];
    steady.drain(..WARM_UP);
    steady.sort_by(f64::total_cmp);
    let peak = graft_trainer::report::peak_rss().unwrap_or(0);
    let usage = work.memory.usage();
    let categories: serde_json::Map<String, serde_json::Value> = Category::ALL
        .iter()
        .map(|c| (c.to_string(), (usage.peak(*c) >> 20).into()))
        .collect();
    println!(
        "{}",
        serde_json::json!({
            "mode": mode,
            "threads": rayon::current_num_threads(),
            "median_step_s": steady[steady.len() / 2],
            "best_step_s": steady[0],
            "startup_s": startup,
            "first_step_ended_s": first,
            "peak_rss_mib": peak >> 20,
            "tensors_mib": categories,
            "tensors_peak_mib": usage.peak_total >> 20,
            "tensors_held_mib": usage.held >> 20,
        })
    );
}
