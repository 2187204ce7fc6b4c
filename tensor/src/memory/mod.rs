//! The allocator: every buffer of a device comes from one [`Memory`], which reuses freed bytes and
//! counts them by category.
//!
//! A planned memory ([`Memory::planned`]) runs the same bookkeeping without holding a single
//! float: the code of a training step, run over it, yields the peak that the real run will have.
//! Integer tensors (ids, offsets, labels) are small and steer the shapes, so they stay real.
//! For the same reason a GPU's integers are held by this machine, with a copy on the GPU for its
//! kernels.

mod block;
mod usage;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use graft_kernels::cuda::Gpu;

use self::block::Mirrored;
use crate::DType;
use crate::arena::Arena;
use crate::device::{Device, DeviceArena};
use crate::error::{Error, Result};
use crate::ranges::{End, Ranges};

pub(crate) use block::Block;
pub use usage::{Category, Usage};

/// Where ranges come from.
enum Source {
    Real(Arena),
    Plan(Ranges),
    Device(DeviceArena),
}

struct Pool {
    source: Source,
    usage: Usage,
}

/// What the handles of one allocator share.
struct Shared {
    device: Device,
    /// There is none for a plan.
    gpu: Option<Gpu>,
    planned: bool,
    pool: Mutex<Pool>,
}

/// A handle to a device's allocator, with the category that it allocates for.
#[derive(Clone)]
pub struct Memory {
    shared: Arc<Shared>,
    category: Category,
}

/// The way to a GPU's kernels: see [`Memory::gpu`].
pub(crate) struct OnGpu<'a>(Option<&'a Gpu>);

impl OnGpu<'_> {
    /// Launches kernels; over a plan, nothing.
    pub fn run(self, launch: impl FnOnce(&Gpu) -> Result<()>) -> Result<()> {
        self.0.map_or(Ok(()), launch)
    }
}

impl Memory {
    /// A new allocator for the CPU.
    pub fn cpu() -> Memory {
        Memory::new(Device::Cpu, None, Source::Real(Arena::new()))
    }

    /// A new allocator for a GPU.
    pub fn cuda(gpu: Gpu) -> Memory {
        let device = Device::Cuda(gpu.limits().ordinal);
        let source = Source::Device(DeviceArena::new(gpu.clone()));
        Memory::new(device, Some(gpu), source)
    }

    /// A new allocator for a device.
    ///
    /// # Errors
    /// A GPU that is not there or cannot be used, and why.
    pub fn of(device: Device) -> Result<Memory> {
        match device {
            Device::Cpu => Ok(Memory::cpu()),
            Device::Cuda(ordinal) => Ok(Memory::cuda(Gpu::open(ordinal)?)),
        }
    }

    /// An allocator that only counts; see the module's text.
    pub fn planned() -> Memory {
        Memory::planned_for(Device::Cpu)
    }

    /// An allocator that counts what `device` would need, which need not be there.
    pub fn planned_for(device: Device) -> Memory {
        Memory::new(device, None, Source::Plan(Ranges::of(device)))
    }

    fn new(device: Device, gpu: Option<Gpu>, source: Source) -> Memory {
        let planned = matches!(source, Source::Plan(_));
        let usage = Usage::default();
        Memory {
            shared: Arc::new(Shared {
                device,
                gpu,
                planned,
                pool: Mutex::new(Pool { source, usage }),
            }),
            category: Category::Activations,
        }
    }

    /// True if both are handles of one allocator, for the same category.
    pub(crate) fn is_same(&self, other: &Memory) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared) && self.category == other.category
    }

    /// This allocator if it is the CPU's, else a new one for the CPU, planned if this is: for what GPUs have no kernels
    /// for.
    pub fn on_cpu(&self) -> Memory {
        match (self.device(), self.is_planned()) {
            (Device::Cpu, _) => self.clone(),
            (_, true) => Memory::planned(),
            (_, false) => Memory::cpu(),
        }
    }

    /// The device that tensors of this memory lie on.
    pub fn device(&self) -> Device {
        self.shared.device
    }

    /// For operations: the way to a GPU's kernels if that is where tensors of this memory lie.
    pub(crate) fn gpu(&self) -> Option<OnGpu<'_>> {
        matches!(self.shared.device, Device::Cuda(_)).then(|| OnGpu(self.shared.gpu.as_ref()))
    }

    /// The GPU itself, if there is one and this is no plan.
    pub fn opened_gpu(&self) -> Option<&Gpu> {
        self.shared.gpu.as_ref()
    }

    /// Bytes that tensors on a GPU may take in all, those that they take now among them; `None` for other devices, which
    /// do not say.
    ///
    /// # Errors
    /// What the driver says.
    pub fn room(&self) -> Result<Option<u64>> {
        let Some(gpu) = self.opened_gpu() else {
            return Ok(None);
        };
        let (free, _) = gpu.free_memory()?;
        Ok(Some((free + self.lock().obtained()) as u64))
    }

    /// Waits until everything that a GPU was asked for is done; a CPU never lags behind.
    ///
    /// # Errors
    /// What failed on the GPU since the last time.
    pub fn synchronize(&self) -> Result<()> {
        match &self.shared.gpu {
            Some(gpu) => Ok(gpu.synchronize()?),
            None => Ok(()),
        }
    }

    /// Told that something is complete that a GPU will work on for as long as the next such thing takes to be asked for: as
    /// [`Gpu::submit`]. A CPU has done it by now.
    ///
    /// # Errors
    /// What failed on the way to the GPU.
    pub fn submit(&self) -> Result<()> {
        match &self.shared.gpu {
            Some(gpu) => Ok(gpu.submit()?),
            None => Ok(()),
        }
    }

    /// The same allocator, allocating for another category.
    pub fn with(&self, category: Category) -> Memory {
        Memory {
            category,
            ..self.clone()
        }
    }

    /// The category that this handle allocates for.
    pub fn category(&self) -> Category {
        self.category
    }

    /// True for an allocator that only counts.
    pub fn is_planned(&self) -> bool {
        self.shared.planned
    }

    /// What is and was in use.
    pub fn usage(&self) -> Usage {
        self.lock().usage
    }

    /// Forgets past peaks: they restart at what is in use now.
    pub fn reset_peak(&self) {
        self.lock().usage.reset_peak();
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        // The pool's bookkeeping holds no invariant that a panic elsewhere could break.
        self.shared
            .pool
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for `count` elements, with unspecified contents. Debug builds write NaN (or -1) to
    /// every element, so that a kernel that leaves one out is found by the first test that reads
    /// it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system has no more.
    pub(crate) fn allocate(&self, dtype: DType, count: usize) -> Result<Block> {
        let bytes = dtype.bytes(count);
        let block = self.take(dtype, bytes)?;
        let mut block = block.ok_or_else(|| self.has_no_more(bytes, &self.lock()))?;
        if cfg!(debug_assertions) {
            block.poison(self.shared.gpu.as_ref(), dtype, bytes)?;
        }
        Ok(block)
    }

    /// Sees to it that so many bytes are free in one range above all that is in use: for gradients, which are taken from
    /// there. On a GPU they are not, and nothing is done.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system has no more.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        if bytes == 0 || self.device() != Device::Cpu {
            return Ok(());
        }
        let mut pool = self.lock();
        let block = pool.take(DType::F32, bytes, End::High)?;
        let block = block.ok_or_else(|| self.has_no_more(bytes, &pool))?;
        pool.release(block);
        Ok(())
    }

    fn has_no_more(&self, bytes: usize, pool: &Pool) -> Error {
        let gpu = self.opened_gpu();
        let device = gpu.and_then(|gpu| {
            let (free, all) = gpu.free_memory().ok()?;
            Some([pool.obtained(), free, all])
        });
        Error::OutOfMemory {
            bytes,
            category: self.category,
            live: pool.usage.live,
            device,
        }
    }

    fn take(&self, dtype: DType, bytes: usize) -> Result<Option<Block>> {
        if bytes == 0 {
            let planned = self.is_planned() && !dtype.is_integer();
            return Ok(Some(if planned {
                Block::Planned(None, None)
            } else {
                Block::Empty
            }));
        }
        // In a GPU's segments, which are smaller, ends are many: plans of GPT-2's steps (4 x 256 to 64 x 1024) have gaps of 2 to
        // 5 % with gradients among the rest, of up to 21 % with them above.
        let end = match (self.category, self.device()) {
            (Category::Gradients, Device::Cpu) => End::High,
            _ => End::Low,
        };
        let mut pool = self.lock();
        let block = pool.take(dtype, bytes, end)?;
        if block.is_some() {
            pool.usage.count(self.category, bytes);
        }
        Ok(block)
    }

    /// Moves `bytes` of a live block from this handle's category to another.
    pub(crate) fn recategorise(&self, bytes: usize, to: Category) {
        let mut pool = self.lock();
        pool.usage.live[self.category as usize] -= bytes;
        pool.usage.count(to, bytes);
    }

    /// Takes back a block that was asked for with so many bytes.
    pub(crate) fn release(&self, block: Block, bytes: usize) {
        let mut pool = self.lock();
        pool.usage.live[self.category as usize] -= bytes;
        pool.release(block);
    }
}

impl Pool {
    /// Bytes that were obtained from a GPU.
    fn obtained(&self) -> usize {
        match &self.source {
            Source::Device(arena) => arena.obtained(),
            Source::Real(_) | Source::Plan(_) => 0,
        }
    }

    /// A block of at least one byte, `None` if there is no more.
    fn take(&mut self, dtype: DType, bytes: usize, end: End) -> Result<Option<Block>> {
        let integers = || vec![0; bytes.div_ceil(8)].into_boxed_slice();
        let (block, held) = match &mut self.source {
            Source::Real(arena) => (arena.take(bytes, end).map(Block::Real), arena.touched()),
            Source::Plan(ranges) => {
                let range = ranges.take(bytes, end, |_| true);
                let kept = dtype.is_integer().then(integers);
                let block = range.map(|range| Block::Planned(Some(range), kept));
                (block, ranges.touched())
            }
            Source::Device(arena) => {
                let region = arena.take(bytes, end)?;
                let block = region.map(|device| match dtype.is_integer() {
                    false => Block::Device(device),
                    true => Block::Mirrored(Mirrored::new(integers(), device)),
                });
                (block, arena.touched())
            }
        };
        self.usage.held = held;
        Ok(block)
    }

    fn release(&mut self, block: Block) {
        match (&mut self.source, block) {
            (Source::Real(arena), Block::Real(region)) => arena.release(region),
            (Source::Plan(ranges), Block::Planned(Some(range), _)) => ranges.release(range),
            (Source::Device(arena), Block::Device(region)) => arena.release(region),
            (Source::Device(arena), Block::Mirrored(mirrored)) => {
                arena.release(mirrored.into_device())
            }
            _ => {}
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({}, {:?})", self.category, self.usage())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_bytes_are_reused_and_counted() {
        let memory = Memory::cpu().with(Category::Workspace);
        let a = memory.allocate(DType::F32, 1600).unwrap();
        memory.release(a, 6400);
        let b = memory.allocate(DType::F64, 800).unwrap();
        let usage = memory.usage();
        assert_eq!(usage.live(Category::Workspace), 6400);
        assert_eq!(usage.held, 6400, "of whatever type they were");
        memory.release(b, 6400);
        assert_eq!(memory.usage().live(Category::Workspace), 0);
    }

    #[test]
    fn growing_requests_do_not_pile_up() {
        let memory = Memory::cpu();
        for count in (1..40).map(|i| i * 1600) {
            let block = memory.allocate(DType::F32, count).unwrap();
            memory.release(block, 4 * count);
        }
        assert_eq!(memory.usage().held, 39 * 6400);
    }

    #[test]
    fn room_that_was_reserved_is_not_in_use() {
        let memory = Memory::cpu().with(Category::Gradients);
        memory.reserve(0).unwrap();
        assert_eq!(memory.usage(), Usage::default());
        memory.reserve(2 << 20).unwrap();
        let held = memory.usage().held;
        assert_eq!((held, memory.usage().peak_total), (2 << 20, 0));
        let parts = [0; 2].map(|_| memory.allocate(DType::F32, 1 << 18).unwrap());
        assert_eq!(memory.usage().held, held);
        parts
            .into_iter()
            .for_each(|part| memory.release(part, 1 << 20));
    }

    #[test]
    fn a_plan_counts_like_the_real_thing() {
        let run = |memory: Memory| {
            let a = memory.allocate(DType::F32, 5000).unwrap();
            let gradients = memory.with(Category::Gradients);
            let b = gradients.allocate(DType::F32, 300).unwrap();
            memory.release(a, 20_000);
            let c = memory.allocate(DType::I64, 4500).unwrap();
            memory.release(c, 36_000);
            gradients.release(b, 1200);
            memory.usage()
        };
        assert_eq!(run(Memory::cpu()), run(Memory::planned()));
    }
}
