//! GPT-2 with 124 million random weights: whole training steps on 4 sequences of 256 tokens, or tokens decoded one by
//! one behind a prompt of 256.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo bench -p graft-tests --bench gpt2 -- step
//! ```
//! The modes are `step`, `step_bf16` (activations in bf16 beside f32 weights), `decode` and `decode_bf16` (matrices in
//! bf16). Prints a JSON object: for a step the median of the steps after the first two and the peak memory, for
//! decoding the median time of a token, how many bytes of weights were read in a second, and how many can be: the median
//! of readings between the tokens, since what others on the machine leave of its memory's bandwidth changes.

#[path = "../../kernels/benches/bandwidth/mod.rs"]
mod bandwidth;

use std::time::Instant;

use bandwidth::bandwidth;
use graft_autograd::Gradients;
use graft_models::{CausalLm, DecoderConfig, KvCache, TokenBatch};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters};
use graft_tensor::{DType, Memory, Tensor, awake, ops};
use serde_json::json;

const SEQUENCES: usize = 4;
const TOKENS: usize = 256;
const STEPS: usize = 7;
const WARM_UP: usize = 2;
const NEW_TOKENS: usize = 41;
/// Tokens between two readings of the memory's bandwidth.
const READING: usize = 5;

const CONFIG: &str = r#"{
  "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_layer": 12,
  "n_positions": 1024, "vocab_size": 50257, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0
}"#;

/// On a thread of those that compute, as the trainer runs.
fn main() {
    rayon::scope(|_| run());
}

fn run() {
    let mode = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"))
        .unwrap_or_else(|| "step".into());
    let config = DecoderConfig::parse("config.json", CONFIG.as_bytes()).expect("a valid config");
    let computed = match mode.as_str() {
        "step" | "decode" => DType::F32,
        "step_bf16" | "decode_bf16" => DType::Bf16,
        other => {
            eprintln!("unknown mode {other}: use step, step_bf16, decode or decode_bf16");
            std::process::exit(1);
        }
    };
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    let lm = CausalLm::new(&mut parameters, &config).expect("the model is supported");
    parameters.initialise(0).expect("memory suffices");
    parameters.compute_in(computed).expect("it goes with f32");
    if mode.starts_with("decode") {
        // As `trainer generate` does: matrices are held in the type of activations.
        parameters.hold_as_computed().expect("memory suffices");
    }
    // On a thread of the pool, as the command line does it: what is small stays there.
    let result = rayon::scope(|_| {
        if mode.starts_with("step") {
            steps(&mut parameters, &lm)
        } else {
            awake(|| decode(&parameters, &lm, &config, computed))
        }
    });
    println!("{result}");
}

fn ids(count: usize) -> Vec<i64> {
    (0..count).map(|i| (i * 7919 % 50_000) as i64).collect()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn steps(parameters: &mut Parameters, lm: &CausalLm) -> serde_json::Value {
    let set = FreezePolicy::default().resolve(parameters).expect("all");
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.01, false).expect("valid settings");
    let all = ids(SEQUENCES * TOKENS);
    let batch = TokenBatch::of_ids(all.chunks(TOKENS));
    let targets = CausalLm::next_tokens(&batch);
    let supervised = (SEQUENCES * (TOKENS - 1)) as f64;
    optimizer
        .prepare(parameters, &set)
        .expect("memory suffices");
    let (mut forward, mut backward, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..STEPS {
        let started = Instant::now();
        let mut f = Forward::train(parameters, &set, 0, step as u64);
        let sum = lm.loss(&mut f, &batch, &targets).expect("it fits");
        let loss = f.tape.scale(&sum, 1.0 / supervised).expect("a scalar");
        drop(sum);
        let done = started.elapsed().as_secs_f64();
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients).expect("trained");
        let back = started.elapsed().as_secs_f64();
        optimizer
            .step(parameters, &set, &mut gradients, 1e-4, Some(1.0))
            .expect("gradients are finite");
        if step >= WARM_UP {
            forward.push(done);
            backward.push(back - done);
            whole.push(started.elapsed().as_secs_f64());
        }
    }
    let peak = graft_trainer::report::peak_rss().unwrap_or(0);
    let usage = parameters.memory().usage();
    json!({
        "threads": rayon::current_num_threads(),
        "median_step_s": median(whole),
        "median_forward_s": median(forward),
        "median_backward_s": median(backward),
        "peak_rss_mib": peak >> 20,
        "tensors_peak_mib": usage.peak_total >> 20,
        "tensors_held_mib": usage.held >> 20,
    })
}

fn decode(
    parameters: &Parameters,
    lm: &CausalLm,
    config: &DecoderConfig,
    stored: DType,
) -> serde_json::Value {
    let capacity = TOKENS + NEW_TOKENS;
    let mut cache = KvCache::new(parameters, config, 1, capacity).expect("memory suffices");
    let mut new = ids(TOKENS);
    let (mut times, mut readings) = (Vec::new(), Vec::new());
    // In large pages, as weights are: more can be read of them in a second than of small ones.
    let numbers = Tensor::from_slice(&Memory::cpu(), &vec![1i64; 64 << 20], &[64 << 20]);
    let numbers = numbers.expect("memory suffices");
    let numbers = numbers.slice::<i64>().expect("numbers");
    for token in 0..NEW_TOKENS {
        if token % READING == 0 {
            readings.push(bandwidth(numbers));
        }
        let started = Instant::now();
        let batch = TokenBatch::of_ids([new.as_slice()]);
        let mut f = Forward::evaluate(parameters);
        let logits = lm.advance(&mut f, &batch, &mut cache).expect("it fits");
        let best = ops::argmax(f.memory(), logits.value()).expect("memory suffices");
        new = best.slice::<i64>().expect("a number").to_vec();
        times.push(started.elapsed().as_secs_f64());
    }
    let prompt = times.remove(0);
    let token = median(times);
    let bytes = (parameters.count() * stored.size()) as f64;
    json!({
        "threads": rayon::current_num_threads(),
        "prompt_s": prompt,
        "median_token_s": token,
        "weights_gb_per_s": 1e-9 * bytes / token,
        "memory_gb_per_s": median(readings),
    })
}
