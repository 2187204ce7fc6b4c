//! Launcher of `rope.cu`.

use super::launch::args;
use super::pointwise::{by_type, check, group};
use super::{Gpu, Launch, Result, Scalar, Slice, SliceMut};

/// Threads of a block.
const THREADS: u32 = 256;

/// Turns each head's first `rotary_dim` dimensions by its token's angles and copies the others; see
/// [`crate::rope::rope`]. `positions` are rows of the tables.
///
/// # Errors
/// Types of `x` other than f32 and bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn rope(
    gpu: &Gpu,
    x: Slice<'_>,
    cos: Slice<'_>,
    sin: Slice<'_>,
    positions: Slice<'_>,
    heads: usize,
    head_dim: usize,
    rotary_dim: usize,
    interleaved: bool,
    inverse: bool,
    y: SliceMut<'_>,
) -> Result<()> {
    let (tokens, scalar) = (positions.count(), x.scalar());
    check!("rope", x, tokens * heads * head_dim, scalar);
    check!("rope", y, tokens * heads * head_dim, scalar);
    check!("rope", cos, cos.count(), Scalar::F32);
    check!("rope", sin, cos.count(), Scalar::F32);
    check!("rope", positions, tokens, Scalar::I64);
    assert!(
        rotary_dim.is_multiple_of(2) && rotary_dim <= head_dim,
        "rope: rotary_dim {rotary_dim} is odd or larger than head_dim {head_dim}"
    );
    if x.count() == 0 {
        return Ok(());
    }
    let (half, n) = (rotary_dim / 2, group(scalar));
    let addresses = [x.address(), y.address(), cos.address(), sin.address()];
    let wide = half.is_multiple_of(n)
        && head_dim.is_multiple_of(n)
        && addresses.iter().all(|a| a.is_multiple_of(16));
    let (name, each) = if wide {
        (by_type!("rope", scalar)?, n)
    } else {
        (by_type!("rope_pairs", scalar)?, 1)
    };
    let items = tokens * heads * (half + (head_dim - rotary_dim)) / each;
    let int = |n: usize| i32::try_from(n).expect("heads have less than 2^31 dimensions");
    let sign = if inverse { -1f32 } else { 1.0 };
    let args = args![
        x,
        cos,
        sin,
        positions,
        y,
        tokens,
        int(heads),
        int(head_dim),
        int(rotary_dim),
        interleaved,
        sign,
    ];
    gpu.launch("rope", name, Launch::cover(items, THREADS, 1), args)
}
