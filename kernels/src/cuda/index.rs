//! Launchers of `index.cu`.

use super::launch::args;
use super::{Error, Gpu, Launch, Result, Scalar, Slice, SliceMut};

/// Rows of a block that gathers, each with a warp.
const WARPS: usize = 8;
/// Threads of a block that scatters.
const THREADS: u32 = 128;
/// Threads of the block that sorts.
const SORTERS: u32 = 1024;
/// Positions of a piece, as in the source: so many rows are added up one after the other.
pub const PIECE: usize = 64;

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

/// How the rows of a gradient are added up to the rows of a table: positions sorted by row, cut into pieces that blocks of a
/// GPU sum. Nothing of it depends on what the index holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scatter {
    positions: usize,
    rows: usize,
}

impl Scatter {
    /// For an index of so many positions, each of whose numbers lies in `0..rows`.
    ///
    /// # Errors
    /// An index of 2^30 positions or more, a table of 2^31 rows or more.
    pub fn new(positions: usize, rows: usize) -> Result<Scatter> {
        if positions >= 1 << 30 || rows >= i32::MAX as usize {
            return Err(Error::Unsupported {
                kernel: "scatter rows",
                what: format!("{positions} positions over {rows} rows are too many"),
            });
        }
        Ok(Scatter { positions, rows })
    }

    /// Numbers (i32) that [`order_rows`] writes: positions of the index by row, those of a row in order; then room for as
    /// many pieces and joins as so many positions can have, of three numbers each: see the source; zeros are none.
    pub fn numbers(&self) -> usize {
        self.positions + 3 * (self.pieces() + Scatter::joins(self.positions))
    }

    /// Elements of four bytes of workspace for [`order_rows`].
    pub fn order_workspace(&self) -> usize {
        3 * self.positions
    }

    /// The most pieces that the positions over the rows have.
    pub fn pieces(&self) -> usize {
        self.positions.min(self.rows) + Scatter::parts(self.positions)
    }

    /// The most parts that so many positions have: rows of at least PIECE + 1 positions have two
    /// parts for that many, or fewer for each.
    pub fn parts(positions: usize) -> usize {
        2 * positions / (PIECE + 1)
    }

    /// The most rows that so many positions cut into parts.
    pub fn joins(positions: usize) -> usize {
        Scatter::parts(positions) / 2
    }

    /// Elements (f32) of workspace for [`scatter_add_rows`], whatever the index holds.
    pub fn workspace(positions: usize, columns: usize) -> usize {
        Scatter::parts(positions) * columns
    }
}

/// Sorts the positions of `index` (i64) by row, into `numbers` of [`Scatter::numbers`] elements of four bytes; workspace of
/// [`Scatter::order_workspace`]. The caller has checked the index.
///
/// # Errors
/// A failed launch.
///
/// # Panics
/// If lengths or types do not fit.
pub fn order_rows(
    gpu: &Gpu,
    scatter: &Scatter,
    index: Slice<'_>,
    numbers: SliceMut<'_>,
    workspace: SliceMut<'_>,
) -> Result<()> {
    assert_eq!(
        (index.count(), index.scalar()),
        (scatter.positions, Scalar::I64),
        "order_rows: index"
    );
    assert_eq!(
        (numbers.count(), numbers.scalar().size()),
        (scatter.numbers(), 4),
        "order_rows: numbers"
    );
    assert!(
        workspace.count() >= scatter.order_workspace() && workspace.scalar().size() == 4,
        "order_rows: workspace"
    );
    if scatter.positions == 0 {
        return Ok(()); // and no numbers
    }
    // Of the largest row that there can be; of one row too, a pass makes the order.
    let bits = (usize::BITS - (scatter.rows - 1).leading_zeros()).max(1);
    let args = args![
        index,
        scatter.positions as u32,
        bits,
        numbers,
        scatter.pieces() as u32,
        Scatter::joins(scatter.positions) as u32,
        workspace
    ];
    gpu.launch("index", "order_rows", Launch::linear(1, SORTERS), args)
}

/// Adds the rows of `dy [positions, columns]` up in the rows of `table [rows, columns]` that they came
/// from, in f32 and in the order of the index; rows to which none belongs are left as they are.
/// `numbers`: what [`order_rows`] wrote; workspace of [`Scatter::workspace`].
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
        (numbers.count(), numbers.scalar().size()),
        (scatter.numbers(), 4),
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
    let (of_pieces, of_joins) = (scatter.pieces(), Scatter::joins(scatter.positions));
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
