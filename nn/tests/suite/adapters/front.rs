//! Virtual tokens: where their rows stand, what attention makes of them, and what they begin as.

use graft_nn::adapters::{Fronted, begin_as, project};
use graft_nn::layers::SelfAttention;
use graft_tensor::ops::Attention;
use ndarray::{Array1, concatenate, s};

use super::*;

fn beside(method: Method, target: &str) -> AdapterConfig {
    AdapterConfig {
        targets: Targets::Names(vec![target.into()]),
        ..config(method)
    }
}

fn offsets(lengths: &[usize]) -> Vec<i64> {
    let mut all = vec![0];
    for n in lengths {
        all.push(all[all.len() - 1] + *n as i64);
    }
    all
}

#[test]
fn rows_stand_in_front_of_their_sequences() {
    cases(|seed, [count, width, first, second], [all, _, _]| {
        let mut p = parameters();
        let table = Embedding::new(&mut p, "words", 7, width, 0.02).unwrap();
        let method = Method::Prompt { tokens: count };
        attach(&mut p, DEFAULT, &beside(method, "words"), Modules::InPlace).unwrap();
        fill(&mut p, seed);
        let lengths = [first, 1, second];
        let fronted = Fronted::new(&offsets(&lengths), count, |i| all || i == 1);
        let index: Vec<i64> = (0..first + 1 + second)
            .map(|i| (i * 5 % 7) as i64)
            .collect();
        let run = |f: &mut Forward, v: &[Var]| {
            let x = table.forward(f, &v[0])?;
            let front = table.prompt(f)?.expect("a prompt is in use");
            fronted.insert(f, &front, &x)
        };
        let y = matrix(&checked(&p, &[ids(&index)], seed, run));
        let words = matrix(&value(&p, table.weight()));
        let prompt = matrix(&named(&p, "prompt_embeddings.default"));
        let (mut row, mut token) = (0, 0);
        for (i, n) in lengths.into_iter().enumerate() {
            assert_eq!(fronted.offsets()[i], row as i64);
            if all || i == 1 {
                assert_eq!(y.slice(s![row..row + count, ..]), prompt);
                row += count;
            }
            for _ in 0..n {
                assert_eq!(y.row(row), words.row(index[token] as usize));
                (row, token) = (row + 1, token + 1);
            }
        }
        assert_eq!((y.nrows(), fronted.offsets()[3]), (row, row as i64));
        let types: Vec<i64> = (1..=token as i64).collect();
        let filled = fronted.fill(&types);
        assert_eq!(filled.iter().filter(|x| **x == 0).count(), row - token);
        // And out again.
        let mut f = Forward::evaluate(&p);
        let y = f.input(tensor(&y.into_dyn()));
        let back = fronted.remove(&mut f, &y).unwrap();
        let index: Vec<usize> = index.iter().map(|&i| i as usize).collect();
        let want = words.select(Axis(0), &index).into_dyn();
        assert_eq!(array(back.value()), want);
    });
}

/// Softmax attention of one head, `[tokens, head_dim]`, behind `front` keys and values that come before the queries.
fn attended(
    q: &Array2<f64>,
    k: &Array2<f64>,
    v: &Array2<f64>,
    scale: f64,
    causal: bool,
) -> Array2<f64> {
    let front = k.nrows() - q.nrows();
    let mut y = Array2::zeros(q.raw_dim());
    for (i, query) in q.rows().into_iter().enumerate() {
        let seen = if causal { front + i + 1 } else { k.nrows() };
        let scores: Array1<f64> = k.slice(s![..seen, ..]).dot(&query) * scale;
        let most = scores.fold(f64::NEG_INFINITY, |a, &b| a.max(b));
        let weights = scores.mapv(|x| (x - most).exp());
        let row = weights.dot(&v.slice(s![..seen, ..])) / weights.sum();
        y.row_mut(i).assign(&row);
    }
    y
}

#[test]
fn a_prefix_is_keys_and_values_in_front_of_each_sequence() {
    cases(
        |seed, [heads, head_dim, tokens, first], [causal, projected, _]| {
            let width = heads * head_dim;
            let mut p = parameters();
            let mut linear = |name: &str| Linear::new(&mut p, name, 3, width, 0.1).unwrap();
            let (query, key, value_of) = (linear("query"), linear("key"), linear("value"));
            let output = Linear::new(&mut p, "output", width, 2, 0.1).unwrap();
            let layer = SelfAttention {
                query,
                key,
                value: value_of,
                output,
                attention: Attention {
                    causal,
                    ..Attention::bidirectional(heads, head_dim)
                },
            };
            let method = Method::Prefix {
                tokens,
                width,
                projection: projected.then_some(4),
            };
            attach(&mut p, DEFAULT, &beside(method, "key"), Modules::InPlace).unwrap();
            fill(&mut p, seed);
            project(&mut p).unwrap();
            let lengths = [first, 1, 3];
            let offsets = offsets(&lengths);
            let x = values(seed, &[first + 4, 3]);
            let product = p.find("prompt_embeddings.default").unwrap();
            let y = checked(&p, &[tensor(&x), ids(&offsets)], seed, |f, v| {
                let y = layer.forward(f, &v[0], &v[1])?;
                if !projected {
                    return Ok(y);
                }
                // The product itself takes no part: the check wants a gradient of each parameter, be it 0.
                let rows = f.parameter(product)?;
                let nothing = f.tape.sum_all(&rows)?;
                let nothing = f.tape.scale(&nothing, 0.0)?;
                let nothing = f.tape.reshape(&nothing, &[1])?;
                Ok(f.tape.add(&y, &nothing)?)
            });

            let of = |name: &str, x: &Array2<f64>| {
                let w = matrix(&named(&p, &format!("{name}.weight")));
                let b = named(&p, &format!("{name}.bias"));
                matrix(&(x.dot(&w.t()).into_dyn() + b))
            };
            let x = matrix(&x);
            let (q, k, v) = (of("query", &x), of("key", &x), of("value", &x));
            let rows = matrix(&named(&p, "prompt_embeddings.default"));
            if projected {
                let inner = of(
                    "prefix_down.default",
                    &matrix(&named(&p, "prefix_tokens.default.weight")),
                );
                let made = of("key.prefix_up.default", &inner.mapv(f64::tanh));
                near(&rows.clone().into_dyn(), &made.into_dyn(), 1e-12);
            }
            let mut found = Array2::zeros((x.nrows(), width));
            for pair in offsets.windows(2) {
                let text = pair[0] as usize..pair[1] as usize;
                for head in 0..heads {
                    let columns = head * head_dim..(head + 1) * head_dim;
                    let part =
                        |y: &Array2<f64>| y.slice(s![text.clone(), columns.clone()]).to_owned();
                    let front = |shift: usize| {
                        rows.slice(s![.., shift + columns.start..shift + columns.end])
                            .to_owned()
                    };
                    let behind = |front: Array2<f64>, own: Array2<f64>| {
                        concatenate(Axis(0), &[front.view(), own.view()]).unwrap()
                    };
                    let (k, v) = (behind(front(0), part(&k)), behind(front(width), part(&v)));
                    let scale = layer.attention.scale;
                    let y = attended(&part(&q), &k, &v, scale, causal);
                    found.slice_mut(s![text.clone(), columns]).assign(&y);
                }
            }
            near(&y, &of("output", &found).into_dyn(), 1e-10);
        },
    );
}

fn trained(p: &Parameters) -> Vec<String> {
    let rules = rules(p, DEFAULT);
    let set = FreezePolicy { rules }.resolve(p).unwrap();
    set.ids().map(|id| p.get(id).name().to_owned()).collect()
}

fn layers(p: &mut Parameters) {
    Embedding::new(p, "words", 9, 4, 0.5).unwrap();
    for i in 0..2 {
        Linear::new(p, &format!("layer.{i}.key"), 4, 6, 0.1).unwrap();
    }
}

#[test]
fn a_prompt_begins_as_words() {
    let mut p = parameters();
    layers(&mut p);
    let method = Method::Prompt { tokens: 5 };
    attach(&mut p, DEFAULT, &beside(method, "words"), Modules::InPlace).unwrap();
    assert_eq!(trained(&p), ["prompt_embeddings.default"]);
    assert_eq!(
        (p.adapters().virtual_tokens(), p.adapters().virtual_rows()),
        (5, 5)
    );
    p.initialise(1).unwrap();
    finish(&mut p, DEFAULT, 1).unwrap();
    let words = matrix(&named(&p, "words.weight"));
    let random = matrix(&named(&p, "prompt_embeddings.default"));
    for row in random.rows() {
        assert!(words.rows().into_iter().any(|word| word == row));
    }
    begin_as(&mut p, DEFAULT, &[7, 0]).unwrap();
    let text = matrix(&named(&p, "prompt_embeddings.default"));
    assert_eq!(text, words.select(Axis(0), &[7, 0, 7, 0, 7]));
    let none = begin_as(&mut p, DEFAULT, &[]).unwrap_err().to_string();
    assert!(none.contains("give it some words"), "{none}");
    begin_as(&mut p, DEFAULT, &[9]).unwrap_err();
    p.adapters_mut().activate(None).unwrap();
    assert_eq!(
        (p.adapters().virtual_tokens(), p.adapters().virtual_rows()),
        (0, 0)
    );
}

#[test]
fn a_prefix_trains_its_rows_or_what_they_are_the_product_of() {
    let method = |projection| Method::Prefix {
        tokens: 3,
        width: 6,
        projection,
    };
    let put = |projection: Option<usize>| {
        let mut p = parameters();
        layers(&mut p);
        let config = beside(method(projection), "key");
        attach(&mut p, DEFAULT, &config, Modules::InPlace).unwrap();
        p.initialise(1).unwrap();
        finish(&mut p, DEFAULT, 1).unwrap();
        p
    };
    let p = put(None);
    assert_eq!(trained(&p), ["prompt_embeddings.default"]);
    assert_eq!(
        (p.adapters().virtual_tokens(), p.adapters().virtual_rows()),
        (3, 0)
    );
    let rows = p.find("prompt_embeddings.default").unwrap();
    assert_eq!(p.get(rows).shape()[..], [3, 2 * 2 * 6]);
    let set = p.adapters().active().unwrap();
    assert!(!set.is_product(rows) && !set.is_projection(rows));

    let p = put(Some(5));
    let names = trained(&p);
    let parts = [
        "prefix_tokens.default.weight",
        "prefix_down.default.weight",
        "prefix_down.default.bias",
        "layer.0.key.prefix_up.default.weight",
        "layer.0.key.prefix_up.default.bias",
        "layer.1.key.prefix_up.default.weight",
        "layer.1.key.prefix_up.default.bias",
    ];
    assert_eq!(names, parts);
    let set = p.adapters().active().unwrap();
    let rows = p.find("prompt_embeddings.default").unwrap();
    assert!(set.is_product(rows) && !set.is_projection(rows));
    assert!(
        parts
            .iter()
            .all(|name| set.is_projection(p.find(name).unwrap()))
    );
}

#[test]
fn virtual_tokens_that_cannot_be_are_refused() {
    let refused = |method: Method, target: &str| {
        let mut p = parameters();
        layers(&mut p);
        let config = beside(method, target);
        let error = attach(&mut p, DEFAULT, &config, Modules::InPlace).unwrap_err();
        error.to_string()
    };
    let prefix = |tokens, width, projection| Method::Prefix {
        tokens,
        width,
        projection,
    };
    for (method, target, said) in [
        (Method::Prompt { tokens: 0 }, "words", "0 virtual tokens"),
        (Method::Prompt { tokens: 2 }, "key", "is a linear layer"),
        (prefix(2, 6, None), "words", "is an embedding"),
        (
            prefix(2, 7, None),
            "key",
            "keys of width 7 beside layer.0.key",
        ),
        (prefix(0, 6, None), "key", "0 virtual tokens"),
        (prefix(2, 6, Some(0)), "key", "projected from 0 numbers"),
    ] {
        let found = refused(method, target);
        assert!(found.contains(said), "{found}");
    }
}
