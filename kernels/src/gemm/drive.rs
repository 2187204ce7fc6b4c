//! The loops over blocks around the tasks, and who runs them.

use super::ahead::{Later, Source};
use super::few;
use super::pack::Pack;
use super::plan::{ALIGN, Block, Plan};
use super::right::{Panels, Right};
use super::task::{Pass, Task};
use super::tile::{Kernel, Shape};
use super::{Epilogue, MatRef, Operands};
use crate::element::{Float, same};
use crate::parallel::{Finished, in_lanes};
use crate::shared::Pointer;
use half::bf16;

/// Rows or columns that are packed in a piece, more or less: small, since threads wait for the last one.
const PART: usize = 192;

/// Distance in bytes at which addresses meet in the same lines of the first cache level.
const L1_SETS: usize = 4096;

/// Workspace of one product on one instruction set, in elements.
pub(super) fn workspace<T: Float, K: Kernel>(m: usize, n: usize, k: usize) -> usize {
    let size = size_of::<T::Acc>();
    let steps = k.div_ceil(K::STEP);
    let plan = Plan::new(m, n, steps, K::shape(size), size);
    let areas = plan.areas(steps, !same::<T, T::Acc>());
    let packed = areas.iter().sum::<usize>();
    packed.max(few::workspace(m, steps)) + ALIGN / size
}

/// One product, m, n >= 1; sizes have been checked.
pub(super) fn product<A, B, C, K>(
    kernel: K,
    operands: Operands,
    a: MatRef<A>,
    b: B,
    c: &mut [C],
    accumulate: bool,
    epilogue: Epilogue<C>,
    workspace: &mut [C::Acc],
    parallel: bool,
) where
    A: Float,
    B: Right<Acc = A::Acc>,
    C: Float<Acc = A::Acc>,
    K: Kernel,
{
    let (m, n, k) = (a.rows, b.size().1, a.cols);
    let steps = k.div_ceil(K::STEP);
    let size = size_of::<C::Acc>();
    let shape = K::shape(size);
    let plan = Plan::new(m, n, steps, shape, size);
    let parallel = parallel && plan.parallel;
    let wide = same::<C, C::Acc>();
    let rounds = operands == Operands::Bf16;
    if m <= K::FEW && b.streams::<K>(rounds) {
        few::product(
            kernel, &plan, rounds, a, b, c, accumulate, epilogue, workspace, parallel,
        );
        return;
    }
    let [a_len, b_len, partial_len] = plan.areas(steps, !wide);
    let skip = workspace.as_ptr().align_offset(ALIGN).min(ALIGN / size);
    let (a_pack, rest) = workspace[skip..].split_at_mut(a_len);
    let (b_pack, rest) = rest.split_at_mut(b_len);
    let partial = rest[..partial_len].as_mut_ptr();
    let (a_pack, b_pack) = (a_pack.as_mut_ptr(), b_pack.as_mut_ptr());
    let c = c.as_mut_ptr();
    let in_place = in_place::<A, K>(&a, rounds);
    let pre = epilogue
        .pre_activation
        .map_or(std::ptr::null_mut(), |pre| pre.as_mut_ptr());

    let (c, pre) = (Pointer(c), Pointer(pre));
    let (a_pack, b_pack, partial) = (Pointer(a_pack), Pointer(b_pack), Pointer(partial));
    let (bias, activation) = (epilogue.bias, epilogue.activation);
    let finished = Finished::default();
    let depth = |step: usize| (plan.kb * K::STEP).min(k - step * K::STEP);
    let place = |turn: usize, len: usize| turn % plan.places * (len / plan.places);
    // wrapping_add: with k = 0 there may be no element to point to, and none is read.
    let packed_a = |block: &Block| Pack {
        kernel,
        src: a
            .data
            .as_ptr()
            .wrapping_add(a.at(block.i0, block.step * K::STEP)),
        stride: a.row_stride,
        k_stride: a.col_stride,
        len: block.mb,
        depth: depth(block.step),
        width: shape.mr,
        rounds,
        dst: a_pack.get().wrapping_add(place(block.turns.0, a_len)),
    };
    let packed_b = |block: &Block| Panels {
        kernel,
        from: (block.step * K::STEP, block.j0),
        len: block.nb,
        depth: depth(block.step),
        width: shape.nr,
        rounds,
        dst: b_pack.get().wrapping_add(place(block.turns.1, b_len)),
    };
    let tiles = plan.mt.div_ceil(shape.mr) * plan.nt.div_ceil(shape.nr);
    in_lanes(plan.tasks(), parallel, |claim| {
        let (c, pre) = (c.get(), pre.get());
        let mut piece = claim();
        // Pieces before this stage, and before the last stage of tasks that has begun.
        let (mut begun, mut tasks_begun) = (0, 0);
        let mut blocks = plan.blocks(m, n, steps).peekable();
        while let Some(block) = blocks.next() {
            let Block {
                i0,
                j0,
                step,
                mb,
                nb,
                grid_m,
                grid_n,
                ..
            } = block;
            let (l0, depth) = (step * K::STEP, depth(step));
            let at = i0 * n + j0;
            let (pack_a, panels) = (packed_a(&block), packed_b(&block));
            // While tiles are summed, what the next block packs is asked for; or, of an A that is
            // read in place, the rows that this lane may get next.
            let next = blocks.peek().map_or([Source::NONE; 2], |next| {
                let b_too = next.packs_b.then(|| b.source(packed_b(next)));
                [Source::of(&packed_a(next)), b_too.unwrap_or(Source::NONE)]
            });
            let rows_on = rayon::current_num_threads().div_ceil(grid_n) * plan.mt;
            let later = |row: usize, col: usize| {
                let first = row * plan.mt + rows_on;
                let (sources, row) = if !in_place {
                    (next, row)
                } else if first < mb {
                    let rows = Pack {
                        src: pack_a.src.wrapping_add(first * a.row_stride),
                        len: plan.mt.min(mb - first),
                        ..pack_a
                    };
                    ([Source::of(&rows), Source::NONE], 0)
                } else {
                    ([Source::NONE; 2], 0)
                };
                Later {
                    sources,
                    tile: (row * grid_n + col) * tiles,
                }
            };
            let pass = Pass {
                kernel,
                a: if in_place {
                    pack_a.src.cast()
                } else {
                    pack_a.dst
                },
                b: panels.dst,
                a_stride: if in_place { a.row_stride / K::STEP } else { 0 },
                steps: depth.div_ceil(K::STEP),
                c: c.wrapping_add(at),
                pre: if pre.is_null() {
                    pre
                } else {
                    pre.wrapping_add(at)
                },
                ldc: n,
                partial: if wide {
                    c.wrapping_add(at).cast()
                } else {
                    partial.get()
                },
                ldp: if wide { n } else { plan.nb },
                first: l0 == 0,
                last: l0 + depth == k,
                accumulate,
                bias: bias.map(|bias| &bias[j0..j0 + nb]),
                activation,
            };
            let early = Early::new(&block, !in_place, shape);
            // Packing overwrites what the tasks of the last block but `places` have read. With two places that is
            // finished when the tasks of the last block may begin, for these wait for all before them; so does what
            // comes after them for that.
            let free = if plan.places > 1 { tasks_begun } else { begun };
            while piece < begun + early.count() {
                finished.wait(free);
                match piece - begun {
                    i if i < early.a => pack_a.part(early.a_step, i),
                    i => b.pack(panels, early.b_step, i - early.a),
                }
                finished.add();
                piece = claim();
            }
            begun += early.count();
            tasks_begun = begun;
            // Tasks read what was packed, and add to what those of the last block have summed.
            while piece < begun + grid_m * grid_n {
                finished.wait(begun);
                let (row, col) = ((piece - begun) / grid_n, (piece - begun) % grid_n);
                if !in_place && early.a == 0 {
                    pack_a.part(plan.mt, row);
                }
                if block.packs_b && early.b == 0 {
                    b.pack(panels, plan.nt, col);
                }
                kernel.call(Task {
                    pass: &pass,
                    rows: (row * plan.mt, mb.min((row + 1) * plan.mt)),
                    cols: (col * plan.nt, nb.min((col + 1) * plan.nt)),
                    later: later(row, col),
                });
                finished.add();
                piece = claim();
            }
            begun += grid_m * grid_n;
        }
    });
}

/// How many parts of a block of A, and of B, are packed in a stage before the tasks.
///
/// None where the grid has one row or one column: then the task that alone needs a part packs it,
/// and finds it in its own cache.
struct Early {
    a: usize,
    /// Rows of a part of A.
    a_step: usize,
    b: usize,
    /// Columns of a part of B.
    b_step: usize,
}

impl Early {
    fn new(block: &Block, packs_a: bool, shape: Shape) -> Early {
        let Block { grid_m, grid_n, .. } = *block;
        let part = |panel: usize| (PART / panel).max(1) * panel;
        let a_step = part(shape.mr);
        let a = match packs_a && grid_n > 1 {
            true => block.mb.div_ceil(a_step),
            false => 0,
        };
        let b_step = part(shape.nr);
        let b = match (grid_m, grid_n) {
            _ if !block.packs_b => 0,
            (1, 2..) => 0,
            _ => block.nb.div_ceil(b_step),
        };
        Early {
            a,
            a_step,
            b,
            b_step,
        }
    }

    fn count(&self) -> usize {
        self.a + self.b
    }
}

/// Whether tiles read A where it is: its steps lie side by side, as they would be packed, in rows
/// that do not compete for the same lines of the first cache level.
fn in_place<A: Float, K: Kernel>(a: &MatRef<A>, rounds: bool) -> bool {
    let stride = a.row_stride * size_of::<A>();
    let as_packed = match K::STEP {
        1 => same::<A, f32>() && !rounds,
        _ => same::<A, bf16>(),
    };
    K::ROWS
        && as_packed
        && a.col_stride == 1
        && a.cols.is_multiple_of(K::STEP)
        && a.row_stride.is_multiple_of(K::STEP)
        && a.row_stride > 0
        && !stride.is_multiple_of(L1_SETS)
}
