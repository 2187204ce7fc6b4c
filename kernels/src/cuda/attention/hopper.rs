//! Launchers of `attention_forward_hopper.cu` and `attention_backward_hopper.cu`.

use super::backward::Pass;
use super::{Kind, Offsets, Rows, options};
use crate::attention::Attention;
use crate::cuda::environment::named;
use crate::cuda::launch::args;
use crate::cuda::tensor_map::{TensorMap, tensor_map};
use crate::cuda::{Gpu, Launch, Result, Scalar, Slice, SliceMut, Target};

/// Rows that belong to a task of the backward pass.
const OWN: usize = 128;
/// Dynamic shared memory.
const SHARED: usize = 225 << 10;

/// Places for the numbers of each row of each sequence, padded.
fn padded(tokens: usize, sequences: usize) -> usize {
    (tokens + OWN * sequences) / OWN * OWN
}

/// Workspace of these kernels, in f32: two numbers for each row of each head.
pub(super) fn workspace(p: &Attention, tokens: usize, sequences: usize) -> usize {
    2 * p.heads * padded(tokens, sequences)
}

/// Whether the variable GRAFT_ATTENTION allows these kernels: it is `auto`, or not there, and not
/// `general`.
fn allowed() -> Result<bool> {
    let read = |name: &str| match name {
        "auto" => Some(true),
        "general" => Some(false),
        _ => None,
    };
    Ok(named("GRAFT_ATTENTION", "auto or general", read)?.unwrap_or(true))
}

/// Whether the kernels of the backward pass take what tensor cores do: heads of 64 or 128 dimensions
/// without a cap of scores, those of 128 without dropout. The forward pass takes none with dropout:
/// there the other kernel, of which two blocks share a multiprocessor, is faster.
pub(super) fn takes(gpu: &Gpu, p: &Attention, offsets: &Offsets<'_>, kind: &Kind) -> Result<bool> {
    let heads = match p.head_dim {
        64 => true,
        128 => p.dropout == 0.0,
        _ => false,
    };
    let rows = padded(offsets.tokens(), offsets.sequences());
    Ok(heads
        && offsets.tokens() > 0
        && p.softcap.is_none()
        && matches!(kind, Kind::Tensor(_))
        && gpu.limits().target == Target::Sm90a
        && i32::try_from(rows).is_ok()
        && allowed()?)
}

/// Boxes of `rows` rows and 64 dimensions of an operand of so many heads.
fn operand(gpu: &Gpu, x: Rows<'_>, tokens: usize, width: usize, rows: usize) -> Result<TensorMap> {
    tensor_map(
        gpu,
        x.data.address(),
        Scalar::Bf16,
        [width, tokens, 1],
        [x.row_stride, x.row_stride * tokens],
        [64, rows, 1],
    )
}

/// A block on each multiprocessor, if there are as many tasks: two or three warpgroups that multiply
/// `own` rows, and one that lets the copy engine load.
fn persistent(gpu: &Gpu, tasks: usize, own: usize) -> Launch {
    let threads = (2 * own + 128) as u32;
    Launch::linear(tasks.min(gpu.limits().processors), threads).with_shared(SHARED)
}

/// The forward pass.
pub(super) fn forward(
    gpu: &Gpu,
    p: &Attention,
    offsets: Offsets<'_>,
    [q, k, v]: [Rows<'_>; 3],
    out: SliceMut<'_>,
    lse: Option<SliceMut<'_>>,
) -> Result<()> {
    let tokens = offsets.tokens();
    let (width, kv_width) = (p.heads * p.head_dim, p.kv_heads * p.head_dim);
    // As the source says.
    let (name, own) = match p.head_dim {
        64 => ("attention_hopper_64", 192),
        _ => ("attention_hopper_128", 128),
    };
    let longest = offsets.longest();
    let blocks = longest.div_ceil(own);
    let tasks = blocks * offsets.sequences() * p.heads;
    let maps = [
        operand(gpu, q, tokens, width, own)?,
        operand(gpu, k, tokens, kv_width, 128)?,
        operand(gpu, v, tokens, kv_width, 128)?,
        [0; 16],
        [0; 16],
    ];
    let options = options(p, longest, blocks);
    let args = args![
        offsets.device,
        out,
        lse,
        tokens,
        tasks as u32,
        &options[..],
        bytemuck::cast_slice::<TensorMap, u8>(&maps)
    ];
    let launch = persistent(gpu, tasks, own);
    gpu.launch("attention_forward_hopper", name, launch, args)
}

impl Pass<'_> {
    /// The gradients that are asked for.
    pub(super) fn hopper(
        &self,
        out: Slice<'_>,
        workspace: Slice<'_>,
        [dq, dk, dv]: [Option<SliceMut<'_>>; 3],
    ) -> Result<()> {
        let Pass {
            gpu, p, offsets, ..
        } = *self;
        let (tokens, sequences, dims) = (offsets.tokens(), offsets.sequences(), p.head_dim);
        let padded = padded(tokens, sequences);
        let rows = p.heads * padded;
        let [lse2, dots] = [0..rows, rows..2 * rows].map(|range| workspace.part(range));
        let longest = offsets.longest();
        let blocks = longest.div_ceil(OWN);
        let options = options(p, longest, blocks);
        let [q, k, v] = self.inputs;
        let (width, kv_width) = (p.heads * dims, p.kv_heads * dims);
        let [out, dout] = [out, self.dout].map(|data| Rows {
            data,
            row_stride: width,
        });
        // Of queries and of keys, as many as the sources say for this pass.
        let maps = |queries: usize, keys: usize| -> Result<[TensorMap; 5]> {
            Ok([
                operand(gpu, q, tokens, width, queries)?,
                operand(gpu, k, tokens, kv_width, keys)?,
                operand(gpu, v, tokens, kv_width, keys)?,
                operand(gpu, dout, tokens, width, queries)?,
                operand(gpu, out, tokens, width, queries)?,
            ])
        };
        let pass = |name, heads: usize, maps: [TensorMap; 5], to: [u64; 2]| {
            let tasks = blocks * sequences * heads;
            let [first, second] = to;
            let args = args![
                offsets.device,
                self.lse,
                tokens,
                lse2,
                dots,
                padded,
                tasks as u32,
                first,
                second,
                &options[..],
                bytemuck::cast_slice::<TensorMap, u8>(&maps)
            ];
            let launch = persistent(gpu, tasks, OWN);
            gpu.launch("attention_backward_hopper", name, launch, args)
        };
        let dropped = p.dropout > 0.0;
        let address = |x: &Option<SliceMut<'_>>| x.as_ref().map_or(0, SliceMut::address);
        // This one makes the numbers of rows, whether or not its gradients are wanted.
        let name = match (dims, dropped) {
            (64, false) => "attention_hopper_queries_64",
            (64, true) => "attention_hopper_queries_64_drop",
            _ => "attention_hopper_queries_128",
        };
        pass(name, p.heads, maps(OWN, 128)?, [address(&dq), 0])?;
        if dk.is_some() || dv.is_some() {
            let (name, queries) = match (dims, dropped) {
                (64, false) => ("attention_hopper_keys_64", 128),
                (64, true) => ("attention_hopper_keys_64_drop", 128),
                _ => ("attention_hopper_keys_128", 64),
            };
            let to = [address(&dk), address(&dv)];
            pass(name, p.kv_heads, maps(queries, OWN)?, to)?;
        }
        Ok(())
    }
}
