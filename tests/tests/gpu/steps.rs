//! Steps of small models: the CPU's results, what they cost, and that a plan counts that.

use graft_kernels::cuda::Asked;
use graft_nn::optimizer::Rule;
use graft_nn::{Error, Optimizer};
use graft_tensor::{Category, DType, Device, Memory, Tensor};

use crate::model::{Trained, gpu, load};

const MODELS: [&str; 3] = ["tiny-bert", "tiny-gpt2", "tiny-llama"];
const SETS: [Trained; 3] = [Trained::Full, Trained::Last, Trained::Lora];

fn adamw() -> Optimizer {
    Optimizer::new(Rule::adamw(), 0.01, true).unwrap()
}

/// Loss, every gradient, and the loss after two updates; what is frozen keeps its bits.
#[test]
#[ignore = "needs a GPU"]
fn steps_of_every_kind_equal_those_of_the_cpu() {
    for name in MODELS {
        for trained in SETS {
            let run = |memory: &Memory| {
                let mut model = load(name, memory, DType::F32, trained);
                let bytes = |model: &crate::model::Model| -> Vec<Vec<u8>> {
                    let frozen = |id| !model.set.contains(id);
                    let ids = model.parameters.iter().map(|(id, _)| id);
                    ids.filter(|&id| frozen(id))
                        .map(|id| model.parameters.value(id).unwrap().to_bytes().unwrap())
                        .collect()
                };
                let before = bytes(&model);
                let mut optimizer = adamw();
                let losses = [0, 1, 2].map(|step| {
                    let (loss, gradients) = model.gradients(step);
                    let gradients: Vec<(usize, Vec<f64>)> = gradients
                        .iter()
                        .map(|(key, gradient)| (key, gradient.to_f64().unwrap()))
                        .collect();
                    model.step(&mut optimizer, 1e-3, step);
                    (loss, gradients)
                });
                assert!(before == bytes(&model), "{name} {trained:?}: frozen bits");
                losses
            };
            let (here, there) = (run(&Memory::cpu()), run(&gpu()));
            for (step, (here, there)) in here.iter().zip(&there).enumerate() {
                let what = format!("{name} {trained:?} step {step}");
                let apart = (here.0 - there.0).abs();
                assert!(apart < 2e-5, "{what}: losses {apart:e} apart");
                let size = |all: &[(usize, Vec<f64>)]| -> f64 {
                    let squares = all.iter().flat_map(|(_, g)| g).map(|x| x * x);
                    squares.sum::<f64>().sqrt()
                };
                assert_eq!(here.1.len(), there.1.len(), "{what}");
                let size = size(&here.1);
                for ((key, here), (other, there)) in here.1.iter().zip(&there.1) {
                    assert_eq!(key, other, "{what}");
                    let apart = graft_tests::max_distance(here, there) / size;
                    assert!(apart < 1e-5, "{what}: gradient {key} is {apart:e} apart");
                }
            }
        }
    }
}

/// Once a step is like the last one, nothing is allocated, and weights are not rounded. The machine reads the loss and
/// the norm alone. What it sends: ids, positions and the like, with rotary positions their sines and cosines; the numbers of
/// the step. Where tensors lie is not among them: they lie where they lay in the step before. Nor is anything of what the
/// ids make of the gradient of gathered rows.
#[test]
#[ignore = "needs a GPU"]
fn a_steady_step_allocates_nothing_and_reads_twice() {
    for (name, compute, trained, inputs) in [
        // Ids, types, positions, offsets, labels.
        ("tiny-bert", DType::F32, Trained::Full, 5),
        ("tiny-bert", DType::Bf16, Trained::Full, 5),
        // Ids, positions, offsets, what has a target, targets.
        ("tiny-gpt2", DType::Bf16, Trained::Full, 5),
        // The same and two tables of angles.
        ("tiny-llama", DType::Bf16, Trained::Lora, 7),
    ] {
        let memory = gpu();
        let device = memory.opened_gpu().unwrap();
        let mut model = load(name, &memory, compute, trained);
        let mut optimizer = adamw();
        for step in 0..4 {
            model.step(&mut optimizer, 1e-3, step);
        }
        let (_, asked) = device.recorded(|| model.step(&mut optimizer, 1e-3, 4));
        let sizes = |wanted: fn(&Asked) -> Option<usize>| -> Vec<usize> {
            asked.iter().filter_map(wanted).collect()
        };
        let what = format!("{name} {compute} {trained:?}");
        let allocated = sizes(|asked| match asked {
            Asked::Allocate(bytes) => Some(*bytes),
            _ => None,
        });
        assert!(allocated.is_empty(), "{what}: {allocated:?} were allocated");
        let downloads = sizes(|asked| match asked {
            Asked::Download(bytes) | Asked::Readback(bytes) => Some(*bytes),
            _ => None,
        });
        assert_eq!(
            downloads,
            [4, 16],
            "{what}: the loss, and the gradients' norm"
        );
        let sent = sizes(|asked| match asked {
            Asked::Upload(bytes) => Some(*bytes),
            _ => None,
        });
        assert_eq!(sent.len(), inputs + 1, "{what}: {sent:?}");
        let rounded = asked
            .iter()
            .filter(|asked| matches!(asked, Asked::Launch("gemm_pack_f32_bf16")))
            .count();
        assert_eq!(rounded, 0, "{what}: weights are rounded when they change");
    }
}

/// Steps were sent behind one whose gradients are no numbers: it is that one which is refused when it is settled, with the
/// first parameter and its number, and its neighbours are not.
#[test]
#[ignore = "needs a GPU"]
fn a_step_without_numbers_is_named_when_it_is_settled() {
    let memory = gpu();
    let mut model = load("tiny-bert", &memory, DType::F32, Trained::Full);
    let mut optimizer = adamw();
    let id = model.parameters.find("classifier.bias").unwrap();
    let whole = model.parameters.value(id).unwrap().copy(&memory).unwrap();
    let broken = Tensor::full(&memory, DType::F32, whole.shape(), f64::NAN).unwrap();
    let before = model.send(&mut optimizer, 1e-3, 0);
    model.parameters.set(id, broken).unwrap();
    let (_, within) = model.send(&mut optimizer, 1e-3, 1);
    model.parameters.set(id, whole).unwrap();
    let behind = model.send(&mut optimizer, 1e-3, 2);
    let finite = |(loss, norm): (f64, f64)| loss.is_finite() && norm > 0.0 && norm.is_finite();
    assert!(finite(model.settle(&mut optimizer, before)));
    let (p, set) = (&model.parameters, &model.set);
    let error = optimizer.settle(p, set, within).unwrap_err();
    let first = p.get(set.ids().next().unwrap()).name().to_owned();
    assert!(
        matches!(&error, Error::NonFiniteGradient { name, step: 2 } if *name == first),
        "{error}"
    );
    assert!(finite(model.settle(&mut optimizer, behind)));
    assert_eq!(optimizer.step_count(), 2);
    let logits = model.logits();
    assert!(logits.iter().all(|x| x.is_finite()), "nothing was updated");
}

/// A plan has the bytes of every category, at the worst moment and after the steps.
#[test]
#[ignore = "needs a GPU"]
fn a_plan_is_what_steps_take() {
    for name in MODELS {
        for trained in SETS {
            for compute in [DType::F32, DType::Bf16] {
                if compute == DType::F32 && trained != Trained::Full {
                    continue; // what is trained decides nothing about types
                }
                let run = |memory: &Memory| {
                    let mut model = load(name, memory, compute, trained);
                    memory.reset_peak();
                    let mut optimizer = adamw();
                    for step in 0..2 {
                        model.step(&mut optimizer, 1e-3, step);
                    }
                    memory.usage()
                };
                let (plan, real) = (run(&Memory::planned_for(Device::Cuda(0))), run(&gpu()));
                let what = format!("{name} {compute} {trained:?}");
                for category in Category::ALL {
                    let (planned, used) = (plan.peak(category), real.peak(category));
                    // Of several kinds of kernels, a plan takes those of the latest device.
                    let equal = match category {
                        Category::Workspace => planned >= used,
                        _ => planned == used,
                    };
                    assert!(equal, "{what}: {category} {planned} planned, {used} used");
                }
                assert_eq!(plan.live, real.live, "{what}: after the steps");
                let (planned, used) = (plan.peak_total as f64, real.peak_total as f64);
                assert!(
                    used <= planned && planned <= 1.02 * used,
                    "{what}: {planned} planned, {used} used at the worst moment"
                );
            }
        }
    }
}
