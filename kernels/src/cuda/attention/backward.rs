//! Launchers of the backward pass.

use super::{
    Kind, Offsets, Rows, THREADS, Tile, check, hopper, inputs, options, plain_shared, supported,
    tensor_shared,
};
use crate::attention::Attention;
use crate::cuda::launch::args;
use crate::cuda::{Arg, Gpu, Launch, Result, Scalar, Slice, SliceMut};

/// Workspace of [`attention_backward`] over so many tokens in so many sequences, in f32.
pub fn attention_backward_workspace(p: &Attention, tokens: usize, sequences: usize) -> usize {
    hopper::workspace(p, tokens, sequences)
}

/// The gradients of [`attention`](super::attention), as [`crate::attention::attention_backward`]; those that are not
/// asked for are not written.
///
/// # Errors
/// As [`attention`](super::attention).
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
    workspace: SliceMut<'_>,
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
    supported(p, scalar)?;
    let (width, kv_width) = (p.heads * p.head_dim, p.kv_heads * p.head_dim);
    let grads = [&dq, &dk, &dv].map(|grad| grad.as_ref().map(SliceMut::as_slice));
    for (name, x, width, scalar) in [
        ("out", Some(out), width, scalar),
        ("dout", Some(dout), width, scalar),
        ("dq", grads[0], width, scalar),
        ("dk", grads[1], kv_width, scalar),
        ("dv", grads[2], kv_width, scalar),
        ("lse", Some(lse), p.heads, Scalar::F32),
    ] {
        assert!(
            x.is_none_or(|x| x.count() == tokens * width && x.scalar() == scalar),
            "{who}: {name} does not have {width} x {scalar} for each of {tokens} tokens"
        );
    }
    let needed = attention_backward_workspace(p, tokens, offsets.sequences());
    assert!(
        workspace.count() >= needed && workspace.scalar() == Scalar::F32,
        "{who}: workspace of {} elements, {needed} needed",
        workspace.count()
    );
    let addresses: Vec<_> = [Some(out), Some(dout), grads[0], grads[1], grads[2]]
        .map(|x| x.map(|x| x.address()))
        .into();
    let kind = Kind::of(gpu, p, &[q, k, v], &addresses)?;
    if dq.is_none() && dk.is_none() && dv.is_none() {
        return Ok(());
    }
    let dots = workspace.as_slice().part(0..tokens * p.heads);
    let pass = Pass {
        gpu,
        p,
        offsets,
        inputs: [q, k, v],
        dout,
        lse,
        dots,
        kind,
    };
    if hopper::takes(gpu, p, &offsets, &pass.kind)? {
        return pass.hopper(out, workspace.as_slice(), [dq, dk, dv]);
    }
    let name = match scalar {
        Scalar::Bf16 => "attention_dots_bf16",
        _ => "attention_dots_f32",
    };
    let launch = Launch::cover(32 * tokens * p.heads, THREADS, 1);
    let args = args![out, dout, dots, tokens, p.heads as u32, p.head_dim as u32];
    gpu.launch("attention_simt", name, launch, args)?;
    if dk.is_some() || dv.is_some() {
        pass.keys(dk, dv)?;
    }
    dq.map_or(Ok(()), |dq| pass.queries(dq))
}

/// What both passes over the scores are given.
pub(super) struct Pass<'a> {
    pub gpu: &'a Gpu,
    pub p: &'a Attention,
    pub offsets: Offsets<'a>,
    pub inputs: [Rows<'a>; 3],
    pub dout: Slice<'a>,
    pub lse: Slice<'a>,
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

    /// The arguments of a kernel with these results.
    fn args<'a>(&self, results: &[Arg<'a>], options: &'a [u8]) -> Vec<Arg<'a>> {
        let mut args = inputs(&self.inputs).to_vec();
        args.extend(args![self.offsets.device, self.dout, self.lse, self.dots]);
        args.extend(results);
        args.push(self.offsets.tokens().into());
        args.extend(self.kind.types(&self.inputs[0]));
        args.push(Arg::Bytes(options));
        args
    }

    fn keys(&self, dk: Option<SliceMut<'_>>, dv: Option<SliceMut<'_>>) -> Result<()> {
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
                let args = self.args(args![&dk, &dv], &options);
                for name in names {
                    let launch = launch.with_shared(shared);
                    self.gpu.launch("attention_backward", name, launch, &args)?;
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
                let args = self.args(args![dk, dv], &options);
                self.gpu.launch("attention_simt", name, launch, &args)
            }
        }
    }

    fn queries(&self, dq: SliceMut<'_>) -> Result<()> {
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
                let args = self.args(args![dq], &options);
                self.gpu.launch("attention_backward", name, launch, &args)
            }
            Kind::Plain { dims, tile } => {
                let (launch, options) = self.launch(*tile, self.p.heads);
                let name = match dims {
                    128 => "attention_queries_simt_128",
                    _ => "attention_queries_simt_256",
                };
                let launch = launch.with_shared(plain_shared(2, 2, *tile, *dims));
                let args = self.args(args![dq], &options);
                self.gpu.launch("attention_simt", name, launch, &args)
            }
        }
    }
}
