//! Against PyTorch and transformers: logits, loss, every gradient and ten AdamW steps of each
//! family, and of the real MiniLM. `tests/fixtures/README.md` says what the files hold.
//!
//! Tolerances: PyTorch's own f32 run of these models is off its f64 run by up to 8.2e-7 in the
//! logits, 2.1e-6 relative in a gradient (1e-5 for MiniLM) and 4.2e-6 in a weight after ten steps.

use std::collections::HashMap;
use std::path::Path;

use graft_autograd::Gradients;
use graft_models::{Checkpoint, Classifier, Labels, ModelConfig, ModelSource, TokenBatch};
use graft_models::{ProblemType, load_parameters};
use graft_nn::optimizer::Rule;
use graft_nn::{Forward, FreezePolicy, Optimizer, Parameters, TrainableSet};
use graft_tensor::{DType, Memory, Tensor};
use graft_tests::parity::{assert_gradients, is_noise, loss_of_labels};
use graft_tests::{ENCODERS, batch, fixture, json, max_distance, minilm_wheel, numbers, tensors};
use serde_json::Value;

struct Model {
    config: ModelConfig,
    parameters: Parameters,
    classifier: Classifier,
}

fn load(dir: &Path, dtype: DType) -> Model {
    let source = ModelSource::directory(dir).unwrap();
    let config = ModelConfig::load(&source).unwrap();
    let mut parameters = Parameters::new(&Memory::cpu(), dtype);
    let classifier = Classifier::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(dir).unwrap();
    let report = load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
    assert_eq!(report, Default::default());
    Model {
        config,
        parameters,
        classifier,
    }
}

impl Model {
    fn logits(&self, batch: &TokenBatch) -> Vec<f64> {
        let mut f = Forward::evaluate(&self.parameters);
        let logits = self.classifier.forward(&mut f, batch).unwrap();
        logits.value().to_f64().unwrap()
    }

    fn step(&self, set: &TrainableSet, batch: &TokenBatch, labels: &[i64]) -> (f64, Gradients) {
        let mut f = Forward::train(&self.parameters, set, 0, 0);
        let logits = self.classifier.forward(&mut f, batch).unwrap();
        loss_of_labels(f, &logits, labels)
    }

    /// Ten AdamW steps on one batch; the loss and the gradient norm before each.
    fn train(
        &mut self,
        batch: &TokenBatch,
        labels: &[i64],
        adamw: &Value,
        decay_vectors: bool,
        max_norm: Option<f64>,
    ) -> (Vec<f64>, Vec<f64>) {
        let set = FreezePolicy::default().resolve(&self.parameters).unwrap();
        let decay = adamw["weight_decay"].as_f64().unwrap();
        let lr = adamw["lr"].as_f64().unwrap();
        let mut optimizer = Optimizer::new(Rule::adamw(), decay, decay_vectors).unwrap();
        (0..10)
            .map(|_| {
                let (loss, mut gradients) = self.step(&set, batch, labels);
                let step = optimizer
                    .step(&mut self.parameters, &set, &mut gradients, lr, max_norm)
                    .unwrap();
                (loss, step.gradient_norm)
            })
            .unzip()
    }
}

#[test]
fn logits_equal_those_of_transformers() {
    for name in ENCODERS {
        let dir = fixture(name);
        let tensors = tensors(&dir.join("expected.safetensors"));
        let (batch, _) = batch(&tensors);
        let exact = tensors["logits64"].to_f64().unwrap();
        let error = max_distance(&load(&dir, DType::F32).logits(&batch), &exact);
        assert!(error < 3e-6, "{name}: logits are off by {error:e}");
        let error = max_distance(&load(&dir, DType::F64).logits(&batch), &exact);
        assert!(error < 1e-12, "{name} in f64: logits are off by {error:e}");
    }
}

#[test]
fn both_spellings_of_a_config_are_one_model() {
    for name in ENCODERS {
        let dir = fixture(name);
        let read = |file: &str| {
            let text = std::fs::read(dir.join(file)).unwrap();
            let config = ModelConfig::parse(file, &text).unwrap();
            ModelConfig {
                raw: Default::default(),
                ..config
            }
        };
        let (five, four) = (read("config.json"), read("config.v4.json"));
        assert_eq!(format!("{five:?}"), format!("{four:?}"), "{name}");
    }
}

#[test]
fn loss_and_every_gradient_equal_those_of_pytorch() {
    for name in ENCODERS {
        let dir = fixture(name);
        let tensors = tensors(&dir.join("expected.safetensors"));
        let expected = json(&dir.join("expected.json"));
        let (batch, labels) = batch(&tensors);
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-11)] {
            let model = load(&dir, dtype);
            let set = FreezePolicy::default().resolve(&model.parameters).unwrap();
            let (loss, gradients) = model.step(&set, &batch, &labels);
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
                |name| is_noise(&expected, name),
            );
        }
    }
}

#[test]
fn ten_adamw_steps_equal_those_of_pytorch() {
    for name in ENCODERS {
        let dir = fixture(name);
        let tensors = tensors(&dir.join("expected.safetensors"));
        let expected = json(&dir.join("expected.json"));
        let (batch, labels) = batch(&tensors);
        let adamw = &expected["adamw"];
        let mut model = load(&dir, DType::F32);
        let (losses, norms) = model.train(&batch, &labels, adamw, true, None);
        let error = max_distance(&losses, &numbers(&adamw["losses64"]));
        assert!(error < 1e-5, "{name}: losses are off by {error:e}");
        let error = max_distance(&norms, &numbers(&adamw["grad_norms"]));
        assert!(error < 2e-4, "{name}: norms are off by {error:e}");
        for (id, parameter) in model.parameters.iter() {
            if is_noise(&expected, parameter.name()) {
                continue;
            }
            let found = model.parameters.value(id).unwrap().to_f64().unwrap();
            let exact = tensors[&format!("step10.{}", parameter.name())]
                .to_f64()
                .unwrap();
            let error = max_distance(&found, &exact);
            assert!(error < 2e-5, "{name} {}: {error:e}", parameter.name());
        }
    }
}

#[test]
fn clipping_and_undecayed_vectors_equal_those_of_pytorch() {
    for name in ENCODERS {
        let dir = fixture(name);
        let expected = json(&dir.join("expected.json"));
        let (batch, labels) = batch(&tensors(&dir.join("expected.safetensors")));
        let clipped = &expected["clipped"];
        let max_norm = clipped["max_norm"].as_f64();
        let mut model = load(&dir, DType::F32);
        // What PyTorch's second group leaves undecayed is what has one dimension.
        let spared: Vec<&str> = clipped["no_weight_decay"]
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_str().unwrap())
            .collect();
        for (_, p) in model.parameters.iter() {
            assert_eq!(
                p.shape().rank() == 1,
                spared.contains(&p.name()),
                "{}",
                p.name()
            );
        }
        let (losses, norms) = model.train(&batch, &labels, &expected["adamw"], false, max_norm);
        let error = max_distance(&losses, &numbers(&clipped["losses64"]));
        assert!(error < 1e-5, "{name}: losses are off by {error:e}");
        let error = max_distance(&norms, &numbers(&clipped["grad_norms"]));
        assert!(error < 2e-4, "{name}: norms are off by {error:e}");
    }
}

/// The real MiniLM from its wheel, with the head of the fixture.
fn minilm(head: &HashMap<String, Tensor>) -> Model {
    let source = ModelSource::resolve(minilm_wheel().to_str().unwrap()).unwrap();
    let mut config = ModelConfig::load(&source).unwrap();
    config.set_classification(Labels::numbered(4), ProblemType::SingleLabel);
    config.dropout.hidden = 0.0;
    config.dropout.attention = 0.0;
    config.dropout.classifier = 0.0;
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    let classifier = Classifier::new(&mut parameters, &config).unwrap();
    let mut checkpoint = source.checkpoint().unwrap();
    let report = load_parameters(&mut parameters, &config, &mut checkpoint, Some(0)).unwrap();
    assert_eq!(report.unused, ["embeddings.position_ids"]);
    assert_eq!(report.initialised, ["classifier.weight", "classifier.bias"]);
    for (name, value) in head {
        let id = parameters.find(name).unwrap();
        parameters.set(id, value.clone()).unwrap();
    }
    Model {
        config,
        parameters,
        classifier,
    }
}

/// Norm and sampled elements of a tensor, as the fixture holds them.
fn digest(values: &[f64], index: &[i64]) -> (f64, Vec<f64>) {
    let norm = values.iter().map(|x| x * x).sum::<f64>().sqrt();
    (norm, index.iter().map(|&i| values[i as usize]).collect())
}

#[test]
fn the_real_minilm_equals_transformers() {
    let dir = fixture("minilm");
    let stored = tensors(&dir.join("expected.safetensors"));
    let expected = json(&dir.join("expected.json"));
    let mut model = minilm(&tensors(&dir.join("head.safetensors")));
    assert_eq!(model.config.num_labels(), 4);
    let (batch, labels) = batch(&stored);
    let error = max_distance(&model.logits(&batch), &stored["logits64"].to_f64().unwrap());
    assert!(error < 1e-6, "logits are off by {error:e}");

    let index = stored["sample_index"].to_vec::<i64>().unwrap();
    let rows = expected["parameters"].as_array().unwrap();
    let table = |name: &str| stored[name].to_f64().unwrap();
    let (norms, samples) = (table("grad64.norm"), table("grad64.sample"));
    let set = FreezePolicy::default().resolve(&model.parameters).unwrap();
    let (loss, gradients) = model.step(&set, &batch, &labels);
    assert!((loss - expected["loss64"].as_f64().unwrap()).abs() < 1e-6);
    assert_eq!(rows.len(), model.parameters.len());
    for (row, parameter) in rows.iter().enumerate() {
        let name = parameter["name"].as_str().unwrap();
        let id = model.parameters.find(name).unwrap();
        let gradient = gradients.get(id.key()).unwrap().to_f64().unwrap();
        let at = 16 * row..16 * row + 16;
        let (norm, sample) = digest(&gradient, &index[at.clone()]);
        let scale = if is_noise(&expected, name) {
            1.0
        } else {
            norms[row]
        };
        let error = (norm - norms[row]).abs() / scale;
        assert!(
            error < 2e-5,
            "{name}: the gradient's norm is off by {error:e}"
        );
        let error = max_distance(&sample, &samples[at]) / scale;
        assert!(error < 2e-5, "{name}: the gradient is off by {error:e}");
    }

    let (losses, _) = model.train(&batch, &labels, &expected["adamw"], true, None);
    let error = max_distance(&losses, &numbers(&expected["adamw"]["losses64"]));
    assert!(error < 1e-5, "losses are off by {error:e}");
    let samples = table("step10.sample");
    for (row, parameter) in rows.iter().enumerate() {
        let name = parameter["name"].as_str().unwrap();
        let id = model.parameters.find(name).unwrap();
        let weights = model.parameters.value(id).unwrap().to_f64().unwrap();
        let at = 16 * row..16 * row + 16;
        let (_, sample) = digest(&weights, &index[at.clone()]);
        let error = max_distance(&sample, &samples[at]);
        assert!(
            error < 2e-5,
            "{name}: weights are off by {error:e} after ten steps"
        );
    }
}
