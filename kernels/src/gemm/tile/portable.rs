//! Plain Rust, for any processor: register tiles, and columns of products of few rows.

use super::{Job, Kernel};
use crate::element::{Float, Real, same};
use crate::gemm::ahead::Ahead;
use crate::gemm::few::{Columns, ROWS};
use crate::prefetch::prefetch;
use crate::simd::{Arch, Baseline};
use half::bf16;

/// Plain Rust, for any processor. On 64-bit ARM it fuses multiply-adds, as all processors do there.
#[derive(Clone, Copy)]
pub(in super::super) struct Portable;

// SAFETY: needs no instructions beyond the target's baseline.
unsafe impl Kernel for Portable {
    const MR: usize = if cfg!(target_arch = "aarch64") { 8 } else { 4 };
    const NR_BYTES: usize = 32;
    // Twice four rows from B where it lies took as long as packing it where it was in a cache, and up to twice as long where
    // it came from memory, in rows a multiple of 4 KiB apart. Four rows and fewer were faster however columns lie.
    const FEW: usize = ROWS;
    type Arch = Baseline;

    #[inline(always)]
    fn call<J: Job>(self, job: J) {
        job.run();
    }

    #[inline(always)]
    unsafe fn tile<R: Real>(
        self,
        depth: usize,
        a: *const R,
        b: *const R,
        rows: usize,
        _cols: usize,
        out: *mut R,
        stride: usize,
        add: bool,
        _ahead: Ahead,
    ) {
        // SAFETY: by the caller; NR is 32 bytes.
        unsafe {
            if same::<R, f32>() {
                portable::<R, { Portable::MR }, 8>(depth, a, b, rows, out, stride, add);
            } else {
                portable::<R, { Portable::MR }, 4>(depth, a, b, rows, out, stride, add);
            }
        }
    }

    fn streams<T: Float>() -> bool {
        true
    }

    #[inline(always)]
    unsafe fn columns<T: Float>(self, columns: &Columns<T>) {
        // SAFETY: by the caller.
        unsafe { few(columns) }
    }
}

/// # Safety
/// a: `[depth, M]`, b: `[depth, N]`, out: `rows` rows of N.
#[inline(never)]
unsafe fn portable<R: Real, const M: usize, const N: usize>(
    depth: usize,
    a: *const R,
    b: *const R,
    rows: usize,
    out: *mut R,
    stride: usize,
    add: bool,
) {
    let mut sums = [[R::ZERO; N]; M];
    for l in 0..depth {
        // SAFETY: row l of both panels.
        let (x, y) = unsafe {
            (
                &*a.add(l * M).cast::<[R; M]>(),
                &*b.add(l * N).cast::<[R; N]>(),
            )
        };
        for i in 0..M {
            for j in 0..N {
                sums[i][j] = Baseline::fma(x[i], y[j], sums[i][j]);
            }
        }
    }
    for (i, row) in sums.iter().enumerate().take(rows) {
        for (j, &sum) in row.iter().enumerate() {
            // SAFETY: row i of out has N elements.
            unsafe {
                let to = out.add(i * stride + j);
                to.write(if add { *to + sum } else { sum });
            }
        }
    }
}

/// As [`Kernel::columns`].
///
/// # Safety
/// As there.
#[inline(always)]
pub(super) unsafe fn few<T: Float>(columns: &Columns<T>) {
    // SAFETY: by the caller.
    unsafe {
        match columns.rows {
            1 => strips::<T, 1, 32>(columns),
            2 => strips::<T, 2, 16>(columns),
            3 => strips::<T, 3, 8>(columns),
            ROWS => strips::<T, ROWS, 8>(columns),
            rows => unreachable!("gemm: {rows} rows at once"),
        }
    }
}

/// Rows of B that are multiplied at once where columns lie side by side. Sums leave registers in between, so that rows are
/// read in pieces longer than the registers' columns.
const DEEP: usize = 8;
/// How many bytes ahead are asked for there, in pieces of rows.
const AHEAD: usize = 8192;
/// Columns along k that are transposed at once...
pub(super) const ALONG: usize = 8;
/// ...and words of each: an element, or two of bf16.
const WORDS: usize = 8;
/// Bytes of a line of the caches.
const LINE: usize = 64;
/// How many bytes of each column ahead are asked for there.
const ALONG_AHEAD: usize = 16 * LINE;

/// M rows; N columns at once where they lie side by side.
///
/// # Safety
/// As [`Kernel::columns`].
#[inline(always)]
unsafe fn strips<T: Float, const M: usize, const N: usize>(columns: &Columns<T>) {
    let cols = columns.cols;
    // SAFETY: at most as many columns from j on as are left, at most as many steps.
    unsafe {
        if columns.col_stride != 1 {
            for j in (0..cols).step_by(ALONG) {
                along::<T, M>(columns, j, ALONG.min(cols - j));
            }
            return;
        }
        let ahead = ahead(columns);
        for l in (0..columns.depth.max(1)).step_by(DEEP) {
            let deep = DEEP.min(columns.depth - l);
            let mut j = 0;
            while j < cols {
                j += if cols - j >= N {
                    across::<T, M, N>(columns, (l, j), deep, ahead)
                } else {
                    across::<T, M, 1>(columns, (l, j), deep, ahead)
                };
            }
        }
    }
}

/// How many elements ahead are asked for where columns lie side by side.
#[inline(always)]
pub(super) fn ahead<T: Float>(columns: &Columns<T>) -> usize {
    AHEAD / (columns.cols * size_of::<T>()) * columns.row_stride
}

/// Adds `deep` steps to the sums of N columns side by side; returns their number. What lies `ahead` elements further is
/// asked for.
///
/// # Safety
/// As [`Kernel::columns`].
#[inline(never)]
unsafe fn across<T: Float, const M: usize, const N: usize>(
    columns: &Columns<T>,
    (first, j): (usize, usize),
    deep: usize,
    ahead: usize,
) -> usize {
    let a: *const T::Acc = columns.a.cast();
    let out: *mut T::Acc = columns.out.cast();
    let mut sums = [[T::Acc::ZERO; N]; M];
    if first > 0 {
        for i in 0..M {
            // SAFETY: they were written by the steps before.
            sums[i] = unsafe { *out.add(i * columns.out_stride + j).cast::<[T::Acc; N]>() };
        }
    }
    for l in first..first + deep {
        // SAFETY: row l of B has N columns from j on, row i of A an element l.
        unsafe {
            let row = columns.b.add(l * columns.row_stride + j);
            prefetch(row.wrapping_add(ahead), N);
            let row = &*row.cast::<[T; N]>();
            for i in 0..M {
                let x = *a.add(i * columns.a_stride + l);
                for v in 0..N {
                    sums[i][v] = Baseline::fma(x, row[v].widen(), sums[i][v]);
                }
            }
        }
    }
    // SAFETY: by the caller.
    unsafe { store(columns, j, &sums) };
    N
}

/// `count` columns along k from j on, at most [`ALONG`].
///
/// # Safety
/// As [`Kernel::columns`].
#[inline(never)]
unsafe fn along<T: Float, const M: usize>(columns: &Columns<T>, j: usize, count: usize) {
    let mut sums = [[T::Acc::ZERO; ALONG]; M];
    let depth = columns.depth;
    let starts = starts(columns, j, count);
    let pairs = same::<T, bf16>() && cfg!(target_endian = "little");
    let part = if pairs { 2 * WORDS } else { WORDS };
    let whole = depth / part * part;
    for l in (0..whole).step_by(part) {
        ask(columns, (j, count), l);
        // SAFETY: elements l.. of the columns and of rows of A.
        unsafe {
            let at = starts.map(|column| column.add(l));
            if pairs {
                for (w, words) in transposed(at.map(|x| x.cast::<u32>())).iter().enumerate() {
                    let of = |x: u32| T::Acc::from_f64(f32::from_bits(x).into());
                    add(columns, l + 2 * w, words.map(|x| of(x << 16)), &mut sums);
                    add(
                        columns,
                        l + 2 * w + 1,
                        words.map(|x| of(x & 0xffff_0000)),
                        &mut sums,
                    );
                }
                continue;
            }
            let block = if same::<T, T::Acc>() {
                transposed(at.map(|x| x.cast::<T::Acc>()))
            } else {
                let wide = widened(&at);
                transposed(wide.each_ref().map(|column| column.as_ptr()))
            };
            for (w, words) in block.iter().enumerate() {
                add(columns, l + w, *words, &mut sums);
            }
        }
    }
    for l in whole..depth {
        // SAFETY: element l of the columns and of rows of A.
        unsafe {
            let y = starts.map(|column| (*column.add(l)).widen());
            add(columns, l, y, &mut sums);
        }
    }
    // SAFETY: by the caller.
    unsafe { store(columns, j, &sums) };
}

/// Where columns j.. begin. The last of `count` stands in for those that are not there.
#[inline(always)]
pub(super) fn starts<T: Float>(columns: &Columns<T>, j: usize, count: usize) -> [*const T; ALONG] {
    let column = |c: usize| (j + c.min(count - 1)) * columns.col_stride;
    std::array::from_fn(|c| columns.b.wrapping_add(column(c)))
}

/// Where a line of `count` columns from j on begins with element l: asks for what lies [`ALONG_AHEAD`] bytes further, or, if
/// they end before, for the beginning of what is read next.
#[inline(always)]
pub(super) fn ask<T: Float>(columns: &Columns<T>, (j, count): (usize, usize), l: usize) {
    let line = LINE / size_of::<T>();
    if !l.is_multiple_of(line) {
        return;
    }
    let stride = columns.col_stride;
    let first = columns.b.wrapping_add(j * stride);
    let l = l + ALONG_AHEAD / size_of::<T>();
    let ahead = match l.checked_sub(columns.depth) {
        None => first.wrapping_add(l),
        Some(over) if j + count < columns.cols => first.wrapping_add(count * stride + over),
        Some(over) => columns.then.wrapping_add(over),
    };
    for c in 0..count {
        prefetch(ahead.wrapping_add(c * stride), line);
    }
}

/// [`WORDS`] elements of each column, widened. Apart from what follows: there the compiler would take them one by one.
///
/// # Safety
/// They are read.
#[inline(never)]
unsafe fn widened<T: Float>(columns: &[*const T; ALONG]) -> [[T::Acc; WORDS]; ALONG] {
    // SAFETY: by the caller.
    columns.map(|column| unsafe { *column.cast::<[T; WORDS]>() }.map(T::widen))
}

/// [`WORDS`] words of each column.
///
/// # Safety
/// They are read, and need not be aligned.
#[inline(always)]
unsafe fn transposed<W: Copy + Default>(columns: [*const W; ALONG]) -> [[W; ALONG]; WORDS] {
    let mut block = [[W::default(); ALONG]; WORDS];
    for (c, column) in columns.iter().enumerate() {
        // SAFETY: by the caller.
        let words = unsafe { column.cast::<[W; WORDS]>().read_unaligned() };
        for w in 0..WORDS {
            block[w][c] = words[w];
        }
    }
    block
}

/// Adds the products of element l of [`ALONG`] columns.
///
/// # Safety
/// The rows of A have it.
#[inline(always)]
unsafe fn add<T: Float, const M: usize>(
    columns: &Columns<T>,
    l: usize,
    y: [T::Acc; ALONG],
    sums: &mut [[T::Acc; ALONG]; M],
) {
    let a: *const T::Acc = columns.a.cast();
    for i in 0..M {
        // SAFETY: by the caller.
        let x = unsafe { *a.add(i * columns.a_stride + l) };
        for c in 0..ALONG {
            sums[i][c] = Baseline::fma(x, y[c], sums[i][c]);
        }
    }
}

/// Writes the sums of N columns from j on.
///
/// # Safety
/// The rows of `out` have room for them.
#[inline(always)]
unsafe fn store<T: Float, const M: usize, const N: usize>(
    columns: &Columns<T>,
    j: usize,
    sums: &[[T::Acc; N]; M],
) {
    let out: *mut T::Acc = columns.out.cast();
    for (i, row) in sums.iter().enumerate() {
        // SAFETY: by the caller.
        unsafe {
            out.add(i * columns.out_stride + j)
                .cast::<[T::Acc; N]>()
                .write(*row)
        };
    }
}
