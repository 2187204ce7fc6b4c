//! Packing: a block of a matrix, with any strides and any storage, into panels of fixed width in
//! the order in which the tile reads them.
//!
//! A panel is `[depth, width]`. Both operands are seen from their outer side: for A an element is
//! (row, k) and the width is MR, for B it is (column, k) and the width is NR. What lies past the
//! matrix's edge is 0.

use super::tile::{Job, Kernel};
use crate::element::{Float, Real, same};
use crate::prefetch::prefetch;
use half::{bf16, f16};

/// A block to be packed: `len` x `depth` elements, the first at `src`.
#[derive(Clone, Copy)]
pub(super) struct Pack<T: Float, K> {
    pub kernel: K,
    pub src: *const T,
    /// Distance of neighbours across the panel.
    pub stride: usize,
    /// Distance of neighbours in k.
    pub k_stride: usize,
    pub len: usize,
    pub depth: usize,
    /// MR or NR.
    pub width: usize,
    /// Elements are rounded to bf16 on the way.
    pub rounds: bool,
    /// `len / width`, rounded up, panels.
    pub dst: *mut T::Acc,
}

/// Rows that are packed side by side: each panel receives whole cache lines of them, and there are
/// as many streams of reading.
pub(super) const DEEP: usize = 8;

impl<T: Float, K: Kernel> Job for Pack<T, K> {
    #[inline(always)]
    fn run(self) {
        if K::STEP > 1 {
            // SAFETY: as vouched for by the one who made the job.
            unsafe { self.kernel.pack_pairs(&self) };
        } else if self.rounds && !same::<T, bf16>() {
            self.rounded();
        } else {
            // Both widths are constants of the kernel: the body is compiled for each.
            let wide = K::shape(size_of::<T::Acc>()).nr;
            if self.width == K::MR {
                self.panels(K::MR);
            } else {
                assert_eq!(self.width, wide);
                self.panels(wide);
            }
        }
    }
}

impl<T: Float, K: Kernel> Pack<T, K> {
    /// Packs rows `index · step ..` of the block, `step` of them or as many as there are; `step` is
    /// a multiple of the width.
    pub fn part(self, step: usize, index: usize) {
        let first = index * step;
        let steps = self.depth.div_ceil(K::STEP);
        self.kernel.call(Pack {
            src: self.src.wrapping_add(first * self.stride),
            len: step.min(self.len - first),
            dst: self.dst.wrapping_add(first * steps),
            ..self
        });
    }

    /// Wider operands on a processor that multiplies no bf16: what is packed has bf16's digits.
    #[inline(always)]
    fn rounded(self) {
        let Self { stride, width, .. } = self;
        let rounding = |x: T| {
            let x = bf16::narrow(x.widen().to_f64() as f32).widen();
            T::Acc::from_f64(f64::from(x))
        };
        for (p, first) in (0..self.len).step_by(width).enumerate() {
            let len = width.min(self.len - first);
            // SAFETY: the panel's elements lie inside both buffers, as vouched for.
            unsafe {
                let from = self.src.add(first * stride);
                let to = self.dst.add(p * width * self.depth);
                strided(
                    from,
                    stride,
                    self.k_stride,
                    len,
                    self.depth,
                    to,
                    width,
                    rounding,
                );
            }
        }
    }

    #[inline(always)]
    fn panels(self, width: usize) {
        let Self {
            kernel,
            src,
            stride,
            k_stride,
            len,
            depth,
            dst,
            ..
        } = self;
        let whole = len / width;
        let rest = len % width;
        let panel = width * depth;
        // SAFETY: the one who made the job vouches that len x depth elements at these strides are
        // inside the source, and ceil(len / width) panels inside the destination.
        unsafe {
            if stride == 1 {
                for l in (0..depth).step_by(DEEP) {
                    let deep = DEEP.min(depth - l);
                    for p in 0..whole {
                        let from = src.add(l * k_stride + p * width);
                        let to = dst.add(p * panel + l * width);
                        for r in 0..deep {
                            prefetch(from.wrapping_add((DEEP + r) * k_stride), width);
                            widen_row(kernel, from.add(r * k_stride), to.add(r * width), width);
                        }
                    }
                }
            } else {
                for p in 0..whole {
                    let (from, to) = (src.add(p * width * stride), dst.add(p * panel));
                    if k_stride != 1 || !kernel.transpose(from, stride, width, depth, to, width) {
                        strided(from, stride, k_stride, width, depth, to, width, T::widen);
                    }
                }
            }
            if rest > 0 {
                let (from, to) = (src.add(whole * width * stride), dst.add(whole * panel));
                if k_stride != 1 || !kernel.transpose(from, stride, rest, depth, to, width) {
                    strided(from, stride, k_stride, rest, depth, to, width, T::widen);
                }
            }
        }
    }
}

/// Widens `width` neighbours.
///
/// # Safety
/// That many elements are read and written.
#[inline(always)]
unsafe fn widen_row<T: Float, K: Kernel>(kernel: K, src: *const T, dst: *mut T::Acc, width: usize) {
    // SAFETY: by the caller.
    unsafe {
        if same::<T, T::Acc>() {
            std::ptr::copy_nonoverlapping(src.cast::<T::Acc>(), dst, width);
            return;
        }
        let fours = width / 4 * 4;
        for i in fours..width {
            dst.add(i).write((*src.add(i)).widen());
        }
        for i in (0..fours).step_by(4) {
            if same::<T, f16>() {
                kernel.widen_f16x4(src.add(i).cast(), dst.add(i).cast());
            } else {
                let x = src.add(i).cast::<[T; 4]>().read();
                dst.add(i).cast::<[T::Acc; 4]>().write(x.map(T::widen));
            }
        }
    }
}

/// One panel, element by element, in blocks that keep both sides in the first cache level.
///
/// # Safety
/// `len` x `depth` elements are read, `[depth, width]` written; len <= width.
#[inline(always)]
unsafe fn strided<T: Float>(
    src: *const T,
    stride: usize,
    k_stride: usize,
    len: usize,
    depth: usize,
    dst: *mut T::Acc,
    width: usize,
    widen: impl Fn(T) -> T::Acc,
) {
    let mut first = 0;
    while first < depth {
        let last = depth.min(first + 16);
        for i in 0..width {
            for l in first..last {
                // SAFETY: i < len is read, i < width written, l < depth.
                unsafe {
                    let x = if i < len {
                        widen(*src.add(i * stride + l * k_stride))
                    } else {
                        T::Acc::ZERO
                    };
                    dst.add(l * width + i).write(x);
                }
            }
        }
        first = last;
    }
}
