//! Adapters: values against the dense formulas, gradients, beginnings, merging, and what is trained.

use graft_autograd::{Gradients, Var};
use graft_nn::adapters::{
    self, Adapter, AdapterConfig, Bias, DEFAULT, LowRankConfig, LowRankInit, Method, Modules,
    Targets, attach, finish, rules,
};
use graft_nn::layers::{Embedding, Linear};
use graft_nn::optimizer::Rule as Update;
use graft_nn::{Forward, FreezePolicy, Optimizer, ParamId, Parameters, Rule, TrainableSet};
use graft_tensor::ops::Activation;
use graft_tensor::{Category, DType, Memory, Tensor};
use ndarray::{Array2, ArrayD, Axis, Ix2, IxDyn};

use crate::common::*;

fn config(method: Method) -> AdapterConfig {
    AdapterConfig {
        method,
        targets: Targets::AllLinear,
        exclude: Vec::new(),
        layers: None,
        layers_pattern: Vec::new(),
        modules_to_save: Vec::new(),
        bias: Bias::None,
    }
}

/// A rank and an alpha that differ.
fn low_rank(rank: usize) -> LowRankConfig {
    LowRankConfig {
        alpha: 0.7 + rank as f64,
        ..LowRankConfig::lora(rank)
    }
}

fn put(p: &mut Parameters, method: Method) {
    attach(p, DEFAULT, &config(method), Modules::InPlace).unwrap();
}

fn layer(p: &mut Parameters, conv1d: bool, bias: bool, inputs: usize, outputs: usize) -> Linear {
    match (conv1d, bias) {
        (true, _) => Linear::conv1d(p, "a", inputs, outputs, 0.02),
        (false, true) => Linear::new(p, "a", inputs, outputs, 0.02),
        (false, false) => Linear::without_bias(p, "a", inputs, outputs, 0.02),
    }
    .unwrap()
}

fn matrix(x: &ArrayD<f64>) -> Array2<f64> {
    x.clone().into_dimensionality::<Ix2>().unwrap()
}

fn named(p: &Parameters, name: &str) -> ArrayD<f64> {
    value(p, p.find(name).unwrap())
}

/// The weight as `[out, in]`.
fn out_by_in(p: &Parameters, layer: &Linear, conv1d: bool) -> Array2<f64> {
    let w = matrix(&value(p, layer.weight()));
    if conv1d { w.reversed_axes() } else { w }
}

fn with_bias(p: &Parameters, layer: &Linear, y: Array2<f64>) -> ArrayD<f64> {
    match layer.bias() {
        Some(bias) => y.into_dyn() + value(p, bias),
        None => y.into_dyn(),
    }
}

fn change(p: &Parameters, scale: f64) -> Array2<f64> {
    let b = matrix(&named(p, "a.lora_B.default.weight"));
    b.dot(&matrix(&named(p, "a.lora_A.default.weight"))) * scale
}

fn lengths(w: &Array2<f64>) -> ArrayD<f64> {
    w.map_axis(Axis(1), |row| row.dot(&row).sqrt()).into_dyn()
}

#[test]
fn lora_adds_a_low_rank_matrix() {
    cases(
        |seed, [rows, inputs, outputs, rank], [conv1d, bias, stabilised]| {
            let mut p = parameters();
            let layer = layer(&mut p, conv1d, bias, inputs, outputs);
            let method = LowRankConfig {
                rank_stabilised: stabilised,
                ..low_rank(rank)
            };
            put(&mut p, Method::LowRank(method));
            fill(&mut p, seed);
            let x = values(seed, &[rows, inputs]);
            let y = checked(&p, &[tensor(&x)], seed, |f, v| {
                layer.activated(f, &v[0], Activation::Tanh)
            });
            let divisor = match stabilised {
                true => (rank as f64).sqrt(),
                false => rank as f64,
            };
            let w = out_by_in(&p, &layer, conv1d) + change(&p, (0.7 + rank as f64) / divisor);
            let want = with_bias(&p, &layer, matrix(&x).dot(&w.t()));
            near(&y, &want.mapv(f64::tanh), 1e-12);
        },
    );
}

#[test]
fn lora_on_an_embedding() {
    cases(|seed, [tokens, rows, width, rank], _| {
        let mut p = parameters();
        let table = Embedding::new(&mut p, "words", rows, width, 0.02).unwrap();
        let names = AdapterConfig {
            targets: Targets::Names(vec!["words".into()]),
            ..config(Method::LowRank(low_rank(rank)))
        };
        attach(&mut p, DEFAULT, &names, Modules::InPlace).unwrap();
        fill(&mut p, seed);
        let index: Vec<i64> = (0..tokens).map(|i| ((i * 7 + 3) % rows) as i64).collect();
        let y = checked(&p, &[ids(&index)], seed, |f, v| table.forward(f, &v[0]));
        let a = matrix(&named(&p, "words.lora_embedding_A.default"));
        let b = matrix(&named(&p, "words.lora_embedding_B.default"));
        let scale = (0.7 + rank as f64) / rank as f64;
        let w = matrix(&value(&p, table.weight())) + b.dot(&a).reversed_axes() * scale;
        let index: Vec<usize> = index.iter().map(|&i| i as usize).collect();
        near(&y, &w.select(Axis(0), &index).into_dyn(), 1e-12);
        adapters::merge(&mut p).unwrap();
        near(&value(&p, table.weight()), &w.into_dyn(), 1e-12);
    });
}

#[test]
fn ia3_scales_outputs_or_inputs() {
    cases(
        |seed, [rows, inputs, outputs, _], [conv1d, bias, feedforward]| {
            let mut p = parameters();
            let layer = layer(&mut p, conv1d, bias, inputs, outputs);
            let feedforward = if feedforward {
                vec!["a".into()]
            } else {
                vec![]
            };
            let input = !feedforward.is_empty();
            put(&mut p, Method::Ia3 { feedforward });
            fill(&mut p, seed);
            let x = values(seed, &[rows, inputs]);
            let y = checked(&p, &[tensor(&x)], seed, |f, v| {
                layer.activated(f, &v[0], Activation::Silu)
            });
            let factors = named(&p, "a.ia3_l.default");
            let shape = if input { [1, inputs] } else { [outputs, 1] };
            assert_eq!(factors.shape(), shape);
            let flat = factors.iter().copied().collect::<ndarray::Array1<f64>>();
            let w = out_by_in(&p, &layer, conv1d);
            let want = match input {
                true => with_bias(&p, &layer, (matrix(&x) * &flat).dot(&w.t())),
                false => with_bias(&p, &layer, matrix(&x).dot(&w.t())) * &flat,
            };
            near(&y, &want.mapv(|x| x / (1.0 + (-x).exp())), 1e-12);
        },
    );
}

#[test]
fn dora_trains_lengths_and_directions_apart() {
    cases(
        |seed, [rows, inputs, outputs, rank], [conv1d, bias, activated]| {
            let mut p = parameters();
            let layer = layer(&mut p, conv1d, bias, inputs, outputs);
            let method = LowRankConfig {
                magnitude: true,
                ..low_rank(rank)
            };
            put(&mut p, Method::LowRank(method));
            fill(&mut p, seed);
            let scale = (0.7 + rank as f64) / rank as f64;
            let x = values(seed, &[rows, inputs]);
            let run = |f: &mut Forward, x: &Var| match activated {
                true => layer.activated(f, x, Activation::Gelu),
                false => layer.forward(f, x),
            };
            let w = out_by_in(&p, &layer, conv1d) + change(&p, scale);
            let magnitude = named(&p, "a.lora_magnitude_vector.default.weight");
            let factors = magnitude / lengths(&w);
            let mut f = Forward::evaluate(&p);
            let input = f.input(tensor(&x));
            let y = run(&mut f, &input).unwrap();
            let plain = matrix(&x).dot(&w.t()).into_dyn() * &factors;
            let want = match layer.bias() {
                Some(bias) => plain + value(&p, bias),
                None => plain,
            };
            if !activated {
                near(&array(y.value()), &want, 1e-9);
            }

            // The gradients are those of the same function with the lengths held still.
            let set = everything(&p);
            let gradients = |run: &dyn Fn(&mut Forward, &Var) -> Var| {
                let mut f = Forward::train(&p, &set, 0, 0);
                let x = tensor(&x);
                let x = f.tape.parameter(99, "x", &x, true);
                let y = run(&mut f, &x);
                let loss = f.tape.unary(graft_tensor::ops::Unary::Square, &y).unwrap();
                let loss = f.tape.sum_all(&loss).unwrap();
                let mut found = Gradients::new();
                f.backward(loss, &mut found).unwrap();
                found
            };
            let found = gradients(&|f, x| run(f, x).unwrap());
            let lengths = tensor(&lengths(&w));
            let find = |name: &str| p.find(name).unwrap();
            let want = gradients(&|f, x| {
                let mut get = |id: ParamId| f.parameter(id).unwrap();
                let a = get(find("a.lora_A.default.weight"));
                let b = get(find("a.lora_B.default.weight"));
                let m = get(find("a.lora_magnitude_vector.default.weight"));
                let w = get(layer.weight());
                let bias = layer.bias().map(get);
                let linear = graft_tensor::ops::Linear {
                    layout: match conv1d {
                        true => graft_tensor::ops::WeightLayout::InOut,
                        false => graft_tensor::ops::WeightLayout::OutIn,
                    },
                    activation: None,
                };
                let t = &mut f.tape;
                let lora = graft_tensor::ops::Lora {
                    linear,
                    scale,
                    dropout: 0.0,
                };
                let y = t.lora(x, &w, None, [&a, &b], lora).unwrap();
                let lengths = t.input(lengths.clone());
                let factor = t.div(&m, &lengths).unwrap();
                let mut y = t.mul(&y, &factor).unwrap();
                if let Some(bias) = bias {
                    y = t.add(&y, &bias).unwrap();
                }
                match activated {
                    true => t.unary(graft_tensor::ops::Unary::Gelu, &y).unwrap(),
                    false => y,
                }
            });
            assert_eq!(found.len(), want.len());
            for (key, want) in want.iter() {
                near(&array(found.get(key).unwrap()), &array(want), 1e-8);
            }
        },
    );
}

/// Every method in both layouts, with an alpha that is not the rank.
#[test]
fn a_merged_layer_computes_what_base_and_adapter_did() {
    cases(
        |seed, [rows, inputs, outputs, rank], [conv1d, bias, other]| {
            let methods = [
                Method::LowRank(LowRankConfig {
                    rank_stabilised: other,
                    ..low_rank(rank)
                }),
                Method::LowRank(LowRankConfig {
                    magnitude: true,
                    ..low_rank(rank)
                }),
                Method::Ia3 {
                    feedforward: if other { vec!["a".into()] } else { vec![] },
                },
            ];
            for method in methods {
                let mut p = parameters();
                let layer = layer(&mut p, conv1d, bias, inputs, outputs);
                put(&mut p, method);
                fill(&mut p, seed);
                let x = tensor(&values(seed, &[rows, inputs]));
                let run = |p: &Parameters| {
                    let mut f = Forward::evaluate(p);
                    let x = f.input(x.clone());
                    array(layer.forward(&mut f, &x).unwrap().value())
                };
                let apart = run(&p);
                adapters::merge(&mut p).unwrap();
                assert!(p.adapters().active().is_none());
                near(&run(&p), &apart, 1e-9);
            }
        },
    );
}

fn initialised(conv1d: bool, sizes: [usize; 2], method: LowRankConfig) -> (Parameters, Linear) {
    let mut p = parameters();
    let layer = layer(&mut p, conv1d, true, sizes[0], sizes[1]);
    p.initialise(3).unwrap();
    put(&mut p, Method::LowRank(method));
    p.initialise(5).unwrap();
    finish(&mut p, DEFAULT, 5).unwrap();
    (p, layer)
}

/// Whatever an adapter begins with, the model begins as its base.
#[test]
fn every_beginning_leaves_the_model_as_it_was() {
    let inits = [
        LowRankInit::Kaiming,
        LowRankInit::Gaussian,
        LowRankInit::Orthogonal,
        LowRankInit::Pissa,
    ];
    for init in inits {
        for (conv1d, magnitude) in [(false, false), (true, false), (false, true), (true, true)] {
            let method = LowRankConfig {
                init,
                magnitude,
                ..low_rank(4)
            };
            let (p, layer) = initialised(conv1d, [12, 9], method.clone());
            let (mut q, same) = initialised(conv1d, [12, 9], low_rank(4));
            q.adapters_mut().activate(None).unwrap();
            let x = tensor(&values(8, &[5, 12]));
            let run = |p: &Parameters, layer: &Linear| {
                let mut f = Forward::evaluate(p);
                let x = f.input(x.clone());
                array(layer.forward(&mut f, &x).unwrap().value())
            };
            near(&run(&p, &layer), &run(&q, &same), 1e-9);
            let a = named(&p, "a.lora_A.default.weight");
            assert!(a.iter().any(|x| *x != 0.0), "{init:?}");
            let b = named(&p, "a.lora_B.default.weight");
            let random = matches!(init, LowRankInit::Orthogonal | LowRankInit::Pissa);
            assert_eq!(b.iter().any(|x| *x != 0.0), random, "{init:?}");
            if magnitude {
                let m = named(&p, "a.lora_magnitude_vector.default.weight");
                let w = out_by_in(&p, &layer, conv1d) + change(&p, method.scale(4, 4.7));
                near(&m, &lengths(&w), 1e-12);
            }
        }
    }
}

#[test]
fn the_usual_beginnings_have_their_distributions() {
    let (p, _) = initialised(false, [400, 30], low_rank(8));
    let a = named(&p, "a.lora_A.default.weight");
    let bound = 1.0 / 400f64.sqrt();
    assert!(a.iter().all(|x| x.abs() <= bound));
    let variance = a.mapv(|x| x * x).mean().unwrap();
    assert!(
        (variance / (bound * bound / 3.0) - 1.0).abs() < 0.1,
        "{variance}"
    );
    let gaussian = LowRankConfig {
        init: LowRankInit::Gaussian,
        ..low_rank(8)
    };
    let (p, _) = initialised(false, [400, 30], gaussian);
    let a = named(&p, "a.lora_A.default.weight");
    let variance = a.mapv(|x| x * x).mean().unwrap();
    assert!((variance * 64.0 - 1.0).abs() < 0.1, "{variance}");
}

/// PiSSA takes out the largest singular values: what is left is as small as the others allow.
#[test]
fn pissa_takes_the_principal_part() {
    let (inputs, outputs, rank) = (30, 20, 4);
    let spectrum = |k: usize| 4.0 * 0.8f64.powi(k as i32);
    let mut w = Array2::zeros((outputs, inputs));
    let (left, right) = (rows_of(outputs, 1), rows_of(inputs, 2));
    for k in 0..outputs {
        for i in 0..outputs {
            for j in 0..inputs {
                w[(i, j)] += spectrum(k) * left[(k, i)] * right[(k, j)];
            }
        }
    }
    for conv1d in [false, true] {
        let mut p = parameters();
        let layer = layer(&mut p, conv1d, true, inputs, outputs);
        p.initialise(3).unwrap();
        let stored = if conv1d { w.t().to_owned() } else { w.clone() };
        p.set(layer.weight(), tensor(&stored.into_dyn())).unwrap();
        let method = LowRankConfig {
            init: LowRankInit::Pissa,
            ..low_rank(rank)
        };
        let scale = method.scale(rank, method.alpha);
        put(&mut p, Method::LowRank(method));
        p.initialise(5).unwrap();
        finish(&mut p, DEFAULT, 5).unwrap();
        let rest = out_by_in(&p, &layer, conv1d);
        let all = &rest + &change(&p, scale);
        near(&all.into_dyn(), &w.clone().into_dyn(), 1e-12);
        let left: f64 = rest.iter().map(|x| x * x).sum();
        let least: f64 = (rank..outputs).map(|k| spectrum(k).powi(2)).sum();
        assert!(
            (left / least - 1.0).abs() < 1e-3,
            "{left} is left, {least} must be"
        );
        let set = p.adapters().active().unwrap();
        let [a, _] = set.residual(layer.weight()).unwrap();
        near(&array(a), &named(&p, "a.lora_A.default.weight"), 0.0);
    }
}

/// Orthonormal rows.
fn rows_of(n: usize, seed: u64) -> Array2<f64> {
    let mut q = matrix(&values(seed, &[n, n]));
    for i in 0..n {
        for j in 0..i {
            let along = q.row(i).dot(&q.row(j));
            let other = q.row(j).to_owned();
            q.row_mut(i).scaled_add(-along, &other);
        }
        let length = q.row(i).dot(&q.row(i)).sqrt();
        q.row_mut(i).mapv_inplace(|x| x / length);
    }
    q
}

fn two_layers(memory: &Memory, dtype: DType) -> (Parameters, [Linear; 2]) {
    let mut p = Parameters::new(memory, dtype);
    let layers = [
        Linear::new(&mut p, "trunk.query", 24, 24, 0.1).unwrap(),
        Linear::new(&mut p, "classifier", 24, 3, 0.1).unwrap(),
    ];
    (p, layers)
}

fn with_head(method: Method) -> AdapterConfig {
    AdapterConfig {
        modules_to_save: vec!["classifier".into()],
        ..config(method)
    }
}

fn trained(p: &Parameters) -> TrainableSet {
    let rules = rules(p, DEFAULT);
    FreezePolicy { rules }.resolve(p).unwrap()
}

#[test]
fn the_adapter_and_what_it_keeps_are_trained_and_nothing_else() {
    let names = |config: &AdapterConfig| {
        let (mut p, _) = two_layers(&Memory::cpu(), DType::F32);
        attach(&mut p, DEFAULT, config, Modules::InPlace).unwrap();
        let set = trained(&p);
        let names = set.ids().map(|id| p.get(id).name().to_owned());
        names.collect::<Vec<_>>()
    };
    let lora = with_head(Method::LowRank(low_rank(2)));
    let head = ["classifier.weight", "classifier.bias"];
    let matrices = [
        "trunk.query.lora_A.default.weight",
        "trunk.query.lora_B.default.weight",
    ];
    assert_eq!(names(&lora), [head, matrices].concat());
    let all = AdapterConfig {
        bias: Bias::All,
        ..lora.clone()
    };
    let bias = ["trunk.query.bias"];
    assert_eq!(names(&all), [&bias[..], &head, &matrices].concat());
    let adapted = AdapterConfig {
        bias: Bias::Adapted,
        ..lora
    };
    assert_eq!(names(&adapted), names(&all));
    let ia3 = with_head(Method::Ia3 {
        feedforward: vec![],
    });
    let vector = ["trunk.query.ia3_l.default"];
    assert_eq!(names(&ia3), [&head[..], &vector].concat());
}

/// Gradients and the optimizer's state exist for what is trained alone: 4 bytes of gradient and exactly 8 of AdamW's
/// state for each number.
#[test]
fn a_trained_number_costs_eight_bytes_of_state_and_a_frozen_one_nothing() {
    let usage = |memory: Memory| {
        let (mut p, [query, head]) = two_layers(&memory, DType::F32);
        let config = with_head(Method::LowRank(LowRankConfig {
            dropout: 0.1,
            ..low_rank(2)
        }));
        attach(&mut p, DEFAULT, &config, Modules::InPlace).unwrap();
        p.initialise(1).unwrap();
        finish(&mut p, DEFAULT, 1).unwrap();
        let set = trained(&p);
        let count = set.count(&p);
        assert_eq!(count, 2 * 24 + 24 * 2 + 3 * 24 + 3);
        let mut optimizer = Optimizer::new(Update::adamw(), 0.1, true).unwrap();
        for step in 0..2 {
            let mut f = Forward::train(&p, &set, 0, step);
            let x = f.input(Tensor::full(&memory, DType::F32, &[5, 24], 1.0).unwrap());
            let y = query.activated(&mut f, &x, Activation::Gelu).unwrap();
            let y = head.forward(&mut f, &y).unwrap();
            let loss = f.tape.sum_all(&y).unwrap();
            drop((x, y));
            let mut found = Gradients::new();
            f.backward(loss, &mut found).unwrap();
            assert_eq!(memory.usage().live(Category::Gradients), 4 * count);
            optimizer
                .step(&mut p, &set, &mut found, 0.1, Some(1.0))
                .unwrap();
            assert_eq!(optimizer.state_bytes(), 8 * count);
            assert_eq!(memory.usage().live(Category::Optimizer), 8 * count);
        }
        memory.usage()
    };
    assert_eq!(usage(Memory::cpu()), usage(Memory::planned()));
}

/// The adapter's gradients are those of the run that trains everything.
#[test]
fn a_frozen_base_leaves_the_adapter_s_gradients_as_they_are() {
    let memory = Memory::cpu();
    let (mut p, [query, head]) = two_layers(&memory, DType::F32);
    let method = LowRankConfig {
        dropout: 0.2,
        ..low_rank(2)
    };
    let config = with_head(Method::LowRank(method));
    attach(&mut p, DEFAULT, &config, Modules::InPlace).unwrap();
    let all: Vec<_> = p.iter().map(|(id, one)| (id, *one.shape())).collect();
    for (id, shape) in all {
        p.set(id, tensor(&values(id.key() as u64, &shape))).unwrap();
    }
    let run = |set: &TrainableSet| {
        let mut f = Forward::train(&p, set, 4, 2);
        let x = f.input(Tensor::full(&memory, DType::F32, &[5, 24], 0.7).unwrap());
        let y = query.activated(&mut f, &x, Activation::Gelu).unwrap();
        let y = head.forward(&mut f, &y).unwrap();
        let loss = f.tape.sum_all(&y).unwrap();
        let mut found = Gradients::new();
        f.backward(loss, &mut found).unwrap();
        found
    };
    let set = trained(&p);
    let (some, full) = (run(&set), run(&everything(&p)));
    assert_eq!((some.len(), full.len()), (set.len(), p.len()));
    for (key, gradient) in some.iter() {
        let same = full.get(key).unwrap().to_f64().unwrap();
        assert_eq!(gradient.to_f64().unwrap(), same);
    }
}

/// Dropout is in the adapter's path alone, in training, and where the adapter is trained.
#[test]
fn dropout_acts_on_what_the_adapter_sees() {
    let memory = Memory::cpu();
    let (mut p, [query, _]) = two_layers(&memory, DType::F64);
    let method = LowRankConfig {
        dropout: 0.5,
        ..low_rank(2)
    };
    let config = with_head(Method::LowRank(method));
    attach(&mut p, DEFAULT, &config, Modules::InPlace).unwrap();
    fill(&mut p, 3);
    let x = tensor(&values(1, &[6, 24]));
    let run = |mut f: Forward| {
        let x = f.input(x.clone());
        array(query.forward(&mut f, &x).unwrap().value())
    };
    let still = run(Forward::evaluate(&p));
    let set = trained(&p);
    let moving = run(Forward::train(&p, &set, 1, 1));
    assert_ne!(moving, still);
    assert_eq!(run(Forward::train(&p, &set, 1, 1)), moving);
    let head = FreezePolicy {
        rules: vec![Rule::freeze("*"), Rule::train("classifier.*")],
    };
    let head = head.resolve(&p).unwrap();
    assert_eq!(run(Forward::train(&p, &head, 1, 1)), still);
    // Without the adapter's own product nothing is dropped.
    let b = p.find("trunk.query.lora_B.default.weight").unwrap();
    p.set(b, tensor(&ArrayD::zeros(IxDyn(&[24, 2])))).unwrap();
    let run = |mut f: Forward| {
        let x = f.input(x.clone());
        array(query.forward(&mut f, &x).unwrap().value())
    };
    near(
        &run(Forward::train(&p, &set, 1, 1)),
        &run(Forward::evaluate(&p)),
        1e-12,
    );
}

#[test]
fn several_adapters_lie_beside_one_base() {
    let (mut p, [query, head]) = two_layers(&Memory::cpu(), DType::F64);
    let lora = with_head(Method::LowRank(low_rank(2)));
    let ia3 = with_head(Method::Ia3 {
        feedforward: vec![],
    });
    // The second one's head knows five labels.
    let shape = |labels: usize| {
        move |name: &str| match name {
            "classifier.weight" => Some(vec![labels, 24]),
            "classifier.bias" => Some(vec![labels]),
            _ => None,
        }
    };
    attach(&mut p, "one", &lora, Modules::Copies(&shape(3))).unwrap();
    attach(&mut p, "two", &ia3, Modules::Copies(&shape(5))).unwrap();
    fill(&mut p, 3);
    let x = tensor(&values(1, &[4, 24]));
    let run = |p: &Parameters| {
        let mut f = Forward::evaluate(p);
        let x = f.input(x.clone());
        let y = query.forward(&mut f, &x).unwrap();
        array(head.forward(&mut f, &y).unwrap().value())
    };
    assert_eq!(p.adapters().active().unwrap().name(), "two");
    let two = run(&p);
    assert_eq!(two.shape(), [4, 5]);
    p.adapters_mut().activate(Some("one")).unwrap();
    let one = run(&p);
    assert_eq!(one.shape(), [4, 3]);
    p.adapters_mut().activate(None).unwrap();
    let none = run(&p);
    assert_ne!(none, one);
    p.adapters_mut().activate(Some("two")).unwrap();
    assert_eq!(run(&p), two);
    let error = p.adapters_mut().activate(Some("tow")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no adapter is called tow; the nearest is two"
    );
    adapters::merge(&mut p).unwrap();
    near(&run(&p), &two, 1e-12);
    for (id, parameter) in p.iter() {
        let anchor = p.get(p.adapters().anchor(id)).name();
        assert!(
            parameter
                .name()
                .starts_with(anchor.rsplit_once('.').unwrap().0)
        );
    }
}

#[test]
fn adapters_that_cannot_be_are_refused() {
    let refused = |config: &AdapterConfig, name: &str| {
        let (mut p, _) = two_layers(&Memory::cpu(), DType::F32);
        Embedding::new(&mut p, "words", 7, 24, 0.1).unwrap();
        graft_nn::layers::LayerNorm::new(&mut p, "trunk.norm", 24, 1e-5).unwrap();
        let before = p.len();
        let error = attach(&mut p, name, config, Modules::InPlace).unwrap_err();
        assert_eq!(p.adapters().sets().count(), 0);
        assert!(p.len() <= before + 2);
        error.to_string()
    };
    let names = |list: &[&str], method: Method| AdapterConfig {
        targets: Targets::Names(list.iter().map(|s| (*s).to_owned()).collect()),
        ..config(method)
    };
    let lora = |change: fn(&mut LowRankConfig)| {
        let mut c = low_rank(2);
        change(&mut c);
        Method::LowRank(c)
    };
    let plain = |_: &mut LowRankConfig| {};
    for (config, said) in [
        (
            names(&["qeury"], lora(plain)),
            "no layer's name ends in the target qeury; the nearest name is trunk.query",
        ),
        (
            names(&["norm"], lora(plain)),
            "trunk.norm cannot have an adapter: it is neither a linear layer nor an embedding",
        ),
        (
            names(&["words"], lora(|c| c.magnitude = true)),
            "words cannot have an adapter: it is an embedding, and DoRA is for linear layers",
        ),
        (
            names(
                &["words"],
                Method::Ia3 {
                    feedforward: vec![],
                },
            ),
            "words cannot have an adapter: it is an embedding, and IA3 scales linear layers",
        ),
        (
            names(&["query"], lora(|c| c.rank = 0)),
            "trunk.query: a rank of 0; it must be 1 or more",
        ),
        (
            names(&["query"], lora(|c| c.dropout = 1.0)),
            "trunk.query: a dropout of 1; it must be in [0, 1)",
        ),
        (
            names(
                &["query"],
                lora(|c| {
                    c.rank = 3;
                    c.init = LowRankInit::Orthogonal;
                }),
            ),
            "trunk.query: an odd rank of 3; orthogonal matrices need an even one",
        ),
        (
            names(
                &["classifier"],
                lora(|c| {
                    c.rank = 4;
                    c.init = LowRankInit::Pissa;
                }),
            ),
            "classifier: a rank of 4, but it has 3 singular vectors; take a smaller rank",
        ),
        (
            AdapterConfig {
                targets: Targets::Regex("nothing".into()),
                ..config(lora(plain))
            },
            "no layer is a target of the adapter; name targets that the model has",
        ),
        (
            AdapterConfig {
                modules_to_save: vec!["score".into()],
                ..config(lora(plain))
            },
            "no module's name ends in score, which is to be kept; the nearest name is",
        ),
    ] {
        let found = refused(&config, DEFAULT);
        assert!(found.starts_with(said), "{found}");
    }
    let dotted = refused(&config(lora(plain)), "a.b");
    assert!(
        dotted.starts_with("an adapter cannot be called \"a.b\""),
        "{dotted}"
    );
    let (mut p, _) = two_layers(&Memory::cpu(), DType::F32);
    let config = config(lora(plain));
    attach(&mut p, "one", &config, Modules::InPlace).unwrap();
    let error = attach(&mut p, "one", &config, Modules::InPlace).unwrap_err();
    assert!(error.to_string().starts_with("two adapters are called one"));
    let adapter = p.adapters().of(p.find("trunk.query.weight").unwrap());
    assert!(matches!(adapter, Some(Adapter::LowRank(_))));
}
