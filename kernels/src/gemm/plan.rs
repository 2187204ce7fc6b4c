//! How a product is cut into blocks: by its sizes and the register tile alone.
//!
//! ```text
//! for columns in blocks of nb              B block: kb x nb, packed, in the last cache level
//!   for rows in blocks of mb               A block: mb x kb, packed, in the last cache level
//!     for k in blocks of kb
//!       pack A and B, in parallel
//!       for tasks of mt x nt, in parallel  A: mt x kb, in a core's second level
//!         for panels of NR columns         B: kb x NR, first level, re-read from the second
//!           for panels of MR rows          MR x NR sums in registers
//! ```
//!
//! The order in which an element of C is summed depends on kb, hence on k, and on nothing else.
//!
//! k is counted in steps of the tile: one element, or two where bf16 is multiplied in pairs.

use super::tile::Shape;

/// Bounds on mb and nb: as large as the packed blocks (3 MiB each) fit a shared last level.
/// Packing an element costs about as much as 20 multiply-adds of the tile and is repaid 2048 times.
const OUTER: usize = 2048;
/// Rows of a task at most, in panels of A.
const TASK_PANELS_M: usize = 16;
/// Columns of a task at most, in panels of B.
const TASK_PANELS_N: usize = 16;
/// Split further until there are so many tasks, so that many cores stay busy to the end...
const TASKS: usize = 32;
/// ...unless tasks would get smaller than this (multiply-adds, about 10 µs).
const TASK_COST: usize = 1 << 20;
/// Whole products below this cost run on the calling thread.
const PARALLEL_COST: usize = 1 << 18;
/// Packed blocks of A and B up to so many bytes have two places: with larger ones, what threads wait for each other
/// between blocks is little beside the tasks.
const TWICE: usize = 2 << 20;
/// Packed panels begin at a multiple of this many bytes.
pub(super) const ALIGN: usize = 64;

/// Block sizes of one product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Rows, columns and depth of the outer blocks.
    pub mb: usize,
    pub nb: usize,
    pub kb: usize,
    /// Rows and columns of a task; multiples of the register tile.
    pub mt: usize,
    pub nt: usize,
    /// Whether it is worth waking other threads.
    pub parallel: bool,
    /// Places for packed blocks: with two, a block is packed while the tasks of the one before still run.
    pub places: usize,
}

/// `mb` rows from i0 and `nb` columns from j0, over the block of k that begins with `step`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// Numbers of its packed A and B. A B of all of k serves all blocks of rows.
    pub turns: (usize, usize),
    /// Whether B is packed for it, rather than for a block before.
    pub packs_b: bool,
    pub i0: usize,
    pub j0: usize,
    pub step: usize,
    pub mb: usize,
    pub nb: usize,
    /// Rows and columns of tasks.
    pub grid_m: usize,
    pub grid_n: usize,
}

/// Equal parts of `len`, as few as `most` allows, each a multiple of `unit`; at least `unit`.
fn part(len: usize, most: usize, unit: usize) -> usize {
    len.div_ceil(len.div_ceil(most).max(1))
        .next_multiple_of(unit)
        .max(unit)
}

impl Plan {
    /// For `[m, k] · [k, n]`, k in steps, packed in numbers of `size` bytes.
    pub fn new(m: usize, n: usize, k: usize, shape: Shape, size: usize) -> Self {
        // Multiples of 16 keep the transposing loads of every block whole.
        let kb = part(k, shape.depth, 16).min(k);
        let mb = part(m, OUTER, shape.mr);
        let nb = part(n, OUTER, shape.nr);
        let mut mt = part(mb, TASK_PANELS_M * shape.mr, shape.mr);
        let mut nt = part(nb, TASK_PANELS_N * shape.nr, shape.nr);
        // Packing counts as much as 16 more rows or columns.
        let cost = |mt: usize, nt: usize| (mt * nt + 16 * (mt + nt)) * kb;
        while mb.div_ceil(mt) * nb.div_ceil(nt) < TASKS && cost(mt, nt) > 2 * TASK_COST {
            let tall = mt > 8 * shape.mr || nt == shape.nr;
            let (x, unit) = if tall {
                (&mut mt, shape.mr)
            } else {
                (&mut nt, shape.nr)
            };
            if *x == unit {
                break;
            }
            *x = x.div_ceil(2).next_multiple_of(unit);
        }
        let parallel = cost(mb, nb) > PARALLEL_COST;
        let several = m > mb || n > nb || k > kb;
        let places = if several && (mb + nb) * kb * size <= TWICE {
            2
        } else {
            1
        };
        Self {
            mb,
            nb,
            kb,
            mt,
            nt,
            parallel,
            places,
        }
    }

    /// Tasks of a whole block.
    pub fn tasks(&self) -> usize {
        self.mb.div_ceil(self.mt) * self.nb.div_ceil(self.nt)
    }

    /// The blocks of `[m, k] · [k, n]`, k in steps, in the order in which they are computed. There
    /// is one even if k is 0: it writes the zeros and the bias.
    pub fn blocks(self, m: usize, n: usize, k: usize) -> impl Iterator<Item = Block> {
        let Plan { mb, nb, kb, .. } = self;
        let starts = (0..n).step_by(nb).flat_map(move |j0| {
            let rows = (0..m).step_by(mb);
            rows.flat_map(move |i0| (0..k.max(1)).step_by(kb.max(1)).map(move |l| (i0, j0, l)))
        });
        starts.enumerate().map(move |(turn, (i0, j0, step))| {
            let whole = k <= kb;
            let (mb, nb) = (mb.min(m - i0), nb.min(n - j0));
            Block {
                turns: (turn, if whole { j0 / self.nb } else { turn }),
                packs_b: !whole || i0 == 0,
                i0,
                j0,
                step,
                mb,
                nb,
                grid_m: mb.div_ceil(self.mt),
                grid_n: nb.div_ceil(self.nt),
            }
        })
    }

    /// Elements of packed A, of packed B, and of sums between blocks of k (for short types).
    pub fn areas(&self, k: usize, short: bool) -> [usize; 3] {
        let partial = if short && k > self.kb {
            self.mb * self.nb
        } else {
            0
        };
        let packed = |rows: usize| (rows * self.kb).next_multiple_of(ALIGN) * self.places;
        [packed(self.mb), packed(self.nb), partial]
    }
}
