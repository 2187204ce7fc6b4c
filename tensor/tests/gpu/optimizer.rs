//! Optimizer steps, and the norm of gradients.

use graft_tensor::ops::affine;
use graft_tensor::ops::optimizer::{
    AdamW, Rule, Sgd, Stepped, Tables, Update, adamw, all_finite, sgd, step, sum_squares,
};
use graft_tensor::{DType, Memory, Tensor};

use crate::common::{assert_same, cpu, gpu, normal, on_gpu};
use crate::within::assert_within;

const ADAMW: AdamW = AdamW {
    lr: 0.01,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
    step: 1,
    grad_scale: 1.0,
};
const SGD: Sgd = Sgd {
    lr: 0.1,
    momentum: 0.9,
    dampening: 0.0,
    nesterov: false,
    weight_decay: 0.01,
    first_step: true,
    grad_scale: 1.0,
};

/// Weights of all kinds of sizes; the last one does not begin at a multiple of 16 bytes.
fn weights(m: &Memory, dtype: DType) -> Vec<Tensor> {
    let sizes = [
        &[3, 5][..],
        &[0],
        &[8191],
        &[8192],
        &[8193],
        &[1],
        &[257, 300],
        &[1001],
    ];
    let mut all: Vec<Tensor> = sizes
        .iter()
        .zip(0..)
        .map(|(shape, seed)| normal(dtype, shape, seed).to_memory(m).unwrap())
        .map(|x| x.copy(m).unwrap())
        .collect();
    let last = all.pop().unwrap();
    all.push(last.narrow(0, 1, 1000).unwrap());
    all
}

fn gradients(m: &Memory, dtype: DType, of: &[Tensor], seed: u64) -> Vec<Tensor> {
    let like = |(x, seed): (&Tensor, u64)| {
        let g = normal(dtype, x.shape(), 100 * seed + 50);
        affine(cpu(), &g, 0.1, 0.0).unwrap().to_memory(m).unwrap()
    };
    of.iter().zip(seed * 100..).map(like).collect()
}

/// Three steps of many tensors at once; the states come after each weight.
fn steps(m: &Memory, dtype: DType, rule: impl Fn(u64) -> Rule, states: usize) -> Vec<Tensor> {
    let mut weights = weights(m, dtype);
    let mut moments: Vec<Vec<Tensor>> = weights
        .iter()
        .map(|w| {
            let zeros = || Tensor::zeros(m, dtype, w.shape()).unwrap();
            (0..states).map(|_| zeros()).collect()
        })
        .collect();
    let mut tables = Tables::default();
    for number in 1..=3 {
        let gradients = gradients(m, dtype, &weights, number);
        let parts = weights.iter_mut().zip(&mut moments).zip(&gradients);
        let mut updates: Vec<Update<'_>> = parts
            .enumerate()
            .map(|(i, ((weight, states), gradient))| Update {
                // Some began later.
                rule: rule(if i % 3 == 2 { 1 } else { number }),
                weight,
                gradient,
                states: states.iter_mut().collect(),
            })
            .collect();
        let most = [None, Some(1.0), Some(1e9)][number as usize % 3];
        let stepped = step(&mut updates, most, &mut tables).unwrap();
        assert!(matches!(stepped, Stepped::Done { .. }));
    }
    let all = weights.into_iter().zip(moments);
    all.flat_map(|(weight, states)| [weight].into_iter().chain(states))
        .collect()
}

#[test]
#[ignore = "needs a GPU"]
fn many_tensors_at_once() {
    let check = |name: &str, states: usize, rule: &dyn Fn(u64) -> Rule| {
        for dtype in [DType::F32, DType::Bf16] {
            let expected = steps(cpu(), dtype, rule, states);
            let found = steps(gpu(), dtype, rule, states);
            for (found, expected) in found.iter().zip(&expected) {
                // Weights of a few units, in a few roundings; bf16 is rounded at each of three steps.
                let allowed = if dtype == DType::F32 { 2e-6 } else { 0.04 };
                assert_within(name, found, expected, allowed);
            }
            let again = steps(gpu(), dtype, rule, states);
            for (again, found) in again.iter().zip(&found) {
                assert_same("a second time", again, found);
            }
        }
    };
    check("AdamW", 2, &|step| Rule::AdamW(AdamW { step, ..ADAMW }));
    let sgd = |step, momentum, dampening, nesterov| {
        let first_step = step == 1;
        Rule::Sgd(Sgd {
            momentum,
            dampening,
            nesterov,
            first_step,
            ..SGD
        })
    };
    check("momentum", 1, &|step| sgd(step, 0.9, 0.0, false));
    check("Nesterov", 1, &|step| sgd(step, 0.9, 0.1, true));
    check("descent", 0, &|step| sgd(step, 0.0, 0.0, false));
}

#[test]
#[ignore = "needs a GPU"]
fn norms_and_factors() {
    let run = |m: &Memory, most| {
        let mut weights = weights(m, DType::F32);
        let gradients = gradients(m, DType::F32, &weights, 1);
        let mut updates: Vec<Update<'_>> = weights
            .iter_mut()
            .zip(&gradients)
            .map(|(weight, gradient)| Update {
                rule: Rule::Sgd(Sgd {
                    momentum: 0.0,
                    ..SGD
                }),
                weight,
                gradient,
                states: Vec::new(),
            })
            .collect();
        step(&mut updates, most, &mut Tables::default()).unwrap()
    };
    for most in [None, Some(0.5), Some(1e6)] {
        let (here, there) = (run(cpu(), most), run(gpu(), most));
        let (Stepped::Done { norm, clip }, Stepped::Done { norm: n, clip: c }) = (here, there)
        else {
            panic!("{here:?} and {there:?}");
        };
        assert!((n / norm - 1.0).abs() < 1e-12 && (c / clip - 1.0).abs() < 1e-12);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn nothing_moves_if_a_gradient_is_not_finite() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut weights = weights(gpu(), DType::F32);
        let before: Vec<Vec<u8>> = weights.iter().map(|w| w.to_bytes().unwrap()).collect();
        let mut gradients = gradients(gpu(), DType::F32, &weights, 1);
        let mut values = gradients[4].to_vec::<f32>().unwrap();
        values[8192] = bad;
        gradients[4] = Tensor::from_vec(gpu(), values, gradients[4].shape()).unwrap();
        let mut moments: Vec<[Tensor; 2]> = weights
            .iter()
            .map(|w| [0, 1].map(|_| Tensor::zeros(gpu(), DType::F32, w.shape()).unwrap()))
            .collect();
        let mut updates: Vec<Update<'_>> = weights
            .iter_mut()
            .zip(&gradients)
            .zip(&mut moments)
            .map(|((weight, gradient), states)| Update {
                rule: Rule::AdamW(ADAMW),
                weight,
                gradient,
                states: states.iter_mut().collect(),
            })
            .collect();
        let stepped = step(&mut updates, Some(1.0), &mut Tables::default()).unwrap();
        assert_eq!(stepped, Stepped::NotFinite(4));
        drop(updates);
        let after: Vec<Vec<u8>> = weights.iter().map(|w| w.to_bytes().unwrap()).collect();
        assert!(before == after);
        for state in moments.iter().flatten() {
            assert!(state.to_f64().unwrap().iter().all(|&x| x == 0.0));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn one_tensor_alone() {
    for dtype in [DType::F32, DType::Bf16] {
        let allowed = if dtype == DType::F32 { 2e-6 } else { 0.01 };
        for grad_scale in [1.0, 0.25] {
            let of = |m: &Memory, seed| normal(dtype, &[37, 41], seed).to_memory(m).unwrap();
            let run = |m: &Memory| {
                let mut state = [1, 2, 3].map(|seed| of(m, seed).copy(m).unwrap());
                // A mean of squares is not negative.
                let square = of(cpu(), 3).to_f64().unwrap();
                let square: Vec<f32> = square.into_iter().map(|x| (x * x) as f32).collect();
                let square = Tensor::from_vec(cpu(), square, &[37, 41]).unwrap();
                let square = graft_tensor::ops::cast(cpu(), &square, dtype).unwrap();
                state[2] = square.to_memory(m).unwrap().copy(m).unwrap();
                let [w, a, b] = &mut state;
                // A gradient whose rows are columns elsewhere.
                let g = normal(dtype, &[41, 37], 4)
                    .to_memory(m)
                    .unwrap()
                    .t()
                    .unwrap();
                let (step, lr) = (4, 0.1);
                let p = AdamW {
                    step,
                    lr,
                    grad_scale,
                    ..ADAMW
                };
                adamw(&p, w, &g, a, b).unwrap();
                let p = Sgd {
                    grad_scale,
                    first_step: false,
                    ..SGD
                };
                sgd(&p, w, &g, Some(a)).unwrap();
                let p = Sgd { momentum: 0.0, ..p };
                sgd(&p, w, &g, None).unwrap();
                state
            };
            for (found, expected) in run(gpu()).iter().zip(&run(cpu())) {
                assert_within("one tensor", found, expected, allowed);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn squares_and_what_is_finite() {
    for dtype in [DType::F32, DType::Bf16] {
        for shape in [&[0][..], &[1], &[3, 7], &[100_003]] {
            let x = normal(dtype, shape, 1);
            let (here, there) = (sum_squares(&x).unwrap(), sum_squares(&on_gpu(&x)).unwrap());
            assert!((here - there).abs() <= 1e-12 * here, "{here} and {there}");
            assert!(all_finite(&on_gpu(&x)).unwrap());
        }
    }
    // Squares beyond f32.
    let x = Tensor::full(gpu(), DType::F32, &[1000], 1e30).unwrap();
    assert!((sum_squares(&x).unwrap() / 1e63 - 1.0).abs() < 1e-6);
    assert!(all_finite(&x).unwrap());
    for bad in [f64::NAN, f64::INFINITY] {
        let x = Tensor::full(gpu(), DType::F32, &[3], bad).unwrap();
        assert!(!all_finite(&x).unwrap());
    }
}
