//! Columns of a product of few rows on AVX2, from B where it lies: each element is read once and multiplied
//! with every row. The order of sums is that of the tiles, so the bits are, too.

use crate::element::{Float, Real, same};
use crate::gemm::few::{Columns, ROWS};
use crate::gemm::rounded::Rounded;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Rows of B that are multiplied at once where columns lie side by side. Sums leave registers in between, so that rows are
/// read in pieces longer than the registers' columns.
const DEEP: usize = 8;
/// How many bytes ahead are asked for there, in pieces of rows.
const AHEAD: usize = 8192;
/// Registers of columns along k that are read in turns.
const TOGETHER: usize = 2;
/// How many lines ahead are asked for there, those of all columns that are read in turns. A hint is dropped while as many
/// reads are on their way as a core can have: each is given twice.
const AGAIN: [usize; 2] = [128, 64];
/// Bytes of a line of the caches.
const LINE: usize = 64;

/// # Safety
/// What [`Columns`] says lies inside the buffers; T is `f32`, `bf16`, `f16` or [`Rounded`]; the processor has the
/// instructions.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn columns<T: Float>(columns: &Columns<T>) {
    // Registers of sums, of columns side by side and along k: with what is multiplied they are at most 16.
    // SAFETY: passed on.
    unsafe {
        match columns.rows {
            1 => strips::<T, 1, 8>(columns),
            2 => strips::<T, 2, 4>(columns),
            3 => strips::<T, 3, 4>(columns),
            ROWS => strips::<T, ROWS, 2>(columns),
            rows => unreachable!("gemm: {rows} rows at once"),
        }
    }
}

/// M rows; at once V registers of columns that lie side by side, or [`TOGETHER`] of columns that lie along k.
///
/// # Safety
/// As [`columns`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn strips<T: Float, const M: usize, const V: usize>(columns: &Columns<T>) {
    let cols = columns.cols;
    // SAFETY: at most as many columns from j on as are left, at most as many steps.
    unsafe {
        if columns.col_stride != 1 {
            let mut j = 0;
            while j < cols {
                j += if cols - j >= 8 * TOGETHER {
                    along::<T, M, TOGETHER, true>(columns, j, 8 * TOGETHER)
                } else {
                    along::<T, M, 1, false>(columns, j, (cols - j).min(8))
                };
            }
            return;
        }
        let ahead = AHEAD / (cols * size_of::<T>()) * columns.row_stride;
        for l in (0..columns.depth.max(1)).step_by(DEEP) {
            let deep = DEEP.min(columns.depth - l);
            let mut j = 0;
            while j < cols {
                j += if cols - j >= 8 * V {
                    across::<T, M, V, true>(columns, (l, j), deep, 8 * V, ahead)
                } else if cols - j >= 8 {
                    across::<T, M, 1, true>(columns, (l, j), deep, 8, ahead)
                } else {
                    across::<T, M, 1, false>(columns, (l, j), deep, cols - j, ahead)
                };
            }
        }
    }
}

/// Writes the sums of V·8 columns from j on.
///
/// # Safety
/// The rows of `out` have room for them.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store<T: Float, const M: usize, const V: usize>(
    columns: &Columns<T>,
    j: usize,
    sums: [[__m256; V]; M],
) {
    for (i, row) in sums.iter().enumerate() {
        for (v, &sum) in row.iter().enumerate() {
            // SAFETY: by the caller.
            unsafe { _mm256_storeu_ps(columns.out.add(i * columns.out_stride + j + 8 * v), sum) };
        }
    }
}

/// Element l of row i of A, in all lanes.
///
/// # Safety
/// It is there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn splat<T: Float>(columns: &Columns<T>, i: usize, l: usize) -> __m256 {
    // SAFETY: by the caller.
    unsafe { _mm256_broadcast_ss(&*columns.a.add(i * columns.a_stride + l)) }
}

/// Rounds to bf16: to nearest, ties to even; what is not a number stays so.
#[inline]
#[target_feature(enable = "avx2")]
fn round8(x: __m256) -> __m256 {
    let bits = _mm256_castps_si256(x);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
    let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x);
    let (up, quiet) = (_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet));
    let high = _mm256_castsi256_ps(_mm256_set1_epi32(-0x1_0000));
    _mm256_and_ps(_mm256_blendv_ps(up, quiet, nan), high)
}

/// 8 elements as they are multiplied.
///
/// # Safety
/// They are read; T is as [`columns`] has it.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn load8<T: Float>(src: *const T) -> __m256 {
    // SAFETY: 32 bytes, or 16 of a short type.
    unsafe {
        if same::<T, f32>() {
            return _mm256_loadu_ps(src.cast());
        }
        if same::<T, Rounded>() {
            return round8(_mm256_loadu_ps(src.cast()));
        }
        let short = _mm_loadu_si128(src.cast());
        if same::<T, bf16>() {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(short)))
        } else {
            _mm256_cvtph_ps(short)
        }
    }
}

/// Adds `deep` steps to the sums of `count` columns side by side, V·8 of them if FULL, else fewer than 8; returns
/// their number.
///
/// # Safety
/// As [`columns`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn across<T: Float, const M: usize, const V: usize, const FULL: bool>(
    columns: &Columns<T>,
    (first, j): (usize, usize),
    deep: usize,
    count: usize,
    ahead: usize,
) -> usize {
    let mut sums = [[_mm256_setzero_ps(); V]; M];
    if first > 0 {
        for i in 0..M {
            for v in 0..V {
                // SAFETY: they were written by the steps before.
                sums[i][v] =
                    unsafe { _mm256_loadu_ps(columns.out.add(i * columns.out_stride + j + 8 * v)) };
            }
        }
    }
    let bytes = 8 * V * size_of::<T>();
    let mut some = [T::default(); 8];
    for l in first..first + deep {
        // SAFETY: row l of B has `count` columns from j on, row i of A an element l; hints may point anywhere.
        unsafe {
            let row = columns.b.add(l * columns.row_stride + j);
            let ahead = row.wrapping_add(ahead);
            for at in (0..bytes).step_by(LINE) {
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast::<i8>().wrapping_add(at));
            }
            let row = if FULL {
                row
            } else {
                std::ptr::copy_nonoverlapping(row, some.as_mut_ptr(), count);
                some.as_ptr()
            };
            let mut x = [_mm256_setzero_ps(); M];
            for i in 0..M {
                x[i] = splat(columns, i, l);
            }
            for v in 0..V {
                let y = load8(row.add(8 * v));
                for i in 0..M {
                    sums[i][v] = _mm256_fmadd_ps(x[i], y, sums[i][v]);
                }
            }
        }
    }
    // SAFETY: by the caller.
    unsafe { store(columns, j, sums) };
    count
}

/// 4 words of a column: 4 elements, or 8 of bf16, two in each word.
///
/// # Safety
/// They are read; T is as [`columns`] has it.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn words4<T: Float>(src: *const T) -> __m128 {
    // SAFETY: 16 bytes, or 8 of f16.
    unsafe {
        if same::<T, f16>() {
            _mm_cvtph_ps(_mm_loadl_epi64(src.cast()))
        } else {
            _mm_loadu_ps(src.cast())
        }
    }
}

/// Elements of a column in 4 words: one in each, or two of bf16.
#[inline(always)]
fn in_words4<T: Float>() -> usize {
    if same::<T, bf16>() { 8 } else { 4 }
}

/// 8 columns along k. An address holds at most two multiples of their distance: three columns share a pointer.
#[derive(Clone, Copy)]
struct Eight<T> {
    at: [*const T; 3],
    stride: usize,
    /// How many there are; the last one stands in for those that are not.
    count: usize,
}

impl<T> Eight<T> {
    /// Column i.
    #[inline(always)]
    fn column(&self, i: usize) -> *const T {
        if self.count == 8 {
            self.at[i / 3].wrapping_add(i % 3 * self.stride)
        } else {
            self.at[0].wrapping_add(i.min(self.count - 1) * self.stride)
        }
    }
}

/// 4 words of each of 8 columns, transposed, from element l on.
///
/// # Safety
/// They are read; T is as [`columns`] has it.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn transposed<T: Float>(eight: &Eight<T>, l: usize) -> [__m256; 4] {
    let mut r = [_mm256_setzero_ps(); 4];
    for i in 0..4 {
        // SAFETY: by the caller.
        let (low, high) = unsafe {
            (
                words4(eight.column(i).add(l)),
                words4(eight.column(i + 4).add(l)),
            )
        };
        r[i] = _mm256_set_m128(high, low);
        if same::<T, Rounded>() {
            r[i] = round8(r[i]);
        }
    }
    let low = _mm256_castps_pd(_mm256_unpacklo_ps(r[0], r[1]));
    let high = _mm256_castps_pd(_mm256_unpackhi_ps(r[0], r[1]));
    let next_low = _mm256_castps_pd(_mm256_unpacklo_ps(r[2], r[3]));
    let next_high = _mm256_castps_pd(_mm256_unpackhi_ps(r[2], r[3]));
    [
        _mm256_castpd_ps(_mm256_unpacklo_pd(low, next_low)),
        _mm256_castpd_ps(_mm256_unpackhi_pd(low, next_low)),
        _mm256_castpd_ps(_mm256_unpacklo_pd(high, next_high)),
        _mm256_castpd_ps(_mm256_unpackhi_pd(high, next_high)),
    ]
}

/// Adds the products of a word of 8 columns, its first element being number l of k.
///
/// # Safety
/// The rows of A have its elements.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add<T: Float, const M: usize, const G: usize>(
    columns: &Columns<T>,
    l: usize,
    word: __m256,
    g: usize,
    sums: &mut [[__m256; G]; M],
) {
    let bits = _mm256_castps_si256(word);
    let (first, second) = if same::<T, bf16>() {
        let high = _mm256_and_si256(bits, _mm256_set1_epi32(-0x1_0000));
        let low = _mm256_slli_epi32::<16>(bits);
        (_mm256_castsi256_ps(low), Some(_mm256_castsi256_ps(high)))
    } else {
        (word, None)
    };
    for i in 0..M {
        // SAFETY: by the caller.
        unsafe {
            sums[i][g] = _mm256_fmadd_ps(splat(columns, i, l), first, sums[i][g]);
            if let Some(second) = second {
                sums[i][g] = _mm256_fmadd_ps(splat(columns, i, l + 1), second, sums[i][g]);
            }
        }
    }
}

/// `count` columns along k, G·8 of them if FULL, else at most 8; returns their number. Blocks of 8 columns and 4 words are
/// transposed in registers, of G such blocks one after the other, so that none waits for the sums of the one before.
///
/// # Safety
/// As [`columns`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn along<T: Float, const M: usize, const G: usize, const FULL: bool>(
    columns: &Columns<T>,
    j: usize,
    count: usize,
) -> usize {
    let mut sums = [[_mm256_setzero_ps(); G]; M];
    let (stride, depth) = (columns.col_stride, columns.depth);
    let first = columns.b.wrapping_add(j * stride);
    let next = if j + count < columns.cols {
        first.wrapping_add(count * stride)
    } else {
        columns.then
    };
    let mut eights: [Eight<T>; G] = std::array::from_fn(|g| Eight {
        at: [0, 3, 6].map(|i| first.wrapping_add((8 * g + i) * stride)),
        stride,
        count: if FULL { 8 } else { count },
    });
    let advance = |eights: &mut [Eight<T>; G], by: usize| {
        for at in eights.iter_mut().flat_map(|eight| &mut eight.at) {
            *at = at.wrapping_add(by);
        }
    };
    let (line, part) = (LINE / size_of::<T>(), in_words4::<T>());
    let each = part / 4;
    let mut l = 0;
    while l + line <= depth {
        let mut ahead = AGAIN.map(|lines| {
            let l = l + lines / (8 * G) * line;
            match l.checked_sub(depth) {
                None => first.wrapping_add(l),
                Some(over) => next.wrapping_add(over),
            }
        });
        for q in 0..line / part {
            for g in 0..G {
                // SAFETY: elements l.. of the columns and of rows of A.
                unsafe {
                    let words = transposed(&eights[g], q * part);
                    for w in 0..4 {
                        // Between sums that wait for each other: few at a time.
                        if w % (line / part / 2) == 0 {
                            for column in &mut ahead {
                                _mm_prefetch::<_MM_HINT_T0>(column.cast());
                                *column = column.wrapping_add(stride);
                            }
                        }
                        add(columns, l + q * part + w * each, words[w], g, &mut sums);
                    }
                }
            }
        }
        advance(&mut eights, line);
        l += line;
    }
    while l + part <= depth {
        for g in 0..G {
            // SAFETY: elements l.. of the columns and of rows of A.
            unsafe {
                let words = transposed(&eights[g], 0);
                for w in 0..4 {
                    add(columns, l + w * each, words[w], g, &mut sums);
                }
            }
        }
        advance(&mut eights, part);
        l += part;
    }
    while l < depth {
        for g in 0..G {
            // SAFETY: element l of the columns and of rows of A.
            unsafe {
                let y: [f32; 8] =
                    std::array::from_fn(|i| (*eights[g].column(i)).widen().to_f64() as f32);
                let y = _mm256_loadu_ps(y.as_ptr());
                for i in 0..M {
                    sums[i][g] = _mm256_fmadd_ps(splat(columns, i, l), y, sums[i][g]);
                }
            }
        }
        advance(&mut eights, 1);
        l += 1;
    }
    // SAFETY: by the caller.
    unsafe { store(columns, j, sums) };
    count
}
