//! Launchers of `attention_forward.cu`, `attention_backward.cu`, `attention_simt.cu` and
//! `attention_cached.cu`.

use super::launch::args;
use super::{Error, Gpu, Launch, Result, Scalar, Slice, SliceMut, Target};
use crate::attention::Attention;
use crate::dropout::kept_scale;
use crate::philox::keep_from;

/// Most dimensions of a head.
const MOST_DIMS: usize = 256;
/// Threads of a block of the kernels on plain cores.
const THREADS: u32 = 128;
/// Keys that a block of the cached kernel has in work, and heads.
const CHUNK: usize = 128;
const HEADS: usize = 4;
/// With more queries of one sequence than this, kept keys are read by the forward pass's kernel.
const FEW: usize = 4;
/// So many blocks of the cached kernel fill any device.
const ENOUGH: usize = 1024;

/// Rows of tokens, as [`crate::attention::Packed`] has them.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// The elements, from the first head of the first token
    pub data: Slice<'a>,
    /// Elements from a token to the next
    pub row_stride: usize,
}

/// Where sequences begin and end: the numbers on this machine and on the device.
#[derive(Clone, Copy, Debug)]
pub struct Offsets<'a> {
    /// `[sequences + 1]`, rising from 0
    pub host: &'a [i64],
    /// The same as i64
    pub device: Slice<'a>,
}

/// As [`crate::attention::Kept`], on this machine and on the device.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    /// Where each sequence's keys and values lie
    pub host: crate::attention::Kept<'a>,
    /// First row of each, i64
    pub starts: Slice<'a>,
    /// Rows of each, i64
    pub lengths: Slice<'a>,
}

impl Offsets<'_> {
    fn sequences(&self) -> usize {
        self.host.len().saturating_sub(1)
    }

    fn tokens(&self) -> usize {
        self.host.last().map_or(0, |&last| last as usize)
    }

    /// Tokens of the longest sequence.
    fn longest(&self) -> usize {
        let lengths = self.host.windows(2).map(|pair| pair[1] - pair[0]);
        lengths.max().unwrap_or(0) as usize
    }

    fn check(&self, who: &str) {
        assert!(
            self.device.scalar() == Scalar::I64 && self.device.count() == self.host.len(),
            "{who}: offsets on the device are not those of the host"
        );
    }
}

fn most(values: &[i64]) -> usize {
    values.iter().max().map_or(0, |&n| n as usize)
}

/// Kernels for heads of at most so many dimensions: how a block is cut.
#[derive(Clone, Copy)]
struct Tensor {
    dims: usize,
    forward: Tile,
    keys: Tile,
    queries: Tile,
}

/// Rows of a block, rows of the other side that it has in work, and its threads.
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    others: usize,
    threads: u32,
}

const fn tile(rows: usize, others: usize, threads: u32) -> Tile {
    Tile {
        rows,
        others,
        threads,
    }
}

/// As in the sources, for devices with warpgroups and for those without.
const WARPGROUPS: [Tensor; 3] = [
    Tensor {
        dims: 64,
        forward: tile(128, 64, 256),
        keys: tile(128, 64, 256),
        queries: tile(128, 64, 256),
    },
    Tensor {
        dims: 128,
        forward: tile(128, 128, 256),
        keys: tile(128, 64, 256),
        queries: tile(128, 64, 256),
    },
    WARPS[2],
];
const WARPS: [Tensor; 3] = [
    Tensor {
        dims: 64,
        forward: tile(128, 64, 128),
        keys: tile(128, 32, 128),
        queries: tile(128, 32, 128),
    },
    Tensor {
        dims: 128,
        forward: tile(128, 64, 128),
        keys: tile(128, 32, 256),
        queries: tile(64, 64, 128),
    },
    Tensor {
        dims: 256,
        forward: tile(64, 32, 128),
        keys: tile(64, 16, 128),
        queries: tile(64, 16, 128),
    },
];

/// Which kernels take such operands.
enum Kind {
    /// On tensor cores
    Tensor(&'static Tensor),
    /// On plain cores, for heads of at most so many dimensions
    Plain { dims: usize, tile: Tile },
}

/// Refuses what no kernel takes.
fn supported(p: &Attention, scalar: Scalar) -> Result<()> {
    if p.head_dim > MOST_DIMS {
        let dims = p.head_dim;
        return Err(Error::Unsupported {
            kernel: "attention",
            what: format!("heads of {dims} dimensions; at most {MOST_DIMS} are possible"),
        });
    }
    match scalar {
        Scalar::F32 | Scalar::Bf16 => Ok(()),
        found => Err(Error::Scalar {
            kernel: "attention",
            found,
            expected: "f32 and bf16",
        }),
    }
}

impl Kind {
    /// `rows`: operands with their row strides; `others`: contiguous ones.
    fn of(gpu: &Gpu, p: &Attention, rows: &[Rows<'_>], others: &[Option<u64>]) -> Result<Kind> {
        let (dims, scalar) = (p.head_dim, rows[0].data.scalar());
        supported(p, scalar)?;
        let whole = |address: u64| address.is_multiple_of(16);
        let fits = rows
            .iter()
            .all(|rows| whole(rows.data.address()) && rows.row_stride.is_multiple_of(8))
            && others.iter().flatten().all(|&address| whole(address))
            && dims.is_multiple_of(8);
        // Powers of two of scores are taken with the factor inside: it must not turn their order.
        let rising = p.softcap.is_some() || p.scale > 0.0;
        let kernels = match gpu.limits().target {
            Target::Sm90a => &WARPGROUPS[..],
            Target::Sm80 => &WARPS[..],
            Target::Sm70 => &[],
        };
        let tensor = kernels.iter().find(|kernels| dims <= kernels.dims);
        if let Some(tensor) = tensor.filter(|_| scalar == Scalar::Bf16 && fits && rising) {
            return Ok(Kind::Tensor(tensor));
        }
        Ok(match dims {
            ..=128 => Kind::Plain {
                dims: 128,
                tile: tile(32, 16, THREADS),
            },
            _ => Kind::Plain {
                dims: MOST_DIMS,
                tile: tile(16, 8, THREADS),
            },
        })
    }
}

/// Bytes of shared memory on tensor cores: `own` tiles of a block's rows, two stages of keys and
/// values or their like.
fn tensor_shared(own: usize, tile: Tile, dims: usize) -> usize {
    (own * tile.rows + 4 * tile.others) * dims * 2
}

/// The same on plain cores: `others` tiles of the other side's rows, and the weights.
fn plain_shared(own: usize, others: usize, tile: Tile, dims: usize) -> usize {
    let rows = own * tile.rows + others * tile.others;
    (rows * (dims + 4) + tile.rows * (tile.others + 1)) * 4
}

/// `struct Attention` of `attention.cuh`: for sequences of at most `longest` keys, in `blocks`.
fn options(p: &Attention, longest: usize, blocks: usize) -> [u8; 48] {
    let window = p.window.unwrap_or(longest).min(longest).max(1) as i32;
    let low = if p.causal { 0 } else { 1 - window };
    let dropped = p.dropout > 0.0;
    bytemuck::cast([
        p.heads as u32,
        (p.heads / p.kv_heads) as u32,
        p.head_dim as u32,
        low as u32,
        window as u32,
        (p.scale as f32).to_bits(),
        (p.softcap.unwrap_or(0.0) as f32).to_bits(),
        if dropped { keep_from(p.dropout) } else { 0 },
        (kept_scale(p.dropout) as f32).to_bits(),
        p.key.0[0],
        p.key.0[1],
        blocks as u32,
    ])
}

/// Checks what every launcher is given; returns the type.
fn check(who: &str, p: &Attention, operands: [(&str, &Rows<'_>, usize, usize); 3]) {
    let Attention {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *p;
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads) && head_dim > 0 && p.window != Some(0),
        "{who}: {heads} heads of {head_dim} dimensions over {kv_heads} key heads, window {:?}",
        p.window
    );
    let scalar = operands[0].1.data.scalar();
    for (name, rows, count, heads) in operands {
        let need = match count {
            0 => 0,
            _ => (count - 1) * rows.row_stride + heads * head_dim,
        };
        assert!(
            rows.data.count() >= need && rows.data.scalar() == scalar,
            "{who}: {name} is {} x {}, {need} x {scalar} are needed",
            rows.data.count(),
            rows.data.scalar()
        );
    }
}

/// Attention of every head over every sequence, as [`crate::attention::attention`].
///
/// # Errors
/// Types other than f32 and bf16; heads of more than 256 dimensions.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn attention(
    gpu: &Gpu,
    p: &Attention,
    offsets: Offsets<'_>,
    [q, k, v]: [Rows<'_>; 3],
    out: SliceMut<'_>,
    lse: SliceMut<'_>,
) -> Result<()> {
    let (who, tokens) = ("attention", offsets.tokens());
    let operands = [
        ("q", &q, tokens, p.heads),
        ("k", &k, tokens, p.kv_heads),
        ("v", &v, tokens, p.kv_heads),
    ];
    check(who, p, operands);
    assert!(
        lse.count() == p.heads * tokens && lse.scalar() == Scalar::F32,
        "{who}: lse is not [heads, tokens] of f32"
    );
    forward(gpu, p, offsets, None, [q, k, v], out, Some(lse))
}

fn forward(
    gpu: &Gpu,
    p: &Attention,
    offsets: Offsets<'_>,
    kept: Option<Kept<'_>>,
    [q, k, v]: [Rows<'_>; 3],
    out: SliceMut<'_>,
    lse: Option<SliceMut<'_>>,
) -> Result<()> {
    let (who, tokens) = ("attention", offsets.tokens());
    offsets.check(who);
    assert!(
        out.count() == tokens * p.heads * p.head_dim && out.scalar() == q.data.scalar(),
        "{who}: out is not [tokens, heads * head_dim] of q's type"
    );
    let queries = offsets.longest();
    let keys = kept.map_or(queries, |kept| most(kept.host.lengths));
    let kind = Kind::of(gpu, p, &[q, k, v], &[Some(out.address())])?;
    let tile = match &kind {
        Kind::Tensor(tensor) => tensor.forward,
        Kind::Plain { tile, .. } => *tile,
    };
    let blocks = queries.div_ceil(tile.rows);
    let grid = blocks * p.heads * offsets.sequences();
    let options = options(p, keys, blocks);
    let [starts, lengths] = [kept.map(|kept| kept.starts), kept.map(|kept| kept.lengths)];
    let launch = Launch::linear(grid, tile.threads);
    match kind {
        Kind::Tensor(tensor) => {
            let name = match tensor.dims {
                64 => "attention_64",
                128 => "attention_128",
                _ => "attention_256",
            };
            let shared = tensor_shared(1, tile, tensor.dims);
            let args = args![
                q.data,
                k.data,
                v.data,
                q.row_stride,
                k.row_stride,
                v.row_stride,
                offsets.device,
                starts,
                lengths,
                out,
                lse,
                tokens,
                &options[..]
            ];
            gpu.launch("attention_forward", name, launch.with_shared(shared), args)
        }
        Kind::Plain { dims, .. } => {
            let name = match dims {
                128 => "attention_simt_128",
                _ => "attention_simt_256",
            };
            let shared = plain_shared(1, 1, tile, dims);
            let args = args![
                q.data,
                k.data,
                v.data,
                q.row_stride,
                k.row_stride,
                v.row_stride,
                offsets.device,
                starts,
                lengths,
                out,
                lse,
                tokens,
                q.data.scalar() == Scalar::Bf16,
                &options[..]
            ];
            gpu.launch("attention_simt", name, launch.with_shared(shared), args)
        }
    }
}

/// Workspace of [`attention_backward`], in f32.
pub fn attention_backward_workspace(p: &Attention, tokens: usize) -> usize {
    p.heads * tokens
}

/// The gradients of [`attention`], as [`crate::attention::attention_backward`]; those that are not
/// asked for are not written.
///
/// # Errors
/// As [`attention`].
///
/// # Panics
/// If the sizes do not fit each other.
pub fn attention_backward(
    gpu: &Gpu,
    p: &Attention,
    offsets: Offsets<'_>,
    [q, k, v]: [Rows<'_>; 3],
    [out, dout]: [Slice<'_>; 2],
    lse: Slice<'_>,
    [dq, dk, dv]: [Option<SliceMut<'_>>; 3],
    mut workspace: SliceMut<'_>,
) -> Result<()> {
    let (who, tokens) = ("attention backward", offsets.tokens());
    let operands = [
        ("q", &q, tokens, p.heads),
        ("k", &k, tokens, p.kv_heads),
        ("v", &v, tokens, p.kv_heads),
    ];
    check(who, p, operands);
    offsets.check(who);
    let scalar = q.data.scalar();
    let (width, kv_width) = (p.heads * p.head_dim, p.kv_heads * p.head_dim);
    let grads = [&dq, &dk, &dv].map(|grad| grad.as_ref().map(SliceMut::as_slice));
    for (name, x, width, scalar) in [
        ("out", Some(out), width, scalar),
        ("dout", Some(dout), width, scalar),
        ("dq", grads[0], width, scalar),
        ("dk", grads[1], kv_width, scalar),
        ("dv", grads[2], kv_width, scalar),
        ("lse", Some(lse), p.heads, Scalar::F32),
        (
            "workspace",
            Some(workspace.as_slice()),
            p.heads,
            Scalar::F32,
        ),
    ] {
        assert!(
            x.is_none_or(|x| x.count() == tokens * width && x.scalar() == scalar),
            "{who}: {name} does not have {width} x {scalar} for each of {tokens} tokens"
        );
    }
    let addresses: Vec<_> = [Some(dout), grads[0], grads[1], grads[2]]
        .map(|x| x.map(|x| x.address()))
        .into();
    let kind = Kind::of(gpu, p, &[q, k, v], &addresses)?;
    if dq.is_none() && dk.is_none() && dv.is_none() {
        return Ok(());
    }
    let name = match scalar {
        Scalar::Bf16 => "attention_dots_bf16",
        _ => "attention_dots_f32",
    };
    let launch = Launch::cover(32 * tokens * p.heads, THREADS, 1);
    let args = args![
        out,
        dout,
        workspace.reborrow(),
        tokens,
        p.heads as u32,
        p.head_dim as u32
    ];
    gpu.launch("attention_backward", name, launch, args)?;
    let pass = Pass {
        gpu,
        p,
        offsets,
        inputs: [q, k, v],
        dout,
        lse,
        dots: workspace.as_slice(),
        kind,
    };
    if dk.is_some() || dv.is_some() {
        pass.keys(dk, dv)?;
    }
    dq.map_or(Ok(()), |dq| pass.queries(dq))
}

/// What both passes over the scores are given.
struct Pass<'a> {
    gpu: &'a Gpu,
    p: &'a Attention,
    offsets: Offsets<'a>,
    inputs: [Rows<'a>; 3],
    dout: Slice<'a>,
    lse: Slice<'a>,
    dots: Slice<'a>,
    kind: Kind,
}

impl Pass<'_> {
    /// A launch over all blocks of all sequences and so many heads, and the options.
    fn launch(&self, tile: Tile, heads: usize) -> (Launch, [u8; 48]) {
        let longest = self.offsets.longest();
        let blocks = longest.div_ceil(tile.rows);
        let grid = blocks * heads * self.offsets.sequences();
        let launch = Launch::linear(grid, tile.threads);
        (launch, options(self.p, longest, blocks))
    }

    fn keys(&self, dk: Option<SliceMut<'_>>, dv: Option<SliceMut<'_>>) -> Result<()> {
        let [q, k, v] = self.inputs;
        let tokens = self.offsets.tokens();
        match &self.kind {
            Kind::Tensor(tensor) => {
                let tile = tensor.keys;
                let (launch, options) = self.launch(tile, self.p.kv_heads);
                let rows = 4 * tile.others * size_of::<f32>();
                let shared = tensor_shared(2, tile, tensor.dims) + rows;
                let names: &[_] = match (tensor.dims, &dk, &dv) {
                    (64, ..) => &["attention_keys_64"],
                    (128, ..) => &["attention_keys_128"],
                    (_, Some(_), None) => &["attention_keys_256_dk"],
                    (_, None, Some(_)) => &["attention_keys_256_dv"],
                    _ => &["attention_keys_256_dk", "attention_keys_256_dv"],
                };
                for name in names {
                    let args = args![
                        q.data,
                        k.data,
                        v.data,
                        q.row_stride,
                        k.row_stride,
                        v.row_stride,
                        self.offsets.device,
                        self.dout,
                        self.lse,
                        self.dots,
                        &dk,
                        &dv,
                        tokens,
                        &options[..]
                    ];
                    let launch = launch.with_shared(shared);
                    self.gpu.launch("attention_backward", name, launch, args)?;
                }
                Ok(())
            }
            Kind::Plain { dims, tile } => {
                let (launch, options) = self.launch(*tile, self.p.kv_heads);
                let name = match dims {
                    128 => "attention_keys_simt_128",
                    _ => "attention_keys_simt_256",
                };
                let launch = launch.with_shared(plain_shared(2, 2, *tile, *dims));
                let args = args![
                    q.data,
                    k.data,
                    v.data,
                    q.row_stride,
                    k.row_stride,
                    v.row_stride,
                    self.offsets.device,
                    self.dout,
                    self.lse,
                    self.dots,
                    dk,
                    dv,
                    tokens,
                    q.data.scalar() == Scalar::Bf16,
                    &options[..]
                ];
                self.gpu.launch("attention_simt", name, launch, args)
            }
        }
    }

    fn queries(&self, dq: SliceMut<'_>) -> Result<()> {
        let [q, k, v] = self.inputs;
        let tokens = self.offsets.tokens();
        match &self.kind {
            Kind::Tensor(tensor) => {
                let tile = tensor.queries;
                let (launch, options) = self.launch(tile, self.p.heads);
                let name = match tensor.dims {
                    64 => "attention_queries_64",
                    128 => "attention_queries_128",
                    _ => "attention_queries_256",
                };
                let launch = launch.with_shared(tensor_shared(2, tile, tensor.dims));
                let args = args![
                    q.data,
                    k.data,
                    v.data,
                    q.row_stride,
                    k.row_stride,
                    v.row_stride,
                    self.offsets.device,
                    self.dout,
                    self.lse,
                    self.dots,
                    dq,
                    tokens,
                    &options[..]
                ];
                self.gpu.launch("attention_backward", name, launch, args)
            }
            Kind::Plain { dims, tile } => {
                let (launch, options) = self.launch(*tile, self.p.heads);
                let name = match dims {
                    128 => "attention_queries_simt_128",
                    _ => "attention_queries_simt_256",
                };
                let launch = launch.with_shared(plain_shared(2, 2, *tile, *dims));
                let args = args![
                    q.data,
                    k.data,
                    v.data,
                    q.row_stride,
                    k.row_stride,
                    v.row_stride,
                    self.offsets.device,
                    self.dout,
                    self.lse,
                    self.dots,
                    dq,
                    tokens,
                    q.data.scalar() == Scalar::Bf16,
                    &options[..]
                ];
                self.gpu.launch("attention_simt", name, launch, args)
            }
        }
    }
}

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
/// As [`attention`].
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
    let args = args![
        q.data,
        k.data,
        v.data,
        q.row_stride,
        k.row_stride,
        v.row_stride,
        offsets.device,
        kept.starts,
        kept.lengths,
        stats,
        sums,
        sequences as u32,
        span as u32,
        &options[..]
    ];
    gpu.launch("attention_cached", name, launch, args)?;
    let launch = Launch::linear(tokens * p.heads, THREADS);
    let args = args![stats, sums, out, count as u32, p.head_dim as u32];
    gpu.launch("attention_cached", combine, launch, args)
}
