use graft_tensor::ops::random::Key;
use graft_tensor::ops::{self, Activation, Linear, Lora, WeightLayout};
use graft_tensor::{DType, Error, Memory, Tensor};
use ndarray::{ArrayD, IxDyn};

use crate::common::*;
use crate::elementwise::activate;
use crate::linalg::product;

fn flat(x: &ArrayD<f64>) -> ArrayD<f64> {
    let columns = x.shape()[x.ndim() - 1];
    let rows = x.shape()[..x.ndim() - 1].iter().product();
    x.clone()
        .into_shape_with_order(IxDyn(&[rows, columns]))
        .unwrap()
}

fn transposed(x: &ArrayD<f64>) -> ArrayD<f64> {
    x.clone().reversed_axes()
}

/// What the adapter sees: the mask is dropout's own, which has tests of its own.
fn seen(x: &Input, dropout: f64, key: Key) -> ArrayD<f64> {
    if dropout == 0.0 {
        return x.values.clone();
    }
    run1(|m| ops::dropout(m, &x.on(m), dropout, key)).values
}

struct Sizes {
    inputs: usize,
    outputs: usize,
    rank: usize,
}

fn draw(case: &Case) -> (Lora, Sizes, [Input; 4], Key) {
    let [rows, parts, outputs, rank] = case.dims;
    let inputs = case.columns;
    let layout = case.of(&[WeightLayout::OutIn, WeightLayout::InOut]);
    let activation = [None, Some(Activation::Gelu), Some(Activation::Tanh)][case.pick / 2 % 3];
    let p = Lora {
        linear: Linear { layout, activation },
        scale: if case.flags[2] { 1.0 } else { 0.75 },
        dropout: if case.flags[3] { 0.25 } else { 0.0 },
    };
    let weight = match layout {
        WeightLayout::OutIn => [outputs, inputs],
        WeightLayout::InOut => [inputs, outputs],
    };
    let all = [
        case.input(0, &[rows, parts, inputs]),
        case.between(1, &weight, -1.0, 1.0),
        case.between(2, &[rank, inputs], -1.0, 1.0),
        case.between(3, &[outputs, rank], -1.0, 1.0),
    ];
    let sizes = Sizes {
        inputs,
        outputs,
        rank,
    };
    (p, sizes, all, Key::new(case.seed, 1, 2))
}

/// How far a result in a short type may be off, in roundings of the computing type: what the adapter computes on the
/// way is rounded to storage three times.
fn stored_roundings(dtype: DType) -> f64 {
    4.0 * unit(dtype) / unit(wide(dtype))
}

#[test]
fn a_linear_layer_with_an_adapter() {
    cases(|case| {
        let (p, sizes, [x, weight, a, b], key) = draw(case);
        let bias = case.flags[0].then(|| case.input(0, &[sizes.outputs]));
        let parts = run(|m| {
            let bias = bias.as_ref().map(|b| b.on(m));
            let (a, b) = (a.on(m), b.on(m));
            let (x, w) = (x.on(m), weight.on(m));
            let (y, kept) = ops::lora(m, &p, &x, &w, bias.as_ref(), [&a, &b], key, case.flags[1])?;
            Ok([y].into_iter().chain(kept).collect())
        });
        let saves = case.flags[1];
        let keeps = saves && p.linear.activation.is_some();
        assert_eq!(parts.len(), 1 + usize::from(keeps) + usize::from(saves));
        let w = match p.linear.layout {
            WeightLayout::OutIn => transposed(&weight.values),
            WeightLayout::InOut => weight.values.clone(),
        };
        let low = product(&flat(&seen(&x, p.dropout, key)), &transposed(&a.values)) * p.scale;
        if saves {
            let found = parts.last().expect("counted");
            let roundings = 2.0 * (sizes.inputs as f64 + stored_roundings(case.dtype));
            let scale = 2.0 * (1.0 + sizes.inputs as f64);
            near_by(found, &low.clone().into_dyn(), roundings, scale);
        }
        let mut want = product(&flat(&x.values), &w) + product(&low, &transposed(&b.values));
        if let Some(bias) = &bias {
            want += &bias.values;
        }
        let terms = (sizes.inputs + 2) as f64 * (1.0 + 2.0 * sizes.rank as f64);
        let roundings = (terms + stored_roundings(case.dtype)) * 2.0;
        let scale = 2.0 * (1.0 + sizes.inputs as f64) * (1.0 + sizes.rank as f64);
        let shape = parts[0].values.raw_dim();
        let want = want.into_shape_with_order(shape).unwrap();
        if keeps {
            near_by(&parts[1], &want, roundings, scale);
        }
        match p.linear.activation {
            None => near_by(&parts[0], &want, roundings, scale),
            Some(kind) => {
                let want = want.mapv(|x| activate(kind, x));
                near_by(&parts[0], &want, 1.2 * roundings + 12.0, scale);
            }
        }
    });
}

#[test]
fn the_gradients_of_input_and_adapter() {
    cases(|case| {
        let (p, sizes, [x, weight, a, b], key) = draw(case);
        let dy = case.input(1, &[case.dims[0], case.dims[1], sizes.outputs]);
        let parts = run(|m| {
            let (a, b) = (a.on(m), b.on(m));
            let (x, w, dy) = (x.on(m), weight.on(m), dy.on(m));
            let g = ops::lora_low_gradient(m, &p, &b, &dy)?;
            let seen = ops::lora_input(m, &p, &x, key)?;
            let low = ops::lora_low(m, &p, &seen, &a)?;
            let layout = WeightLayout::OutIn;
            let da = ops::weight_gradient(m, layout, &seen, &g, case.dtype)?;
            let db = ops::weight_gradient(m, layout, &low, &dy, case.dtype)?;
            let dx = ops::lora_input_gradient(m, &p, [&w, &a], &g, &dy, key, x.shape(), None)?;
            Ok(vec![da, db, dx])
        });
        let (dy, xs) = (flat(&dy.values), flat(&seen(&x, p.dropout, key)));
        let g = product(&dy, &b.values) * p.scale;
        let da = product(&transposed(&g), &xs);
        let db = product(
            &transposed(&dy),
            &(product(&xs, &transposed(&a.values)) * p.scale),
        );
        let w = match p.linear.layout {
            WeightLayout::OutIn => weight.values.clone(),
            WeightLayout::InOut => transposed(&weight.values),
        };
        let through = product(&g, &a.values);
        let mask = match p.dropout {
            0.0 => ArrayD::ones(through.raw_dim()),
            p => {
                let ones = Input::ones(case.dtype, x.shape());
                flat(&seen(&ones, p, key))
            }
        };
        let dx = through * mask + product(&dy, &w);
        let rows = (case.dims[0] * case.dims[1]) as f64;
        let most = (1.0 + rows)
            * (1.0 + sizes.inputs as f64)
            * (1.0 + sizes.outputs as f64)
            * (1.0 + sizes.rank as f64);
        let sums = rows + (sizes.inputs + sizes.outputs + sizes.rank) as f64 + 8.0;
        for (found, want) in parts.iter().zip([da, db, dx]) {
            let want = want.into_shape_with_order(found.values.raw_dim()).unwrap();
            let roundings = sums + stored_roundings(case.dtype);
            near_by(found, &want, roundings, 4.0 * most);
        }
    });
}

/// Beside bf16 activations the parameters may be f32: values that bf16 holds give the same bits either way.
#[test]
fn f32_adapters_beside_bf16_activations() {
    cases(|case| {
        let short = Case {
            dtype: DType::Bf16,
            ..case.clone()
        };
        let (p, _, [x, weight, a, b], key) = draw(&short);
        let under = |rest: DType| {
            run1(|m| {
                let (a, b) = (a.cast_on(rest, m), b.cast_on(rest, m));
                let (x, w) = (x.on(m), weight.cast_on(rest, m));
                Ok(ops::lora(m, &p, &x, &w, None, [&a, &b], key, false)?.0)
            })
        };
        let (wide, short) = (under(DType::F32), under(DType::Bf16));
        assert_eq!(wide.dtype, DType::Bf16);
        equal(&wide, &short.values);
    });
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let m = Memory::cpu();
    let f = |shape: &[usize]| Tensor::full(&m, DType::F32, shape, 0.5).unwrap();
    let p = Lora {
        linear: Linear {
            layout: WeightLayout::OutIn,
            activation: None,
        },
        scale: 2.0,
        dropout: 0.0,
    };
    let run = |p: &Lora, x: &Tensor, w: &Tensor, a: &Tensor, b: &Tensor| -> Result<_, Error> {
        ops::lora(&m, p, x, w, None, [a, b], Key::new(0, 0, 0), false)
    };
    let (x, w, a, b) = (f(&[5, 4]), f(&[3, 4]), f(&[2, 4]), f(&[3, 2]));
    assert!(run(&p, &x, &w, &a, &b).is_ok());
    let said = |result: Result<_, Error>| {
        let _: &Result<(Tensor, Vec<Tensor>), Error> = &result;
        result.unwrap_err().to_string()
    };
    assert_eq!(
        said(run(&p, &x, &w, &f(&[2, 3]), &b)),
        "lora: the adapter's a; found [2, 3], expected [rank, 4]"
    );
    assert_eq!(
        said(run(&p, &x, &w, &a, &f(&[3, 1]))),
        "lora: the adapter's b; found [3, 1], expected [3, 2]"
    );
    assert_eq!(
        said(run(&p, &f(&[5, 3]), &w, &a, &b)),
        "lora: the input; found [5, 3], expected [.., 4]"
    );
    let certain = Lora { dropout: 1.0, ..p };
    assert_eq!(
        said(run(&certain, &x, &w, &a, &b)),
        "dropout: p is 1, not in [0, 1)"
    );
    let wide = Tensor::full(&m, DType::F64, &[2, 4], 0.5).unwrap();
    assert_eq!(
        said(run(&p, &x, &w, &wide, &b)),
        "lora: the adapter's a is f64, expected f32"
    );
}
