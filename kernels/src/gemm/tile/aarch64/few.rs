//! Products of few rows by NEON. Where columns lie side by side the portable way is as good; where they lie along k, words
//! of four columns are transposed in registers.

use super::transpose::{load4, loads, transposed};
use crate::element::{Float, same};
use crate::gemm::few::{Columns, ROWS};
use crate::gemm::tile::portable::{self, ALONG};
use half::bf16;
use std::arch::aarch64::*;
use std::array::from_fn;

/// Registers for one number of each column.
const REGISTERS: usize = ALONG / 4;

/// As [`Kernel::columns`](crate::gemm::tile::Kernel::columns).
///
/// # Safety
/// As there.
pub(super) unsafe fn columns<T: Float>(columns: &Columns<T>) {
    // SAFETY: by the caller; every processor has the instructions.
    unsafe {
        if columns.col_stride == 1 || !loads::<T>() {
            return portable::few(columns);
        }
        match columns.rows {
            1 => strips::<T, 1>(columns),
            2 => strips::<T, 2>(columns),
            3 => strips::<T, 3>(columns),
            ROWS => strips::<T, ROWS>(columns),
            rows => unreachable!("gemm: {rows} rows at once"),
        }
    }
}

/// M rows.
///
/// # Safety
/// As [`columns`]; columns lie along k, [`loads`] knows T.
#[target_feature(enable = "neon")]
unsafe fn strips<T: Float, const M: usize>(columns: &Columns<T>) {
    for j in (0..columns.cols).step_by(ALONG) {
        // SAFETY: by the caller.
        unsafe {
            if same::<T, bf16>() {
                pairs::<T, M>(columns, j);
            } else {
                along::<T, M>(columns, j);
            }
        }
    }
}

/// Sums of [`ALONG`] columns and M rows.
type Sums<const M: usize> = [[float32x4_t; REGISTERS]; M];

/// Adds the products of an element of each column and one of each row: lane `$lane` of `$x`.
macro_rules! add {
    ($sums:ident, $x:expr, $lane:literal, $y:expr) => {
        let y: [float32x4_t; REGISTERS] = from_fn($y);
        for i in 0..M {
            for (sum, y) in $sums[i].iter_mut().zip(y) {
                *sum = vfmaq_laneq_f32::<$lane>(*sum, y, $x[i]);
            }
        }
    };
}

/// [`ALONG`] columns from j on, or as many as there are, four elements at a time.
///
/// # Safety
/// As [`strips`].
#[inline(never)]
#[target_feature(enable = "neon")]
unsafe fn along<T: Float, const M: usize>(columns: &Columns<T>, j: usize) {
    let mut sums: Sums<M> = [[vdupq_n_f32(0.0); REGISTERS]; M];
    let count = ALONG.min(columns.cols - j);
    let starts = portable::starts(columns, j, count);
    let whole = columns.depth / 4 * 4;
    for l in (0..whole).step_by(4) {
        portable::ask(columns, (j, count), l);
        // SAFETY: four elements of each column and row from l on.
        unsafe {
            let block: [_; REGISTERS] =
                from_fn(|g| transposed(from_fn(|c| load4(starts[4 * g + c].add(l)))));
            let x: [_; M] = from_fn(|i| vld1q_f32(columns.a.add(i * columns.a_stride + l)));
            add!(sums, x, 0, |g| block[g][0]);
            add!(sums, x, 1, |g| block[g][1]);
            add!(sums, x, 2, |g| block[g][2]);
            add!(sums, x, 3, |g| block[g][3]);
        }
    }
    // SAFETY: by the caller.
    unsafe { finish(columns, j, &starts, whole, sums) }
}

/// As [`along`] for bf16, of which a word of four bytes has two, the first in its lower half.
///
/// # Safety
/// As [`strips`]; T is bf16.
#[inline(never)]
#[target_feature(enable = "neon")]
unsafe fn pairs<T: Float, const M: usize>(columns: &Columns<T>, j: usize) {
    let mut sums: Sums<M> = [[vdupq_n_f32(0.0); REGISTERS]; M];
    let count = ALONG.min(columns.cols - j);
    let starts = portable::starts(columns, j, count);
    let whole = columns.depth / 8 * 8;
    for l in (0..whole).step_by(8) {
        portable::ask(columns, (j, count), l);
        // SAFETY: eight elements of each column and row from l on.
        unsafe {
            let block: [_; REGISTERS] = from_fn(|g| {
                let words = |c: usize| vld1q_u32(starts[4 * g + c].add(l).cast());
                transposed(from_fn(|c| vreinterpretq_f32_u32(words(c))))
                    .map(|x| vreinterpretq_u32_f32(x))
            });
            let first = |word| vreinterpretq_f32_u32(vshlq_n_u32::<16>(word));
            let second = |word| vreinterpretq_f32_u32(vandq_u32(word, vdupq_n_u32(0xffff_0000)));
            let x: [_; M] = from_fn(|i| vld1q_f32(columns.a.add(i * columns.a_stride + l)));
            add!(sums, x, 0, |g| first(block[g][0]));
            add!(sums, x, 1, |g| second(block[g][0]));
            add!(sums, x, 2, |g| first(block[g][1]));
            add!(sums, x, 3, |g| second(block[g][1]));
            let x: [_; M] = from_fn(|i| vld1q_f32(columns.a.add(i * columns.a_stride + l + 4)));
            add!(sums, x, 0, |g| first(block[g][2]));
            add!(sums, x, 1, |g| second(block[g][2]));
            add!(sums, x, 2, |g| first(block[g][3]));
            add!(sums, x, 3, |g| second(block[g][3]));
        }
    }
    // SAFETY: by the caller.
    unsafe { finish(columns, j, &starts, whole, sums) }
}

/// Adds the products of the elements from l on, one by one, and writes the sums.
///
/// # Safety
/// As [`strips`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn finish<T: Float, const M: usize>(
    columns: &Columns<T>,
    j: usize,
    starts: &[*const T; ALONG],
    l: usize,
    mut sums: Sums<M>,
) {
    for l in l..columns.depth {
        // SAFETY: element l of each column and row; what T is widened to is f32.
        unsafe {
            let y = starts.map(|column| (*column.add(l)).widen());
            let y: [_; REGISTERS] = from_fn(|g| vld1q_f32(y.as_ptr().cast::<f32>().add(4 * g)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = *columns.a.add(i * columns.a_stride + l);
                for (sum, y) in sums.iter_mut().zip(y) {
                    *sum = vfmaq_n_f32(*sum, y, x);
                }
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (g, sum) in sums.into_iter().enumerate() {
            // SAFETY: the rows of `out` have room for whole registers.
            unsafe { vst1q_f32(columns.out.add(i * columns.out_stride + j + 4 * g), sum) };
        }
    }
}
