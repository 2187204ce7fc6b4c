//! Bytes on their way to a GPU and back, for which nobody waits.

use graft_tensor::ops::affine;
use graft_tensor::{DType, Device, Memory, Tensor};

use crate::common::cpu;

fn value(number: usize, i: usize) -> f32 {
    ((number * 31 + i * 7) % 1009) as f32
}

/// More than the pinned memory holds, in pieces of all sizes, some of which do not go that way, with operations between
/// them: each arrives as it was when it was sent.
#[test]
#[ignore = "needs a GPU"]
fn what_is_sent_arrives_as_it_was() {
    let m = Memory::of(Device::Cuda(0)).unwrap();
    let mut sums: Vec<(usize, usize, Tensor)> = Vec::new();
    let mut here = Vec::new();
    for number in 0..60 {
        let count = [1, 3, 64, 1000, 65_536, 300_000, 1_048_576, 1_500_000][number % 8];
        // The same place of this machine's memory each time.
        here.clear();
        here.extend((0..count).map(|i| value(number, i)));
        let sent = Tensor::from_slice(&m, &here, &[count]).unwrap();
        sums.push((number, count, affine(&m, &sent, 2.0, 0.0).unwrap()));
        match number % 7 {
            0 => m.submit().unwrap(),
            3 => drop(sums[number / 2].2.to_vec::<f32>().unwrap()),
            _ => {}
        }
    }
    for (number, count, sum) in &sums {
        let found = sum.to_vec::<f32>().unwrap();
        let mut all = found.iter().enumerate();
        assert!(
            all.all(|(i, x)| *x == 2.0 * value(*number, i)),
            "{number}: {count} elements"
        );
    }
}

/// What is looked at later is what it was when it was asked for, in whatever order it is looked at, if at all.
#[test]
#[ignore = "needs a GPU"]
fn what_is_looked_at_later_is_what_it_was() {
    let m = Memory::of(Device::Cuda(0)).unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        let mut x = Tensor::full(&m, dtype, &[1], 1.0).unwrap();
        let mut same = Tensor::full(cpu(), dtype, &[1], 1.0).unwrap();
        // More than there are places for, and most of the time some that were dropped.
        for held in [10, 63, 100] {
            let mut items = Vec::new();
            for i in 0..held {
                let offset = if i % 2 == 0 { 3.0 } else { 5.0 };
                x = affine(&m, &x, -1.0, offset).unwrap();
                same = affine(cpu(), &same, -1.0, offset).unwrap();
                let item = x.item_later().unwrap();
                if i % 5 == 4 {
                    continue;
                }
                items.push((item, same.item().unwrap()));
                x = affine(&m, &x, 1.0, 0.0).unwrap();
                if i % 11 == 0 {
                    m.submit().unwrap();
                }
            }
            items.reverse();
            for (item, wanted) in items {
                assert_eq!(item.wait().unwrap(), wanted);
            }
        }
    }
    let kept = x_plus_one_later(&m);
    assert_eq!(kept.wait().unwrap(), 8.0);
    assert!(
        Tensor::zeros(&m, DType::F32, &[2])
            .unwrap()
            .item_later()
            .is_err()
    );
    let here = Tensor::full(cpu(), DType::F32, &[1], 2.5).unwrap();
    let item = here.item_later().unwrap();
    assert!(item.is_known());
    assert_eq!(item.wait().unwrap(), 2.5);
}

/// Of a tensor that is gone when its number is looked at, and whose memory others have.
fn x_plus_one_later(m: &Memory) -> graft_tensor::Item {
    let x = Tensor::full(m, DType::F32, &[1], 7.0).unwrap();
    let item = affine(m, &x, 1.0, 1.0).unwrap().item_later().unwrap();
    drop(x);
    for _ in 0..4 {
        drop(Tensor::full(m, DType::F32, &[1], -1.0).unwrap());
    }
    item
}
