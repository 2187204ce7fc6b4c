use graft_tensor::ops;
use graft_tensor::{DType, Memory, Tensor};
use ndarray::{ArrayD, Axis, IxDyn, Slice};

use crate::common::*;

const ALL: [DType; 7] = [
    DType::F32,
    DType::F64,
    DType::Bf16,
    DType::F16,
    DType::I64,
    DType::I32,
    DType::U8,
];

fn values(t: &Tensor) -> ArrayD<f64> {
    ArrayD::from_shape_vec(&t.shape()[..], t.to_f64().unwrap()).unwrap()
}

#[test]
fn inputs_of_these_tests_are_what_they_say() {
    let strided = std::cell::Cell::new(0);
    cases(|case| {
        let x = case.input(0, &case.dims);
        let t = x.on(&Memory::cpu());
        assert_eq!(values(&t), x.values);
        strided.set(strided.get() + usize::from(!t.is_contiguous()));
    });
    assert!(strided.get() > 10, "most inputs are strided views");
}

#[test]
fn views_of_views() {
    cases(|case| {
        let x = case.input(0, &case.dims);
        let m = Memory::cpu();
        let (mut t, mut want) = (x.on(&m), x.values.clone());
        // Three views, each on top of the last.
        for round in 0..3 {
            let pick = case.pick + 7 * round + usize::from(case.flags[round]);
            let axis = pick % 4;
            match pick % 5 {
                0 => {
                    let mut order = vec![0, 1, 2, 3];
                    order.rotate_left(axis);
                    t = t.permute(&order).unwrap();
                    want = want.permuted_axes(IxDyn(&order));
                }
                1 => {
                    let length = want.shape()[axis];
                    let start = length / 3;
                    t = t.narrow(axis, start, length - start - length / 4).unwrap();
                    want.slice_axis_inplace(Axis(axis), Slice::from(start..length - length / 4));
                }
                2 => {
                    t = t.t().unwrap();
                    want.swap_axes(2, 3);
                }
                3 => {
                    let mut shape = want.shape().to_vec();
                    if shape[axis] == 1 {
                        shape[axis] = 3;
                    }
                    t = t.expand(&shape).unwrap();
                    want = want.broadcast(IxDyn(&shape)).unwrap().to_owned();
                }
                _ => {
                    let shape = [
                        want.shape()[0] * want.shape()[1],
                        want.shape()[2],
                        1,
                        want.shape()[3],
                    ];
                    t = t.contiguous(&m).unwrap().reshape(&shape).unwrap();
                    want = want.as_standard_layout().to_owned();
                    want = want.into_shape_with_order(IxDyn(&shape)).unwrap();
                }
            }
            assert_eq!(values(&t), want);
            let whole = t.contiguous(&m).unwrap();
            assert!(whole.is_contiguous());
            assert_eq!(values(&whole), want);
            assert_eq!(whole.shares_storage(&t), t.is_contiguous());
        }
    });
}

#[test]
fn views_share_and_copies_do_not() {
    let m = Memory::cpu();
    let x = upload(&m, DType::F32, (0..24).map(f64::from).collect(), &[2, 3, 4]);
    let before = m.usage();
    let views = [
        x.reshape(&[6, 4]).unwrap(),
        x.permute(&[2, 0, 1]).unwrap(),
        x.narrow(1, 1, 2).unwrap(),
        x.t().unwrap(),
        x.expand(&[5, 2, 3, 4]).unwrap(),
        x.contiguous(&m).unwrap().into_owned(),
        ops::cast(&m, &x, DType::F32).unwrap(),
    ];
    assert!(views.iter().all(|v| v.shares_storage(&x)));
    assert_eq!(m.usage(), before, "a view costs nothing");
    assert!(!x.copy(&m).unwrap().shares_storage(&x));
    assert!(!views[1].contiguous(&m).unwrap().shares_storage(&x));
}

#[test]
fn scalars_and_expanded_leading_dimensions() {
    let m = Memory::cpu();
    let s = upload(&m, DType::F64, vec![2.5], &[]);
    assert_eq!(s.item().unwrap(), 2.5);
    assert_eq!(s.expand(&[2, 2]).unwrap().to_f64().unwrap(), [2.5; 4]);
    assert_eq!(s.reshape(&[1, 1]).unwrap().shape()[..], [1, 1]);
    assert_eq!(s.expand(&[0, 3]).unwrap().count(), 0);
}

#[test]
fn bytes_there_and_back() {
    for dtype in ALL {
        cases(|case| {
            let x = case.between(0, &case.dims, 0.0, 200.0);
            // Bit for bit, whatever the view.
            let y = run1(|m| {
                let t = x.cast_on(dtype, &Memory::cpu());
                let bytes = t.to_bytes()?;
                assert_eq!(bytes.len(), t.count() * dtype.size());
                let back = Tensor::from_bytes(m, dtype, t.shape(), &bytes)?;
                if !back.is_planned() {
                    assert_eq!(back.to_bytes()?, bytes);
                }
                Ok(back)
            });
            let want = match dtype {
                DType::I64 | DType::I32 | DType::U8 => x.values.mapv(f64::trunc),
                _ => x.values.mapv(|x| round(dtype, x)),
            };
            equal(&y, &want);
        });
    }
}

#[test]
fn bytes_are_little_endian() {
    let m = Memory::cpu();
    let t = Tensor::from_vec(&m, vec![0x0102_0304_i32, -1], &[2]).unwrap();
    assert_eq!(t.to_bytes().unwrap(), [4, 3, 2, 1, 255, 255, 255, 255]);
    let one = Tensor::from_bytes(&m, DType::Bf16, &[1], &[0x80, 0x3F]).unwrap();
    assert_eq!(one.item().unwrap(), 1.0);
}

#[test]
fn constants_of_every_type() {
    for dtype in ALL {
        let y = run(|m| {
            Ok(vec![
                Tensor::zeros(m, dtype, &[2, 3])?,
                Tensor::full(m, dtype, &[4], 3.0)?,
            ])
        });
        assert!(y[0].values.iter().all(|&x| x == 0.0));
        assert!(y[1].values.iter().all(|&x| x == 3.0));
        assert_eq!((y[0].dtype, y[1].dtype), (dtype, dtype));
    }
}
