//! Matrices read in place: where an element lies, whatever stands for it.

use crate::quantised::Codes;

/// A matrix read in place: element (i, j) is number `i·row_stride + j·col_stride` of `data`, in which the first is (0, 0).
///
/// Strides count elements. 0 repeats a row or a column.
#[derive(Clone, Copy, Debug)]
pub struct Strided<D> {
    /// The elements, starting with (0, 0).
    pub data: D,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Distance from a row to the next.
    pub row_stride: usize,
    /// Distance from a column to the next.
    pub col_stride: usize,
}

/// A matrix of numbers.
pub type MatRef<'a, T> = Strided<&'a [T]>;

/// A matrix of codes, each of which stands for a number.
pub type CodesRef<'a> = Strided<Codes<'a>>;

impl<D> Strided<D> {
    /// `rows × cols` elements without gaps, row after row.
    pub fn row_major(data: D, rows: usize, cols: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            row_stride: cols,
            col_stride: 1,
        }
    }

    /// The transpose: the same elements with rows and columns exchanged.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// The number, in `data`, of element (i, j).
    #[inline(always)]
    pub(super) fn at(&self, i: usize, j: usize) -> usize {
        i * self.row_stride + j * self.col_stride
    }

    /// Number of elements that `data` must have for every (i, j) to be inside it.
    pub(crate) fn span(&self) -> usize {
        if self.rows == 0 || self.cols == 0 {
            0
        } else {
            self.at(self.rows - 1, self.cols - 1) + 1
        }
    }
}
