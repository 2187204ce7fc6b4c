//! Weights as codes: what is computed with them is what is computed with the numbers that they stand for.

use graft_tensor::ops::random::Key;
use graft_tensor::ops::{self, Activation, Linear, Lora, WeightLayout};
use graft_tensor::{Category, DType, Error, Memory, Tensor};

const CODES: [DType; 2] = [DType::Nf4, DType::Int8];

fn values(m: &Memory, shape: &[usize], seed: u64) -> Tensor {
    ops::random::normal(m, Key::new(seed, 0, 0), shape, 0.0, 0.1).unwrap()
}

fn bytes(x: &Tensor) -> Vec<u8> {
    x.to_bytes().unwrap()
}

/// A weight as codes and as their numbers, in a layout.
fn weight(m: &Memory, dtype: DType, layout: WeightLayout, size: [usize; 2]) -> [Tensor; 2] {
    let codes = ops::quantise(m, &values(m, &size, 1), dtype).unwrap();
    let numbers = ops::cast(m, &codes, DType::F32).unwrap();
    match layout {
        WeightLayout::OutIn => [codes, numbers],
        WeightLayout::InOut => [codes.t().unwrap(), numbers.t().unwrap()],
    }
}

#[test]
fn products_with_codes_are_products_with_their_numbers() {
    let m = Memory::cpu();
    let key = Key::new(0, 0, 9);
    for dtype in CODES {
        for layout in [WeightLayout::OutIn, WeightLayout::InOut] {
            for compute in [DType::F32, DType::Bf16] {
                for (rows, [outputs, inputs]) in [(1, [40, 70]), (6, [33, 129]), (37, [50, 64])] {
                    let [codes, numbers] = weight(&m, dtype, layout, [outputs, inputs]);
                    let x = ops::cast(&m, &values(&m, &[rows, inputs], 2), compute).unwrap();
                    let dy = ops::cast(&m, &values(&m, &[rows, outputs], 3), compute).unwrap();
                    let bias = values(&m, &[outputs], 4);
                    let (a, b) = (values(&m, &[3, inputs], 5), values(&m, &[outputs, 3], 6));
                    let linear = Linear {
                        layout,
                        activation: Some(Activation::Gelu),
                    };
                    let lora = Lora {
                        linear,
                        scale: 0.5,
                        dropout: 0.25,
                    };
                    let all = |w: &Tensor| -> Vec<Vec<u8>> {
                        let (y, pre) = ops::linear(&m, &linear, &x, w, Some(&bias), true).unwrap();
                        let dx = ops::input_gradient(&m, &linear, w, &dy, x.shape(), None).unwrap();
                        let (z, _) =
                            ops::lora(&m, &lora, &x, w, Some(&bias), [&a, &b], key, false).unwrap();
                        let low = ops::lora_low_gradient(&m, &lora, &b, &dy).unwrap();
                        let pair = [w, &a];
                        let dz = ops::lora_input_gradient(
                            &m,
                            &lora,
                            pair,
                            &low,
                            &dy,
                            key,
                            x.shape(),
                            None,
                        )
                        .unwrap();
                        [&y, &pre.unwrap(), &dx, &z, &dz].map(bytes).into()
                    };
                    assert!(
                        all(&codes) == all(&numbers),
                        "{dtype} {layout:?} {compute} {rows} x {outputs} x {inputs}"
                    );
                    // A frozen weight may also be bf16 beside f32.
                    let short = ops::cast(&m, &numbers, DType::Bf16).unwrap();
                    let wide = ops::cast(&m, &short, DType::F32).unwrap();
                    assert!(
                        all(&short) == all(&wide),
                        "{layout:?} {compute} {rows} x {outputs} x {inputs}"
                    );
                }
            }
        }
    }
}

#[test]
fn codes_are_counted_as_they_are_kept_and_planned_so() {
    for dtype in CODES {
        let run = |m: Memory| {
            let weights = m.with(Category::Weights);
            let x = values(&m, &[192, 384], 1);
            let codes = ops::quantise(&weights, &x, dtype).unwrap();
            let input = values(&m, &[5, 384], 2);
            let linear = Linear {
                layout: WeightLayout::OutIn,
                activation: None,
            };
            drop(x);
            let y = ops::linear(&m, &linear, &input, &codes, None, false).unwrap();
            drop(ops::cast(&m, &codes, DType::F32).unwrap());
            drop((y, input));
            let usage = m.usage();
            assert_eq!(
                usage.live(Category::Weights),
                dtype.bytes(192 * 384),
                "{dtype}"
            );
            drop(codes);
            assert_eq!(m.usage().live(Category::Weights), 0);
            usage
        };
        let real = run(Memory::cpu());
        assert_eq!(real, run(Memory::planned()));
        let bits = 8.0 * real.peak(Category::Weights) as f64 / (192.0 * 384.0);
        let claimed = if dtype == DType::Nf4 { 4.127 } else { 8.5 };
        assert!((bits - claimed).abs() < 0.005, "{dtype}: {bits}");
    }
}

#[test]
fn codes_go_through_bytes_copies_and_other_memories() {
    let m = Memory::cpu();
    for dtype in CODES {
        let [codes, numbers] = weight(&m, dtype, WeightLayout::InOut, [7, 39]);
        assert_eq!(codes.shape()[..], [39, 7]);
        assert_eq!(codes.to_f64().unwrap(), numbers.to_f64().unwrap());
        let stored = codes.to_bytes().unwrap();
        assert_eq!(stored.len(), dtype.bytes(7 * 39));
        let again = Tensor::from_bytes(&m, dtype, &[7, 39], &stored).unwrap();
        assert_eq!(
            again.t().unwrap().to_f64().unwrap(),
            codes.to_f64().unwrap()
        );
        for copy in [
            codes.copy(&m).unwrap(),
            codes.to_memory(&Memory::cpu()).unwrap(),
            codes.clone().recount(Category::Weights).unwrap(),
        ] {
            assert_eq!(copy.strides(), codes.strides());
            assert_eq!(copy.to_f64().unwrap(), codes.to_f64().unwrap());
        }
        let part = codes.narrow(0, 3, 30).unwrap();
        let want = numbers.narrow(0, 3, 30).unwrap();
        assert_eq!(part.to_f64().unwrap(), want.to_f64().unwrap());
        let zeros = Tensor::zeros(&m, dtype, &[3, 70]).unwrap();
        assert!(zeros.to_f64().unwrap().iter().all(|&x| x == 0.0));
        let short = &stored[1..];
        let error = Tensor::from_bytes(&m, dtype, &[7, 39], short).unwrap_err();
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
}

#[test]
fn what_codes_cannot_do_is_refused() {
    let m = Memory::cpu();
    let x = values(&m, &[4, 64], 1);
    let codes = ops::quantise(&m, &x, DType::Nf4).unwrap();
    let said = |error: Error| error.to_string();
    let error = said(ops::quantise(&m, &x, DType::F16).unwrap_err());
    assert_eq!(error, "quantise: the result is f16, expected nf4 or int8");
    let error = said(ops::matmul(&m, &codes, &codes.t().unwrap()).unwrap_err());
    assert!(error.contains("no product of nf4"), "{error}");
    let error = said(codes.t().unwrap().contiguous(&m).unwrap_err());
    assert!(error.contains("strided view"), "{error}");
    let error = said(codes.slice::<f32>().unwrap_err());
    assert!(error.contains("is nf4, expected f32"), "{error}");
    let index = Tensor::from_vec(&m, vec![1i64], &[1]).unwrap();
    let error = said(ops::gather_rows(&m, &codes, &index).unwrap_err());
    assert!(error.contains("is nf4"), "{error}");
    let mut bad = vec![0.0f32; 256];
    bad[70] = f32::NAN;
    let bad = Tensor::from_vec(&m, bad, &[4, 64]).unwrap();
    let error = said(ops::quantise(&m, &bad, DType::Int8).unwrap_err());
    assert!(error.contains("element 70 is NaN"), "{error}");
    let wide = ops::cast(&m, &x, DType::F64).unwrap();
    let linear = Linear {
        layout: WeightLayout::OutIn,
        activation: None,
    };
    let error = said(ops::linear(&m, &linear, &wide, &codes, None, false).unwrap_err());
    assert!(error.contains("the weight is nf4, expected f64"), "{error}");
}
