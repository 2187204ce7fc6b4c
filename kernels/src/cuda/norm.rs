//! Launchers of `norm.cu`. Rows are `[rows, columns]`; statistics, parameters and the parameters'
//! gradients are f32. Layer norms of rows that a warp can hold go to the kernels of `norm_held.cu` instead.

use super::launch::args;
use super::norm_held::{self, Read, Written, holds};
use super::pointwise::{by_type, check, check_some, group};
use super::rows::{Rows, wide};
use super::{Gpu, Launch, Result, Scalar, Slice, SliceMut};

/// Addresses of slices, 0 for those that are absent.
fn address(slice: &Option<Slice<'_>>) -> u64 {
    slice.map_or(0, |s| s.address())
}

/// The same for one that is written.
fn address_mut(slice: &Option<SliceMut<'_>>) -> u64 {
    slice.as_ref().map_or(0, SliceMut::address)
}

/// `s = x + residual`, `y = (s - mean(s)) / √(var(s) + eps) · weight + bias`, row by row; `sum`
/// receives s.
///
/// # Errors
/// Rows of types other than f32 and bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn layer_norm(
    gpu: &Gpu,
    x: Slice<'_>,
    residual: Option<Slice<'_>>,
    weight: Option<Slice<'_>>,
    bias: Option<Slice<'_>>,
    eps: f64,
    y: SliceMut<'_>,
    sum: Option<SliceMut<'_>>,
    mean: SliceMut<'_>,
    rstd: SliceMut<'_>,
    columns: usize,
) -> Result<()> {
    let (rows, scalar) = (rstd.count(), x.scalar());
    check!("layer_norm", x, rows * columns, scalar);
    check_some!("layer_norm", residual, rows * columns, scalar);
    check_some!("layer_norm", weight, columns, Scalar::F32);
    check_some!("layer_norm", bias, columns, Scalar::F32);
    check!("layer_norm", y, rows * columns, scalar);
    check_some!("layer_norm", sum, rows * columns, scalar);
    check!("layer_norm", mean, rows, Scalar::F32);
    check!("layer_norm", rstd, rows, Scalar::F32);
    if holds(columns) {
        let read = [
            x.address(),
            address(&residual),
            address(&weight),
            address(&bias),
        ];
        let written = [
            y.address(),
            address_mut(&sum),
            mean.address(),
            rstd.address(),
        ];
        return norm_held::forward(gpu, read, eps, written, scalar, [rows, columns]);
    }
    let name = by_type!("layer_norm", scalar)?;
    let addresses = [
        x.address(),
        address(&residual),
        y.address(),
        address_mut(&sum),
    ];
    let by = Rows::new(gpu, scalar, [rows, columns], 1, &addresses);
    let parameters = [address(&weight), address(&bias)];
    let args = args![
        x,
        residual,
        weight,
        bias,
        eps as f32,
        y,
        sum,
        mean,
        rstd,
        rows,
        by.columns,
        by.wide,
        wide(Scalar::F32, columns, &parameters),
        by.keep,
    ];
    gpu.launch("norm", name, by.launch, args)
}

/// The gradient of [`layer_norm`] with respect to s.
///
/// # Errors
/// As [`layer_norm`].
///
/// # Panics
/// As [`layer_norm`].
pub fn layer_norm_backward_input(
    gpu: &Gpu,
    s: Slice<'_>,
    weight: Option<Slice<'_>>,
    mean: Slice<'_>,
    rstd: Slice<'_>,
    dy: Slice<'_>,
    dx: SliceMut<'_>,
    columns: usize,
) -> Result<()> {
    let (rows, scalar) = (rstd.count(), s.scalar());
    check!("layer_norm_backward_input", s, rows * columns, scalar);
    check_some!("layer_norm_backward_input", weight, columns, Scalar::F32);
    check!("layer_norm_backward_input", mean, rows, Scalar::F32);
    check!("layer_norm_backward_input", rstd, rows, Scalar::F32);
    check!("layer_norm_backward_input", dy, rows * columns, scalar);
    check!("layer_norm_backward_input", dx, rows * columns, scalar);
    if holds(columns) {
        let read = Read {
            s: Some(s),
            weight,
            mean: Some(mean),
            rstd: Some(rstd),
            dy,
        };
        let written = Written {
            ds: Some(dx),
            ..Written::default()
        };
        let none = SliceMut::empty(Scalar::F32);
        return norm_held::backward(gpu, read, written, [rows, columns], none);
    }
    let name = by_type!("layer_norm_backward", scalar)?;
    let addresses = [s.address(), dy.address(), dx.address()];
    let by = Rows::new(gpu, scalar, [rows, columns], 2, &addresses);
    let args = args![
        s,
        weight,
        mean,
        rstd,
        dy,
        dx,
        rows,
        by.columns,
        by.wide,
        wide(Scalar::F32, columns, &[address(&weight)]),
        by.keep,
    ];
    gpu.launch("norm", name, by.launch, args)
}

/// `s = x + residual`, `y = s / √(mean(s²) + eps) · (weight + offset)`, row by row; `sum` receives s.
///
/// # Errors
/// As [`layer_norm`].
///
/// # Panics
/// As [`layer_norm`].
pub fn rms_norm(
    gpu: &Gpu,
    x: Slice<'_>,
    residual: Option<Slice<'_>>,
    weight: Slice<'_>,
    offset: f64,
    eps: f64,
    y: SliceMut<'_>,
    sum: Option<SliceMut<'_>>,
    rstd: SliceMut<'_>,
    columns: usize,
) -> Result<()> {
    let (rows, scalar) = (rstd.count(), x.scalar());
    check!("rms_norm", x, rows * columns, scalar);
    check_some!("rms_norm", residual, rows * columns, scalar);
    check!("rms_norm", weight, columns, Scalar::F32);
    check!("rms_norm", y, rows * columns, scalar);
    check_some!("rms_norm", sum, rows * columns, scalar);
    check!("rms_norm", rstd, rows, Scalar::F32);
    let name = by_type!("rms_norm", scalar)?;
    let addresses = [
        x.address(),
        address(&residual),
        y.address(),
        address_mut(&sum),
    ];
    let by = Rows::new(gpu, scalar, [rows, columns], 1, &addresses);
    let args = args![
        x,
        residual,
        weight,
        offset as f32,
        eps as f32,
        y,
        sum,
        rstd,
        rows,
        by.columns,
        by.wide,
        wide(Scalar::F32, columns, &[weight.address()]),
        by.keep,
    ];
    gpu.launch("norm", name, by.launch, args)
}

/// The gradient of [`rms_norm`] with respect to s.
///
/// # Errors
/// As [`layer_norm`].
///
/// # Panics
/// As [`layer_norm`].
pub fn rms_norm_backward_input(
    gpu: &Gpu,
    s: Slice<'_>,
    weight: Slice<'_>,
    offset: f64,
    rstd: Slice<'_>,
    dy: Slice<'_>,
    dx: SliceMut<'_>,
    columns: usize,
) -> Result<()> {
    let (rows, scalar) = (rstd.count(), s.scalar());
    check!("rms_norm_backward_input", s, rows * columns, scalar);
    check!("rms_norm_backward_input", weight, columns, Scalar::F32);
    check!("rms_norm_backward_input", rstd, rows, Scalar::F32);
    check!("rms_norm_backward_input", dy, rows * columns, scalar);
    check!("rms_norm_backward_input", dx, rows * columns, scalar);
    let name = by_type!("rms_norm_backward", scalar)?;
    let addresses = [s.address(), dy.address(), dx.address()];
    let by = Rows::new(gpu, scalar, [rows, columns], 2, &addresses);
    let args = args![
        s,
        weight,
        offset as f32,
        rstd,
        dy,
        dx,
        rows,
        by.columns,
        by.wide,
        wide(Scalar::F32, columns, &[weight.address()]),
        by.keep,
    ];
    gpu.launch("norm", name, by.launch, args)
}

/// Threads of a block of the partial sums, along the columns and along the rows.
const PARTIAL: [u32; 2] = [32, 8];
/// Blocks of the partial sums that are wanted, so that the largest devices are full.
const PARTIAL_BLOCKS: usize = 1024;
/// Rows of a part, at least.
const PARTIAL_ROWS: usize = 32;

/// Into how many parts rows are cut, and how many rows a part has: by sizes alone, so that sums have
/// one order on every device.
fn parts(rows: usize, columns: usize, scalar: Scalar) -> (usize, usize) {
    let tiles = columns.div_ceil(PARTIAL[0] as usize * group(scalar)).max(1);
    let wanted = PARTIAL_BLOCKS.div_ceil(tiles);
    let each = rows.div_ceil(wanted).max(PARTIAL_ROWS);
    (rows.div_ceil(each).max(1), each)
}

/// f32 elements of workspace for [`layer_norm_backward_params`] and [`rms_norm_backward_params`].
pub fn norm_backward_workspace(rows: usize, columns: usize, scalar: Scalar) -> usize {
    let parts = match parts(rows, columns, scalar).0 {
        1 => 0,
        parts => 2 * parts * columns,
    };
    match holds(columns) {
        true => parts.max(norm_held::workspace(rows, columns)),
        false => parts,
    }
}

/// The gradients of a norm's parameters, in two steps: parts of the rows, and then their sums.
fn params(
    gpu: &Gpu,
    s: Slice<'_>,
    mean: Option<Slice<'_>>,
    rstd: Slice<'_>,
    dy: Slice<'_>,
    dweight: Option<SliceMut<'_>>,
    dbias: Option<SliceMut<'_>>,
    columns: usize,
    workspace: SliceMut<'_>,
) -> Result<()> {
    let (rows, scalar) = (rstd.count(), s.scalar());
    check!("norm_backward_params", s, rows * columns, scalar);
    check_some!("norm_backward_params", mean, rows, Scalar::F32);
    check!("norm_backward_params", rstd, rows, Scalar::F32);
    check!("norm_backward_params", dy, rows * columns, scalar);
    check_some!("norm_backward_params", dweight, columns, Scalar::F32);
    check_some!("norm_backward_params", dbias, columns, Scalar::F32);
    if columns == 0 || (dweight.is_none() && dbias.is_none()) {
        return Ok(());
    }
    let need = norm_backward_workspace(rows, columns, scalar);
    assert!(
        workspace.count() >= need && workspace.scalar() == Scalar::F32,
        "norm_backward_params: workspace of {} x {}, {need} x f32 needed",
        workspace.count(),
        workspace.scalar()
    );
    if holds(columns) && mean.is_some() {
        let read = Read {
            s: Some(s),
            weight: None,
            mean,
            rstd: Some(rstd),
            dy,
        };
        let written = Written {
            dweight,
            dbias,
            ..Written::default()
        };
        return norm_held::backward(gpu, read, written, [rows, columns], workspace);
    }
    let width = i32::try_from(columns).expect("a row has less than 2^31 columns");
    let (parts, each) = parts(rows, columns, scalar);
    let wide = wide(scalar, columns, &[s.address(), dy.address()]);
    let each_thread = if wide { group(scalar) } else { 1 };
    let tiles = columns.div_ceil(PARTIAL[0] as usize * each_thread);
    let launch = Launch {
        grid: [tiles as u32, parts as u32, 1],
        block: [PARTIAL[0], PARTIAL[1], 1],
        shared: 0,
    };
    // [parts, columns] each; without parts, where the results go.
    let partial = |result: &Option<SliceMut<'_>>, number: usize| match result {
        None => 0,
        Some(result) if parts == 1 => result.address(),
        Some(_) => workspace.address() + (4 * number * parts * columns) as u64,
    };
    let (weights, biases) = (partial(&dweight, 0), partial(&dbias, 1));
    match mean {
        Some(mean) => {
            let name = if wide {
                by_type!("layer_norm_partial", scalar)?
            } else {
                by_type!("layer_norm_partial_single", scalar)?
            };
            let args = args![s, mean, rstd, dy, weights, biases, rows, each, width];
            gpu.launch("norm", name, launch, args)?;
        }
        None => {
            let name = if wide {
                by_type!("rms_norm_partial", scalar)?
            } else {
                by_type!("rms_norm_partial_single", scalar)?
            };
            let args = args![s, rstd, dy, weights, rows, each, width];
            gpu.launch("norm", name, launch, args)?;
        }
    }
    if parts == 1 {
        return Ok(());
    }
    norm_held::join(gpu, workspace, [dweight, dbias], parts, width)
}

/// `dweight[c] = Σ dy[r, c]·(s[r, c] - mean[r])·rstd[r]` and `dbias[c] = Σ dy[r, c]`, each if asked
/// for; workspace of [`norm_backward_workspace`].
///
/// # Errors
/// As [`layer_norm`].
///
/// # Panics
/// As [`layer_norm`].
pub fn layer_norm_backward_params(
    gpu: &Gpu,
    s: Slice<'_>,
    mean: Slice<'_>,
    rstd: Slice<'_>,
    dy: Slice<'_>,
    dweight: Option<SliceMut<'_>>,
    dbias: Option<SliceMut<'_>>,
    columns: usize,
    workspace: SliceMut<'_>,
) -> Result<()> {
    let mean = Some(mean);
    params(gpu, s, mean, rstd, dy, dweight, dbias, columns, workspace)
}

/// `dweight[c] = Σ dy[r, c]·s[r, c]·rstd[r]`; workspace of [`norm_backward_workspace`].
///
/// # Errors
/// As [`layer_norm`].
///
/// # Panics
/// As [`layer_norm`].
pub fn rms_norm_backward_params(
    gpu: &Gpu,
    s: Slice<'_>,
    rstd: Slice<'_>,
    dy: Slice<'_>,
    dweight: SliceMut<'_>,
    columns: usize,
    workspace: SliceMut<'_>,
) -> Result<()> {
    let dweight = Some(dweight);
    params(gpu, s, None, rstd, dy, dweight, None, columns, workspace)
}

/// `y = x / max(‖x‖₂, eps)`, row by row. `inv_norm [rows]` is what x was multiplied with, with a
/// minus sign where eps was the larger.
///
/// # Errors
/// As [`layer_norm`].
///
/// # Panics
/// As [`layer_norm`].
pub fn l2_normalize(
    gpu: &Gpu,
    x: Slice<'_>,
    eps: f64,
    y: SliceMut<'_>,
    inv_norm: SliceMut<'_>,
    columns: usize,
) -> Result<()> {
    let (rows, scalar) = (inv_norm.count(), x.scalar());
    check!("l2_normalize", x, rows * columns, scalar);
    check!("l2_normalize", y, rows * columns, scalar);
    check!("l2_normalize", inv_norm, rows, Scalar::F32);
    let name = by_type!("l2", scalar)?;
    let addresses = [x.address(), y.address()];
    let by = Rows::new(gpu, scalar, [rows, columns], 1, &addresses);
    let eps = eps as f32;
    let args = args![x, eps, y, inv_norm, rows, by.columns, by.wide, by.keep];
    gpu.launch("norm", name, by.launch, args)
}

/// The gradient of [`l2_normalize`]'s argument, from its result.
///
/// # Errors
/// As [`layer_norm`].
///
/// # Panics
/// As [`layer_norm`].
pub fn l2_normalize_backward(
    gpu: &Gpu,
    y: Slice<'_>,
    inv_norm: Slice<'_>,
    dy: Slice<'_>,
    dx: SliceMut<'_>,
    columns: usize,
) -> Result<()> {
    let (rows, scalar) = (inv_norm.count(), y.scalar());
    check!("l2_normalize_backward", y, rows * columns, scalar);
    check!("l2_normalize_backward", inv_norm, rows, Scalar::F32);
    check!("l2_normalize_backward", dy, rows * columns, scalar);
    check!("l2_normalize_backward", dx, rows * columns, scalar);
    let name = by_type!("l2_backward", scalar)?;
    let addresses = [y.address(), dy.address(), dx.address()];
    let by = Rows::new(gpu, scalar, [rows, columns], 2, &addresses);
    let args = args![y, inv_norm, dy, dx, rows, by.columns, by.wide, by.keep];
    gpu.launch("norm", name, by.launch, args)
}
