//! The tensor: a shape and strides over shared storage.

mod codes;
mod elements;
mod rounded;
mod transfer;
mod views;

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use graft_kernels::cuda;
use graft_kernels::{Element, copy};
use half::{bf16, f16};

pub use self::elements::Item;
use self::rounded::Rounded;
use crate::error::{Error, Result};
use crate::memory::{Block, Category, Memory};
use crate::shape::{Shape, Strides};
use crate::{DType, ops, with_dtype};

/// Elements that a tensor can hold, tied to their [`DType`].
pub trait TensorElement: Element + bytemuck::Pod {
    /// The type as a value.
    const DTYPE: DType;
}

macro_rules! element {
    ($t:ty, $variant:ident) => {
        impl TensorElement for $t {
            const DTYPE: DType = DType::$variant;
        }
    };
}
element!(f32, F32);
element!(f64, F64);
element!(bf16, Bf16);
element!(f16, F16);
element!(i64, I64);
element!(i32, I32);
element!(u8, U8);

/// Bytes that return to their allocator when the last tensor over them goes.
struct Storage {
    /// `Block::Empty` only while it is dropped, and for tensors without elements
    block: Block,
    dtype: DType,
    count: usize,
    memory: Memory,
    /// See `rounded.rs`
    rounded: Rounded,
}

impl Storage {
    fn bytes(&self) -> usize {
        self.dtype.bytes(self.count)
    }

    /// The elements; `None` if they are only planned. The type must be the storage's.
    fn elements<T: TensorElement>(&self) -> Option<&[T]> {
        let bytes = &self.block.bytes()?[..self.bytes()];
        // No bytes at all have no alignment either.
        Some(if bytes.is_empty() {
            &[]
        } else {
            bytemuck::cast_slice(bytes)
        })
    }

    fn elements_mut<T: TensorElement>(&mut self) -> Option<&mut [T]> {
        let length = self.bytes();
        let bytes = &mut self.block.bytes_mut()?[..length];
        Some(if bytes.is_empty() {
            &mut []
        } else {
            bytemuck::cast_slice_mut(bytes)
        })
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let block = std::mem::replace(&mut self.block, Block::Empty);
        self.memory.release(block, self.bytes());
    }
}

/// An n-dimensional array. Cloning shares the storage.
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    shape: Shape,
    strides: Strides,
    offset: usize,
}

impl Tensor {
    /// A tensor with unspecified elements, for a kernel to fill.
    ///
    /// # Errors
    /// A shape that is refused by [`Shape::new`], or more than the system has.
    pub fn empty(memory: &Memory, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let shape = Shape::new(shape)?;
        let count = shape.count();
        Ok(Tensor {
            storage: Arc::new(Storage {
                block: memory.allocate(dtype, count)?,
                dtype,
                count,
                memory: memory.clone(),
                rounded: Rounded::default(),
            }),
            shape,
            strides: shape.row_major_strides(),
            offset: 0,
        })
    }

    /// All elements zero.
    ///
    /// # Errors
    /// As [`Tensor::empty`].
    pub fn zeros(memory: &Memory, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        Tensor::full(memory, dtype, shape, 0.0)
    }

    /// All elements `value`, rounded to `dtype`.
    ///
    /// # Errors
    /// As [`Tensor::empty`].
    pub fn full(memory: &Memory, dtype: DType, shape: &[usize], value: f64) -> Result<Tensor> {
        let mut tensor = Tensor::empty(memory, dtype, shape)?;
        let shape = tensor.shape;
        if tensor.is_planned() {
            return Ok(tensor);
        }
        if let Some(on) = memory.gpu().filter(|_| dtype.is_float()) {
            let bits = match dtype {
                DType::F32 => u64::from((value as f32).to_bits()),
                DType::Bf16 => u64::from(bf16::from_f64(value).to_bits()),
                DType::F16 => u64::from(f16::from_f64(value).to_bits()),
                _ => value.to_bits(),
            };
            on.run(|gpu| Ok(cuda::copy::fill(gpu, tensor.device_mut()?, bits)?))?;
            return Ok(tensor);
        }
        match dtype {
            DType::F32 => copy::fill(tensor.slice_mut::<f32>()?, value as f32),
            DType::F64 => copy::fill(tensor.slice_mut::<f64>()?, value),
            DType::Bf16 => copy::fill(tensor.slice_mut::<bf16>()?, bf16::from_f64(value)),
            DType::F16 => copy::fill(tensor.slice_mut::<f16>()?, f16::from_f64(value)),
            DType::I64 => copy::fill(tensor.slice_mut::<i64>()?, value as i64),
            DType::I32 => copy::fill(tensor.slice_mut::<i32>()?, value as i32),
            DType::U8 => copy::fill(tensor.slice_mut::<u8>()?, value as u8),
            DType::Nf4 | DType::Int8 => {
                let one = Tensor::full(memory, DType::F32, &shape, value)?;
                tensor = ops::quantise(memory, &one, dtype)?;
            }
        }
        Ok(tensor)
    }

    /// `data` as a tensor of `shape`; see [`Tensor::from_slice`].
    ///
    /// # Errors
    /// A length that is not the shape's element count.
    pub fn from_vec<T: TensorElement>(
        memory: &Memory,
        data: Vec<T>,
        shape: &[usize],
    ) -> Result<Tensor> {
        Tensor::from_slice(memory, &data, shape)
    }

    /// A copy of `data` as a tensor of `shape`. Over a planned memory, floats are dropped.
    ///
    /// # Errors
    /// A length that is not the shape's element count.
    pub fn from_slice<T: TensorElement>(
        memory: &Memory,
        data: &[T],
        shape: &[usize],
    ) -> Result<Tensor> {
        let shape = Shape::new(shape)?;
        if data.len() != shape.count() {
            return Err(Error::shape(
                "from_slice",
                "the data",
                format!("{} elements", data.len()),
                format!("{} for {shape}", shape.count()),
            ));
        }
        let mut tensor = Tensor::empty(memory, T::DTYPE, &shape)?;
        if tensor.is_on_device() {
            tensor.upload(bytemuck::cast_slice(data))?;
        } else if !tensor.is_planned() {
            tensor.slice_mut::<T>()?.copy_from_slice(data);
        }
        Ok(tensor)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.storage.dtype
    }

    /// The lengths of the dimensions.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The distance, in elements, between neighbours along each dimension.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.shape.rank()]
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.shape.count()
    }

    /// The allocator and category of the storage.
    pub fn memory(&self) -> &Memory {
        &self.storage.memory
    }

    /// The storage, to write to: nothing else holds it, and a copy that was made of it before is gone.
    fn storage_mut(&mut self) -> Result<&mut Storage> {
        let shape = self.shape;
        let storage = Arc::get_mut(&mut self.storage).ok_or(Error::Shared { shape })?;
        storage.rounded.forget();
        Ok(storage)
    }

    /// True if the tensor only exists as a plan.
    pub fn is_planned(&self) -> bool {
        self.storage.block.is_planned()
    }

    /// True if the elements are on a GPU and nowhere else; integers never are.
    pub fn is_on_device(&self) -> bool {
        self.storage.block.is_on_device()
    }

    /// True if the elements lie side by side in row-major order.
    pub fn is_contiguous(&self) -> bool {
        let mut step = 1;
        for axis in (0..self.shape.rank()).rev() {
            if self.shape[axis] != 1 && self.strides[axis] != step {
                return false;
            }
            step *= self.shape[axis];
        }
        true
    }

    /// True if the elements are all that the storage holds, side by side in row-major order.
    pub fn is_whole(&self) -> bool {
        self.is_contiguous() && self.count() == self.storage.count
    }

    /// True if both are views of one storage.
    pub fn shares_storage(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
    }

    /// True if no other tensor shares the storage, so that it can be written in place.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.storage) == 1
    }

    /// This tensor if its elements lie side by side, else a copy of which that is true.
    ///
    /// # Errors
    /// Codes that do not lie side by side.
    pub fn contiguous(&self, memory: &Memory) -> Result<Cow<'_, Tensor>> {
        if self.is_contiguous() {
            Ok(Cow::Borrowed(self))
        } else if self.dtype().is_quantised() {
            Err(Error::NotContiguous { shape: self.shape })
        } else {
            Ok(Cow::Owned(self.copy(memory)?))
        }
    }

    /// This tensor if it alone holds its storage and its elements lie side by side, else a copy of
    /// which that is true: something to write to.
    ///
    /// # Errors
    /// None for a valid tensor.
    pub fn into_owned(self, memory: &Memory) -> Result<Tensor> {
        if self.is_contiguous() && self.is_unique() {
            Ok(self)
        } else {
            self.copy(memory)
        }
    }

    /// A contiguous copy with storage of its own; of codes, a copy of the storage, seen in the same way.
    ///
    /// # Errors
    /// None for a valid tensor.
    pub fn copy(&self, memory: &Memory) -> Result<Tensor> {
        if self.dtype().is_quantised() {
            return self.codes_to(memory);
        }
        let mut out = Tensor::empty(memory, self.dtype(), &self.shape)?;
        if let Some(on) = memory.gpu().filter(|_| self.dtype().is_float()) {
            on.run(|gpu| {
                if self.is_contiguous() {
                    return Ok(gpu.copy(self.device()?, out.device_mut()?)?);
                }
                let (from, to) = (self.device_strided()?, out.device_mut()?);
                Ok(cuda::copy::gather_strided(
                    gpu,
                    &self.shape,
                    from,
                    self.strides(),
                    to,
                )?)
            })?;
            return Ok(out);
        }
        if out.is_planned() {
            return Ok(out);
        }
        with_dtype!(self.dtype(), T => copy::copy_strided(
            &self.shape,
            self.strided_slice::<T>()?,
            self.strides(),
            out.slice_mut::<T>()?,
        ));
        Ok(out)
    }

    /// The same tensor, counted under another category from now on: without a copy if nothing else
    /// shares the storage, otherwise by one.
    ///
    /// # Errors
    /// None for a valid tensor.
    pub fn recount(mut self, category: Category) -> Result<Tensor> {
        if self.memory().category() == category {
            return Ok(self);
        }
        let memory = self.memory().with(category);
        match Arc::get_mut(&mut self.storage) {
            Some(storage) => {
                storage.memory.recategorise(storage.bytes(), category);
                storage.memory = memory;
                storage.rounded.forget();
                Ok(self)
            }
            None => self.copy(&memory),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {}", self.dtype(), self.shape)?;
        if !self.is_planned() && self.count() <= 16 {
            write!(f, " {:?}", self.to_f64().unwrap_or_default())?;
        }
        f.write_str(")")
    }
}
