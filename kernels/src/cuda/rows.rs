//! How rows are given to the threads of kernels that build on `rows.cuh`.

use super::pointwise::group;
use super::{Gpu, Launch, Scalar};

/// Elements that a thread has at a time, as in `rows.cuh`.
const GROUP: usize = 4;
/// A row of at most this many groups belongs to one warp,
const WARP_GROUPS: usize = 512;
/// and one of at most this many to 128 threads: the more elements a thread has, the less the sums over
/// threads weigh.
const BLOCK_GROUPS: usize = 2048;
/// Rows of a block whose rows belong to warps.
const WARP_ROWS: u32 = 4;
/// Bytes of shared memory that the sums of `rows.cuh` take, at most.
const SUMS: usize = 1024;

/// Rows of `columns` elements, cut for a launch.
pub(super) struct Rows {
    /// Grid, block and shared memory
    pub launch: Launch,
    /// Whether shared memory keeps the rows
    pub keep: bool,
    /// Columns as kernels take them
    pub columns: i32,
    /// Whether every group of these tensors can be read by one instruction
    pub wide: bool,
}

impl Rows {
    /// Rows of `scalar`, of which the kernel keeps `kept` tensors; `addresses` of all that it reads
    /// and writes in this type, 0 for those that are absent.
    pub fn new(
        gpu: &Gpu,
        scalar: Scalar,
        [rows, columns]: [usize; 2],
        kept: usize,
        addresses: &[u64],
    ) -> Rows {
        let width = i32::try_from(columns).expect("a row has less than 2^31 columns");
        let groups = columns.div_ceil(GROUP);
        let block = if groups <= WARP_GROUPS {
            [32, WARP_ROWS, 1]
        } else if groups <= BLOCK_GROUPS {
            [128, 1, 1]
        } else {
            [512, 1, 1]
        };
        let slots = GROUP * scalar.size() * kept * groups * block[1] as usize;
        let keep = slots + SUMS <= gpu.limits().shared;
        let launch = Launch {
            block,
            ..Launch::linear(rows.div_ceil(block[1] as usize), 1)
        };
        Rows {
            launch: launch.with_shared(if keep { slots } else { 0 }),
            keep,
            columns: width,
            wide: columns.is_multiple_of(GROUP)
                && addresses
                    .iter()
                    .all(|a| a.is_multiple_of((GROUP * scalar.size()) as u64)),
        }
    }
}

/// Whether rows of `columns` elements at these addresses all begin at multiples of 16 bytes.
pub(super) fn wide(scalar: Scalar, columns: usize, addresses: &[u64]) -> bool {
    columns.is_multiple_of(group(scalar)) && addresses.iter().all(|a| a.is_multiple_of(16))
}
