//! One row per sequence, and back.

use graft_tensor::ops::{Pool, pool, pool_backward};
use graft_tensor::{DType, Tensor};
use proptest::prelude::*;

use crate::common::{assert_same, cpu, gpu, integers, normal, on_gpu};
use crate::near::{assert_near, shifted};

fn compare(x: &Tensor, lengths: &[usize]) {
    let mut offsets = vec![0i64];
    offsets.extend(lengths.iter().scan(0, |sum, &n| {
        *sum += n as i64;
        Some(*sum)
    }));
    let offsets = integers(&offsets);
    let far_offsets = on_gpu(&offsets);
    let dy = normal(x.dtype(), &[lengths.len(), x.shape()[1]], 9);
    for kind in Pool::ALL {
        let what = format!("{kind:?}");
        let y = pool(cpu(), kind, x, &offsets).unwrap();
        let found = pool(gpu(), kind, &on_gpu(x), &far_offsets).unwrap();
        assert_near(&what, &found, &y);
        let again = pool(gpu(), kind, &shifted(x), &far_offsets).unwrap();
        assert_same(&what, &again, &found);
        let dx = pool_backward(cpu(), kind, Some(x), &offsets, &dy).unwrap();
        for far in [on_gpu(x), shifted(x)] {
            let there = pool_backward(gpu(), kind, Some(&far), &far_offsets, &on_gpu(&dy));
            assert_same(&format!("{what} backward"), &there.unwrap(), &dx);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn any_sizes(
        lengths in proptest::collection::vec(1usize..40, 0..6), columns in 1usize..70,
        wide in any::<bool>(), short in any::<bool>(), seed in any::<u64>(),
    ) {
        let dtype = if short { DType::Bf16 } else { DType::F32 };
        let columns = if wide { 8 * columns } else { columns };
        let x = normal(dtype, &[lengths.iter().sum(), columns], seed);
        compare(&x, &lengths);
    }
}

/// The largest of equal ones is the first; what is not a number stays one.
#[test]
#[ignore = "needs a GPU"]
fn ties_and_what_is_not_a_number() {
    let rows: Vec<f32> = (0..40 * 16).map(|i| (i / 16 % 3) as f32).collect();
    let x = Tensor::from_slice(cpu(), &rows, &[40, 16]).unwrap();
    compare(&x, &[40]);
    compare(&x, &[1, 39]);
    let mut some = rows;
    some[0] = f32::NAN; // in the first row of the first sequence
    some[20 * 16 + 5] = f32::NAN; // and in one of the second
    let x = Tensor::from_slice(cpu(), &some, &[40, 16]).unwrap();
    compare(&x, &[15, 25]);
}
