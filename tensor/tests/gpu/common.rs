//! The two devices, random tensors on both, and how far results may differ.

use std::sync::LazyLock;

use graft_kernels::philox::Key;
use graft_tensor::ops::{cast, random};
use graft_tensor::{DType, Device, Memory, Tensor};

/// The first GPU.
pub fn gpu() -> &'static Memory {
    static GPU: LazyLock<Memory> =
        LazyLock::new(|| Memory::of(Device::Cuda(0)).expect("these tests need a GPU"));
    &GPU
}

/// Whether that is a simulated one, on which large sizes take minutes.
pub fn is_simulated() -> bool {
    let gpu = gpu().opened_gpu().expect("it was opened");
    gpu.limits().name.starts_with("simulated")
}

/// This machine.
pub fn cpu() -> &'static Memory {
    static CPU: LazyLock<Memory> = LazyLock::new(Memory::cpu);
    &CPU
}

/// Normal numbers of mean 0 and standard deviation 1, on the CPU.
pub fn normal(dtype: DType, shape: &[usize], seed: u64) -> Tensor {
    let x = random::normal(cpu(), Key::new(seed, 0, 0), shape, 0.0, 1.0).unwrap();
    cast(cpu(), &x, dtype).unwrap()
}

/// The same tensor on the GPU.
pub fn on_gpu(x: &Tensor) -> Tensor {
    let y = x.to_memory(gpu()).unwrap();
    assert_eq!(y.memory().device(), Device::Cuda(0));
    y
}

/// An integer tensor on the CPU.
pub fn integers(values: &[i64]) -> Tensor {
    Tensor::from_slice(cpu(), values, &[values.len()]).unwrap()
}

/// The largest difference relative to the root mean square of `expected`: what sums of many terms
/// of that size leave.
pub fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.shape(), expected.shape());
    assert_eq!(found.dtype(), expected.dtype());
    let (found, expected) = (found.to_f64().unwrap(), expected.to_f64().unwrap());
    let squares: f64 = expected.iter().map(|x| x * x).sum();
    let size = (squares / expected.len().max(1) as f64).sqrt().max(1e-30);
    let pairs = found.iter().zip(&expected);
    // Equal infinities differ by nothing; what is not a number is as far as can be.
    let apart = |(f, e): (&f64, &f64)| if f == e { 0.0 } else { (f - e).abs() / size };
    pairs.map(apart).fold(0.0, |most, d| {
        if d.is_nan() {
            f64::INFINITY
        } else {
            d.max(most)
        }
    })
}

/// Asserts that a result of the GPU is that of the CPU up to `tolerance` (see [`difference`]).
#[track_caller]
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64) {
    let apart = difference(found, expected);
    assert!(
        apart <= tolerance,
        "{what} {}: {apart:.3e} apart, {tolerance:.1e} allowed",
        expected.shape()
    );
}

/// Asserts that two tensors hold the same bits.
#[track_caller]
pub fn assert_same(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    assert_eq!(found.dtype(), expected.dtype(), "{what}");
    let (found, expected) = (found.to_bytes().unwrap(), expected.to_bytes().unwrap());
    let first = found.iter().zip(&expected).position(|(f, e)| f != e);
    assert_eq!(
        first,
        None,
        "{what}: byte {first:?} of {} differs",
        found.len()
    );
}
