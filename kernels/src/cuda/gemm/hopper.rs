//! Launches of `gemm_hopper.cu`.

use super::plan::{HOPPER_TILE, Operand, Plan};
use super::{Second, Sums, order};
use crate::cuda::launch::args;
use crate::cuda::tensor_map::{TensorMap, tensor_map};
use crate::cuda::{Gpu, Launch, Result, Scalar};

/// k of a stage.
const DEEP: usize = 64;
/// Dynamic shared memory: four stages of both operands; for each of two groups four buffers of 8 KB
/// and a number for each column and row of a tile; barriers.
const SHARED: usize = 4 * (HOPPER_TILE[0] + HOPPER_TILE[1]) * DEEP * 2
    + 2 * ((4 << 13) + (HOPPER_TILE[0] + HOPPER_TILE[1]) * 4)
    + 192;

/// The boxes of an operand of `side` elements beside k, in `batches` matrices.
fn operand_map(
    gpu: &Gpu,
    address: u64,
    x: &Operand,
    [side, depth]: [usize; 2],
    batches: usize,
    tile: usize,
) -> Result<TensorMap> {
    let (dims, box_dims) = match x.along_depth {
        true => ([depth, side], [DEEP, tile]),
        false => ([side, depth], [64, DEEP]),
    };
    // A stride over one element is none; the driver wants one all the same.
    let step = x.step.max(dims[0].next_multiple_of(8));
    let (matrices, batch) = match x.batch {
        0 => (1, step * dims[1]),
        batch => (batches, batch),
    };
    tensor_map(
        gpu,
        address,
        Scalar::Bf16,
        [dims[0], dims[1], matrices],
        [step, batch],
        [box_dims[0], box_dims[1], 1],
    )
}

/// Launches the products of a plan, whose operands are at `a` and `b`. `beside`: a second pair of factors, which lie as
/// these do, beside one product.
pub(super) fn launch(
    gpu: &Gpu,
    plan: &Plan,
    batches: usize,
    [a, b]: [u64; 2],
    beside: Option<&Second>,
    sums: &Sums,
) -> Result<()> {
    let Plan { m, n, k, .. } = *plan;
    let [rows, columns] = HOPPER_TILE;
    let scalar = sums.scalar();
    let left = operand_map(gpu, a, &plan.a, [m, k], batches, rows)?;
    let right = operand_map(gpu, b, &plan.b, [n, k], batches, columns)?;
    let result = |address: u64| {
        if address == 0 || sums.direct(plan, batches) {
            return Ok(left); // not used
        }
        // The matrices of a split follow each other, as those of a batch do.
        let apart = plan.splits == 1 && batches > 1;
        let stride = if apart { sums.c_batch } else { m * n };
        let dims = [n, m, batches * plan.splits];
        let box_dims = [128 / scalar.size(), 64, 1];
        tensor_map(gpu, address, scalar, dims, [n, stride], box_dims)
    };
    let (depth, second) = match beside {
        None => (0, [left, right]), // not used
        Some(Second {
            plan,
            addresses: [a, b],
        }) => {
            let a = operand_map(gpu, *a, &plan.a, [m, plan.k], 1, rows)?;
            let b = operand_map(gpu, *b, &plan.b, [n, plan.k], 1, columns)?;
            (plan.k, [a, b])
        }
    };
    // An activation's argument is written, or read for its slope.
    let maps = [
        left,
        right,
        result(sums.c)?,
        result(sums.pre | sums.slope_of)?,
        second[0],
        second[1],
    ];
    let names = [
        "gemm_hopper_nn",
        "gemm_hopper_nt",
        "gemm_hopper_tn",
        "gemm_hopper_tt",
    ];
    let tasks = plan.path.tiles(m, n) * plan.splits * batches;
    let blocks = tasks.min(gpu.limits().processors);
    let launch = Launch::linear(blocks, 384).with_shared(SHARED);
    let product = sums.product(plan, batches, a, b);
    let maps: &[u8] = bytemuck::cast_slice(&maps);
    let args = args![&product[..], batches, depth, maps];
    gpu.launch("gemm_hopper", names[order(plan)], launch, args)
}
