//! Encoders that fill in tokens against PyTorch and transformers: logits, loss, every gradient and ten AdamW steps of each
//! family; and what a checkpoint may lack. `tests/fixtures/README.md` says what the files hold.

use std::collections::HashMap;
use std::path::Path;

use graft_autograd::Gradients;
use graft_models::{
    Checkpoint, Classifier, Error, LoadReport, MaskedConfig, MaskedLm, ModelConfig, ModelSource,
    Strategy, TokenBatch, load_parameters, save_parameters,
};
use graft_nn::{Forward, FreezePolicy, Parameters, TrainableSet};
use graft_tensor::{DType, Memory, Tensor};
use graft_tests::parity::{assert_gradients, loss_of_tokens, losses_of_adamw};
use graft_tests::{ENCODERS, fixture, json, max_distance, numbers, tensors};

fn config(dir: &Path) -> MaskedConfig {
    MaskedConfig(ModelConfig::load(&ModelSource::directory(dir).unwrap()).unwrap())
}

fn load(dir: &Path, dtype: DType, seed: Option<u64>) -> (Parameters, MaskedLm, LoadReport) {
    let config = config(dir);
    let mut parameters = Parameters::new(&Memory::cpu(), dtype);
    let lm = MaskedLm::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(dir).unwrap();
    let report = load_parameters(&mut parameters, &config, &mut checkpoint, seed).unwrap();
    (parameters, lm, report)
}

fn masked(family: &str) -> std::path::PathBuf {
    fixture(&format!("{family}-masked"))
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

/// The mean loss over the supervised tokens, and its gradients.
fn step(
    parameters: &Parameters,
    lm: &MaskedLm,
    set: &TrainableSet,
    (batch, targets): &(TokenBatch, Vec<i64>),
) -> (f64, Gradients) {
    let mut f = Forward::train(parameters, set, 0, 0);
    let sum = lm.loss(&mut f, batch, targets).unwrap();
    loss_of_tokens(f, &sum, targets)
}

#[test]
fn logits_loss_and_every_gradient_equal_those_of_transformers() {
    for family in ENCODERS {
        let dir = masked(family);
        let expected = tensors(&dir.join("expected.safetensors"));
        let written = json(&dir.join("expected.json"));
        let zero = written["zero_in_exact_arithmetic"].as_array().unwrap();
        let batch = batch(&expected);
        for (dtype, [off, tolerance]) in [(DType::F32, [1e-5, 1e-5]), (DType::F64, [1e-11, 1e-10])]
        {
            let (parameters, lm, report) = load(&dir, dtype, None);
            assert_eq!(report, LoadReport::default());
            let mut f = Forward::evaluate(&parameters);
            let logits = lm.forward(&mut f, &batch.0).unwrap();
            let logits = logits.value().to_f64().unwrap();
            let error = max_distance(&logits, &expected["logits64"].to_f64().unwrap());
            assert!(error < off, "{family} {dtype}: logits are off by {error:e}");
            let set = FreezePolicy::default().resolve(&parameters).unwrap();
            let (loss, gradients) = step(&parameters, &lm, &set, &batch);
            let error = (loss - written["loss64"].as_f64().unwrap()).abs();
            assert!(
                error < off,
                "{family} {dtype}: the loss is off by {error:e}"
            );
            assert_gradients(
                (family, dtype),
                &parameters,
                &gradients,
                &expected,
                tolerance,
                |name| zero.iter().any(|z| z == name),
            );
        }
    }
}

#[test]
fn ten_steps_of_adamw_have_the_losses_of_pytorch() {
    for family in ENCODERS {
        let dir = masked(family);
        let batch = batch(&tensors(&dir.join("expected.safetensors")));
        let adamw = &json(&dir.join("expected.json"))["adamw"];
        let (mut parameters, lm, _) = load(&dir, DType::F32, None);
        let set = FreezePolicy::default().resolve(&parameters).unwrap();
        let lr = adamw["lr"].as_f64().unwrap();
        let losses = losses_of_adamw(&mut parameters, &set, lr, |parameters| {
            step(parameters, &lm, &set, &batch)
        });
        let error = max_distance(&losses, &numbers(&adamw["losses64"]));
        assert!(error < 2e-5, "{family}: {error:e}");
    }
}

#[test]
fn strategies_train_the_head_and_the_last_layers() {
    for family in ENCODERS {
        let (parameters, lm, _) = load(&masked(family), DType::F32, None);
        let names = |strategy| -> Vec<String> {
            let set = lm.policy(strategy).unwrap().resolve(&parameters).unwrap();
            let name = |id| parameters.get(id).name().to_owned();
            set.ids().map(name).collect()
        };
        let head = names(Strategy::Head);
        // Transformation and norm, each with a bias, and the bias of the logits.
        assert_eq!(head.len(), 5, "{head:?}");
        assert!(head.iter().all(|name| !name.contains("embeddings")));
        let last = names(Strategy::Last(1));
        assert_eq!(last.len(), 5 + 16, "{last:?}");
        assert!(last[..16].iter().all(|name| name.contains("layer.1.")));
        assert_eq!(names(Strategy::Full).len(), parameters.len());
        assert!(matches!(
            lm.policy(Strategy::Last(3)),
            Err(Error::Strategy { last: 3, layers: 2 })
        ));
    }
}

#[test]
fn a_head_is_new_where_the_checkpoint_has_none_and_kept_where_it_has_one() {
    for family in ENCODERS {
        let dir = fixture(family);
        let (_, _, report) = load(&dir, DType::F32, Some(7));
        assert_eq!(report.initialised.len(), 5, "{report:?}");
        assert!(
            report.unused.iter().any(|name| name.contains("classifier")),
            "{report:?}"
        );
        let config = config(&dir);
        let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
        MaskedLm::new(&mut parameters, &config).unwrap();
        let mut checkpoint = Checkpoint::open(&dir).unwrap();
        let error = load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        let (_, _, report) = load(&masked(family), DType::F32, Some(7));
        assert_eq!(report, LoadReport::default());
    }
}

#[test]
fn a_classifier_grows_on_a_model_that_fills_in_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let (parameters, _, _) = load(&masked("tiny-bert"), DType::F32, None);
    save_parameters(&parameters, &dir.path().join("model.safetensors")).unwrap();
    let MaskedConfig(config) = config(&masked("tiny-bert"));
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    Classifier::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
    // It has no pooler: that is new, as the rest of the head is.
    let report = load_parameters(&mut parameters, &config, &mut checkpoint, Some(3)).unwrap();
    let new = [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ];
    assert_eq!(report.initialised, new);
    assert_eq!(report.unused.len(), 5);
    let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert!(load_parameters(&mut parameters, &config, &mut checkpoint, None).is_err());
}

#[test]
fn a_head_with_a_matrix_of_its_own_is_refused() {
    let mut config = config(&masked("tiny-bert"));
    config.0.raw["tie_word_embeddings"] = false.into();
    let mut parameters = Parameters::new(&Memory::planned(), DType::F32);
    let error = MaskedLm::new(&mut parameters, &config).unwrap_err();
    assert!(
        error.to_string().contains("`tie_word_embeddings`"),
        "{error}"
    );
}

/// Copies of the token embedding are read over; anything else in their place is refused.
#[test]
fn a_tied_matrix_with_numbers_of_its_own_is_refused() {
    use graft_models::safetensors::{TensorView, write};
    for (family, copy, words) in [
        ("tiny-bert", "cls.predictions.decoder.weight", "bert."),
        ("tiny-roberta", "lm_head.decoder.weight", "roberta."),
        ("tiny-distilbert", "vocab_projector.weight", "distilbert."),
    ] {
        let dir = masked(family);
        let words = format!("{words}embeddings.word_embeddings.weight");
        let stored = tensors(&dir.join("model.safetensors"));
        for same in [true, false] {
            let mut list: Vec<_> = stored
                .iter()
                .map(|(name, value)| (name.clone(), value, value.to_bytes().unwrap()))
                .collect();
            let mut data = stored[&words].to_bytes().unwrap();
            if !same {
                data[0] ^= 1;
            }
            list.push((copy.to_owned(), &stored[&words], data));
            let out = tempfile::tempdir().unwrap();
            let views = list.iter().map(|(name, value, data)| TensorView {
                name,
                dtype: value.dtype(),
                shape: value.shape(),
                data,
            });
            let path = out.path().join("model.safetensors");
            write(&path, &Default::default(), views).unwrap();
            let config = config(&dir);
            let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
            MaskedLm::new(&mut parameters, &config).unwrap();
            let mut checkpoint = Checkpoint::open(out.path()).unwrap();
            let report = load_parameters(&mut parameters, &config, &mut checkpoint, None);
            if same {
                assert_eq!(report.unwrap().unused, [copy]);
            } else {
                let text = report.unwrap_err().to_string();
                let expected = format!("`{copy}` holds other numbers than `{words}`");
                assert!(text.contains(&expected), "{text}");
            }
        }
    }
}
