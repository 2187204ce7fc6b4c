//! The allocator: every buffer of a device comes from one [`Memory`], which reuses freed bytes and
//! counts them by category.
//!
//! A planned memory ([`Memory::planned`]) runs the same bookkeeping without holding a single
//! float: the code of a training step, run over it, yields the peak that the real run will have.
//! Integer tensors (ids, offsets, labels) are small and steer the shapes, so they stay real.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};

use crate::arena::{Arena, Region};
use crate::error::{Error, Result};
use crate::ranges::{Range, Ranges};
use crate::{DType, TensorElement};

/// What a buffer is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Category {
    /// Parameters of the model
    Weights,
    /// Gradients of trainable parameters
    Gradients,
    /// State of the optimizer
    Optimizer,
    /// Results of operations and what they save for the backward pass
    Activations,
    /// Scratch space of one kernel call
    Workspace,
}

impl Category {
    /// Every category, in the order in which reports list them.
    pub const ALL: [Category; 5] = [
        Category::Weights,
        Category::Gradients,
        Category::Optimizer,
        Category::Activations,
        Category::Workspace,
    ];
}

impl fmt::Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Category::Weights => "weights",
            Category::Gradients => "gradients",
            Category::Optimizer => "optimizer",
            Category::Activations => "activations",
            Category::Workspace => "workspace",
        })
    }
}

/// Bytes in use, now and at the worst moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in use per category, in the order of [`Category::ALL`]
    pub live: [usize; 5],
    /// The most that each category held at any moment (not necessarily the same moment)
    pub peak: [usize; 5],
    /// The most that all categories held together
    pub peak_total: usize,
    /// Bytes obtained from the system: in use, kept for reuse, or lost between the two
    pub held: usize,
}

impl Usage {
    /// Bytes in use by `category`.
    pub fn live(&self, category: Category) -> usize {
        self.live[category as usize]
    }

    /// The most bytes that `category` ever used.
    pub fn peak(&self, category: Category) -> usize {
        self.peak[category as usize]
    }
}

/// The bytes of a tensor, or the promise of them. No bytes at all are never asked for.
pub(crate) enum Block {
    /// Of the arena
    Real(Region),
    /// Of a plan, none for no elements; integers are kept beside it
    Planned(Option<Range>, Option<Box<[u64]>>),
    /// For tensors without elements
    Empty,
}

impl Block {
    /// The bytes, at least as many as were asked for; `None` if they are only planned.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Block::Real(region) => Some(region.bytes()),
            Block::Planned(_, kept) => kept.as_deref().map(bytemuck::cast_slice),
            Block::Empty => Some(&[]),
        }
    }

    /// The same, to write.
    pub fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        match self {
            Block::Real(region) => Some(region.bytes_mut()),
            Block::Planned(_, kept) => kept.as_deref_mut().map(bytemuck::cast_slice_mut),
            Block::Empty => Some(&mut []),
        }
    }
}

/// Where ranges come from.
enum Source {
    Real(Arena),
    Plan(Ranges),
}

struct Pool {
    source: Source,
    usage: Usage,
}

/// A handle to a device's allocator, with the category that it allocates for.
#[derive(Clone)]
pub struct Memory {
    pool: Arc<Mutex<Pool>>,
    category: Category,
    planned: bool,
}

impl Memory {
    /// A new allocator for the CPU.
    pub fn cpu() -> Memory {
        Memory::new(Source::Real(Arena::default()))
    }

    /// An allocator that only counts; see the module's text.
    pub fn planned() -> Memory {
        Memory::new(Source::Plan(Ranges::default()))
    }

    fn new(source: Source) -> Memory {
        let planned = matches!(source, Source::Plan(_));
        let usage = Usage::default();
        Memory {
            pool: Arc::new(Mutex::new(Pool { source, usage })),
            category: Category::Activations,
            planned,
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
        self.planned
    }

    /// What is and was in use.
    pub fn usage(&self) -> Usage {
        self.lock().usage
    }

    /// Forgets past peaks: they restart at what is in use now.
    pub fn reset_peak(&self) {
        let mut pool = self.lock();
        pool.usage.peak = pool.usage.live;
        pool.usage.peak_total = pool.usage.live.iter().sum();
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        // The pool's bookkeeping holds no invariant that a panic elsewhere could break.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for `count` elements, with unspecified contents. Debug builds write NaN (or -1) to
    /// every element, so that a kernel that leaves one out is found by the first test that reads
    /// it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the system has no more.
    pub(crate) fn allocate(&self, dtype: DType, count: usize) -> Result<Block> {
        let bytes = count.saturating_mul(dtype.size());
        let mut block = self.take(dtype, bytes).ok_or_else(|| Error::OutOfMemory {
            bytes,
            category: self.category,
            live: self.usage().live,
        })?;
        if cfg!(debug_assertions)
            && let Some(bytes) = block.bytes_mut().filter(|bytes| !bytes.is_empty())
        {
            poison(dtype, bytes);
        }
        Ok(block)
    }

    fn take(&self, dtype: DType, bytes: usize) -> Option<Block> {
        if bytes == 0 {
            let planned = self.planned && dtype.is_float();
            return Some(if planned {
                Block::Planned(None, None)
            } else {
                Block::Empty
            });
        }
        let mut pool = self.lock();
        let (block, held) = match &mut pool.source {
            Source::Real(arena) => (Block::Real(arena.take(bytes)?), arena.touched()),
            Source::Plan(ranges) => {
                let range = ranges.take(bytes, |_| true)?;
                let kept = (!dtype.is_float()).then(|| vec![0; bytes.div_ceil(8)].into());
                (Block::Planned(Some(range), kept), ranges.touched())
            }
        };
        pool.usage.held = held;
        pool.count(self.category, bytes);
        Some(block)
    }

    /// Moves `bytes` of a live block from this handle's category to another.
    pub(crate) fn recategorise(&self, bytes: usize, to: Category) {
        let mut pool = self.lock();
        pool.usage.live[self.category as usize] -= bytes;
        pool.count(to, bytes);
    }

    /// Takes back a block that was asked for with so many bytes.
    pub(crate) fn release(&self, block: Block, bytes: usize) {
        let mut pool = self.lock();
        pool.usage.live[self.category as usize] -= bytes;
        match (&mut pool.source, block) {
            (Source::Real(arena), Block::Real(region)) => arena.release(region),
            (Source::Plan(ranges), Block::Planned(Some(range), _)) => ranges.release(range),
            _ => {}
        }
    }
}

impl Pool {
    /// Counts `bytes` more in use.
    fn count(&mut self, category: Category, bytes: usize) {
        let usage = &mut self.usage;
        let category = category as usize;
        usage.live[category] += bytes;
        usage.peak[category] = usage.peak[category].max(usage.live[category]);
        usage.peak_total = usage.peak_total.max(usage.live.iter().sum());
    }
}

/// Writes a number to every element that no kernel would.
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
        DType::U8 => with(bytes, 255u8),
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
