//! The loops over blocks around the tasks, and who runs them.

use super::few;
use super::pack::Pack;
use super::plan::{ALIGN, Block, Plan};
use super::right::{Panels, Right};
use super::task::{Pass, Task};
use super::tile::Kernel;
use super::{Epilogue, MatRef, Operands};
use crate::element::{Float, same};
use crate::parallel::{Finished, in_lanes};
use crate::shared::Pointer;
use half::bf16;

/// Distance in bytes at which addresses meet in the same lines of the first cache level.
const L1_SETS: usize = 4096;

/// Workspace of one product on one instruction set, in elements.
pub(super) fn workspace<T: Float, K: Kernel>(m: usize, n: usize, k: usize) -> usize {
    let size = size_of::<T::Acc>();
    let steps = k.div_ceil(K::STEP);
    let plan = Plan::new(m, n, steps, K::shape(size));
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
    let plan = Plan::new(m, n, steps, shape);
    let parallel = parallel && plan.parallel;
    let wide = same::<C, C::Acc>();
    let rounds = operands == Operands::Bf16;
    if m <= few::FEW && b.streams::<K>(rounds) {
        few::product(
            kernel, &plan, a, b, c, accumulate, epilogue, workspace, parallel,
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
    in_lanes(plan.tasks(), parallel, |claim| {
        let (c, pre) = (c.get(), pre.get());
        let mut piece = claim();
        let mut begun = 0;
        for block in plan.blocks(m, n, steps) {
            let Block {
                i0,
                j0,
                step,
                mb,
                nb,
                grid_m,
                grid_n,
            } = block;
            let l0 = step * K::STEP;
            let depth = (plan.kb * K::STEP).min(k - l0);
            let at = i0 * n + j0;
            // wrapping_add: with k = 0 there may be no element to point to, and none is read.
            let pack_a = Pack {
                kernel,
                src: a
                    .data
                    .as_ptr()
                    .wrapping_add(i0 * a.row_stride + l0 * a.col_stride),
                stride: a.row_stride,
                k_stride: a.col_stride,
                len: mb,
                depth,
                width: shape.mr,
                rounds,
                dst: a_pack.get(),
            };
            let panels = Panels {
                kernel,
                from: (l0, j0),
                len: nb,
                depth,
                width: shape.nr,
                rounds,
                dst: b_pack.get(),
            };
            let pass = Pass {
                kernel,
                a: if in_place {
                    pack_a.src.cast()
                } else {
                    a_pack.get()
                },
                b: b_pack.get(),
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
            let early = Early::new(&plan, &block, !in_place, shape.nr);
            // A stage begins when all that comes before it is finished: it reads what was packed,
            // or its packing overwrites what was read.
            while piece < begun + early.count() {
                finished.wait(begun);
                match piece - begun {
                    i if i < early.a => pack_a.part(plan.mt, i),
                    i => b.pack(panels, early.b_step, i - early.a),
                }
                finished.add();
                piece = claim();
            }
            begun += early.count();
            while piece < begun + grid_m * grid_n {
                finished.wait(begun);
                let (row, col) = ((piece - begun) / grid_n, (piece - begun) % grid_n);
                if !in_place && early.a == 0 {
                    pack_a.part(plan.mt, row);
                }
                if early.b == 0 {
                    b.pack(panels, plan.nt, col);
                }
                kernel.call(Task {
                    pass: &pass,
                    rows: (row * plan.mt, mb.min((row + 1) * plan.mt)),
                    cols: (col * plan.nt, nb.min((col + 1) * plan.nt)),
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
    b: usize,
    /// Columns of a part of B.
    b_step: usize,
}

impl Early {
    fn new(plan: &Plan, block: &Block, packs_a: bool, panel: usize) -> Early {
        let Block { grid_m, grid_n, .. } = *block;
        let a = if packs_a && grid_n > 1 { grid_m } else { 0 };
        // A B of one task would be packed by one thread while the others wait: in panels instead.
        let (b_step, b) = match (grid_m, grid_n) {
            (1, 1) => (plan.nt, 1),
            (_, 1) => (panel, block.nb.div_ceil(panel)),
            (1, _) => (plan.nt, 0),
            _ => (plan.nt, grid_n),
        };
        Early { a, b, b_step }
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
