//! Small products inside one block: `C = A·B` or `C += A·B` with operands in the workspace.
//!
//! C is row-major with rows of any distance. A is read row by row or column by column, so that scores
//! serve as P (times V) and as its transpose (times the gradient of the output). B lies in panels.
//! Every size but the depth is padded by the caller: rows to [`ROWS`], columns to [`COLS`].
//!
//! A slot of an operand holds one element or, where the processor multiplies pairs of bf16, two
//! that are neighbours in depth, the lower half being the first: depth is counted in slots.

use crate::element::{Float, Real, same};
use crate::gemm::{self, Operands};
use crate::simd::{Arch, Baseline, Isa};
use half::bf16;
use std::mem::transmute_copy;
use std::ops::Range;

#[cfg(target_arch = "aarch64")]
mod aarch64;

/// Rows of C come in multiples of this.
pub(super) const ROWS: usize = 8;
/// Columns of C come in multiples of this.
pub(super) const COLS: usize = 16;
/// No panel that [`gemm::pack_panels`] makes is wider.
pub(super) const WIDEST: usize = 32;

/// How A lies in memory.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Order {
    /// `A[i, l]` at `i * stride + l`.
    Rows,
    /// `A[i, l]` at `l * stride + i`.
    Columns,
}

/// A: where its first slot is, and from a row (or a column) to the next.
#[derive(Clone, Copy)]
pub(super) struct At<'a, R> {
    pub data: &'a [R],
    pub stride: usize,
    pub order: Order,
}

/// B: `B[l, j]` at `j / width * width * depth + (first + l) * width + j % width`. A row-major matrix
/// is one panel.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a, R> {
    pub data: &'a [R],
    pub width: usize,
    /// Slots that a panel is deep, and the first that is read.
    pub depth: usize,
    pub first: usize,
}

/// One tile: depth, a, a's stride, b, b's stride, c, c's stride, whether C is added to.
type Tile<R> = unsafe fn(usize, *const R, usize, *const R, usize, *mut R, usize, bool);

/// The tiles of one instruction set for one number type, by the order of A.
#[derive(Clone, Copy)]
struct Set<R> {
    rows: usize,
    /// Columns of the wide and of the narrow tile; the narrow ones divide [`COLS`].
    wide: usize,
    narrow: usize,
    /// `[order][0]` is wide, `[order][1]` narrow.
    tiles: [[Tile<R>; 2]; 2],
}

/// Products on one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Products<R> {
    set: Set<R>,
    pub isa: Isa,
    /// How operands are packed.
    pub operands: Operands,
    /// Elements in a slot of an operand.
    pub step: usize,
    /// Columns of a panel that [`gemm::pack_panels`] makes.
    pub panel: usize,
}

impl<R: Real> Products<R> {
    /// Those of `isa` for elements stored as T, or portable ones if the processor does not have it.
    pub fn new<T: Float<Acc = R>>(isa: Isa) -> Self {
        let isa = isa.or_portable();
        let pairs = isa == Isa::Avx512Bf16 && same::<T, bf16>();
        Products {
            set: Set::new(isa, pairs),
            isa,
            operands: if pairs {
                Operands::Bf16
            } else {
                Operands::AsStored
            },
            step: 1 + usize::from(pairs),
            panel: gemm::panel_width::<R>(isa),
        }
    }

    /// Whether a slot holds two bf16.
    #[inline]
    pub fn pairs(&self) -> bool {
        self.step == 2
    }

    /// `C[i, j] = sum over l < depth of A[i, l] * B[l, j]`, added to C if `add`, for `rows` rows, a
    /// multiple of [`ROWS`], and columns whose ends are multiples of the narrow tile; C begins with
    /// column 0. The order of summation is that of l, whatever the instruction set.
    #[inline]
    pub fn product(
        &self,
        (rows, cols, depth): (usize, Range<usize>, usize),
        a: At<R>,
        b: Panels<R>,
        c: &mut [R],
        c_stride: usize,
        add: bool,
    ) {
        let set = &self.set;
        assert!(
            rows.is_multiple_of(ROWS)
                && cols.start.is_multiple_of(set.narrow)
                && cols.end.is_multiple_of(set.narrow)
                && b.width.is_multiple_of(set.narrow),
            "attention: a block is not made of whole tiles"
        );
        if rows == 0 || cols.is_empty() {
            return;
        }
        let a_span = match (a.order, depth) {
            (_, 0) => 0,
            (Order::Rows, _) => (rows - 1) * a.stride + depth,
            (Order::Columns, _) => (depth - 1) * a.stride + rows,
        };
        let panels = cols.end.div_ceil(b.width);
        assert!(
            a.data.len() >= a_span
                && b.first + depth <= b.depth
                && b.data.len() >= panels * b.width * b.depth
                && c.len() >= (rows - 1) * c_stride + cols.end,
            "attention: a tile reaches outside of its block"
        );
        let [wide, narrow] = set.tiles[usize::from(a.order == Order::Columns)];
        let row_step = if a.order == Order::Rows { a.stride } else { 1 };
        let mut j = cols.start;
        while j < cols.end {
            let inside = j % b.width;
            let (tile, width) = if (b.width - inside).min(cols.end - j) >= set.wide {
                (wide, set.wide)
            } else {
                (narrow, set.narrow)
            };
            let at = (j - inside) * b.depth + b.first * b.width + inside;
            for i in (0..rows).step_by(set.rows) {
                // SAFETY: the spans of all three were checked; `rows` is a multiple of the tile's
                // rows, and the panel's columns left and those of C are at least as many as its.
                unsafe {
                    tile(
                        depth,
                        a.data.as_ptr().wrapping_add(i * row_step),
                        a.stride,
                        b.data.as_ptr().wrapping_add(at),
                        b.width,
                        c.as_mut_ptr().add(i * c_stride + j),
                        c_stride,
                        add,
                    );
                }
            }
            j += width;
        }
    }
}

impl<R: Real> Set<R> {
    /// For an instruction set that the processor has.
    fn new(isa: Isa, pairs: bool) -> Self {
        let f32s = same::<R, f32>();
        #[cfg(target_arch = "x86_64")]
        {
            // SAFETY: each set is made of functions on R, which is f32 or f64; their types differ
            // in the name of R alone.
            let set = unsafe {
                match (isa, f32s) {
                    (Isa::Avx512Bf16, true) if pairs => {
                        Some(transmute_copy::<Set<f32>, Set<R>>(&AVX512_BF16))
                    }
                    (Isa::Avx512 | Isa::Avx512Bf16, true) => {
                        Some(transmute_copy::<Set<f32>, Set<R>>(&AVX512_F32))
                    }
                    (Isa::Avx512 | Isa::Avx512Bf16, false) => {
                        Some(transmute_copy::<Set<f64>, Set<R>>(&AVX512_F64))
                    }
                    (Isa::Avx2, true) => Some(transmute_copy::<Set<f32>, Set<R>>(&AVX2_F32)),
                    (Isa::Avx2, false) => Some(transmute_copy::<Set<f64>, Set<R>>(&AVX2_F64)),
                    _ => None,
                }
            };
            if let Some(set) = set {
                return set;
            }
        }
        #[cfg(target_arch = "aarch64")]
        if matches!(isa, Isa::Neon | Isa::NeonBf16) && f32s {
            // SAFETY: R is f32.
            return unsafe { transmute_copy::<Set<f32>, Set<R>>(&aarch64::NEON_F32) };
        }
        let _ = (isa, pairs);
        let tiles = if f32s {
            [
                [portable::<R, false, 8> as Tile<R>; 2],
                [portable::<R, true, 8> as Tile<R>; 2],
            ]
        } else {
            [
                [portable::<R, false, 4> as Tile<R>; 2],
                [portable::<R, true, 4> as Tile<R>; 2],
            ]
        };
        let cols = if f32s { 8 } else { 4 };
        Set {
            rows: PORTABLE_ROWS,
            wide: cols,
            narrow: cols,
            tiles,
        }
    }
}

const PORTABLE_ROWS: usize = 4;

/// # Safety
/// The operands hold a tile of `PORTABLE_ROWS` x N, `depth` deep.
unsafe fn portable<R: Real, const COLUMNS: bool, const N: usize>(
    depth: usize,
    a: *const R,
    a_stride: usize,
    b: *const R,
    b_stride: usize,
    c: *mut R,
    c_stride: usize,
    add: bool,
) {
    let mut sums = [[R::ZERO; N]; PORTABLE_ROWS];
    for l in 0..depth {
        // SAFETY: row l of B, column l of A.
        unsafe {
            let y = b.add(l * b_stride).cast::<[R; N]>().read();
            for i in 0..PORTABLE_ROWS {
                let x = *a.add(if COLUMNS {
                    l * a_stride + i
                } else {
                    i * a_stride + l
                });
                for j in 0..N {
                    sums[i][j] = Baseline::fma(x, y[j], sums[i][j]);
                }
            }
        }
    }
    for i in 0..PORTABLE_ROWS {
        // SAFETY: row i of C.
        let row = unsafe { &mut *c.add(i * c_stride).cast::<[R; N]>() };
        for j in 0..N {
            row[j] = if add { row[j] + sums[i][j] } else { sums[i][j] };
        }
    }
}

#[cfg(target_arch = "x86_64")]
use x86::{AVX2_F32, AVX2_F64, AVX512_BF16, AVX512_F32, AVX512_F64};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Set, Tile};
    use std::arch::x86_64::*;
    use std::mem::transmute;

    macro_rules! tiles {
        ($set:ident, $name:ident, $features:literal, $t:ident, $lanes:literal, $rows:literal,
         $zero:ident, $load:ident, $store:ident, $splat:ident, $fma:ident, $plus:ident) => {
            /// # Safety
            /// The operands hold a tile of `$rows` x `V * $lanes`, `depth` deep; the processor
            /// has the instructions.
            #[target_feature(enable = $features)]
            unsafe fn $name<const COLUMNS: bool, const V: usize>(
                depth: usize,
                mut a: *const $t,
                a_stride: usize,
                mut b: *const $t,
                b_stride: usize,
                c: *mut $t,
                c_stride: usize,
                add: bool,
            ) {
                let mut sums = [[$zero(); V]; $rows];
                for _ in 0..depth {
                    // SAFETY: one row of B, one column of A.
                    unsafe {
                        let mut y = [$zero(); V];
                        for v in 0..V {
                            y[v] = $load(b.add(v * $lanes));
                        }
                        for i in 0..$rows {
                            let x = $splat(*a.add(if COLUMNS { i } else { i * a_stride }));
                            for v in 0..V {
                                sums[i][v] = $fma(x, y[v], sums[i][v]);
                            }
                        }
                        a = a.wrapping_add(if COLUMNS { a_stride } else { 1 });
                        b = b.wrapping_add(b_stride);
                    }
                }
                for i in 0..$rows {
                    for v in 0..V {
                        // SAFETY: a row of C.
                        unsafe {
                            let to = c.add(i * c_stride + v * $lanes);
                            let sum = sums[i][v];
                            $store(to, if add { $plus($load(to), sum) } else { sum });
                        }
                    }
                }
            }

            pub(super) const $set: Set<$t> = Set {
                rows: $rows,
                wide: 2 * $lanes,
                narrow: $lanes,
                tiles: [
                    [$name::<false, 2> as Tile<$t>, $name::<false, 1> as Tile<$t>],
                    [$name::<true, 2> as Tile<$t>, $name::<true, 1> as Tile<$t>],
                ],
            };
        };
    }

    /// `sum + x·y` of the two bf16 in each lane of x and y. The two products and the sum are added
    /// in an order and with roundings of the processor's own; denormal operands, products and sums
    /// count as 0.
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

    // 8 x 2 registers of sums of 32, of 16 for AVX2 4 x 2: enough to cover the latency of the
    // multiply-adds (4 cycles, one 512-bit or two 256-bit ones each), while rows in multiples of
    // 8 waste less on short sequences than the 12 or 6 that large products use.
    tiles!(
        AVX512_F32,
        avx512_f32,
        "avx512f",
        f32,
        16,
        8,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_add_ps
    );
    tiles!(
        AVX512_BF16,
        avx512_bf16,
        "avx512f,avx512bf16",
        f32,
        16,
        8,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_set1_ps,
        dot_pairs,
        _mm512_add_ps
    );
    tiles!(
        AVX512_F64,
        avx512_f64,
        "avx512f",
        f64,
        8,
        8,
        _mm512_setzero_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_set1_pd,
        _mm512_fmadd_pd,
        _mm512_add_pd
    );
    tiles!(
        AVX2_F32,
        avx2_f32,
        "avx2,fma",
        f32,
        8,
        4,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_add_ps
    );
    tiles!(
        AVX2_F64,
        avx2_f64,
        "avx2,fma",
        f64,
        4,
        4,
        _mm256_setzero_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_set1_pd,
        _mm256_fmadd_pd,
        _mm256_add_pd
    );
}
