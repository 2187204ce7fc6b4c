//! The audit of a run's first steps: seeded faults, each of which training itself would pass over, and what is only odd.

use graft_autograd::{Gradients, Var};
use graft_nn::layers::Linear;
use graft_nn::optimizer::Rule;
use graft_nn::{
    Audit, Error, Finding, Forward, FreezePolicy, Init, Optimizer, ParamId, Parameters, RateRule,
    Rates, Result, TrainableSet,
};
use graft_tensor::ops::Unary;
use graft_tensor::{DType, Memory, Tensor};

use crate::common::*;

/// Two layers with a low-rank adapter beside the first, as a run would be wired, and the ways to wire it wrongly.
struct Model {
    p: Parameters,
    first: Linear,
    down: Linear,
    up: Linear,
    last: Linear,
    /// Is in no loss
    unused: ParamId,
    policy: Vec<&'static str>,
    rates: Vec<&'static str>,
    rule: Rule,
    decay: f64,
    max_norm: Option<f64>,
    /// The rate of each step
    lrs: Vec<f64>,
    /// Steps of the warm-up
    warmup: usize,
    /// What the adapter's output is multiplied with
    scale: f64,
    /// What is added in front of the first layer's ReLU
    shift: f64,
    detached: bool,
    input: f64,
    /// Called after each step, with its number
    after: Option<fn(&mut Parameters, usize)>,
    /// The optimizer is told this policy instead
    stale: Option<Vec<&'static str>>,
    /// The step before which the audit is taken up by another one
    resumed: Option<usize>,
}

const NAMES: [&str; 7] = [
    "first.weight",
    "first.bias",
    "down.weight",
    "up.weight",
    "last.weight",
    "last.bias",
    "unused.weight",
];

impl Model {
    fn new() -> Model {
        let mut p = Parameters::new(&Memory::cpu(), DType::F32);
        let first = Linear::new(&mut p, "first", 6, 8, 0.5).unwrap();
        let down = Linear::without_bias(&mut p, "down", 6, 2, 0.5).unwrap();
        let up = Linear::without_bias(&mut p, "up", 2, 8, 0.5).unwrap();
        let last = Linear::new(&mut p, "last", 8, 3, 0.5).unwrap();
        let unused = p.declare("unused.weight", &[2, 2], Init::Ones).unwrap();
        p.initialise(3).unwrap();
        let names: Vec<&str> = p.iter().map(|(_, one)| one.name()).collect();
        assert_eq!(names, NAMES);
        // An adapter begins as nothing.
        set(&mut p, "up.weight", |_| 0.0);
        Model {
            p,
            first,
            down,
            up,
            last,
            unused,
            policy: vec!["freeze unused.*"],
            rates: vec![],
            rule: Rule::adamw(),
            decay: 0.01,
            max_norm: Some(1.0),
            lrs: vec![1e-3; 6],
            warmup: 0,
            scale: 1.0,
            shift: 0.0,
            detached: false,
            input: 1.0,
            after: None,
            stale: None,
            resumed: None,
        }
    }

    fn loss(&self, f: &mut Forward, step: u64) -> Result<Var> {
        let x = values(step, &[5, 6]).mapv(|x| x * self.input);
        let x = graft_tensor::ops::cast(&Memory::cpu(), &tensor(&x), DType::F32)?;
        let x = f.input(x);
        let mut h = self.first.forward(f, &x)?;
        let low = self.down.forward(f, &x)?;
        let delta = self.up.forward(f, &low)?;
        let delta = f.tape.scale(&delta, self.scale)?;
        h = f.tape.add(&h, &delta)?;
        h = f.tape.affine(&h, 1.0, self.shift)?;
        h = f.tape.unary(Unary::Relu, &h)?;
        if self.detached {
            h = f.tape.detach(&h)?;
        }
        let y = self.last.forward(f, &h)?;
        let squares = f.tape.mul(&y, &y)?;
        Ok(f.tape.sum_all(&squares)?)
    }

    /// Trains, and returns what the audit found, what was open at the end, and the last step.
    fn run(mut self) -> Result<(Vec<Finding>, Vec<String>, usize)> {
        let resolve = |p: &Parameters, rules: &[&str]| -> Result<TrainableSet> {
            let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
            FreezePolicy { rules }.resolve(p)
        };
        let set = resolve(&self.p, &self.policy)?;
        let updated = match &self.stale {
            Some(rules) => resolve(&self.p, rules)?,
            None => set.clone(),
        };
        let rules: Vec<RateRule> = self
            .rates
            .iter()
            .map(|rule| rule.parse().unwrap())
            .collect();
        let mut rates = Rates::default();
        rates.apply(&rules, 1e-3, &self.p, &set)?;
        let mut optimizer = Optimizer::new(self.rule, self.decay, true)?;
        optimizer.set_rates(rates.clone());
        let mut audit = Audit::new(&self.p, &set)?;
        for (step, &lr) in self.lrs.clone().iter().enumerate() {
            if self.resumed == Some(step) {
                let open = audit.open(&self.p);
                audit = Audit::resume(&self.p, &set, &open)?;
                assert_eq!(audit.open(&self.p), open);
            }
            let mut f = Forward::train(&self.p, &set, 1, step as u64);
            let loss = self.loss(&mut f, step as u64)?;
            let value = loss.value().item()?;
            let mut gradients = Gradients::new();
            f.backward(loss, &mut gradients)?;
            audit.before(&gradients)?;
            let p = &mut self.p;
            let done = optimizer.step(p, &updated, &mut gradients, lr, self.max_norm)?;
            if let Some(after) = self.after {
                after(&mut self.p, step);
            }
            let of = |id| lr * rates.get(id).lr;
            let peak = step >= self.warmup;
            let found = audit.after(&self.p, value, done.gradient_norm, of, peak)?;
            if !found.is_empty() {
                return Ok((found, vec![], step + 1));
            }
            if audit.is_done() {
                return Ok((found, vec![], step + 1));
            }
        }
        let open = audit.open(&self.p).into_iter().map(str::to_owned).collect();
        Ok((vec![], open, self.lrs.len()))
    }
}

/// Gives a parameter new values, each from the old one.
fn set(p: &mut Parameters, name: &str, f: impl Fn(f64) -> f64) {
    let id = p.find(name).unwrap();
    let value = value(p, id).mapv(f);
    p.set(id, tensor(&value)).unwrap();
}

/// Wires a model otherwise.
type Seed = fn(&mut Model);

/// A fault, what of it must be said, and after which step at the latest.
type Fault = (&'static str, Seed, &'static [&'static str], usize);

const DEAD: &str = "its gradient";
const ROUNDED: &str = "did not move";

/// Each is a mistake that leaves a run that goes on without a word.
const FAULTS: [Fault; 18] = [
    (
        "a frozen tensor changes in one bit",
        |m| {
            m.after = Some(|p, _| {
                let id = p.find("unused.weight").unwrap();
                let word = &mut p.value_mut(id).unwrap().slice_mut::<f32>().unwrap()[3];
                *word = f32::from_bits(word.to_bits() ^ 1);
            });
        },
        &["`unused.weight` is frozen, and changed"],
        1,
    ),
    (
        "weight decay reaches what is frozen",
        |m| {
            m.policy = vec!["freeze unused.*", "freeze first.*"];
            m.after = Some(|p, _| set(p, "first.weight", |x| x * (1.0 - 1e-5)));
        },
        &["`first.weight` is frozen, and changed"],
        1,
    ),
    (
        "two elements of a frozen tensor change places",
        |m| {
            m.policy.push("freeze first.*");
            m.after = Some(|p, _| {
                let id = p.find("first.weight").unwrap();
                p.value_mut(id)
                    .unwrap()
                    .slice_mut::<f32>()
                    .unwrap()
                    .swap(1, 9);
            });
        },
        &["`first.weight` is frozen, and changed"],
        1,
    ),
    (
        "the step is made on a copy",
        |m| {
            m.after = Some(|p, _| {
                let fresh = Model::new().p;
                for name in NAMES {
                    let value = fresh.value(fresh.find(name).unwrap()).unwrap().clone();
                    p.set(p.find(name).unwrap(), value).unwrap();
                }
            });
        },
        &["`first.weight`", "`last.bias`", ROUNDED],
        1,
    ),
    (
        "the optimizer was given another set than the tape",
        |m| m.stale = Some(vec!["freeze unused.*", "freeze last.bias"]),
        &["`last.bias`", ROUNDED],
        1,
    ),
    (
        "a rate that every weight rounds away",
        |m| {
            m.lrs = vec![1e-12; 4];
            m.decay = 0.0;
            m.policy.push("freeze up.*");
            m.policy.push("freeze down.*");
            set(&mut m.p, "first.bias", |_| 0.5);
            set(&mut m.p, "last.bias", |_| 0.5);
        },
        &["`first.weight`", "1e-12", ROUNDED],
        1,
    ),
    (
        "one tensor's rate is lost in a chain of factors",
        |m| {
            m.rates = vec!["lr last.* x1e-9", "lr last.weight x1e-9"];
            m.decay = 0.0;
        },
        &["`last.weight`", "1e-21", ROUNDED],
        1,
    ),
    (
        "clipping leaves nothing",
        |m| {
            m.rule = Rule::Sgd {
                momentum: 0.0,
                nesterov: false,
            };
            m.max_norm = Some(1e-15);
            m.decay = 0.0;
            m.policy.push("freeze up.*");
            m.policy.push("freeze down.*");
            set(&mut m.p, "first.bias", |_| 0.5);
            set(&mut m.p, "last.bias", |_| 0.5);
        },
        &["`first.weight`", ROUNDED],
        1,
    ),
    (
        "an adapter that is multiplied with zero",
        |m| m.scale = 0.0,
        &["`down.weight`", "`up.weight`", DEAD],
        3,
    ),
    (
        "an adapter of which both matrices begin as zeros",
        |m| set(&mut m.p, "down.weight", |_| 0.0),
        &["`down.weight`", "`up.weight`", DEAD],
        3,
    ),
    (
        "an adapter whose second matrix is frozen at zero",
        |m| m.policy.push("freeze up.*"),
        &["`down.weight`", DEAD],
        3,
    ),
    (
        "a head that is frozen at zero",
        |m| {
            m.policy.push("freeze last.*");
            set(&mut m.p, "last.weight", |_| 0.0);
            set(&mut m.p, "last.bias", |_| 0.5);
        },
        &["`first.weight`", "`first.bias`", DEAD],
        1,
    ),
    (
        "an activation that lets nothing through",
        |m| {
            m.shift = -1e3;
            set(&mut m.p, "last.bias", |_| 0.5);
        },
        &["`first.weight`", "`first.bias`", DEAD],
        3,
    ),
    (
        "weight decay is all that moves a tensor",
        |m| {
            m.scale = 0.0;
            m.policy.push("freeze up.*");
            m.decay = 0.5;
        },
        &["`down.weight`", DEAD],
        3,
    ),
    (
        "a dead input",
        |m| {
            m.input = 0.0;
            set(&mut m.p, "first.bias", |_| 0.5);
        },
        &["`first.weight`", DEAD],
        3,
    ),
    (
        "a rate that throws a tensor out of range",
        |m| {
            m.lrs = vec![1e38; 2];
            m.rates = vec!["lr last.weight x1e3"];
        },
        &["`last.weight` is no longer finite"],
        1,
    ),
    (
        "the first step is right and the second is on a copy of a new adapter",
        |m| {
            m.after = Some(|p, step| {
                if step > 0 {
                    return;
                }
                set(p, "up.weight", |_| 0.0);
            });
            m.stale = Some(vec!["freeze unused.*", "freeze up.*"]);
        },
        &["`up.weight`", ROUNDED],
        1,
    ),
    (
        "a warm-up ends, and its peak is too low as well",
        |m| {
            m.warmup = 3;
            m.lrs = vec![0.0, 1e-13, 2e-13, 3e-13, 3e-13];
            m.decay = 0.0;
            m.policy.push("freeze up.*");
            m.policy.push("freeze down.*");
            set(&mut m.p, "first.bias", |_| 0.5);
            set(&mut m.p, "last.bias", |_| 0.5);
        },
        &["`first.weight`", "3e-13", ROUNDED],
        4,
    ),
];

#[test]
fn seeded_faults_are_caught() {
    for (what, seed, wanted, latest) in FAULTS {
        let mut model = Model::new();
        seed(&mut model);
        let (findings, _, step) = model.run().unwrap_or_else(|e| panic!("{what}: {e}"));
        let said: Vec<String> = findings.iter().map(Finding::to_string).collect();
        let said = said.join("\n");
        for wanted in wanted {
            assert!(said.contains(wanted), "{what}: {wanted} is not in: {said}");
        }
        assert!(step <= latest, "{what}: only after step {step}");
    }
}

#[test]
fn what_the_tape_and_the_optimizer_refuse_is_not_passed_over() {
    let run = |seed: fn(&mut Model)| {
        let mut model = Model::new();
        seed(&mut model);
        model.run().unwrap_err().to_string()
    };
    let said = run(|m| m.policy = vec!["freeze *"]);
    assert_eq!(said, Error::NothingTrainable.to_string());
    let said = run(|m| m.policy = vec!["freeze last.*"]);
    assert!(said.contains("no gradient: unused.weight"), "{said}");
    let said = run(|m| m.detached = true);
    assert!(
        said.contains("no gradient: first.weight, first.bias, down"),
        "{said}"
    );
    let said = run(|m| m.input = f64::NAN);
    assert!(said.contains("first.weight is not finite"), "{said}");
    let said = run(|m| m.input = 1e30);
    assert!(said.contains("is not finite"), "{said}");
    let p = Model::new().p;
    let error = Audit::new(&p, &TrainableSet::none(&p)).unwrap_err();
    assert_eq!(error, Error::NothingTrainable);
}

/// What is right, or only looks odd at first: no finding and nothing open.
const GOOD: [(&str, Seed); 12] = [
    ("as it should be", |_| {}),
    ("nothing but the adapter", |m| {
        m.policy = vec!["freeze *", "train down.*", "train up.*"];
    }),
    ("the adapter's second matrix alone", |m| {
        m.policy = vec!["freeze *", "train up.*"];
    }),
    ("a warm-up from zero", |m| {
        m.warmup = 3;
        m.lrs = vec![0.0, 1e-4, 2e-4, 3e-4, 3e-4, 3e-4];
    }),
    ("a warm-up whose first rates round away", |m| {
        m.warmup = 4;
        m.decay = 0.0;
        m.lrs = vec![0.0, 1e-12, 1e-9, 1e-6, 1e-3, 1e-3];
    }),
    ("SGD", |m| {
        m.rule = Rule::Sgd {
            momentum: 0.0,
            nesterov: false,
        }
    }),
    ("SGD with momentum and without decay", |m| {
        m.rule = Rule::Sgd {
            momentum: 0.9,
            nesterov: true,
        };
        m.decay = 0.0;
    }),
    ("no decay", |m| m.decay = 0.0),
    ("no clipping", |m| m.max_norm = None),
    ("a head that begins as zeros and is trained", |m| {
        set(&mut m.p, "last.weight", |_| 0.0);
        set(&mut m.p, "last.bias", |_| 0.5);
    }),
    (
        "the same behind an adapter that begins as zeros: one after the other",
        |m| {
            set(&mut m.p, "last.weight", |_| 0.0);
            set(&mut m.p, "last.bias", |_| 0.5);
            m.policy = vec!["freeze unused.*", "freeze first.*"];
        },
    ),
    ("rates of their own", |m| {
        m.rates = vec!["lr first.* x0.1", "lr last.* 1e-2", "decay * 0"]
    }),
];

#[test]
fn what_is_only_odd_is_let_pass() {
    for (what, seed) in GOOD {
        let mut model = Model::new();
        seed(&mut model);
        let (findings, open, _) = model.run().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!((findings, open), (vec![], vec![]), "{what}");
    }
}

#[test]
fn a_resumed_audit_knows_what_the_first_one_found() {
    // `down` has no gradient before `up` has moved; all else was found right in the first step.
    for resumed in [1, 2] {
        let mut model = Model::new();
        model.resumed = Some(resumed);
        let (findings, open, _) = model.run().unwrap();
        assert_eq!((findings, open), (vec![], vec![]), "resumed at {resumed}");
    }
    // A fault that was not found yet is found.
    let mut model = Model::new();
    model.scale = 0.0;
    model.resumed = Some(1);
    let (findings, ..) = model.run().unwrap();
    let said: Vec<String> = findings.iter().map(Finding::to_string).collect();
    assert!(said.iter().any(|s| s.contains("`up.weight`")), "{said:?}");
}

#[test]
fn a_run_too_short_to_tell_says_so() {
    let mut model = Model::new();
    model.lrs = vec![1e-3];
    let (findings, open, _) = model.run().unwrap();
    assert_eq!((findings, open), (vec![], vec!["down.weight".to_owned()]));
    let mut model = Model::new();
    model.lrs = vec![0.0; 2];
    model.warmup = 9;
    let (findings, open, _) = model.run().unwrap();
    assert!(findings.is_empty());
    assert_eq!(open.len(), 6, "{open:?}");
    assert_eq!(model_unused(), "unused.weight");
}

fn model_unused() -> String {
    let model = Model::new();
    model.p.get(model.unused).name().to_owned()
}

#[test]
fn a_bias_whose_gradient_is_rounding_may_stand_still() {
    // Scores that all shift alike: softmax does not see the bias, and its gradient is what rounding leaves.
    let mut p = Parameters::new(&Memory::cpu(), DType::F32);
    let weight = p.declare("weight", &[4], Init::Normal(1.0)).unwrap();
    let bias = p.declare("bias", &[1], Init::Ones).unwrap();
    p.initialise(5).unwrap();
    let all = FreezePolicy::default().resolve(&p).unwrap();
    let rule = Rule::Sgd {
        momentum: 0.0,
        nesterov: false,
    };
    let mut optimizer = Optimizer::new(rule, 0.0, true).unwrap();
    let mut audit = Audit::new(&p, &all).unwrap();
    for step in 0..4 {
        let mut f = Forward::train(&p, &all, 1, step);
        let loss = {
            let (w, b) = (f.parameter(weight).unwrap(), f.parameter(bias).unwrap());
            let picks = [0.3f32, 0.1, -0.7, 0.9];
            let picks = Tensor::from_slice(&Memory::cpu(), &picks, &[4]).unwrap();
            let picks = f.input(picks);
            let scores = f.tape.add(&w, &b).unwrap();
            let shares = f.tape.softmax(&scores).unwrap();
            let loss = f.tape.mul(&shares, &picks).unwrap();
            f.tape.sum_all(&loss).unwrap()
        };
        let value = loss.value().item().unwrap();
        let mut gradients = Gradients::new();
        f.backward(loss, &mut gradients).unwrap();
        audit.before(&gradients).unwrap();
        let done = optimizer
            .step(&mut p, &all, &mut gradients, 1e-2, None)
            .unwrap();
        let found = audit
            .after(&p, value, done.gradient_norm, |_| 1e-2, true)
            .unwrap();
        // A gradient of zero to the last bit would be a finding: this is none.
        let rounding =
            |f: &Finding| matches!(f, Finding::ZeroGradient { name, .. } if name == "bias");
        assert!(found.iter().all(rounding), "{found:?}");
    }
}
