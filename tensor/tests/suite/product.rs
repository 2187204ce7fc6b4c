//! Gradients that products add to what is there, and products that are computed as their transposes.

use graft_tensor::ops::random::Key;
use graft_tensor::ops::{self, Linear, Lora, WeightLayout};
use graft_tensor::{DType, Memory, Tensor};

use crate::common::*;

const KEY: Key = Key([3, 4]);

fn values(x: &Tensor) -> Vec<u64> {
    let x = x.to_f64().unwrap();
    x.iter().map(|x| x.to_bits()).collect()
}

/// Off by the roundings of the sum, to which the summand came earlier or later.
fn close(found: &Tensor, wanted: &Tensor, dtype: DType, terms: usize) {
    let unit = match dtype {
        DType::F64 => f64::EPSILON,
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => 1.0 / 512.0,
        _ => 1.0 / 64.0,
    };
    let (found, wanted) = (found.to_f64().unwrap(), wanted.to_f64().unwrap());
    for (found, wanted) in found.iter().zip(&wanted) {
        let limit = unit * 8.0 * (terms as f64 + wanted.abs());
        assert!((found - wanted).abs() <= limit, "{found} for {wanted}");
    }
}

#[test]
fn input_gradients_are_added_to_what_is_there() {
    cases(|case| {
        let [a, b, outputs, rank] = case.dims;
        let inputs = case.columns;
        let x = case.input(0, &[a, b, inputs]);
        let weight = case.input(1, &[outputs, inputs]);
        let dy = case.input(2, &[a, b, outputs]);
        let (low, down) = (
            case.input(3, &[a * b, rank]),
            case.input(4, &[rank, inputs]),
        );
        let linear = Linear {
            layout: WeightLayout::OutIn,
            activation: None,
        };
        run(|m| {
            let (x, w, dy) = (x.on(m), weight.on(m), dy.on(m));
            let (low, down) = (low.on(m), down.on(m));
            let shape = x.shape();
            for dropout in [None, Some(0.0), Some(0.4)] {
                let gradient = |sum: Option<Tensor>| match dropout {
                    None => ops::input_gradient(m, &linear, &w, &dy, shape, sum),
                    Some(dropout) => {
                        let p = Lora {
                            linear,
                            scale: 1.0,
                            dropout,
                        };
                        ops::lora_input_gradient(m, &p, [&w, &down], &low, &dy, KEY, shape, sum)
                    }
                };
                let alone = gradient(None)?;
                let shared = gradient(Some(x.clone()))?;
                let owned = gradient(Some(x.copy(m)?))?;
                let wanted = ops::binary(m, ops::Binary::Add, &x, &alone)?;
                if m.is_planned() {
                    continue;
                }
                assert_eq!(values(&shared), values(&owned));
                close(&owned, &wanted, case.dtype, outputs + rank);
            }
            Ok(Vec::new())
        });
    });
}

#[test]
fn a_sum_of_another_shape_or_type_is_refused() {
    let m = &Memory::cpu();
    let linear = Linear {
        layout: WeightLayout::OutIn,
        activation: None,
    };
    let new = |dtype, shape: &[usize]| Tensor::zeros(m, dtype, shape).unwrap();
    let (w, dy) = (new(DType::F32, &[2, 3]), new(DType::F32, &[4, 2]));
    let shape = *new(DType::F32, &[4, 3]).shape();
    for sum in [new(DType::F32, &[3, 4]), new(DType::F64, &[4, 3])] {
        let error = ops::input_gradient(m, &linear, &w, &dy, &shape, Some(sum)).unwrap_err();
        assert!(error.to_string().contains("the sum so far"), "{error}");
    }
}

/// However narrow: the bits are those of the columns of a wide product.
#[test]
fn narrow_products_have_the_bits_of_wide_ones() {
    let m = &Memory::cpu();
    for dtype in [DType::F32, DType::Bf16, DType::F16, DType::F64] {
        let numbers = |count: usize, seed: f64| -> Vec<f64> {
            (0..count).map(|i| (i as f64 * seed).sin()).collect()
        };
        let tensor = |shape: [usize; 2], seed| {
            let x = Tensor::from_vec(m, numbers(shape[0] * shape[1], seed), &shape).unwrap();
            ops::cast(m, &x, dtype).unwrap()
        };
        for tokens in [1, 37, 900] {
            let (x, dy) = (tensor([tokens, 40], 0.37), tensor([tokens, 70], 0.61));
            let layout = WeightLayout::OutIn;
            let wide = ops::weight_gradient(m, layout, &x, &dy, dtype).unwrap();
            for columns in 1..12 {
                let some = x.narrow(1, 0, columns).unwrap();
                let narrow = ops::weight_gradient(m, layout, &some, &dy, dtype).unwrap();
                assert!(narrow.is_contiguous());
                let wanted = wide.narrow(1, 0, columns).unwrap();
                let wanted = wanted.contiguous(m).unwrap();
                assert_eq!(
                    values(&narrow),
                    values(&wanted),
                    "{dtype} {tokens} {columns}"
                );
            }
        }
    }
}
