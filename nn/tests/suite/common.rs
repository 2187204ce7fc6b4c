//! Random values, parameters filled with them, and gradient checks of whole layers.

use graft_autograd::{GradCheck, Gradients, Tape, Var, gradcheck};
use graft_nn::{Error, Forward, FreezePolicy, ParamId, Parameters, Result, TrainableSet};
use graft_tensor::{DType, Memory, Tensor};
use ndarray::{ArrayD, IxDyn};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Runs `test(seed, dims, flags)` on 64 random cases; dimensions are 1 to 5.
pub fn cases(test: impl Fn(u64, [usize; 4], [bool; 3])) {
    let config = Config {
        cases: 64,
        failure_persistence: None,
        ..Config::default()
    };
    let strategy = (
        any::<u64>(),
        proptest::array::uniform4(1..=5usize),
        any::<[bool; 3]>(),
    );
    TestRunner::new(config)
        .run(&strategy, |(seed, dims, flags)| {
            test(seed, dims, flags);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Values between -1 and 1: SplitMix64 (Steele et al., 2014).
pub fn values(seed: u64, shape: &[usize]) -> ArrayD<f64> {
    let mut state = seed;
    ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
}

pub fn tensor(x: &ArrayD<f64>) -> Tensor {
    let data = x.iter().copied().collect();
    Tensor::from_vec::<f64>(&Memory::cpu(), data, x.shape()).unwrap()
}

pub fn ids(data: &[i64]) -> Tensor {
    Tensor::from_slice(&Memory::cpu(), data, &[data.len()]).unwrap()
}

pub fn array(x: &Tensor) -> ArrayD<f64> {
    ArrayD::from_shape_vec(&x.shape()[..], x.to_f64().unwrap()).unwrap()
}

/// A parameter's value.
pub fn value(p: &Parameters, id: ParamId) -> ArrayD<f64> {
    array(p.value(id).unwrap())
}

pub fn parameters() -> Parameters {
    Parameters::new(&Memory::cpu(), DType::F64)
}

/// Gives each parameter random values, those of norms and biases too.
pub fn fill(p: &mut Parameters, seed: u64) {
    let all: Vec<_> = p.iter().map(|(id, one)| (id, *one.shape())).collect();
    for (id, shape) in all {
        let x = values(seed ^ (id.key() as u64 + 1) << 32, &shape);
        p.set(id, tensor(&x)).unwrap();
    }
}

pub fn everything(p: &Parameters) -> TrainableSet {
    FreezePolicy::default().resolve(p).unwrap()
}

#[track_caller]
pub fn near(y: &ArrayD<f64>, want: &ArrayD<f64>, tolerance: f64) {
    assert_eq!(y.shape(), want.shape());
    for ((at, y), want) in y.indexed_iter().zip(want) {
        let error = (y - want).abs();
        assert!(
            error <= tolerance * want.abs().max(1.0),
            "element {at:?} is {y}, should be {want}"
        );
    }
}

fn as_autograd(error: Error) -> graft_autograd::Error {
    match error {
        Error::Autograd(error) => error,
        Error::Tensor(error) => error.into(),
        other => panic!("{other}"),
    }
}

/// The value of `f` in an evaluation pass, its value in a training pass being the same, and its
/// gradients with regard to all parameters and inputs checked, also with some of them frozen.
#[track_caller]
pub fn checked(
    p: &Parameters,
    inputs: &[Tensor],
    seed: u64,
    f: impl Fn(&mut Forward, &[Var]) -> Result<Var>,
) -> ArrayD<f64> {
    let set = match p.is_empty() {
        true => TrainableSet::none(p),
        false => everything(p),
    };
    let mut pass = Forward::evaluate(p);
    let vars: Vec<Var> = inputs.iter().map(|x| pass.input(x.clone())).collect();
    let y = array(f(&mut pass, &vars).unwrap().value());
    // A parameter's key is its number: on a tape that holds them all, the layer finds the ones that
    // the check perturbs.
    let mut all: Vec<Tensor> = p
        .iter()
        .map(|(id, _)| p.value(id).unwrap().clone())
        .collect();
    all.extend_from_slice(inputs);
    let run = |tape: &mut Tape, vars: &[Var]| {
        let mut pass = Forward::train(p, &set, 0, 0);
        std::mem::swap(&mut pass.tape, tape);
        let y = f(&mut pass, &vars[p.len()..]);
        std::mem::swap(&mut pass.tape, tape);
        y.map_err(as_autograd)
    };
    let float = |i: usize| all[i].dtype() == DType::F64;
    let every: Vec<bool> = (0..all.len()).map(float).collect();
    let some: Vec<bool> = (0..all.len())
        .map(|i| float(i) && (seed >> i) & 1 == 1)
        .collect();
    for needs in [every, some] {
        gradcheck(&all, &needs, GradCheck::default(), run).unwrap_or_else(|e| panic!("{e}"));
    }
    let mut pass = Forward::train(p, &set, 0, 0);
    let vars: Vec<Var> = inputs.iter().map(|x| pass.input(x.clone())).collect();
    assert_eq!(
        array(f(&mut pass, &vars).unwrap().value()),
        y,
        "training, evaluation"
    );
    y
}

/// Gradients as given: those of the sum of all products of a parameter and its wanted gradient.
pub fn gradients(
    p: &Parameters,
    set: &TrainableSet,
    wanted: &[(ParamId, ArrayD<f64>)],
) -> Gradients {
    let mut f = Forward::train(p, set, 0, 0);
    let mut loss: Option<Var> = None;
    for (id, wanted) in wanted {
        let wanted = graft_tensor::ops::cast(&Memory::cpu(), &tensor(wanted), p.dtype()).unwrap();
        let wanted = f.input(wanted);
        let x = f.parameter(*id).unwrap();
        let product = f.tape.mul(&x, &wanted).unwrap();
        let sum = f.tape.sum_all(&product).unwrap();
        loss = Some(match loss {
            None => sum,
            Some(loss) => f.tape.add(&loss, &sum).unwrap(),
        });
    }
    let mut gradients = Gradients::new();
    f.backward(loss.expect("one gradient at least"), &mut gradients)
        .unwrap();
    gradients
}
