//! Attention over packed sequences.

use std::borrow::Cow;

use graft_kernels::Float;
pub use graft_kernels::attention::Kept;
use graft_kernels::attention::{self as kernel, Packed};
use graft_kernels::cuda::attention as cuda;
use graft_kernels::philox::Key;

use super::{accumulator, same_dtype, same_shape, sequences, workspace};
use crate::error::{Error, Result};
use crate::tensor::TensorElement;
use crate::{Memory, Tensor, with_float};

/// Heads, masks and dropout of one attention.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Attention {
    /// Heads of the queries
    pub heads: usize,
    /// Heads of keys and values; divides `heads`
    pub kv_heads: usize,
    /// A position sees none that come after it
    pub causal: bool,
    /// A position sees others at a distance below this
    pub window: Option<usize>,
    /// Scores are `cap * tanh(score / cap)`
    pub softcap: Option<f64>,
    /// Factor of the scores; `1 / sqrt(head_dim)` as a rule
    pub scale: f64,
    /// Probability that a weight is dropped
    pub dropout: f64,
    /// What the dropped weights are drawn from
    pub key: Key,
}

impl Attention {
    /// Bidirectional attention with `heads` heads of `head_dim`, as in BERT.
    pub fn bidirectional(heads: usize, head_dim: usize) -> Attention {
        Attention {
            heads,
            kv_heads: heads,
            causal: false,
            window: None,
            softcap: None,
            scale: 1.0 / (head_dim as f64).sqrt(),
            dropout: 0.0,
            key: Key::new(0, 0, 0),
        }
    }

    /// Checks the shapes and gives the kernel's parameters. Keys and values have `rows` rows.
    fn resolve(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        offsets: &Tensor,
        rows: usize,
    ) -> Result<kernel::Attention> {
        let op = "attention";
        let refuse = |what: String| Err(Error::argument(op, what));
        if self.heads == 0 || self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return refuse(format!(
                "{} query heads cannot share {} key heads",
                self.heads, self.kv_heads
            ));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return refuse(format!("dropout is {}, not in [0, 1)", self.dropout));
        }
        if self.window == Some(0) {
            return refuse("a window of 0 leaves nothing to attend to".into());
        }
        if q.shape().rank() != 2 || !q.shape()[1].is_multiple_of(self.heads) {
            let expected = format!("[tokens, {} heads x head_dim]", self.heads);
            return Err(Error::shape(op, "the query", q.shape(), expected));
        }
        let head_dim = q.shape()[1] / self.heads;
        for (what, t) in [("the key", k), ("the value", v)] {
            if t.shape()[..] != [rows, self.kv_heads * head_dim] {
                let expected = format!("[{rows}, {}]", self.kv_heads * head_dim);
                return Err(Error::shape(op, what, t.shape(), expected));
            }
            same_dtype(op, what, t, q.dtype())?;
        }
        sequences(op, offsets, q.shape()[0])?;
        Ok(kernel::Attention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim,
            causal: self.causal,
            window: self.window,
            softcap: self.softcap,
            scale: self.scale,
            dropout: self.dropout,
            key: self.key,
        })
    }
}

/// Rows whose elements lie side by side, whatever the distance between rows: a slice of a fused
/// query-key-value projection is used as it is.
fn packed_rows<'a>(x: &'a Tensor, m: &Memory) -> Result<Cow<'a, Tensor>> {
    if x.strides()[1] == 1 || x.shape()[1] <= 1 {
        Ok(Cow::Borrowed(x))
    } else {
        x.contiguous(m)
    }
}

fn packed<T: TensorElement>(x: &Tensor) -> Result<Packed<'_, T>> {
    Ok(Packed {
        data: x.strided_slice::<T>()?,
        row_stride: x.strides()[0],
    })
}

/// The same on a GPU.
fn device_rows(x: &Tensor) -> Result<cuda::Rows<'_>> {
    Ok(cuda::Rows {
        data: x.device_strided()?,
        row_stride: x.strides()[0],
    })
}

fn device_offsets(offsets: &Tensor) -> Result<cuda::Offsets<'_>> {
    Ok(cuda::Offsets {
        host: offsets.slice::<i64>()?,
        device: offsets.device()?,
    })
}

/// Softmax attention within each packed sequence: `q [tokens, heads * head_dim]`, `k` and `v
/// [tokens, kv_heads * head_dim]`, `offsets i64 [sequences + 1]`. Returns the output, shaped as `q`,
/// and the log-sum-exp of the scores `[heads, tokens]`, which the backward pass recomputes them
/// from. Online softmax after Milakov and Gimelshein (2018), blocks after Dao (2023).
///
/// # Errors
/// Shapes, types or offsets that do not fit each other; options outside their range.
pub fn attention(
    m: &Memory,
    p: &Attention,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    offsets: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let p = p.resolve(q, k, v, offsets, first_dimension(q))?;
    let (q, k, v) = (packed_rows(q, m)?, packed_rows(k, m)?, packed_rows(v, m)?);
    let mut out = Tensor::empty(m, q.dtype(), q.shape())?;
    let mut lse = Tensor::empty(m, accumulator(q.dtype()), &[p.heads, q.shape()[0]])?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let inputs = [device_rows(&q)?, device_rows(&k)?, device_rows(&v)?];
            let offsets = device_offsets(offsets)?;
            let (out, lse) = (out.device_mut()?, lse.device_mut()?);
            Ok(cuda::attention(gpu, &p, offsets, inputs, out, lse)?)
        })?;
        return Ok((out, lse));
    }
    let offsets = offsets.slice::<i64>()?;
    let mut scratch = workspace(m, q.dtype(), kernel::attention_workspace(&p, offsets))?;
    if out.is_planned() {
        return Ok((out, lse));
    }
    with_float!("attention", q.dtype(), T => kernel::attention(
        &p,
        offsets,
        packed::<T>(&q)?,
        packed::<T>(&k)?,
        packed::<T>(&v)?,
        out.slice_mut::<T>()?,
        lse.slice_mut::<<T as Float>::Acc>()?,
        scratch.slice_mut::<<T as Float>::Acc>()?,
    ));
    Ok((out, lse))
}

/// The gradients of query, key and value, those that are asked for.
///
/// # Errors
/// As [`attention`].
pub fn attention_backward(
    m: &Memory,
    p: &Attention,
    inputs: [&Tensor; 3],
    offsets: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    needs: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let op = "attention backward";
    let [q, k, v] = inputs;
    let p = p.resolve(q, k, v, offsets, first_dimension(q))?;
    same_shape(op, "the output", out, q.shape())?;
    same_shape(op, "the gradient", dout, q.shape())?;
    same_dtype(op, "the gradient", dout, q.dtype())?;
    let (q, k, v) = (packed_rows(q, m)?, packed_rows(k, m)?, packed_rows(v, m)?);
    let (out, dout) = (out.contiguous(m)?, dout.contiguous(m)?);
    let output = |wanted: bool, like: &Tensor| {
        wanted
            .then(|| Tensor::empty(m, q.dtype(), like.shape()))
            .transpose()
    };
    let mut dq = output(needs[0], &q)?;
    let mut dk = output(needs[1], &k)?;
    let mut dv = output(needs[2], &v)?;
    if let Some(on) = m.gpu() {
        let sequences = offsets.shape()[0].saturating_sub(1);
        let needed = cuda::attention_backward_workspace(&p, q.shape()[0], sequences);
        let mut scratch = workspace(m, q.dtype(), needed)?;
        on.run(|gpu| {
            let inputs = [device_rows(&q)?, device_rows(&k)?, device_rows(&v)?];
            let offsets = device_offsets(offsets)?;
            let grads = [
                dq.as_mut().map(Tensor::device_mut).transpose()?,
                dk.as_mut().map(Tensor::device_mut).transpose()?,
                dv.as_mut().map(Tensor::device_mut).transpose()?,
            ];
            let (lse, scratch) = (lse.device()?, scratch.device_mut()?);
            let outs = [out.device()?, dout.device()?];
            Ok(cuda::attention_backward(
                gpu, &p, offsets, inputs, outs, lse, grads, scratch,
            )?)
        })?;
        return Ok([dq, dk, dv]);
    }
    let offsets = offsets.slice::<i64>()?;
    let needed = kernel::attention_backward_workspace(&p, offsets);
    let mut scratch = workspace(m, q.dtype(), needed)?;
    if m.is_planned() {
        return Ok([dq, dk, dv]);
    }
    with_float!(op, q.dtype(), T => kernel::attention_backward(
        &p,
        offsets,
        packed::<T>(&q)?,
        packed::<T>(&k)?,
        packed::<T>(&v)?,
        out.slice::<T>()?,
        lse.slice::<<T as Float>::Acc>()?,
        dout.slice::<T>()?,
        dq.as_mut().map(|t| t.slice_mut::<T>()).transpose()?,
        dk.as_mut().map(|t| t.slice_mut::<T>()).transpose()?,
        dv.as_mut().map(|t| t.slice_mut::<T>()).transpose()?,
        scratch.slice_mut::<<T as Float>::Acc>()?,
    ));
    Ok([dq, dk, dv])
}

/// Causal attention of the last tokens of each sequence over keys and values that were kept:
/// `q [queries, heads * head_dim]` with `offsets i64 [sequences + 1]`, `k` and `v
/// [rows, kv_heads * head_dim]`. A sequence's queries are those of its last keys. Returns the output,
/// shaped as `q`; there is no backward pass.
///
/// # Errors
/// Shapes, types or offsets that do not fit each other; rows outside the keys, or fewer than
/// queries; attention that is not causal, or with dropout.
pub fn attention_cached(
    m: &Memory,
    p: &Attention,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    offsets: &Tensor,
    kept: Kept,
) -> Result<Tensor> {
    let op = "cached attention";
    let rows = first_dimension(k);
    let p = p.resolve(q, k, v, offsets, rows)?;
    if !p.causal || p.dropout > 0.0 {
        return Err(Error::argument(op, "it is causal and without dropout"));
    }
    let (q, k, v) = (packed_rows(q, m)?, packed_rows(k, m)?, packed_rows(v, m)?);
    let offset_tensor = offsets;
    let offsets = offsets.slice::<i64>()?;
    let Kept { starts, lengths } = kept;
    if starts.len() != offsets.len() - 1 || lengths.len() != starts.len() {
        let what = format!(
            "{} starts and {} lengths of keys for {} sequences",
            starts.len(),
            lengths.len(),
            offsets.len() - 1
        );
        return Err(Error::argument(op, what));
    }
    for (s, (&start, &length)) in starts.iter().zip(lengths).enumerate() {
        let queries = offsets[s + 1] - offsets[s];
        let end = start.checked_add(length);
        if start < 0 || length < queries || end.is_none_or(|end| end > rows as i64) {
            let what = format!(
                "sequence {s} has {queries} queries and {length} keys from row {start} of {rows}"
            );
            return Err(Error::argument(op, what));
        }
    }
    let mut out = Tensor::empty(m, q.dtype(), q.shape())?;
    if let Some(on) = m.gpu() {
        let needed = cuda::attention_cached_workspace(&p, offsets, kept);
        let mut scratch = workspace(m, q.dtype(), needed)?;
        let scratch_memory = m.with(crate::Category::Workspace);
        let starts = Tensor::from_slice(&scratch_memory, kept.starts, &[kept.starts.len()])?;
        let lengths = Tensor::from_slice(&scratch_memory, kept.lengths, &[kept.lengths.len()])?;
        on.run(|gpu| {
            let kept = cuda::Kept {
                host: kept,
                starts: starts.device()?,
                lengths: lengths.device()?,
            };
            let inputs = [device_rows(&q)?, device_rows(&k)?, device_rows(&v)?];
            let (out, scratch) = (out.device_mut()?, scratch.device_mut()?);
            let offsets = device_offsets(offset_tensor)?;
            Ok(cuda::attention_cached(
                gpu, &p, offsets, kept, inputs, out, scratch,
            )?)
        })?;
        return Ok(out);
    }
    let needed = kernel::attention_cached_workspace(&p, q.shape()[0], kept);
    let mut scratch = workspace(m, q.dtype(), needed)?;
    if out.is_planned() {
        return Ok(out);
    }
    with_float!(op, q.dtype(), T => kernel::attention_cached(
        &p,
        offsets,
        kept,
        packed::<T>(&q)?,
        packed::<T>(&k)?,
        packed::<T>(&v)?,
        out.slice_mut::<T>()?,
        scratch.slice_mut::<<T as Float>::Acc>()?,
    ));
    Ok(out)
}

/// Rows, if there is such a dimension.
fn first_dimension(x: &Tensor) -> usize {
    x.shape().first().copied().unwrap_or(0)
}
