//! Copies of weights in bf16, which products on a GPU read in place of the f32 that the optimizer moves: a weight is
//! rounded when it changes, not for each product that it takes part in.
//!
//! A copy belongs to the storage that it was made of. Whoever is given that storage to write to takes the copy away
//! ([`Tensor::storage_mut`], through which all writing goes), but for [`Tensor::device_mut_with_rounded`], whose caller
//! writes both. So there is no way to read one that is out of date.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use graft_kernels::cuda::{self, SliceMut};

use super::{Storage, Tensor};
use crate::DType;
use crate::error::{Error, Result};
use crate::memory::Category;
use crate::shape::Shape;

/// A storage's copy, if one was made: its elements, and perhaps zeros behind them.
#[derive(Default)]
pub(super) struct Rounded(Mutex<Option<Arc<Storage>>>);

impl Rounded {
    /// Gives the copy up: it is not that of the elements any more.
    pub fn forget(&mut self) {
        *self.0.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The copy to write to, unless something else holds it: then it is given up.
    fn unique(&mut self) -> Option<&mut Storage> {
        let copy = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        if copy
            .as_mut()
            .is_some_and(|copy| Arc::get_mut(copy).is_none())
        {
            *copy = None;
        }
        copy.as_mut().and_then(Arc::get_mut)
    }
}

impl fmt::Debug for Rounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rounded")
    }
}

impl Tensor {
    /// The same view of the elements rounded to bf16, which are counted as weights and kept. For f32 on a GPU, or a
    /// plan of that.
    ///
    /// # Errors
    /// More than the GPU has.
    pub(crate) fn rounded(&self) -> Result<Tensor> {
        Ok(Tensor {
            storage: self.rounded_storage(self.storage.count)?,
            ..self.clone()
        })
    }

    /// The same with zeros behind the rows, up to `rows`; `None` if these are not all that the storage holds.
    ///
    /// # Errors
    /// As [`Tensor::rounded`].
    pub(crate) fn rounded_with_rows(&self, rows: usize) -> Result<Option<Tensor>> {
        let whole = self.is_whole();
        if !whole || self.shape.rank() == 0 || rows < self.shape[0] {
            return Ok(None);
        }
        let shape = self.shape.replaced(0, Some(rows));
        Ok(Some(Tensor {
            storage: self.rounded_storage(shape.count())?,
            shape,
            strides: shape.row_major_strides(),
            offset: 0,
        }))
    }

    /// The copy with room for at least `room` elements, zeros behind those of the storage.
    fn rounded_storage(&self, room: usize) -> Result<Arc<Storage>> {
        let mut kept = self
            .storage
            .rounded
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(copy) = kept.as_ref().filter(|copy| copy.count >= room) {
            return Ok(Arc::clone(copy));
        }
        *kept = None;
        let count = self.storage.count;
        let memory = self.memory().with(Category::Weights);
        let mut copy = Tensor::empty(&memory, DType::Bf16, &[room])?;
        if let Some(on) = memory.gpu() {
            on.run(|gpu| {
                let from = self.device_range(0, count)?;
                let to = copy.device_mut()?;
                cuda::copy::convert(gpu, from, to.part(0..count))?;
                if room > count {
                    let rest = copy.device_mut()?.part(count..room);
                    cuda::copy::fill(gpu, rest, 0)?;
                }
                Ok(())
            })?;
        }
        *kept = Some(Arc::clone(&copy.storage));
        Ok(copy.storage)
    }

    /// As [`Tensor::device_mut`], with the part of the rounded copy that is this tensor's, if there is a copy: whoever
    /// writes to the one writes the same to the other.
    pub(crate) fn device_mut_with_rounded(
        &mut self,
    ) -> Result<(SliceMut<'_>, Option<SliceMut<'_>>)> {
        let (shape, offset, dtype): (Shape, _, _) = (self.shape, self.offset, self.dtype());
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { shape });
        }
        let absent = self.not_on_gpu();
        let storage = Arc::get_mut(&mut self.storage).ok_or(Error::Shared { shape })?;
        let count = shape.count();
        let own = storage
            .block
            .device_mut(dtype, offset, count)
            .ok_or(absent)?;
        let copy = storage.rounded.unique();
        let copy = copy.and_then(|copy| copy.block.device_mut(DType::Bf16, offset, count));
        Ok((own, copy))
    }
}
