//! Launchers of `index.cu`.

use super::launch::args;
use super::{Error, Gpu, Launch, Result, Scalar, Slice, SliceMut};

/// Rows of a block that gathers, each with a warp.
const WARPS: usize = 8;
/// Threads of a block that scatters.
const THREADS: u32 = 128;
/// Positions of a piece: so many rows are added up one after the other.
const PIECE: usize = 64;

/// `y[i, :] = table[index[i], :]` for elements of any type; table `[rows, columns]`, index i64 `[n]`,
/// y `[n, columns]`. The caller has checked the indices.
///
/// # Errors
/// A failed launch.
///
/// # Panics
/// If lengths or types do not fit.
pub fn gather_rows(
    gpu: &Gpu,
    table: Slice<'_>,
    index: Slice<'_>,
    y: SliceMut<'_>,
    columns: usize,
) -> Result<()> {
    assert_eq!(
        y.count(),
        index.count() * columns,
        "gather_rows: y is not [index, columns]"
    );
    assert_eq!(index.scalar(), Scalar::I64, "gather_rows: index");
    assert_eq!(table.scalar(), y.scalar(), "gather_rows: types");
    if y.count() == 0 {
        return Ok(());
    }
    assert!(
        table.count().is_multiple_of(columns),
        "gather_rows: table is not [rows, columns]"
    );
    // In the widest units that rows consist of.
    let bytes = columns * y.scalar().size();
    let fits = |size: usize| {
        let size = size as u64;
        (bytes as u64 | table.address() | y.address()).is_multiple_of(size)
    };
    let (name, size) = [
        ("gather_rows_u128", 16),
        ("gather_rows_u64", 8),
        ("gather_rows_u32", 4),
        ("gather_rows_u16", 2),
    ]
    .into_iter()
    .find(|&(_, size)| fits(size))
    .unwrap_or(("gather_rows_u8", 1));
    let rows = index.count();
    let launch = Launch::linear(rows.div_ceil(WARPS), 32 * WARPS as u32);
    gpu.launch(
        "index",
        name,
        launch,
        args![table, index, y, rows, bytes / size],
    )
}

/// Which rows of a gradient are added up to which row of a table: positions sorted by row, cut into
/// pieces that blocks of a GPU sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scatter {
    /// Positions of the index by row, those of a row in order; then room for as many pieces and joins as so many
    /// positions can have, of three numbers each: see the source; zeros are none
    pub numbers: Vec<i32>,
    positions: usize,
    rows: usize,
}

impl Scatter {
    /// The order for `index`, each of whose numbers lies in `0..rows`.
    ///
    /// # Errors
    /// An index or a table of 2^31 rows or more.
    pub fn new(index: &[i64], rows: usize) -> Result<Scatter> {
        let limit = i32::MAX as usize;
        if index.len() >= limit || rows >= limit {
            return Err(Error::Unsupported {
                kernel: "scatter rows",
                what: format!("{} positions over {rows} rows are too many", index.len()),
            });
        }
        // Counting sort, which keeps the order of equal rows.
        let mut ends = vec![0u32; rows];
        for &row in index {
            ends[row as usize] += 1;
        }
        // Everything is written to its place at once: a step waits for this.
        let at_pieces = index.len();
        let at_joins = at_pieces + 3 * Scatter::pieces(index.len(), rows);
        let mut numbers = vec![0i32; at_joins + 3 * Scatter::joins(index.len())];
        let (order, rest) = numbers.split_at_mut(at_pieces);
        let (pieces, joins) = rest.split_at_mut(at_joins - at_pieces);
        let mut pieces = pieces.as_chunks_mut::<3>().0.iter_mut();
        let mut joins = joins.as_chunks_mut::<3>().0.iter_mut();
        let mut piece = |numbers| *pieces.next().expect("there are no more pieces") = numbers;
        let (mut parts, mut first) = (0i32, 0);
        for (row, end) in ends.iter_mut().enumerate() {
            let last = first + *end as usize;
            *end = first as u32; // where the row's next position goes
            if last - first > PIECE {
                let before = parts;
                for start in (first..last).step_by(PIECE) {
                    let stop = (start + PIECE).min(last);
                    piece([start as i32, stop as i32, -1 - parts]);
                    parts += 1;
                }
                let join = joins.next().expect("there are no more joins");
                *join = [before, parts, row as i32];
            } else if last > first {
                piece([first as i32, last as i32, row as i32]);
            }
            first = last;
        }
        for (position, &row) in index.iter().enumerate() {
            let at = &mut ends[row as usize];
            order[*at as usize] = position as i32;
            *at += 1;
        }
        let positions = index.len();
        Ok(Scatter {
            numbers,
            positions,
            rows,
        })
    }

    /// The most parts that so many positions have: rows of at least PIECE + 1 positions have two
    /// parts for that many, or fewer for each.
    fn parts(positions: usize) -> usize {
        2 * positions / (PIECE + 1)
    }

    /// The most pieces that so many positions over so many rows have.
    fn pieces(positions: usize, rows: usize) -> usize {
        positions.min(rows) + Scatter::parts(positions)
    }

    /// The most rows that so many positions cut into parts.
    fn joins(positions: usize) -> usize {
        Scatter::parts(positions) / 2
    }

    /// Elements (f32) of workspace for [`scatter_add_rows`], whatever the index holds.
    pub fn workspace(positions: usize, columns: usize) -> usize {
        Scatter::parts(positions) * columns
    }
}

/// Adds the rows of `dy [positions, columns]` up in the rows of `table [rows, columns]` that they came
/// from, in f32 and in the order of the index; rows to which none belongs are left as they are.
/// `numbers`: those of `scatter`, on the device; workspace of [`Scatter::workspace`].
///
/// # Errors
/// Types other than f32 and bf16.
///
/// # Panics
/// If lengths or types do not fit.
pub fn scatter_add_rows(
    gpu: &Gpu,
    scatter: &Scatter,
    numbers: Slice<'_>,
    dy: Slice<'_>,
    mut table: SliceMut<'_>,
    columns: usize,
    workspace: SliceMut<'_>,
) -> Result<()> {
    assert_eq!(
        dy.count(),
        scatter.positions * columns,
        "scatter_add_rows: dy is not [positions, columns]"
    );
    assert_eq!(dy.scalar(), table.scalar(), "scatter_add_rows: types");
    assert_eq!(
        (numbers.count(), numbers.scalar()),
        (scatter.numbers.len(), Scalar::I32),
        "scatter_add_rows: numbers"
    );
    let need = Scatter::workspace(scatter.positions, columns);
    assert!(
        workspace.count() >= need && (need == 0 || workspace.scalar() == Scalar::F32),
        "scatter_add_rows: workspace"
    );
    let by = 4 * dy.scalar().size() as u64;
    let whole = columns.is_multiple_of(4)
        && (dy.address() | table.address()).is_multiple_of(by)
        && workspace.address().is_multiple_of(16);
    let (pieces, joins) = match (dy.scalar(), whole) {
        (Scalar::F32, false) => ("scatter_pieces_f32", "scatter_joins_f32"),
        (Scalar::F32, true) => ("scatter_pieces_f32_by4", "scatter_joins_f32_by4"),
        (Scalar::Bf16, false) => ("scatter_pieces_bf16", "scatter_joins_bf16"),
        (Scalar::Bf16, true) => ("scatter_pieces_bf16_by4", "scatter_joins_bf16_by4"),
        (found, _) => {
            return Err(Error::Scalar {
                kernel: "scatter rows",
                found,
                expected: "f32 and bf16",
            });
        }
    };
    let width = THREADS as usize * if whole { 4 } else { 1 };
    let across = columns.div_ceil(width) as u32;
    let launch = |blocks: usize| Launch {
        grid: [blocks as u32, across, 1],
        block: [THREADS, 1, 1],
        shared: 0,
    };
    // As many blocks as the index could need, whatever it holds, so that the launches of a step are those of the next.
    let (of_pieces, of_joins) = (
        Scatter::pieces(scatter.positions, scatter.rows),
        Scatter::joins(scatter.positions),
    );
    let at_pieces = scatter.positions;
    let at_joins = at_pieces + 3 * of_pieces;
    let order = numbers.part(0..at_pieces);
    let all_pieces = numbers.part(at_pieces..at_joins);
    gpu.launch(
        "index",
        pieces,
        launch(of_pieces),
        args![dy, order, all_pieces, table.reborrow(), &workspace, columns],
    )?;
    let all_joins = numbers.part(at_joins..at_joins + 3 * of_joins);
    gpu.launch(
        "index",
        joins,
        launch(of_joins),
        args![workspace, all_joins, table, columns],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Runs pieces and joins as the kernels do, on numbers that say what was added in which order.
        #[test]
        fn every_position_is_added_once_and_in_order(
            rows in 1usize..20, picks in prop::collection::vec(0usize..1000, 0..700),
        ) {
            let index: Vec<i64> = picks.iter().map(|p| (p % rows / 2) as i64).collect();
            let s = Scatter::new(&index, rows).unwrap();
            let (order, rest) = s.numbers.split_at(index.len());
            let (pieces, joins) = rest.split_at(3 * Scatter::pieces(index.len(), rows));
            prop_assert_eq!(joins.len(), 3 * Scatter::joins(index.len()));
            let mut table = vec![Vec::new(); rows];
            let mut parts = vec![Vec::new(); Scatter::parts(index.len())];
            let some = |numbers: &&[i32; 3]| numbers[0] < numbers[1];
            for piece in pieces.as_chunks::<3>().0.iter().filter(some) {
                let sum = order[piece[0] as usize..piece[1] as usize].to_vec();
                prop_assert!(!sum.is_empty() && sum.len() <= PIECE);
                let to = match usize::try_from(piece[2]) {
                    Ok(row) => &mut table[row],
                    Err(_) => &mut parts[(-1 - piece[2]) as usize],
                };
                prop_assert!(to.is_empty(), "written once");
                *to = sum;
            }
            for join in joins.as_chunks::<3>().0.iter().filter(some) {
                let to = &mut table[join[2] as usize];
                prop_assert!(to.is_empty(), "written once");
                *to = parts[join[0] as usize..join[1] as usize].concat();
            }
            for (row, found) in table.iter().enumerate() {
                let wanted: Vec<i32> = (0..index.len() as i32)
                    .filter(|&i| index[i as usize] == row as i64)
                    .collect();
                prop_assert_eq!(found, &wanted);
            }
        }
    }
}
