//! Register tiles of AVX-512 and of AVX2 with FMA.

mod few;
mod few_avx2;
mod pairs;
mod rows;
mod transpose;

use super::{Job, Kernel};
use crate::avx512::round16;
use crate::element::{Float, Real, same};
use crate::gemm::ahead::Ahead;
use crate::gemm::few::Columns;
use crate::gemm::pack::Pack;
use crate::simd::{Fused, Isa};
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::mem::transmute;
use transpose::{transpose, transposed};

/// AVX-512 F: 12 x 32 `f32` or 12 x 16 `f64`, 24 of 32 registers for sums.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512(());

/// AVX2, FMA and F16C: 6 x 16 `f32` or 6 x 8 `f64`, 12 of 16 registers for sums.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2(());

/// AVX-512 with AVX512_BF16, for operands in bf16: 12 x 32 sums of `f32`, two products a lane.
///
/// The two products of a step and the sum are added in an order and with roundings of the
/// processor's own; denormal operands, products and sums count as 0.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512Bf16(());

impl Avx512Bf16 {
    pub fn new() -> Option<Self> {
        Isa::Avx512Bf16.is_available().then_some(Self(()))
    }
}

impl Avx512 {
    pub fn new() -> Option<Self> {
        Isa::Avx512.is_available().then_some(Self(()))
    }
}

impl Avx2 {
    pub fn new() -> Option<Self> {
        Isa::Avx2.is_available().then_some(Self(()))
    }
}

/// Writes a tile function and the choice of the variant for a tile's real rows and columns.
///
/// Fewer rows are separate variants, so that short tiles cost what they hold; fewer columns are
/// one variant of a single register per row.
macro_rules! tile {
    ($name:ident, $choose:ident, $features:literal, $t:ident, $lanes:literal, $mr:literal,
     $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident, $add:ident, $($rows:literal)*) => {
        /// # Safety
        /// As [`Kernel::tile`] with rows = M; the processor has the instructions.
        #[target_feature(enable = $features)]
        unsafe fn $name<const M: usize, const V: usize>(
            depth: usize,
            mut a: *const $t,
            mut b: *const $t,
            out: *mut $t,
            stride: usize,
            add: bool,
            mut ahead: Ahead,
        ) {
            let mut sums = [[$zero(); V]; M];
            for l in 0..depth {
                // SAFETY: a and b point to a row of $mr and of 2·$lanes elements.
                unsafe {
                    if l % Ahead::STEPS == 0 {
                        _mm_prefetch::<_MM_HINT_T1>(ahead.at);
                        ahead.at = ahead.at.wrapping_add(ahead.stride);
                    }
                    for v in 0..V {
                        _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add((16 + v) * $lanes).cast());
                    }
                    let mut y = [$zero(); V];
                    for v in 0..V {
                        y[v] = $load(b.add(v * $lanes));
                    }
                    for i in 0..M {
                        let x = $splat(*a.add(i));
                        for v in 0..V {
                            sums[i][v] = $fma(x, y[v], sums[i][v]);
                        }
                    }
                    a = a.add($mr);
                    b = b.add(2 * $lanes);
                }
            }
            for i in 0..M {
                for v in 0..V {
                    // SAFETY: row i of out has V·$lanes elements.
                    unsafe {
                        let to = out.add(i * stride + v * $lanes);
                        let sum = if add { $add($load(to), sums[i][v]) } else { sums[i][v] };
                        $store(to, sum);
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
            rows: usize,
            cols: usize,
            out: *mut $t,
            stride: usize,
            add: bool,
            ahead: Ahead,
        ) {
            // SAFETY: passed on.
            unsafe {
                match (rows, cols <= $lanes) {
                    $(
                        ($rows, false) => $name::<$rows, 2>(depth, a, b, out, stride, add, ahead),
                        ($rows, true) => $name::<$rows, 1>(depth, a, b, out, stride, add, ahead),
                    )*
                    _ => unreachable!("gemm: a tile of {rows} rows"),
                }
            }
        }
    };
}

tile!(avx512_f32, choose_avx512_f32, "avx512f", f32, 16, 12,
    _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps,
    12 1 2 3 4 5 6 7 8 9 10 11);
tile!(avx512_f64, choose_avx512_f64, "avx512f", f64, 8, 12,
    _mm512_setzero_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_set1_pd, _mm512_fmadd_pd, _mm512_add_pd,
    12 1 2 3 4 5 6 7 8 9 10 11);
tile!(avx2_f32, choose_avx2_f32, "avx2,fma", f32, 8, 6,
    _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps,
    6 1 2 3 4 5);
tile!(avx2_f64, choose_avx2_f64, "avx2,fma", f64, 4, 6,
    _mm256_setzero_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_set1_pd, _mm256_fmadd_pd, _mm256_add_pd,
    6 1 2 3 4 5);

/// `sum + x·y` of the two bf16 in each lane of x and y.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_pairs(x: __m512, y: __m512, sum: __m512) -> __m512 {
    // SAFETY: registers of the same size, any bits of which are bf16.
    let (x, y) = unsafe {
        (
            transmute::<__m512, __m512bh>(x),
            transmute::<__m512, __m512bh>(y),
        )
    };
    _mm512_dpbf16_ps(sum, x, y)
}

tile!(avx512_bf16, choose_avx512_bf16, "avx512f,avx512bf16", f32, 16, 12,
    _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, dot_pairs, _mm512_add_ps,
    12 1 2 3 4 5 6 7 8 9 10 11);

/// Implements [`Kernel`] by the tiles of `tile!`, with further functions at the end.
macro_rules! implement {
    ($name:ident, $features:literal, $mr:literal, $bytes:literal, $f32:ident, $f64:ident, $($more:tt)*) => {
        // SAFETY: `new` is the only constructor and asks the processor.
        unsafe impl Kernel for $name {
            const MR: usize = $mr;
            const NR_BYTES: usize = $bytes;
            type Arch = Fused;

            #[inline(always)]
            fn covers(size: usize, cols: usize) -> usize {
                let lanes = Self::NR_BYTES / size / 2;
                if cols <= lanes { lanes } else { 2 * lanes }
            }

            #[inline(always)]
            fn call<J: Job>(self, job: J) {
                #[target_feature(enable = $features)]
                #[inline(never)]
                fn with<J: Job>(job: J) {
                    job.run();
                }
                // SAFETY: self exists, so the processor has the instructions.
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
                // SAFETY: by the caller; R is the type that is cast to.
                unsafe {
                    let (a, b) = (a.cast(), b.cast());
                    if same::<R, f32>() {
                        $f32(depth, a, b, rows, cols, out.cast(), stride, add, ahead);
                    } else {
                        let (a, b) = (a.cast(), b.cast());
                        $f64(depth, a, b, rows, cols, out.cast(), stride, add, ahead);
                    }
                }
            }

            #[inline(always)]
            unsafe fn widen_f16x4(self, src: *const f16, dst: *mut f32) {
                // SAFETY: by the caller; self proves the instructions.
                unsafe { widen_f16x4(src, dst) }
            }

            #[inline(always)]
            unsafe fn narrow_f16x4(self, src: *const f32, dst: *mut f16) {
                // SAFETY: by the caller; self proves the instructions.
                unsafe { narrow_f16x4(src, dst) }
            }

            $($more)*
        }
    };
}

/// What kernels of AVX-512 have beside tiles of packed operands, for `f32` as the computing type.
macro_rules! rows_and_columns {
    ($rows:path, $columns:path) => {
        const ROWS: bool = true;

        #[inline(always)]
        unsafe fn tile_rows<R: Real>(
            self,
            steps: usize,
            a: *const R,
            a_stride: usize,
            b: *const R,
            size: (usize, usize),
            out: *mut R,
            stride: usize,
            add: bool,
            ahead: Ahead,
        ) {
            // SAFETY: by the caller; R is f32.
            unsafe {
                $rows(
                    steps,
                    a.cast(),
                    a_stride,
                    b.cast(),
                    size,
                    out.cast(),
                    stride,
                    add,
                    ahead,
                )
            }
        }

        #[inline(always)]
        unsafe fn columns<T: Float>(self, columns: &Columns<T>) {
            // SAFETY: by the caller; self proves the instructions.
            unsafe { $columns(columns) }
        }
    };
}

implement! {
    Avx2,
    "avx2,fma,f16c",
    6,
    64,
    choose_avx2_f32,
    choose_avx2_f64,

    fn streams<T: Float>() -> bool {
        same::<T::Acc, f32>()
    }

    #[inline(always)]
    unsafe fn columns<T: Float>(self, columns: &Columns<T>) {
        // SAFETY: by the caller; self proves the instructions.
        unsafe { few_avx2::columns(columns) }
    }
}

implement! {
    Avx512,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c",
    12,
    128,
    choose_avx512_f32,
    choose_avx512_f64,
    rows_and_columns!(rows::choose_f32, few::columns_f32);

    fn streams<T: Float>() -> bool {
        same::<T::Acc, f32>()
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
        if !same::<T::Acc, f32>() {
            return false;
        }
        // SAFETY: by the caller; self proves the instructions.
        unsafe { transpose(src, stride, rows, depth, dst.cast(), width) };
        true
    }
}

implement! {
    Avx512Bf16,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c",
    12,
    128,
    choose_avx512_bf16,
    choose_avx512_f64,
    const STEP: usize = 2;
    const DEPTH_BYTES: usize = 4 * 384;
    rows_and_columns!(rows::choose_bf16, few::columns_pairs);

    fn streams<T: Float>() -> bool {
        same::<T, f32>() || same::<T, bf16>()
    }

    #[inline(always)]
    unsafe fn pack_pairs<T: Float>(self, block: &Pack<T, Self>) {
        // SAFETY: by the caller; self proves the instructions.
        unsafe {
            if block.width == Self::MR {
                pairs::pack::<T, { Self::MR }>(block.into());
            } else {
                assert_eq!(block.width, 32, "gemm: a panel is as wide as a tile");
                pairs::pack::<T, 32>(block.into());
            }
        }
    }

    #[inline(always)]
    unsafe fn narrow_bf16x16(self, src: *const f32, dst: *mut bf16) {
        // SAFETY: by the caller; self proves the instructions.
        unsafe { narrow_bf16x16(src, dst) }
    }
}

/// To nearest, ties to even, as everywhere else: the processor's own instruction for it takes denormal
/// numbers for 0.
///
/// # Safety
/// 16 elements are read and written; the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn narrow_bf16x16(src: *const f32, dst: *mut bf16) {
    // SAFETY: 64 bytes in, 32 out.
    unsafe {
        let rounded = _mm512_castps_si512(round16(_mm512_loadu_ps(src)));
        let words = _mm512_srli_epi32::<16>(rounded);
        _mm256_storeu_si256(dst.cast(), _mm512_cvtepi32_epi16(words));
    }
}

/// # Safety
/// 4 elements are read and written; the processor has the instructions.
#[target_feature(enable = "f16c")]
unsafe fn widen_f16x4(src: *const f16, dst: *mut f32) {
    // SAFETY: 8 bytes in, 16 out.
    unsafe { _mm_storeu_ps(dst, _mm_cvtph_ps(_mm_loadl_epi64(src.cast()))) }
}

/// # Safety
/// 4 elements are read and written; the processor has the instructions.
#[target_feature(enable = "f16c")]
unsafe fn narrow_f16x4(src: *const f32, dst: *mut f16) {
    // SAFETY: 16 bytes in, 8 out.
    unsafe {
        let short = _mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_loadu_ps(src));
        _mm_storel_epi64(dst.cast(), short);
    }
}
