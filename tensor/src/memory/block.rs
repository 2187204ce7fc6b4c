//! The bytes of one tensor, wherever they lie.

use std::sync::atomic::{AtomicBool, Ordering};

use graft_kernels::cuda::{Gpu, Slice, SliceMut};
use half::{bf16, f16};

use crate::arena::Region;
use crate::device::DeviceRegion;
use crate::error::Result;
use crate::ranges::Range;
use crate::{DType, TensorElement};

/// The bytes of a tensor, or the promise of them. No bytes at all are never asked for.
pub(crate) enum Block {
    /// Of the arena
    Real(Region),
    /// Of a plan, none for no elements; integers are kept beside it
    Planned(Option<Range>, Option<Box<[u64]>>),
    /// Of a GPU: floats
    Device(DeviceRegion),
    /// Of this machine, with room for a copy on a GPU: integers
    Mirrored(Mirrored),
    /// For tensors without elements
    Empty,
}

/// Integers that the code of a step reads, and that kernels of a GPU read too.
pub(crate) struct Mirrored {
    host: Box<[u64]>,
    device: DeviceRegion,
    /// The GPU's copy is that of `host`.
    current: AtomicBool,
}

impl Mirrored {
    pub fn new(host: Box<[u64]>, device: DeviceRegion) -> Mirrored {
        Mirrored {
            host,
            device,
            current: AtomicBool::new(false),
        }
    }

    /// Where the GPU's copy lies.
    pub fn into_device(self) -> DeviceRegion {
        self.device
    }

    /// `count` elements from element `first` on the GPU, copied there if they are not yet.
    fn device(&self, gpu: &Gpu, dtype: DType, first: usize, count: usize) -> Result<Slice<'_>> {
        if !self.current.load(Ordering::Acquire) {
            let bytes: &[u8] = bytemuck::cast_slice(&self.host);
            gpu.upload(bytes, self.device.mirror(DType::U8, 0, bytes.len()))?;
            self.current.store(true, Ordering::Release);
        }
        Ok(self.device.slice(dtype, first, count))
    }
}

impl Block {
    /// True if there are no elements, only the promise of them.
    pub fn is_planned(&self) -> bool {
        matches!(self, Block::Planned(_, None))
    }

    /// True if the elements are on a GPU alone.
    pub fn is_on_device(&self) -> bool {
        matches!(self, Block::Device(_))
    }

    /// `count` elements from element `first` on the GPU; `None` if they are not there.
    pub fn device(
        &self,
        gpu: &Gpu,
        dtype: DType,
        first: usize,
        count: usize,
    ) -> Result<Option<Slice<'_>>> {
        Ok(match self {
            Block::Device(region) => Some(region.slice(dtype, first, count)),
            Block::Mirrored(mirrored) => Some(mirrored.device(gpu, dtype, first, count)?),
            Block::Empty => Some(Slice::empty(dtype.into())),
            Block::Real(_) | Block::Planned(..) => None,
        })
    }

    /// The same, to write; never integers, of which this machine's are the ones that count.
    pub fn device_mut(&mut self, dtype: DType, first: usize, count: usize) -> Option<SliceMut<'_>> {
        match self {
            Block::Device(region) => Some(region.slice_mut(dtype, first, count)),
            Block::Empty => Some(SliceMut::empty(dtype.into())),
            Block::Mirrored(_) | Block::Real(_) | Block::Planned(..) => None,
        }
    }

    /// The bytes, at least as many as were asked for; `None` if they are only planned, or on a GPU.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Block::Real(region) => Some(region.bytes()),
            Block::Planned(_, kept) => kept.as_deref().map(bytemuck::cast_slice),
            Block::Device(_) => None,
            Block::Mirrored(mirrored) => Some(bytemuck::cast_slice(&mirrored.host)),
            Block::Empty => Some(&[]),
        }
    }

    /// The same, to write.
    pub fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        match self {
            Block::Real(region) => Some(region.bytes_mut()),
            Block::Planned(_, kept) => kept.as_deref_mut().map(bytemuck::cast_slice_mut),
            Block::Device(_) => None,
            Block::Mirrored(mirrored) => {
                *mirrored.current.get_mut() = false;
                Some(bytemuck::cast_slice_mut(&mut mirrored.host))
            }
            Block::Empty => Some(&mut []),
        }
    }

    /// Writes a number that no kernel would to every element of a block of so many bytes, which `gpu` has if that is
    /// where they are.
    pub fn poison(&mut self, gpu: Option<&Gpu>, dtype: DType, bytes: usize) -> Result<()> {
        if let (Block::Device(region), Some(gpu)) = (&mut *self, gpu) {
            // Not a number in every float type.
            gpu.set_bytes(region.slice_mut(DType::U8, 0, bytes), 255)?;
        } else if let Some(bytes) = self.bytes_mut().filter(|bytes| !bytes.is_empty()) {
            poison(dtype, bytes);
        }
        Ok(())
    }
}

fn poison(dtype: DType, bytes: &mut [u8]) {
    fn with<T: TensorElement>(bytes: &mut [u8], value: T) {
        bytemuck::cast_slice_mut::<u8, T>(bytes).fill(value);
    }
    match dtype {
        DType::F32 => with(bytes, f32::NAN),
        DType::F64 => with(bytes, f64::NAN),
        DType::Bf16 => with(bytes, bf16::NAN),
        DType::F16 => with(bytes, f16::NAN),
        DType::I64 => with(bytes, -1i64),
        DType::I32 => with(bytes, -1i32),
        // Magnitudes of blocks are then not numbers either.
        DType::U8 | DType::Nf4 | DType::Int8 => with(bytes, 255u8),
    }
}
