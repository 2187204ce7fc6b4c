//! What layers with adapters compute, alone and merged.

use graft_tensor::ops::{self, Unary};

use super::*;

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
fn a_bottleneck_adds_two_small_layers_to_the_output() {
    cases(
        |seed, [rows, inputs, outputs, size], [conv1d, bias, activated]| {
            let mut p = parameters();
            let layer = layer(&mut p, conv1d, bias, inputs, outputs);
            put(&mut p, Method::Bottleneck { size });
            fill(&mut p, seed);
            let x = values(seed, &[rows, inputs]);
            let y = checked(&p, &[tensor(&x)], seed, |f, v| match activated {
                true => layer.activated(f, &v[0], Activation::Tanh),
                false => layer.forward(f, &v[0]),
            });
            let mut own = with_bias(
                &p,
                &layer,
                matrix(&x).dot(&out_by_in(&p, &layer, conv1d).t()),
            );
            if activated {
                own.mapv_inplace(f64::tanh);
            }
            let small = |x: &ArrayD<f64>, which: &str| {
                let at = |last: &str| named(&p, &format!("a.adapter_{which}.default.{last}"));
                matrix(x).dot(&matrix(&at("weight")).t()).into_dyn() + at("bias")
            };
            let inner = tensor(&small(&own, "down"));
            let inner = ops::unary(p.memory(), Unary::Gelu, &inner).unwrap();
            let inner = array(&inner);
            assert_eq!(inner.shape(), [rows, size]);
            near(&y, &(small(&inner, "up") + &own), 1e-10);
            let error = adapters::merge(&mut p).unwrap_err().to_string();
            assert!(error.contains("cannot be merged"), "{error}");
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
            // A squared length is a sum of three terms, of a size near 1, however little they leave of each other.
            let shortest = lengths(&w).fold(1.0, |least: f64, x| least.min(*x));
            let off = 1e-14 / (shortest * shortest);
            let mut f = Forward::evaluate(&p);
            let input = f.input(tensor(&x));
            let y = run(&mut f, &input).unwrap();
            let plain = matrix(&x).dot(&w.t()).into_dyn() * &factors;
            let want = match layer.bias() {
                Some(bias) => plain + value(&p, bias),
                None => plain,
            };
            if !activated {
                near(&array(y.value()), &want, 1e-9 + off);
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
                near(&array(found.get(key).unwrap()), &array(want), 1e-8 + off);
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
