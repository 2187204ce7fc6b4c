//! Launchers of `norm_held.cu`: layer norms of rows that a warp holds in registers, and
//! all of their gradients in one pass.

use super::launch::args;
use super::pointwise::{by_type, check, check_some};
use super::{Gpu, Launch, Result, Scalar, Slice, SliceMut};

/// Elements of a pack, of which a lane has at most four.
const PACK: usize = 8;
const MOST: usize = 32 * PACK * 4;
/// Warps of a block, each with a row at a time.
const WARPS: usize = 4;
/// Blocks of a multiprocessor.
const RESIDENT: usize = 8;
/// Blocks that share the rows of a parameter's gradient, at most: three for each multiprocessor of an
/// H100, on every device, so that sums have one order.
const PARTS: usize = 396;

/// Whether rows of so many columns are among those that these kernels are for.
pub fn holds(columns: usize) -> bool {
    columns <= MOST && columns > 0 && columns.is_multiple_of(PACK)
}

/// Into how many parts rows are cut for the parameters' gradients.
fn parts(rows: usize) -> usize {
    rows.div_ceil(4 * WARPS).clamp(1, PARTS)
}

/// f32 elements of workspace for [`backward`].
pub fn workspace(rows: usize, columns: usize) -> usize {
    match parts(rows) {
        1 => 0,
        parts => 2 * parts * columns,
    }
}

/// A launch of `blocks` blocks.
fn launch(blocks: usize) -> Launch {
    Launch {
        block: [32, WARPS as u32, 1],
        ..Launch::linear(blocks, 1)
    }
}

/// Whether packs at all of these addresses, 0 for those that are absent, can be read at once.
fn wide(scalar: Scalar, addresses: &[u64]) -> bool {
    let pack = (PACK * scalar.size()) as u64;
    addresses.iter().all(|a| a.is_multiple_of(pack))
}

/// As [`norm::layer_norm`](super::norm::layer_norm), which calls this when lengths and types have been
/// checked.
pub(super) fn forward(
    gpu: &Gpu,
    [x, residual, weight, bias]: [u64; 4],
    eps: f64,
    [y, sum, mean, rstd]: [u64; 4],
    scalar: Scalar,
    [rows, columns]: [usize; 2],
) -> Result<()> {
    let most = RESIDENT * gpu.limits().processors;
    let launch = launch(rows.div_ceil(WARPS).min(most));
    let (eps, width) = (eps as f32, columns as i32);
    let wide = wide(scalar, &[x, residual, y, sum]);
    let name = by_type!("layer_norm_held", scalar)?;
    let args = args![
        x, residual, weight, bias, eps, y, sum, mean, rstd, rows, width, wide
    ];
    gpu.launch("norm_held", name, launch, args)
}

/// What a layer norm's backward reads.
#[derive(Clone, Copy, Debug)]
pub struct Read<'a> {
    /// What was normalised, `[rows, columns]`; it may be absent where the bias' gradient alone is wanted
    pub s: Option<Slice<'a>>,
    /// `[columns]` in f32
    pub weight: Option<Slice<'a>>,
    /// Means of rows, `[rows]` in f32; absent with s
    pub mean: Option<Slice<'a>>,
    /// What rows were multiplied with, likewise
    pub rstd: Option<Slice<'a>>,
    /// The gradient of the result, as s
    pub dy: Slice<'a>,
}

/// What a layer norm's backward writes.
#[derive(Debug, Default)]
pub struct Written<'a> {
    /// The gradient of s
    pub ds: Option<SliceMut<'a>>,
    /// Whether it is added to what is there
    pub adds: bool,
    /// The gradient of the weight, `[columns]` in f32
    pub dweight: Option<SliceMut<'a>>,
    /// The gradient of the bias, likewise
    pub dbias: Option<SliceMut<'a>>,
}

/// The gradients of a layer norm whose rows these kernels [hold](holds), in one pass; those that are wanted
/// have the same bits whatever else is. workspace: f32, of [`workspace`], if one is a parameter's.
///
/// # Errors
/// Rows of types other than f32 and bf16.
///
/// # Panics
/// If lengths or types do not fit, or something is missing for what is wanted.
pub fn backward(
    gpu: &Gpu,
    read: Read<'_>,
    written: Written<'_>,
    [rows, columns]: [usize; 2],
    workspace: SliceMut<'_>,
) -> Result<()> {
    assert!(holds(columns), "norm backward: rows of {columns} columns");
    let Read {
        s,
        weight,
        mean,
        rstd,
        dy,
    } = read;
    let Written {
        ds,
        adds,
        dweight,
        dbias,
    } = written;
    let (count, scalar) = (rows * columns, dy.scalar());
    check!("norm backward", dy, count, scalar);
    check_some!("norm backward", s, count, scalar);
    check_some!("norm backward", weight, columns, Scalar::F32);
    check_some!("norm backward", rstd, rows, Scalar::F32);
    check_some!("norm backward", ds, count, scalar);
    check_some!("norm backward", dweight, columns, Scalar::F32);
    check_some!("norm backward", dbias, columns, Scalar::F32);
    check_some!("norm backward", mean, rows, Scalar::F32);
    let enough =
        (s.is_some() && mean.is_some() && rstd.is_some()) || (ds.is_none() && dweight.is_none());
    assert!(enough, "norm backward: of what is not given");
    let parts = parts(rows);
    let need = match dweight.is_some() || dbias.is_some() {
        true => self::workspace(rows, columns),
        false => 0,
    };
    let fits = workspace.count() >= need && (need == 0 || workspace.scalar() == Scalar::F32);
    assert!(fits, "norm backward: {need} x f32 of workspace needed");
    let of = |result: &Option<SliceMut<'_>>, number: usize| match result {
        None => 0,
        Some(result) if parts == 1 => result.address(),
        Some(_) => workspace.address() + (4 * number * parts * columns) as u64,
    };
    let (weights, biases) = (of(&dweight, 0), of(&dbias, 1));
    let to = ds.as_ref().map_or(0, SliceMut::address);
    let also = if adds { to } else { 0 };
    let width = columns as i32;
    let from = s.map_or(0, |s| s.address());
    let wide = wide(scalar, &[from, dy.address(), to]);
    // The fewer packs of a row there are, the more rows are under way.
    let name = match by_type!("layer_norm_held_backward", scalar)? {
        _ if scalar == Scalar::Bf16 && columns <= 768 => "layer_norm_held_backward_bf16_768",
        name => name,
    };
    let args = args![
        from, weight, mean, rstd, dy, also, to, weights, biases, rows, width, wide
    ];
    gpu.launch("norm_held", name, launch(parts), args)?;
    if parts == 1 || (dweight.is_none() && dbias.is_none()) {
        return Ok(());
    }
    join(gpu, workspace, [dweight, dbias], parts, width)
}

/// The sums of the parts `[2, parts, columns]` of a weight's and a bias' gradient in f32, of those that are wanted.
pub(super) fn join(
    gpu: &Gpu,
    parts: SliceMut<'_>,
    [dweight, dbias]: [Option<SliceMut<'_>>; 2],
    count: usize,
    columns: i32,
) -> Result<()> {
    let launch = Launch {
        grid: [(columns as usize).div_ceil(32) as u32, 2, 1],
        block: [32, 32, 1],
        shared: 0,
    };
    let args = args![parts, dweight, dbias, count as i32, columns];
    gpu.launch("norm_held", "norm_join", launch, args)
}
