//! Launchers of `pool.cu`.

use super::launch::args;
use super::pointwise::{by_type, check, group};
use super::rows::wide;
use super::{Gpu, Launch, Result, Scalar, Slice, SliceMut};
use crate::pool::Pool;

/// Threads of a block, along groups of columns and along rows.
const BLOCK: [u32; 3] = [32, 8, 1];

/// The number of a kind in `pool.cu`.
fn number(kind: Pool) -> i32 {
    match kind {
        Pool::Mean => 0,
        Pool::First => 1,
        Pool::Last => 2,
        Pool::Max => 3,
    }
}

fn launch(sequences: usize, columns: usize, each: usize) -> Launch {
    let tiles = columns.div_ceil(BLOCK[0] as usize * each);
    let mut launch = Launch::linear(sequences, 1);
    launch.grid[1] = tiles as u32;
    launch.block = BLOCK;
    launch
}

/// Columns as kernels take them.
fn int(columns: usize) -> i32 {
    i32::try_from(columns).expect("a row has less than 2^31 columns")
}

/// `y[s, :]` from rows `offsets[s]..offsets[s + 1]` of `x`; zeros for an empty sequence. Offsets rise
/// from 0 to the number of rows.
///
/// # Errors
/// Types of `x` other than f32 and bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn pool(
    gpu: &Gpu,
    kind: Pool,
    x: Slice<'_>,
    offsets: Slice<'_>,
    y: SliceMut<'_>,
    columns: usize,
) -> Result<()> {
    let sequences = offsets.count().saturating_sub(1);
    check!("pool", offsets, offsets.count(), Scalar::I64);
    check!("pool", y, sequences * columns, x.scalar());
    let (name, each) = if wide(x.scalar(), columns, &[x.address(), y.address()]) {
        (by_type!("pool", x.scalar())?, group(x.scalar()))
    } else {
        (by_type!("pool_single", x.scalar())?, 1)
    };
    let launch = launch(sequences, columns, each);
    let args = args![number(kind), x, offsets, y, int(columns)];
    gpu.launch("pool", name, launch, args)
}

/// The gradient of [`pool`]: every element of `dx` is written. For [`Pool::Max`] it goes to the first
/// row that holds the largest; the other kinds do not read `x`.
///
/// # Errors
/// As [`pool`].
///
/// # Panics
/// If lengths or types do not fit, or the maximum has no `x`.
pub fn pool_backward(
    gpu: &Gpu,
    kind: Pool,
    x: Option<Slice<'_>>,
    offsets: Slice<'_>,
    dy: Slice<'_>,
    dx: SliceMut<'_>,
    columns: usize,
) -> Result<()> {
    let sequences = offsets.count().saturating_sub(1);
    let scalar = dy.scalar();
    check!("pool_backward", offsets, offsets.count(), Scalar::I64);
    check!("pool_backward", dy, sequences * columns, scalar);
    check!("pool_backward", dx, dx.count(), scalar);
    let x = match kind {
        Pool::Max => {
            let x = x.expect("the maximum needs its input");
            check!("pool_backward", x, dx.count(), scalar);
            x.address()
        }
        Pool::Mean | Pool::First | Pool::Last => 0,
    };
    let (name, each) = if wide(scalar, columns, &[x, dy.address(), dx.address()]) {
        (by_type!("pool_backward", scalar)?, group(scalar))
    } else {
        (by_type!("pool_backward_single", scalar)?, 1)
    };
    let launch = launch(sequences, columns, each);
    let args = args![number(kind), x, offsets, dy, dx, int(columns)];
    gpu.launch("pool", name, launch, args)
}
