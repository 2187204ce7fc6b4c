//! Normalisation of rows: LayerNorm, RMSNorm, and division by the Euclidean norm.
//!
//! A row is read from memory once; the passes over it after that find it in the first-level
//! cache. Statistics are kept in `T::Acc`, and so are the parameters and their gradients: beside
//! rows of bf16, weights are f32.

use crate::element::{Float, Real};
use crate::parallel::{block_range, for_each_block, for_each_row_block, rows};
use crate::reduce::{join_partial, partial_blocks};
use crate::simd::{Arch, kernel, public};
use crate::sums::{LANES, each_lane, row_dot, row_sum, total};

/// Checks a length against `[rows, cols]`.
macro_rules! check {
    ($what:literal, $slice:ident, $len:expr, $shape:literal) => {
        assert_eq!(
            $slice.len(),
            $len,
            concat!($what, ": ", stringify!($slice), " is not ", $shape)
        );
    };
}

/// The same for a slice that may be absent.
macro_rules! check_some {
    ($what:literal, $slice:ident, $len:expr, $shape:literal) => {
        if let Some($slice) = &$slice {
            check!($what, $slice, $len, $shape);
        }
    };
}

/// s = x + residual, as stored: what is normalised is what the backward pass will read.
#[inline(always)]
fn add_residual<T: Float>(x: &[T], residual: &[T], s: &mut [T]) {
    for ((x, r), s) in x.iter().zip(residual).zip(s) {
        *s = T::narrow(x.widen() + r.widen());
    }
}

/// Mean and variance of a row. The deviations are taken from a first mean; their own mean
/// corrects it, so that rows far from zero keep their variance (T. Chan, G. Golub, R. LeVeque,
/// "Algorithms for computing the sample variance", The American Statistician 37, 1983: the
/// corrected two-pass algorithm). Returns (first mean, correction, variance).
#[inline(always)]
fn moments<A: Arch, T: Float>(s: &[T], inverse: T::Acc) -> (T::Acc, T::Acc, T::Acc) {
    let mean = row_sum(s) * inverse;
    let mut lanes = [T::Acc::ZERO; LANES];
    let mut squares = [T::Acc::ZERO; LANES];
    each_lane!([s = s], |lane| {
        let d = s.widen() - mean;
        lanes[lane] += d;
        squares[lane] = A::fma(d, d, squares[lane]);
    });
    let correction = total(lanes) * inverse;
    let variance = total(squares) * inverse - correction * correction;
    (mean, correction, variance.max(T::Acc::ZERO))
}

/// y = (s - mean)·rstd·weight + bias; s may be y itself, which is then given as None.
#[inline(always)]
fn normalise<A: Arch, T: Float>(
    s: Option<&[T]>,
    (mean, correction, rstd): (T::Acc, T::Acc, T::Acc),
    weight: Option<&[T::Acc]>,
    bias: Option<&[T::Acc]>,
    y: &mut [T],
) {
    // Each combination is its own loop, so that none tests for what is absent.
    macro_rules! run {
        ($i:ident, $source:expr, $normal:ident, $result:expr) => {
            for $i in 0..y.len() {
                let $normal = ($source.widen() - mean - correction) * rstd;
                y[$i] = T::narrow($result);
            }
        };
    }
    macro_rules! sources {
        ($i:ident, $normal:ident, $result:expr) => {
            match s {
                Some(s) => {
                    let s = &s[..y.len()];
                    run!($i, s[$i], $normal, $result)
                }
                None => run!($i, y[$i], $normal, $result),
            }
        };
    }
    match (weight, bias) {
        (Some(weight), Some(bias)) => {
            let (weight, bias) = (&weight[..y.len()], &bias[..y.len()]);
            sources!(i, n, A::fma(n, weight[i].widen(), bias[i].widen()));
        }
        (Some(weight), None) => {
            let weight = &weight[..y.len()];
            sources!(i, n, n * weight[i].widen());
        }
        (None, Some(bias)) => {
            let bias = &bias[..y.len()];
            sources!(i, n, n + bias[i].widen());
        }
        (None, None) => sources!(i, n, n),
    }
}

kernel! {
    fn layer_norm_rows[A: Arch, T: Float](
        isa: Isa, x: &[T], residual: Option<&[T]>, weight: Option<&[T::Acc]>, bias: Option<&[T::Acc]>,
        eps: T::Acc, y: &mut [T], sum: Option<&mut [T]>, mean: &mut [T::Acc],
        rstd: &mut [T::Acc], cols: usize
    ) {
        let inverse = T::Acc::from_f64(1.0 / cols as f64);
        let mut sum = sum;
        for (row, (mean, rstd)) in mean.iter_mut().zip(rstd).enumerate() {
            let range = row * cols..(row + 1) * cols;
            let (x, y) = (&x[range.clone()], &mut y[range.clone()]);
            // Where s = x + residual lies: in x itself, in sum, or for a moment in y.
            let s: Option<&[T]> = match (&mut sum, residual) {
                (Some(sum), Some(residual)) => {
                    let sum = &mut sum[range.clone()];
                    add_residual(x, &residual[range], sum);
                    Some(sum)
                }
                (Some(sum), None) => {
                    sum[range].copy_from_slice(x);
                    Some(x)
                }
                (None, Some(residual)) => {
                    add_residual(x, &residual[range], y);
                    None
                }
                (None, None) => Some(x),
            };
            let (first, correction, variance) = match s {
                Some(s) => moments::<A, T>(s, inverse),
                None => moments::<A, T>(y, inverse),
            };
            *mean = first + correction;
            *rstd = T::Acc::ONE / (variance + eps).sqrt();
            normalise::<A, T>(s, (first, correction, *rstd), weight, bias, y);
        }
    }
}

public! {
    /// `s = x + residual`, `y = (s - mean(s)) / √(var(s) + eps) · weight + bias`, row by row.
    /// J. Ba, J. Kiros, G. Hinton, "Layer Normalization", 2016.
    ///
    /// x, residual, y, sum `[rows, cols]`; weight, bias `[cols]`; mean, rstd `[rows]`, written.
    /// `sum` receives s if given: the backward pass wants it.
    pub fn layer_norm, layer_norm_with[T: Float](
        isa: Isa, x: &[T], residual: Option<&[T]>, weight: Option<&[T::Acc]>, bias: Option<&[T::Acc]>,
        eps: f64, y: &mut [T], sum: Option<&mut [T]>, mean: &mut [T::Acc], rstd: &mut [T::Acc],
        cols: usize
    ) {
        let count = mean.len();
        check!("layer_norm", rstd, count, "[rows]");
        check!("layer_norm", x, count * cols, "[rows, cols]");
        check!("layer_norm", y, count * cols, "[rows, cols]");
        check_some!("layer_norm", residual, count * cols, "[rows, cols]");
        check_some!("layer_norm", sum, count * cols, "[rows, cols]");
        check_some!("layer_norm", weight, cols, "[cols]");
        check_some!("layer_norm", bias, cols, "[cols]");
        let eps = T::Acc::from_f64(eps);
        let slices = (
            rows(x, cols),
            residual.map(|r| rows(r, cols)),
            rows(y, cols),
            sum.map(|s| rows(s, cols)),
            mean,
            rstd,
        );
        for_each_row_block(count, cols, slices, |_, (x, residual, y, sum, mean, rstd)| {
            layer_norm_rows(isa, x, residual, weight, bias, eps, y, sum, mean, rstd, cols);
        });
    }
}

kernel! {
    fn layer_norm_backward_rows[A: Arch, T: Float](
        isa: Isa, s: &[T], weight: Option<&[T::Acc]>, mean: &[T::Acc], rstd: &[T::Acc], dy: &[T],
        dx: &mut [T], cols: usize
    ) {
        let inverse = T::Acc::from_f64(1.0 / cols as f64);
        for (row, (&mean, &rstd)) in mean.iter().zip(rstd).enumerate() {
            let range = row * cols..(row + 1) * cols;
            let (s, dy, dx) = (&s[range.clone()], &dy[range.clone()], &mut dx[range]);
            // g = dy·weight; the gradient of the normalised row
            let mut sums = [T::Acc::ZERO; LANES];
            let mut dots = [T::Acc::ZERO; LANES];
            match weight {
                Some(weight) => {
                    let weight = &weight[..cols];
                    each_lane!([s = s, dy = dy, weight = weight], |lane| {
                        let g = dy.widen() * weight.widen();
                        sums[lane] += g;
                        dots[lane] = A::fma(g, s.widen() - mean, dots[lane]);
                    });
                }
                None => each_lane!([s = s, dy = dy], |lane| {
                    let g = dy.widen();
                    sums[lane] += g;
                    dots[lane] = A::fma(g, s.widen() - mean, dots[lane]);
                }),
            }
            // dx = rstd·(g - mean(g) - n·mean(g·n)) with n = (s - mean)·rstd
            let shift = total(sums) * inverse;
            let slope = total(dots) * inverse * rstd * rstd;
            match weight {
                Some(weight) => {
                    for (((s, dy), weight), dx) in s.iter().zip(dy).zip(weight).zip(dx) {
                        let g = dy.widen() * weight.widen() - shift;
                        *dx = T::narrow(A::fma(mean - s.widen(), slope, g) * rstd);
                    }
                }
                None => {
                    for ((s, dy), dx) in s.iter().zip(dy).zip(dx) {
                        let g = dy.widen() - shift;
                        *dx = T::narrow(A::fma(mean - s.widen(), slope, g) * rstd);
                    }
                }
            }
        }
    }
}

public! {
    /// The gradient of [`layer_norm`] with respect to s (and so to x and to residual).
    ///
    /// s, dy, dx `[rows, cols]`, weight `[cols]`, mean and rstd `[rows]` from the forward pass.
    pub fn layer_norm_backward_input, layer_norm_backward_input_with[T: Float](
        isa: Isa, s: &[T], weight: Option<&[T::Acc]>, mean: &[T::Acc], rstd: &[T::Acc], dy: &[T],
        dx: &mut [T], cols: usize
    ) {
        let count = mean.len();
        check!("layer_norm_backward_input", rstd, count, "[rows]");
        check!("layer_norm_backward_input", s, count * cols, "[rows, cols]");
        check!("layer_norm_backward_input", dy, count * cols, "[rows, cols]");
        check!("layer_norm_backward_input", dx, count * cols, "[rows, cols]");
        check_some!("layer_norm_backward_input", weight, cols, "[cols]");
        let slices = (rows(s, cols), mean, rstd, rows(dy, cols), rows(dx, cols));
        for_each_row_block(count, cols, slices, |_, (s, mean, rstd, dy, dx)| {
            layer_norm_backward_rows(isa, s, weight, mean, rstd, dy, dx, cols);
        });
    }
}

kernel! {
    /// dweight += Σ dy·(s - mean)·rstd and dbias += Σ dy over some rows; either may be empty.
    fn layer_norm_params_rows[A: Arch, T: Float](
        isa: Isa, s: &[T], mean: &[T::Acc], rstd: &[T::Acc], dy: &[T], dweight: &mut [T::Acc],
        dbias: &mut [T::Acc], cols: usize
    ) {
        dweight.fill(T::Acc::ZERO);
        dbias.fill(T::Acc::ZERO);
        for (row, (&mean, &rstd)) in mean.iter().zip(rstd).enumerate() {
            let range = row * cols..(row + 1) * cols;
            let (s, dy) = (&s[range.clone()], &dy[range]);
            if dweight.len() == cols && dbias.len() == cols {
                let sums = dweight.iter_mut().zip(&mut *dbias);
                for (((dweight, dbias), s), dy) in sums.zip(s).zip(dy) {
                    let dy = dy.widen();
                    *dweight = A::fma(dy, (s.widen() - mean) * rstd, *dweight);
                    *dbias += dy;
                }
            } else if dweight.len() == cols {
                for ((dweight, s), dy) in dweight.iter_mut().zip(s).zip(dy) {
                    *dweight = A::fma(dy.widen(), (s.widen() - mean) * rstd, *dweight);
                }
            } else {
                for (dbias, dy) in dbias.iter_mut().zip(dy) {
                    *dbias += dy.widen();
                }
            }
        }
    }
}

/// Elements of workspace for [`layer_norm_backward_params`].
pub fn layer_norm_backward_workspace(rows: usize, cols: usize) -> usize {
    2 * partial_blocks(rows) * cols
}

public! {
    /// `dweight[c] = Σ dy[r, c]·(s[r, c] - mean[r])·rstd[r]` and `dbias[c] = Σ dy[r, c]`, each if
    /// asked for and overwriting what was there.
    ///
    /// s, dy `[rows, cols]`; mean, rstd `[rows]`; workspace of [`layer_norm_backward_workspace`].
    pub fn layer_norm_backward_params, layer_norm_backward_params_with[T: Float](
        isa: Isa, s: &[T], mean: &[T::Acc], rstd: &[T::Acc], dy: &[T], dweight: Option<&mut [T::Acc]>,
        dbias: Option<&mut [T::Acc]>, cols: usize, workspace: &mut [T::Acc]
    ) {
        let count = mean.len();
        check!("layer_norm_backward_params", rstd, count, "[rows]");
        check!("layer_norm_backward_params", s, count * cols, "[rows, cols]");
        check!("layer_norm_backward_params", dy, count * cols, "[rows, cols]");
        check_some!("layer_norm_backward_params", dweight, cols, "[cols]");
        check_some!("layer_norm_backward_params", dbias, cols, "[cols]");
        let blocks = partial_blocks(count);
        let need = layer_norm_backward_workspace(count, cols);
        assert!(
            workspace.len() >= need,
            "layer_norm_backward_params: workspace of {} elements, {need} needed",
            workspace.len()
        );
        if cols == 0 || (dweight.is_none() && dbias.is_none()) {
            return;
        }
        // [blocks, cols] each, of width 0 where it is not asked for
        let width = |asked: bool| if asked { cols } else { 0 };
        let (for_weight, for_bias) = (width(dweight.is_some()), width(dbias.is_some()));
        let (weights, biases) = workspace[..need].split_at_mut(blocks * cols);
        let (weights, biases) =
            (&mut weights[..blocks * for_weight], &mut biases[..blocks * for_bias]);
        let partial = (rows(&mut *weights, for_weight), rows(&mut *biases, for_bias));
        for_each_block(blocks, 1, s.len(), partial, |block, (dweight, dbias)| {
            let r = block_range(count, blocks, block);
            let of = r.start * cols..r.end * cols;
            let (mean, rstd) = (&mean[r.clone()], &rstd[r]);
            let (s, dy) = (&s[of.clone()], &dy[of]);
            layer_norm_params_rows(isa, s, mean, rstd, dy, dweight, dbias, cols);
        });
        if let Some(dweight) = dweight {
            join_partial(isa, weights, cols, dweight, false);
        }
        if let Some(dbias) = dbias {
            join_partial(isa, biases, cols, dbias, false);
        }
    }
}

kernel! {
    fn rms_norm_rows[A: Arch, T: Float](
        isa: Isa, x: &[T], residual: Option<&[T]>, weight: &[T::Acc], offset: T::Acc, eps: T::Acc,
        y: &mut [T], sum: Option<&mut [T]>, rstd: &mut [T::Acc], cols: usize
    ) {
        let inverse = T::Acc::from_f64(1.0 / cols as f64);
        let mut sum = sum;
        for (row, rstd) in rstd.iter_mut().enumerate() {
            let range = row * cols..(row + 1) * cols;
            let (x, y) = (&x[range.clone()], &mut y[range.clone()]);
            match residual {
                Some(residual) => add_residual(x, &residual[range.clone()], y),
                None => y.copy_from_slice(x),
            }
            if let Some(sum) = &mut sum {
                sum[range].copy_from_slice(y);
            }
            let scale = T::Acc::ONE / (row_dot::<A, T>(y, y) * inverse + eps).sqrt();
            *rstd = scale;
            for (weight, y) in weight.iter().zip(y) {
                *y = T::narrow(y.widen() * scale * (weight.widen() + offset));
            }
        }
    }
}

public! {
    /// `s = x + residual`, `y = s / √(mean(s²) + eps) · (weight + offset)`, row by row. B. Zhang,
    /// R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
    ///
    /// x, residual, y, sum `[rows, cols]`; weight `[cols]`; rstd `[rows]`, written. `sum` receives
    /// s if given. `offset` is 1 for checkpoints that store weight - 1 (Gemma), else 0.
    pub fn rms_norm, rms_norm_with[T: Float](
        isa: Isa, x: &[T], residual: Option<&[T]>, weight: &[T::Acc], offset: f64, eps: f64,
        y: &mut [T], sum: Option<&mut [T]>, rstd: &mut [T::Acc], cols: usize
    ) {
        let count = rstd.len();
        check!("rms_norm", x, count * cols, "[rows, cols]");
        check!("rms_norm", y, count * cols, "[rows, cols]");
        check_some!("rms_norm", residual, count * cols, "[rows, cols]");
        check_some!("rms_norm", sum, count * cols, "[rows, cols]");
        check!("rms_norm", weight, cols, "[cols]");
        let (offset, eps) = (T::Acc::from_f64(offset), T::Acc::from_f64(eps));
        let slices = (
            rows(x, cols),
            residual.map(|r| rows(r, cols)),
            rows(y, cols),
            sum.map(|s| rows(s, cols)),
            rstd,
        );
        for_each_row_block(count, cols, slices, |_, (x, residual, y, sum, rstd)| {
            rms_norm_rows(isa, x, residual, weight, offset, eps, y, sum, rstd, cols);
        });
    }
}

kernel! {
    fn rms_norm_backward_rows[A: Arch, T: Float](
        isa: Isa, s: &[T], weight: &[T::Acc], offset: T::Acc, rstd: &[T::Acc], dy: &[T],
        dx: &mut [T], cols: usize
    ) {
        let inverse = T::Acc::from_f64(1.0 / cols as f64);
        let weight = &weight[..cols];
        for (row, &rstd) in rstd.iter().enumerate() {
            let range = row * cols..(row + 1) * cols;
            let (s, dy, dx) = (&s[range.clone()], &dy[range.clone()], &mut dx[range]);
            // dx = rstd·(g - n·mean(g·n)) with g = dy·(weight + offset), n = s·rstd
            let mut lanes = [T::Acc::ZERO; LANES];
            each_lane!([s = s, dy = dy, weight = weight], |lane| {
                let g = dy.widen() * (weight.widen() + offset);
                lanes[lane] = A::fma(g, s.widen(), lanes[lane]);
            });
            let slope = -(total(lanes) * inverse * rstd * rstd);
            for (((s, dy), weight), dx) in s.iter().zip(dy).zip(weight).zip(dx) {
                let g = dy.widen() * (weight.widen() + offset);
                *dx = T::narrow(A::fma(s.widen(), slope, g) * rstd);
            }
        }
    }
}

public! {
    /// The gradient of [`rms_norm`] with respect to s. s, dy, dx `[rows, cols]`, weight `[cols]`,
    /// rstd `[rows]` from the forward pass.
    pub fn rms_norm_backward_input, rms_norm_backward_input_with[T: Float](
        isa: Isa, s: &[T], weight: &[T::Acc], offset: f64, rstd: &[T::Acc], dy: &[T], dx: &mut [T],
        cols: usize
    ) {
        let count = rstd.len();
        check!("rms_norm_backward_input", s, count * cols, "[rows, cols]");
        check!("rms_norm_backward_input", dy, count * cols, "[rows, cols]");
        check!("rms_norm_backward_input", dx, count * cols, "[rows, cols]");
        check!("rms_norm_backward_input", weight, cols, "[cols]");
        let offset = T::Acc::from_f64(offset);
        let slices = (rows(s, cols), rstd, rows(dy, cols), rows(dx, cols));
        for_each_row_block(count, cols, slices, |_, (s, rstd, dy, dx)| {
            rms_norm_backward_rows(isa, s, weight, offset, rstd, dy, dx, cols);
        });
    }
}

kernel! {
    fn rms_norm_params_rows[A: Arch, T: Float](
        isa: Isa, s: &[T], rstd: &[T::Acc], dy: &[T], dweight: &mut [T::Acc], cols: usize
    ) {
        dweight.fill(T::Acc::ZERO);
        for (row, &rstd) in rstd.iter().enumerate() {
            let range = row * cols..(row + 1) * cols;
            for ((dweight, s), dy) in dweight.iter_mut().zip(&s[range.clone()]).zip(&dy[range]) {
                *dweight = A::fma(dy.widen(), s.widen() * rstd, *dweight);
            }
        }
    }
}

/// Elements of workspace for [`rms_norm_backward_params`].
pub fn rms_norm_backward_workspace(rows: usize, cols: usize) -> usize {
    partial_blocks(rows) * cols
}

public! {
    /// `dweight[c] = Σ dy[r, c]·s[r, c]·rstd[r]`, overwriting what was there. s, dy
    /// `[rows, cols]`; rstd `[rows]`; workspace of [`rms_norm_backward_workspace`].
    pub fn rms_norm_backward_params, rms_norm_backward_params_with[T: Float](
        isa: Isa, s: &[T], rstd: &[T::Acc], dy: &[T], dweight: &mut [T::Acc], cols: usize,
        workspace: &mut [T::Acc]
    ) {
        let count = rstd.len();
        check!("rms_norm_backward_params", s, count * cols, "[rows, cols]");
        check!("rms_norm_backward_params", dy, count * cols, "[rows, cols]");
        check!("rms_norm_backward_params", dweight, cols, "[cols]");
        let blocks = partial_blocks(count);
        let need = rms_norm_backward_workspace(count, cols);
        assert!(
            workspace.len() >= need,
            "rms_norm_backward_params: workspace of {} elements, {need} needed",
            workspace.len()
        );
        if cols == 0 {
            return;
        }
        let partial = &mut workspace[..need];
        for_each_block(blocks, 1, s.len(), rows(&mut *partial, cols), |block, dweight| {
            let r = block_range(count, blocks, block);
            let of = r.start * cols..r.end * cols;
            rms_norm_params_rows(isa, &s[of.clone()], &rstd[r], &dy[of], dweight, cols);
        });
        join_partial(isa, partial, cols, dweight, false);
    }
}

kernel! {
    fn l2_rows[A: Arch, T: Float](
        isa: Isa, x: &[T], eps: T::Acc, y: &mut [T], inv_norm: &mut [T::Acc], cols: usize
    ) {
        for (row, inv_norm) in inv_norm.iter_mut().enumerate() {
            let range = row * cols..(row + 1) * cols;
            let (x, y) = (&x[range.clone()], &mut y[range]);
            let norm = row_dot::<A, T>(x, x).sqrt();
            let limited = norm < eps;
            let scale = T::Acc::ONE / if limited { eps } else { norm };
            for (x, y) in x.iter().zip(y) {
                *y = T::narrow(x.widen() * scale);
            }
            *inv_norm = if limited { -scale } else { scale };
        }
    }
}

public! {
    /// `y = x / max(‖x‖₂, eps)`, row by row. x, y `[rows, cols]`.
    ///
    /// inv_norm `[rows]`: what x was multiplied with, for the backward pass; with a minus sign
    /// where eps was the larger, because y then depends on x linearly.
    pub fn l2_normalize, l2_normalize_with[T: Float](
        isa: Isa, x: &[T], eps: f64, y: &mut [T], inv_norm: &mut [T::Acc], cols: usize
    ) {
        let count = inv_norm.len();
        check!("l2_normalize", x, count * cols, "[rows, cols]");
        check!("l2_normalize", y, count * cols, "[rows, cols]");
        let eps = T::Acc::from_f64(eps);
        let slices = (rows(x, cols), rows(y, cols), inv_norm);
        for_each_row_block(count, cols, slices, |_, (x, y, inv_norm)| {
            l2_rows(isa, x, eps, y, inv_norm, cols);
        });
    }
}

kernel! {
    fn l2_backward_rows[A: Arch, T: Float](
        isa: Isa, y: &[T], inv_norm: &[T::Acc], dy: &[T], dx: &mut [T], cols: usize
    ) {
        for (row, &inv_norm) in inv_norm.iter().enumerate() {
            let range = row * cols..(row + 1) * cols;
            let (y, dy, dx) = (&y[range.clone()], &dy[range.clone()], &mut dx[range]);
            let along = if inv_norm < T::Acc::ZERO { T::Acc::ZERO } else { row_dot::<A, T>(y, dy) };
            let scale = inv_norm.abs();
            for ((y, dy), dx) in y.iter().zip(dy).zip(dx) {
                *dx = T::narrow(A::fma(-along, y.widen(), dy.widen()) * scale);
            }
        }
    }
}

public! {
    /// `dx = (dy - y·(y·dy)) / ‖x‖₂`, or `dy / eps` where that was the larger, row by row. y, dy,
    /// dx `[rows, cols]`; inv_norm `[rows]` from [`l2_normalize`].
    pub fn l2_normalize_backward, l2_normalize_backward_with[T: Float](
        isa: Isa, y: &[T], inv_norm: &[T::Acc], dy: &[T], dx: &mut [T], cols: usize
    ) {
        let count = inv_norm.len();
        check!("l2_normalize_backward", y, count * cols, "[rows, cols]");
        check!("l2_normalize_backward", dy, count * cols, "[rows, cols]");
        check!("l2_normalize_backward", dx, count * cols, "[rows, cols]");
        let slices = (rows(y, cols), inv_norm, rows(dy, cols), rows(dx, cols));
        for_each_row_block(count, cols, slices, |_, (y, inv_norm, dy, dx)| {
            l2_backward_rows(isa, y, inv_norm, dy, dx, cols);
        });
    }
}
