//! Launchers of `attention_forward.cu` and `attention_backward.cu`, their like for Hopper,
//! `attention_simt.cu` and `attention_cached.cu`.

mod backward;
mod cached;
mod hopper;

pub use backward::{attention_backward, attention_backward_workspace};
pub use cached::{attention_cached, attention_cached_workspace};

use super::launch::args;
use super::{Arg, Error, Gpu, Launch, Result, Scalar, Slice, SliceMut, Target};
use crate::attention::Attention;
use crate::dropout::kept_scale;
use crate::philox::keep_from;

/// Most dimensions of a head.
const MOST_DIMS: usize = 256;
/// Threads of a block of the kernels on plain cores.
const THREADS: u32 = 128;

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
        keys: tile(64, 64, 128),
        queries: tile(64, 64, 128),
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

    /// What kernels on plain cores are told, before the options: whether operands like these are bf16.
    fn types(&self, rows: &Rows<'_>) -> Option<Arg<'static>> {
        match self {
            Kind::Tensor(_) => None,
            Kind::Plain { .. } => Some((rows.data.scalar() == Scalar::Bf16).into()),
        }
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
    // A key that nothing is drawn from would make each step's launches differ from the last one's.
    let [key0, key1] = if dropped { p.key.0 } else { [0; 2] };
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
        key0,
        key1,
        blocks as u32,
    ])
}

/// Checks what every launcher is given.
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
    supported(p, q.data.scalar())?;
    assert!(
        lse.count() == p.heads * tokens && lse.scalar() == Scalar::F32,
        "{who}: lse is not [heads, tokens] of f32"
    );
    forward(gpu, p, offsets, None, [q, k, v], out, Some(lse))
}

/// What the arguments of every kernel begin with: q, k and v, and how far apart their rows are.
fn inputs([q, k, v]: &[Rows<'_>; 3]) -> [Arg<'static>; 6] {
    *args![
        q.data,
        k.data,
        v.data,
        q.row_stride,
        k.row_stride,
        v.row_stride
    ]
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
    if kept.is_none() && p.dropout == 0.0 && hopper::takes(gpu, p, &offsets, &kind)? {
        return hopper::forward(gpu, p, offsets, [q, k, v], out, lse);
    }
    let tile = match &kind {
        Kind::Tensor(tensor) => tensor.forward,
        Kind::Plain { tile, .. } => *tile,
    };
    let blocks = queries.div_ceil(tile.rows);
    let grid = blocks * p.heads * offsets.sequences();
    let options = options(p, keys, blocks);
    let [starts, lengths] = [kept.map(|kept| kept.starts), kept.map(|kept| kept.lengths)];
    let (source, name, shared) = match &kind {
        Kind::Tensor(tensor) => {
            let name = match tensor.dims {
                64 => "attention_64",
                128 => "attention_128",
                _ => "attention_256",
            };
            let shared = tensor_shared(1, tile, tensor.dims);
            ("attention_forward", name, shared)
        }
        Kind::Plain { dims, .. } => {
            let name = match dims {
                128 => "attention_simt_128",
                _ => "attention_simt_256",
            };
            ("attention_simt", name, plain_shared(1, 1, tile, *dims))
        }
    };
    let launch = Launch::linear(grid, tile.threads).with_shared(shared);
    let mut args = inputs(&[q, k, v]).to_vec();
    args.extend(args![offsets.device, starts, lengths, out, lse, tokens]);
    args.extend(kind.types(&q));
    args.push(Arg::Bytes(&options));
    gpu.launch(source, name, launch, &args)
}
