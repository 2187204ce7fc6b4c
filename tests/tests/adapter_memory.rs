//! What training with LoRA costs in memory, over a plan of a model of BERT-base's size: weights, adapters, their
//! gradients and state, and of the activations what a gradient reads.

use graft_autograd::Gradients;
use graft_models::{Classifier, Labels, ModelConfig, ModelSource, ProblemType, TokenBatch};
use graft_nn::adapters::{DEFAULT, rules};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameter, Parameters, Role, losses};
use graft_tensor::{Category, DType, Memory, Tensor};
use graft_tests::fixture;
use graft_trainer::adapter::put;
use graft_trainer::config::{AdapterKind, AdapterSettings};

const TOKENS: usize = 1024;
const SEQUENCES: usize = 8;

fn bert_base() -> ModelConfig {
    let source = ModelSource::directory(fixture("tiny-bert")).unwrap();
    let mut config = ModelConfig::load(&source).unwrap();
    config.vocab_size = 30522;
    config.hidden_size = 768;
    config.layers = 12;
    config.heads = 12;
    config.intermediate_size = 3072;
    config.max_positions = 512;
    config.set_classification(Labels::numbered(4), ProblemType::SingleLabel);
    config
}

#[test]
fn lora_takes_weights_adapters_and_what_its_gradients_read() {
    lora_beside(DType::F32);
}

/// Of the base, 4.127 bits for each element of the layers' matrices: their bytes, and nowhere a whole matrix of numbers.
#[test]
fn a_base_in_codes_takes_its_codes() {
    lora_beside(DType::Nf4);
    lora_beside(DType::Int8);
    lora_beside(DType::Bf16);
}

/// A model, and how many elements of it are held in `held`.
fn model(p: &mut Parameters, config: &ModelConfig, held: DType) -> (Classifier, usize) {
    let model = Classifier::new(p, config).unwrap();
    let is_held = |parameter: &Parameter| {
        let in_layer = parameter.name().contains(".layer.");
        held != DType::F32 && in_layer && matches!(parameter.role(), Role::Linear(_))
    };
    let all = p.iter().filter(|(_, parameter)| is_held(parameter));
    let ids: Vec<_> = all
        .map(|(id, parameter)| (id, parameter.shape().count()))
        .collect();
    for (id, _) in &ids {
        p.hold(*id, held).unwrap();
    }
    (model, ids.iter().map(|(_, count)| count).sum())
}

fn lora_beside(held: DType) {
    let memory = Memory::planned();
    let config = bert_base();
    let mut p = Parameters::new(&memory, DType::F32);
    let (model, elements) = model(&mut p, &config, held);
    let base = p.count();
    let kind = AdapterKind::Lora;
    put(&mut p, &config, kind, &AdapterSettings::usual(kind)).unwrap();
    p.initialise(0).unwrap();
    let rules = rules(&p, DEFAULT);
    let set = FreezePolicy { rules }.resolve(&p).unwrap();
    // Rank 8 on queries and values, and the output layer.
    let trained = 12 * 2 * (8 * 768 + 768 * 8) + 4 * 768 + 4;
    assert_eq!(set.count(&p), trained);
    assert_eq!(p.count(), base + trained - 4 * 768 - 4);
    let weights = memory.usage().live(Category::Weights);
    let bits = match held {
        DType::F32 => 32.0,
        DType::Bf16 => 16.0,
        DType::Nf4 => 4.127,
        _ => 8.5,
    };
    if held == DType::F32 {
        assert_eq!(weights, 4 * p.count());
    } else {
        assert_eq!(elements, 12 * (4 * 768 * 768 + 2 * 768 * 3072));
        let of_codes = weights - 4 * (p.count() - elements);
        let found = 8.0 * of_codes as f64 / elements as f64;
        assert!(
            (found - bits).abs() < 0.001,
            "{held}: {found} bits an element"
        );
    }
    // Numbers on their way to codes.
    memory.reset_peak();

    let batch = TokenBatch {
        ids: vec![7; TOKENS],
        type_ids: vec![0; TOKENS],
        offsets: (0..=SEQUENCES)
            .map(|i| (i * TOKENS / SEQUENCES) as i64)
            .collect(),
    };
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.01, false).unwrap();
    let mut saved = 0;
    for step in 0..2 {
        let mut f = Forward::train(&p, &set, 0, step);
        let logits = model.forward(&mut f, &batch).unwrap();
        let targets = Tensor::from_vec(&memory, vec![1i64; SEQUENCES], &[SEQUENCES]).unwrap();
        let targets = f.input(targets);
        let loss = losses::cross_entropy(&mut f, &logits, &targets, 0.0, 8.0).unwrap();
        drop((logits, targets));
        saved = memory.usage().live(Category::Activations);
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients).unwrap();
        assert_eq!(memory.usage().live(Category::Gradients), 4 * trained);
        optimizer
            .step(&mut p, &set, &mut gradients, 1e-3, Some(1.0))
            .unwrap();
        assert_eq!(optimizer.state_bytes(), 8 * trained);
    }

    // Of each layer: queries, keys, values and heads for attention, with a number for each head; the sums that the two
    // norms are of, from which what the adapters see is computed again; and what the activation is applied to. Of the
    // embeddings, which are frozen: what the first adapters see.
    let (hidden, inner, heads) = (768, 3072, 12);
    let layer = 4 * hidden + heads + 2 * (hidden + 2) + inner;
    let may_save = 4 * TOKENS * (12 * layer + hidden);
    let share = saved as f64 / may_save as f64;
    assert!(
        (0.99..1.01).contains(&share),
        "{saved} bytes are kept, {may_save} may be"
    );

    let usage = memory.usage();
    let allowed = weights + 12 * trained + may_save;
    let share = usage.peak_total as f64 / allowed as f64;
    assert!(
        share < 1.05,
        "{held}: the peak is {share:.3} of what is needed: {usage:?}"
    );
}
