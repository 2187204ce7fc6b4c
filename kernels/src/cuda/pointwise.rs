//! What launchers of kernels that treat each element alone have in common.

use super::{Error, Gpu, Launch, Result, Scalar};

/// Threads of a block.
const THREADS: u32 = 256;
/// Blocks for each multiprocessor, at most: four times what it holds at once, so that one that is
/// late holds up little.
const BLOCKS: usize = 32;
/// Bytes of a tensor that a thread treats at a time.
const GROUP: usize = 16;

/// Elements of 16 bytes.
pub(super) fn group(scalar: Scalar) -> usize {
    GROUP / scalar.size()
}

/// The kernel for a type: its f32 or its bf16 name.
pub(super) fn choose(
    kernel: &'static str,
    scalar: Scalar,
    [f32, bf16]: [&'static str; 2],
) -> Result<&'static str> {
    match scalar {
        Scalar::F32 => Ok(f32),
        Scalar::Bf16 => Ok(bf16),
        found => Err(Error::Scalar {
            kernel,
            found,
            expected: "f32 and bf16",
        }),
    }
}

/// A grid for `count` elements, of which a thread has `each` at a time and as many such as it takes.
pub(super) fn spread(gpu: &Gpu, count: usize, each: usize) -> Launch {
    let blocks = count.div_ceil(THREADS as usize * each);
    Launch::linear(blocks.min(BLOCKS * gpu.limits().processors), THREADS)
}

/// The two names of a kernel, and the choice among them: `by_type!("glu", x.scalar())`.
macro_rules! by_type {
    ($kernel:literal, $scalar:expr) => {
        $crate::cuda::pointwise::choose(
            $kernel,
            $scalar,
            [concat!($kernel, "_f32"), concat!($kernel, "_bf16")],
        )
    };
}
pub(super) use by_type;

/// Checks that a slice has a number of elements of a type.
macro_rules! check {
    ($kernel:literal, $slice:ident, $count:expr, $scalar:expr) => {
        assert_eq!(
            ($slice.count(), $slice.scalar()),
            ($count, $scalar),
            concat!($kernel, ": ", stringify!($slice))
        );
    };
}
pub(super) use check;

/// The same for a slice that may be absent.
macro_rules! check_some {
    ($kernel:literal, $slice:ident, $count:expr, $scalar:expr) => {
        if let Some($slice) = &$slice {
            $crate::cuda::pointwise::check!($kernel, $slice, $count, $scalar);
        }
    };
}
pub(super) use check_some;
