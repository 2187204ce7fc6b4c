//! The innermost product: a few rows of packed A times a few columns of packed B, summed in
//! registers.

use super::Operands;
use super::ahead::Ahead;
use super::few::{self, Columns};
use super::pack::Pack;
use crate::element::{Float, Real};
use crate::simd::{self, Isa};
use half::{bf16, f16};

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "aarch64")]
pub(super) use aarch64::{Neon, NeonBf16};
pub(super) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512, Avx512Bf16};

/// The tiles that were chosen for a product.
pub(super) enum Choice {
    Portable(Portable),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    #[cfg(target_arch = "aarch64")]
    NeonBf16(NeonBf16),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
}

/// The tiles of an instruction set for these operands; portable ones where it is missing.
pub(super) fn choose(isa: Isa, operands: Operands) -> Choice {
    let choice = match isa {
        #[cfg(target_arch = "aarch64")]
        Isa::NeonBf16 if operands == Operands::Bf16 => NeonBf16::new().map(Choice::NeonBf16),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonBf16 => Neon::new().map(Choice::Neon),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 if operands == Operands::Bf16 => Avx512Bf16::new().map(Choice::Avx512Bf16),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => Avx512::new().map(Choice::Avx512),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => Avx2::new().map(Choice::Avx2),
        _ => None,
    };
    let _ = operands;
    choice.unwrap_or(Choice::Portable(Portable))
}

/// Rows and columns of a register tile, and how deep it goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub mr: usize,
    pub nr: usize,
    /// Steps of a block of k at most.
    pub depth: usize,
}

/// Room for the largest register tile, in elements.
pub(super) const TILE: usize = 12 * 32;

/// Something to run with an instruction set enabled. `run` must be `#[inline(always)]`.
pub(super) trait Job {
    fn run(self);
}

/// One instruction set. R is `f32` or `f64` throughout.
///
/// # Safety
/// A value of the type may exist only on a processor that has the instructions.
pub(super) unsafe trait Kernel: Copy + Send + Sync {
    /// Rows of a tile; a panel of packed A is `[kb, MR]`.
    const MR: usize;
    /// Bound on a block of k, in bytes of one row of packed A. A panel of B (kb · NR · 4 = 48 KiB at
    /// 384) then streams through the first cache level while 12 rows of A (18 KiB) stay in it, and
    /// a task's rows of A (192 · 384 · 4 = 288 KiB) leave room in the second level of any current
    /// processor. Sums pass through memory once per block: 1 load and 1 store for 384 steps.
    const DEPTH_BYTES: usize = 4 * 512;
    /// Elements of k that one step of a tile multiplies. Packed, a step is as large as one R: two
    /// bf16 share an `f32`'s place.
    const STEP: usize = 1;
    /// Its arithmetic, for what is done to a tile before it is written.
    type Arch: simd::Arch;
    /// Bytes in a row of a tile; a panel of packed B is `[kb, NR_BYTES / size_of::<R>()]`.
    const NR_BYTES: usize;

    /// Sizes of a tile of numbers of `size` bytes.
    fn shape(size: usize) -> Shape {
        Shape {
            mr: Self::MR,
            nr: Self::NR_BYTES / size,
            depth: Self::DEPTH_BYTES / size,
        }
    }

    /// How many of a row's elements [`Kernel::tile`] writes, at least `cols`.
    fn covers(size: usize, _cols: usize) -> usize {
        Self::NR_BYTES / size
    }

    /// Runs the job compiled with these instructions, as a function of its own.
    fn call<J: Job>(self, job: J);

    /// `out[i, j] = Σ a[l, i]·b[l, j]` over steps l in order, or `+=` if `add`, for i < rows and at least
    /// j < cols. On the way, `ahead` is asked for.
    ///
    /// # Safety
    /// a: `depth` rows of MR elements, b: `depth` rows of NR, out: `rows` rows, `stride` apart, of
    /// NR elements, or of [`Kernel::covers`] of cols. 1 <= rows <= MR, 1 <= cols <= NR.
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
    );

    /// Whether [`Kernel::tile_rows`] is there, for f32 as the computing type: steps are read from A
    /// itself, where they lie side by side.
    const ROWS: bool = false;

    /// As [`Kernel::tile`] with A as it is stored: step l of row i at `a[i · a_stride + l]`, which
    /// need not be aligned.
    ///
    /// # Safety
    /// a: `rows` rows of `steps`, `a_stride` apart; the rest as in [`Kernel::tile`].
    unsafe fn tile_rows<R: Real>(
        self,
        _steps: usize,
        _a: *const R,
        _a_stride: usize,
        _b: *const R,
        _size: (usize, usize),
        _out: *mut R,
        _stride: usize,
        _add: bool,
        _ahead: Ahead,
    ) {
        unreachable!("gemm: a kernel without tiles of rows")
    }

    /// Products of more rows are packed; at most [`few::FEW`].
    const FEW: usize = few::FEW;

    /// Whether [`Kernel::columns`] is there for a B of T.
    fn streams<T: Float>() -> bool;

    /// Sums of columns of a product of few rows, from B where it lies, in the order of
    /// [`Kernel::tile`].
    ///
    /// # Safety
    /// As [`Columns`] says, with all of it inside the buffers.
    unsafe fn columns<T: Float>(self, columns: &Columns<T>);

    /// Rounds a block to bf16 and packs it into panels of pairs, `[depth / 2, width, 2]`; for a
    /// kernel whose STEP is 2.
    ///
    /// # Safety
    /// As [`Pack`]'s.
    unsafe fn pack_pairs<T: Float>(self, _: &Pack<T, Self>)
    where
        Self: Sized,
    {
        unreachable!("gemm: a kernel of steps of {} has no pairs", Self::STEP)
    }

    /// Widens `depth` elements from each of `rows` rows (`stride` apart) and writes them
    /// transposed: `dst[l · width + i] = src[i · stride + l]`. Returns false if it has no fast
    /// way for these types.
    ///
    /// # Safety
    /// All that is addressed so must be inside the buffers; rows <= width.
    #[inline(always)]
    unsafe fn transpose<T: Float>(
        self,
        _src: *const T,
        _stride: usize,
        _rows: usize,
        _depth: usize,
        _dst: *mut T::Acc,
        _width: usize,
    ) -> bool {
        false
    }

    /// Widens 4 half-precision numbers.
    ///
    /// # Safety
    /// 4 elements are read and written.
    #[inline(always)]
    unsafe fn widen_f16x4(self, src: *const f16, dst: *mut f32) {
        for i in 0..4 {
            // SAFETY: by the caller.
            unsafe { dst.add(i).write((*src.add(i)).to_f32()) };
        }
    }

    /// Rounds 16 numbers to bf16.
    ///
    /// # Safety
    /// 16 elements are read and written.
    #[inline(always)]
    unsafe fn narrow_bf16x16(self, src: *const f32, dst: *mut bf16) {
        // SAFETY: by the caller.
        unsafe {
            let x = src.cast::<[f32; 16]>().read();
            dst.cast::<[bf16; 16]>().write(x.map(bf16::narrow));
        }
    }

    /// Rounds 4 numbers to half precision.
    ///
    /// # Safety
    /// 4 elements are read and written.
    #[inline(always)]
    unsafe fn narrow_f16x4(self, src: *const f32, dst: *mut f16) {
        for i in 0..4 {
            // SAFETY: by the caller.
            unsafe { dst.add(i).write(f16::from_f32(*src.add(i))) };
        }
    }
}
