//! Launchers of `softmax.cu`.

use super::launch::args;
use super::pointwise::{by_type, check};
use super::rows::Rows;
use super::{Gpu, Result, Slice, SliceMut};

/// Number of rows, after checking that they are whole.
fn count_rows(count: usize, columns: usize) -> usize {
    if columns == 0 {
        assert_eq!(count, 0, "softmax: {count} elements in rows of 0");
        return 0;
    }
    assert_eq!(
        count % columns,
        0,
        "softmax: {count} elements are not whole rows of {columns}"
    );
    count / columns
}

/// `y[r, :] = e^x[r, :] / Σ e^x[r, :]`, or with `log` `x[r, :] - ln Σ e^x[r, :]`.
///
/// # Errors
/// Types other than f32 and bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn softmax(gpu: &Gpu, x: Slice<'_>, y: SliceMut<'_>, columns: usize, log: bool) -> Result<()> {
    let (rows, scalar) = (count_rows(x.count(), columns), x.scalar());
    check!("softmax", y, x.count(), scalar);
    let name = by_type!("softmax", scalar)?;
    let addresses = [x.address(), y.address()];
    let by = Rows::new(gpu, scalar, [rows, columns], 1, &addresses);
    let args = args![x, y, rows, by.columns, log, by.wide, by.keep];
    gpu.launch("softmax", name, by.launch, args)
}

/// The gradient of [`softmax`]'s argument, from its result `y`: `y·(dy - Σ y·dy)`, or with `log`
/// `dy - e^y·Σ dy`.
///
/// # Errors
/// As [`softmax`].
///
/// # Panics
/// As [`softmax`].
pub fn softmax_backward(
    gpu: &Gpu,
    y: Slice<'_>,
    dy: Slice<'_>,
    dx: SliceMut<'_>,
    columns: usize,
    log: bool,
) -> Result<()> {
    let (rows, scalar) = (count_rows(y.count(), columns), y.scalar());
    check!("softmax_backward", dy, y.count(), scalar);
    check!("softmax_backward", dx, y.count(), scalar);
    let name = by_type!("softmax_backward", scalar)?;
    let addresses = [y.address(), dy.address(), dx.address()];
    let by = Rows::new(gpu, scalar, [rows, columns], 2, &addresses);
    let args = args![y, dy, dx, rows, by.columns, log, by.wide, by.keep];
    gpu.launch("softmax", name, by.launch, args)
}
