//! A tensor's elements on a GPU, and the way there and back.

use graft_kernels::cuda::{Slice, SliceMut};

use super::Tensor;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::with_dtype;

impl Tensor {
    /// The elements from the view's first one to the storage's end, for kernels of a GPU that take
    /// strides.
    pub(crate) fn device_strided(&self) -> Result<Slice<'_>> {
        let first = self.offset.min(self.storage.count);
        self.device_range(first, self.storage.count - first)
    }

    /// The elements in row-major order, for kernels of a GPU. Integers are copied there first.
    pub(crate) fn device(&self) -> Result<Slice<'_>> {
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { shape: self.shape });
        }
        self.device_range(self.offset.min(self.storage.count), self.count())
    }

    /// Whether the view's first element lies on a 16-byte boundary, as storage begins on one.
    pub(crate) fn begins_aligned(&self) -> bool {
        (self.offset * self.dtype().size()).is_multiple_of(16)
    }

    /// The bytes of all codes of the storage, for kernels of a GPU.
    pub(crate) fn device_codes(&self) -> Result<Slice<'_>> {
        self.device_range(0, self.storage.bytes())
    }

    pub(super) fn device_range(&self, first: usize, count: usize) -> Result<Slice<'_>> {
        let (storage, dtype) = (&self.storage, self.dtype());
        let slice = match storage.memory.opened_gpu() {
            Some(gpu) => storage.block.device(gpu, dtype, first, count)?,
            None => None,
        };
        slice.ok_or_else(|| self.not_on_gpu())
    }

    pub(super) fn not_on_gpu(&self) -> Error {
        match self.is_planned() {
            true => Error::Planned { shape: self.shape },
            false => Error::Device {
                op: "this operation",
                shape: self.shape,
                found: self.memory().device(),
                expected: Device::Cuda(0),
            },
        }
    }

    /// The elements in row-major order, or the bytes of all codes, for kernels of a GPU to write.
    pub(crate) fn device_mut(&mut self) -> Result<SliceMut<'_>> {
        let (shape, offset, dtype) = (self.shape, self.offset, self.dtype());
        let count = match dtype.is_quantised() {
            true => self.storage.bytes(),
            false => shape.count(),
        };
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { shape });
        }
        let absent = self.not_on_gpu();
        let storage = self.storage_mut()?;
        let slice = storage.block.device_mut(dtype, offset, count);
        slice.ok_or(absent)
    }

    /// Fills a tensor on a GPU with the bytes of its elements.
    pub(super) fn upload(&mut self, bytes: &[u8]) -> Result<()> {
        let gpu = self.memory().opened_gpu().cloned();
        let gpu = gpu.ok_or_else(|| self.not_on_gpu())?;
        Ok(gpu.upload(bytes, self.device_mut()?)?)
    }

    /// The same elements in another memory, which may be another device's; a copy unless it is the
    /// same allocator and category.
    ///
    /// # Errors
    /// A planned tensor, unless `memory` is planned too; a failed transfer.
    pub fn to_memory(&self, memory: &Memory) -> Result<Tensor> {
        if memory.is_same(self.memory()) {
            return Ok(self.clone());
        }
        if self.dtype().is_quantised() {
            return self.codes_to(memory);
        }
        if memory.is_planned() && self.dtype().is_float() {
            return Tensor::empty(memory, self.dtype(), &self.shape);
        }
        with_dtype!(self.dtype(), T => {
            if self.is_contiguous() && !self.is_on_device() {
                return Tensor::from_slice(memory, self.slice::<T>()?, &self.shape);
            }
            Tensor::from_slice(memory, &self.to_vec::<T>()?, &self.shape)
        })
    }
}
