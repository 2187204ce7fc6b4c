//! Whole training steps on a GPU, of models with random weights.
//!
//! ```text
//! cargo bench -p graft-tests --bench gpu -- gpt2
//! ```
//! `gpt2` is GPT-2 with 124 million weights on 64 sequences of 1024 tokens, `bert` BERT-base with a classifier on 32
//! of 128; `-f32` behind the name computes in f32 instead of bf16. Prints a JSON object: the median time of the steps
//! after the first three, tokens in a second, what the last step sent, and the peak memory by category.

use std::time::Instant;

use graft_autograd::Gradients;
use graft_models::{CausalLm, Classifier, DecoderConfig, ModelConfig, TokenBatch};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters, losses};
use graft_tensor::{Category, DType, Device, Memory, Tensor};
use serde_json::json;

const STEPS: usize = 13;
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

fn main() {
    let mode = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"))
        .unwrap_or_else(|| "gpt2".into());
    let (name, compute) = match mode.strip_suffix("-f32") {
        Some(name) => (name, DType::F32),
        None => (mode.as_str(), DType::Bf16),
    };
    let memory = match Memory::of(Device::Cuda(0)) {
        Ok(memory) => memory,
        Err(why) => {
            eprintln!("{why}");
            std::process::exit(1);
        }
    };
    let mut parameters = Parameters::new(&memory, DType::F32);
    let (network, sequences, tokens, vocabulary) = match name {
        "gpt2" => {
            let config = DecoderConfig::parse("config.json", GPT2.as_bytes()).expect("valid");
            let lm = CausalLm::new(&mut parameters, &config).expect("supported");
            (Network::Causal(lm), 64, 1024, 50_257)
        }
        "bert" => {
            let config = ModelConfig::parse("config.json", BERT.as_bytes()).expect("valid");
            let classifier = Classifier::new(&mut parameters, &config).expect("supported");
            (Network::Classifier(classifier), 32, 128, 30_522)
        }
        other => {
            eprintln!("unknown mode {other}: use gpt2 or bert, or either with -f32");
            std::process::exit(1);
        }
    };
    parameters.initialise(0).expect("memory suffices");
    if compute != DType::F32 {
        parameters.compute_in(compute).expect("it goes with f32");
    }
    let set = FreezePolicy::default().resolve(&parameters).expect("all");
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.01, true).expect("valid settings");
    let ids: Vec<i64> = (0..sequences * tokens)
        .map(|i| (i * 7919 % (vocabulary - 300)) as i64 + 200)
        .collect();
    let batch = TokenBatch::of_ids(ids.chunks(tokens));
    let (mut times, mut recorded, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    let device = memory.opened_gpu().expect("it was opened").clone();
    let mut before = device.sent();
    for step in 0..STEPS {
        memory.synchronize().expect("the step before succeeded");
        before = device.sent();
        let started = Instant::now();
        let mut f = Forward::train(&parameters, &set, 0, step as u64);
        let loss = network.loss(&mut f, &batch);
        let value = loss.value().clone();
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients).expect("trained");
        let done = optimizer
            .step(&mut parameters, &set, &mut gradients, 1e-4, Some(1.0))
            .expect("gradients are finite");
        assert!(done.gradient_norm > 0.0);
        recorded.push(started.elapsed().as_secs_f64());
        losses.push(value.item().expect("a scalar"));
        memory.synchronize().expect("the step succeeded");
        times.push(started.elapsed().as_secs_f64());
    }
    let median = |times: &[f64]| {
        let mut times = times[WARM_UP..].to_vec();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let sent = device.sent();
    let usage = memory.usage();
    let categories: serde_json::Map<String, serde_json::Value> = Category::ALL
        .iter()
        .map(|c| (c.to_string(), (usage.peak(*c) >> 20).into()))
        .collect();
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
            "last_loss": losses[STEPS - 1],
            "tensors_mib": categories,
            "tensors_peak_mib": usage.peak_total >> 20,
            "held_mib": usage.held >> 20,
        })
    );
}
