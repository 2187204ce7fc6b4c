//! Normalisation of rows: LayerNorm, RMSNorm, and division by the Euclidean norm.
//!
//! A row is read from memory once; the passes over it after that find it in the first-level
//! cache. Statistics are kept in `T::Acc`, and so are the parameters and their gradients: beside
//! rows of bf16, weights are f32.

use crate::element::{Float, Real};
use crate::parallel::{block_range, for_each_block, for_each_row_block, rows};
use crate::reduce::{join_partial, partial_blocks};
use crate::simd::{kernel, public};
use crate::sums::{LANES, each_lane, row_dot, total};
pub use layer::{
    Gradients, layer_norm, layer_norm_backward, layer_norm_backward_input,
    layer_norm_backward_input_with, layer_norm_backward_params, layer_norm_backward_params_with,
    layer_norm_backward_with, layer_norm_backward_workspace, layer_norm_dropped,
    layer_norm_dropped_with, layer_norm_with,
};

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

mod layer;

/// s = x + residual, as stored: what is normalised is what the backward pass will read.
#[inline(always)]
fn add_residual<T: Float>(x: &[T], residual: &[T], s: &mut [T]) {
    for ((x, r), s) in x.iter().zip(residual).zip(s) {
        *s = T::narrow(x.widen() + r.widen());
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
            each_lane!([lanes], [s = s, dy = dy, weight = weight], |lane| {
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
