//! Adapters against PEFT: those that it saved give its logits here, apart and merged, and what is written here reads as
//! the same adapter. `tests/peers/check_adapters.py` lets PEFT load what `GRAFT_ADAPTERS` has made this test keep.

use std::path::{Path, PathBuf};

use graft_models::{
    Adaptable, CausalLm, Classifier, Config, DecoderClassifier, ModelSource, StoredAdapter,
    TokenBatch, load_adapter, load_parameters, save_adapter,
};
use graft_nn::adapters::{self, Bias, DEFAULT, Method};
use graft_nn::{Forward, Parameters};
use graft_tensor::{DType, Memory, Tensor};
use graft_tests::{fixture, max_distance, tensors};

/// The adapter of a case and the model that it was trained on.
fn cases() -> Vec<(String, PathBuf, PathBuf)> {
    let mut cases: Vec<_> = std::fs::read_dir(fixture("adapters"))
        .unwrap()
        .map(|entry| {
            let dir = entry.unwrap().path();
            let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
            let source = ModelSource::directory(&dir).unwrap();
            let base = StoredAdapter::load(&source).unwrap().base.unwrap();
            let base = fixture(Path::new(&base).file_name().unwrap().to_str().unwrap());
            (name, dir, base)
        })
        .collect();
    cases.sort();
    cases
}

enum Network {
    Classifier(Box<Classifier>),
    Causal(Box<CausalLm>),
    Decoder(Box<DecoderClassifier>),
}

struct Model {
    config: Config,
    parameters: Parameters,
    network: Network,
}

fn load(dir: &Path, dtype: DType) -> Model {
    let source = ModelSource::directory(dir).unwrap();
    let config = Config::load(&source).unwrap();
    let mut parameters = Parameters::new(&Memory::cpu(), dtype);
    let mut checkpoint = source.checkpoint().unwrap();
    let p = &mut parameters;
    let network = match &config {
        Config::Encoder(config) => {
            let network = Classifier::new(p, config).unwrap();
            load_parameters(p, config.as_ref(), &mut checkpoint, None).unwrap();
            Network::Classifier(Box::new(network))
        }
        Config::Decoder(config) => {
            let classifies = checkpoint.get("score.weight").is_some();
            let network = match classifies {
                true => Network::Decoder(Box::new(DecoderClassifier::new(p, config).unwrap())),
                false => Network::Causal(Box::new(CausalLm::new(p, config).unwrap())),
            };
            load_parameters(p, config.as_ref(), &mut checkpoint, None).unwrap();
            network
        }
    };
    Model {
        config,
        parameters,
        network,
    }
}

impl Model {
    fn logits(&self, batch: &TokenBatch) -> Vec<f64> {
        let mut f = Forward::evaluate(&self.parameters);
        let logits = match &self.network {
            Network::Classifier(network) => network.forward(&mut f, batch),
            Network::Causal(network) => network.forward(&mut f, batch),
            Network::Decoder(network) => network.forward(&mut f, batch),
        };
        logits.unwrap().value().to_f64().unwrap()
    }

    fn adapt(&mut self, dir: &Path, name: &str) -> graft_models::Result<StoredAdapter> {
        let p = &mut self.parameters;
        match &self.config {
            Config::Encoder(config) => load_adapter(p, config.as_ref(), name, dir),
            Config::Decoder(config) => load_adapter(p, config.as_ref(), name, dir),
        }
    }

    fn save(&self, base: &str, dir: &Path) {
        fn save(p: &Parameters, config: &impl Adaptable, base: &str, dir: &Path) {
            save_adapter(p, config, base, dir).unwrap();
        }
        match &self.config {
            Config::Encoder(config) => save(&self.parameters, config.as_ref(), base, dir),
            Config::Decoder(config) => save(&self.parameters, config.as_ref(), base, dir),
        }
    }
}

/// The batch that the fixture's logits are of: its longest sequence fills the positions, so `front` virtual tokens take
/// the place of its last ones.
fn batch(base: &Path, front: usize) -> TokenBatch {
    let stored = tensors(&base.join("expected.safetensors"));
    let integers = |name: &str| stored[name].to_vec::<i64>().unwrap();
    let ids = integers("input_ids");
    let type_ids = match stored.contains_key("token_type_ids") {
        true => integers("token_type_ids"),
        false => vec![0; ids.len()],
    };
    let offsets = integers("offsets");
    let longest = offsets.windows(2).map(|pair| pair[1] - pair[0]).max();
    let room = longest.unwrap() - front as i64;
    let mut batch = TokenBatch::new();
    for pair in offsets.windows(2) {
        let kept = pair[0] as usize..pair[1].min(pair[0] + room) as usize;
        batch.ids.extend(&ids[kept.clone()]);
        batch.type_ids.extend(&type_ids[kept]);
        batch.offsets.push(batch.ids.len() as i64);
    }
    batch
}

/// Virtual tokens of an adapter.
fn front(dir: &Path) -> usize {
    let source = ModelSource::directory(dir).unwrap();
    let stored = StoredAdapter::load(&source).unwrap();
    stored.config.method.virtual_tokens()
}

fn exact(dir: &Path) -> Vec<f64> {
    tensors(&dir.join("expected.safetensors"))["logits64"]
        .to_f64()
        .unwrap()
}

/// Every family and method; alpha is not the rank in any.
#[test]
fn adapters_of_peft_give_its_logits() {
    let cases = cases();
    assert_eq!(cases.len(), 33);
    for (name, dir, base) in cases {
        let batch = batch(&base, front(&dir));
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-7)] {
            let mut model = load(&base, dtype);
            let plain = model.logits(&batch);
            model.adapt(&dir, DEFAULT).unwrap();
            let apart = model.logits(&batch);
            let error = max_distance(&apart, &exact(&dir));
            assert!(error < tolerance, "{name} in {dtype}: off by {error:e}");
            assert!(
                max_distance(&apart, &plain) > 0.1,
                "{name} changes the base"
            );
            model.parameters.adapters_mut().activate(None).unwrap();
            assert_eq!(model.logits(&batch), plain, "{name}: the base is as it was");
        }
    }
}

#[test]
fn merged_adapters_give_the_logits_of_unmerged_ones() {
    for (name, dir, base) in cases() {
        let mut model = load(&base, DType::F32);
        let stored = model.adapt(&dir, DEFAULT).unwrap();
        let batch = batch(&base, front(&dir));
        let apart = model.logits(&batch);
        let merged = adapters::merge(&mut model.parameters);
        if stored.config.method.unmergeable().is_some() {
            let error = merged.unwrap_err().to_string();
            assert!(error.contains("cannot be merged"), "{name}: {error}");
            assert_eq!(model.logits(&batch), apart, "{name} is as it was");
            continue;
        }
        merged.unwrap();
        let error = max_distance(&model.logits(&batch), &apart);
        // GPT-2's embedding is its head too: what an adapter adds to the one is then added to the other.
        let tied = ["gpt2-lora", "gemma3-words"].contains(&name.as_str());
        assert_eq!(error > 1e-5, tied, "{name}: off by {error:e}");
    }
}

/// Written, read, and written again: the same bytes, and the same logits as the adapter that PEFT wrote.
#[test]
fn what_is_written_reads_as_the_same_adapter() {
    let temporary = tempfile::tempdir().unwrap();
    let out = std::env::var_os("GRAFT_ADAPTERS").map_or(temporary.path().into(), PathBuf::from);
    for (name, dir, base) in cases() {
        let mut model = load(&base, DType::F32);
        let original = model.adapt(&dir, DEFAULT).unwrap();
        let batch = batch(&base, front(&dir));
        let logits = model.logits(&batch);
        let written = out.join(&name);
        std::fs::create_dir_all(&written).unwrap();
        model.save(base.to_str().unwrap(), &written);
        let mut again = load(&base, DType::F32);
        let stored = again.adapt(&written, DEFAULT).unwrap();
        assert_eq!(again.logits(&batch), logits, "{name}");
        assert_eq!(stored.config.method, original.config.method, "{name}");
        assert_eq!(stored.task_type, original.task_type, "{name}");
        let twice = temporary.path().join("twice");
        std::fs::create_dir_all(&twice).unwrap();
        again.save(base.to_str().unwrap(), &twice);
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert!(read(&written) == read(&twice), "{name}: {file}");
        }
        // The names and the bytes of PEFT's own file, but for copies of what is not trained.
        let (ours, theirs) = (
            tensors(&written.join("adapter_model.safetensors")),
            tensors(&dir.join("adapter_model.safetensors")),
        );
        for (key, value) in &ours {
            let same = theirs.get(key).map(|t| t.to_f64().unwrap());
            assert_eq!(same, Some(value.to_f64().unwrap()), "{name}: {key}");
        }
        for key in theirs.keys().filter(|key| !ours.contains_key(*key)) {
            let copied = [
                ".original_module.",
                ".modules_to_save.",
                ".base_layer.weight",
            ];
            let copied = copied.iter().any(|part| key.contains(part));
            assert!(copied, "{name}: {key} was not written");
        }
        let values = logits.iter().map(|&x| x as f32).collect();
        let values: Tensor = Tensor::from_vec(&Memory::cpu(), values, &[logits.len()]).unwrap();
        let bytes = values.to_bytes().unwrap();
        let shape = [logits.len()];
        let view = ("logits", DType::F32, &shape[..], &bytes[..]);
        graft_models::safetensors::write(
            written.join("ours.safetensors"),
            &Default::default(),
            [view],
        )
        .unwrap();
    }
}

/// Several adapters, each with its head, beside one base: each as if it were alone.
#[test]
fn adapters_beside_one_base_are_told_apart_by_name() {
    let base = fixture("tiny-bert");
    let batch = batch(&base, 0);
    let mut model = load(&base, DType::F32);
    let names = ["bert-lora", "bert-dora", "bert-words"];
    for name in names {
        model.adapt(&fixture("adapters").join(name), name).unwrap();
    }
    for name in names {
        model
            .parameters
            .adapters_mut()
            .activate(Some(name))
            .unwrap();
        let error = max_distance(
            &model.logits(&batch),
            &exact(&fixture("adapters").join(name)),
        );
        assert!(error < 1e-5, "{name}: off by {error:e}");
    }
    let error = model.adapt(&fixture("adapters/bert-lora"), "bert-lora");
    let error = error.unwrap_err().to_string();
    assert!(
        error.starts_with("two adapters are called bert-lora"),
        "{error}"
    );
}

#[test]
fn adapters_of_other_models_are_refused_by_name() {
    let said = |adapter: &str, base: &str| {
        let mut model = load(&fixture(base), DType::F32);
        let dir = fixture("adapters").join(adapter);
        model.adapt(&dir, DEFAULT).unwrap_err().to_string()
    };
    let error = said("bert-lora", "tiny-llama");
    assert!(
        error.starts_with("no layer's name ends in the target"),
        "{error}"
    );
    let error = said("qwen2-dora", "tiny-llama");
    assert!(error.contains("does not fit its configuration"), "{error}");
    let error = said("llama-rslora", "tiny-mistral");
    assert!(error.contains("wrong shape or type"), "{error}");
}

/// A file that lacks a matrix, has one too many, or has another shape, is refused with the tensor's name.
#[test]
fn every_tensor_of_a_file_is_accounted_for() {
    let from = fixture("adapters/bert-lora");
    let all = tensors(&from.join("adapter_model.safetensors"));
    let query = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight";
    let dir = tempfile::tempdir().unwrap();
    let config = std::fs::read(from.join("adapter_config.json")).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    let refused = |change: &dyn Fn(&mut std::collections::HashMap<String, Tensor>)| {
        let mut tensors = all.clone();
        change(&mut tensors);
        let data: Vec<_> = tensors
            .iter()
            .map(|(name, t)| (name, t.dtype(), *t.shape(), t.to_bytes().unwrap()))
            .collect();
        let views = data
            .iter()
            .map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, &shape[..], &bytes[..]));
        let path = dir.path().join("adapter_model.safetensors");
        graft_models::safetensors::write(path, &Default::default(), views).unwrap();
        let mut model = load(&fixture("tiny-bert"), DType::F32);
        model.adapt(dir.path(), DEFAULT).unwrap_err().to_string()
    };
    let lacking = refused(&|t| {
        t.remove(query);
    });
    assert!(
        lacking.contains("missing") && lacking.contains("query.lora_A.default"),
        "{lacking}"
    );
    let headless = refused(&|t| {
        t.remove("base_model.model.classifier.bias");
    });
    assert!(
        headless.contains("missing") && headless.contains("classifier.bias"),
        "{headless}"
    );
    let extra = refused(&|t| {
        let key = query.replace("query", "key");
        t.insert(key, all[query].clone());
    });
    assert!(
        extra.contains("unexpected") && extra.contains("key.lora_A"),
        "{extra}"
    );
    let thin = refused(&|t| {
        let narrow = all[query].narrow(0, 0, 2).unwrap();
        t.insert(
            query.into(),
            narrow.contiguous(&Memory::cpu()).unwrap().into_owned(),
        );
    });
    assert!(
        thin.contains("wrong shape") && thin.contains("[2, 32]"),
        "{thin}"
    );
}

#[test]
fn what_peft_says_of_an_adapter_is_read() {
    let load = |name: &str| {
        let source = ModelSource::directory(fixture("adapters").join(name)).unwrap();
        StoredAdapter::load(&source).unwrap()
    };
    let stored = load("roberta-rslora");
    assert_eq!(stored.config.bias, Bias::All);
    assert_eq!(stored.base.as_deref(), Some("tests/fixtures/tiny-roberta"));
    assert_eq!(stored.task_type.as_deref(), Some("SEQ_CLS"));
    let Method::LowRank(lora) = &stored.config.method else {
        panic!("{stored:?}");
    };
    assert_eq!(
        (lora.rank, lora.alpha, lora.rank_stabilised),
        (4, 3.0, true)
    );
    assert_eq!(lora.dropout, 0.1);
    assert_eq!(load("llama-rslora").config.layers, Some(vec![1]));
    assert_eq!(
        load("bert-words").config.exclude,
        ["layer.0.attention.self.query"]
    );
}
