//! Adapters beside weights that are held in short types or as codes.

use graft_nn::Error;
use graft_tensor::ops;

use super::*;

/// A layer of 70 to 33 with an adapter, whose weight is held so, or as f32 numbers that such a weight stands for.
fn adapted(conv1d: bool, method: Method, held: DType, dense: bool) -> (Parameters, Linear) {
    let mut p = Parameters::new(&Memory::cpu(), DType::F32);
    let layer = layer(&mut p, conv1d, true, 70, 33);
    p.hold(layer.weight(), held).unwrap();
    p.initialise(3).unwrap();
    assert_eq!(p.value(layer.weight()).unwrap().dtype(), held);
    if dense {
        let m = Memory::cpu();
        let numbers = ops::cast(&m, p.value(layer.weight()).unwrap(), DType::F32).unwrap();
        p.hold(layer.weight(), DType::F32).unwrap();
        p.set(layer.weight(), numbers).unwrap();
    }
    put(&mut p, method);
    p.initialise(5).unwrap();
    finish(&mut p, DEFAULT, 5).unwrap();
    // An adapter that does something: b begins as zeros.
    if let Some(b) = p.lookup("a.lora_B.default.weight") {
        let shape = *p.get(b).shape();
        p.set(b, tensor(&values(4, &shape))).unwrap();
    }
    (p, layer)
}

/// The output and every gradient of a step.
fn step(p: &Parameters, layer: &Linear) -> Vec<Vec<u8>> {
    let set = FreezePolicy {
        rules: rules(p, DEFAULT),
    };
    let set = set.resolve(p).unwrap();
    let x = ops::cast(&Memory::cpu(), &tensor(&values(8, &[5, 70])), DType::F32).unwrap();
    let mut f = Forward::train(p, &set, 1, 2);
    let x = f.input(x);
    let y = layer.activated(&mut f, &x, Activation::Gelu).unwrap();
    let mut all = vec![y.value().to_bytes().unwrap()];
    let loss = f.tape.sum_all(&y).unwrap();
    let mut gradients = Gradients::new();
    f.backward(loss, &mut gradients).unwrap();
    assert!(!gradients.is_empty());
    all.extend(gradients.iter().map(|(_, g)| g.to_bytes().unwrap()));
    all
}

#[test]
fn a_step_beside_codes_is_the_step_beside_their_numbers() {
    let dora = LowRankConfig {
        magnitude: true,
        ..low_rank(4)
    };
    let ia3 = Method::Ia3 {
        feedforward: Vec::new(),
    };
    let methods = [Method::LowRank(low_rank(4)), Method::LowRank(dora), ia3];
    for held in [DType::Bf16, DType::Nf4, DType::Int8] {
        for (method, conv1d) in methods.iter().flat_map(|m| [(m, false), (m, true)]) {
            let (p, layer) = adapted(conv1d, method.clone(), held, false);
            let (q, same) = adapted(conv1d, method.clone(), held, true);
            assert!(
                step(&p, &layer) == step(&q, &same),
                "{held} {method:?} {conv1d}"
            );
        }
    }
}

/// GPT-2's matrices are turned first, as bitsandbytes is given them.
#[test]
fn codes_do_not_depend_on_how_the_weight_lies() {
    let (p, layer) = adapted(true, Method::LowRank(low_rank(4)), DType::Nf4, false);
    let weight = p.value(layer.weight()).unwrap();
    assert_eq!(weight.shape()[..], [70, 33]);
    let mut plain = Parameters::new(&Memory::cpu(), DType::F32);
    let id = Linear::conv1d(&mut plain, "a", 70, 33, 0.02)
        .unwrap()
        .weight();
    plain.initialise(3).unwrap();
    let turned = plain.value(id).unwrap().t().unwrap();
    let codes = ops::quantise(&Memory::cpu(), &turned, DType::Nf4).unwrap();
    assert_eq!(weight.to_bytes().unwrap(), codes.to_bytes().unwrap());
}

#[test]
fn a_merge_holds_what_it_changed_in_full() {
    for held in [DType::Bf16, DType::Nf4, DType::Int8] {
        let (mut p, layer) = adapted(false, Method::LowRank(low_rank(4)), held, false);
        let x = ops::cast(&Memory::cpu(), &tensor(&values(8, &[5, 70])), DType::F32).unwrap();
        let run = |p: &Parameters| {
            let mut f = Forward::evaluate(p);
            let x = f.input(x.clone());
            array(layer.forward(&mut f, &x).unwrap().value())
        };
        let apart = run(&p);
        adapters::merge(&mut p).unwrap();
        assert_eq!(p.value(layer.weight()).unwrap().dtype(), DType::F32);
        near(&run(&p), &apart, 1e-5);
    }
}

#[test]
fn plans_count_codes_and_other_kinds_are_refused() {
    let (p, _) = adapted(false, Method::LowRank(low_rank(4)), DType::Nf4, false);
    let live = |p: &Parameters| p.memory().usage().live(Category::Weights);
    assert_eq!(live(&p), live(&p.planned().unwrap()));
    let expected = DType::Nf4.bytes(33 * 70) + 4 * (33 + 4 * 70 + 33 * 4);
    assert_eq!(live(&p), expected);

    let mut p = Parameters::new(&Memory::cpu(), DType::F32);
    let table = Embedding::new(&mut p, "t", 10, 64, 0.02).unwrap();
    let error = p.hold(table.weight(), DType::Nf4).unwrap_err().to_string();
    assert!(error.contains("nf4 for t.weight"), "{error}");
    let id = Linear::new(&mut p, "a", 64, 8, 0.02).unwrap().weight();
    assert!(p.hold(id, DType::F64).is_err());
    p.hold(id, DType::Int8).unwrap();
    let mut bad = vec![1.0f32; 512];
    bad[3] = f32::INFINITY;
    let bad = Tensor::from_vec(&Memory::cpu(), bad, &[8, 64]).unwrap();
    let error = p.set(id, bad).unwrap_err();
    assert!(matches!(error, Error::Held { .. }));
    let said = error.to_string();
    assert!(
        said.starts_with("a.weight cannot be held in int8"),
        "{said}"
    );

    let pissa = LowRankConfig {
        init: LowRankInit::Pissa,
        ..low_rank(4)
    };
    put(&mut p, Method::LowRank(pissa));
    p.initialise(1).unwrap();
    let error = finish(&mut p, DEFAULT, 5).unwrap_err().to_string();
    assert!(error.contains("a.weight is held in int8"), "{error}");
}
