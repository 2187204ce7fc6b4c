//! Whole training steps on a GPU, of models with random weights.
//!
//! ```text
//! cargo bench -p graft-tests --bench gpu -- gpt2
//! ```
//! `gpt2` is GPT-2 with 124 million weights on 64 sequences of 1024 tokens, `bert` BERT-base with a classifier on 32
//! of 128; `-f32` behind the name computes in f32 instead of bf16. `llama8b-lora` is LoRA beside a frozen model with the
//! shapes of Llama 3 8B in bf16, on 8 sequences of 2048, `llama8b-qlora` the same beside its NF4 codes. Prints a JSON
//! object: the median time of the steps after the first three, each waited for, and the mean of steps that are sent before
//! the one before was looked at, as the trainer sends them; tokens in a second, what the last step sent, and the peak memory
//! by category.
//!
//! `MODE plan` prints the memory alone, which needs no GPU.

mod llama;

use std::time::Instant;

use graft_autograd::Gradients;
use graft_kernels::cuda::Sent;
use graft_models::{CausalLm, Classifier, DecoderConfig, ModelConfig, TokenBatch};
use graft_nn::optimizer::{Rule, SentStep};
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters, TrainableSet, losses};
use graft_tensor::{Category, DType, Device, Item, Memory, Tensor};
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
    let mut work = Work {
        parameters,
        network,
        set,
        optimizer,
        batch,
        planned,
    };
    let device = memory.opened_gpu().cloned();
    let now = || device.as_ref().map(|device| device.sent());
    let (mut times, mut recorded, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    let mut waited = (now(), now());
    for step in 0..WARM_UP + steps {
        memory.synchronize().expect("the step before succeeded");
        waited.0 = now();
        let started = Instant::now();
        let sent = work.send(step);
        recorded.push(started.elapsed().as_secs_f64());
        losses.push(work.settle(sent));
        memory.synchronize().expect("the step succeeded");
        times.push(started.elapsed().as_secs_f64());
        waited.1 = now();
    }
    let Some(device) = &device else {
        println!("{}", json!({"mode": mode, "planned_mib": mib(&memory)}));
        return;
    };
    // The same as the trainer has it, where each step is sent before the one before it was looked at.
    let (mut before, mut waiting, mut started) = (device.sent(), None, Instant::now());
    for step in 0..WARM_UP + steps {
        if step == WARM_UP {
            memory.synchronize().expect("the steps succeeded");
            started = Instant::now();
        }
        before = device.sent();
        let sent = work.send(WARM_UP + steps + step);
        if let Some(sent) = waiting.replace(sent) {
            losses.push(work.settle(sent));
        }
    }
    losses.extend(waiting.map(|sent| work.settle(sent)));
    memory.synchronize().expect("the steps succeeded");
    let ahead = started.elapsed().as_secs_f64() / steps as f64;
    let median = |times: &[f64]| {
        let mut times = times[WARM_UP..].to_vec();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let sent = |from: Sent, to: Sent| {
        json!({
            "alone": to.alone - from.alone,
            "in_graphs": to.in_graphs - from.in_graphs,
            "graphs": to.graphs - from.graphs,
            "arguments_set": to.set - from.set,
        })
    };
    let all = (sequences * tokens) as f64;
    println!(
        "{}",
        json!({
            "mode": mode,
            "gpu": device.limits().name,
            "median_step_s": median(&times),
            "median_until_launched_s": median(&recorded),
            "tokens_per_s": all / median(&times),
            "ahead_step_s": ahead,
            "ahead_tokens_per_s": all / ahead,
            "sent": waited.0.zip(waited.1).map(|(from, to)| sent(from, to)),
            "sent_ahead": sent(before, device.sent()),
            "first_loss": losses[0],
            "last_loss": losses[WARM_UP + steps - 1],
            "made_in_s": made,
            "tensors_mib": mib(&memory),
        })
    );
}

/// A model that is trained.
struct Work {
    parameters: Parameters,
    network: Network,
    set: TrainableSet,
    optimizer: Optimizer,
    batch: TokenBatch,
    planned: bool,
}

impl Work {
    /// Sends a step of this number.
    fn send(&mut self, number: usize) -> (Item, SentStep) {
        let mut f = Forward::train(&self.parameters, &self.set, 0, number as u64);
        let loss = self.network.loss(&mut f, &self.batch);
        let value = match self.planned {
            true => Item::known(1.0),
            false => loss.value().item_later().expect("a scalar"),
        };
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients).expect("trained");
        let (p, set) = (&mut self.parameters, &self.set);
        let sent = self.optimizer.send(p, set, &mut gradients, 1e-4, Some(1.0));
        self.parameters.memory().submit().expect("it is there");
        (value, sent.expect("every parameter has a gradient"))
    }

    /// Waits for a step: its loss.
    fn settle(&mut self, (value, sent): (Item, SentStep)) -> f64 {
        let loss = value.wait().expect("the step succeeded");
        let done = self.optimizer.settle(&self.parameters, &self.set, sent);
        let done = done.expect("gradients are finite");
        assert!(self.planned || done.gradient_norm > 0.0);
        loss
    }
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
