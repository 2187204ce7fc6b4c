use graft_autograd::Gradients;
use graft_nn::optimizer::Rule;
use graft_nn::{
    Error, FreezePolicy, Init, Optimizer, ParamId, Parameters, RateRule, Rates, TrainableSet,
};
use graft_tensor::{Category, DType, Memory, Tensor, Usage};
use ndarray::{ArrayD, Zip};

use crate::common::*;

/// A matrix, a vector and a matrix.
const SHAPES: [&[usize]; 3] = [&[3, 4], &[5], &[2, 2]];

fn model(dtype: DType) -> (Parameters, Vec<ParamId>) {
    let mut p = Parameters::new(&Memory::cpu(), dtype);
    let names = ["a.weight", "a.bias", "b.weight"];
    let declare = |(name, shape): (&str, &[usize])| p.declare(name, shape, Init::Zeros).unwrap();
    let list = names.into_iter().zip(SHAPES).map(declare).collect();
    fill(&mut p, 5);
    (p, list)
}

/// Gradients of step `step`, of size 0.2 to 1: the updates of tiny ones would depend on rounding.
fn wanted(list: &[ParamId], step: u64) -> Vec<(ParamId, ArrayD<f64>)> {
    let size = |x: f64| (0.2 + 0.8 * x.abs()) * x.signum();
    let of = |id: &ParamId| values(100 * step + id.key() as u64, SHAPES[id.key()]).mapv(size);
    // Exact in f32, too.
    list.iter()
        .map(|id| (*id, of(id).mapv(|x| f64::from(x as f32))))
        .collect()
}

/// One parameter under PyTorch's formulas (torch/optim/adamw.py and sgd.py, single tensor).
struct Naive {
    weight: ArrayD<f64>,
    first: ArrayD<f64>,
    second: ArrayD<f64>,
    steps: i32,
}

impl Naive {
    fn new(weight: ArrayD<f64>) -> Naive {
        let zero = &weight * 0.0;
        Naive {
            weight,
            first: zero.clone(),
            second: zero,
            steps: 0,
        }
    }

    fn step(&mut self, rule: Rule, gradient: &ArrayD<f64>, lr: f64, decay: f64) {
        self.steps += 1;
        let first_step = self.steps == 1;
        match rule {
            Rule::AdamW { beta1, beta2, eps } => {
                let (c1, c2) = (1.0 - beta1.powi(self.steps), 1.0 - beta2.powi(self.steps));
                self.weight *= 1.0 - lr * decay;
                Zip::from(&mut self.weight)
                    .and(&mut self.first)
                    .and(&mut self.second)
                    .and(gradient)
                    .for_each(|w: &mut f64, m: &mut f64, v: &mut f64, &g| {
                        *m += (g - *m) * (1.0 - beta1);
                        *v = *v * beta2 + (1.0 - beta2) * g * g;
                        *w -= lr / c1 * *m / (v.sqrt() / c2.sqrt() + eps);
                    });
            }
            Rule::Sgd { momentum, nesterov } => {
                let g = gradient + &self.weight * decay;
                let update = if momentum == 0.0 {
                    g
                } else {
                    self.first = if first_step {
                        g.clone()
                    } else {
                        &self.first * momentum + &g
                    };
                    if nesterov {
                        g + &self.first * momentum
                    } else {
                        self.first.clone()
                    }
                };
                self.weight = &self.weight - update * lr;
            }
        }
    }
}

const RULES: [Rule; 5] = [
    Rule::AdamW {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
    },
    Rule::AdamW {
        beta1: 0.5,
        beta2: 0.9,
        eps: 1e-3,
    },
    Rule::Sgd {
        momentum: 0.0,
        nesterov: false,
    },
    Rule::Sgd {
        momentum: 0.9,
        nesterov: false,
    },
    Rule::Sgd {
        momentum: 0.9,
        nesterov: true,
    },
];

#[test]
fn ten_steps_are_those_of_pytorch() {
    // Ten steps of a handful of roundings each, of weights and updates of the order of 1.
    for (dtype, tolerance) in [
        (DType::F64, 1e-13),
        (DType::F32, 10.0 * 8.0 * 2f64.powi(-24)),
    ] {
        for rule in RULES {
            for decay_vectors in [false, true] {
                for max_norm in [None, Some(1.5), Some(100.0)] {
                    ten_steps(dtype, tolerance, rule, decay_vectors, max_norm);
                }
            }
        }
    }
}

fn ten_steps(dtype: DType, tolerance: f64, rule: Rule, decay_vectors: bool, max_norm: Option<f64>) {
    let (mut p, list) = model(dtype);
    let set = everything(&p);
    let mut optimizer = Optimizer::new(rule, 0.1, decay_vectors).unwrap();
    let mut naive: Vec<Naive> = list.iter().map(|id| Naive::new(value(&p, *id))).collect();
    for step in 0..10 {
        let lr = 0.05 / (1 + step) as f64; // another one at each step
        let wanted = wanted(&list, step);
        let mut found = gradients(&p, &set, &wanted);
        let done = optimizer
            .step(&mut p, &set, &mut found, lr, max_norm)
            .unwrap();
        assert!(found.is_empty(), "gradients are consumed");
        assert_eq!(optimizer.step_count(), step + 1);
        let norm = wanted
            .iter()
            .map(|(_, g)| g.mapv(|x| x * x).sum())
            .sum::<f64>()
            .sqrt();
        assert!((done.gradient_norm - norm).abs() < 1e-13 * norm);
        // torch.nn.utils.clip_grad_norm_
        let clip = max_norm.map_or(1.0, |most| f64::min(1.0, most / (norm + 1e-6)));
        assert!((done.clip - clip).abs() < 1e-13);
        assert_eq!(
            clip < 1.0,
            max_norm == Some(1.5),
            "clips only at the small norm"
        );
        for ((_, gradient), naive) in wanted.iter().zip(&mut naive) {
            let decays = decay_vectors || gradient.ndim() > 1;
            naive.step(rule, &(gradient * clip), lr, if decays { 0.1 } else { 0.0 });
        }
        for (id, naive) in list.iter().zip(&naive) {
            near(&value(&p, *id), &naive.weight, tolerance);
        }
    }
}

fn bytes(p: &Parameters) -> Vec<Vec<u8>> {
    p.iter()
        .map(|(id, _)| p.value(id).unwrap().to_bytes().unwrap())
        .collect()
}

fn only(p: &Parameters, rules: &[&str]) -> TrainableSet {
    let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    FreezePolicy { rules }.resolve(p).unwrap()
}

#[test]
fn what_is_frozen_keeps_every_bit_and_has_no_state() {
    for rule in RULES {
        let (mut p, list) = model(DType::F32);
        let set = only(&p, &["freeze a.weight"]);
        let mut optimizer = Optimizer::new(rule, 0.5, true).unwrap();
        let before = bytes(&p);
        for step in 0..3 {
            // The frozen one is in the loss as well.
            let mut found = gradients(&p, &set, &wanted(&list, step));
            assert!(found.get(list[0].key()).is_none());
            optimizer.step(&mut p, &set, &mut found, 0.1, None).unwrap();
        }
        let after = bytes(&p);
        assert_eq!(before[0], after[0]);
        assert!(before[1] != after[1] && before[2] != after[2]);
        let per_element = match rule {
            Rule::AdamW { .. } => 8,
            Rule::Sgd { momentum, .. } => {
                if momentum > 0.0 {
                    4
                } else {
                    0
                }
            }
        };
        assert_eq!(set.count(&p), 9);
        assert_eq!(optimizer.state_bytes(), per_element * 9);
        let usage = p.memory().usage();
        // What is counted are blocks, which may be up to a quarter larger than what was asked for.
        let (least, found) = (per_element * 9, usage.live(Category::Optimizer));
        assert!(
            (least..=least * 5 / 4).contains(&found),
            "{found} for {least}"
        );
        assert_eq!(usage.live(Category::Gradients), 0, "gradients are gone");
        drop(optimizer);
        assert_eq!(p.memory().usage().live(Category::Optimizer), 0);
    }
}

#[test]
fn a_parameter_that_is_thawed_later_starts_from_its_own_first_step() {
    let rule = Rule::adamw();
    let (mut p, list) = model(DType::F64);
    let mut optimizer = Optimizer::new(rule, 0.0, true).unwrap();
    let (last, all) = (only(&p, &["freeze a.*"]), everything(&p));
    for step in 0..3 {
        let mut found = gradients(&p, &last, &wanted(&list, step));
        optimizer
            .step(&mut p, &last, &mut found, 0.1, None)
            .unwrap();
    }
    let weight = value(&p, list[0]);
    let zero = &weight * 0.0;
    let mut naive = Naive {
        weight,
        first: zero.clone(),
        second: zero,
        steps: 0,
    };
    let mut found = gradients(&p, &all, &wanted(&list, 3));
    optimizer.step(&mut p, &all, &mut found, 0.1, None).unwrap();
    naive.step(rule, &wanted(&list, 3)[0].1, 0.1, 0.0);
    near(&value(&p, list[0]), &naive.weight, 1e-13);
}

/// A step that must be refused and change nothing; returns what it said.
#[track_caller]
fn refused(p: &mut Parameters, set: &TrainableSet, mut found: Gradients) -> Error {
    let before = bytes(p);
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.1, true).unwrap();
    let error = optimizer
        .step(p, set, &mut found, 0.1, Some(1.0))
        .unwrap_err();
    assert_eq!(bytes(p), before, "no weight moved");
    assert_eq!((optimizer.step_count(), optimizer.state_bytes()), (0, 0));
    error
}

#[test]
fn a_trained_parameter_without_a_gradient_is_named() {
    let (mut p, list) = model(DType::F32);
    let set = everything(&p);
    let found = gradients(&p, &set, &wanted(&list[2..], 0));
    assert_eq!(
        refused(&mut p, &set, found).to_string(),
        "2 trainable parameter(s) received no gradient: a.weight, a.bias; freeze them, or make the \
         loss depend on them"
    );
}

#[test]
fn a_gradient_that_is_not_finite_is_named() {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let (mut p, list) = model(DType::F32);
        let set = everything(&p);
        let mut wanted = wanted(&list, 0);
        *wanted[1].1.iter_mut().nth(3).unwrap() = bad;
        let found = gradients(&p, &set, &wanted);
        assert_eq!(
            refused(&mut p, &set, found).to_string(),
            "the gradient of a.bias is not finite at step 1; lower the learning rate, or look at \
             the data of this step"
        );
    }
}

#[test]
fn a_weight_that_is_held_elsewhere_stops_the_whole_step() {
    let (mut p, list) = model(DType::F32);
    let set = everything(&p);
    let held = p.value(list[2]).unwrap().clone();
    let found = gradients(&p, &set, &wanted(&list, 0));
    let error = refused(&mut p, &set, found);
    assert_eq!(
        error,
        Error::Tensor(graft_tensor::Error::Shared {
            shape: *held.shape()
        })
    );
    drop(held);
    let mut found = gradients(&p, &set, &wanted(&list, 0));
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.1, true).unwrap();
    optimizer.step(&mut p, &set, &mut found, 0.1, None).unwrap();
}

#[test]
fn gradients_whose_squares_overflow_are_finite_still() {
    let (mut p, list) = model(DType::F32);
    let set = everything(&p);
    let mut wanted = wanted(&list, 0);
    wanted[0].1.fill(1e30);
    let mut found = gradients(&p, &set, &wanted);
    let mut optimizer = Optimizer::new(
        Rule::Sgd {
            momentum: 0.0,
            nesterov: false,
        },
        0.0,
        true,
    )
    .unwrap();
    let done = optimizer
        .step(&mut p, &set, &mut found, 0.1, Some(1.0))
        .unwrap();
    let norm = 12f64.sqrt() * f64::from(1e30f32);
    assert!((done.gradient_norm / norm - 1.0).abs() < 1e-12);
    assert!(value(&p, list[0]).iter().all(|x| x.is_finite()));
}

#[test]
fn gradients_add_up_over_micro_batches() {
    let (mut p, list) = model(DType::F64);
    let set = everything(&p);
    let (one, two) = (wanted(&list, 0), wanted(&list, 1));
    let sum: Vec<_> = one
        .iter()
        .zip(&two)
        .map(|((id, a), (_, b))| (*id, a + b))
        .collect();
    let whole = gradients(&p, &set, &sum);
    let mut parts = gradients(&p, &set, &one);
    let mut f = graft_nn::Forward::train(&p, &set, 0, 1);
    let mut loss = None;
    for (id, wanted) in &two {
        let (x, c) = (f.parameter(*id).unwrap(), f.input(tensor(wanted)));
        let product = f.tape.mul(&x, &c).unwrap();
        let sum = f.tape.sum_all(&product).unwrap();
        loss = Some(match loss {
            None => sum,
            Some(loss) => f.tape.add(&loss, &sum).unwrap(),
        });
    }
    f.backward(loss.unwrap(), &mut parts).unwrap();
    for id in &list {
        let of = |g: &Gradients| array(g.get(id.key()).unwrap());
        near(&of(&parts), &of(&whole), 1e-15);
    }
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.0, true).unwrap();
    optimizer.step(&mut p, &set, &mut parts, 0.1, None).unwrap();
}

#[test]
fn settings_outside_their_range_are_refused() {
    let adamw = |beta1, beta2, eps| Optimizer::new(Rule::AdamW { beta1, beta2, eps }, 0.0, true);
    let said = |result: Result<Optimizer, Error>| result.unwrap_err().to_string();
    assert_eq!(
        said(adamw(1.0, 0.9, 1e-8)),
        "beta1 is 1; it must be at least 0 and below 1"
    );
    assert_eq!(
        said(adamw(0.9, -0.1, 1e-8)),
        "beta2 is -0.1; it must be at least 0 and below 1"
    );
    assert_eq!(said(adamw(0.9, 0.9, 0.0)), "eps is 0; it must be above 0");
    assert_eq!(
        said(adamw(f64::NAN, 0.9, 1e-8)),
        "beta1 is NaN; it must be at least 0 and below 1"
    );
    let decay = Optimizer::new(Rule::adamw(), -1.0, true);
    assert_eq!(said(decay), "weight_decay is -1; it must be 0 or more");
    let nesterov = Optimizer::new(
        Rule::Sgd {
            momentum: 0.0,
            nesterov: true,
        },
        0.0,
        true,
    );
    assert_eq!(
        said(nesterov),
        "momentum is 0; it must be above 0 for Nesterov"
    );
}

#[test]
fn what_is_prepared_is_what_steps_would_make() {
    for rule in RULES {
        let run = |prepared: bool| {
            let (mut p, list) = model(DType::F32);
            let set = only(&p, &["freeze a.*"]);
            let mut optimizer = Optimizer::new(rule, 0.1, true).unwrap();
            let before = p.memory().usage();
            if prepared {
                optimizer.prepare(&p, &set).unwrap();
                let live = |u: Usage| u.live.iter().sum::<usize>();
                let (then, state) = (live(before), optimizer.state_bytes());
                assert_eq!(live(p.memory().usage()), then + state, "room is not in use");
            }
            let made = optimizer.state_bytes();
            let states: Vec<_> = list.iter().map(|id| state(&optimizer, *id)).collect();
            assert!(states.iter().all(Option::is_none), "nothing has moved yet");
            let mut found = gradients(&p, &set, &wanted(&list, 0));
            optimizer.step(&mut p, &set, &mut found, 0.1, None).unwrap();
            assert!(!prepared || made == optimizer.state_bytes());
            let states: Vec<_> = list.iter().map(|id| state(&optimizer, *id)).collect();
            (bytes(&p), states)
        };
        assert_eq!(run(true), run(false), "{rule:?}");
    }
}

#[test]
fn a_plan_of_a_step_counts_like_the_real_one() {
    let usage = |memory: Memory| {
        let mut p = Parameters::new(&memory, DType::F32);
        let w = p.declare("w", &[30, 7], Init::Normal(0.02)).unwrap();
        p.initialise(1).unwrap();
        let set = everything(&p);
        let mut optimizer = Optimizer::new(Rule::adamw(), 0.1, true).unwrap();
        for step in 0..2 {
            let mut f = graft_nn::Forward::train(&p, &set, 0, step);
            let x = f.input(Tensor::full(&memory, DType::F32, &[5, 30], 1.0).unwrap());
            let w = f.parameter(w).unwrap();
            let y = f.tape.matmul(&x, &w).unwrap();
            let loss = f.tape.sum_all(&y).unwrap();
            drop((x, w, y));
            let mut found = Gradients::new();
            f.backward(loss, &mut found).unwrap();
            optimizer
                .step(&mut p, &set, &mut found, 0.1, Some(1.0))
                .unwrap();
        }
        memory.usage()
    };
    assert_eq!(usage(Memory::cpu()), usage(Memory::planned()));
}

/// The state of a parameter, to the bit.
fn state(optimizer: &Optimizer, id: ParamId) -> Option<(u64, Vec<Vec<u8>>)> {
    let (step, tensors) = optimizer.state(id)?;
    let bytes = tensors.iter().map(|t| t.to_bytes().unwrap()).collect();
    Some((step, bytes))
}

#[test]
fn thawing_leaves_the_state_of_the_others_as_it_was() {
    for rule in RULES {
        // Two runs, of which one thaws a.* in front of the fourth step: b.* must not see it.
        let run = |thaws: bool| {
            let (mut p, list) = model(DType::F32);
            let mut optimizer = Optimizer::new(rule, 0.1, true).unwrap();
            let (last, all) = (only(&p, &["freeze a.*"]), everything(&p));
            let mut seen = Vec::new();
            for step in 0..6 {
                let set = if thaws && step >= 3 { &all } else { &last };
                let before = state(&optimizer, list[2]);
                let mut found = gradients(&p, set, &wanted(&list, step));
                assert_eq!(state(&optimizer, list[2]), before, "no pass moves state");
                optimizer.step(&mut p, set, &mut found, 0.1, None).unwrap();
                seen.push((bytes(&p)[2].clone(), state(&optimizer, list[2])));
                let slots = list.iter().filter(|id| optimizer.state(**id).is_some());
                assert_eq!(slots.count(), set.len(), "slots appear as parameters thaw");
            }
            let own = |id: &ParamId| optimizer.state(*id).map(|(step, _)| step);
            (seen, list.iter().map(own).collect::<Vec<_>>())
        };
        let (plain, thawed) = (run(false), run(true));
        assert_eq!(plain.0, thawed.0, "{rule:?}");
        assert_eq!(plain.1, [None, None, Some(6)]);
        assert_eq!(thawed.1, [Some(3), Some(3), Some(6)]);
    }
}

#[test]
fn each_parameter_moves_at_its_own_rate() {
    for rule in RULES {
        let (mut p, list) = model(DType::F64);
        let set = everything(&p);
        let rules = [
            "lr a.* x0.1",
            "lr b.* 0.02",
            "decay *.bias 0.5",
            "decay b.* 0",
        ];
        let rules: Vec<RateRule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let mut rates = Rates::default();
        rates.apply(&rules, 0.1, &p, &set).unwrap();
        let mut optimizer = Optimizer::new(rule, 0.2, false).unwrap();
        optimizer.set_rates(rates);
        let mut naive: Vec<Naive> = list.iter().map(|id| Naive::new(value(&p, *id))).collect();
        for step in 0..4 {
            let lr = 0.1 / (1 + step) as f64;
            let wanted = wanted(&list, step);
            let mut found = gradients(&p, &set, &wanted);
            optimizer.step(&mut p, &set, &mut found, lr, None).unwrap();
            let own = [(0.1, 0.2), (0.1, 0.5), (0.2, 0.0)];
            for (((_, gradient), naive), (factor, decay)) in wanted.iter().zip(&mut naive).zip(own)
            {
                naive.step(rule, gradient, lr * factor, decay);
            }
        }
        for (id, naive) in list.iter().zip(&naive) {
            near(&value(&p, *id), &naive.weight, 1e-13);
        }
    }
}

#[test]
fn a_restored_optimizer_goes_on_to_the_same_bits() {
    let rules = [
        Rule::adamw(),
        Rule::Sgd {
            momentum: 0.9,
            nesterov: false,
        },
        Rule::Sgd {
            momentum: 0.0,
            nesterov: false,
        },
    ];
    for rule in rules {
        let (mut p, list) = model(DType::F32);
        let set = everything(&p);
        let mut optimizer = Optimizer::new(rule, 0.1, true).unwrap();
        let step = |p: &mut Parameters, optimizer: &mut Optimizer, step: u64| {
            let mut found = gradients(p, &set, &wanted(&list, step));
            optimizer.step(p, &set, &mut found, 0.01, None).unwrap();
        };
        for i in 0..3 {
            step(&mut p, &mut optimizer, i);
        }
        // Another optimizer over other parameters with the same values and state.
        let (mut other, _) = model(DType::F32);
        let mut restored = Optimizer::new(rule, 0.1, true).unwrap();
        let copy = |t: &Tensor| {
            Tensor::from_bytes(&Memory::cpu(), t.dtype(), t.shape(), &t.to_bytes().unwrap())
                .unwrap()
        };
        let states: Vec<(ParamId, u64, Vec<Tensor>)> = list
            .iter()
            .map(|&id| {
                let (count, state) = optimizer.state(id).unwrap();
                (id, count, state.iter().map(copy).collect())
            })
            .collect();
        for &id in &list {
            let value = copy(p.value(id).unwrap());
            other.set(id, value).unwrap();
        }
        restored.restore(&other, 3, states).unwrap();
        assert_eq!(restored.step_count(), 3);
        for i in 3..6 {
            step(&mut p, &mut optimizer, i);
            step(&mut other, &mut restored, i);
        }
        assert_eq!(bytes(&p), bytes(&other));
        for &id in &list {
            assert_eq!(state(&restored, id), state(&optimizer, id));
        }
    }
}

#[test]
fn state_of_another_rule_or_shape_is_refused() {
    let (p, list) = model(DType::F32);
    let mut optimizer = Optimizer::new(Rule::adamw(), 0.0, true).unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(&Memory::cpu(), DType::F32, shape).unwrap();
    for state in [vec![zeros(&[3, 4])], vec![zeros(&[3, 4]), zeros(&[4, 3])]] {
        let error = optimizer.restore(&p, 1, [(list[0], 1, state)]).unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("a.weight") && said.contains("expected 2 of [3, 4]"),
            "{said}"
        );
        assert!(optimizer.state(list[0]).is_none());
    }
}
