//! What training a few parameters costs in memory, over a plan of a model of BERT-base's size: weights, what is trained,
//! its gradients and state, and of the activations what a gradient reads.

use graft_autograd::Gradients;
use graft_models::{
    Classifier, Labels, ModelConfig, ModelSource, ProblemType, Strategy, TokenBatch,
};
use graft_nn::adapters::{DEFAULT, rules};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameter, Parameters, Role, losses};
use graft_tensor::{Category, DType, Memory, Tensor};
use graft_tests::fixture;
use graft_trainer::adapter::put;
use graft_trainer::config::{AdapterKind, AdapterSettings};

const TOKENS: usize = 1024;
const SEQUENCES: usize = 8;
/// Virtual tokens in front of each sequence, and how many that is.
const FRONT: usize = 16;
const VIRTUAL: usize = SEQUENCES * FRONT;
const LAYERS: usize = 12;
const HEADS: usize = 12;
const HIDDEN: usize = 768;
const INNER: usize = 3072;
const LABELS: usize = 4;

/// What attention keeps of each of its rows: queries, keys, values and heads, and a number for each head.
const ATTENTION: usize = 4 * HIDDEN + HEADS;
/// What a layer keeps of a token behind attention: the sums that the two norms are of, from which what comes out of the
/// norms is computed again, with mean and deviation, and what the activation is applied to.
const BEHIND: usize = 2 * (HIDDEN + 2) + INNER;
const LAYER: usize = ATTENTION + BEHIND;

/// Something to train beside the output layer.
struct Kind {
    what: &'static str,
    adapter: Option<AdapterKind>,
    /// Numbers that are trained
    trained: usize,
    /// Numbers that gradients read
    saved: usize,
    /// The peak may be so many times what is needed
    limit: f64,
}

const fn kind(what: &'static str, adapter: AdapterKind, trained: usize, saved: usize) -> Kind {
    Kind {
        what,
        adapter: Some(adapter),
        trained,
        saved,
        limit: 1.05,
    }
}

/// Rank 8 on queries and values. Of the embeddings, which are frozen, what the first adapters see is kept; of the other
/// layers that is computed again.
const LORA: Kind = kind(
    "lora",
    AdapterKind::Lora,
    LAYERS * 2 * (8 * HIDDEN + HIDDEN * 8),
    TOKENS * (LAYERS * LAYER + HIDDEN),
);

const KINDS: [Kind; 6] = [
    // The lengths too; they are factors of what comes of the directions, which is kept.
    kind(
        "dora",
        AdapterKind::Dora,
        LAYERS * 2 * (8 * HIDDEN + HIDDEN * 8 + HIDDEN),
        TOKENS * (LAYERS * (LAYER + 2 * HIDDEN) + HIDDEN),
    ),
    // Factors of keys, values, and of what the two outputs of a layer are made of. Keys and values are kept before they
    // are scaled too. For the gradient of the factors of 3072 inputs, these, computed again, their gradient and the
    // products of both are there at the same time.
    Kind {
        limit: 1.07,
        ..kind(
            "ia3",
            AdapterKind::Ia3,
            LAYERS * (3 * HIDDEN + INNER),
            TOKENS * LAYERS * (LAYER + 2 * HIDDEN),
        )
    },
    // Behind both outputs of a layer, from 768 to 32 and back: what goes in, and what its activation is applied to. In the
    // first layer there is nothing to train before attention is over.
    kind(
        "adapter",
        AdapterKind::Bottleneck,
        LAYERS * 2 * (32 * HIDDEN + 32 + HIDDEN * 32 + HIDDEN),
        TOKENS * (LAYERS * (LAYER + 2 * (HIDDEN + 32)) - ATTENTION),
    ),
    // Every layer has more tokens, and so has the norm of the embeddings.
    kind(
        "prompt",
        AdapterKind::Prompt,
        FRONT * HIDDEN,
        (TOKENS + VIRTUAL) * (LAYERS * LAYER + HIDDEN + 2),
    ),
    // Attention has more rows.
    kind(
        "prefix",
        AdapterKind::Prefix,
        FRONT * LAYERS * 2 * HIDDEN,
        LAYERS * ((TOKENS + VIRTUAL) * ATTENTION + TOKENS * BEHIND),
    ),
    // A sum of gradients reads nothing.
    Kind {
        what: "bitfit",
        adapter: None,
        trained: HIDDEN + LAYERS * (7 * HIDDEN + INNER) + HIDDEN * HIDDEN + HIDDEN,
        saved: TOKENS * LAYERS * LAYER,
        limit: 1.05,
    },
];

fn bert_base() -> ModelConfig {
    let source = ModelSource::directory(fixture("tiny-bert")).unwrap();
    let mut config = ModelConfig::load(&source).unwrap();
    config.vocab_size = 30522;
    config.hidden_size = HIDDEN;
    config.layers = LAYERS;
    config.heads = HEADS;
    config.intermediate_size = INNER;
    config.max_positions = 512;
    config.set_classification(Labels::numbered(LABELS), ProblemType::SingleLabel);
    config
}

#[test]
fn lora_takes_weights_adapters_and_what_its_gradients_read() {
    trained(&LORA, DType::F32);
}

#[test]
fn so_do_other_ways_to_train_little() {
    for kind in &KINDS {
        trained(kind, DType::F32);
    }
}

/// Of the base, 4.127 bits for each element of the layers' matrices: their bytes, and nowhere a whole matrix of numbers.
#[test]
fn a_base_in_codes_takes_its_codes() {
    let beside = KINDS.iter().filter(|kind| kind.adapter.is_some());
    for kind in [&LORA].into_iter().chain(beside) {
        for held in [DType::Nf4, DType::Int8, DType::Bf16] {
            trained(kind, held);
        }
    }
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

fn trained(kind: &Kind, held: DType) {
    let what = format!("{} beside {held}", kind.what);
    let memory = Memory::planned();
    let config = bert_base();
    let mut p = Parameters::new(&memory, DType::F32);
    let (model, elements) = model(&mut p, &config, held);
    let base = p.count();
    let policy = match kind.adapter {
        Some(kind) => {
            put(&mut p, &config, kind, &AdapterSettings::usual(kind)).unwrap();
            FreezePolicy {
                rules: rules(&p, DEFAULT),
            }
        }
        None => model.policy(Strategy::Bitfit).unwrap(),
    };
    p.initialise(0).unwrap();
    let set = policy.resolve(&p).unwrap();
    let head = LABELS * HIDDEN + LABELS;
    let trained = kind.trained + head;
    assert_eq!(set.count(&p), trained, "{what}");
    let added = match kind.adapter {
        Some(_) => kind.trained,
        None => 0,
    };
    assert_eq!(p.count(), base + added, "{what}");
    let weights = memory.usage().live(Category::Weights);
    let bits = match held {
        DType::F32 => 32.0,
        DType::Bf16 => 16.0,
        DType::Nf4 => 4.127,
        _ => 8.5,
    };
    if held == DType::F32 {
        assert_eq!(weights, 4 * p.count(), "{what}");
    } else {
        let matrices = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER;
        assert_eq!(elements, LAYERS * matrices, "{what}");
        let of_codes = weights - 4 * (p.count() - elements);
        let found = 8.0 * of_codes as f64 / elements as f64;
        assert!(
            (found - bits).abs() < 0.001,
            "{what}: {found} bits an element"
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
        let of_gradients = memory.usage().live(Category::Gradients);
        assert_eq!(of_gradients, 4 * trained, "{what}");
        optimizer
            .step(&mut p, &set, &mut gradients, 1e-3, Some(1.0))
            .unwrap();
        assert_eq!(optimizer.state_bytes(), 8 * trained, "{what}");
        let of_state = memory.usage().live(Category::Optimizer);
        assert_eq!(of_state, 8 * trained, "{what}");
    }

    let may_save = 4 * kind.saved;
    let share = saved as f64 / may_save as f64;
    assert!(
        (0.99..1.01).contains(&share),
        "{what}: {saved} bytes are kept, {may_save} may be"
    );

    let usage = memory.usage();
    let allowed = weights + 12 * trained + may_save;
    let share = usage.peak_total as f64 / allowed as f64;
    assert!(
        share < kind.limit,
        "{what}: the peak is {share:.3} of what is needed: {usage:?}"
    );
}
