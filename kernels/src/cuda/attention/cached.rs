//! Launchers of `attention_cached.cu`.

use super::{Kept, Offsets, Rows, THREADS, check, forward, inputs, most, options, supported};
use crate::attention::Attention;
use crate::cuda::launch::args;
use crate::cuda::{Gpu, Launch, Result, Scalar, SliceMut};

/// Keys that a block of the kernel has in work, and heads.
const CHUNK: usize = 128;
const HEADS: usize = 4;
/// With more queries of one sequence than this, kept keys are read by the forward pass's kernel.
const FEW: usize = 4;
/// So many blocks fill any device.
const ENOUGH: usize = 1024;

/// How kept keys are shared out among blocks: parts, and keys of each. Where one sequence has many
/// queries, the forward pass's kernel reads them: no parts.
fn parts(p: &Attention, offsets: &[i64], kept: crate::attention::Kept<'_>) -> (usize, usize) {
    let queries = offsets.last().map_or(0, |&last| last as usize);
    if offsets
        .windows(2)
        .any(|pair| pair[1] - pair[0] > FEW as i64)
    {
        return (0, 0);
    }
    let longest = most(kept.lengths).max(1);
    let blocks = queries * p.kv_heads * (p.heads / p.kv_heads).div_ceil(HEADS);
    let wanted = ENOUGH.div_ceil(blocks.max(1)).min(longest.div_ceil(CHUNK));
    let span = longest.div_ceil(wanted).next_multiple_of(CHUNK);
    (longest.div_ceil(span), span)
}

/// Workspace of [`attention_cached`], in f32.
pub fn attention_cached_workspace(
    p: &Attention,
    offsets: &[i64],
    kept: crate::attention::Kept<'_>,
) -> usize {
    let queries = offsets.last().map_or(0, |&last| last as usize);
    queries * p.heads * parts(p, offsets, kept).0 * (p.head_dim + 2)
}

/// Causal attention of the last tokens of each sequence, as [`crate::attention::attention_cached`].
///
/// # Errors
/// As [`attention`](super::attention).
///
/// # Panics
/// If the sizes do not fit each other.
pub fn attention_cached(
    gpu: &Gpu,
    p: &Attention,
    offsets: Offsets<'_>,
    kept: Kept<'_>,
    [q, k, v]: [Rows<'_>; 3],
    out: SliceMut<'_>,
    workspace: SliceMut<'_>,
) -> Result<()> {
    let (who, tokens) = ("attention cached", offsets.tokens());
    offsets.check(who);
    let ends = kept.host.starts.iter().zip(kept.host.lengths);
    let rows = ends.map(|(start, length)| (start + length) as usize).max();
    let rows = rows.unwrap_or(0);
    let operands = [
        ("q", &q, tokens, p.heads),
        ("k", &k, rows, p.kv_heads),
        ("v", &v, rows, p.kv_heads),
    ];
    check(who, p, operands);
    assert!(
        p.causal && p.dropout == 0.0,
        "{who}: attention is causal and without dropout"
    );
    let counts = offsets.host.windows(2).map(|pair| pair[1] - pair[0]);
    let sequences = offsets.sequences();
    assert!(
        [kept.host.starts.len(), kept.host.lengths.len()] == [sequences; 2]
            && [kept.starts, kept.lengths]
                .iter()
                .all(|x| x.count() == sequences && x.scalar() == Scalar::I64)
            && counts.zip(kept.host.lengths).all(|(n, &len)| n <= len),
        "{who}: keys and queries do not belong together"
    );
    if tokens == 0 {
        return Ok(());
    }
    let (count, span) = parts(p, offsets.host, kept.host);
    if count == 0 {
        return forward(gpu, p, offsets, Some(kept), [q, k, v], out, None);
    }
    supported(p, q.data.scalar())?;
    let needed = attention_cached_workspace(p, offsets.host, kept.host);
    assert!(
        workspace.count() >= needed && workspace.scalar() == Scalar::F32,
        "{who}: workspace of {} elements, {needed} needed",
        workspace.count()
    );
    assert!(
        out.count() == tokens * p.heads * p.head_dim && out.scalar() == q.data.scalar(),
        "{who}: out is not [queries, heads * head_dim] of q's type"
    );
    let workspace = workspace.as_slice();
    let stats = tokens * p.heads * count * 2;
    let [stats, sums] = [workspace.part(0..stats), workspace.part(stats..needed)];
    let [name, combine] = match q.data.scalar() {
        Scalar::Bf16 => ["attention_cached_bf16", "attention_combine_bf16"],
        _ => ["attention_cached_f32", "attention_combine_f32"],
    };
    let tiles = (p.heads / p.kv_heads).div_ceil(HEADS);
    let launch = Launch::linear(count * tiles * p.kv_heads * tokens, THREADS);
    let options = options(p, most(kept.host.lengths), count);
    let mut args = inputs(&[q, k, v]).to_vec();
    args.extend(args![
        offsets.device,
        kept.starts,
        kept.lengths,
        stats,
        sums
    ]);
    args.extend(args![sequences as u32, span as u32, &options[..]]);
    gpu.launch("attention_cached", name, launch, &args)?;
    let launch = Launch::linear(tokens * p.heads, THREADS);
    let args = args![stats, sums, out, count as u32, p.head_dim as u32];
    gpu.launch("attention_cached", combine, launch, args)
}
