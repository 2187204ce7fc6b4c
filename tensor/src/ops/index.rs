//! Moving rows and blocks: gather, scatter, concatenation.

use std::borrow::Cow;

use graft_kernels::{copy, cuda, gather as kernel};

use super::elementwise::add_assign;
use super::{indices, same_dtype, workspace};
use crate::error::{Error, Result};
use crate::{Category, DType, Memory, Shape, Tensor, with_dtype, with_float};

/// Rows of `table [rows, columns]` by `index i64 [n]`: `[n, columns]`. An embedding, or a selection
/// of tokens.
///
/// # Errors
/// An index outside the table, a table that is no matrix.
pub fn gather_rows(m: &Memory, table: &Tensor, index: &Tensor) -> Result<Tensor> {
    let op = "gather rows";
    let (rows, columns) = matrix(op, "the table", table)?;
    let index = indices(op, index, rows, None, m)?;
    let table = table.contiguous(m)?;
    let shape = [&index.shape()[..], &[columns]].concat();
    let mut y = Tensor::empty(m, table.dtype(), &shape)?;
    if y.is_planned() {
        return Ok(y);
    }
    if let Some(on) = m.gpu().filter(|_| table.dtype().is_float()) {
        on.run(|gpu| {
            let (table, index, y) = (table.device()?, index.device()?, y.device_mut()?);
            Ok(cuda::index::gather_rows(gpu, table, index, y, columns)?)
        })?;
        return Ok(y);
    }
    with_dtype!(table.dtype(), T => kernel::gather_rows(
        table.slice::<T>()?,
        index.slice::<i64>()?,
        y.slice_mut::<T>()?,
        columns,
    ));
    Ok(y)
}

/// The gradient of [`gather_rows`]' table: the rows of `dy` added up where they came from, in the
/// order of the index.
///
/// # Errors
/// As [`gather_rows`], and a gradient that does not fit the index.
pub fn scatter_add_rows(
    m: &Memory,
    dy: &Tensor,
    index: &Tensor,
    table_rows: usize,
) -> Result<Tensor> {
    let op = "scatter rows";
    let columns = *dy.shape().last().unwrap_or(&0);
    let mut table = Tensor::zeros(m, dy.dtype(), &[table_rows, columns])?;
    let (dy, index) = rows_to_add(op, m, &table, dy, index)?;
    sum_rows(op, m, &mut table, &dy, &index)?;
    Ok(table)
}

/// [`scatter_add_rows`], added to what has arrived of the table's gradient; on a CPU in place, if nothing else holds that.
///
/// # Errors
/// As there, and a gradient of another type or number of columns than the table's.
pub fn add_rows(m: &Memory, table: Tensor, dy: &Tensor, index: &Tensor) -> Result<Tensor> {
    let op = "scatter rows";
    let (dy, index) = rows_to_add(op, m, &table, dy, index)?;
    let mut table = table.into_owned(m)?;
    if m.gpu().is_some() {
        let scratch = m.with(Category::Workspace);
        let mut rows = Tensor::zeros(&scratch, dy.dtype(), table.shape())?;
        sum_rows(op, &scratch, &mut rows, &dy, &index)?;
        add_assign(&mut table, &rows)?;
    } else {
        sum_rows(op, m, &mut table, &dy, &index)?;
    }
    Ok(table)
}

/// Adds what [`rows_to_add`] gave up in the rows of `table`: to what is there on a CPU, in its place on a GPU.
fn sum_rows(
    op: &'static str,
    m: &Memory,
    table: &mut Tensor,
    dy: &Tensor,
    index: &Tensor,
) -> Result<()> {
    let (rows, columns) = (table.shape()[0], table.shape()[1]);
    let Some(on) = m.gpu() else {
        with_float!(op, dy.dtype(), T => {
            if !table.is_planned() {
                let (dy, index) = (dy.slice::<T>()?, index.slice::<i64>()?);
                kernel::scatter_add_rows(dy, index, table.slice_mut::<T>()?, columns);
            }
        });
        return Ok(());
    };
    let scatter = cuda::index::Scatter::new(index.count(), rows)?;
    // Integers of the device's alone, in memory for as many floats.
    let mut numbers = workspace(m, DType::F32, scatter.numbers())?;
    let mut room = workspace(m, DType::F32, scatter.order_workspace())?;
    let need = cuda::index::Scatter::workspace(index.count(), columns);
    let mut scratch = workspace(m, dy.dtype(), need)?;
    on.run(|gpu| {
        let (index, room) = (index.device()?, room.device_mut()?);
        cuda::index::order_rows(gpu, &scatter, index, numbers.device_mut()?, room)?;
        let (numbers, dy) = (numbers.device()?, dy.device()?);
        let (table, scratch) = (table.device_mut()?, scratch.device_mut()?);
        Ok(cuda::index::scatter_add_rows(
            gpu, &scatter, numbers, dy, table, columns, scratch,
        )?)
    })
}

/// The gradient of rows of a table, and their numbers, as kernels take them.
fn rows_to_add<'a>(
    op: &'static str,
    m: &Memory,
    table: &Tensor,
    dy: &'a Tensor,
    index: &'a Tensor,
) -> Result<(Cow<'a, Tensor>, Cow<'a, Tensor>)> {
    let (rows, columns) = matrix(op, "the table", table)?;
    same_dtype(op, "the gradient", dy, table.dtype())?;
    let index = indices(op, index, rows, None, m)?;
    let shape = [&index.shape()[..], &[columns]].concat();
    if dy.shape()[..] != shape {
        return Err(Error::shape(
            op,
            "the gradient",
            dy.shape(),
            format!("{shape:?}"),
        ));
    }
    Ok((dy.contiguous(m)?, index))
}

/// Writes `x [n, columns]` over rows `first .. first + n` of `table [rows, columns]`, in place.
///
/// # Errors
/// Rows outside the table, another type or number of columns, a table that something else holds.
pub fn write_rows(m: &Memory, table: &mut Tensor, first: usize, x: &Tensor) -> Result<()> {
    let op = "write rows";
    let (rows, columns) = matrix(op, "the table", table)?;
    same_dtype(op, "the rows", x, table.dtype())?;
    let (count, width) = matrix(op, "the rows", x)?;
    if width != columns {
        let expected = format!("[_, {columns}]");
        return Err(Error::shape(op, "the rows", x.shape(), expected));
    }
    if first > rows || count > rows - first {
        let what = format!("rows {first}..{} of a table of {rows}", first + count);
        return Err(Error::argument(op, what));
    }
    if table.is_planned() {
        return Ok(());
    }
    let x = x.contiguous(m)?;
    if let Some(on) = m.gpu().filter(|_| x.dtype().is_float()) {
        return on.run(|gpu| {
            let rows = first * columns..(first + count) * columns;
            Ok(gpu.copy(x.device()?, table.device_mut()?.part(rows))?)
        });
    }
    with_dtype!(table.dtype(), T => {
        let to = &mut table.slice_mut::<T>()?[first * columns..][..count * columns];
        to.copy_from_slice(x.slice::<T>()?);
    });
    Ok(())
}

/// Tensors one after the other along dimension `axis`.
///
/// # Errors
/// No tensors; types, ranks or other dimensions that differ.
pub fn concat(m: &Memory, parts: &[&Tensor], axis: usize) -> Result<Tensor> {
    let op = "concat";
    let Some(first) = parts.first() else {
        return Err(Error::argument(op, "no tensors to join"));
    };
    if axis >= first.shape().rank() {
        return Err(Error::argument(
            op,
            format!("dimension {axis} of {} does not exist", first.shape()),
        ));
    }
    let mut length = 0;
    for part in parts {
        same_dtype(op, "a part", part, first.dtype())?;
        let fits = part.shape().rank() == first.shape().rank()
            && part.shape().replaced(axis, Some(0)) == first.shape().replaced(axis, Some(0));
        if !fits {
            let expected = format!("{} except in dimension {axis}", first.shape());
            return Err(Error::shape(op, "a part", part.shape(), expected));
        }
        length += part.shape()[axis];
    }
    let shape = first.shape().replaced(axis, Some(length));
    let mut y = Tensor::empty(m, first.dtype(), &shape)?;
    let mut start = 0;
    for part in parts {
        put(m, &mut y, part, axis, start)?;
        start += part.shape()[axis];
    }
    Ok(y)
}

/// Zeros of `shape` with `block` at `start` of dimension `axis`: the gradient of
/// [`Tensor::narrow`].
///
/// # Errors
/// A block that does not lie within `shape`.
pub fn place(
    m: &Memory,
    block: &Tensor,
    shape: &Shape,
    axis: usize,
    start: usize,
) -> Result<Tensor> {
    let fits = axis < shape.rank()
        && block.shape().rank() == shape.rank()
        && block.shape().replaced(axis, Some(0)) == shape.replaced(axis, Some(0))
        && start
            .checked_add(block.shape()[axis])
            .is_some_and(|end| end <= shape[axis]);
    if !fits {
        let expected = format!("a block within {shape} at {start} of dimension {axis}");
        return Err(Error::shape("place", "the block", block.shape(), expected));
    }
    let mut y = Tensor::zeros(m, block.dtype(), shape)?;
    put(m, &mut y, block, axis, start)?;
    Ok(y)
}

/// Writes `block` to `start` of dimension `axis` of `y`, in place.
///
/// # Errors
/// A `y` that something else holds.
///
/// # Panics
/// If the block does not lie within `y`.
pub fn put(m: &Memory, y: &mut Tensor, block: &Tensor, axis: usize, start: usize) -> Result<()> {
    let block = block.contiguous(m)?;
    if y.is_planned() || block.count() == 0 {
        return Ok(());
    }
    let strides = y.shape().row_major_strides();
    let strides = &strides[..y.shape().rank()];
    if let Some(on) = m.gpu().filter(|_| block.dtype().is_float()) {
        let first = start * strides[axis];
        return on.run(|gpu| {
            let (x, y) = (block.device()?, y.device_mut()?);
            if block.shape()[..axis].iter().all(|&length| length == 1) {
                return Ok(gpu.copy(x, y.part(first..first + block.count()))?);
            }
            let to = first..y.count();
            Ok(cuda::copy::scatter_strided(
                gpu,
                block.shape(),
                x,
                y.part(to),
                strides,
            )?)
        });
    }
    with_dtype!(block.dtype(), T => {
        let to = &mut y.slice_mut::<T>()?[start * strides[axis]..];
        copy::scatter_strided(block.shape(), block.slice::<T>()?, to, strides);
    });
    Ok(())
}

fn matrix(op: &'static str, what: &str, x: &Tensor) -> Result<(usize, usize)> {
    match x.shape()[..] {
        [rows, columns] => Ok((rows, columns)),
        _ => Err(Error::shape(op, what, x.shape(), "[rows, columns]")),
    }
}
