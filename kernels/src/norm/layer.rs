//! Layer norm, with the dropout and the residual sum that come before it.

use super::add_residual;
use crate::dropout::Dropout;
use crate::element::{Float, Real};
use crate::parallel::{CHUNK, block_range, for_each_block, for_each_row_block, in_blocks, rows};
use crate::reduce::{add_rows, join_partial, partial_blocks};
use crate::simd::{Arch, Isa, kernel, public};
use crate::sums::{LANES, each_lane, row_sum, total};

/// Mean and variance of a row. The deviations are taken from a first mean; their own mean
/// corrects it, so that rows far from zero keep their variance (T. Chan, G. Golub, R. LeVeque,
/// "Algorithms for computing the sample variance", The American Statistician 37, 1983: the
/// corrected two-pass algorithm). Returns (first mean, correction, variance).
#[inline(always)]
fn moments<A: Arch, T: Float>(s: &[T], inverse: T::Acc) -> (T::Acc, T::Acc, T::Acc) {
    let mean = row_sum(s) * inverse;
    let mut lanes = [T::Acc::ZERO; LANES];
    let mut squares = [T::Acc::ZERO; LANES];
    each_lane!(LANES, copied; [lanes, squares], [s = s], |lane| {
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
    /// Without x, y holds it.
    fn layer_norm_rows[A: Arch, T: Float](
        isa: Isa, x: Option<&[T]>, residual: Option<&[T]>, weight: Option<&[T::Acc]>,
        bias: Option<&[T::Acc]>, eps: T::Acc, y: &mut [T], sum: Option<&mut [T]>,
        mean: &mut [T::Acc], rstd: &mut [T::Acc], cols: usize
    ) {
        let inverse = T::Acc::from_f64(1.0 / cols as f64);
        let mut sum = sum;
        for (row, (mean, rstd)) in mean.iter_mut().zip(rstd).enumerate() {
            let range = row * cols..(row + 1) * cols;
            let (x, y) = (x.map(|x| &x[range.clone()]), &mut y[range.clone()]);
            let residual = residual.map(|r| &r[range.clone()]);
            // Where s = x + residual lies: in x itself, in sum, or for a moment in y.
            let s: Option<&[T]> = match (&mut sum, residual, x) {
                (Some(sum), residual, x) => {
                    let sum = &mut sum[range];
                    let x = x.unwrap_or(y);
                    match residual {
                        Some(residual) => add_residual(x, residual, sum),
                        None => sum.copy_from_slice(x),
                    }
                    Some(sum)
                }
                (None, Some(residual), Some(x)) => {
                    add_residual(x, residual, y);
                    None
                }
                (None, Some(residual), None) => {
                    for (y, r) in y.iter_mut().zip(residual) {
                        *y = T::narrow(y.widen() + r.widen());
                    }
                    None
                }
                (None, None, x) => x,
            };
            let (first, correction, variance) = moments::<A, T>(s.unwrap_or(y), inverse);
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
        forward(isa, x, None, residual, weight, bias, eps, y, sum, mean, rstd, cols);
    }
}

public! {
    /// [`layer_norm`] of `dropout(x) + residual` in one pass; the same bits as one after the other.
    pub fn layer_norm_dropped, layer_norm_dropped_with[T: Float](
        isa: Isa, x: &[T], dropout: Dropout, residual: Option<&[T]>, weight: Option<&[T::Acc]>,
        bias: Option<&[T::Acc]>, eps: f64, y: &mut [T], sum: Option<&mut [T]>, mean: &mut [T::Acc],
        rstd: &mut [T::Acc], cols: usize
    ) {
        forward(isa, x, Some(dropout), residual, weight, bias, eps, y, sum, mean, rstd, cols);
    }
}

fn forward<T: Float>(
    isa: Isa,
    x: &[T],
    dropout: Option<Dropout>,
    residual: Option<&[T]>,
    weight: Option<&[T::Acc]>,
    bias: Option<&[T::Acc]>,
    eps: f64,
    y: &mut [T],
    sum: Option<&mut [T]>,
    mean: &mut [T::Acc],
    rstd: &mut [T::Acc],
    cols: usize,
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
    for_each_row_block(
        count,
        cols,
        slices,
        |first, (x, residual, y, sum, mean, rstd)| {
            // What is dropped waits in y, which is still close when the rows are normalised.
            let x = match dropout {
                Some(dropout) => {
                    dropout.part(isa, x, y, first * cols);
                    None
                }
                None => Some(x),
            };
            layer_norm_rows(
                isa, x, residual, weight, bias, eps, y, sum, mean, rstd, cols,
            );
        },
    );
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
                    each_lane!([sums, dots], [s = s, dy = dy, weight = weight], |lane| {
                        let g = dy.widen() * weight.widen();
                        sums[lane] += g;
                        dots[lane] = A::fma(g, s.widen() - mean, dots[lane]);
                    });
                }
                None => each_lane!([sums, dots], [s = s, dy = dy], |lane| {
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
        let asked = [dweight.is_some(), dbias.is_some()];
        let [(weights, for_weight), (biases, for_bias)] =
            partial_sums(&mut workspace[..need], blocks, cols, asked);
        let partial = (rows(&mut *weights, for_weight), rows(&mut *biases, for_bias));
        for_each_block(blocks, 1, s.len(), partial, |block, (dweight, dbias)| {
            let r = block_range(count, blocks, block);
            let of = r.start * cols..r.end * cols;
            let (mean, rstd) = (&mean[r.clone()], &rstd[r]);
            let (s, dy) = (&s[of.clone()], &dy[of]);
            dweight.fill(T::Acc::ZERO);
            dbias.fill(T::Acc::ZERO);
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

/// Both parameters' sums of each block in `workspace [2, blocks, cols]`: `[blocks, width]` each, and the width, which is 0
/// for what is not asked for.
fn partial_sums<A>(
    workspace: &mut [A],
    blocks: usize,
    cols: usize,
    asked: [bool; 2],
) -> [(&mut [A], usize); 2] {
    let (weights, biases) = workspace.split_at_mut(blocks * cols);
    let [w, b] = asked.map(|asked| if asked { cols } else { 0 });
    [
        (&mut weights[..blocks * w], w),
        (&mut biases[..blocks * b], b),
    ]
}

/// Which gradients [`layer_norm_backward`] computes: those that are given.
#[derive(Debug)]
pub struct Gradients<'a, T: Float> {
    /// `[rows, cols]`: of s, and so of the residual, and of x if nothing was dropped.
    pub ds: Option<&'a mut [T]>,
    /// `[rows, cols]`: of x before this dropout.
    pub dx: Option<(&'a mut [T], Dropout)>,
    /// `[cols]`
    pub dweight: Option<&'a mut [T::Acc]>,
    /// `[cols]`
    pub dbias: Option<&'a mut [T::Acc]>,
}

public! {
    /// The gradients of [`layer_norm_dropped`] in one pass over s and dy: each has the bits of
    /// [`layer_norm_backward_input`], of dropout over that, of the weight's gradient alone from
    /// [`layer_norm_backward_params`], and of [`sum_rows`](crate::reduce::sum_rows).
    ///
    /// s, dy `[rows, cols]`, weight `[cols]`, mean and rstd `[rows]` from the forward pass;
    /// workspace of [`layer_norm_backward_workspace`].
    pub fn layer_norm_backward, layer_norm_backward_with[T: Float](
        isa: Isa, s: &[T], weight: Option<&[T::Acc]>, mean: &[T::Acc], rstd: &[T::Acc], dy: &[T],
        gradients: Gradients<'_, T>, cols: usize, workspace: &mut [T::Acc]
    ) {
        let count = mean.len();
        let Gradients { ds, dx, dweight, dbias } = gradients;
        let (dx, dropout) = dx.unzip();
        check!("layer_norm_backward", rstd, count, "[rows]");
        check!("layer_norm_backward", s, count * cols, "[rows, cols]");
        check!("layer_norm_backward", dy, count * cols, "[rows, cols]");
        check_some!("layer_norm_backward", ds, count * cols, "[rows, cols]");
        check_some!("layer_norm_backward", dx, count * cols, "[rows, cols]");
        check_some!("layer_norm_backward", weight, cols, "[cols]");
        check_some!("layer_norm_backward", dweight, cols, "[cols]");
        check_some!("layer_norm_backward", dbias, cols, "[cols]");
        let blocks = partial_blocks(count);
        let need = layer_norm_backward_workspace(count, cols);
        assert!(
            workspace.len() >= need,
            "layer_norm_backward: workspace of {} elements, {need} needed",
            workspace.len()
        );
        if cols == 0 {
            return;
        }
        let asked = [dweight.is_some(), dbias.is_some()];
        let [(weights, for_weight), (biases, for_bias)] =
            partial_sums(&mut workspace[..need], blocks, cols, asked);
        let partial = (rows(&mut *weights, for_weight), rows(&mut *biases, for_bias));
        let of_block = (
            ds.map(|ds| in_blocks(ds, cols, count, blocks)),
            dx.map(|dx| in_blocks(dx, cols, count, blocks)),
        );
        // Rows that all passes find in the second cache level; sums of columns go by fours.
        let strip = (CHUNK / cols).next_multiple_of(4).max(4);
        let slices = (of_block, partial);
        for_each_block(blocks, 1, s.len(), slices, |block, ((mut ds, mut dx), (dweight, dbias))| {
            let range = block_range(count, blocks, block);
            dweight.fill(T::Acc::ZERO);
            dbias.fill(T::Acc::ZERO);
            for first in range.clone().step_by(strip) {
                let r = first..range.end.min(first + strip);
                let of = r.start * cols..r.end * cols;
                let inside = of.start - range.start * cols..of.end - range.start * cols;
                let (s, dy) = (&s[of.clone()], &dy[of]);
                let (mean, rstd) = (&mean[r.clone()], &rstd[r]);
                let mut ds = ds.as_mut().map(|ds| &mut ds[inside.clone()]);
                let mut dx = dx.as_mut().map(|dx| &mut dx[inside]);
                if let Some(to) = ds.as_mut().or(dx.as_mut()) {
                    layer_norm_backward_rows(isa, s, weight, mean, rstd, dy, to, cols);
                }
                if let (Some(dx), Some(dropout)) = (dx, dropout) {
                    match ds {
                        Some(ds) => dropout.part(isa, ds, dx, first * cols),
                        None => dropout.part_in_place(isa, dx, first * cols),
                    }
                }
                if for_weight > 0 {
                    layer_norm_params_rows(isa, s, mean, rstd, dy, dweight, &mut [], cols);
                }
                if for_bias > 0 {
                    add_rows::<T>(isa, dy, cols, dbias);
                }
            }
        });
        if let Some(dweight) = dweight {
            join_partial(isa, weights, cols, dweight, false);
        }
        if let Some(dbias) = dbias {
            join_partial(isa, biases, cols, dbias, false);
        }
    }
}
