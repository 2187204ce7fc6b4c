//! Launches of `gemm_hopper.cu`.

use super::plan::{HOPPER_TILE, Operand, Plan};
use super::{Sums, order};
use crate::cuda::launch::args;
use crate::cuda::tensor_map::{TensorMap, tensor_map};
use crate::cuda::{Gpu, Launch, Result, Scalar};

/// k of a stage.
const DEEP: usize = 64;
/// Dynamic shared memory: four stages of both operands, four buffers of 8 KB for each of two groups,
/// barriers.
const SHARED: usize = 4 * (HOPPER_TILE[0] + HOPPER_TILE[1]) * DEEP * 2 + (8 << 13) + 128;

/// The boxes of an operand of `side` elements beside k, in `batches` matrices. Blocks of a cluster
/// share its load.
fn operand_map(
    address: u64,
    x: &Operand,
    [side, depth]: [usize; 2],
    batches: usize,
    tile: usize,
    cluster: usize,
) -> Result<TensorMap> {
    let (dims, box_dims) = match x.along_depth {
        true => ([depth, side], [DEEP, tile / cluster]),
        false => ([side, depth], [64, DEEP / cluster]),
    };
    // A stride over one element is none; the driver wants one all the same.
    let step = x.step.max(dims[0].next_multiple_of(8));
    let (matrices, batch) = match x.batch {
        0 => (1, step * dims[1]),
        batch => (batches, batch),
    };
    tensor_map(
        address,
        Scalar::Bf16,
        [dims[0], dims[1], matrices],
        [step, batch],
        [box_dims[0], box_dims[1], 1],
    )
}

/// Launches the products of a plan, whose operands are at `a` and `b`.
pub(super) fn launch(
    gpu: &Gpu,
    plan: &Plan,
    batches: usize,
    cluster: usize,
    a: u64,
    b: u64,
    sums: &Sums,
) -> Result<()> {
    let Plan { m, n, k, .. } = *plan;
    let [rows, columns] = HOPPER_TILE;
    let scalar = if sums.wide { Scalar::F32 } else { Scalar::Bf16 };
    let result = |address: u64| {
        // The matrices of a split follow each other, as those of a batch do.
        let apart = plan.splits == 1 && batches > 1;
        let stride = if apart { sums.c_batch } else { m * n };
        let dims = [n, m, batches * plan.splits];
        let box_dims = [128 / scalar.size(), 64, 1];
        tensor_map(address, scalar, dims, [n, stride], box_dims)
    };
    let maps = [
        operand_map(a, &plan.a, [m, k], batches, rows, 1)?,
        operand_map(b, &plan.b, [n, k], batches, columns, cluster)?,
        result(sums.c)?,
        result(if sums.pre == 0 { sums.c } else { sums.pre })?,
    ];
    let names = [
        [
            "gemm_hopper_nn",
            "gemm_hopper_nt",
            "gemm_hopper_tn",
            "gemm_hopper_tt",
        ],
        [
            "gemm_hopper_pair_nn",
            "gemm_hopper_pair_nt",
            "gemm_hopper_pair_tn",
            "gemm_hopper_pair_tt",
        ],
    ];
    let name = names[cluster - 1][order(plan)];
    let tasks = plan.path.tiles(m, n) * plan.splits * batches;
    let clusters = tasks.min(gpu.limits().processors / cluster);
    let launch = Launch::linear(clusters * cluster, 384).with_shared(SHARED);
    let product = sums.product(plan, a, b);
    let maps: &[u8] = bytemuck::cast_slice(&maps);
    gpu.launch(
        "gemm_hopper",
        name,
        launch,
        args![&product[..], batches, maps],
    )
}
