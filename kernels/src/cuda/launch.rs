//! What a launch consists of: grid, block, shared memory, arguments.

use super::{Slice, SliceMut};

/// How many threads run a kernel, and with how much shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Blocks along x, y, z
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory
    pub shared: u32,
}

impl Launch {
    /// `blocks` blocks of `threads` threads.
    ///
    /// # Panics
    /// If there are more blocks than a grid has along x, 2^31 - 1.
    pub fn linear(blocks: usize, threads: u32) -> Launch {
        let blocks = i32::try_from(blocks).expect("a grid has at most 2^31 - 1 blocks along x");
        Launch {
            grid: [blocks as u32, 1, 1],
            block: [threads, 1, 1],
            shared: 0,
        }
    }

    /// Enough blocks of `threads` threads that each thread has `each` of `count` elements.
    pub fn cover(count: usize, threads: u32, each: usize) -> Launch {
        Launch::linear(count.div_ceil(threads as usize * each), threads)
    }

    /// The same with dynamic shared memory.
    pub fn with_shared(self, bytes: usize) -> Launch {
        Launch {
            shared: bytes as u32,
            ..self
        }
    }
}

/// One argument of a kernel, as its bytes. Its type must be the parameter's: `usize` goes to `long
/// long`, `bool` to `int`.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    /// Anything of at most eight bytes
    Word(u64),
    /// A struct
    Bytes(&'a [u8]),
}

macro_rules! word {
    ($($t:ty: $value:ident => $word:expr),* $(,)?) => {
        $(impl From<$t> for Arg<'_> {
            fn from($value: $t) -> Self {
                Arg::Word($word)
            }
        })*
    };
}
word! {
    u32: x => u64::from(x),
    i32: x => u64::from(x as u32),
    u64: x => x,
    i64: x => x as u64,
    usize: x => x as u64,
    bool: x => u64::from(x),
    f32: x => u64::from(x.to_bits()),
    f64: x => x.to_bits(),
    Slice<'_>: x => x.address(),
    &Slice<'_>: x => x.address(),
    SliceMut<'_>: x => x.address(),
    &SliceMut<'_>: x => x.address(),
    &mut SliceMut<'_>: x => x.address(),
    Option<Slice<'_>>: x => x.map_or(0, |x| x.address()),
    &Option<Slice<'_>>: x => x.map_or(0, |x| x.address()),
    Option<SliceMut<'_>>: x => x.map_or(0, |x| x.address()),
    &Option<SliceMut<'_>>: x => x.as_ref().map_or(0, SliceMut::address),
}

impl<'a> From<&'a [u8]> for Arg<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Arg::Bytes(bytes)
    }
}

/// The arguments of a launch: `args![x, y, rows, eps as f32]`.
macro_rules! args {
    ($($arg:expr),* $(,)?) => {
        &[$($crate::cuda::Arg::from($arg)),*]
    };
}
pub(crate) use args;
