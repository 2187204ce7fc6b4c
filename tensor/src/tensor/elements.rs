//! A tensor's elements, to read and to write.

use graft_kernels::copy;
use graft_kernels::cuda::Readback;
use half::{bf16, f16};

use super::{Tensor, TensorElement};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory::{Category, Memory};
use crate::{DType, ops};

/// What [`Tensor::item_later`] has asked for.
#[derive(Debug)]
pub struct Item(Value);

#[derive(Debug)]
enum Value {
    Known(f64),
    Coming(Readback, DType),
}

impl Item {
    /// A number that is known.
    pub fn known(value: f64) -> Item {
        Item(Value::Known(value))
    }

    /// True if nothing has to be waited for.
    pub fn is_known(&self) -> bool {
        matches!(self.0, Value::Known(_))
    }

    /// The number, which is waited for.
    ///
    /// # Errors
    /// What failed on the GPU of everything before it.
    pub fn wait(self) -> Result<f64> {
        match self.0 {
            Value::Known(value) => Ok(value),
            Value::Coming(coming, dtype) => {
                let bytes = coming.bytes()?;
                Ok(match dtype {
                    DType::Bf16 => f64::from(bytemuck::pod_read_unaligned::<bf16>(&bytes)),
                    _ => f64::from(bytemuck::pod_read_unaligned::<f32>(&bytes)),
                })
            }
        }
    }
}

impl Tensor {
    /// The elements from the view's first one to the storage's end, for kernels that take strides.
    pub(crate) fn strided_slice<T: TensorElement>(&self) -> Result<&[T]> {
        self.check_type::<T>("read")?;
        let all = self.storage.elements::<T>();
        let all = all.ok_or_else(|| self.absent("reading its elements"))?;
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
        let (shape, offset) = (self.shape, self.offset);
        self.check_type::<T>("write")?;
        if self.is_planned() || self.is_on_device() {
            return Err(self.absent("writing its elements"));
        }
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { shape });
        }
        let all = self.storage_mut()?.elements_mut::<T>();
        let all = all.ok_or(Error::Planned { shape })?;
        Ok(&mut all[offset..offset + shape.count()])
    }

    fn check_type<T: TensorElement>(&self, op: &'static str) -> Result<()> {
        if T::DTYPE == self.dtype() {
            return Ok(());
        }
        Err(Error::DType {
            op,
            what: format!("the tensor {}", self.shape),
            found: self.dtype(),
            expected: T::DTYPE.to_string(),
        })
    }

    /// Why this machine has no elements of the tensor.
    pub(super) fn absent(&self, op: &'static str) -> Error {
        let shape = self.shape;
        match self.is_planned() {
            true => Error::Planned { shape },
            false => Error::Device {
                op,
                shape,
                found: self.memory().device(),
                expected: Device::Cpu,
            },
        }
    }

    /// A copy of the elements in row-major order.
    ///
    /// # Errors
    /// Another element type, or a planned tensor.
    pub fn to_vec<T: TensorElement>(&self) -> Result<Vec<T>> {
        let mut out = vec![T::default(); self.count()];
        if self.is_on_device() {
            self.check_type::<T>("read")?;
            let here = self.contiguous(&self.memory().with(Category::Workspace))?;
            let gpu = self
                .memory()
                .opened_gpu()
                .ok_or_else(|| self.not_on_gpu())?;
            gpu.download(here.device()?, bytemuck::cast_slice_mut(&mut out))?;
            return Ok(out);
        }
        copy::copy_strided(
            &self.shape,
            self.strided_slice::<T>()?,
            self.strides(),
            &mut out,
        );
        Ok(out)
    }

    /// A copy of the elements as `f64`, whatever the type; for reports and tests.
    ///
    /// # Errors
    /// A planned tensor.
    pub fn to_f64(&self) -> Result<Vec<f64>> {
        Ok(match self.dtype() {
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
            DType::Nf4 | DType::Int8 => {
                let here = Memory::cpu();
                ops::cast(&here, &self.to_memory(&here)?, DType::F32)?.to_f64()?
            }
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

    /// [`Tensor::item`] for whoever looks at it later: a GPU copies it when everything before is done, and goes on.
    ///
    /// # Errors
    /// As there.
    pub fn item_later(&self) -> Result<Item> {
        let dtype = self.dtype();
        let one = self.is_on_device() && self.count() == 1;
        if let Some(gpu) = self.memory().opened_gpu()
            && one
            && matches!(dtype, DType::F32 | DType::Bf16)
        {
            let coming = gpu.readback(self.device()?)?;
            return Ok(Item(Value::Coming(coming, dtype)));
        }
        Ok(Item(Value::Known(self.item()?)))
    }

    /// The elements as little-endian bytes, in row-major order, as checkpoints store them; codes as they are in memory.
    ///
    /// # Errors
    /// A planned tensor.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        if self.dtype().is_quantised() {
            return self.stored_bytes();
        }
        let mut bytes = Vec::with_capacity(self.count() * self.dtype().size());
        macro_rules! push {
            ($t:ty) => {
                for value in self.to_vec::<$t>()? {
                    bytes.extend_from_slice(&value.to_le_bytes());
                }
            };
        }
        match self.dtype() {
            DType::F32 => push!(f32),
            DType::F64 => push!(f64),
            DType::Bf16 => push!(bf16),
            DType::F16 => push!(f16),
            DType::I64 => push!(i64),
            DType::I32 => push!(i32),
            DType::U8 | DType::Nf4 | DType::Int8 => push!(u8),
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
        if bytes.len() != dtype.bytes(tensor.count()) {
            return Err(Error::shape(
                "from_bytes",
                "the data",
                format!("{} bytes", bytes.len()),
                format!(
                    "{} for {dtype} {}",
                    dtype.bytes(tensor.count()),
                    tensor.shape
                ),
            ));
        }
        if tensor.is_planned() {
            return Ok(tensor);
        }
        if tensor.is_on_device() {
            let host = Tensor::from_bytes(&Memory::cpu(), dtype, shape, bytes)?;
            return host.to_memory(memory);
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
            DType::Nf4 | DType::Int8 => tensor.codes_mut()?.copy_from_slice(bytes),
        }
        Ok(tensor)
    }
}
