//! Launchers of `reduce.cu`.

use super::launch::args;
use super::{Error, Gpu, Launch, Result, Scalar, Slice, SliceMut};
use crate::reduce::Reduce;

/// Threads of a block, as in the source.
const THREADS: u32 = 256;
/// Rows of a block where each has a warp.
const WARPS: usize = 8;
/// Longer rows have a block each.
const WARP_ROW: usize = 2048;
/// Blocks that are enough to keep a large GPU at work.
const BLOCKS: usize = 1024;
/// Places of the axis that are worth a part of their own.
const PART: usize = 64;

/// The name for a type.
fn by_type(kernel: &'static str, x: Scalar, names: [&'static str; 2]) -> Result<&'static str> {
    match x {
        Scalar::F32 => Ok(names[0]),
        Scalar::Bf16 => Ok(names[1]),
        found => Err(Error::Scalar {
            kernel,
            found,
            expected: "f32 and bf16",
        }),
    }
}

/// Into how many parts the axis is cut, each of how many places, so that there is work for all.
fn parts(outer: usize, axis: usize, inner: usize) -> (usize, usize) {
    let blocks = outer * inner.div_ceil(128);
    let wanted = BLOCKS.div_ceil(blocks.max(1));
    let parts = wanted.min(axis / PART).max(1);
    let length = axis.div_ceil(parts).max(1);
    (axis.div_ceil(length).max(1), length)
}

/// Elements (f32) of workspace for [`reduce`] over x `[outer, axis, inner]`.
pub fn reduce_workspace(kind: Reduce, outer: usize, axis: usize, inner: usize) -> usize {
    if kind == Reduce::Max || inner == 1 {
        return 0;
    }
    match parts(outer, axis, inner) {
        (1, _) => 0,
        (parts, _) => outer * parts * inner,
    }
}

/// `y[o, i] = kind over a of x[o, a, i]`; x `[outer, axis, inner]`, y `[outer, inner]`, workspace of
/// [`reduce_workspace`].
///
/// # Errors
/// Types other than f32 and bf16; two that differ, except for sums over another axis than the last.
///
/// # Panics
/// If lengths do not fit.
pub fn reduce(
    gpu: &Gpu,
    kind: Reduce,
    x: Slice<'_>,
    [outer, axis, inner]: [usize; 3],
    y: SliceMut<'_>,
    workspace: SliceMut<'_>,
) -> Result<()> {
    assert_eq!(
        x.count(),
        outer * axis * inner,
        "reduce: x is not [outer, axis, inner]"
    );
    assert_eq!(y.count(), outer * inner, "reduce: y is not [outer, inner]");
    assert!(
        kind != Reduce::Max || axis > 0 || y.count() == 0,
        "reduce: no maximum of nothing"
    );
    let need = reduce_workspace(kind, outer, axis, inner);
    assert!(
        workspace.count() >= need && (need == 0 || workspace.scalar() == Scalar::F32),
        "reduce: workspace"
    );
    let scale = match kind {
        Reduce::Mean => (1.0 / axis as f64) as f32,
        Reduce::Sum | Reduce::Max => 1.0,
    };
    if inner == 1 && x.scalar() == y.scalar() {
        let sums = ["sum_of_rows_f32", "sum_of_rows_bf16"];
        let maxima = ["max_of_rows_f32", "max_of_rows_bf16"];
        let names = if kind == Reduce::Max { maxima } else { sums };
        let name = by_type("reduce", x.scalar(), names)?;
        let wide = axis > WARP_ROW;
        let blocks = if wide { outer } else { outer.div_ceil(WARPS) };
        let launch = Launch::linear(blocks, THREADS);
        return gpu.launch(
            "reduce",
            name,
            launch,
            args![x, y, outer, axis, scale, wide],
        );
    }
    if kind == Reduce::Max {
        let name = by_type(
            "reduce",
            x.scalar(),
            ["max_of_columns_f32", "max_of_columns_bf16"],
        )?;
        assert_eq!(x.scalar(), y.scalar(), "reduce: types of a maximum");
        let launch = Launch::linear(outer * inner.div_ceil(32), THREADS);
        let (parts, accumulate) = (1usize, false);
        let args = args![x, y, axis, inner, parts, axis, scale, accumulate];
        return gpu.launch("reduce", name, launch, args);
    }
    let (count, length) = parts(outer, axis, inner);
    if count == 1 {
        return columns(gpu, x, y, [outer, axis, inner], (1, axis), scale);
    }
    let mut partial = workspace.part(0..need);
    let sizes = [outer, axis, inner];
    columns(gpu, x, partial.reborrow(), sizes, (count, length), 1.0)?;
    let sizes = [outer, count, inner];
    columns(gpu, partial.as_slice(), y, sizes, (1, count), scale)
}

/// One pass of sums over another axis than the last: x `[outer, axis, inner]`, y `[outer, parts,
/// inner]`.
fn columns(
    gpu: &Gpu,
    x: Slice<'_>,
    y: SliceMut<'_>,
    [outer, axis, inner]: [usize; 3],
    (parts, length): (usize, usize),
    scale: f32,
) -> Result<()> {
    let whole = inner.is_multiple_of(4) && x.address().is_multiple_of(4 * x.scalar().size() as u64);
    let names = match (x.scalar(), y.scalar()) {
        (Scalar::F32, Scalar::F32) => ["sum_of_columns_f32_f32", "sum_of_columns_f32_f32_by4"],
        (Scalar::F32, Scalar::Bf16) => ["sum_of_columns_f32_bf16", "sum_of_columns_f32_bf16_by4"],
        (Scalar::Bf16, Scalar::F32) => ["sum_of_columns_bf16_f32", "sum_of_columns_bf16_f32_by4"],
        (Scalar::Bf16, Scalar::Bf16) => {
            ["sum_of_columns_bf16_bf16", "sum_of_columns_bf16_bf16_by4"]
        }
        (found, other) => {
            let known = matches!(found, Scalar::F32 | Scalar::Bf16);
            return Err(Error::Scalar {
                kernel: "reduce",
                found: if known { other } else { found },
                expected: "f32 and bf16",
            });
        }
    };
    let width = if whole { 128 } else { 32 };
    let launch = Launch::linear(outer * parts * inner.div_ceil(width), THREADS);
    let accumulate = false;
    let args = args![x, y, axis, inner, parts, length, scale, accumulate];
    gpu.launch("reduce", names[usize::from(whole)], launch, args)
}

/// Elements (f32) of workspace for [`sum_rows`].
pub fn sum_rows_workspace(rows: usize, columns: usize) -> usize {
    match parts(1, rows, columns) {
        (1, _) => 0,
        (parts, _) => parts * columns,
    }
}

/// `y[c] = Σ over r of x[r, c]`; x `[rows, columns]`, y `[columns]` in f32 or bf16 whatever x is,
/// workspace of [`sum_rows_workspace`].
///
/// # Errors
/// Types other than f32 and bf16.
///
/// # Panics
/// If lengths do not fit.
pub fn sum_rows(
    gpu: &Gpu,
    x: Slice<'_>,
    [rows, columns]: [usize; 2],
    y: SliceMut<'_>,
    workspace: SliceMut<'_>,
) -> Result<()> {
    assert_eq!(
        x.count(),
        rows * columns,
        "sum_rows: x is not [rows, columns]"
    );
    assert_eq!(y.count(), columns, "sum_rows: y is not [columns]");
    let need = sum_rows_workspace(rows, columns);
    assert!(
        workspace.count() >= need && (need == 0 || workspace.scalar() == Scalar::F32),
        "sum_rows: workspace"
    );
    let (count, length) = parts(1, rows, columns);
    if count == 1 {
        return self::columns(gpu, x, y, [1, rows, columns], (1, rows), 1.0);
    }
    let mut partial = workspace.part(0..need);
    let sizes = [1, rows, columns];
    self::columns(gpu, x, partial.reborrow(), sizes, (count, length), 1.0)?;
    let sizes = [1, count, columns];
    self::columns(gpu, partial.as_slice(), y, sizes, (1, count), 1.0)
}

/// The gradient of a maximum: `dx[o, a, i] = dy[o, i]` for the first a with `x[o, a, i] = y[o, i]`,
/// else 0. x and dx `[outer, axis, inner]`, y and dy `[outer, inner]`, of one type.
///
/// # Errors
/// Types other than f32 and bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn max_backward(
    gpu: &Gpu,
    x: Slice<'_>,
    y: Slice<'_>,
    dy: Slice<'_>,
    dx: SliceMut<'_>,
    [outer, axis, inner]: [usize; 3],
) -> Result<()> {
    let count = outer * inner;
    for (what, found, expected) in [
        ("x", x.count(), count * axis),
        ("y", y.count(), count),
        ("dy", dy.count(), count),
        ("dx", dx.count(), count * axis),
    ] {
        assert_eq!(found, expected, "max_backward: length of {what}");
    }
    let types = [y.scalar(), dy.scalar(), dx.scalar()];
    assert_eq!(types, [x.scalar(); 3], "max_backward: types");
    if inner == 1 {
        let names = ["max_rows_backward_f32", "max_rows_backward_bf16"];
        let name = by_type("max backward", x.scalar(), names)?;
        let launch = Launch::linear(outer.div_ceil(WARPS), THREADS);
        return gpu.launch("reduce", name, launch, args![x, y, dy, dx, outer, axis]);
    }
    let names = ["max_columns_backward_f32", "max_columns_backward_bf16"];
    let name = by_type("max backward", x.scalar(), names)?;
    let launch = Launch::cover(count, THREADS, 1);
    let args = args![x, y, dy, dx, count, axis, inner];
    gpu.launch("reduce", name, launch, args)
}

/// `y[r]` = the index of the first maximum of `x[r, :]`, of its first NaN if there is one; x
/// `[rows, columns]`, y `[rows]` as `i64`, in whatever has eight bytes.
///
/// # Errors
/// An x that is neither f32 nor bf16.
///
/// # Panics
/// If lengths do not fit, or rows are empty or longer than 2^31 - 1.
pub fn argmax(gpu: &Gpu, x: Slice<'_>, [rows, columns]: [usize; 2], y: SliceMut<'_>) -> Result<()> {
    assert_eq!(
        x.count(),
        rows * columns,
        "argmax: x is not [rows, columns]"
    );
    assert_eq!(y.count(), rows, "argmax: y is not [rows]");
    assert_eq!(y.scalar().size(), 8, "argmax: y holds i64");
    assert!(columns > 0 || rows == 0, "argmax: no maximum of nothing");
    let columns = i32::try_from(columns).expect("argmax: rows of at most 2^31 - 1 elements");
    let name = by_type("argmax", x.scalar(), ["argmax_f32", "argmax_bf16"])?;
    let launch = Launch::linear(rows, THREADS);
    gpu.launch("reduce", name, launch, args![x, y, columns])
}

/// Blocks of the first pass of [`sum_all`]: a function of the length alone.
fn sum_blocks(count: usize) -> usize {
    count.div_ceil(16 * THREADS as usize).clamp(1, BLOCKS)
}

/// Bytes of workspace for [`sum_all`].
pub fn sum_all_workspace(count: usize) -> usize {
    8 * sum_blocks(count)
}

/// `y[0] = Σ x`, summed in double precision; y is f32, the workspace has [`sum_all_workspace`] bytes
/// and lies at a multiple of 8.
///
/// # Errors
/// An x that is neither f32 nor bf16.
///
/// # Panics
/// If lengths or y's type do not fit.
pub fn sum_all(gpu: &Gpu, x: Slice<'_>, y: SliceMut<'_>, workspace: SliceMut<'_>) -> Result<()> {
    let count = x.count();
    assert_eq!((y.count(), y.scalar()), (1, Scalar::F32), "sum_all: y");
    let enough = workspace.as_slice().bytes() >= sum_all_workspace(count);
    assert!(
        enough && workspace.address().is_multiple_of(8),
        "sum_all: workspace"
    );
    let name = by_type("sum", x.scalar(), ["sum_parts_f32", "sum_parts_bf16"])?;
    let blocks = sum_blocks(count);
    let launch = Launch::linear(blocks, THREADS);
    gpu.launch("reduce", name, launch, args![x, count, &workspace])?;
    let launch = Launch::linear(1, THREADS);
    gpu.launch(
        "reduce",
        "sum_join",
        launch,
        args![workspace, blocks as i32, y],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_axis() {
        for outer in [1, 3, 500, 5000] {
            for axis in [0, 1, 63, 64, 65, 1000, 65536, 1_000_003] {
                for inner in [1, 5, 128, 768, 200_000] {
                    let (count, length) = parts(outer, axis, inner);
                    assert!(count * length >= axis, "{outer} {axis} {inner}");
                    assert!(axis == 0 || (count - 1) * length < axis, "no part is empty");
                }
            }
        }
        assert_eq!(parts(1, 65536, 768).0, 171);
        assert_eq!(parts(2000, 65536, 768).0, 1);
    }
}
