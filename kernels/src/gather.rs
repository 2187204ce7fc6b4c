//! Rows of a table by index, and the gradient of that.

use crate::element::{Element, Float};
use crate::parallel::{self, rows};
use crate::shared::Shared;

/// `y[i, :] = table[index[i], :]` with `table` `[rows, cols]`, `y` `[index.len(), cols]`.
/// Indices must lie in `0..rows`; the caller has checked them.
pub fn gather_rows<T: Element>(table: &[T], index: &[i64], y: &mut [T], cols: usize) {
    assert_eq!(
        y.len(),
        index.len() * cols,
        "gather_rows: y is not [index.len(), cols]"
    );
    if cols == 0 {
        return;
    }
    assert!(
        table.len().is_multiple_of(cols),
        "gather_rows: table is not [rows, cols]"
    );
    parallel::for_each_row_block(
        index.len(),
        cols,
        (index, rows(y, cols)),
        |_, (index, y)| {
            for (y, &row) in y.chunks_exact_mut(cols).zip(index) {
                let start = row as usize * cols;
                y.copy_from_slice(&table[start..start + cols]);
            }
        },
    );
}

/// Columns that one task of [`scatter_add_rows`] owns.
const COLUMNS: usize = 64;

/// `dtable[index[i], :] += dy[i, :]` for i in order, with `dy` `[index.len(), cols]`, `dtable`
/// `[rows, cols]`. What `dtable` held before stays in the sum.
///
/// Sums are rounded to `T` after each addition: for a short `T` give an f32 table if rows repeat
/// often. Tasks own blocks of columns, so a row that all indices name costs no more than others.
pub fn scatter_add_rows<T: Float>(dy: &[T], index: &[i64], dtable: &mut [T], cols: usize) {
    assert_eq!(
        dy.len(),
        index.len() * cols,
        "scatter_add_rows: dy is not [index.len(), cols]"
    );
    if cols == 0 {
        return;
    }
    assert!(
        dtable.len().is_multiple_of(cols),
        "scatter_add_rows: dtable is not [rows, cols]"
    );
    let count = dtable.len() / cols;
    let table = Shared::new(dtable);
    let block = |first: usize| {
        let len = COLUMNS.min(cols - first);
        for (dy, &row) in dy.chunks_exact(cols).zip(index) {
            assert!(
                row >= 0 && (row as usize) < count,
                "scatter_add_rows: row {row} of {count}"
            );
            // SAFETY: each task has columns of its own and holds one part at a time.
            let sums = unsafe { table.part(row as usize * cols + first, len) };
            for (sum, dy) in sums.iter_mut().zip(&dy[first..first + len]) {
                *sum = T::narrow(sum.widen() + dy.widen());
            }
        }
    };
    let blocks = cols.div_ceil(COLUMNS);
    parallel::each(blocks, dy.len() >= parallel::GRAIN, |n| block(n * COLUMNS));
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn scatter_is_the_transpose_of_gather(
            (rows, cols) in (1usize..9, 0usize..150),
            picks in proptest::collection::vec(0usize..1000, 0..600),
        ) {
            let index: Vec<i64> = picks.iter().map(|p| (p % rows) as i64).collect();
            let table: Vec<f64> = (0..rows * cols).map(|i| i as f64).collect();
            let mut y = vec![-1.0; index.len() * cols];
            gather_rows(&table, &index, &mut y, cols);
            for (i, &row) in index.iter().enumerate() {
                let row = row as usize;
                prop_assert_eq!(&y[i * cols..][..cols], &table[row * cols..][..cols]);
            }
            // Integers: sums are exact in any order, so equality is the test.
            let mut sums: Vec<f64> = vec![1.0; rows * cols];
            let mut expected = sums.clone();
            scatter_add_rows(&y, &index, &mut sums, cols);
            for (i, &row) in index.iter().enumerate() {
                for c in 0..cols {
                    expected[row as usize * cols + c] += y[i * cols + c];
                }
            }
            prop_assert_eq!(sums, expected);
        }
    }

    #[test]
    fn short_types_and_repeated_rows() {
        let dy: Vec<bf16> = (0..600 * 70)
            .map(|i| bf16::from_f32((i % 3) as f32))
            .collect();
        let mut table = vec![bf16::ZERO; 2 * 70];
        scatter_add_rows(&dy[..70 * 100], &[1; 100], &mut table, 70);
        let sum: f32 = (0..100).map(|r| dy[r * 70 + 69].to_f32()).sum();
        assert_eq!(table[70 + 69].to_f32(), sum);
        assert_eq!(table[69].to_f32(), 0.0);
    }

    #[test]
    #[should_panic(expected = "gather_rows: y is not [index.len(), cols]")]
    fn sizes_are_checked() {
        gather_rows(&[1.0f32; 6], &[0, 1], &mut [0.0; 5], 3);
    }
}
