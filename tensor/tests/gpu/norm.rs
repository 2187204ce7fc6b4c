//! Normalisations and softmax.

use graft_tensor::ops::affine;
use graft_tensor::ops::norm::{
    Dropout, LayerNormGradients, Normed, Wanted, l2_normalize, l2_normalize_backward, layer_norm,
    layer_norm_backward, layer_norm_backward_input, layer_norm_backward_params,
    layer_norm_bias_gradient, layer_norm_dropped, rms_norm, rms_norm_backward, softmax,
    softmax_backward,
};
use graft_tensor::ops::random::Key;
use graft_tensor::{DType, Memory, Tensor};
use proptest::prelude::*;

use crate::common::{assert_same, cpu, gpu, normal, on_gpu};
use crate::near::{assert_near, shifted};
use crate::within::assert_within;

/// Rows that belong to a warp, to a block, to a larger one, and to none that can keep them; with and
/// without rests; and such that their blocks keep 48 KB of shared memory, all that a device gives unasked, beside sums.
///
/// One or two columns are not among them: what is left of a gradient there is rounding alone.
const SHAPES: [[usize; 2]; 19] = [
    [0, 8],
    [3, 7],
    [70, 28],
    [9, 64],
    [6, 333],
    [17, 384],
    [130, 768],
    [5, 1000],
    [4, 1024],
    [3, 1032],
    [3, 1536],
    [3, 2047],
    [2, 4096],
    [2, 4104],
    [2, 6144],
    [3, 8192],
    [2, 12_288],
    [2, 20_001],
    [2, 130_000],
];

/// Types of rows and of parameters.
const TYPES: [(DType, DType); 3] = [
    (DType::F32, DType::F32),
    (DType::Bf16, DType::F32),
    (DType::Bf16, DType::Bf16),
];

/// All that a layer norm and its backward give.
fn layer_norm_all(
    m: &Memory,
    [x, residual, weight, bias, dy]: [Option<&Tensor>; 5],
    save: bool,
    parameters: DType,
) -> Vec<(&'static str, Tensor)> {
    let (x, dy) = (x.unwrap(), dy.unwrap());
    let Normed {
        y,
        sum,
        mean,
        scale,
    } = layer_norm(m, x, residual, weight, bias, 1e-5, save).unwrap();
    let mean = mean.unwrap();
    let s = sum.clone().unwrap_or_else(|| x.clone());
    let dx = layer_norm_backward_input(m, &s, weight, &mean, &scale, dy).unwrap();
    let needs = [weight.is_some(), bias.is_some()];
    let [dweight, dbias] =
        layer_norm_backward_params(m, &s, &mean, &scale, dy, needs, parameters).unwrap();
    let named = [
        ("layer norm", Some(y)),
        ("sum", sum),
        ("mean", Some(mean)),
        ("scale", Some(scale)),
        ("dx", Some(dx)),
        ("dweight", dweight),
        ("dbias", dbias),
    ];
    let given = named.into_iter();
    given.filter_map(|(name, x)| Some((name, x?))).collect()
}

fn assert_all_near(found: &[(&'static str, Tensor)], wanted: &[(&'static str, Tensor)]) {
    assert_eq!(found.len(), wanted.len());
    for ((name, found), (_, wanted)) in found.iter().zip(wanted) {
        assert_near(name, found, wanted);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn layer_norm_and_backward() {
    for (dtype, parameters) in TYPES {
        for shape in SHAPES {
            let columns = shape[1];
            let x = affine(cpu(), &normal(dtype, &shape, 1), 1.0, 0.5).unwrap();
            let (residual, dy) = (normal(dtype, &shape, 2), normal(dtype, &shape, 3));
            let weight = normal(parameters, &[columns], 4);
            let bias = normal(parameters, &[columns], 5);
            for optional in 0..8 {
                let take = |bit: usize, t| (optional >> bit & 1 == 1).then_some(t);
                let inputs = [
                    Some(&x),
                    take(0, &residual),
                    take(1, &weight),
                    take(2, &bias),
                    Some(&dy),
                ];
                let wanted = layer_norm_all(cpu(), inputs, true, parameters);
                let far = inputs.map(|t| t.map(on_gpu));
                let far = far.each_ref().map(Option::as_ref);
                let found = layer_norm_all(gpu(), far, true, parameters);
                assert_all_near(&found, &wanted);
                for ((name, found), (_, again)) in
                    found
                        .iter()
                        .zip(&layer_norm_all(gpu(), far, true, parameters))
                {
                    assert_same(name, again, found);
                }
                let near = inputs.map(|t| t.map(shifted));
                let near = near.each_ref().map(Option::as_ref);
                for ((name, found), (_, again)) in
                    found
                        .iter()
                        .zip(&layer_norm_all(gpu(), near, true, parameters))
                {
                    assert_same(&format!("{name}, unaligned"), again, found);
                }
            }
        }
    }
}

/// Kernels one after the other give what the CPU computes in one pass.
#[test]
#[ignore = "needs a GPU"]
fn layer_norm_with_dropout_and_all_gradients() {
    let dropout = Dropout {
        p: 0.3,
        key: Key::new(1, 2, 3),
    };
    let all = |m: &Memory, inputs: &[Tensor; 4], residual: bool, wanted: Wanted| {
        let [x, other, w, dy] = inputs;
        let other = residual.then_some(other);
        let n = layer_norm_dropped(m, x, Some(dropout), other, Some(w), Some(w), 1e-5, true);
        let Normed {
            y,
            sum,
            mean,
            scale,
        } = n.unwrap();
        let (s, mean) = (sum.unwrap(), mean.unwrap());
        let found = layer_norm_backward(m, &s, Some(w), &mean, &scale, dy, wanted, None).unwrap();
        let LayerNormGradients {
            ds,
            dx,
            dweight,
            dbias,
        } = found;
        let named = [
            ("layer norm", Some(y)),
            ("sum", Some(s)),
            ("ds", ds),
            ("dx", dx),
            ("dweight", dweight),
            ("dbias", dbias),
        ];
        let given = named.into_iter();
        given
            .filter_map(|(name, x)| Some((name, x?)))
            .collect::<Vec<_>>()
    };
    for shape in [[70, 28], [17, 384], [5, 1000]] {
        let width = [shape[1]];
        for dtype in [DType::F32, DType::Bf16] {
            let near = [1, 2, 4].map(|seed| normal(dtype, &shape, seed));
            let [x, residual, dy] = near;
            let near = [x, residual, normal(DType::F32, &width, 3), dy];
            let far = near.each_ref().map(on_gpu);
            for which in 0..32 {
                let asks = |bit: usize| which >> bit & 1 == 1;
                let wanted = Wanted {
                    ds: asks(0),
                    dx: asks(1).then_some(dropout),
                    dweight: asks(2).then_some(DType::F32),
                    dbias: asks(3).then_some(DType::F32),
                };
                let found = all(gpu(), &far, asks(4), wanted);
                assert_all_near(&found, &all(cpu(), &near, asks(4), wanted));
            }
        }
    }
}

/// What is normalised again from the stored sum has the same bits.
#[test]
#[ignore = "needs a GPU"]
fn rebuilding_changes_no_bit() {
    for shape in SHAPES {
        let [x, residual] = [1, 2].map(|seed| on_gpu(&normal(DType::Bf16, &shape, seed)));
        let weight = on_gpu(&normal(DType::F32, &[shape[1]], 3));
        let first =
            layer_norm(gpu(), &x, Some(&residual), Some(&weight), None, 1e-5, true).unwrap();
        let sum = first.sum.unwrap();
        let again = layer_norm(gpu(), &sum, None, Some(&weight), None, 1e-5, false).unwrap();
        assert_same("layer norm", &again.y, &first.y);
        let unsaved =
            layer_norm(gpu(), &x, Some(&residual), Some(&weight), None, 1e-5, false).unwrap();
        assert!(unsaved.sum.is_none());
        assert_same("layer norm", &unsaved.y, &first.y);
        let first = rms_norm(gpu(), &x, Some(&residual), &weight, 1.0, 1e-6, true).unwrap();
        let sum = first.sum.unwrap();
        let again = rms_norm(gpu(), &sum, None, &weight, 1.0, 1e-6, false).unwrap();
        assert_same("rms norm", &again.y, &first.y);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn rows_far_from_zero_keep_their_variance() {
    let x = affine(cpu(), &normal(DType::F32, &[7, 768], 1), 1.0, 1000.0).unwrap();
    let wanted = layer_norm(cpu(), &x, None, None, None, 1e-5, false).unwrap();
    let found = layer_norm(gpu(), &on_gpu(&x), None, None, None, 1e-5, false).unwrap();
    // The mean is rounded to 1000 / 2^24, against deviations of 1.
    let apart = crate::common::difference(&found.y, &wanted.y);
    assert!(apart <= 1e-4, "{apart:e}");
}

/// All that an RMS norm and its backward give.
fn rms_norm_all(
    m: &Memory,
    [x, residual, weight, dy]: [Option<&Tensor>; 4],
    offset: f64,
    needs: [bool; 2],
) -> Vec<(&'static str, Tensor)> {
    let (x, weight, dy) = (x.unwrap(), weight.unwrap(), dy.unwrap());
    let normed = rms_norm(m, x, residual, weight, offset, 1e-6, true).unwrap();
    let s = normed.sum.clone().unwrap_or_else(|| x.clone());
    let [dx, dweight] = rms_norm_backward(m, &s, weight, offset, &normed.scale, dy, needs).unwrap();
    let named = [
        ("rms norm", Some(normed.y)),
        ("sum", normed.sum),
        ("scale", Some(normed.scale)),
        ("dx", dx),
        ("dweight", dweight),
    ];
    let given = named.into_iter();
    given.filter_map(|(name, x)| Some((name, x?))).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn rms_norm_and_backward() {
    for (dtype, parameters) in TYPES {
        for shape in SHAPES {
            let [x, residual, dy] = [1, 2, 3].map(|seed| normal(dtype, &shape, seed));
            let weight = normal(parameters, &[shape[1]], 4);
            for (with_residual, offset, needs) in [
                (false, 0.0, [true, true]),
                (true, 1.0, [true, true]),
                (true, 0.0, [true, false]),
                (false, 1.0, [false, true]),
            ] {
                let residual = with_residual.then_some(&residual);
                let inputs = [Some(&x), residual, Some(&weight), Some(&dy)];
                let wanted = rms_norm_all(cpu(), inputs, offset, needs);
                let far = inputs.map(|t| t.map(on_gpu));
                let found = rms_norm_all(gpu(), far.each_ref().map(Option::as_ref), offset, needs);
                assert_all_near(&found, &wanted);
                let near = inputs.map(|t| t.map(shifted));
                let again = rms_norm_all(gpu(), near.each_ref().map(Option::as_ref), offset, needs);
                for ((name, found), (_, again)) in found.iter().zip(&again) {
                    assert_same(&format!("{name}, unaligned"), again, found);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn parameters_of_many_rows(
        rows in 1usize..3000, columns in 3usize..300, short in any::<bool>(), seed in any::<u64>(),
    ) {
        let dtype = if short { DType::Bf16 } else { DType::F32 };
        let (x, dy) = (normal(dtype, &[rows, columns], seed), normal(dtype, &[rows, columns], !seed));
        let weight = normal(DType::F32, &[columns], seed);
        let inputs = [Some(&x), None, Some(&weight), Some(&weight), Some(&dy)];
        let wanted = layer_norm_all(cpu(), inputs, false, DType::F32);
        let far = inputs.map(|t| t.map(on_gpu));
        let found = layer_norm_all(gpu(), far.each_ref().map(Option::as_ref), false, DType::F32);
        assert_all_near(&found, &wanted);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn unit_length_and_backward() {
    for dtype in [DType::F32, DType::Bf16] {
        for shape in SHAPES {
            let (x, dy) = (normal(dtype, &shape, 1), normal(dtype, &shape, 2));
            // With the length, and with a limit that is larger.
            for eps in [1e-12, 1e6] {
                let wanted = l2_normalize(cpu(), &x, eps).unwrap();
                let found = l2_normalize(gpu(), &on_gpu(&x), eps).unwrap();
                assert_near("unit length", &found.y, &wanted.y);
                assert_near("its scale", &found.scale, &wanted.scale);
                // From the same result, as rounding it to bf16 may go either way.
                let y = on_gpu(&wanted.y);
                let dx = l2_normalize_backward(cpu(), &wanted.y, &wanted.scale, &dy).unwrap();
                let there =
                    l2_normalize_backward(gpu(), &y, &on_gpu(&wanted.scale), &on_gpu(&dy)).unwrap();
                assert_near("unit length backward", &there, &dx);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn softmax_and_backward() {
    for dtype in [DType::F32, DType::Bf16] {
        for shape in SHAPES.into_iter().chain([[1, 1], [500, 2], [9, 3]]) {
            let x = affine(cpu(), &normal(dtype, &shape, 1), 3.0, 20.0).unwrap();
            let dy = normal(dtype, &shape, 2);
            for log in [false, true] {
                let what = format!("softmax, log: {log}");
                let y = softmax(cpu(), &x, log).unwrap();
                let found = softmax(gpu(), &on_gpu(&x), log).unwrap();
                assert_near(&what, &found, &y);
                assert_same(&what, &softmax(gpu(), &shifted(&x), log).unwrap(), &found);
                let dx = softmax_backward(cpu(), &y, &dy, log).unwrap();
                let there = softmax_backward(gpu(), &on_gpu(&y), &on_gpu(&dy), log).unwrap();
                assert_near(&format!("{what}, backward"), &there, &dx);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn softmax_of_infinities() {
    let low = f32::NEG_INFINITY;
    let x = [1.0, low, 2.0, low, low, low, 3e38, -3e38, low];
    let x = Tensor::from_slice(cpu(), &x, &[3, 3]).unwrap();
    for log in [false, true] {
        let wanted = softmax(cpu(), &x, log).unwrap();
        let found = softmax(gpu(), &on_gpu(&x), log).unwrap();
        assert_near("softmax", &found, &wanted);
    }
}

/// What has arrived of the gradient of s is added to it; a bias that is trained alone has the gradient
/// that it has beside others.
#[test]
#[ignore = "needs a GPU"]
fn layer_norm_adds_and_spares() {
    for (shape, dtype) in [
        ([70, 768], DType::Bf16),
        ([33, 64], DType::F32),
        ([9, 1030], DType::F32),
    ] {
        let [s, dy, sum] = [1, 2, 3].map(|seed| normal(dtype, &shape, seed));
        let w = normal(DType::F32, &shape[1..], 4);
        let wanted = Wanted {
            ds: true,
            dbias: Some(DType::F32),
            ..Wanted::default()
        };
        let all = |m: &Memory| {
            let [s, dy, sum, w] = [&s, &dy, &sum, &w].map(|x| x.to_memory(m).unwrap());
            let n = layer_norm(m, &s, None, Some(&w), None, 1e-5, false).unwrap();
            let mean = n.mean.unwrap();
            let found =
                layer_norm_backward(m, &s, Some(&w), &mean, &n.scale, &dy, wanted, Some(sum));
            let found = found.unwrap();
            let alone = layer_norm_bias_gradient(m, &dy, DType::F32).unwrap();
            assert_same("a bias alone", &alone, found.dbias.as_ref().unwrap());
            found.ds.unwrap()
        };
        // The CPU rounds the gradient before it is added.
        let allowed = if dtype == DType::Bf16 {
            1.0 / 32.0
        } else {
            2e-5
        };
        assert_within("ds and what was there", &all(gpu()), &all(cpu()), allowed);
    }
}
