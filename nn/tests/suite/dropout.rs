use graft_nn::layers::{Linear, SelfAttention};
use graft_nn::{Forward, FreezePolicy, Parameters};
use graft_tensor::ops::Attention;
use ndarray::ArrayD;

use crate::common::*;

#[test]
fn of_activations_in_training_only() {
    let mut p = parameters();
    p.declare("w", &[2], graft_nn::Init::Ones).unwrap();
    p.initialise(0).unwrap();
    let set = everything(&p);
    let ones = ArrayD::from_elem(ndarray::IxDyn(&[1000]), 1.0);
    let drop = |mut f: Forward| {
        let x = f.input(tensor(&ones));
        let (a, b) = (f.dropout(&x, 0.25).unwrap(), f.dropout(&x, 0.25).unwrap());
        (array(a.value()), array(b.value()))
    };
    assert_eq!(drop(Forward::evaluate(&p)), (ones.clone(), ones.clone()));
    let (a, b) = drop(Forward::train(&p, &set, 7, 3));
    assert!(a.iter().all(|&x| x == 0.0 || (x - 4.0 / 3.0).abs() < 1e-15));
    // Binomial: 250 with a standard deviation of 14; five of them.
    let dropped = a.iter().filter(|&&x| x == 0.0).count();
    assert!(dropped.abs_diff(250) < 70, "{dropped}");
    assert_ne!(a, b, "each dropout draws for itself");
    assert_eq!(
        drop(Forward::train(&p, &set, 7, 3)),
        (a.clone(), b),
        "the same step"
    );
    assert_ne!(drop(Forward::train(&p, &set, 7, 4)).0, a, "another step");
    assert_ne!(drop(Forward::train(&p, &set, 8, 3)).0, a, "another seed");
}

#[test]
fn a_probability_that_drops_everything_is_refused() {
    let p = parameters();
    let set = graft_nn::TrainableSet::none(&p);
    let mut f = Forward::train(&p, &set, 0, 0);
    let x = f.input(tensor(&values(1, &[2])));
    let error = f.dropout(&x, 1.0).unwrap_err().to_string();
    assert_eq!(error, "dropout: p is 1, not in [0, 1)");
}

fn attention(p: &mut Parameters, dropout: f64) -> SelfAttention {
    let mut linear = |name: &str| Linear::new(p, name, 4, 4, 0.02).unwrap();
    SelfAttention {
        query: linear("query"),
        key: linear("key"),
        value: linear("value"),
        output: linear("output"),
        attention: Attention {
            dropout,
            ..Attention::bidirectional(2, 2)
        },
    }
}

#[test]
fn of_attention_weights_where_something_is_trained() {
    let (mut p, mut plain) = (parameters(), parameters());
    let (layer, without) = (attention(&mut p, 0.5), attention(&mut plain, 0.0));
    fill(&mut p, 1);
    fill(&mut plain, 1);
    let run = |layer: &SelfAttention, mut f: Forward| {
        let (x, offsets) = (
            f.input(tensor(&values(2, &[6, 4]))),
            f.input(ids(&[0, 2, 6])),
        );
        array(layer.forward(&mut f, &x, &offsets).unwrap().value())
    };
    let want = run(&without, Forward::evaluate(&plain));
    assert_eq!(run(&layer, Forward::evaluate(&p)), want);
    let all = everything(&p);
    assert_ne!(run(&layer, Forward::train(&p, &all, 0, 0)), want);
    // What comes before the first trained layer computes the same in every step.
    let rules = ["freeze *", "train output.*"]
        .map(|rule| rule.parse().unwrap())
        .to_vec();
    let output_only = FreezePolicy { rules }.resolve(&p).unwrap();
    assert_eq!(run(&layer, Forward::train(&p, &output_only, 0, 0)), want);
}
