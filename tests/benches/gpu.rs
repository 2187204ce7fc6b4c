//! Whole training steps on a GPU, of models with random weights.
//!
//! ```text
//! cargo bench -p graft-tests --bench gpu -- gpt2
//! ```
//! `gpt2` is GPT-2 with 124 million weights on 64 sequences of 1024 tokens, `bert` BERT-base with a classifier on 32
//! of 128; `-f32` behind the name computes in f32 instead of bf16. `llama8b-lora` is LoRA beside a frozen model with the
//! shapes of Llama 3 8B in bf16, on 8 sequences of 2048, `llama8b-qlora` the same beside its NF4 codes. Prints a JSON
//! object: the median time of the steps after the first three, tokens in a second, what the last step sent, and the peak
//! memory by category.
//!
//! `MODE plan` prints the memory alone, which needs no GPU.

mod llama;

use std::time::Instant;

use graft_autograd::Gradients;
use graft_models::{CausalLm, Classifier, DecoderConfig, ModelConfig, TokenBatch};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters, TrainableSet, losses};
use graft_tensor::{Category, DType, Device, Memory, Tensor};
use serde_json::json;

const WARM_UP: usize = 3;
const LABELS: usize = 2;

const GPT2: &str = r#"{
  "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_layer": 12,
  "n_positions": 1024, "vocab_size": 50257, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0
}"#;

const BERT: &str = r#"{
  "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 768,
  "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
  "vocab_size": 30522, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
  "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0
}"#;

/// A model that gives the loss of a batch, per supervised item.
enum Network {
    Causal(CausalLm),
    Classifier(Classifier),
}

impl Network {
    fn loss(&self, f: &mut Forward<'_>, batch: &TokenBatch) -> graft_autograd::Var {
        match self {
            Network::Causal(lm) => {
                let targets = CausalLm::next_tokens(batch);
                let supervised = targets.iter().filter(|&&target| target >= 0).count();
                let sum = lm.loss(f, batch, &targets).expect("it fits");
                f.tape
                    .scale(&sum, 1.0 / supervised as f64)
                    .expect("a scalar")
            }
            Network::Classifier(classifier) => {
                let logits = classifier.forward(f, batch).expect("it fits");
                let count = batch.sequences();
                let targets: Vec<i64> = (0..count).map(|i| (i % LABELS) as i64).collect();
                let targets = Tensor::from_vec(f.memory(), targets, &[count]).expect("a vector");
                let targets = f.input(targets);
                losses::cross_entropy(f, &logits, &targets, 0.0, count as f64).expect("labels")
            }
        }
    }
}

/// What is trained on what.
struct Job {
    network: Network,
    set: TrainableSet,
    sequences: usize,
    tokens: usize,
    vocabulary: usize,
    /// Steps that are timed
    steps: usize,
}

fn job(p: &mut Parameters, name: &str) -> Option<Job> {
    let everything = |network, p: &Parameters, [sequences, tokens, vocabulary]: [usize; 3]| Job {
        network,
        set: FreezePolicy::default().resolve(p).expect("all"),
        sequences,
        tokens,
        vocabulary,
        steps: 10,
    };
    Some(match name {
        "gpt2" => {
            let config = DecoderConfig::parse("config.json", GPT2.as_bytes()).expect("valid");
            let lm = CausalLm::new(p, &config).expect("supported");
            everything(Network::Causal(lm), p, [64, 1024, 50_257])
        }
        "bert" => {
            let config = ModelConfig::parse("config.json", BERT.as_bytes()).expect("valid");
            let classifier = Classifier::new(p, &config).expect("supported");
            everything(Network::Classifier(classifier), p, [32, 128, 30_522])
        }
        "llama8b-lora" | "llama8b-qlora" => {
            let base = match name {
                "llama8b-lora" => DType::Bf16,
                _ => DType::Nf4,
            };
            let (lm, set) = llama::adapted(p, base);
            Job {
                network: Network::Causal(lm),
                set,
                sequences: 8,
                tokens: 2048,
                vocabulary: llama::VOCABULARY,
                steps: 5,
            }
        }
        _ => return None,
    })
}

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"));
    let mode = arguments.next().unwrap_or_else(|| "gpt2".into());
    let planned = arguments.next().is_some_and(|argument| argument == "plan");
    let (name, compute) = match mode.strip_suffix("-f32") {
        Some(name) => (name, DType::F32),
        None => (mode.as_str(), DType::Bf16),
    };
    let device = Device::Cuda(0);
    let memory = match (planned, Memory::of(device)) {
        (true, _) => Memory::planned_for(device),
        (false, Ok(memory)) => memory,
        (false, Err(why)) => {
            eprintln!("{why}");
            std::process::exit(1);
        }
    };
    let started = Instant::now();
    let mut parameters = Parameters::new(&memory, DType::F32);
    let Some(job) = job(&mut parameters, name) else {
        eprintln!(
            "unknown mode {name}: use gpt2, bert, llama8b-lora or llama8b-qlora, or one with -f32"
        );
        std::process::exit(1);
    };
    let Job {
        network,
        set,
        sequences,
        tokens,
        vocabulary,
        steps,
    } = job;
    parameters.initialise(0).expect("memory suffices");
    if compute != DType::F32 {
        parameters.compute_in(compute).expect("it goes with f32");
    }
    memory.synchronize().expect("it is there");
    let made = started.elapsed().as_secs_f64();
    memory.reset_peak();
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.01, true).expect("valid settings");
    let prepared = optimizer.prepare(&parameters, &set);
    prepared.expect("memory suffices");
    let ids: Vec<i64> = (0..sequences * tokens)
        .map(|i| (i * 7919 % (vocabulary - 300)) as i64 + 200)
        .collect();
    let batch = TokenBatch::of_ids(ids.chunks(tokens));
    let (mut times, mut recorded, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    let device = memory.opened_gpu().cloned();
    let mut before = None;
    for step in 0..WARM_UP + steps {
        memory.synchronize().expect("the step before succeeded");
        before = device.as_ref().map(|device| device.sent());
        let started = Instant::now();
        let mut f = Forward::train(&parameters, &set, 0, step as u64);
        let loss = network.loss(&mut f, &batch);
        let value = loss.value().clone();
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients).expect("trained");
        let done = optimizer
            .step(&mut parameters, &set, &mut gradients, 1e-4, Some(1.0))
            .expect("gradients are finite");
        recorded.push(started.elapsed().as_secs_f64());
        if !planned {
            assert!(done.gradient_norm > 0.0);
            losses.push(value.item().expect("a scalar"));
        }
        memory.synchronize().expect("the step succeeded");
        times.push(started.elapsed().as_secs_f64());
    }
    let (Some(device), Some(before)) = (device, before) else {
        println!("{}", json!({"mode": mode, "planned_mib": mib(&memory)}));
        return;
    };
    let sent = device.sent();
    let median = |times: &[f64]| {
        let mut times = times[WARM_UP..].to_vec();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    println!(
        "{}",
        json!({
            "mode": mode,
            "gpu": device.limits().name,
            "median_step_s": median(&times),
            "median_until_launched_s": median(&recorded),
            "tokens_per_s": (sequences * tokens) as f64 / median(&times),
            "sent": {
                "alone": sent.alone - before.alone,
                "in_graphs": sent.in_graphs - before.in_graphs,
                "graphs": sent.graphs - before.graphs,
                "arguments_set": sent.set - before.set,
            },
            "first_loss": losses[0],
            "last_loss": losses[losses.len() - 1],
            "made_in_s": made,
            "tensors_mib": mib(&memory),
        })
    );
}

/// The most that tensors of each kind, and all together, took at any moment, and what was held for them.
fn mib(memory: &Memory) -> serde_json::Map<String, serde_json::Value> {
    let usage = memory.usage();
    let own = |c: Category| (c.to_string(), usage.peak(c));
    let together = [("peak", usage.peak_total), ("held", usage.held)];
    Category::ALL
        .map(own)
        .into_iter()
        .chain(together.map(|(name, bytes)| (name.to_owned(), bytes)))
        .map(|(name, bytes)| (name, (bytes >> 20).into()))
        .collect()
}
