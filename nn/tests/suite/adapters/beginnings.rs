//! What adapters begin with.

use super::*;

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

/// A bottleneck begins near the identity, and both of its matrices can have a gradient at once.
#[test]
fn a_bottleneck_begins_near_nothing() {
    let mut p = parameters();
    let layer = layer(&mut p, false, true, 12, 40);
    put(&mut p, Method::Bottleneck { size: 30 });
    p.initialise(5).unwrap();
    for which in ["down", "up"] {
        let weight = named(&p, &format!("a.adapter_{which}.default.weight"));
        let deviation = (weight.mapv(|x| x * x).sum() / weight.len() as f64).sqrt();
        assert!(
            (0.9e-3..1.1e-3).contains(&deviation),
            "{which}: {deviation}"
        );
        let bias = named(&p, &format!("a.adapter_{which}.default.bias"));
        assert!(bias.iter().all(|x| *x == 0.0));
    }
    let x = tensor(&values(8, &[5, 12]));
    let run = |p: &Parameters| {
        let mut f = Forward::evaluate(p);
        let x = f.input(x.clone());
        array(layer.forward(&mut f, &x).unwrap().value())
    };
    let adapted = run(&p);
    p.adapters_mut().activate(None).unwrap();
    near(&adapted, &run(&p), 1e-4);
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
