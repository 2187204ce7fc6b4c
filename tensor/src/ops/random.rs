//! Random numbers as functions of a key and a counter (Philox): the same on every machine and for
//! any number of threads. For a GPU they are drawn here: they are what a run begins with.

use graft_kernels::philox as kernel;
pub use graft_kernels::philox::Key;

use crate::error::Result;
use crate::{DType, Device, Memory, Tensor};

/// Uniform numbers in `[low, high)`, f32.
///
/// # Errors
/// A shape that is refused.
pub fn uniform(m: &Memory, key: Key, shape: &[usize], low: f32, high: f32) -> Result<Tensor> {
    if m.device() != Device::Cpu {
        return uniform(&m.on_cpu(), key, shape, low, high)?.to_memory(m);
    }
    let mut y = Tensor::empty(m, DType::F32, shape)?;
    if !y.is_planned() {
        kernel::fill_uniform(key, y.slice_mut::<f32>()?, low, high);
    }
    Ok(y)
}

/// Normal numbers, f32.
///
/// # Errors
/// A shape that is refused.
pub fn normal(m: &Memory, key: Key, shape: &[usize], mean: f32, std: f32) -> Result<Tensor> {
    if m.device() != Device::Cpu {
        return normal(&m.on_cpu(), key, shape, mean, std)?.to_memory(m);
    }
    let mut y = Tensor::empty(m, DType::F32, shape)?;
    if !y.is_planned() {
        kernel::fill_normal(key, y.slice_mut::<f32>()?, mean, std);
    }
    Ok(y)
}

/// The number of that index among the uniform numbers in [0, 1) of a key.
pub fn uniform_at(key: Key, index: u64) -> f32 {
    kernel::uniform(key, index)
}

/// Brings `items` into a random order (Fisher and Yates).
pub fn shuffle(key: Key, items: &mut [usize]) {
    kernel::shuffle(key, items);
}
