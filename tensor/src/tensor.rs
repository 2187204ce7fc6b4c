//! The tensor: a shape and strides over shared storage.

use std::fmt;
use std::sync::Arc;

use graft_kernels::{Element, copy};
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::memory::{Block, Category, Memory};
use crate::shape::Shape;
use crate::{DType, with_dtype};

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
}

impl Storage {
    fn bytes(&self) -> usize {
        self.count * self.dtype.size()
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
    dtype: DType,
    shape: Shape,
    strides: Shape,
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
            }),
            dtype,
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
        if tensor.is_planned() {
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
        if !tensor.is_planned() {
            tensor.slice_mut::<T>()?.copy_from_slice(data);
        }
        Ok(tensor)
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The lengths of the dimensions.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The distance, in elements, between neighbours along each dimension.
    pub fn strides(&self) -> &Shape {
        &self.strides
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.shape.count()
    }

    /// The allocator and category of the storage.
    pub fn memory(&self) -> &Memory {
        &self.storage.memory
    }

    /// True if the tensor only exists as a plan.
    pub fn is_planned(&self) -> bool {
        self.storage.block.bytes().is_none()
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

    /// True if both are views of one storage.
    pub fn shares_storage(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
    }

    /// True if no other tensor shares the storage, so that it can be written in place.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.storage) == 1
    }

    /// The elements from the view's first one to the storage's end, for kernels that take strides.
    pub(crate) fn strided_slice<T: TensorElement>(&self) -> Result<&[T]> {
        if T::DTYPE != self.dtype {
            return Err(Error::DType {
                op: "read",
                what: format!("the tensor {}", self.shape),
                found: self.dtype,
                expected: T::DTYPE.to_string(),
            });
        }
        let all = self.storage.elements::<T>();
        let all = all.ok_or(Error::Planned { shape: self.shape })?;
        Ok(&all[self.offset.min(all.len())..])
    }

    /// The elements in row-major order.
    ///
    /// # Errors
    /// Another element type, a strided view, or a planned tensor.
    pub fn slice<T: TensorElement>(&self) -> Result<&[T]> {
        let all = self.strided_slice::<T>()?;
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { shape: self.shape });
        }
        Ok(&all[..self.shape.count()])
    }

    /// The elements in row-major order, to write.
    ///
    /// # Errors
    /// As [`Tensor::slice`], and [`Error::Shared`] while another tensor shares the storage.
    pub fn slice_mut<T: TensorElement>(&mut self) -> Result<&mut [T]> {
        let (shape, offset, dtype) = (self.shape, self.offset, self.dtype);
        if T::DTYPE != dtype {
            return Err(Error::DType {
                op: "write",
                what: format!("the tensor {shape}"),
                found: dtype,
                expected: T::DTYPE.to_string(),
            });
        }
        if self.is_planned() {
            return Err(Error::Planned { shape });
        }
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { shape });
        }
        let storage = Arc::get_mut(&mut self.storage).ok_or(Error::Shared { shape })?;
        let all = storage.elements_mut::<T>();
        let all = all.ok_or(Error::Planned { shape })?;
        Ok(&mut all[offset..offset + shape.count()])
    }

    /// A copy of the elements in row-major order.
    ///
    /// # Errors
    /// Another element type, or a planned tensor.
    pub fn to_vec<T: TensorElement>(&self) -> Result<Vec<T>> {
        let mut out = vec![T::default(); self.count()];
        copy::copy_strided(
            &self.shape,
            self.strided_slice::<T>()?,
            &self.strides,
            &mut out,
        );
        Ok(out)
    }

    /// A copy of the elements as `f64`, whatever the type; for reports and tests.
    ///
    /// # Errors
    /// A planned tensor.
    pub fn to_f64(&self) -> Result<Vec<f64>> {
        Ok(match self.dtype {
            DType::F32 => self.to_vec::<f32>()?.into_iter().map(f64::from).collect(),
            DType::F64 => self.to_vec::<f64>()?,
            DType::Bf16 => self.to_vec::<bf16>()?.into_iter().map(f64::from).collect(),
            DType::F16 => self.to_vec::<f16>()?.into_iter().map(f64::from).collect(),
            DType::I64 => self
                .to_vec::<i64>()?
                .into_iter()
                .map(|x| x as f64)
                .collect(),
            DType::I32 => self.to_vec::<i32>()?.into_iter().map(f64::from).collect(),
            DType::U8 => self.to_vec::<u8>()?.into_iter().map(f64::from).collect(),
        })
    }

    /// The only element, as `f64`.
    ///
    /// # Errors
    /// More or fewer than one element, or a planned tensor.
    pub fn item(&self) -> Result<f64> {
        if self.count() != 1 {
            return Err(Error::shape(
                "item",
                "the tensor",
                self.shape,
                "one element",
            ));
        }
        Ok(self.to_f64()?[0])
    }

    /// The elements as little-endian bytes, in row-major order, as checkpoints store them.
    ///
    /// # Errors
    /// A planned tensor.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.count() * self.dtype.size());
        macro_rules! push {
            ($t:ty) => {
                for value in self.to_vec::<$t>()? {
                    bytes.extend_from_slice(&value.to_le_bytes());
                }
            };
        }
        match self.dtype {
            DType::F32 => push!(f32),
            DType::F64 => push!(f64),
            DType::Bf16 => push!(bf16),
            DType::F16 => push!(f16),
            DType::I64 => push!(i64),
            DType::I32 => push!(i32),
            DType::U8 => push!(u8),
        }
        Ok(bytes)
    }

    /// A tensor from little-endian bytes in row-major order.
    ///
    /// # Errors
    /// A length that is not the shape's byte count.
    pub fn from_bytes(
        memory: &Memory,
        dtype: DType,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<Tensor> {
        let mut tensor = Tensor::empty(memory, dtype, shape)?;
        if bytes.len() != tensor.count() * dtype.size() {
            return Err(Error::shape(
                "from_bytes",
                "the data",
                format!("{} bytes", bytes.len()),
                format!(
                    "{} for {dtype} {}",
                    tensor.count() * dtype.size(),
                    tensor.shape
                ),
            ));
        }
        if tensor.is_planned() {
            return Ok(tensor);
        }
        macro_rules! read {
            ($t:ty) => {{
                const SIZE: usize = size_of::<$t>();
                for (to, from) in tensor
                    .slice_mut::<$t>()?
                    .iter_mut()
                    .zip(bytes.as_chunks::<SIZE>().0)
                {
                    *to = <$t>::from_le_bytes(*from);
                }
            }};
        }
        match dtype {
            DType::F32 => read!(f32),
            DType::F64 => read!(f64),
            DType::Bf16 => read!(bf16),
            DType::F16 => read!(f16),
            DType::I64 => read!(i64),
            DType::I32 => read!(i32),
            DType::U8 => read!(u8),
        }
        Ok(tensor)
    }

    // --- Views: the same storage, seen otherwise. ---

    /// The same elements under another shape.
    ///
    /// # Errors
    /// Another element count, or a strided view (make it [`Tensor::contiguous`] first).
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        let shape = Shape::new(shape)?;
        if shape.count() != self.count() {
            return Err(Error::shape(
                "reshape",
                "the tensor",
                self.shape,
                format!("{} elements for {shape}", shape.count()),
            ));
        }
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { shape: self.shape });
        }
        Ok(Tensor {
            shape,
            strides: shape.row_major_strides(),
            ..self.clone()
        })
    }

    /// Dimensions in another order: dimension `i` of the result is dimension `order[i]` of this.
    ///
    /// # Errors
    /// An order that does not name every dimension once.
    pub fn permute(&self, order: &[usize]) -> Result<Tensor> {
        let mut seen = [false; crate::shape::MAX_RANK];
        let valid = order.len() == self.shape.rank()
            && order
                .iter()
                .all(|&axis| axis < order.len() && !std::mem::replace(&mut seen[axis], true));
        if !valid {
            return Err(Error::argument(
                "permute",
                format!(
                    "{order:?} does not name each dimension of {} once",
                    self.shape
                ),
            ));
        }
        let pick =
            |of: &Shape| Shape::from_dims(&order.iter().map(|&axis| of[axis]).collect::<Vec<_>>());
        Ok(Tensor {
            shape: pick(&self.shape),
            strides: pick(&self.strides),
            ..self.clone()
        })
    }

    /// The last two dimensions swapped.
    ///
    /// # Errors
    /// Fewer than two dimensions.
    pub fn t(&self) -> Result<Tensor> {
        let rank = self.shape.rank();
        if rank < 2 {
            return Err(Error::shape(
                "transpose",
                "the tensor",
                self.shape,
                "at least [_, _]",
            ));
        }
        let mut order: Vec<usize> = (0..rank).collect();
        order.swap(rank - 2, rank - 1);
        self.permute(&order)
    }

    /// `length` indices of dimension `axis` from `start`.
    ///
    /// # Errors
    /// A dimension or range that the tensor does not have.
    pub fn narrow(&self, axis: usize, start: usize, length: usize) -> Result<Tensor> {
        let fits = axis < self.shape.rank()
            && start
                .checked_add(length)
                .is_some_and(|end| end <= self.shape[axis]);
        if !fits {
            return Err(Error::argument(
                "narrow",
                format!(
                    "dimension {axis}, {length} from {start}, is not within {}",
                    self.shape
                ),
            ));
        }
        Ok(Tensor {
            shape: self.shape.replaced(axis, Some(length)),
            offset: self.offset + start * self.strides[axis],
            ..self.clone()
        })
    }

    /// Repeats dimensions of length 1, and leading ones that are not there, without copying.
    ///
    /// # Errors
    /// A shape that this one does not broadcast to.
    pub fn expand(&self, shape: &[usize]) -> Result<Tensor> {
        let to = Shape::new(shape)?;
        if self.shape.broadcast(&to) != Some(to) {
            return Err(Error::shape(
                "expand",
                "the tensor",
                self.shape,
                format!("one that broadcasts to {to}"),
            ));
        }
        let lead = to.rank() - self.shape.rank();
        let strides: Vec<usize> = (0..to.rank())
            .map(|axis| match axis.checked_sub(lead) {
                Some(own) if self.shape[own] == to[axis] => self.strides[own],
                _ => 0,
            })
            .collect();
        Ok(Tensor {
            shape: to,
            strides: Shape::from_dims(&strides),
            ..self.clone()
        })
    }

    /// This tensor if its elements lie side by side, else a copy of which that is true.
    ///
    /// # Errors
    /// None for a valid tensor.
    pub fn contiguous(&self, memory: &Memory) -> Result<Tensor> {
        if self.is_contiguous() {
            Ok(self.clone())
        } else {
            self.copy(memory)
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

    /// A contiguous copy with storage of its own.
    ///
    /// # Errors
    /// None for a valid tensor.
    pub fn copy(&self, memory: &Memory) -> Result<Tensor> {
        let mut out = Tensor::empty(memory, self.dtype, &self.shape)?;
        if out.is_planned() {
            return Ok(out);
        }
        with_dtype!(self.dtype, T => copy::copy_strided(
            &self.shape,
            self.strided_slice::<T>()?,
            &self.strides,
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
                Ok(self)
            }
            None => self.copy(&memory),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {}", self.dtype, self.shape)?;
        if !self.is_planned() && self.count() <= 16 {
            write!(f, " {:?}", self.to_f64().unwrap_or_default())?;
        }
        f.write_str(")")
    }
}
