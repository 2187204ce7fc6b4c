//! Weights as codes: they become the CPU's numbers, and products with them are products with those.

use graft_kernels::activation::Activation;
use graft_tensor::ops::random::Key;
use graft_tensor::ops::{self, Linear, Lora, WeightLayout};
use graft_tensor::{Category, DType, Device, Memory, Tensor};

use crate::common::{assert_close, assert_same, cpu, gpu, normal, on_gpu};

const CODES: [DType; 2] = [DType::Nf4, DType::Int8];

fn codes(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    ops::quantise(cpu(), &normal(DType::F32, shape, seed), dtype).unwrap()
}

/// In f32 with all bits, in bf16 those rounded; of whole blocks and of parts of one, of views, of magnitudes that differ.
#[test]
#[ignore = "needs a GPU"]
fn codes_become_the_numbers_of_the_cpu() {
    for dtype in CODES {
        for count in [1, 7, 8, 63, 64, 65, 1000, 64 * 256, 64 * 300 + 13, 40_961] {
            let mut x = normal(DType::F32, &[count], count as u64)
                .to_vec::<f32>()
                .unwrap();
            // Large and small blocks, and one of zeros.
            for (i, x) in x.iter_mut().enumerate() {
                *x *= [1.0, 1e-3, 300.0, 0.0, 1e-20][i / 64 % 5];
            }
            let x = Tensor::from_vec(cpu(), x, &[count]).unwrap();
            let here = ops::quantise(cpu(), &x, dtype).unwrap();
            let there = ops::quantise(gpu(), &on_gpu(&x), dtype).unwrap();
            assert_same("codes", &there, &here);
            for to in [DType::F32, DType::Bf16] {
                let expected = ops::cast(cpu(), &here, to).unwrap();
                let found = ops::cast(gpu(), &there, to).unwrap();
                assert_same(&format!("{dtype} {count} as {to}"), &found, &expected);
                let wide = ops::cast(cpu(), &here, DType::F32).unwrap();
                assert_same(
                    "rounded once",
                    &found,
                    &ops::cast(cpu(), &wide, to).unwrap(),
                );
            }
        }
        let here = codes(dtype, &[70, 33], 1);
        let there = on_gpu(&here);
        for (here, there) in [
            (here.t().unwrap(), there.t().unwrap()),
            (
                here.narrow(0, 5, 60).unwrap(),
                there.narrow(0, 5, 60).unwrap(),
            ),
        ] {
            assert_eq!(there.to_f64().unwrap(), here.to_f64().unwrap());
            let found = ops::cast(gpu(), &there, DType::F32).unwrap();
            assert_eq!(found.to_f64().unwrap(), here.to_f64().unwrap());
        }
    }
}

/// Forward and backward of layers, with an adapter and without.
fn products(m: &Memory, w: &Tensor, layout: WeightLayout, inputs: &[Tensor; 5]) -> Vec<Tensor> {
    let [x, dy, bias, a, b] = inputs.each_ref().map(|x| x.to_memory(m).unwrap());
    let linear = Linear {
        layout,
        activation: Some(Activation::Gelu),
    };
    let lora = Lora {
        linear,
        scale: 0.5,
        dropout: 0.25,
    };
    let key = Key::new(0, 0, 9);
    let (y, pre) = ops::linear(m, &linear, &x, w, Some(&bias), true).unwrap();
    let dx = ops::input_gradient(m, &linear, w, &dy, x.shape(), None).unwrap();
    let sum = Some(dx.copy(m).unwrap());
    let more = ops::input_gradient(m, &linear, w, &dy, x.shape(), sum).unwrap();
    let (z, _) = ops::lora(m, &lora, &x, w, Some(&bias), [&a, &b], key, false).unwrap();
    let low = ops::lora_low_gradient(m, &lora, &b, &dy).unwrap();
    let dz = ops::lora_input_gradient(m, &lora, [w, &a], &low, &dy, key, x.shape(), None).unwrap();
    vec![y, pre.unwrap(), dx, more, z, dz]
}

#[test]
#[ignore = "needs a GPU"]
fn products_with_codes_are_products_with_their_numbers() {
    for dtype in CODES {
        for (layout, compute) in [
            (WeightLayout::OutIn, DType::F32),
            (WeightLayout::OutIn, DType::Bf16),
            (WeightLayout::InOut, DType::Bf16),
        ] {
            for (rows, [outputs, inputs]) in [(1, [40, 72]), (37, [33, 129]), (130, [48, 64])] {
                let codes = codes(dtype, &[outputs, inputs], 1);
                let codes = match layout {
                    WeightLayout::OutIn => codes,
                    WeightLayout::InOut => codes.t().unwrap(),
                };
                let given = [
                    normal(compute, &[rows, inputs], 2),
                    normal(compute, &[rows, outputs], 3),
                    normal(DType::F32, &[outputs], 4),
                    normal(DType::F32, &[3, inputs], 5),
                    normal(DType::F32, &[outputs, 3], 6),
                ];
                let there = on_gpu(&codes);
                let numbers = ops::cast(gpu(), &there, compute).unwrap();
                let found = products(gpu(), &there, layout, &given);
                let same = products(gpu(), &numbers, layout, &given);
                let expected = products(cpu(), &codes, layout, &given);
                // Of f32 sums of so few terms; of bf16 a rounding of the result, one more of what it is added to.
                let tolerance = if compute == DType::F32 { 1e-5 } else { 0.04 };
                for (i, (found, same)) in found.iter().zip(&same).enumerate() {
                    let what = format!("{dtype} {layout:?} {compute} result {i}");
                    assert_same(&what, found, same);
                    assert_close(&what, found, &expected[i], tolerance);
                }
            }
        }
    }
}

/// Codes are counted as weights, the numbers of one at a time as workspace; a plan says both.
#[test]
#[ignore = "needs a GPU"]
fn a_plan_counts_codes_and_the_numbers_of_one_weight() {
    const SIZE: [usize; 2] = [192, 384];
    for dtype in CODES {
        let run = |m: Memory| {
            let weights = m.with(Category::Weights);
            let all: Vec<Tensor> = (0..3)
                .map(|seed| codes(dtype, &SIZE, seed).to_memory(&weights).unwrap())
                .collect();
            let x = normal(DType::Bf16, &[5, SIZE[1]], 2).to_memory(&m).unwrap();
            let linear = Linear {
                layout: WeightLayout::OutIn,
                activation: None,
            };
            for w in &all {
                let (y, _) = ops::linear(&m, &linear, &x, w, None, false).unwrap();
                ops::input_gradient(&m, &linear, w, &y, x.shape(), None).unwrap();
            }
            let usage = m.usage();
            let bytes = 3 * dtype.bytes(SIZE[0] * SIZE[1]);
            assert_eq!(usage.live(Category::Weights), bytes, "{dtype}");
            usage
        };
        let plan = run(Memory::planned_for(Device::Cuda(0)));
        let real = run(Memory::of(Device::Cuda(0)).expect("these tests need a GPU"));
        assert_eq!(plan.live, real.live);
        let (planned, used) = [plan, real]
            .map(|usage| usage.peak(Category::Workspace))
            .into();
        let one = 2 * SIZE[0] * SIZE[1];
        // Of several kinds of kernels, a plan takes those of the latest device.
        assert!(
            one <= used && used <= planned && planned < 2 * one,
            "{used}, {planned}"
        );
    }
}
