//! The allocator: every buffer of a device comes from one [`Memory`], which reuses freed buffers
//! and counts bytes by category.
//!
//! A planned memory ([`Memory::planned`]) runs the same bookkeeping without holding a single
//! float: the code of a training step, run over it, yields the peak that the real run will have.
//! Integer tensors (ids, offsets, labels) are small and steer the shapes, so they stay real.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};

use crate::DType;

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
    /// Bytes obtained from the system: in use or kept for reuse
    pub held: usize,
    /// The most bytes ever obtained from the system at one time
    pub peak_held: usize,
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

/// Elements of one type, or the promise of them.
#[derive(Debug)]
pub(crate) enum Buffer {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    I64(Vec<i64>),
    I32(Vec<i32>),
    U8(Vec<u8>),
    Planned,
}

/// A buffer with the size that it is counted with.
#[derive(Debug)]
pub(crate) struct Block {
    pub buffer: Buffer,
    /// Elements that the buffer has room for; what is counted
    capacity: usize,
    dtype: DType,
    /// Kept for reuse when it is freed
    pooled: bool,
}

#[derive(Default)]
struct Pool {
    /// Freed blocks by type and capacity.
    free: BTreeMap<(DType, usize), Vec<Block>>,
    free_bytes: usize,
    usage: Usage,
}

/// A handle to a device's allocator, with the category that it allocates for.
#[derive(Clone)]
pub struct Memory {
    pool: Arc<Mutex<Pool>>,
    category: Category,
    planned: bool,
}

/// A block may be this many times larger than what it is reused for.
const SLACK: f64 = 1.25;

impl Memory {
    /// A new allocator for the CPU.
    pub fn cpu() -> Memory {
        Memory::new(false)
    }

    /// An allocator that only counts; see the module's text.
    pub fn planned() -> Memory {
        Memory::new(true)
    }

    fn new(planned: bool) -> Memory {
        Memory {
            pool: Arc::default(),
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
        pool.usage.peak_held = pool.usage.held;
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        // The pool's bookkeeping holds no invariant that a panic elsewhere could break.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of `count` elements with unspecified contents.
    pub(crate) fn allocate(&self, dtype: DType, count: usize) -> Block {
        let mut block = {
            let mut pool = self.lock();
            let block = pool.reuse(dtype, count);
            let capacity = block.as_ref().map_or(count, |b| b.capacity);
            let bytes = capacity * dtype.size();
            if block.is_none() {
                pool.make_room(bytes);
                pool.usage.held += bytes;
                pool.usage.peak_held = pool.usage.peak_held.max(pool.usage.held);
            }
            pool.count(self.category, bytes);
            block.unwrap_or(Block {
                buffer: Buffer::Planned,
                capacity,
                dtype,
                pooled: true,
            })
        };
        let real = !self.planned || !dtype.is_float();
        if real {
            block.buffer.resize(dtype, count, block.capacity);
        }
        block
    }

    /// Counts a vector that was filled elsewhere as a block of its own. It came from the system and
    /// goes back there: kept for reuse, the inputs of every step would pile up.
    pub(crate) fn adopt(&self, dtype: DType, count: usize) -> Block {
        let bytes = count * dtype.size();
        let mut pool = self.lock();
        pool.usage.held += bytes;
        pool.usage.peak_held = pool.usage.peak_held.max(pool.usage.held);
        pool.count(self.category, bytes);
        Block {
            buffer: Buffer::Planned,
            capacity: count,
            dtype,
            pooled: false,
        }
    }

    /// Moves a live block's bytes from this handle's category to another.
    pub(crate) fn recategorise(&self, block: Option<&Block>, to: Category) {
        let Some(block) = block else { return };
        let bytes = block.capacity * block.dtype.size();
        let mut pool = self.lock();
        pool.usage.live[self.category as usize] -= bytes;
        pool.count(to, bytes);
    }

    /// Gives a block back: for reuse, or to the system if it was adopted.
    pub(crate) fn release(&self, block: Block) {
        let bytes = block.capacity * block.dtype.size();
        let mut pool = self.lock();
        pool.usage.live[self.category as usize] -= bytes;
        if bytes == 0 {
            return;
        }
        if !block.pooled {
            pool.usage.held -= bytes;
            return;
        }
        pool.free_bytes += bytes;
        pool.free
            .entry((block.dtype, block.capacity))
            .or_default()
            .push(block);
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

    /// The smallest free block that fits without wasting more than [`SLACK`].
    fn reuse(&mut self, dtype: DType, count: usize) -> Option<Block> {
        let most = (count as f64 * SLACK) as usize;
        let (&key, _) = self.free.range((dtype, count)..=(dtype, most)).next()?;
        self.take(key)
    }

    fn take(&mut self, key: (DType, usize)) -> Option<Block> {
        let blocks = self.free.get_mut(&key)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&key);
        }
        if block.is_some() {
            self.free_bytes -= key.1 * key.0.size();
        }
        block
    }

    /// Returns free blocks to the system, the largest first, until as many bytes as are about to
    /// be obtained have gone: batches of changing size then never hold more than the worst moment
    /// needed.
    fn make_room(&mut self, bytes: usize) {
        let mut gone = 0;
        while gone < bytes && self.free_bytes > 0 {
            let Some(key) = self
                .free
                .keys()
                .max_by_key(|(dtype, capacity)| dtype.size() * capacity)
                .copied()
            else {
                return;
            };
            let size = key.0.size() * key.1;
            drop(self.take(key));
            gone += size;
            self.usage.held -= size;
        }
    }
}

impl Buffer {
    /// Sets the length, keeping the contents unspecified. Debug builds write NaN (or -1) to every
    /// element, so that a kernel that leaves one out is found by the first test that reads it.
    fn resize(&mut self, dtype: DType, count: usize, capacity: usize) {
        macro_rules! sized {
            ($variant:ident, $t:ty, $poison:expr) => {{
                if !matches!(self, Buffer::$variant(_)) {
                    // A zeroed vector comes from the system without being touched.
                    *self = Buffer::$variant(vec![<$t>::default(); capacity]);
                }
                let Buffer::$variant(v) = self else {
                    unreachable!("set above")
                };
                v.resize(count, <$t>::default());
                if cfg!(debug_assertions) {
                    v.fill($poison);
                }
            }};
        }
        match dtype {
            DType::F32 => sized!(F32, f32, f32::NAN),
            DType::F64 => sized!(F64, f64, f64::NAN),
            DType::Bf16 => sized!(Bf16, bf16, bf16::NAN),
            DType::F16 => sized!(F16, f16, f16::NAN),
            DType::I64 => sized!(I64, i64, -1),
            DType::I32 => sized!(I32, i32, -1),
            DType::U8 => sized!(U8, u8, 255),
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
    fn freed_blocks_are_reused_and_counted() {
        let memory = Memory::cpu().with(Category::Workspace);
        let a = memory.allocate(DType::F32, 1000);
        memory.release(a);
        let b = memory.allocate(DType::F32, 900);
        assert_eq!(b.capacity, 1000, "a block within the slack is reused");
        let usage = memory.usage();
        assert_eq!(usage.live(Category::Workspace), 4000);
        assert_eq!(usage.held, 4000);
        memory.release(b);
        assert_eq!(memory.usage().live(Category::Workspace), 0);
    }

    #[test]
    fn growing_requests_do_not_pile_up_free_blocks() {
        let memory = Memory::cpu();
        for count in (1..40).map(|i| i * 1000) {
            let block = memory.allocate(DType::F32, count);
            memory.release(block);
        }
        assert_eq!(memory.usage().peak_held, 39_000 * 4);
    }

    #[test]
    fn a_plan_counts_like_the_real_thing() {
        let run = |memory: Memory| {
            let a = memory.allocate(DType::F32, 5000);
            let b = memory.with(Category::Gradients).allocate(DType::F32, 300);
            memory.release(a);
            let c = memory.allocate(DType::F32, 4500);
            memory.release(c);
            memory.with(Category::Gradients).release(b);
            memory.usage()
        };
        assert_eq!(run(Memory::cpu()), run(Memory::planned()));
    }
}
