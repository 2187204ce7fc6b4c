//! Register tiles of NEON, which every 64-bit ARM has, and of its products of pairs of bf16, which newer ones have.

mod few;
mod pairs;
mod transpose;

use super::{Job, Kernel};
use crate::element::{Float, Real, same};
use crate::gemm::ahead::Ahead;
use crate::gemm::few::{Columns, ROWS};
use crate::gemm::pack::Pack;
use crate::prefetch::prefetch;
use crate::simd::{Fused, Isa};
use half::{bf16, f16};
use pairs::dot;
use std::arch::aarch64::*;
use std::array::from_fn;
use transpose::transpose;

/// NEON: 12 x 8 `f32` or 12 x 4 `f64`, 24 of 32 registers for sums.
#[derive(Clone, Copy)]
pub(in super::super) struct Neon(());

/// NEON with FEAT_BF16, for operands in bf16: 12 x 8 sums of `f32`, two products a lane.
///
/// The two products of a step are added to each other and then to the sum, each time rounded to odd; denormal operands,
/// products and sums count as 0.
#[derive(Clone, Copy)]
pub(in super::super) struct NeonBf16(());

impl Neon {
    pub fn new() -> Option<Self> {
        Isa::Neon.is_available().then_some(Self(()))
    }
}

impl NeonBf16 {
    pub fn new() -> Option<Self> {
        Isa::NeonBf16.is_available().then_some(Self(()))
    }
}

/// Rows of packed A.
const MR: usize = 12;

/// Writes a tile function and the choice of the variant for a tile's real rows and columns. An element of A is a lane of a
/// register, which a multiply-add takes for all lanes of B: nothing is spread over a register first.
///
/// Fewer rows are separate variants, a register of A less each; fewer columns are one variant of a single register
/// of B.
macro_rules! tile {
    ($name:ident, $choose:ident, $features:literal, $t:ident, $lanes:literal, $splat:ident, $load:ident, $store:ident, $fma:ident,
     $add:ident, [$($lane:literal)*], $($registers:literal)*) => {
        /// # Safety
        /// As [`Kernel::tile`] with rows <= R · $lanes; the processor has the instructions.
        #[inline(never)]
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const V: usize>(
            depth: usize,
            mut a: *const $t,
            mut b: *const $t,
            rows: usize,
            out: *mut $t,
            stride: usize,
            add: bool,
            mut ahead: Ahead,
        ) {
            let mut sums = [[[$splat(0.0); V]; $lanes]; R];
            for l in 0..depth {
                // SAFETY: a and b point to a row of MR and of 2·$lanes elements.
                unsafe {
                    if l % Ahead::STEPS == 0 {
                        prefetch(ahead.at, 1);
                        ahead.at = ahead.at.wrapping_add(ahead.stride);
                    }
                    let y: [_; V] = from_fn(|v| $load(b.add(v * $lanes)));
                    for r in 0..R {
                        let x = $load(a.add(r * $lanes));
                        $(for v in 0..V {
                            sums[r][$lane][v] = $fma::<$lane>(sums[r][$lane][v], y[v], x);
                        })*
                    }
                    a = a.add(MR);
                    b = b.add(2 * $lanes);
                }
            }
            for (i, sums) in sums.as_flattened().iter().enumerate() {
                if i < rows {
                    for v in 0..V {
                        // SAFETY: row i of out has V·$lanes elements.
                        unsafe {
                            let to = out.add(i * stride + v * $lanes);
                            $store(to, if add { $add($load(to), sums[v]) } else { sums[v] });
                        }
                    }
                }
            }
        }

        /// # Safety
        /// As [`Kernel::tile`]; the processor has the instructions.
        #[inline(always)]
        unsafe fn $choose(
            depth: usize,
            a: *const $t,
            b: *const $t,
            (rows, cols): (usize, usize),
            out: *mut $t,
            stride: usize,
            add: bool,
            ahead: Ahead,
        ) {
            // SAFETY: passed on.
            unsafe {
                match (rows.div_ceil($lanes), cols <= $lanes) {
                    $(
                        ($registers, false) => $name::<$registers, 2>(depth, a, b, rows, out, stride, add, ahead),
                        ($registers, true) => $name::<$registers, 1>(depth, a, b, rows, out, stride, add, ahead),
                    )*
                    _ => unreachable!("gemm: a tile of {rows} rows"),
                }
            }
        }
    };
}

tile!(tile_f32, choose_f32, "neon", f32, 4, vdupq_n_f32, vld1q_f32, vst1q_f32, vfmaq_laneq_f32, vaddq_f32,
    [0 1 2 3], 3 1 2);
tile!(tile_f64, choose_f64, "neon", f64, 2, vdupq_n_f64, vld1q_f64, vst1q_f64, vfmaq_laneq_f64, vaddq_f64,
    [0 1], 6 1 2 3 4 5);
tile!(tile_bf16, choose_bf16, "neon,bf16", f32, 4, vdupq_n_f32, vld1q_f32, vst1q_f32, dot, vaddq_f32,
    [0 1 2 3], 3 1 2);

/// Implements [`Kernel`] by the tiles of `tile!`, with further functions at the end.
macro_rules! implement {
    ($name:ident, $features:literal, $f32:ident, $columns:path, $($more:tt)*) => {
        // SAFETY: `new` is the only constructor and asks the processor.
        unsafe impl Kernel for $name {
            const MR: usize = MR;
            const NR_BYTES: usize = 32;
            // As in the portable kernel: nobody has measured where packing begins to pay.
            const FEW: usize = ROWS;
            type Arch = Fused;

            #[inline(always)]
            fn covers(size: usize, cols: usize) -> usize {
                let lanes = Self::NR_BYTES / size / 2;
                if cols <= lanes { lanes } else { 2 * lanes }
            }

            #[inline(always)]
            fn call<J: Job>(self, job: J) {
                #[inline(never)]
                #[target_feature(enable = $features)]
                fn with<J: Job>(job: J) {
                    job.run();
                }
                // SAFETY: self proves the instructions.
                unsafe { with(job) }
            }

            #[inline(always)]
            unsafe fn tile<R: Real>(
                self,
                depth: usize,
                a: *const R,
                b: *const R,
                rows: usize,
                cols: usize,
                out: *mut R,
                stride: usize,
                add: bool,
                ahead: Ahead,
            ) {
                let size = (rows, cols);
                // SAFETY: by the caller; R is the type that is cast to.
                unsafe {
                    if same::<R, f32>() {
                        $f32(depth, a.cast(), b.cast(), size, out.cast(), stride, add, ahead);
                    } else {
                        choose_f64(depth, a.cast(), b.cast(), size, out.cast(), stride, add, ahead);
                    }
                }
            }

            #[inline(always)]
            unsafe fn columns<T: Float>(self, columns: &Columns<T>) {
                // SAFETY: by the caller; self proves the instructions.
                unsafe { $columns(columns) }
            }

            #[inline(always)]
            unsafe fn widen_f16x4(self, src: *const f16, dst: *mut f32) {
                // SAFETY: 8 bytes in, 16 out; self proves the instructions.
                unsafe { vst1q_f32(dst, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(src.cast())))) }
            }

            #[inline(always)]
            unsafe fn narrow_f16x4(self, src: *const f32, dst: *mut f16) {
                // SAFETY: 16 bytes in, 8 out; self proves the instructions.
                unsafe { vst1_u16(dst.cast(), vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(src)))) }
            }

            $($more)*
        }
    };
}

implement! {
    Neon,
    "neon",
    choose_f32,
    few::columns,

    fn streams<T: Float>() -> bool {
        true
    }

    #[inline(always)]
    unsafe fn transpose<T: Float>(
        self,
        src: *const T,
        stride: usize,
        rows: usize,
        depth: usize,
        dst: *mut T::Acc,
        width: usize,
    ) -> bool {
        // SAFETY: by the caller; self proves the instructions.
        unsafe { transpose(src, stride, rows, depth, dst, width) }
    }
}

implement! {
    NeonBf16,
    "neon,bf16",
    choose_bf16,
    pairs::columns,
    const STEP: usize = 2;
    const DEPTH_BYTES: usize = 4 * 384;

    fn streams<T: Float>() -> bool {
        same::<T, f32>() || same::<T, bf16>()
    }

    #[inline(always)]
    unsafe fn pack_pairs<T: Float>(self, block: &Pack<T, Self>) {
        // SAFETY: by the caller; self proves the instructions.
        unsafe { pairs::pack(block) }
    }

    #[inline(always)]
    unsafe fn narrow_bf16x16(self, src: *const f32, dst: *mut bf16) {
        // SAFETY: by the caller; self proves the instructions.
        unsafe { pairs::narrow16(src, dst) }
    }
}
