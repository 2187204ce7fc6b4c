//! How far results of operations may differ that treat each element or row for itself.

use graft_tensor::ops::concat;
use graft_tensor::{DType, Tensor};

use crate::common::{cpu, on_gpu};

/// Asserts that each element of a result is that of the CPU up to a part of itself and a part of the
/// root mean square of all: for f32 a few roundings of both; for bf16 the distance between
/// neighbours, 2^-7 at most, as a result may be rounded to either, and 2^-12 of the mean size, because
/// beside bf16 the tail of the normal distribution is computed to 3e-5.
#[track_caller]
pub fn assert_near(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    assert_eq!(found.dtype(), expected.dtype(), "{what}");
    let (relative, absolute) = match expected.dtype() {
        DType::Bf16 => (1.0 / 128.0, 1.0 / 4096.0),
        _ => (4e-6, 4e-6),
    };
    let (found, wanted) = (found.to_f64().unwrap(), expected.to_f64().unwrap());
    let finite = || wanted.iter().filter(|x| x.is_finite());
    let squares: f64 = finite().map(|x| x * x).sum();
    let size = (squares / finite().count().max(1) as f64).sqrt();
    for (i, (&f, &w)) in found.iter().zip(&wanted).enumerate() {
        let alike = f == w || (f.is_nan() && w.is_nan());
        assert!(
            alike || (f - w).abs() <= relative * w.abs() + absolute * size,
            "{what} {} {}: element {i} is {f:e} and should be {w:e}; the mean size is {size:e}",
            expected.dtype(),
            expected.shape(),
        );
    }
}

/// `x` on the GPU, in a view that begins one element after its storage: no row lies where instructions
/// for 16 bytes want it.
pub fn shifted(x: &Tensor) -> Tensor {
    let first = Tensor::zeros(cpu(), x.dtype(), &[1]).unwrap();
    let flat = x.reshape(&[x.count()]).unwrap();
    let long = on_gpu(&concat(cpu(), &[&first, &flat], 0).unwrap());
    let view = long.narrow(0, 1, x.count()).unwrap();
    view.reshape(x.shape()).unwrap()
}

/// `x` on the GPU, as a view with its last two dimensions swapped in storage.
pub fn swapped(x: &Tensor) -> Tensor {
    let turned = x.t().unwrap();
    let stored = turned.contiguous(cpu()).unwrap();
    on_gpu(&stored).t().unwrap()
}
