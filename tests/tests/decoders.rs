//! The decoders against PyTorch and transformers: logits, loss, every gradient and ten AdamW steps of each family, and
//! the logits of sequence classifiers. `tests/fixtures/README.md` says what the files hold.
//!
//! Tolerances: PyTorch's own f32 run of these models is off its f64 run by up to 3.9e-6 in the logits, 1.8e-6 relative
//! in a gradient and 5e-6 in a weight after ten steps.

use std::path::Path;

use graft_autograd::Gradients;
use graft_models::config::{Config, RopeScaling};
use graft_models::{CausalLm, Checkpoint, DecoderClassifier, DecoderConfig, ModelSource};
use graft_models::{Error, KvCache, Stored, TokenBatch, load_parameters, save_parameters};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters, TrainableSet};
use graft_tensor::{DType, Memory};
use graft_tests::parity::{assert_gradients, loss_of_tokens};
use graft_tests::{DECODERS, decoder_batch, fixture, json, max_distance, numbers, tensors};

const CLASSIFIERS: [&str; 2] = ["tiny-gpt2-classifier", "tiny-llama-classifier"];

struct Model {
    config: DecoderConfig,
    parameters: Parameters,
    lm: CausalLm,
}

fn config(dir: &Path) -> DecoderConfig {
    DecoderConfig::load(&ModelSource::directory(dir).unwrap()).unwrap()
}

fn load(dir: &Path, dtype: DType) -> Model {
    let config = config(dir);
    let mut parameters = Parameters::new(&Memory::cpu(), dtype);
    let lm = CausalLm::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(dir).unwrap();
    let report = load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
    assert_eq!(report, Default::default());
    Model {
        config,
        parameters,
        lm,
    }
}

impl Model {
    fn logits(&self, batch: &TokenBatch) -> Vec<f64> {
        let mut f = Forward::evaluate(&self.parameters);
        let logits = self.lm.forward(&mut f, batch).unwrap();
        logits.value().to_f64().unwrap()
    }

    /// The mean loss over the supervised tokens, and its gradients.
    fn step(&self, set: &TrainableSet, batch: &TokenBatch, targets: &[i64]) -> (f64, Gradients) {
        let mut f = Forward::train(&self.parameters, set, 0, 0);
        let sum = self.lm.loss(&mut f, batch, targets).unwrap();
        loss_of_tokens(f, &sum, targets)
    }
}

#[test]
fn logits_equal_those_of_transformers() {
    for name in DECODERS {
        let dir = fixture(name);
        let tensors = tensors(&dir.join("expected.safetensors"));
        let (batch, _) = decoder_batch(&tensors);
        let exact = tensors["logits64"].to_f64().unwrap();
        let error = max_distance(&load(&dir, DType::F32).logits(&batch), &exact);
        assert!(error < 1e-5, "{name}: logits are off by {error:e}");
        let error = max_distance(&load(&dir, DType::F64).logits(&batch), &exact);
        assert!(error < 1e-11, "{name} in f64: logits are off by {error:e}");
    }
}

#[test]
fn both_spellings_of_a_config_are_one_model() {
    for name in DECODERS.iter().chain(&CLASSIFIERS) {
        let dir = fixture(name);
        let read = |file: &str| {
            let text = std::fs::read(dir.join(file)).unwrap();
            let Config::Decoder(mut config) = Config::parse(file, &text).unwrap() else {
                panic!("{name} is a decoder");
            };
            config.raw.clear();
            config
        };
        assert_eq!(read("config.json"), read("config.v4.json"), "{name}");
    }
}

/// Other settings than those of the fixtures: positions stretched, windows, activations, scales, caps; by a full pass and
/// token by token with a cache.
#[test]
fn logits_under_other_settings_equal_those_of_transformers() {
    let cases = json(&fixture("variants.json"));
    let expected = tensors(&fixture("variants.safetensors"));
    let cases = cases.as_array().unwrap();
    assert_eq!((cases.len(), expected.len()), (32, 32));
    for (number, case) in cases.iter().enumerate() {
        let dir = fixture(case["model"].as_str().unwrap());
        let text = case["config"].to_string();
        let config = DecoderConfig::parse("config.json", text.as_bytes()).unwrap();
        let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
        let lm = CausalLm::new(&mut parameters, &config).unwrap();
        let mut checkpoint = Checkpoint::open(&dir).unwrap();
        load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
        let (batch, _) = decoder_batch(&tensors(&dir.join("expected.safetensors")));
        let exact = expected[&number.to_string()].to_f64().unwrap();
        let vocabulary = config.vocab_size;
        let mut f = Forward::evaluate(&parameters);
        let logits = lm.forward(&mut f, &batch).unwrap();
        let logits = logits.value().to_f64().unwrap();
        let rows: Vec<&[f64]> = logits.chunks(vocabulary).collect();
        for (text, pair) in batch.offsets.windows(2).enumerate() {
            let (start, end) = (pair[0] as usize, pair[1] as usize);
            let exact = &exact[text * vocabulary..(text + 1) * vocabulary];
            let error = max_distance(rows[end - 1], exact);
            assert!(error < 1e-5, "{text}: off by {error:e}: {case}");
            let mut cache = KvCache::new(&parameters, &config, 1, end - start).unwrap();
            let mut last = Vec::new();
            for id in &batch.ids[start..end] {
                let mut f = Forward::evaluate(&parameters);
                let new = TokenBatch::of_ids([std::slice::from_ref(id)]);
                let logits = lm.advance(&mut f, &new, &mut cache).unwrap();
                last = logits.value().to_f64().unwrap();
            }
            let error = max_distance(&last, exact);
            assert!(
                error < 1e-5,
                "{text} with a cache: off by {error:e}: {case}"
            );
        }
    }
}

#[test]
fn loss_and_every_gradient_equal_those_of_pytorch() {
    for name in DECODERS {
        let dir = fixture(name);
        let tensors = tensors(&dir.join("expected.safetensors"));
        let expected = json(&dir.join("expected.json"));
        let (batch, targets) = decoder_batch(&tensors);
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-10)] {
            let model = load(&dir, dtype);
            let set = FreezePolicy::default().resolve(&model.parameters).unwrap();
            let (loss, gradients) = model.step(&set, &batch, &targets);
            let exact = expected["loss64"].as_f64().unwrap();
            assert!(
                (loss - exact).abs() < tolerance,
                "{name}: {loss} is not {exact}"
            );
            assert_gradients(
                (name, dtype),
                &model.parameters,
                &gradients,
                &tensors,
                tolerance,
                |_| false,
            );
        }
    }
}

#[test]
fn ten_adamw_steps_equal_those_of_pytorch() {
    for name in DECODERS {
        let dir = fixture(name);
        let tensors = tensors(&dir.join("expected.safetensors"));
        let expected = json(&dir.join("expected.json"));
        let (batch, targets) = decoder_batch(&tensors);
        let adamw = &expected["adamw"];
        let mut model = load(&dir, DType::F32);
        let set = FreezePolicy::default().resolve(&model.parameters).unwrap();
        let decay = adamw["weight_decay"].as_f64().unwrap();
        let lr = adamw["lr"].as_f64().unwrap();
        let mut optimizer = Optimizer::new(Rule::adamw(), decay, true).unwrap();
        let (losses, norms): (Vec<f64>, Vec<f64>) = (0..10)
            .map(|_| {
                let (loss, mut gradients) = model.step(&set, &batch, &targets);
                let step = optimizer
                    .step(&mut model.parameters, &set, &mut gradients, lr, None)
                    .unwrap();
                (loss, step.gradient_norm)
            })
            .unzip();
        let error = max_distance(&losses, &numbers(&adamw["losses64"]));
        assert!(error < 1e-5, "{name}: losses are off by {error:e}");
        let error = max_distance(&norms, &numbers(&adamw["grad_norms"]));
        assert!(error < 2e-4, "{name}: norms are off by {error:e}");
        for (id, parameter) in model.parameters.iter() {
            let found = model.parameters.value(id).unwrap().to_f64().unwrap();
            let table = |kind: &str| {
                tensors[&format!("{kind}.{}", parameter.name())]
                    .to_f64()
                    .unwrap()
            };
            // Where the gradient is rounding noise (GPT-2's biases of keys), AdamW makes steps of the size of the
            // learning rate from it.
            let solid = |gradient: &f64| *gradient == 0.0 || gradient.abs() > 1e-12;
            let (found, exact): (Vec<f64>, Vec<f64>) = table("grad64")
                .iter()
                .zip(found.into_iter().zip(table("step10")))
                .filter(|(gradient, _)| solid(gradient))
                .map(|(_, pair)| pair)
                .unzip();
            let error = max_distance(&found, &exact);
            assert!(error < 2e-5, "{name} {}: {error:e}", parameter.name());
        }
    }
}

#[test]
fn classifiers_equal_those_of_transformers() {
    for name in CLASSIFIERS {
        let dir = fixture(name);
        let tensors = tensors(&dir.join("expected.safetensors"));
        let (batch, _) = decoder_batch(&tensors);
        let exact = tensors["logits64"].to_f64().unwrap();
        let config = config(&dir);
        assert_eq!(
            config.head.labels.names(),
            ["negative", "neutral", "positive"]
        );
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-11)] {
            let mut parameters = Parameters::new(&Memory::cpu(), dtype);
            let classifier = DecoderClassifier::new(&mut parameters, &config).unwrap();
            let mut checkpoint = Checkpoint::open(&dir).unwrap();
            let report = load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
            assert_eq!(report, Default::default());
            let mut f = Forward::evaluate(&parameters);
            let logits = classifier.forward(&mut f, &batch).unwrap();
            let error = max_distance(&logits.value().to_f64().unwrap(), &exact);
            assert!(error < tolerance, "{name}: logits are off by {error:e}");
        }
    }
}

/// A directory with the model as Graft writes it.
fn written(model: &Model) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), model.config.to_json()).unwrap();
    save_parameters(&model.parameters, &dir.path().join("model.safetensors")).unwrap();
    dir
}

#[test]
fn a_model_survives_our_writer() {
    for name in DECODERS {
        let dir = fixture(name);
        let model = load(&dir, DType::F32);
        let out = written(&model);
        assert_eq!(
            json(&out.path().join("config.json")),
            json(&dir.join("config.json")),
            "{name}"
        );
        let (before, after) = (
            tensors(&dir.join("model.safetensors")),
            tensors(&out.path().join("model.safetensors")),
        );
        assert_eq!(before.len(), after.len(), "{name}");
        for (tensor, value) in &before {
            let other = after[tensor].to_bytes().unwrap();
            assert_eq!(value.to_bytes().unwrap(), other, "{name} {tensor}");
        }
        let again = load(out.path(), DType::F32);
        assert_eq!(again.config.family, model.config.family);
    }
}

#[test]
fn frequencies_equal_those_of_transformers() {
    let cases = json(&fixture("rope.json"));
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 16);
    for case in cases {
        let text = case["config"].to_string();
        let config = DecoderConfig::parse("config.json", text.as_bytes()).unwrap();
        let graft_models::config::Positions::Rotary { full, .. } = config.positions() else {
            panic!("Llama's positions are rotary");
        };
        let exact = numbers(&case["inv_freq"]);
        let found = full.frequencies(config.head_dim);
        assert_eq!(found.len(), exact.len());
        for (found, exact) in found.iter().zip(&exact) {
            // Some steps of f32, each within half a unit in the last place but for the power's.
            let error = (f64::from(*found) / exact - 1.0).abs();
            assert!(error < 3e-7, "{full:?}: {found} is not {exact}");
        }
        let factor = case["attention_factor"].as_f64().unwrap();
        assert!((full.attention_factor() - factor).abs() < 1e-12, "{full:?}");
        if let RopeScaling::Yarn { factor, .. } = full.scaling {
            assert!(config.max_tokens() as f64 >= factor * 4096.0);
        }
    }
}

/// A checkpoint made from a fixture's tensors by `change`, loaded as the fixture's model.
fn load_changed(
    name: &str,
    change: impl Fn(&str) -> Option<Vec<String>>,
    new_head: Option<u64>,
) -> Result<(Parameters, graft_models::LoadReport), Error> {
    use graft_models::safetensors::{TensorView, write};
    let dir = fixture(name);
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.safetensors");
    let stored = tensors(&dir.join("model.safetensors"));
    let mut list = Vec::new();
    for (tensor, value) in &stored {
        for new in change(tensor).unwrap_or_else(|| vec![tensor.clone()]) {
            list.push((new, value, value.to_bytes().unwrap()));
        }
    }
    list.sort_by(|a, b| a.0.cmp(&b.0));
    let views = list.iter().map(|(name, value, data)| TensorView {
        name,
        dtype: value.dtype(),
        shape: value.shape(),
        data,
    });
    write(&path, &Default::default(), views).unwrap();
    let mut config = config(&dir);
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    match new_head {
        None => drop(CausalLm::new(&mut parameters, &config).unwrap()),
        Some(_) => {
            let labels = graft_models::Labels::numbered(4);
            config
                .set_classification(labels, graft_models::ProblemType::SingleLabel)
                .unwrap();
            drop(DecoderClassifier::new(&mut parameters, &config).unwrap());
        }
    }
    let mut checkpoint = Checkpoint::open(out.path()).unwrap();
    let report = load_parameters(&mut parameters, &config, &mut checkpoint, new_head)?;
    Ok((parameters, report))
}

#[test]
fn checkpoints_of_other_spellings_load() {
    // GPT-2 as it was first published: no prefix, the causal masks beside the weights.
    let bare = |name: &str| {
        let short = name.strip_prefix("transformer.").unwrap().to_owned();
        let layer = short.strip_suffix("attn.c_attn.bias");
        let mask = layer.map(|layer| format!("{layer}attn.bias"));
        Some(std::iter::once(short.clone()).chain(mask).collect())
    };
    let (_, report) = load_changed("tiny-gpt2", bare, None).unwrap();
    assert_eq!(report.unused, ["h.0.attn.bias", "h.1.attn.bias"]);
    // A tied head that is stored all the same.
    let tied = |name: &str| {
        let is_table = name == "model.embed_tokens.weight";
        is_table.then(|| vec![name.to_owned(), "lm_head.weight".to_owned()])
    };
    let (parameters, report) = load_changed("tiny-qwen2", tied, None).unwrap();
    assert_eq!(report.unused, ["lm_head.weight"]);
    assert!(parameters.find("lm_head.weight").is_err());
    // A language model that becomes a classifier.
    let (parameters, report) = load_changed("tiny-llama", |_| None, Some(7)).unwrap();
    assert_eq!(report.unused, ["lm_head.weight"]);
    assert_eq!(report.initialised, ["score.weight"]);
    assert!(parameters.iter().all(|(_, p)| p.has_value()));
}

#[test]
fn a_tied_head_with_numbers_of_its_own_is_refused() {
    let mut config = config(&fixture("tiny-llama"));
    config.tied = true;
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    CausalLm::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(fixture("tiny-llama")).unwrap();
    let error = load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(
            "`lm_head.weight` holds other numbers than `model.embed_tokens.weight`, expected the same ones: config.json \
             ties the two; set `tie_word_embeddings` to false"
        ),
        "{text}"
    );
}

#[test]
fn every_tensor_is_accounted_for() {
    let error = |name: &str, from: &str, to: &[&str]| {
        let change = |tensor: &str| {
            (tensor == from).then(|| to.iter().map(|name| (*name).to_owned()).collect())
        };
        load_changed(name, change, None).unwrap_err().to_string()
    };
    let text = error("tiny-llama", "lm_head.weight", &[]);
    assert!(text.contains("missing (1):\n  - lm_head.weight"), "{text}");
    let key = "model.layers.1.self_attn.k_norm.weight";
    let text = error(
        "tiny-qwen3",
        key,
        &[key, "model.layers.1.self_attn.k_norm.bias"],
    );
    assert!(
        text.contains("unexpected (1):\n  - model.layers.1.self_attn.k_norm.bias"),
        "{text}"
    );
    let (up, gate) = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    );
    let text = error("tiny-mistral", up, &[up, "model.norm.bias"]);
    assert!(text.contains("model.norm.bias"), "{text}");
    let swapped = |tensor: &str| match tensor {
        t if t == up => Some(vec![gate.to_owned()]),
        t if t == gate => Some(vec![up.to_owned()]),
        _ => None,
    };
    let text = load_changed("tiny-mistral", swapped, None)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("wrong shape or type (2)") && text.contains("[28, 36], expected [36, 28]"),
        "{text}"
    );
    // Without a new head, a language model is no classifier.
    let config = config(&fixture("tiny-llama"));
    assert_eq!(config.prefix(), "model.");
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    DecoderClassifier::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(fixture("tiny-llama")).unwrap();
    let text = load_parameters(&mut parameters, &config, &mut checkpoint, None)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("missing (1):\n  - score.weight")
            && text.contains("unexpected (1):\n  - lm_head.weight"),
        "{text}"
    );
}
