//! One task of the grid: the tiles of a rectangle of C over one block of k, and what happens to
//! their sums on the way to memory.

use super::ahead::{Ahead, Later};
use super::tile::{Job, Kernel, TILE};
use crate::activation::{Activation, apply_all};
use crate::element::{Float, Real, same};
use crate::prefetch::prefetch;
use half::{bf16, f16};
use std::marker::PhantomData;
use std::mem::MaybeUninit;

/// What the tasks of one block of k share.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a, T: Float, K> {
    pub kernel: K,
    /// Packed panels of the block's rows and columns, `steps` deep.
    pub a: *const T::Acc,
    pub b: *const T::Acc,
    /// If not 0, A is not packed: `a` is its first row, and the next ones follow at this distance.
    pub a_stride: usize,
    pub steps: usize,
    /// The block in C and, if not null, in the activations' inputs; rows `ldc` apart.
    pub c: *mut T,
    pub pre: *mut T,
    pub ldc: usize,
    /// The block's sums between blocks of k, rows `ldp` apart. C itself if that is wide enough.
    pub partial: *mut T::Acc,
    pub ldp: usize,
    /// This is the first, the last block of k.
    pub first: bool,
    pub last: bool,
    pub accumulate: bool,
    /// For the block's columns.
    pub bias: Option<&'a [T::Acc]>,
    pub activation: Option<Activation>,
}

/// Rows `rows.0..rows.1` and columns `cols.0..cols.1` of the block. The beginnings are multiples
/// of the tile's sizes.
#[derive(Clone, Copy)]
pub(super) struct Task<'a, T: Float, K> {
    pub pass: &'a Pass<'a, T, K>,
    pub rows: (usize, usize),
    pub cols: (usize, usize),
    pub later: Later,
}

impl<T: Float, K: Kernel> Job for Task<'_, T, K> {
    #[inline(always)]
    fn run(self) {
        let Self {
            pass,
            rows,
            cols,
            later,
        } = self;
        let shape = K::shape(size_of::<T::Acc>());
        let mut sums = MaybeUninit::<Aligned<T::Acc>>::uninit();
        let sums = sums.as_mut_ptr().cast::<T::Acc>();
        // Sums of whole tiles that need nothing else go from registers to where they belong.
        let bare = pass.bias.is_none() && pass.activation.is_none() && pass.pre.is_null();
        let wide = same::<T, T::Acc>();
        let direct = !pass.last || (wide && bare);
        let add = !pass.first || (pass.accumulate && wide);
        // Whole tiles that only have to be rounded, perhaps after a bias, take a short way, too.
        let plain = !wide && !pass.accumulate && pass.activation.is_none() && pass.pre.is_null();
        let mut tiles = 0;
        for j in (cols.0..cols.1).step_by(shape.nr) {
            let width = shape.nr.min(cols.1 - j);
            for i in (rows.0..rows.1).step_by(shape.mr) {
                let height = shape.mr.min(rows.1 - i);
                let size = (height, width);
                let ahead = later.of_tile(tiles, pass.steps, pass.b);
                tiles += 1;
                // SAFETY: the maker of the pass vouches for its pointers; panel i / MR begins at
                // i · steps and panel j / NR at j · steps; a tile fits into TILE elements; this
                // task alone touches its rectangle of C.
                unsafe {
                    // The sums take long enough for what they are added to to arrive.
                    for r in i..i + height {
                        if pass.first && pass.last {
                            prefetch(pass.c.add(r * pass.ldc + j), width);
                            if !pass.pre.is_null() {
                                prefetch(pass.pre.add(r * pass.ldc + j), width);
                            }
                        } else {
                            prefetch(pass.partial.add(r * pass.ldp + j), width);
                        }
                    }
                    let whole = K::covers(size_of::<T::Acc>(), width) == width;
                    if direct && whole {
                        let to = pass.partial.add(i * pass.ldp + j);
                        multiply(pass, (i, j), size, to, pass.ldp, add, ahead);
                        continue;
                    }
                    if plain && pass.last && width == shape.nr {
                        // Where there are sums already, they are completed where they are.
                        let (to, stride) = if pass.first {
                            (sums, shape.nr)
                        } else {
                            (pass.partial.add(i * pass.ldp + j), pass.ldp)
                        };
                        multiply(pass, (i, j), size, to, stride, add, ahead);
                        for r in 0..height {
                            let row = to.add(r * stride);
                            round_row(pass, row, shape.nr, i + r, j);
                        }
                        continue;
                    }
                    multiply(pass, (i, j), size, sums, shape.nr, false, ahead);
                    finish(pass, sums, shape.nr, size, (i, j));
                }
            }
        }
    }
}

/// The tile of `height` x `width` at (i, j).
///
/// # Safety
/// As [`Kernel::tile`].
#[inline(always)]
unsafe fn multiply<T: Float, K: Kernel>(
    pass: &Pass<T, K>,
    (i, j): (usize, usize),
    (height, width): (usize, usize),
    to: *mut T::Acc,
    stride: usize,
    add: bool,
    ahead: Ahead,
) {
    // SAFETY: by the caller.
    unsafe {
        let b = pass.b.add(j * pass.steps);
        if K::ROWS && pass.a_stride > 0 {
            let a = pass.a.add(i * pass.a_stride);
            let size = (height, width);
            pass.kernel.tile_rows(
                pass.steps,
                a,
                pass.a_stride,
                b,
                size,
                to,
                stride,
                add,
                ahead,
            );
        } else {
            let a = pass.a.add(i * pass.steps);
            pass.kernel
                .tile(pass.steps, a, b, height, width, to, stride, add, ahead);
        }
    }
}

#[repr(align(64))]
struct Aligned<R>(#[allow(dead_code)] [R; TILE]);

/// Adds the bias to `width` whole sums of columns j.. of row i and rounds them into C.
///
/// # Safety
/// As [`finish`]; the sums may be overwritten.
#[inline(always)]
unsafe fn round_row<T: Float, K: Kernel>(
    pass: &Pass<T, K>,
    sums: *mut T::Acc,
    width: usize,
    i: usize,
    j: usize,
) {
    // SAFETY: by the caller.
    unsafe {
        let sums = std::slice::from_raw_parts_mut(sums, width);
        if let Some(bias) = pass.bias {
            let bias = bias.as_ptr().add(j);
            for (l, x) in sums.iter_mut().enumerate() {
                *x += *bias.add(l);
            }
        }
        let c = std::slice::from_raw_parts_mut(pass.c.add(i * pass.ldc + j), width);
        narrow(pass.kernel, sums, c);
    }
}

/// An activation over sums, as a job of its own: among the tile's other loops, the compiler runs out of
/// registers for its constants.
struct Activate<'a, R, K> {
    kind: Activation,
    sums: &'a mut [R],
    kernel: PhantomData<K>,
}

impl<R: Real, K: Kernel> Job for Activate<'_, R, K> {
    #[inline(always)]
    fn run(self) {
        apply_all::<K::Arch, R>(self.kind, self.sums);
    }
}

/// Takes the sums of a tile of `height` x `width` at (i, j), rows `stride` apart, to where they belong.
///
/// # Safety
/// The pass's pointers hold for that tile, and nobody else uses them.
#[inline(always)]
unsafe fn finish<T: Float, K: Kernel>(
    pass: &Pass<T, K>,
    sums: *mut T::Acc,
    stride: usize,
    (height, width): (usize, usize),
    (i, j): (usize, usize),
) {
    let wide = same::<T, T::Acc>();
    // Where T is wide enough, C holds the partial sums, so what it held before comes first; otherwise
    // it is still there at the end.
    let old = !pass.first || (pass.accumulate && wide);
    // SAFETY: by the caller; no two of the slices that live at a time are the same row.
    unsafe {
        for r in 0..height {
            let row = std::slice::from_raw_parts_mut(sums.add(r * stride), width);
            let partial = pass.partial.add((i + r) * pass.ldp + j);
            if old {
                let old = std::slice::from_raw_parts(partial, width);
                for (x, &y) in row.iter_mut().zip(old) {
                    *x += y;
                }
            }
            if pass.last {
                argument(pass, row, i + r, j);
            } else {
                std::slice::from_raw_parts_mut(partial, width).copy_from_slice(row);
            }
        }
        if !pass.last {
            return;
        }
        // A whole tile at once: of a few numbers, each would wait for its polynomials.
        if let Some(kind) = pass.activation {
            let (rows, len) = match width == stride {
                true => (1, height * stride),
                false => (height, width),
            };
            for r in 0..rows {
                let sums = std::slice::from_raw_parts_mut(sums.add(r * stride), len);
                pass.kernel.call(Activate::<T::Acc, K> {
                    kind,
                    sums,
                    kernel: PhantomData,
                });
            }
        }
        for r in 0..height {
            let row = std::slice::from_raw_parts(sums.add(r * stride), width);
            let c = std::slice::from_raw_parts_mut(pass.c.add((i + r) * pass.ldc + j), width);
            narrow(pass.kernel, row, c);
        }
    }
}

/// Takes the whole sums of columns j.. of row i to C, with all that happens on the way.
///
/// # Safety
/// As [`finish`].
#[inline(always)]
pub(super) unsafe fn complete<T: Float, K: Kernel>(
    pass: &Pass<T, K>,
    sums: &mut [T::Acc],
    i: usize,
    j: usize,
) {
    let width = sums.len();
    // SAFETY: by the caller.
    unsafe {
        argument(pass, sums, i, j);
        if let Some(kind) = pass.activation {
            apply_all::<K::Arch, T::Acc>(kind, sums);
        }
        let c = std::slice::from_raw_parts_mut(pass.c.add(i * pass.ldc + j), width);
        narrow(pass.kernel, sums, c);
    }
}

/// Makes of whole sums of columns j.. of row i what the activation is applied to, and stores that if
/// it is asked for.
///
/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn argument<T: Float, K: Kernel>(
    pass: &Pass<T, K>,
    sums: &mut [T::Acc],
    i: usize,
    j: usize,
) {
    let width = sums.len();
    let wide = same::<T, T::Acc>();
    // SAFETY: by the caller.
    unsafe {
        let c = std::slice::from_raw_parts_mut(pass.c.add(i * pass.ldc + j), width);
        if pass.accumulate && !wide {
            for (x, &y) in sums.iter_mut().zip(&*c) {
                *x += y.widen();
            }
        }
        if let Some(bias) = pass.bias {
            for (x, &y) in sums.iter_mut().zip(&bias[j..j + width]) {
                *x += y;
            }
        }
        if !pass.pre.is_null() {
            let pre = std::slice::from_raw_parts_mut(pass.pre.add(i * pass.ldc + j), width);
            narrow(pass.kernel, sums, pre);
        }
        if pass.activation.is_some() && !wide {
            // Of what is stored as its argument, whether that is asked for or not: c can be made
            // again from it.
            narrow(pass.kernel, sums, c);
            for (x, y) in sums.iter_mut().zip(&*c) {
                *x = y.widen();
            }
        }
    }
}

/// Rounds a row to storage.
#[inline(always)]
pub(super) fn narrow<T: Float, K: Kernel>(kernel: K, sums: &[T::Acc], out: &mut [T]) {
    assert_eq!(sums.len(), out.len());
    let mut done = 0;
    if same::<T, f16>() {
        while done + 4 <= sums.len() {
            // SAFETY: T is f16, T::Acc therefore f32; 4 elements from `done` are in both.
            unsafe {
                let (from, to) = (sums.as_ptr().add(done), out.as_mut_ptr().add(done));
                kernel.narrow_f16x4(from.cast(), to.cast());
            }
            done += 4;
        }
    }
    if same::<T, bf16>() {
        while done + 16 <= sums.len() {
            // SAFETY: T is bf16, T::Acc therefore f32; 16 elements from `done` are in both.
            unsafe {
                let (from, to) = (sums.as_ptr().add(done), out.as_mut_ptr().add(done));
                kernel.narrow_bf16x16(from.cast(), to.cast());
            }
            done += 16;
        }
    }
    for (y, &x) in out[done..].iter_mut().zip(&sums[done..]) {
        *y = T::narrow(x);
    }
}
