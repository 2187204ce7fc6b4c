//! Models that label tokens against PyTorch and transformers: logits, loss, every gradient and ten AdamW steps of each family;
//! what a frozen trunk makes of a text; what a checkpoint may lack. `tests/fixtures/README.md` says what the files hold.

use std::collections::HashMap;
use std::path::Path;

use graft_autograd::{Gradients, Var};
use graft_models::{
    Checkpoint, Classifier, Config, Cut, DecoderClassifier, LoadReport, ModelSource, ProblemType,
    Strategy, TokenBatch, load_parameters, save_parameters,
};
use graft_nn::{Forward, FreezePolicy, ParamId, Parameters, TrainableSet};
use graft_tensor::{DType, Memory, Tensor};
use graft_tests::parity::{assert_gradients, is_noise, loss_of_tokens, losses_of_adamw};
use graft_tests::{ENCODERS, fixture, json, max_distance, numbers, tensors};

const MODELS: [&str; 5] = [
    "tiny-bert-tokens",
    "tiny-roberta-tokens",
    "tiny-distilbert-tokens",
    "tiny-gpt2-tokens",
    "tiny-llama-tokens",
];

enum Network {
    Encoder(Classifier),
    Decoder(DecoderClassifier),
}

impl Network {
    fn forward(&self, f: &mut Forward, batch: &TokenBatch) -> Var {
        match self {
            Network::Encoder(network) => network.forward(f, batch),
            Network::Decoder(network) => network.forward(f, batch),
        }
        .unwrap()
    }

    fn policy(&self, strategy: Strategy) -> FreezePolicy {
        match self {
            Network::Encoder(network) => network.policy(strategy),
            Network::Decoder(network) => network.policy(strategy),
        }
        .unwrap()
    }

    fn cut(&self, p: &Parameters, set: &TrainableSet) -> Option<Cut> {
        match self {
            Network::Encoder(network) => network.cut(p, set),
            Network::Decoder(network) => network.cut(p, set),
        }
    }

    fn is_below(&self, cut: Cut, id: ParamId) -> bool {
        match self {
            Network::Encoder(network) => network.is_below(cut, id),
            Network::Decoder(network) => network.is_below(cut, id),
        }
    }

    fn below(&self, f: &mut Forward, cut: Cut, batch: &TokenBatch) -> Var {
        match self {
            Network::Encoder(network) => network.below(f, cut, batch),
            Network::Decoder(network) => network.below(f, cut, batch),
        }
        .unwrap()
    }

    fn above(&self, f: &mut Forward, cut: Cut, x: Tensor, offsets: &[i64]) -> Var {
        match self {
            Network::Encoder(network) => network.above(f, cut, x, offsets),
            Network::Decoder(network) => network.above(f, cut, x, offsets),
        }
        .unwrap()
    }
}

fn config(dir: &Path) -> Config {
    Config::load(&ModelSource::directory(dir).unwrap()).unwrap()
}

/// A model of this configuration with the weights in `dir`; with `seed`, its head is new.
fn load_as(
    config: &Config,
    dir: &Path,
    dtype: DType,
    seed: Option<u64>,
) -> (Parameters, Network, LoadReport) {
    let mut p = Parameters::new(&Memory::cpu(), dtype);
    let mut checkpoint = Checkpoint::open(dir).unwrap();
    let (network, report) = match config {
        Config::Encoder(config) => {
            let network = Classifier::new(&mut p, config).unwrap();
            let report = load_parameters(&mut p, &**config, &mut checkpoint, seed);
            (Network::Encoder(network), report)
        }
        Config::Decoder(config) => {
            let network = DecoderClassifier::new(&mut p, config).unwrap();
            let report = load_parameters(&mut p, &**config, &mut checkpoint, seed);
            (Network::Decoder(network), report)
        }
    };
    (p, network, report.unwrap())
}

fn load(name: &str, dtype: DType) -> (Parameters, Network) {
    let dir = fixture(name);
    let config = config(&dir);
    assert_eq!(config.head().problem(), ProblemType::Tokens);
    let (parameters, network, report) = load_as(&config, &dir, dtype, None);
    assert_eq!(report, LoadReport::default());
    (parameters, network)
}

fn batch(expected: &HashMap<String, Tensor>) -> (TokenBatch, Vec<i64>) {
    let integers = |name: &str| expected[name].to_vec::<i64>().unwrap();
    let batch = TokenBatch {
        ids: integers("input_ids"),
        type_ids: integers("token_type_ids"),
        offsets: integers("offsets"),
    };
    (batch, integers("targets"))
}

fn step(
    parameters: &Parameters,
    network: &Network,
    set: &TrainableSet,
    (batch, targets): &(TokenBatch, Vec<i64>),
) -> (f64, Gradients) {
    let mut f = Forward::train(parameters, set, 0, 0);
    let logits = network.forward(&mut f, batch);
    let all = Tensor::from_slice(f.memory(), targets, &[targets.len()]).unwrap();
    let all = f.input(all);
    let sum = f.tape.cross_entropy(&logits, &all, 0.0).unwrap();
    loss_of_tokens(f, &sum, targets)
}

#[test]
fn logits_loss_and_every_gradient_equal_those_of_transformers() {
    for name in MODELS {
        let dir = fixture(name);
        let expected = tensors(&dir.join("expected.safetensors"));
        let written = json(&dir.join("expected.json"));
        let batch = batch(&expected);
        for (dtype, [off, tolerance]) in [(DType::F32, [1e-5, 1e-5]), (DType::F64, [1e-11, 1e-10])]
        {
            let (parameters, network) = load(name, dtype);
            let mut f = Forward::evaluate(&parameters);
            let logits = network.forward(&mut f, &batch.0).value().to_f64().unwrap();
            let error = max_distance(&logits, &expected["logits64"].to_f64().unwrap());
            assert!(error < off, "{name} {dtype}: logits are off by {error:e}");
            let set = FreezePolicy::default().resolve(&parameters).unwrap();
            let (loss, gradients) = step(&parameters, &network, &set, &batch);
            let error = (loss - written["loss64"].as_f64().unwrap()).abs();
            assert!(error < off, "{name} {dtype}: the loss is off by {error:e}");
            let is_noise = |parameter: &str| is_noise(&written, parameter);
            assert_gradients(
                (name, dtype),
                &parameters,
                &gradients,
                &expected,
                tolerance,
                is_noise,
            );
        }
    }
}

#[test]
fn ten_steps_of_adamw_have_the_losses_of_pytorch() {
    for name in MODELS {
        let dir = fixture(name);
        let batch = batch(&tensors(&dir.join("expected.safetensors")));
        let adamw = &json(&dir.join("expected.json"))["adamw"];
        let (mut parameters, network) = load(name, DType::F32);
        let set = FreezePolicy::default().resolve(&parameters).unwrap();
        let lr = adamw["lr"].as_f64().unwrap();
        let losses = losses_of_adamw(&mut parameters, &set, lr, |parameters| {
            step(parameters, &network, &set, &batch)
        });
        let error = max_distance(&losses, &numbers(&adamw["losses64"]));
        assert!(error < 2e-5, "{name}: {error:e}");
    }
}

/// Each strategy trains the head's two tensors, and what passes through its cut gives the same bits.
#[test]
fn what_a_frozen_trunk_makes_of_a_text_gives_the_same_logits() {
    for name in MODELS {
        let (batch, _) = batch(&tensors(&fixture(name).join("expected.safetensors")));
        let (parameters, network) = load(name, DType::F32);
        let mut f = Forward::evaluate(&parameters);
        let logits = network.forward(&mut f, &batch);
        assert_eq!(logits.value().shape()[0], batch.tokens());
        let whole = logits.value().to_bytes().unwrap();
        for (strategy, expected) in [
            (Strategy::Head, Some(Cut::Tokens)),
            (Strategy::Last(1), Some(Cut::Layer(1))),
            (Strategy::Last(2), Some(Cut::Layer(0))),
            (Strategy::Full, None),
        ] {
            let set = network.policy(strategy).resolve(&parameters).unwrap();
            if strategy == Strategy::Head {
                assert_eq!(set.ids().count(), 2, "{name}: weight and bias");
            }
            assert_eq!(network.cut(&parameters, &set), expected, "{name}");
            let Some(cut) = expected else { continue };
            let mut f = Forward::evaluate(&parameters);
            let kept = network.below(&mut f, cut, &batch).value().clone();
            assert_eq!(kept.shape()[0], cut.rows(batch.tokens()), "{name} {cut:?}");
            let mut f = Forward::evaluate(&parameters);
            let again = network.above(&mut f, cut, kept, &batch.offsets);
            assert!(again.value().to_bytes().unwrap() == whole, "{name} {cut:?}");
            assert!(set.ids().all(|id| !network.is_below(cut, id)), "{name}");
        }
    }
}

/// A head over tokens is new on a classifier of texts, on a model that fills in tokens and on a bare encoder, and has no use
/// for their heads; and the other way round.
#[test]
fn heads_of_other_kinds_make_room() {
    for family in ENCODERS {
        let name = format!("{family}-tokens");
        let config = config(&fixture(&name));
        for other in [family.to_owned(), format!("{family}-masked")] {
            let (p, _, report) = load_as(&config, &fixture(&other), DType::F32, Some(3));
            assert_eq!(
                report.initialised,
                ["classifier.weight", "classifier.bias"],
                "{other}"
            );
            assert!(p.lookup("bert.pooler.dense.weight").is_none());
            assert!(!report.unused.is_empty());
        }
        let Config::Encoder(mut texts) = config.clone() else {
            panic!("{family} is an encoder");
        };
        let labels = texts.head.labels.clone();
        texts.set_classification(labels, ProblemType::SingleLabel);
        let texts = Config::Encoder(texts);
        let (_, _, report) = load_as(&texts, &fixture(&name), DType::F32, Some(3));
        assert!(report.initialised.len() >= 4 - usize::from(family == "tiny-bert"));
    }
    for family in ["tiny-gpt2", "tiny-llama"] {
        let config = config(&fixture(&format!("{family}-tokens")));
        let (_, _, report) = load_as(&config, &fixture(family), DType::F32, Some(3));
        assert_eq!(report.initialised.len(), 2, "{report:?}");
    }
}

#[test]
fn what_is_written_has_the_names_that_were_read() {
    for name in MODELS {
        let (parameters, _) = load(name, DType::F32);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        save_parameters(&parameters, &path).unwrap();
        let (written, read) = (tensors(&path), fixture(name).join("model.safetensors"));
        let read = tensors(&read);
        assert_eq!(written.len(), read.len(), "{name}");
        for (tensor, value) in &read {
            let same = written[tensor].to_bytes().unwrap() == value.to_bytes().unwrap();
            assert!(same, "{name}: {tensor}");
        }
    }
}
