//! Transfers, fills, casts and strided copies.

use graft_tensor::ops::cast;
use graft_tensor::{Category, DType, Device, Error, Memory, Tensor};
use proptest::prelude::*;

use crate::common::{assert_close, assert_same, cpu, gpu, integers, normal, on_gpu};

#[test]
#[ignore = "needs a GPU"]
fn what_goes_there_comes_back() {
    for dtype in [DType::F32, DType::Bf16, DType::F16, DType::F64] {
        for shape in [&[0, 3][..], &[1], &[7, 5], &[1000, 33]] {
            let x = normal(dtype, shape, 1);
            let there = on_gpu(&x);
            assert_eq!(there.is_on_device(), x.count() > 0);
            assert_same("a round trip", &there, &x);
            let back = there.to_memory(cpu()).unwrap();
            assert_eq!(back.memory().device(), Device::Cpu);
            assert_same("back", &back, &x);
            let bytes = Tensor::from_bytes(gpu(), dtype, shape, &x.to_bytes().unwrap()).unwrap();
            assert_same("from bytes", &bytes, &x);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn integers_stay_here() {
    let mut x = on_gpu(&integers(&[3, -1, 7]));
    assert!(!x.is_on_device());
    assert_eq!(x.slice::<i64>().unwrap(), [3, -1, 7]);
    x.slice_mut::<i64>().unwrap()[1] = 5;
    assert_eq!(x.to_vec::<i64>().unwrap(), [3, 5, 7]);
}

#[test]
#[ignore = "needs a GPU"]
fn floats_are_read_by_copies_alone() {
    let mut x = on_gpu(&normal(DType::F32, &[4, 4], 2));
    assert!(matches!(x.slice::<f32>(), Err(Error::Device { .. })));
    assert!(matches!(x.slice_mut::<f32>(), Err(Error::Device { .. })));
    assert!(matches!(x.to_vec::<f64>(), Err(Error::DType { .. })));
}

#[test]
#[ignore = "needs a GPU"]
fn fills() {
    for dtype in [DType::F32, DType::Bf16, DType::F16, DType::F64, DType::I64] {
        for value in [0.0, 1.0, -3.25] {
            let x = Tensor::full(gpu(), dtype, &[257, 3], value).unwrap();
            let value = if dtype == DType::I64 {
                value.trunc()
            } else {
                value
            };
            assert!(x.to_f64().unwrap().iter().all(|&x| x == value));
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn casts_round_as_here() {
    // Every upper half of a float, with lower halves around the middle between two bf16.
    let words = (0..=u16::MAX).flat_map(|high| {
        [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff]
            .map(|low| f32::from_bits(u32::from(high) << 16 | low))
    });
    let words: Vec<f32> = words.filter(|x| !x.is_nan()).collect();
    let x = Tensor::from_slice(cpu(), &words, &[words.len()]).unwrap();
    let short = cast(cpu(), &x, DType::Bf16).unwrap();
    let there = cast(gpu(), &on_gpu(&x), DType::Bf16).unwrap();
    assert_same("to bf16", &there, &short);
    let wide = cast(gpu(), &there, DType::F32).unwrap();
    assert_same("to f32", &wide, &cast(cpu(), &short, DType::F32).unwrap());
    let x = normal(DType::F32, &[1000], 3);
    let near = cast(
        gpu(),
        &cast(gpu(), &on_gpu(&x), DType::Bf16).unwrap(),
        DType::F32,
    )
    .unwrap();
    // Half a unit in the last of 8 places, of numbers up to 4 times their root mean square.
    assert_close("to bf16 and back", &near, &x, 4.0 / 256.0);
    let nan = Tensor::full(gpu(), DType::F32, &[5], f64::NAN).unwrap();
    let nan = cast(gpu(), &nan, DType::Bf16).unwrap();
    assert!(nan.to_f64().unwrap().iter().all(|x| x.is_nan()));
}

#[test]
#[ignore = "needs a GPU"]
fn memory_is_counted_and_reused() {
    let m = Memory::of(Device::Cuda(0))
        .unwrap()
        .with(Category::Workspace);
    let x = Tensor::empty(&m, DType::F32, &[1000]).unwrap();
    assert_eq!(m.usage().live(Category::Workspace), 4000);
    drop(x);
    let held = m.usage().held;
    drop(Tensor::empty(&m, DType::Bf16, &[2000]).unwrap());
    assert_eq!(m.usage().held, held);
    assert_eq!(m.usage().live(Category::Workspace), 0);
    let plan = Memory::planned_for(Device::Cuda(0)).with(Category::Workspace);
    drop(Tensor::empty(&plan, DType::F32, &[1000]).unwrap());
    assert_eq!(plan.usage().peak_total, m.usage().peak_total);
}

#[test]
#[ignore = "needs a GPU"]
fn more_than_there_is_is_refused() {
    let m = Memory::of(Device::Cuda(0)).unwrap();
    let kept = Tensor::zeros(&m, DType::F32, &[10]).unwrap();
    let error = Tensor::empty(&m, DType::F32, &[1 << 40]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::OutOfMemory {
                device: Some(_),
                ..
            }
        ),
        "{error}"
    );
    assert!(
        kept.to_f64().unwrap().iter().all(|&x| x == 0.0),
        "the rest still works"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn strided_views_copy_as_here(
        dims in prop::collection::vec(1usize..7, 1..5), seed in 0u64..1000,
        order in Just((0..4usize).collect::<Vec<_>>()).prop_shuffle(), short in any::<bool>(),
    ) {
        let dtype = if short { DType::Bf16 } else { DType::F32 };
        let x = normal(dtype, &dims, seed);
        let order: Vec<usize> = order.into_iter().filter(|&axis| axis < dims.len()).collect();
        let axis = order[0];
        let length = dims[axis].div_ceil(2);
        let view = |x: &Tensor| {
            let narrow = x.narrow(axis, dims[axis] - length, length).unwrap();
            narrow.permute(&order).unwrap()
        };
        let there = on_gpu(&x);
        assert_same("a view", &view(&there), &view(&x));
        let copy = view(&there).copy(gpu()).unwrap();
        assert_same("a copy of a view", &copy, &view(&x).copy(cpu()).unwrap());
        let expanded = [&[3][..], &view(&x).shape()[..]].concat();
        let wide = view(&there).expand(&expanded).unwrap().copy(gpu()).unwrap();
        assert_same("expanded", &wide, &view(&x).expand(&expanded).unwrap().copy(cpu()).unwrap());
    }
}
