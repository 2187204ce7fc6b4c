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
    if y.scalar().size() < 8 {
        return gpu.fill(y, value as u32);
    }
    let count = y.count();
    let launch = Launch::cover(count, THREADS, 1);
    gpu.launch("copy", "fill_u64", launch, args![y, count, value])
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

/// A layout as rows of elements that lie side by side: how many rows, elements of each, and elements
/// from one to the next. `None` if it is not of that kind.
fn as_rows(dims: &[usize], strides: &[usize]) -> Option<(usize, usize, usize)> {
    let mut axes: Vec<_> = dims.iter().zip(strides).filter(|(n, _)| **n != 1).collect();
    let mut length = 1;
    while let Some(&(&n, &stride)) = axes.last()
        && stride == length
    {
        length *= n;
        axes.pop();
    }
    let Some((&count, &step)) = axes.pop() else {
        return Some((1, length, length));
    };
    let mut rows = count;
    while let Some((&n, &stride)) = axes.pop() {
        if stride != step * rows {
            return None;
        }
        rows *= n;
    }
    // The driver's copies want rows that do not overlap.
    (step >= length).then_some((rows, length, step))
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
    if let Some((rows, length, step)) = as_rows(dims, strides).filter(|_| count > 0) {
        return gpu.copy_rows(rows, length, (x, step), (y, length));
    }
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
    if let Some((rows, length, step)) = as_rows(dims, strides).filter(|_| count > 0) {
        return gpu.copy_rows(rows, length, (x, length), (y, step));
    }
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

#[cfg(test)]
mod tests {
    use super::as_rows;

    #[test]
    fn layouts_are_rows_where_they_are() {
        assert_eq!(as_rows(&[4, 3, 5], &[15, 5, 1]), Some((1, 60, 60)));
        assert_eq!(as_rows(&[4, 3, 5], &[30, 5, 1]), Some((4, 15, 30)));
        assert_eq!(as_rows(&[2, 4, 1, 5], &[40, 10, 7, 1]), Some((8, 5, 10)));
        assert_eq!(as_rows(&[6], &[3]), Some((6, 1, 3)));
        assert_eq!(as_rows(&[], &[]), Some((1, 1, 1)));
        assert_eq!(as_rows(&[2, 4, 5], &[50, 10, 1]), None, "a step apart");
        assert_eq!(as_rows(&[3, 4], &[1, 3]), None, "transposed");
        assert_eq!(as_rows(&[3, 4], &[0, 1]), None, "repeated");
    }
}
