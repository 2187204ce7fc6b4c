//! A step in bf16 beside the same in f32: how far loss and gradients are from each other, and that
//! weights, gradients and what is saved stay f32.

use std::path::Path;

use graft_models::{Checkpoint, Classifier, ModelConfig, ModelSource, load_parameters};
use graft_nn::{Forward, FreezePolicy, Parameters};
use graft_tensor::{DType, Memory};
use graft_tests::parity::loss_of_labels;
use graft_tests::{ENCODERS, batch, fixture, tensors};

/// Loss, and name, type and values of each gradient.
type Step = (f64, Vec<(String, DType, Vec<f64>)>);

fn step(dir: &Path, compute: DType) -> Step {
    let source = ModelSource::directory(dir).unwrap();
    let config = ModelConfig::load(&source).unwrap();
    let mut parameters = Parameters::new(&Memory::cpu(), DType::F32);
    let classifier = Classifier::new(&mut parameters, &config).unwrap();
    let mut checkpoint = Checkpoint::open(dir).unwrap();
    load_parameters(&mut parameters, &config, &mut checkpoint, None).unwrap();
    parameters.compute_in(compute).unwrap();
    let set = FreezePolicy::default().resolve(&parameters).unwrap();
    let (batch, labels) = batch(&tensors(&dir.join("expected.safetensors")));
    let mut f = Forward::train(&parameters, &set, 0, 0);
    let hidden = classifier.encoder().forward(&mut f, &batch).unwrap().0;
    assert_eq!(hidden.value().dtype(), compute, "activations");
    drop((hidden, f));
    let mut f = Forward::train(&parameters, &set, 0, 0);
    let logits = classifier.forward(&mut f, &batch).unwrap();
    assert_eq!(logits.value().dtype(), DType::F32, "logits");
    let (value, gradients) = loss_of_labels(f, &logits, &labels);
    let gradients = parameters
        .iter()
        .map(|(id, p)| {
            let gradient = gradients.get(id.key()).expect("everything is trained");
            let values = gradient.to_f64().unwrap();
            (p.name().to_owned(), gradient.dtype(), values)
        })
        .collect();
    (value, gradients)
}

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|x| x * x).sum::<f64>().sqrt()
}

/// bf16 has 8 bits: an activation is off by up to 2^-9 of its size after each of the about ten
/// operations of a layer, independently, so a gradient that went up and down two layers by about
/// 2^-9 · √40 = 1.2 %, and several times that where a sum cancels.
#[test]
fn a_step_in_bf16_is_near_one_in_f32() {
    for name in ENCODERS {
        let dir = fixture(name);
        let (exact_loss, exact) = step(&dir, DType::F32);
        let (loss, found) = step(&dir, DType::Bf16);
        assert!(
            (loss - exact_loss).abs() < 0.02 * exact_loss,
            "{name}: {loss}, in f32 {exact_loss}"
        );
        assert_ne!(loss, exact_loss, "{name} was not computed in bf16");
        let all = |step: &[(String, DType, Vec<f64>)]| -> Vec<f64> {
            step.iter().flat_map(|(_, _, x)| x.clone()).collect()
        };
        let (a, b) = (all(&found), all(&exact));
        let distance = norm(a.iter().zip(&b).map(|(a, b)| a - b));
        let size = norm(b.iter().copied());
        println!(
            "{name}: loss off by {:.2e}, all gradients by {:.2e} of their norm",
            (loss - exact_loss).abs() / exact_loss,
            distance / size
        );
        assert!(distance < 0.04 * size, "{name}: {:e}", distance / size);
        for ((label, dtype, x), (_, _, want)) in found.iter().zip(&exact) {
            assert_eq!(*dtype, DType::F32, "{name} {label}");
            let distance = norm(x.iter().zip(want).map(|(a, b)| a - b));
            // A bias of the keys has no gradient but rounding noise: it is small beside the whole.
            let limit = 0.12 * norm(want.iter().copied()) + 2e-3 * size;
            assert!(distance < limit, "{name} {label}: {distance:e} > {limit:e}");
        }
    }
}

/// The same seed gives the same bits in bf16, too.
#[test]
fn a_step_in_bf16_repeats() {
    let dir = fixture("tiny-bert");
    let pool = |threads| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
    };
    let one = pool(1).install(|| step(&dir, DType::Bf16));
    assert!(one == pool(3).install(|| step(&dir, DType::Bf16)));
}
