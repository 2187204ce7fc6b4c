//! Tensors whose elements are codes: they are read whole, whatever a view shows of them.

use graft_kernels::quantised::Codes;

use super::Tensor;
use crate::error::{Error, Result};
use crate::memory::Memory;

impl Tensor {
    /// All codes of the storage, of which the view's first element is number [`Tensor::first`].
    pub(crate) fn codes(&self) -> Result<Codes<'_>> {
        let format = self.dtype().format().ok_or_else(|| self.no_codes())?;
        let bytes = self.storage.block.bytes();
        let bytes = bytes.ok_or_else(|| self.absent("reading its codes"))?;
        let count = self.storage.count;
        Ok(Codes::new(format, count, &bytes[..self.storage.bytes()]))
    }

    /// The bytes of all codes, to write.
    pub(crate) fn codes_mut(&mut self) -> Result<&mut [u8]> {
        if !self.dtype().is_quantised() {
            return Err(self.no_codes());
        }
        if self.is_planned() || self.is_on_device() {
            return Err(self.absent("writing its codes"));
        }
        let shape = self.shape;
        let storage = self.storage_mut()?;
        let length = storage.bytes();
        let bytes = storage.block.bytes_mut().ok_or(Error::Planned { shape })?;
        Ok(&mut bytes[..length])
    }

    fn no_codes(&self) -> Error {
        Error::DType {
            op: "codes",
            what: format!("the tensor {}", self.shape),
            found: self.dtype(),
            expected: "nf4 or int8".into(),
        }
    }

    /// The number of the view's first element in the storage.
    pub(crate) fn first(&self) -> usize {
        self.offset
    }

    /// Elements of the storage.
    pub(crate) fn stored(&self) -> usize {
        self.storage.count
    }

    /// The same view of this tensor's storage as `like` is of its own, which has as many elements.
    pub(crate) fn seen_as(self, like: &Tensor) -> Tensor {
        Tensor {
            shape: like.shape,
            strides: like.strides,
            offset: like.offset,
            ..self
        }
    }

    /// The bytes of all codes of the storage, as they are in memory.
    pub(super) fn stored_bytes(&self) -> Result<Vec<u8>> {
        let length = self.storage.bytes();
        if !self.is_on_device() {
            let bytes = self.storage.block.bytes();
            return Ok(bytes.ok_or_else(|| self.absent("reading its codes"))?[..length].to_vec());
        }
        let mut out = vec![0; length];
        let gpu = self.memory().opened_gpu();
        let gpu = gpu.ok_or_else(|| self.not_on_gpu())?;
        gpu.download(self.device_codes()?, &mut out)?;
        Ok(out)
    }

    /// The same codes in another memory, and the same view of them.
    pub(super) fn codes_to(&self, memory: &Memory) -> Result<Tensor> {
        let mut out = Tensor::empty(memory, self.dtype(), &[self.stored()])?;
        if !out.is_planned() {
            let bytes = self.stored_bytes()?;
            match out.is_on_device() {
                true => out.upload(&bytes)?,
                false => out.codes_mut()?.copy_from_slice(&bytes),
            }
        }
        Ok(out.seen_as(self))
    }
}
