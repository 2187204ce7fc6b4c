//! What decoders have beside parity: policies, dropout, targets, and what a user can get wrong.

use std::path::Path;

use graft_autograd::Gradients;
use graft_models::{
    CausalLm, Checkpoint, Cut, DecoderClassifier, DecoderConfig, Error, ModelSource,
};
use graft_models::{Strategy, TokenBatch, load_parameters};
use graft_nn::{Forward, FreezePolicy, Parameters, Rule, TrainableSet, losses};
use graft_tensor::ops::loss::IGNORE;
use graft_tensor::{DType, Memory, Tensor};
use graft_tests::{decoder_batch, fixture, tensors};

const TIED: &str = "tiny-gpt2";
const APART: &str = "tiny-llama";

fn load(dir: &Path, dropout: f64) -> (Parameters, CausalLm) {
    let mut config = DecoderConfig::load(&ModelSource::directory(dir).unwrap()).unwrap();
    config.dropout.embedding = dropout;
    config.dropout.attention = dropout;
    config.dropout.residual = dropout;
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    let lm = CausalLm::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(dir).unwrap();
    load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
    (parameters, lm)
}

fn example(name: &str) -> (TokenBatch, Vec<i64>) {
    decoder_batch(&tensors(&fixture(name).join("expected.safetensors")))
}

fn trained(parameters: &Parameters, policy: FreezePolicy) -> Vec<String> {
    let set = policy.resolve(parameters).unwrap();
    let name = |id| parameters.get(id).name().to_owned();
    set.ids().map(name).collect()
}

#[test]
fn policies_name_head_layers_and_norm() {
    let (parameters, lm) = load(&fixture(APART), 0.0);
    let names = |strategy| trained(&parameters, lm.policy(strategy).unwrap());
    assert_eq!(
        names(Strategy::Head),
        ["model.norm.weight", "lm_head.weight"]
    );
    let last = names(Strategy::Last(1));
    assert_eq!(last.len(), 9 + 2, "{last:?}");
    let is_top = |name: &String| {
        name.starts_with("model.layers.1.")
            || name == "model.norm.weight"
            || name == "lm_head.weight"
    };
    assert!(last.iter().all(is_top), "{last:?}");
    assert_eq!(names(Strategy::Full).len(), parameters.len());
    assert!(matches!(
        lm.policy(Strategy::Last(3)),
        Err(Error::Strategy { last: 3, layers: 2 })
    ));
    // A tied matrix is the token embedding, which lies below the layers.
    let (parameters, lm) = load(&fixture(TIED), 0.0);
    let names = |strategy| trained(&parameters, lm.policy(strategy).unwrap());
    let norm = ["transformer.ln_f.weight", "transformer.ln_f.bias"];
    assert_eq!(names(Strategy::Head), norm);
    let last = names(Strategy::Last(2));
    let is_table = |name: &String| name.contains("wte") || name.contains("wpe");
    assert!(
        last.len() == 2 * 12 + 2 && !last.iter().any(is_table),
        "{last:?}"
    );
}

#[test]
fn a_classifiers_head_is_its_score() {
    let dir = fixture("tiny-gpt2-classifier");
    let config = DecoderConfig::load(&ModelSource::directory(&dir).unwrap()).unwrap();
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    let classifier = DecoderClassifier::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(&dir).unwrap();
    load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
    let head = classifier.policy(Strategy::Head).unwrap();
    assert_eq!(trained(&parameters, head.clone()), ["score.weight"]);
    // What lies below the lowest trained parameter can be kept, and what lies above computes the same from it.
    let (batch, _) = example("tiny-gpt2-classifier");
    let mut f = Forward::evaluate(&parameters);
    let logits = classifier.forward(&mut f, &batch).unwrap();
    let whole = logits.value().to_bytes().unwrap();
    let cut =
        |rules: FreezePolicy| classifier.cut(&parameters, &rules.resolve(&parameters).unwrap());
    let norm = Rule::train("transformer.ln_f.*");
    let with_norm = [head.rules.clone(), vec![norm]].concat();
    for (rules, expected) in [
        (head, Some(Cut::Head)),
        (FreezePolicy { rules: with_norm }, Some(Cut::Layer(2))),
        (
            classifier.policy(Strategy::Last(1)).unwrap(),
            Some(Cut::Layer(1)),
        ),
        (
            classifier.policy(Strategy::Last(2)).unwrap(),
            Some(Cut::Layer(0)),
        ),
        (FreezePolicy::default(), None),
    ] {
        assert_eq!(cut(rules.clone()), expected);
        let Some(cut) = expected else { continue };
        let mut f = Forward::evaluate(&parameters);
        let kept = classifier.below(&mut f, cut, &batch).unwrap();
        let kept = kept.value().clone();
        let mut f = Forward::evaluate(&parameters);
        let again = classifier.above(&mut f, cut, kept, &batch.offsets).unwrap();
        assert_eq!(again.value().to_bytes().unwrap(), whole, "{cut:?}");
        for id in rules.resolve(&parameters).unwrap().ids() {
            assert!(!classifier.is_below(cut, id));
        }
        let below = parameters
            .iter()
            .filter(|(id, _)| classifier.is_below(cut, *id));
        assert!(below.count() >= 2);
    }
}

fn gradients(
    parameters: &Parameters,
    lm: &CausalLm,
    set: &TrainableSet,
    (batch, targets): &(TokenBatch, Vec<i64>),
) -> Gradients {
    let mut f = Forward::train(parameters, set, 3, 4);
    let loss = lm.loss(&mut f, batch, targets).unwrap();
    let mut gradients = Gradients::new();
    f.backward(loss, &mut gradients).unwrap();
    gradients
}

#[test]
fn what_remains_trained_has_the_gradients_of_the_full_run() {
    for name in ["tiny-gpt2", "tiny-llama", "tiny-qwen2", "tiny-gemma3"] {
        let (parameters, lm) = load(&fixture(name), 0.0);
        let example = example(name);
        let all = FreezePolicy::default().resolve(&parameters).unwrap();
        let full = gradients(&parameters, &lm, &all, &example);
        for strategy in [Strategy::Head, Strategy::Last(1)] {
            let set = lm.policy(strategy).unwrap().resolve(&parameters).unwrap();
            let some = gradients(&parameters, &lm, &set, &example);
            for (id, p) in parameters.iter() {
                let found = some.get(id.key()).map(|g| g.to_bytes().unwrap());
                let expected = set
                    .contains(id)
                    .then(|| full.get(id.key()).unwrap().to_bytes().unwrap());
                assert!(found == expected, "{name} {strategy:?} {}", p.name());
            }
        }
    }
}

#[test]
fn dropout_begins_where_training_does() {
    for name in [TIED, APART] {
        let (parameters, lm) = load(&fixture(name), 0.5);
        let (batch, _) = example(name);
        let hidden = |f: &mut Forward| {
            let (hidden, _) = lm.decoder().forward(f, &batch).unwrap();
            hidden.value().to_bytes().unwrap()
        };
        let evaluated = hidden(&mut Forward::evaluate(&parameters));
        let policy = |strategy| lm.policy(strategy).unwrap().resolve(&parameters).unwrap();
        let head = policy(Strategy::Head);
        assert!(
            hidden(&mut Forward::train(&parameters, &head, 1, 1)) == evaluated,
            "{name}"
        );
        for strategy in [Strategy::Last(1), Strategy::Full] {
            let set = policy(strategy);
            let dropped = hidden(&mut Forward::train(&parameters, &set, 1, 1));
            assert!(dropped != evaluated, "{name} {strategy:?}");
            assert!(hidden(&mut Forward::train(&parameters, &set, 1, 1)) == dropped);
        }
    }
}

#[test]
fn the_loss_is_the_cross_entropy_of_the_logits() {
    for name in ["tiny-gpt2", "tiny-llama", "tiny-gemma2"] {
        let (parameters, lm) = load(&fixture(name), 0.0);
        let (batch, _) = example(name);
        let targets = CausalLm::next_tokens(&batch);
        for (t, &target) in targets.iter().enumerate() {
            let is_last = batch.offsets.contains(&(t as i64 + 1));
            let next = if is_last { IGNORE } else { batch.ids[t + 1] };
            assert_eq!(target, next);
        }
        let mut f = Forward::evaluate(&parameters);
        let loss = lm.loss(&mut f, &batch, &targets).unwrap();
        let logits = lm.forward(&mut f, &batch).unwrap();
        let rows = Tensor::from_slice(f.memory(), &targets, &[targets.len()]).unwrap();
        let rows = f.input(rows);
        let plain = losses::cross_entropy(&mut f, &logits, &rows, 0.0, 1.0).unwrap();
        let (loss, plain) = (loss.value().item().unwrap(), plain.value().item().unwrap());
        assert!(
            (loss - plain).abs() < 1e-4 * plain,
            "{name}: {loss} is not {plain}"
        );
        // Nothing supervised is a loss of nothing.
        let mut f = Forward::evaluate(&parameters);
        let none = vec![IGNORE; batch.tokens()];
        let loss = lm.loss(&mut f, &batch, &none).unwrap();
        assert_eq!(loss.value().item().unwrap(), 0.0);
    }
}

#[test]
fn bad_batches_are_refused() {
    for name in [TIED, APART] {
        let (parameters, lm) = load(&fixture(name), 0.0);
        let loss = |ids: Vec<i64>, targets: Vec<i64>| {
            let batch = TokenBatch {
                type_ids: vec![0; ids.len()],
                offsets: vec![0, ids.len() as i64],
                ids,
            };
            let mut f = Forward::evaluate(&parameters);
            lm.loss(&mut f, &batch, &targets).unwrap_err().to_string()
        };
        assert_eq!(
            loss(vec![1; 41], vec![1; 41]),
            "a sequence has 41 tokens, and the model has positions for 40; truncate it"
        );
        assert_eq!(
            loss(vec![1; 4], vec![1; 3]),
            "a batch of 4 tokens came with 3 targets; give one for each token"
        );
        assert!(loss(vec![1, 101], vec![1, 1]).contains("index 101 at position 1"));
        assert!(loss(vec![1, 1], vec![1, 101]).contains("index 101 at position 1"));
        assert!(loss(vec![-1, 1], vec![1, 1]).contains("index -1 at position 0"));
    }
}

#[test]
fn new_weights_begin_as_in_transformers() {
    let deviation = |name: &str, tensor: &str| {
        let dir = fixture(name);
        let config = DecoderConfig::load(&ModelSource::directory(&dir).unwrap()).unwrap();
        let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
        CausalLm::new(&mut parameters, &config).unwrap();
        parameters.initialise(1).unwrap();
        let id = parameters.find(tensor).unwrap();
        let values = parameters.value(id).unwrap().to_f64().unwrap();
        (values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64).sqrt()
    };
    // Tables of a thousand elements and more: within 10 % of the deviation.
    let near = |found: f64, expected: f64| (found / expected - 1.0).abs() < 0.1;
    assert!(near(deviation("tiny-gpt2", "transformer.wte.weight"), 0.02));
    assert!(near(
        deviation("tiny-gpt2", "transformer.h.0.mlp.c_fc.weight"),
        0.02
    ));
    let smaller = 0.02 / 4f64.sqrt();
    for tensor in [
        "transformer.h.1.mlp.c_proj.weight",
        "transformer.h.0.attn.c_proj.weight",
    ] {
        assert!(near(deviation("tiny-gpt2", tensor), smaller), "{tensor}");
    }
    assert!(near(
        deviation("tiny-llama", "model.layers.0.mlp.down_proj.weight"),
        0.02
    ));
    // Norms begin as the identity: Gemma's are stored less one.
    assert_eq!(deviation("tiny-llama", "model.norm.weight"), 1.0);
    assert_eq!(deviation("tiny-gemma2", "model.norm.weight"), 0.0);
}

#[test]
fn a_plan_is_a_run() {
    for name in ["tiny-gpt2", "tiny-llama", "tiny-gemma2", "tiny-gemma3"] {
        let dir = fixture(name);
        let config = DecoderConfig::load(&ModelSource::directory(&dir).unwrap()).unwrap();
        let (batch, targets) = example(name);
        let usage = |memory: Memory| {
            let mut parameters = Parameters::new(&memory, DType::F32);
            let lm = CausalLm::new(&mut parameters, &config).unwrap();
            parameters.initialise(0).unwrap();
            let set = FreezePolicy::default().resolve(&parameters).unwrap();
            let gradients = gradients(&parameters, &lm, &set, &(batch.clone(), targets.clone()));
            drop(gradients);
            memory.usage()
        };
        assert_eq!(usage(Memory::cpu()), usage(Memory::planned()), "{name}");
    }
}

#[test]
fn activations_in_bf16_give_nearly_the_loss_and_gradients_of_f32() {
    for name in [
        "tiny-gpt2",
        "tiny-llama",
        "tiny-qwen3",
        "tiny-gemma2",
        "tiny-gemma3",
    ] {
        let (mut parameters, lm) = load(&fixture(name), 0.0);
        let (batch, targets) = example(name);
        let set = FreezePolicy::default().resolve(&parameters).unwrap();
        let loss = |parameters: &Parameters| {
            let mut f = Forward::evaluate(parameters);
            let loss = lm.loss(&mut f, &batch, &targets).unwrap();
            loss.value().item().unwrap()
        };
        let example = (batch.clone(), targets.clone());
        let (exact, full) = (
            loss(&parameters),
            gradients(&parameters, &lm, &set, &example),
        );
        parameters.compute_in(DType::Bf16).unwrap();
        let (short, some) = (
            loss(&parameters),
            gradients(&parameters, &lm, &set, &example),
        );
        // bf16 has 8 bits: a few of its roundings, as part of a value.
        assert!(
            (short / exact - 1.0).abs() < 0.02,
            "{name}: {short} is not {exact}"
        );
        let sum = |all: &Gradients, f: &dyn Fn(f64, f64) -> f64| -> f64 {
            let ids = parameters.iter().map(|(id, _)| id.key());
            let pairs = ids.flat_map(|key| {
                let value = |all: &Gradients| all.get(key).unwrap().to_f64().unwrap();
                value(all).into_iter().zip(value(&full))
            });
            pairs.map(|(a, b)| f(a, b)).sum()
        };
        let error = sum(&some, &|a, b| (a - b) * (a - b)).sqrt();
        let size = sum(&full, &|_, b| b * b).sqrt();
        assert!(error < 0.05 * size, "{name}: {error} of {size}");
    }
}
