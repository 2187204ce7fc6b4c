//! Copies: strided to contiguous and back, from one number type to another.

use crate::element::{Element, Float, Real};
use crate::parallel::{GRAIN, for_each_chunk, for_each_row_block, rows};
use crate::simd::{kernel, public};
use crate::strided::Walk;

/// Rows that a transposing copy handles together: 16 f32 are a cache line.
const TILE: usize = 16;

/// `dst[i] = src[at i]` for every index i of `shape`, `dst` contiguous. Strides count elements,
/// 0 broadcasts; rank 0 to 6.
pub fn copy_strided<E: Element>(shape: &[usize], src: &[E], strides: &[usize], dst: &mut [E]) {
    let walk = Walk::new("copy_strided", shape, [strides]);
    assert_eq!(
        walk.len(),
        dst.len(),
        "copy_strided: dst does not have the shape's size"
    );
    walk.check("copy_strided", 0, "src", src.len());
    let (width, [step]) = walk.inner();
    let (around, [outer]) = walk.second();
    if step > 1 && outer == 1 {
        // A transposition: in the order of dst, each read would touch another cache line.
        let count = dst.len() / width.max(1);
        for_each_row_block(count, width, rows(dst, width), |first, dst| {
            let mut done = 0;
            for_rows(first, dst.len() / width, around, |row, n| {
                let dst = &mut dst[done..done + n * width];
                done += n * width;
                let [start] = walk.offsets(row * width);
                transpose(&src[start..], step, n, dst, width);
            });
        });
        return;
    }
    for_each_chunk(dst.len(), dst, |first, dst| {
        walk.runs(first, dst.len(), |[offset], range| {
            let dst = &mut dst[range];
            match step {
                0 => dst.fill(src[offset]),
                1 => dst.copy_from_slice(&src[offset..offset + dst.len()]),
                _ => {
                    let src = src[offset..].iter().step_by(step);
                    dst.iter_mut().zip(src).for_each(|(dst, &src)| *dst = src);
                }
            }
        });
    });
}

/// `dst[i, j] = src[j·step + i]` for i < n <= TILE; dst `[n, width]`.
fn transpose<E: Element>(src: &[E], step: usize, n: usize, dst: &mut [E], width: usize) {
    // Through a small square, because rows of dst are often a power of two apart and would then
    // push each other out of the cache.
    let mut square = [[E::default(); TILE]; TILE];
    let mut j = 0;
    while j < width {
        let count = TILE.min(width - j);
        if n == TILE {
            for (k, line) in square[..count].iter_mut().enumerate() {
                line.copy_from_slice(&src[(j + k) * step..][..TILE]);
            }
        } else {
            for (k, line) in square[..count].iter_mut().enumerate() {
                line[..n].copy_from_slice(&src[(j + k) * step..][..n]);
            }
        }
        for i in 0..n {
            let dst = &mut dst[i * width + j..][..count];
            for (line, dst) in square.iter().zip(dst) {
                *dst = line[i];
            }
        }
        j += count;
    }
}

/// Cuts `count` rows from `first` on into runs of at most `TILE` that do not cross a multiple of
/// `around`.
#[inline(always)]
fn for_rows(first: usize, count: usize, around: usize, mut run: impl FnMut(usize, usize)) {
    let (mut row, end) = (first, first + count);
    while row < end {
        let n = TILE.min(end - row).min(around - row % around);
        run(row, n);
        row += n;
    }
}

/// `dst[at i] = src[i]` for every index i of `shape`, `src` contiguous: the inverse of
/// [`copy_strided`]. The positions must be distinct; what they do not name is left alone.
pub fn scatter_strided<E: Element>(shape: &[usize], src: &[E], dst: &mut [E], strides: &[usize]) {
    let walk = Walk::new("scatter_strided", shape, [strides]);
    assert_eq!(
        walk.len(),
        src.len(),
        "scatter_strided: src does not have the shape's size"
    );
    walk.check("scatter_strided", 0, "dst", dst.len());
    let (_, [step]) = walk.inner();
    walk.runs(0, src.len(), |[offset], range| {
        let src = &src[range];
        if step == 1 {
            dst[offset..offset + src.len()].copy_from_slice(src);
        } else {
            // step 0 only for a run of one
            let dst = dst[offset..].iter_mut().step_by(step.max(1));
            dst.zip(src).for_each(|(dst, &src)| *dst = src);
        }
    });
}

kernel! {
    fn convert_chunk[A: Arch, S: Float, D: Float](isa: Isa, src: &[S], dst: &mut [D]) {
        for (src, dst) in src.iter().zip(dst) {
            // Between types computed in f32, the way over f64 is exact and compiles to nothing.
            *dst = D::narrow(D::Acc::from_f64(src.widen().to_f64()));
        }
    }
}

public! {
    /// `dst[i] = src[i]`, rounded to nearest, ties to even. From `f64` to a 16-bit type it is
    /// rounded to `f32` on the way.
    pub fn convert, convert_with[S: Float, D: Float](isa: Isa, src: &[S], dst: &mut [D]) {
        assert_eq!(src.len(), dst.len(), "convert: src and dst differ in length");
        for_each_chunk(dst.len(), (src, dst), |_, (src, dst)| convert_chunk(isa, src, dst));
    }
}

/// Sets every element.
pub fn fill<E: Element>(dst: &mut [E], value: E) {
    if dst.len() < GRAIN {
        dst.fill(value);
    } else {
        for_each_chunk(dst.len(), dst, |_, dst| dst.fill(value));
    }
}
