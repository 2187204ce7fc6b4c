//! Devices by name, and the memory of a GPU handed out as ranges.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

pub use graft_kernels::Isa;
use graft_kernels::cuda::{self, Buffer, Scalar, Slice, SliceMut};
pub use graft_kernels::cuda::{Gpu, Limits};

use crate::DType;
use crate::ranges::{End, Range, Ranges};

/// Where tensors lie and operations run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub enum Device {
    /// This machine's processor
    #[default]
    Cpu,
    /// NVIDIA GPU number n
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    /// `cpu`, `cuda` (the first GPU) or `cuda:N`.
    fn from_str(text: &str) -> Result<Device, String> {
        let number = match text {
            "cpu" => return Ok(Device::Cpu),
            "cuda" => Some(0),
            other => other
                .strip_prefix("cuda:")
                .filter(|n| !n.starts_with('+')) // which numbers may otherwise begin with
                .and_then(|n| n.parse().ok()),
        };
        number
            .map(Device::Cuda)
            .ok_or_else(|| format!("{text:?} is no device; use cpu, cuda or cuda:N"))
    }
}

impl From<DType> for Scalar {
    fn from(dtype: DType) -> Scalar {
        match dtype {
            DType::F32 => Scalar::F32,
            DType::F64 => Scalar::F64,
            DType::Bf16 => Scalar::Bf16,
            DType::F16 => Scalar::F16,
            DType::I64 => Scalar::I64,
            DType::I32 => Scalar::I32,
            // Of codes there is no more to say than that they are bytes.
            DType::U8 | DType::Nf4 | DType::Int8 => Scalar::U8,
        }
    }
}

/// Bytes of a GPU that nobody else holds.
pub(crate) struct DeviceRegion {
    buffer: Arc<Buffer>,
    range: Range,
}

impl DeviceRegion {
    /// `count` elements from element `first`.
    pub fn slice(&self, dtype: DType, first: usize, count: usize) -> Slice<'_> {
        self.check(dtype, first, count);
        let start = self.range.start + first * dtype.size();
        self.buffer.slice(start, count, dtype.into())
    }

    /// The same, to write.
    pub fn slice_mut(&mut self, dtype: DType, first: usize, count: usize) -> SliceMut<'_> {
        self.mirror(dtype, first, count)
    }

    /// The same, for a copy of what this machine holds: written by whoever finds it out of date,
    /// always with the same bytes.
    pub fn mirror(&self, dtype: DType, first: usize, count: usize) -> SliceMut<'_> {
        self.check(dtype, first, count);
        let start = self.range.start + first * dtype.size();
        self.buffer.slice_mut(start, count, dtype.into())
    }

    fn check(&self, dtype: DType, first: usize, count: usize) {
        let end = (first + count) * dtype.size();
        assert!(end <= self.range.bytes, "{end} of {}", self.range.bytes);
    }
}

/// The buffers of a GPU, and what is taken of them. What is released may be taken again at once: a
/// GPU does one thing after the other.
pub(crate) struct DeviceArena {
    gpu: Gpu,
    ranges: Ranges,
    /// By number
    buffers: Vec<Arc<Buffer>>,
}

impl DeviceArena {
    pub fn new(gpu: Gpu) -> DeviceArena {
        let device = Device::Cuda(gpu.limits().ordinal);
        DeviceArena {
            gpu,
            ranges: Ranges::of(device),
            buffers: Vec::new(),
        }
    }

    /// Takes at least `bytes`, or `None` if the GPU has no more. The contents are unspecified.
    ///
    /// # Errors
    /// What else the driver says.
    pub fn take(&mut self, bytes: usize, end: End) -> cuda::Result<Option<DeviceRegion>> {
        let (gpu, buffers) = (&self.gpu, &mut self.buffers);
        let mut failure = None;
        let range = self
            .ranges
            .take(bytes, end, |bytes| match gpu.allocate(bytes) {
                Ok(buffer) => {
                    buffers.push(Arc::new(buffer));
                    true
                }
                Err(cuda::Error::OutOfMemory { .. }) => false,
                Err(error) => {
                    failure = Some(error);
                    false
                }
            });
        match (range, failure) {
            (Some(range), _) => {
                let buffer = Arc::clone(&self.buffers[range.segment]);
                Ok(Some(DeviceRegion { buffer, range }))
            }
            (None, Some(error)) => Err(error),
            (None, None) => Ok(None),
        }
    }

    /// Gives a region back.
    ///
    /// # Panics
    /// If it is another arena's.
    pub fn release(&mut self, region: DeviceRegion) {
        let own = self.buffers.get(region.range.segment);
        assert!(
            own.is_some_and(|own| Arc::ptr_eq(own, &region.buffer)),
            "a region goes back to the arena that it came from"
        );
        self.ranges.release(region.range);
    }

    /// Bytes that were obtained from the device, used or not.
    pub fn obtained(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.bytes()).sum()
    }

    /// Bytes that were ever in use.
    pub fn touched(&self) -> usize {
        self.ranges.touched()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        for device in [Device::Cpu, Device::Cuda(0), Device::Cuda(7)] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for bad in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "CPU"] {
            let error = Device::from_str(bad).unwrap_err();
            assert!(error.contains(bad) && error.contains("cuda:N"), "{error}");
        }
    }
}
