//! Launchers of `binary.cu`.

use super::launch::args;
use super::pointwise::{by_type, check, group, spread};
use super::{Error, Gpu, Result, Slice, SliceMut};
use crate::binary::Binary;
use crate::strided::{MAX_RANK, Walk};

/// The number of a kind in `binary.cu`.
fn number(kind: Binary) -> i32 {
    match kind {
        Binary::Add => 0,
        Binary::Sub => 1,
        Binary::Mul => 2,
        Binary::Div => 3,
        Binary::Max => 4,
        Binary::Min => 5,
    }
}

/// And of 1 where both are equal, else 0.
const EQUAL: i32 = 6;

fn flat(gpu: &Gpu, number: i32, a: Slice<'_>, b: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    check!("binary", b, a.count(), a.scalar());
    check!("binary", y, a.count(), a.scalar());
    let name = by_type!("binary", a.scalar())?;
    let launch = spread(gpu, a.count(), group(a.scalar()));
    gpu.launch("binary", name, launch, args![number, a, b, y, a.count()])
}

/// `y[i] = kind(a[i], b[i])`.
///
/// # Errors
/// Types other than f32 and bf16.
///
/// # Panics
/// If lengths or types differ.
pub fn binary(gpu: &Gpu, kind: Binary, a: Slice<'_>, b: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    flat(gpu, number(kind), a, b, y)
}

/// `y[i]` = 1 where `a[i] == b[i]`, else 0.
///
/// # Errors
/// As [`binary`].
///
/// # Panics
/// As [`binary`].
pub fn equal(gpu: &Gpu, a: Slice<'_>, b: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    flat(gpu, EQUAL, a, b, y)
}

/// `y[i] += x[i]`.
///
/// # Errors
/// As [`binary`].
///
/// # Panics
/// As [`binary`].
pub fn add_assign(gpu: &Gpu, y: SliceMut<'_>, x: Slice<'_>) -> Result<()> {
    check!("add_assign", x, y.count(), y.scalar());
    let name = by_type!("binary", x.scalar())?;
    let launch = spread(gpu, x.count(), group(x.scalar()));
    let args = args![number(Binary::Add), &y, x, &y, x.count()];
    gpu.launch("binary", name, launch, args)
}

/// `y[i] += x[i]·by`.
///
/// # Errors
/// As [`binary`].
///
/// # Panics
/// As [`binary`].
pub fn add_scaled(gpu: &Gpu, y: SliceMut<'_>, x: Slice<'_>, by: f64) -> Result<()> {
    check!("add_scaled", x, y.count(), y.scalar());
    let name = by_type!("add_scaled", x.scalar())?;
    let launch = spread(gpu, x.count(), group(x.scalar()));
    gpu.launch("binary", name, launch, args![y, x, by as f32, x.count()])
}

/// `y[i] = kind(a[at i], b[at i])` for every index i of `shape`, `y` contiguous. Strides count
/// elements, 0 broadcasts; rank 0 to 6.
///
/// # Errors
/// As [`binary`]; an inner dimension of 2^32 or more.
///
/// # Panics
/// If `a` or `b` is too short for its strides, or types differ.
pub fn binary_strided(
    gpu: &Gpu,
    kind: Binary,
    shape: &[usize],
    a: Slice<'_>,
    a_strides: &[usize],
    b: Slice<'_>,
    b_strides: &[usize],
    y: SliceMut<'_>,
) -> Result<()> {
    let walk = Walk::new("binary_strided", shape, [a_strides, b_strides]);
    check!("binary_strided", b, b.count(), a.scalar());
    check!("binary_strided", y, walk.len(), a.scalar());
    walk.check("binary_strided", 0, "a", a.count());
    walk.check("binary_strided", 1, "b", b.count());
    if let Some(length) = walk.dims().iter().skip(1).find(|&&n| n > u32::MAX as usize) {
        return Err(Error::Unsupported {
            kernel: "binary",
            what: format!("broadcasting along a dimension of {length}"),
        });
    }
    let scalar = a.scalar();
    let each = group(scalar);
    let (width, inner) = walk.inner();
    // By one instruction if neighbours lie side by side and every run begins at a multiple of 16 bytes.
    let wide = |address: u64, operand: usize| {
        let mut outer = walk.strides().iter().rev().skip(1);
        inner[operand] == 1
            && address.is_multiple_of(16)
            && outer.all(|s| s[operand].is_multiple_of(each))
    };
    let layout = layout(&walk);
    let (count, number) = (y.count(), number(kind));
    if width.is_multiple_of(each) && y.address().is_multiple_of(16) {
        let name = by_type!("binary_rows", scalar)?;
        let (wide_a, wide_b) = (wide(a.address(), 0), wide(b.address(), 1));
        let args = args![number, a, b, y, count, &layout[..], wide_a, wide_b];
        gpu.launch("binary", name, spread(gpu, count, each), args)
    } else {
        let name = by_type!("binary_elements", scalar)?;
        let args = args![number, a, b, y, count, &layout[..]];
        gpu.launch("binary", name, spread(gpu, count, 1), args)
    }
}

/// A walk as `binary.cu` has it.
fn layout(walk: &Walk<2>) -> [u8; 8 * (3 * MAX_RANK + 1)] {
    let mut words = [0i64; 3 * MAX_RANK + 1];
    let lead = MAX_RANK - walk.dims().len();
    for (axis, (&length, strides)) in walk.dims().iter().zip(walk.strides()).enumerate() {
        words[lead + axis] = length as i64;
        words[MAX_RANK + lead + axis] = strides[0] as i64;
        words[2 * MAX_RANK + lead + axis] = strides[1] as i64;
    }
    words[3 * MAX_RANK] = lead as i64;
    bytemuck::cast(words)
}
