//! Launchers of `copy.cu`.

use super::launch::args;
use super::{Error, Gpu, Launch, Result, Scalar, Slice, SliceMut};

/// Threads of a block.
const THREADS: u32 = 256;
/// Most dimensions, as in `common.cuh`.
const MAX_RANK: usize = 6;

/// Every element `value`, given as its bytes in the low end of a word.
///
/// # Errors
/// A failed launch.
pub fn fill(gpu: &Gpu, y: SliceMut<'_>, value: u64) -> Result<()> {
    let name = match y.scalar().size() {
        1 => "fill_u8",
        2 => "fill_u16",
        4 => "fill_u32",
        _ => "fill_u64",
    };
    let count = y.count();
    let launch = Launch::cover(count, THREADS, 1);
    gpu.launch("copy", name, launch, args![y, count, value])
}

/// `y[i] = x[i]`, rounded to `y`'s type.
///
/// # Errors
/// Types other than f32 and bf16.
///
/// # Panics
/// If the lengths differ.
pub fn convert(gpu: &Gpu, x: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    assert_eq!(x.count(), y.count(), "convert: x and y differ in length");
    let name = match (x.scalar(), y.scalar()) {
        (from, to) if from == to => return gpu.copy(x, y),
        (Scalar::F32, Scalar::Bf16) => "convert_f32_bf16",
        (Scalar::Bf16, Scalar::F32) => "convert_bf16_f32",
        (found, other) => {
            let f32_or_bf16 = |s| matches!(s, Scalar::F32 | Scalar::Bf16);
            return Err(Error::Scalar {
                kernel: "convert",
                found: if f32_or_bf16(found) { other } else { found },
                expected: "f32 and bf16",
            });
        }
    };
    let count = x.count();
    let launch = Launch::cover(count, THREADS, 4);
    gpu.launch("copy", name, launch, args![x, y, count])
}

/// Dimensions and strides as `common.cuh` has them.
pub(super) fn strided(dims: &[usize], strides: &[usize]) -> [u8; 16 * MAX_RANK] {
    assert!(
        dims.len() <= MAX_RANK && dims.len() == strides.len(),
        "{} dimensions and {} strides",
        dims.len(),
        strides.len()
    );
    let lead = MAX_RANK - dims.len();
    let mut words = [1i64; 2 * MAX_RANK];
    for (axis, (&length, &stride)) in dims.iter().zip(strides).enumerate() {
        words[lead + axis] = length as i64;
        words[MAX_RANK + lead + axis] = stride as i64;
    }
    bytemuck::cast(words)
}

/// One past the last element that such a layout reaches.
fn extent(dims: &[usize], strides: &[usize]) -> usize {
    if dims.contains(&0) {
        return 0;
    }
    let steps = dims.iter().zip(strides);
    1 + steps
        .map(|(&length, &stride)| (length - 1) * stride)
        .sum::<usize>()
}

/// Which of the kernels for elements of this size.
fn by_size(scalar: Scalar, names: [&'static str; 4]) -> &'static str {
    names[scalar.size().trailing_zeros() as usize]
}

/// `y` = the elements of `x` in the row-major order of `dims`, which lie `strides` apart.
///
/// # Errors
/// A failed launch.
///
/// # Panics
/// If types or lengths do not fit.
pub fn gather_strided(
    gpu: &Gpu,
    dims: &[usize],
    x: Slice<'_>,
    strides: &[usize],
    y: SliceMut<'_>,
) -> Result<()> {
    assert_eq!(x.scalar(), y.scalar(), "gather strided: types");
    let count: usize = dims.iter().product();
    assert_eq!(y.count(), count, "gather strided: length of y");
    assert!(
        extent(dims, strides) <= x.count(),
        "gather strided: x is too short"
    );
    let names = [
        "gather_strided_u8",
        "gather_strided_u16",
        "gather_strided_u32",
        "gather_strided_u64",
    ];
    let name = by_size(x.scalar(), names);
    let layout = strided(dims, strides);
    let launch = Launch::cover(count, THREADS, 1);
    gpu.launch("copy", name, launch, args![x, y, count, &layout[..]])
}

/// Writes the elements of `x`, in the row-major order of `dims`, `strides` apart into `y`.
///
/// # Errors
/// A failed launch.
///
/// # Panics
/// If types or lengths do not fit.
pub fn scatter_strided(
    gpu: &Gpu,
    dims: &[usize],
    x: Slice<'_>,
    y: SliceMut<'_>,
    strides: &[usize],
) -> Result<()> {
    assert_eq!(x.scalar(), y.scalar(), "scatter strided: types");
    let count: usize = dims.iter().product();
    assert_eq!(x.count(), count, "scatter strided: length of x");
    assert!(
        extent(dims, strides) <= y.count(),
        "scatter strided: y is too short"
    );
    let names = [
        "scatter_strided_u8",
        "scatter_strided_u16",
        "scatter_strided_u32",
        "scatter_strided_u64",
    ];
    let name = by_size(x.scalar(), names);
    let layout = strided(dims, strides);
    let launch = Launch::cover(count, THREADS, 1);
    gpu.launch("copy", name, launch, args![x, y, count, &layout[..]])
}
