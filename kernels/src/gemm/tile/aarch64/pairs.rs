//! Products of pairs of bf16 (FEAT_BF16): packing into panels `[depth / 2, width, 2]`, the two elements of a lane being
//! neighbours in k, and products of few rows. A word is such a pair, its lower half the first.
//!
//! Rust has no stable names for these instructions yet.

use super::transpose::transposed;
use crate::element::{Float, Real, same};
use crate::gemm::few::{Columns, ROWS};
use crate::gemm::pack::{DEEP, Pack};
use crate::gemm::tile::Kernel;
use crate::gemm::tile::portable::{self, ALONG};
use crate::prefetch::prefetch;
use half::bf16;
use std::arch::aarch64::*;
use std::arch::asm;
use std::array::from_fn;

/// `sum + x·y`, where y is the pair in lane LANE of a register, and x the one in each lane of its own.
///
/// The two products of a step and the sum are added with roundings of the processor's own; denormal operands, products
/// and sums count as 0.
#[inline]
#[target_feature(enable = "neon,bf16")]
pub(super) fn dot<const LANE: i32>(
    sum: float32x4_t,
    x: float32x4_t,
    y: float32x4_t,
) -> float32x4_t {
    let mut sum = sum;
    // SAFETY: registers in, registers out.
    unsafe {
        asm!(
            "bfdot {sum:v}.4s, {x:v}.8h, {y:v}.2h[{lane}]",
            sum = inout(vreg) sum,
            x = in(vreg) x,
            y = in(vreg) y,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Eight numbers as bf16, in order: to nearest, ties to even.
#[inline]
#[target_feature(enable = "neon,bf16")]
pub(super) fn narrow(low: float32x4_t, high: float32x4_t) -> uint16x8_t {
    let mut short: uint16x8_t;
    // SAFETY: registers in, registers out.
    unsafe {
        asm!(
            "bfcvtn {short:v}.4h, {low:v}.4s",
            "bfcvtn2 {short:v}.8h, {high:v}.4s",
            short = out(vreg) short,
            low = in(vreg) low,
            high = in(vreg) high,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    short
}

/// Rounds 16 numbers.
///
/// # Safety
/// They are read and written.
#[inline]
#[target_feature(enable = "neon,bf16")]
pub(super) unsafe fn narrow16(src: *const f32, dst: *mut bf16) {
    for i in [0, 8] {
        // SAFETY: 32 bytes in, 16 out, twice.
        unsafe {
            let short = narrow(vld1q_f32(src.add(i)), vld1q_f32(src.add(i + 4)));
            vst1q_u16(dst.add(i).cast(), short);
        }
    }
}

/// Whether [`load8`] knows T.
#[inline(always)]
fn loads<T: Float>() -> bool {
    same::<T, f32>() || same::<T, bf16>()
}

/// Eight neighbours as bf16.
///
/// # Safety
/// They are read; [`loads`] knows T.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn load8<T: Float>(src: *const T) -> uint16x8_t {
    // SAFETY: by the caller.
    unsafe {
        if same::<T, bf16>() {
            vld1q_u16(src.cast())
        } else {
            let src: *const f32 = src.cast();
            narrow(vld1q_f32(src), vld1q_f32(src.add(4)))
        }
    }
}

/// Four neighbours as bf16, in the lower half; in the upper half four of another row.
///
/// # Safety
/// As [`load8`].
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn load4x2<T: Float>(low: *const T, high: *const T) -> uint16x8_t {
    // SAFETY: by the caller.
    unsafe {
        if same::<T, bf16>() {
            vcombine_u16(vld1_u16(low.cast()), vld1_u16(high.cast()))
        } else {
            narrow(vld1q_f32(low.cast()), vld1q_f32(high.cast()))
        }
    }
}

/// A word in all lanes.
///
/// # Safety
/// It is read.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn splat(word: *const f32) -> float32x4_t {
    // SAFETY: by the caller; any bits are a word.
    vreinterpretq_f32_u32(vdupq_n_u32(unsafe { *word.cast::<u32>() }))
}

/// A word of two elements, `k_stride` apart, or of one and 0.
///
/// # Safety
/// They are read.
#[inline(always)]
unsafe fn word<T: Float>(src: *const T, k_stride: usize, two: bool) -> u32 {
    let round = |x: T| match same::<T, bf16>() {
        // SAFETY: T is bf16.
        true => unsafe { *(&raw const x).cast::<u16>() },
        false => bf16::narrow(Real::to_f64(x.widen()) as f32).to_bits(),
    };
    // SAFETY: by the caller.
    unsafe {
        let low = u32::from(round(*src));
        let high = if two { round(*src.add(k_stride)) } else { 0 };
        low | u32::from(high) << 16
    }
}

/// Words of eight elements of four rows, transposed: register n has word n of each. Rows from `have` on are zeros.
///
/// # Safety
/// Eight elements are read from each row that there is; [`loads`] knows T.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn square<T: Float>(rows: &[*const T; 4], have: usize) -> [float32x4_t; 4] {
    // No closures: one that goes to a function of the standard library would not be inlined with these instructions.
    let mut r = [vdupq_n_f32(0.0); 4];
    for n in 0..4 {
        if n < have {
            // SAFETY: by the caller.
            r[n] = vreinterpretq_f32_u16(unsafe { load8(rows[n]) });
        }
    }
    transposed(r)
}

/// Packs a block into panels of its width, a multiple of 4.
///
/// # Safety
/// The block's elements lie inside its buffers; the processor has the instructions.
#[target_feature(enable = "neon,bf16")]
pub(super) unsafe fn pack<T: Float, K: Kernel>(block: &Pack<T, K>) {
    let words = block.depth.div_ceil(2);
    let whole = match block.k_stride {
        1 if loads::<T>() => block.depth / 8 * 4,
        _ => 0,
    };
    // SAFETY: by the caller.
    unsafe {
        if block.stride == 1 && loads::<T>() {
            interleave(block, words);
            return;
        }
        for first in (0..block.len).step_by(block.width) {
            let panel = block.dst.cast::<u32>().add(first * words);
            let rows = block.width.min(block.len - first);
            let row = |i: usize| block.src.wrapping_add((first + i) * block.stride);
            for w in (0..whole).step_by(4) {
                for i in (0..block.width).step_by(4) {
                    let mut from = [block.src; 4];
                    for n in 0..4 {
                        from[n] = row(i + n).wrapping_add(2 * w);
                    }
                    for (n, x) in square(&from, rows.saturating_sub(i))
                        .into_iter()
                        .enumerate()
                    {
                        vst1q_f32(panel.add((w + n) * block.width + i).cast(), x);
                    }
                }
            }
            for w in whole..words {
                let two = 2 * w + 1 < block.depth;
                for i in 0..block.width {
                    let x = match i < rows {
                        true => word(row(i).add(2 * w * block.k_stride), block.k_stride, two),
                        false => 0,
                    };
                    panel.add(w * block.width + i).write(x);
                }
            }
        }
    }
}

/// Rows of k are contiguous across the panel: two of them make a row of words.
///
/// # Safety
/// As [`pack`]; [`loads`] knows T.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn interleave<T: Float, K: Kernel>(block: &Pack<T, K>, words: usize) {
    let Pack {
        k_stride, width, ..
    } = *block;
    for w in (0..words).step_by(DEEP) {
        let last = words.min(w + DEEP);
        for first in (0..block.len).step_by(width) {
            let have = width.min(block.len - first);
            for w in w..last {
                let two = 2 * w + 1 < block.depth;
                // SAFETY: `have` elements of rows 2w and, if it is there, 2w + 1; row w of the panel.
                unsafe {
                    let from = block.src.add(2 * w * k_stride + first);
                    let ahead = from.wrapping_add(2 * DEEP * k_stride);
                    prefetch(ahead, width);
                    prefetch(ahead.wrapping_add(k_stride), width);
                    let to = block.dst.cast::<u32>().add(first * words + w * width);
                    let whole = if two { have / 4 * 4 } else { 0 };
                    for i in (0..whole).step_by(4) {
                        vst1q_u32(to.add(i), zipped(from.add(i), k_stride));
                    }
                    for i in whole..width {
                        let x = if i < have {
                            word(from.add(i), k_stride, two)
                        } else {
                            0
                        };
                        to.add(i).write(x);
                    }
                }
            }
        }
    }
}

/// Words of four neighbours and of those `k_stride` further.
///
/// # Safety
/// They are read; [`loads`] knows T.
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn zipped<T: Float>(from: *const T, k_stride: usize) -> uint32x4_t {
    // SAFETY: by the caller.
    let both = unsafe { load4x2(from, from.add(k_stride)) };
    vreinterpretq_u32_u16(vzip1q_u16(both, vextq_u16::<4>(both, both)))
}

/// Sums of REGISTERS · 4 columns and M rows.
type Sums<const M: usize, const REGISTERS: usize> = [[float32x4_t; REGISTERS]; M];

/// As [`Kernel::columns`], with rows of A in words.
///
/// # Safety
/// As there; T is f32 or bf16, the processor has the instructions.
#[target_feature(enable = "neon,bf16")]
pub(super) unsafe fn columns<T: Float>(columns: &Columns<T>) {
    // SAFETY: passed on.
    unsafe {
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
/// As [`columns`].
#[inline]
#[target_feature(enable = "neon,bf16")]
unsafe fn strips<T: Float, const M: usize>(columns: &Columns<T>) {
    let cols = columns.cols;
    // SAFETY: at most as many columns from j on as are left, at most as many words.
    unsafe {
        if columns.col_stride != 1 {
            for j in (0..cols).step_by(ALONG) {
                along::<T, M>(columns, j);
            }
            return;
        }
        let words = columns.depth.div_ceil(2);
        let ahead = portable::ahead(columns);
        for first in (0..words.max(1)).step_by(DEEP) {
            let deep = DEEP.min(words - first);
            let mut j = 0;
            while cols - j >= 16 {
                across::<T, M>(columns, (first, j), deep, ahead);
                j += 16;
            }
            if j < cols {
                rest::<T, M>(columns, (first, j), deep);
            }
        }
    }
}

/// Adds `deep` words from word `first` on to the sums of 16 columns side by side. What lies `ahead` elements further is
/// asked for.
///
/// # Safety
/// As [`columns`].
#[inline(never)]
#[target_feature(enable = "neon,bf16")]
unsafe fn across<T: Float, const M: usize>(
    columns: &Columns<T>,
    (first, j): (usize, usize),
    deep: usize,
    ahead: usize,
) {
    let mut sums: Sums<M, 4> = [[vdupq_n_f32(0.0); 4]; M];
    // SAFETY: rows of `out` have room for whole strips; they were written by the words before. Rows 2w and 2w + 1 of B,
    // if it is there, have 16 columns from j on.
    unsafe {
        let out = |i: usize, v: usize| columns.out.add(i * columns.out_stride + j + 4 * v);
        if first > 0 {
            for i in 0..M {
                for v in 0..4 {
                    sums[i][v] = vld1q_f32(out(i, v));
                }
            }
        }
        for w in first..first + deep {
            let row = columns.b.add(2 * w * columns.row_stride + j);
            prefetch(row.wrapping_add(ahead), 16);
            prefetch(row.wrapping_add(ahead + columns.row_stride), 16);
            let mut y = [vdupq_n_f32(0.0); 4];
            if 2 * w + 1 < columns.depth {
                for v in 0..4 {
                    y[v] = vreinterpretq_f32_u32(zipped(row.add(4 * v), columns.row_stride));
                }
            } else {
                let words: [u32; 16] = from_fn(|c| word(row.add(c), 0, false));
                for v in 0..4 {
                    y[v] = vld1q_f32(words.as_ptr().add(4 * v).cast());
                }
            }
            for i in 0..M {
                let x = splat(columns.a.add(i * columns.a_stride + w));
                for v in 0..4 {
                    sums[i][v] = dot::<0>(sums[i][v], y[v], x);
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                vst1q_f32(out(i, v), sum);
            }
        }
    }
}

/// As [`across`], for fewer than 16 columns from j on.
///
/// # Safety
/// As [`columns`].
#[inline(never)]
#[target_feature(enable = "neon,bf16")]
unsafe fn rest<T: Float, const M: usize>(
    columns: &Columns<T>,
    (first, j): (usize, usize),
    deep: usize,
) {
    for j in j..columns.cols {
        for i in 0..M {
            // SAFETY: as in `across`, for one column.
            unsafe {
                let out = columns.out.add(i * columns.out_stride + j);
                let mut sum = vdupq_n_f32(if first > 0 { *out } else { 0.0 });
                for w in first..first + deep {
                    let two = 2 * w + 1 < columns.depth;
                    let y = word(
                        columns.b.add(2 * w * columns.row_stride + j),
                        columns.row_stride,
                        two,
                    );
                    let y = vreinterpretq_f32_u32(vdupq_n_u32(y));
                    sum = dot::<0>(sum, y, splat(columns.a.add(i * columns.a_stride + w)));
                }
                out.write(vgetq_lane_f32::<0>(sum));
            }
        }
    }
}

/// [`ALONG`] columns along k from j on, or as many as there are, four words of each at a time.
///
/// # Safety
/// As [`columns`].
#[inline(never)]
#[target_feature(enable = "neon,bf16")]
unsafe fn along<T: Float, const M: usize>(columns: &Columns<T>, j: usize) {
    const REGISTERS: usize = ALONG / 4;
    let mut sums: Sums<M, REGISTERS> = [[vdupq_n_f32(0.0); REGISTERS]; M];
    let count = ALONG.min(columns.cols - j);
    let starts = portable::starts(columns, j, count);
    let whole = columns.depth / 8 * 4;
    for w in (0..whole).step_by(4) {
        portable::ask(columns, (j, count), 2 * w);
        // SAFETY: four words of each column and row from w on.
        unsafe {
            let mut block = [[vdupq_n_f32(0.0); 4]; REGISTERS];
            for g in 0..REGISTERS {
                let mut from = [columns.b; 4];
                for c in 0..4 {
                    from[c] = starts[4 * g + c].add(2 * w);
                }
                block[g] = square(&from, 4);
            }
            for i in 0..M {
                let x = vld1q_f32(columns.a.add(i * columns.a_stride + w));
                for g in 0..REGISTERS {
                    sums[i][g] = dot::<0>(sums[i][g], block[g][0], x);
                    sums[i][g] = dot::<1>(sums[i][g], block[g][1], x);
                    sums[i][g] = dot::<2>(sums[i][g], block[g][2], x);
                    sums[i][g] = dot::<3>(sums[i][g], block[g][3], x);
                }
            }
        }
    }
    for w in whole..columns.depth.div_ceil(2) {
        // SAFETY: word w of each column and row.
        unsafe {
            let two = 2 * w + 1 < columns.depth;
            let words = starts.map(|column| word(column.add(2 * w), 1, two));
            for i in 0..M {
                let x = splat(columns.a.add(i * columns.a_stride + w));
                for g in 0..REGISTERS {
                    let y = vreinterpretq_f32_u32(vld1q_u32(words.as_ptr().add(4 * g)));
                    sums[i][g] = dot::<0>(sums[i][g], y, x);
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
