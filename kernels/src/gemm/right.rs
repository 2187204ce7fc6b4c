//! The right operand of a product: a matrix of numbers, or of codes for them.
//!
//! Codes become numbers where the matrix is packed, a few KiB at a time, so that nowhere is there a whole matrix of them.
//! From there on they are what they would have been as numbers in memory: results have the same bits.

use std::mem::MaybeUninit;

use super::ahead::Source;
use super::few::Columns;
use super::pack::Pack;
use super::rounded::Rounded;
use super::tile::Kernel;
use super::{CodesRef, MatRef};
use crate::element::{Float, Real, same};
use half::bf16;

/// A block of the operand that is to be packed into panels, as [`Pack`] describes it.
#[derive(Clone, Copy)]
pub(super) struct Panels<R, K> {
    pub kernel: K,
    /// Row (in k) and column of its first element.
    pub from: (usize, usize),
    /// Columns.
    pub len: usize,
    /// Rows.
    pub depth: usize,
    pub width: usize,
    pub rounds: bool,
    pub dst: *mut R,
}

/// What [`Columns`] says but for the operand.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub rows: usize,
    pub a: *const f32,
    pub a_stride: usize,
    pub depth: usize,
    pub cols: usize,
    /// Row and column of what is likely to be read next.
    pub then: (usize, usize),
    /// Elements are multiplied as bf16. A kernel of pairs does that in any case.
    pub rounds: bool,
    pub out: *mut f32,
    pub out_stride: usize,
}

/// A right operand.
pub(super) trait Right: Copy + Send + Sync {
    /// What its products are summed in.
    type Acc: Real;
    /// Bytes of an element, as a product of few rows reads it.
    const BYTES: usize;

    /// Rows (k) and columns (n).
    fn size(&self) -> (usize, usize);

    /// Packs columns `index · step ..` of the block, as [`Pack::part`] does. All of it lies in the operand, and there is
    /// room for its panels.
    fn pack<K: Kernel>(&self, panels: Panels<Self::Acc, K>, step: usize, index: usize);

    /// Where it lies, for hints: an address and a number of bytes.
    fn place(&self) -> (usize, usize);

    /// What packing will read of the block, as far as it is worth asking for early.
    fn source<K: Kernel>(&self, panels: Panels<Self::Acc, K>) -> Source;

    /// Whether columns lie along k, and so behind each other if there are no gaps.
    fn along(&self) -> bool;

    /// Whether a product of few rows reads the operand without packing it.
    fn streams<K: Kernel>(&self, rounds: bool) -> bool;

    /// The sums of columns from the second of `from` on, over a block of k from the first on.
    ///
    /// # Safety
    /// As [`Kernel::columns`]; where [`Right::streams`] says so.
    unsafe fn columns<K: Kernel>(&self, kernel: K, from: (usize, usize), sums: Sums);
}

impl<T: Float> MatRef<'_, T> {
    /// A block as packing wants it.
    fn block<K: Kernel>(&self, panels: Panels<T::Acc, K>) -> Pack<T, K> {
        let (l, j) = panels.from;
        // wrapping_add: with k = 0 there may be no element to point to, and none is read.
        let src = self.data.as_ptr();
        Pack {
            kernel: panels.kernel,
            src: src.wrapping_add(self.at(l, j)),
            stride: self.col_stride,
            k_stride: self.row_stride,
            len: panels.len,
            depth: panels.depth,
            width: panels.width,
            rounds: panels.rounds,
            dst: panels.dst,
        }
    }
}

impl<T: Float> Right for MatRef<'_, T> {
    type Acc = T::Acc;
    const BYTES: usize = size_of::<T>();

    fn size(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn pack<K: Kernel>(&self, panels: Panels<T::Acc, K>, step: usize, index: usize) {
        self.block(panels).part(step, index);
    }

    fn source<K: Kernel>(&self, panels: Panels<T::Acc, K>) -> Source {
        Source::of(&self.block(panels))
    }

    fn place(&self) -> (usize, usize) {
        (self.data.as_ptr().addr(), self.span() * size_of::<T>())
    }

    fn along(&self) -> bool {
        self.col_stride != 1
    }

    fn streams<K: Kernel>(&self, rounds: bool) -> bool {
        let lies = self.row_stride == 1 || self.col_stride == 1;
        let rounded = K::STEP > 1 || same::<T, bf16>() || same::<T, f32>();
        lies && K::streams::<T>() && (rounded || !rounds)
    }

    #[inline(always)]
    unsafe fn columns<K: Kernel>(&self, kernel: K, from: (usize, usize), sums: Sums) {
        let strides = (self.row_stride, self.col_stride);
        // SAFETY: by the caller.
        unsafe { columns(kernel, self.data.as_ptr(), strides, from, sums) };
    }
}

/// [`Right::columns`] of numbers of T, the first at `src`.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn columns<T: Float, K: Kernel>(
    kernel: K,
    src: *const T,
    strides: (usize, usize),
    from: (usize, usize),
    sums: Sums,
) {
    // SAFETY: by the caller; an f32 is a Rounded, too.
    unsafe {
        if K::STEP == 1 && sums.rounds && same::<T, f32>() {
            as_stored(kernel, src.cast::<Rounded>(), strides, from, sums);
        } else {
            as_stored(kernel, src, strides, from, sums);
        }
    }
}

/// As [`columns`], of elements that nobody has to round.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn as_stored<T: Float, K: Kernel>(
    kernel: K,
    src: *const T,
    (row_stride, col_stride): (usize, usize),
    (l, j): (usize, usize),
    sums: Sums,
) {
    let (then_l, then_j) = sums.then;
    // SAFETY: by the caller.
    unsafe {
        kernel.columns(&Columns {
            rows: sums.rows,
            a: sums.a,
            a_stride: sums.a_stride,
            b: src.wrapping_add(l * row_stride + j * col_stride),
            row_stride,
            col_stride,
            depth: sums.depth,
            cols: sums.cols,
            then: src.wrapping_add(then_l * row_stride + then_j * col_stride),
            out: sums.out,
            out_stride: sums.out_stride,
        });
    }
}

/// Elements of k of a panel that are numbers at a time: a block of codes, and whole words of two bf16.
const DEEP: usize = 64;
/// Columns of the widest panel.
const WIDE: usize = 32;
/// Columns that are numbers at a time where rows are few.
const STRIP: usize = 16;
/// Distance between them: more than the deepest block of k, and no multiple of the distance at which addresses meet in the
/// same lines of the first cache level.
const PITCH: usize = 768 + 16;

impl CodesRef<'_> {
    /// Writes `count` elements as numbers, side by side in k if `deep`, else across it.
    ///
    /// # Safety
    /// They lie in the matrix; there is room for them.
    #[inline(always)]
    unsafe fn read(&self, l: usize, j: usize, deep: bool, count: usize, out: *mut f32) {
        let first = self.at(l, j);
        let stride = if deep {
            self.row_stride
        } else {
            self.col_stride
        };
        // SAFETY: by the caller; what lies between the first and the last is there if these are.
        unsafe {
            if stride == 1 {
                self.data.read_to(first, out, count);
            } else {
                for i in 0..count {
                    let element = first + i * stride;
                    self.data.read_to(element, out.add(i), 1);
                }
            }
        }
    }
}

impl Right for CodesRef<'_> {
    type Acc = f32;
    const BYTES: usize = size_of::<f32>();

    fn size(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Codes are short, and turning them into numbers takes longer than reading them.
    fn source<K: Kernel>(&self, _: Panels<f32, K>) -> Source {
        Source::NONE
    }

    fn pack<K: Kernel>(&self, panels: Panels<f32, K>, step: usize, index: usize) {
        let Panels {
            kernel,
            from: (l0, j0),
            depth,
            width,
            rounds,
            ..
        } = panels;
        assert!(width <= WIDE, "gemm: a panel of {width} columns");
        let begin = index * step;
        let end = panels.len.min(begin + step);
        let steps = depth.div_ceil(K::STEP);
        let mut numbers = MaybeUninit::<[f32; DEEP * WIDE]>::uninit();
        let numbers = numbers.as_mut_ptr().cast::<f32>();
        let deep = self.row_stride == 1;
        for first in (begin..end).step_by(width) {
            let len = width.min(end - first);
            for l in (0..depth).step_by(DEEP) {
                let rows = DEEP.min(depth - l);
                let (lines, count) = if deep { (len, rows) } else { (rows, len) };
                let pitch = if deep { DEEP } else { width };
                for line in 0..lines {
                    let (row, col) = if deep { (0, line) } else { (line, 0) };
                    // SAFETY: the block lies in the operand; a line is no longer than its room.
                    unsafe {
                        let out = numbers.add(line * pitch);
                        self.read(l0 + l + row, j0 + first + col, deep, count, out);
                    }
                }
                let block = Pack {
                    kernel,
                    src: numbers.cast_const(),
                    stride: if deep { DEEP } else { 1 },
                    k_stride: if deep { 1 } else { width },
                    len,
                    depth: rows,
                    width,
                    rounds,
                    dst: panels.dst.wrapping_add(first * steps + l / K::STEP * width),
                };
                block.part(width, 0);
            }
        }
    }

    fn place(&self) -> (usize, usize) {
        self.data.place()
    }

    fn along(&self) -> bool {
        true
    }

    fn streams<K: Kernel>(&self, _rounds: bool) -> bool {
        self.row_stride == 1
            && K::streams::<f32>()
            && K::shape(size_of::<f32>()).depth * K::STEP <= PITCH
    }

    #[inline(always)]
    unsafe fn columns<K: Kernel>(&self, kernel: K, (l, j): (usize, usize), sums: Sums) {
        let mut numbers = MaybeUninit::<[f32; STRIP * PITCH]>::uninit();
        let numbers = numbers.as_mut_ptr().cast::<f32>();
        for first in (0..sums.cols).step_by(STRIP) {
            let cols = STRIP.min(sums.cols - first);
            // SAFETY: by the caller; a block of k is no deeper than the room for it, and STRIP columns of sums follow each
            // other as they would from one matrix.
            unsafe {
                for c in 0..cols {
                    let out = numbers.add(c * PITCH);
                    self.read(l, j + first + c, true, sums.depth, out);
                }
                let part = Sums {
                    cols,
                    then: (0, 0), // these are in the cache already
                    out: sums.out.add(first),
                    ..sums
                };
                columns(kernel, numbers.cast_const(), (1, PITCH), (0, 0), part);
            }
        }
    }
}
