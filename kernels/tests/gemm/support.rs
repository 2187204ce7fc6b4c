//! Operands in every layout, and the types that are compared.

use graft_kernels::Float;
use graft_kernels::gemm::{Activation, MatRef};
use half::{bf16, f16};

/// Numbers in (-1, 1) that depend on the seed alone.
pub fn random<T: Float<Acc: From<f32>>>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(0x1234_5678_9abc_def1);
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let unit = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            T::narrow(unit.into())
        })
        .collect()
}

/// A matrix stored in some way, and where it lies in its buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    Rows,
    Columns,
    /// Rows further apart than they are long, as in a view of a wider matrix.
    Wide,
    /// No stride is 1.
    Sparse,
}

pub const LAYOUTS: [Layout; 4] = [Layout::Rows, Layout::Columns, Layout::Wide, Layout::Sparse];

pub fn strides(layout: Layout, rows: usize, cols: usize) -> (usize, usize) {
    match layout {
        Layout::Rows => (cols, 1),
        Layout::Columns => (1, rows),
        Layout::Wide => (cols + 5, 1),
        Layout::Sparse => (3, 3 * rows + 1),
    }
}

pub fn span(rows: usize, cols: usize, (rs, cs): (usize, usize)) -> usize {
    if rows == 0 || cols == 0 {
        0
    } else {
        (rows - 1) * rs + (cols - 1) * cs + 1
    }
}

pub fn view<T>(data: &[T], rows: usize, cols: usize, (rs, cs): (usize, usize)) -> MatRef<'_, T> {
    MatRef {
        data,
        rows,
        cols,
        row_stride: rs,
        col_stride: cs,
    }
}

pub fn wide<T: Float<Acc: Into<f64>>>(x: T) -> f64 {
    x.widen().into()
}

/// What a case adds to the bare product.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras {
    pub accumulate: bool,
    pub bias: bool,
    pub pre: bool,
    pub activation: Option<Activation>,
}

/// Rounding unit of storage and of arithmetic.
pub trait Eps {
    const STORED: f64;
    const COMPUTED: f64;
}
impl Eps for f32 {
    const STORED: f64 = 6e-8;
    const COMPUTED: f64 = 6e-8;
}
impl Eps for f64 {
    const STORED: f64 = 1.2e-16;
    const COMPUTED: f64 = 1.2e-16;
}
impl Eps for bf16 {
    const STORED: f64 = 1.0 / 256.0;
    const COMPUTED: f64 = 6e-8;
}
impl Eps for f16 {
    const STORED: f64 = 1.0 / 2048.0;
    const COMPUTED: f64 = 6e-8;
}

pub trait Number: Float<Acc: From<f32> + Into<f64>> + Eps {}
impl<T: Float<Acc: From<f32> + Into<f64>> + Eps> Number for T {}
