//! Rotary position embedding.

use graft_tensor::ops::rope::{Rope, rope};
use graft_tensor::{DType, Tensor};
use proptest::prelude::*;

use crate::common::{cpu, gpu, integers, normal, on_gpu};
use crate::near::{assert_near, shifted, swapped};

fn tables(positions: usize, half: usize) -> [Tensor; 2] {
    [f32::cos, f32::sin].map(|f| {
        let angle = |n: usize| (n / half) as f32 / 100f32.powf((n % half) as f32 / half as f32);
        let values: Vec<f32> = (0..positions * half).map(|n| f(angle(n))).collect();
        Tensor::from_slice(cpu(), &values, &[positions, half]).unwrap()
    })
}

fn compare(tokens: usize, heads: usize, half: usize, plain: usize, dtype: DType, seed: u64) {
    let head = 2 * half + plain;
    let x = normal(dtype, &[tokens, heads * head], seed);
    let [cos, sin] = tables(50, half.max(1)).map(|t| t.narrow(1, 0, half).unwrap());
    let positions: Vec<i64> = (0..tokens).map(|t| ((t * 7 + 3) % 50) as i64).collect();
    let positions = integers(&positions);
    let [far_cos, far_sin, far_positions] = [&cos, &sin, &positions].map(on_gpu);
    for interleaved in [false, true] {
        let p = Rope {
            heads,
            rotary_dim: 2 * half,
            interleaved,
        };
        for inverse in [false, true] {
            let y = rope(cpu(), &p, &x, &cos, &sin, &positions, inverse).unwrap();
            for far in [on_gpu(&x), shifted(&x), swapped(&x)] {
                let there =
                    rope(gpu(), &p, &far, &far_cos, &far_sin, &far_positions, inverse).unwrap();
                assert_near("rope", &there, &y);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn heads_of_models() {
    for dtype in [DType::F32, DType::Bf16] {
        compare(67, 3, 32, 0, dtype, 1);
        compare(33, 4, 64, 0, dtype, 2);
        compare(29, 2, 128, 0, dtype, 3);
        compare(19, 2, 16, 48, dtype, 4);
        compare(5, 1, 8, 24, dtype, 5);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn any_sizes(
        tokens in 0usize..40, heads in 1usize..5, half in 0usize..20, plain in 0usize..9,
        short in any::<bool>(), seed in any::<u64>(),
    ) {
        prop_assume!(half + plain > 0);
        compare(tokens, heads, half, plain, if short { DType::Bf16 } else { DType::F32 }, seed);
    }
}
