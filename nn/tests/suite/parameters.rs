use graft_nn::{Error, Init, Parameters};
use graft_tensor::{Category, DType, Memory, Tensor};

use crate::common::*;

#[test]
fn declared_in_order_and_found_by_name() {
    let mut p = parameters();
    assert!(p.is_empty());
    let a = p
        .declare("encoder.weight", &[2, 3], Init::Normal(0.02))
        .unwrap();
    let b = p.declare("encoder.bias", &[2], Init::Zeros).unwrap();
    assert_eq!((p.len(), p.count(), p.is_empty()), (2, 8, false));
    assert_eq!(
        (
            p.find("encoder.weight").unwrap(),
            p.find("encoder.bias").unwrap()
        ),
        (a, b)
    );
    assert_eq!(p.get(b).name(), "encoder.bias");
    assert_eq!(p.get(a).shape()[..], [2, 3]);
    let order: Vec<_> = p
        .iter()
        .map(|(id, one)| (id.key(), one.name().to_owned()))
        .collect();
    assert_eq!(
        order,
        [(0, "encoder.weight".into()), (1, "encoder.bias".into())]
    );
}

#[test]
fn an_unknown_name_is_answered_with_the_nearest() {
    let mut p = parameters();
    for name in [
        "pooler.dense.weight",
        "classifier.weight",
        "classifier.bias",
    ] {
        p.declare(name, &[1], Init::Zeros).unwrap();
    }
    assert_eq!(
        p.find("clasifier.weigth").unwrap_err().to_string(),
        "no parameter is called clasifier.weigth; the nearest name is classifier.weight"
    );
    let none = parameters().find("x").unwrap_err().to_string();
    assert_eq!(none, "no parameter is called x");
}

#[test]
fn a_refused_declaration_changes_nothing() {
    let mut p = parameters();
    let a = p.declare("a", &[2], Init::Ones).unwrap();
    let error = p.declare("a", &[3], Init::Zeros).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the parameter a is declared twice; every name must be unique"
    );
    assert!(matches!(
        p.declare("b", &[usize::MAX, 2], Init::Zeros),
        Err(Error::Tensor(_))
    ));
    assert_eq!(p.len(), 1);
    assert_eq!(p.find("a").unwrap(), a);
    assert_eq!(p.get(p.find("a").unwrap()).shape()[..], [2]);
    assert!(p.find("b").is_err());
    let b = p.declare("b", &[1], Init::Zeros).unwrap();
    assert_eq!(p.find("b").unwrap(), b);
}

#[test]
fn values_are_set_in_the_declared_shape_and_the_common_type() {
    let memory = Memory::cpu();
    let mut p = Parameters::new(&memory, DType::Bf16);
    let w = p.declare("w", &[2, 2], Init::Zeros).unwrap();
    assert!(!p.get(w).has_value());
    let missing = "the parameter w has no value yet: load a checkpoint or initialise it first";
    assert_eq!(p.value(w).unwrap_err().to_string(), missing);
    assert_eq!(p.value_mut(w).unwrap_err().to_string(), missing);
    let wrong = Tensor::from_vec(&memory, vec![1f32; 4], &[4]).unwrap();
    assert_eq!(
        p.set(w, wrong).unwrap_err().to_string(),
        "the parameter w has shape [2, 2]; found a tensor of shape [4]"
    );
    assert!(!p.get(w).has_value());
    let whole = Tensor::from_vec(&memory, vec![1i64; 4], &[2, 2]).unwrap();
    let error = p.set(w, whole).unwrap_err().to_string();
    assert_eq!(error, "cast: the input is i64, expected a float type");
    let data = vec![1.0f32, 2.0, 3.0, 1.0 + 1.0 / 512.0];
    let x = Tensor::from_vec(&memory, data, &[2, 2]).unwrap();
    p.set(w, x.t().unwrap()).unwrap();
    drop(x);
    let value = p.value(w).unwrap();
    assert_eq!((value.dtype(), value.is_contiguous()), (DType::Bf16, true));
    assert_eq!(
        value.to_f64().unwrap(),
        [1.0, 3.0, 2.0, 1.0],
        "transposed, and rounded"
    );
    let usage = memory.usage();
    assert_eq!(usage.live(Category::Weights), 8);
    assert_eq!(usage.live.iter().sum::<usize>(), 8, "nothing else is kept");
}

#[test]
fn what_is_initialised_depends_on_seed_and_name_alone() {
    let draw = |seed, dtype, names: &[&str]| {
        let mut p = Parameters::new(&Memory::cpu(), dtype);
        for name in names {
            p.declare(name, &[40, 50], Init::Normal(0.02)).unwrap();
        }
        p.initialise(seed).unwrap();
        let x = array(p.value(p.find("w").unwrap()).unwrap());
        x.into_raw_vec_and_offset().0
    };
    let w = draw(1, DType::F32, &["w"]);
    assert_eq!(
        draw(1, DType::F32, &["v", "w", "u"]),
        w,
        "whatever else there is"
    );
    assert_ne!(draw(2, DType::F32, &["w"]), w, "another seed");
    assert_eq!(draw(1, DType::F64, &["w"]), w, "whatever the type");
    let mut p = parameters();
    let [a, b] = ["w", "v"].map(|name| p.declare(name, &[40, 50], Init::Normal(0.02)).unwrap());
    p.initialise(1).unwrap();
    assert_ne!(value(&p, a), value(&p, b), "another name");
    // 2000 draws: five standard errors of mean and variance.
    let n = w.len() as f64;
    let mean = w.iter().sum::<f64>() / n;
    let variance = w.iter().map(|x| x * x).sum::<f64>() / n;
    assert!(mean.abs() < 5.0 * 0.02 / n.sqrt(), "{mean}");
    assert!(
        (variance / 0.0004 - 1.0).abs() < 5.0 * (2.0 / n).sqrt(),
        "{variance}"
    );
}

#[test]
fn what_was_loaded_is_not_initialised_again() {
    let mut p = parameters();
    let [a, b, c] = [
        ("a", Init::Normal(1.0)),
        ("b", Init::Ones),
        ("c", Init::Zeros),
    ]
    .map(|(name, init)| p.declare(name, &[3], init).unwrap());
    let loaded = values(1, &[3]);
    p.set(a, tensor(&loaded)).unwrap();
    p.initialise(9).unwrap();
    assert_eq!(value(&p, a), loaded);
    assert_eq!(value(&p, b), &loaded * 0.0 + 1.0);
    assert_eq!(value(&p, c), &loaded * 0.0);
}

#[test]
fn a_plan_of_parameters_counts_like_the_real_ones() {
    let count = |memory: Memory| {
        let mut p = Parameters::new(&memory, DType::Bf16);
        p.declare("a", &[30, 7], Init::Normal(0.02)).unwrap();
        p.declare("b", &[7], Init::Ones).unwrap();
        p.initialise(1).unwrap();
        memory.usage()
    };
    let usage = count(Memory::cpu());
    assert_eq!(usage, count(Memory::planned()));
    assert_eq!(usage.live(Category::Weights), 2 * 217);
}
