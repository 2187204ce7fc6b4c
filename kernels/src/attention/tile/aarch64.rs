//! Tiles of NEON: 8 x 8 sums of `f32`, 16 of 32 registers.

use super::{ROWS, Set, Tile};
use std::arch::aarch64::*;
use std::array::from_fn;

/// Columns of a tile, in registers and in numbers.
const REGISTERS: usize = 2;
const COLUMNS: usize = 4 * REGISTERS;

type Sums = [[float32x4_t; REGISTERS]; ROWS];

pub(super) const NEON_F32: Set<f32> = Set {
    rows: ROWS,
    wide: COLUMNS,
    narrow: COLUMNS,
    tiles: [[by_rows as Tile<f32>; 2], [by_columns as Tile<f32>; 2]],
};

/// A row of B.
///
/// # Safety
/// It is read.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(b: *const f32) -> [float32x4_t; REGISTERS] {
    // SAFETY: by the caller.
    from_fn(|v| unsafe { vld1q_f32(b.add(4 * v)) })
}

/// Adds the products of a row of B and a lane of each register of `x`, of which every [`ROWS`] / `x.len()` rows share one.
macro_rules! add {
    ($sums:ident[$row:expr], $x:expr, $y:ident, $($lane:literal)*) => {
        $(for v in 0..REGISTERS {
            let sum = &mut $sums[$row + $lane][v];
            *sum = vfmaq_laneq_f32::<$lane>(*sum, $y[v], $x);
        })*
    };
}

/// A lies row by row: four elements of each are a register.
///
/// # Safety
/// The operands hold a tile of [`ROWS`] x [`COLUMNS`], `depth` deep.
#[target_feature(enable = "neon")]
unsafe fn by_rows(
    depth: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    plus: bool,
) {
    let mut sums: Sums = [[vdupq_n_f32(0.0); REGISTERS]; ROWS];
    let whole = depth / 4 * 4;
    for l in (0..whole).step_by(4) {
        // SAFETY: columns l.. l + 4 of A, rows l.. l + 4 of B.
        unsafe {
            let x: [_; ROWS] = from_fn(|i| vld1q_f32(a.add(i * a_stride + l)));
            macro_rules! step {
                ($lane:literal) => {
                    let y = load(b.add((l + $lane) * b_stride));
                    for (x, sums) in x.iter().zip(&mut sums) {
                        for (sum, y) in sums.iter_mut().zip(y) {
                            *sum = vfmaq_laneq_f32::<$lane>(*sum, y, *x);
                        }
                    }
                };
            }
            step!(0);
            step!(1);
            step!(2);
            step!(3);
        }
    }
    for l in whole..depth {
        // SAFETY: column l of A, row l of B.
        unsafe {
            let y = load(b.add(l * b_stride));
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = *a.add(i * a_stride + l);
                for (sum, y) in sums.iter_mut().zip(y) {
                    *sum = vfmaq_n_f32(*sum, y, x);
                }
            }
        }
    }
    // SAFETY: by the caller.
    unsafe { store(&sums, c, c_stride, plus) }
}

/// A lies column by column: four rows of one are a register.
///
/// # Safety
/// As [`by_rows`].
#[target_feature(enable = "neon")]
unsafe fn by_columns(
    depth: usize,
    mut a: *const f32,
    a_stride: usize,
    mut b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    plus: bool,
) {
    let mut sums: Sums = [[vdupq_n_f32(0.0); REGISTERS]; ROWS];
    for _ in 0..depth {
        // SAFETY: a column of A, a row of B.
        unsafe {
            let y = load(b);
            for i in (0..ROWS).step_by(4) {
                let x = vld1q_f32(a.add(i));
                add!(sums[i], x, y, 0 1 2 3);
            }
        }
        a = a.wrapping_add(a_stride);
        b = b.wrapping_add(b_stride);
    }
    // SAFETY: by the caller.
    unsafe { store(&sums, c, c_stride, plus) }
}

/// Writes the sums, or adds them to C.
///
/// # Safety
/// C has [`ROWS`] rows of [`COLUMNS`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn store(sums: &Sums, c: *mut f32, c_stride: usize, plus: bool) {
    for (i, sums) in sums.iter().enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            // SAFETY: by the caller.
            unsafe {
                let to = c.add(i * c_stride + 4 * v);
                vst1q_f32(
                    to,
                    if plus {
                        vaddq_f32(vld1q_f32(to), sum)
                    } else {
                        sum
                    },
                );
            }
        }
    }
}
