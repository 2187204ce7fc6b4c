//! How the work is cut: by the sizes alone. Lanes are pieces of workspace; whichever is free takes
//! the next task, and a task's result does not depend on the lane that ran it.

use super::Attention;
use super::tile::{COLS, ROWS, WIDEST};
use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Keys of a block. With 64 dimensions K and V of a block take 64 KiB of a core's second cache
/// level, and each sum passes through memory once per 128 products.
pub(super) const KEYS: usize = 128;
/// Queries whose scores are in work at the same time: 128 keys of them fill 16 KiB.
pub(super) const STRIP: usize = 32;
/// Queries of a task of the forward pass: packing and transposing a block of keys is shared by
/// so many, and a long sequence gives enough tasks to share out.
pub(super) const QUERIES: usize = 256;
/// At most so many lanes, hence threads.
const LANES: usize = 32;
/// Batches of tasks for each lane, if there are so many tasks, and tasks of a batch at most: enough
/// batches that all threads end at about the same time.
const BATCHES: usize = 4;
const MOST: usize = 8;
/// Fewer multiply-adds than this stay on the calling thread.
const PARALLEL: usize = 1 << 18;
/// Alignment of workspaces, in bytes: a cache line.
const ALIGN: usize = 64;

/// Sizes of the blocks.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// Dimensions of a head, the same padded to whole tiles, and to whole panels.
    pub dim: usize,
    pub padded: usize,
    pub wide: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Keys of a block; a multiple of the widest panel.
    pub keys: usize,
    /// Queries of a task and of a strip; multiples of [`ROWS`].
    pub queries: usize,
    pub strip: usize,
    /// Pieces of workspace.
    pub lanes: usize,
    /// Tasks that a lane takes at a time, one after the other: it can ask for the operands of the
    /// next while it computes, and heads that lie side by side share lines of memory.
    batch: usize,
}

/// Where a task is: its sequence's first token and length, and which of the sequence's tasks it is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub start: usize,
    pub len: usize,
    pub task: usize,
}

impl Plan {
    /// For tasks of some queries of one head.
    pub fn forward(p: &Attention, offsets: &[i64]) -> Plan {
        Plan::new(p, offsets, |len| len.div_ceil(QUERIES) * p.heads)
    }

    /// For tasks of one key head: fewer lanes where there are few, because each holds sums for
    /// all queries of a sequence.
    pub fn backward(p: &Attention, offsets: &[i64]) -> Plan {
        Plan::new(p, offsets, |len| len.min(1) * p.kv_heads)
    }

    /// `tasks(len)` is the number of tasks of a sequence.
    fn new(p: &Attention, offsets: &[i64], tasks: impl Fn(usize) -> usize) -> Plan {
        let lengths = || offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize);
        let longest = lengths().max().unwrap_or(0);
        let cost = |len: usize| len * p.window.map_or(len, |w| len.min(w.saturating_mul(2)));
        let products = lengths().map(cost).sum::<usize>() * p.heads * p.head_dim;
        let tasks = lengths().map(tasks).sum::<usize>();
        Plan {
            dim: p.head_dim,
            padded: p.head_dim.next_multiple_of(COLS),
            wide: p.head_dim.next_multiple_of(WIDEST),
            longest,
            keys: KEYS.min(longest.next_multiple_of(WIDEST)),
            queries: QUERIES.min(longest.next_multiple_of(ROWS)),
            strip: STRIP.min(longest.next_multiple_of(ROWS)),
            lanes: if products < PARALLEL {
                1
            } else {
                tasks.clamp(1, LANES)
            },
            batch: (tasks / (BATCHES * LANES)).clamp(1, MOST),
        }
    }

    /// Elements of a workspace whose lanes have `each`, which is a multiple of [`COLS`].
    pub fn workspace(&self, each: usize) -> usize {
        if self.longest == 0 {
            0
        } else {
            self.lanes * each + ALIGN / 4
        }
    }

    /// Runs `work(workspace, place, next)` for every task, of which a sequence has `tasks(len)`, with
    /// the workspace of the lane and the place of the task that follows in the same lane, if that
    /// is known.
    pub fn run<R: Send>(
        &self,
        workspace: &mut [R],
        each: usize,
        offsets: &[i64],
        tasks: impl Fn(usize) -> usize + Sync,
        work: impl Fn(&mut [R], Place, Option<Place>) + Sync,
    ) {
        let next = AtomicUsize::new(0);
        let lane = |workspace: &mut [R]| {
            let mut cursor = Cursor::new(offsets);
            loop {
                let first = next.fetch_add(self.batch, Ordering::Relaxed);
                let Some(mut place) = cursor.find(first, &tasks) else {
                    break;
                };
                for task in first + 1..first + self.batch {
                    let Some(next) = cursor.find(task, &tasks) else {
                        break;
                    };
                    work(workspace, place, Some(next));
                    place = next;
                }
                work(workspace, place, None);
            }
        };
        let slack = ALIGN / size_of::<R>();
        let skip = workspace.as_ptr().align_offset(ALIGN).min(slack);
        let workspace = &mut workspace[skip..][..self.lanes * each];
        if self.lanes == 1 {
            lane(workspace);
        } else {
            workspace
                .par_chunks_exact_mut(each)
                .with_max_len(1)
                .for_each(lane);
        }
    }
}

/// Walks through the sequences as the numbers of tasks rise.
struct Cursor<'a> {
    offsets: &'a [i64],
    sequence: usize,
    /// The first task of the sequence.
    base: usize,
}

impl<'a> Cursor<'a> {
    fn new(offsets: &'a [i64]) -> Self {
        Cursor {
            offsets,
            sequence: 0,
            base: 0,
        }
    }

    /// Where task `task` is, if there is one.
    fn find(&mut self, task: usize, tasks: &impl Fn(usize) -> usize) -> Option<Place> {
        while self.sequence + 1 < self.offsets.len() {
            let start = self.offsets[self.sequence] as usize;
            let len = self.offsets[self.sequence + 1] as usize - start;
            let count = tasks(len);
            if task < self.base + count {
                return Some(Place {
                    start,
                    len,
                    task: task - self.base,
                });
            }
            self.base += count;
            self.sequence += 1;
        }
        None
    }
}

/// Cuts pieces off the front of a workspace.
pub(super) fn take<'a, R>(rest: &mut &'a mut [R], len: usize) -> &'a mut [R] {
    let (piece, tail) = std::mem::take(rest).split_at_mut(len);
    *rest = tail;
    piece
}
