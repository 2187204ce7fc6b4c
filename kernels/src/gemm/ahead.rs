//! What later work of a product reads, asked for while tiles are summed: a tile lives on what lies in
//! its own caches, and leaves the way to memory idle.
//!
//! These are hints. Which tile gives which, and whether anybody does, changes no result.

use super::pack::Pack;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Lines that a tile asks for: one every [`Ahead::STEPS`] steps.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// May point anywhere.
    pub at: *const i8,
    /// Bytes from a line to the next.
    pub stride: usize,
}

impl Ahead {
    /// Steps of a tile for each line. A block of 384 x 384 with its own depth is asked for by the tiles of
    /// another one so; larger ones have more tiles to the line.
    pub const STEPS: usize = 8;
}

/// A block of memory: rows of lines.
#[derive(Clone, Copy)]
pub(super) struct Source {
    start: *const i8,
    /// Bytes from a row to the next.
    stride: usize,
    rows: usize,
    /// In a row.
    lines: usize,
}

impl Source {
    /// Nothing.
    pub const NONE: Source = Source {
        start: std::ptr::null(),
        stride: 0,
        rows: 0,
        lines: 0,
    };

    /// What will be packed. Elements that have no neighbours are left to packing.
    pub fn of<T: crate::element::Float, K>(pack: &Pack<T, K>) -> Source {
        let (rows, stride, len) = match (pack.stride, pack.k_stride) {
            (stride, 1) => (pack.len, stride, pack.depth),
            (1, stride) => (pack.depth, stride, pack.len),
            _ => return Source::NONE,
        };
        let start: *const i8 = pack.src.cast();
        let bytes = len * size_of::<T>() + start.addr() % LINE;
        Source {
            start,
            stride: stride * size_of::<T>(),
            rows,
            lines: bytes.div_ceil(LINE),
        }
    }
}

/// What the tiles of a task ask for: theirs of what all tasks of a stage ask for together.
#[derive(Clone, Copy)]
pub(super) struct Later {
    pub sources: [Source; 2],
    /// The number of the task's first tile.
    pub tile: usize,
}

impl Later {
    /// For the task's tile `index`, of so many steps; `near`, which is at hand, if there is nothing.
    #[inline(always)]
    pub fn of_tile<R>(&self, index: usize, steps: usize, near: *const R) -> Ahead {
        let each = (steps / Ahead::STEPS).max(1);
        let mut piece = self.tile + index;
        for source in &self.sources {
            let pieces = source.rows.div_ceil(each) * source.lines;
            if piece < pieces {
                // Tiles that follow each other ask for lines that do.
                let (rows, line) = (piece / source.lines, piece % source.lines);
                let at = rows * each * source.stride + line * LINE;
                return Ahead {
                    at: source.start.wrapping_add(at),
                    stride: source.stride,
                };
            }
            piece -= pieces;
        }
        Ahead {
            at: near.cast(),
            stride: 0,
        }
    }
}
