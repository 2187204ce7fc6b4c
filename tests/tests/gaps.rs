//! How much memory lies idle between the tensors of a training step.

use graft_autograd::Gradients;
use graft_models::{CausalLm, DecoderConfig, Strategy, TokenBatch};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters};
use graft_tensor::{DType, Memory, Usage};
use graft_tests::steps::{Workload, batch};

/// The share of what is held that no tensor had at the worst moment.
fn gaps(usage: Usage) -> f64 {
    usage.held as f64 / usage.peak_total as f64 - 1.0
}

#[test]
fn the_tensors_of_a_training_step_lie_close_together() {
    for (strategy, sequences, compute, lora, most) in [
        (Strategy::Full, 32, DType::F32, false, 0.01),
        (Strategy::Full, 32, DType::Bf16, false, 0.01),
        // When all gradients are there, less is left of the activations than they need.
        (Strategy::Full, 8, DType::F32, false, 0.01),
        (Strategy::Full, 8, DType::Bf16, false, 0.01),
        (Strategy::Full, 4, DType::F32, false, 0.01),
        (Strategy::Full, 64, DType::F32, false, 0.01),
        (Strategy::Last(2), 32, DType::F32, false, 0.01),
        (Strategy::Last(2), 32, DType::Bf16, false, 0.01),
        (Strategy::Head, 32, DType::F32, false, 0.02),
        (Strategy::Head, 32, DType::F32, true, 0.01),
        (Strategy::Head, 32, DType::Bf16, true, 0.02),
    ] {
        let mut work = Workload::planned(strategy, compute, 128);
        if lora {
            work = work.with_lora(8);
        }
        let batch = batch(sequences, 128);
        for _ in 0..4 {
            work.step(&batch);
        }
        let found = gaps(work.memory.usage());
        assert!(
            found <= most,
            "{strategy:?}, {sequences} sequences in {compute}, LoRA {lora}: {found:.4} of {:?}",
            work.memory.usage()
        );
    }
}

/// What is said here of steps over memory that is only counted holds for those that compute.
#[test]
fn steps_that_compute_lie_in_the_same_way() {
    for (strategy, compute) in [
        (Strategy::Full, DType::F32),
        (Strategy::Last(1), DType::Bf16),
    ] {
        let mut real = Workload::minilm(strategy, compute, 128);
        let mut planned = Workload::planned(strategy, compute, 128);
        for step in 0..2 {
            let batch = batch(2 + step, 16);
            real.step(&batch);
            planned.step(&batch);
        }
        assert_eq!(real.memory.usage(), planned.memory.usage(), "{compute}");
    }
}

#[test]
fn so_do_those_of_texts_of_all_lengths() {
    for (strategy, compute, lora) in [
        (Strategy::Full, DType::F32, false),
        (Strategy::Full, DType::Bf16, false),
        (Strategy::Head, DType::F32, true),
    ] {
        let mut work = Workload::planned(strategy, compute, 128);
        if lora {
            work = work.with_lora(8);
        }
        for step in 0..30 {
            let lengths = (0..32).map(|i| 5 + (31 * step + i) * 7919 % 1009 * 123 / 1009);
            let texts: Vec<Vec<i64>> = lengths.map(|n| vec![2000; n]).collect();
            work.step(&TokenBatch::of_ids(texts.iter().map(Vec::as_slice)));
        }
        let found = gaps(work.memory.usage());
        assert!(
            found <= 0.015,
            "{strategy:?} in {compute}, LoRA {lora}: {found:.4} of {:?}",
            work.memory.usage()
        );
    }
}

/// The matrix of a vocabulary that is read at both ends is the largest gradient and the first one to come.
#[test]
fn so_do_those_of_a_language_model() {
    const CONFIG: &str = r#"{
      "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_layer": 12,
      "n_positions": 1024, "vocab_size": 50257, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0
    }"#;
    let config = DecoderConfig::parse("config.json", CONFIG.as_bytes()).unwrap();
    for compute in [DType::F32, DType::Bf16] {
        let mut p = Parameters::new(&Memory::planned(), DType::F32);
        let lm = CausalLm::new(&mut p, &config).unwrap();
        p.initialise(0).unwrap();
        p.compute_in(compute).unwrap();
        let set = FreezePolicy::default().resolve(&p).unwrap();
        let mut optimizer = Optimizer::new(Rule::adamw(), 0.01, false).unwrap();
        optimizer.prepare(&p, &set).unwrap();
        let batch = TokenBatch::of_ids([[1; 256]; 4].iter().map(<[i64; 256]>::as_slice));
        let targets = CausalLm::next_tokens(&batch);
        for step in 0..3 {
            let mut f = Forward::train(&p, &set, 0, step);
            let loss = lm.loss(&mut f, &batch, &targets).unwrap();
            let mut gradients = Gradients::new();
            f.backward(loss, &mut gradients).unwrap();
            optimizer
                .step(&mut p, &set, &mut gradients, 1e-4, Some(1.0))
                .unwrap();
        }
        let usage = p.memory().usage();
        assert!(gaps(usage) <= 0.01, "{compute}: {usage:?}");
        // Weights, gradients and AdamW's two moments; the vocabulary's gradient is there once.
        let most = if compute == DType::F32 { 1.04 } else { 1.01 };
        let least = (4 * p.count() * DType::F32.size()) as f64;
        assert!(
            usage.peak_total as f64 <= most * least,
            "{compute}: {usage:?}"
        );
    }
}
