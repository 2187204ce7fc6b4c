//! Operations: each checks its shapes, takes its output from the given [`Memory`], and calls one
//! kernel by element type. None knows of gradients; those with a backward pass offer it as a
//! function of its own, named `*_backward`.
//!
//! Over a planned memory an operation does everything but the arithmetic.

pub mod attention;
pub mod elementwise;
pub mod index;
pub mod linalg;
pub mod linear;
mod linear_loss;
pub mod lora;
pub mod loss;
pub mod norm;
pub mod optimizer;
pub mod pool;
mod product;
mod quantised;
pub mod random;
pub mod reduce;
pub mod rope;
mod tables;

pub use attention::{Attention, Kept, attention, attention_backward, attention_cached};
pub use elementwise::{
    Activation, Binary, Glu, Needs, Unary, activation, activation_backward, affine, binary, cast,
    dropout, dropout_backward, glu, glu_backward, reduce_to_shape, unary, unary_backward,
};
pub use index::{add_rows, concat, gather_rows, place, put, scatter_add_rows, write_rows};
pub use linalg::matmul;
pub use linear::{
    Linear, WeightLayout, input_gradient, input_gradient_through, linear, sum_to_columns,
    weight_gradient,
};
pub use lora::{Lora, lora, lora_input, lora_input_gradient, lora_low, lora_low_gradient};
pub use pool::{Pool, pool, pool_backward};
pub use quantised::quantise;
pub use reduce::{Reduce, argmax, max_backward, reduce};

use std::borrow::Cow;

use crate::error::{Error, Result};
use crate::{DType, Memory, Shape, Tensor};

/// The type that sums over elements of `dtype` are kept in.
pub fn accumulator(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

/// Scratch memory of `count` accumulators for one kernel call.
fn workspace(memory: &Memory, dtype: DType, count: usize) -> Result<Tensor> {
    let memory = memory.with(crate::Category::Workspace);
    Tensor::empty(&memory, accumulator(dtype), &[count])
}

/// `(rows, columns)` of a tensor seen as rows of its last dimension.
fn rows_of(op: &'static str, what: &str, x: &Tensor) -> Result<(usize, usize)> {
    match x.shape().last() {
        Some(&columns) => {
            let rows = x.shape()[..x.shape().rank() - 1].iter().product();
            Ok((rows, columns))
        }
        None => Err(Error::shape(op, what, x.shape(), "at least one dimension")),
    }
}

/// A contiguous tensor as a matrix.
fn as_matrix(x: &Tensor, shape: [usize; 2]) -> Result<Cow<'_, Tensor>> {
    match x.shape()[..] == shape {
        true => Ok(Cow::Borrowed(x)),
        false => Ok(Cow::Owned(x.reshape(&shape)?)),
    }
}

fn same_shape(op: &'static str, what: &str, x: &Tensor, expected: &Shape) -> Result<()> {
    if x.shape() == expected {
        Ok(())
    } else {
        Err(Error::shape(op, what, x.shape(), expected))
    }
}

fn same_dtype(op: &'static str, what: &str, x: &Tensor, expected: DType) -> Result<()> {
    if x.dtype() == expected {
        Ok(())
    } else {
        Err(Error::DType {
            op,
            what: what.into(),
            found: x.dtype(),
            expected: expected.to_string(),
        })
    }
}

/// Checks that `x` has the shape and type that `like` has, and makes it contiguous.
fn beside<'a>(
    op: &'static str,
    what: &str,
    x: &'a Tensor,
    like: &Tensor,
    m: &Memory,
) -> Result<Cow<'a, Tensor>> {
    same_shape(op, what, x, like.shape())?;
    same_dtype(op, what, x, like.dtype())?;
    x.contiguous(m)
}

/// Checks that a parameter's type goes with activations of `dtype`: the same, or the one that these
/// are summed in.
fn parameter_dtype(op: &'static str, what: &str, x: &Tensor, dtype: DType) -> Result<()> {
    let wide = accumulator(dtype);
    // f16 has no products with f32.
    if x.dtype() == dtype || (dtype == DType::Bf16 && x.dtype() == wide) {
        return Ok(());
    }
    let mut expected = dtype.to_string();
    if dtype == DType::Bf16 {
        expected += &format!(" or {wide}");
    }
    Err(Error::DType {
        op,
        what: what.into(),
        found: x.dtype(),
        expected,
    })
}

/// Checks that `x` is a vector of `length` elements, a parameter beside activations of `dtype`, and
/// gives it in the type that these are computed in, contiguous.
fn parameter<'a>(
    op: &'static str,
    what: &str,
    x: &'a Tensor,
    length: usize,
    dtype: DType,
    m: &Memory,
) -> Result<Cow<'a, Tensor>> {
    if x.shape()[..] != [length] {
        return Err(Error::shape(op, what, x.shape(), format!("[{length}]")));
    }
    parameter_dtype(op, what, x, dtype)?;
    match accumulator(dtype) {
        same if same == x.dtype() => x.contiguous(m),
        wide => Ok(Cow::Owned(cast(m, x, wide)?)),
    }
}

/// Checks the values of an index tensor and returns it contiguous.
fn indices<'a>(
    op: &'static str,
    index: &'a Tensor,
    limit: usize,
    ignore: Option<i64>,
    m: &Memory,
) -> Result<Cow<'a, Tensor>> {
    same_dtype(op, "the index", index, DType::I64)?;
    let index = index.contiguous(m)?;
    let bad = index
        .slice::<i64>()?
        .iter()
        .enumerate()
        .find(|&(_, &i)| Some(i) != ignore && (i < 0 || i as u64 >= limit as u64));
    match bad {
        Some((position, &index)) => Err(Error::Index {
            op,
            index,
            position,
            limit,
        }),
        None => Ok(index),
    }
}

/// Checks that `offsets` describe `tokens` packed rows; returns the number of sequences.
fn sequences(op: &'static str, offsets: &Tensor, tokens: usize) -> Result<usize> {
    same_dtype(op, "the offsets", offsets, DType::I64)?;
    let values = offsets.slice::<i64>()?;
    let valid = offsets.shape().rank() == 1
        && values.first() == Some(&0)
        && values.last() == Some(&(tokens as i64))
        && values.windows(2).all(|pair| pair[0] <= pair[1]);
    if valid {
        Ok(values.len() - 1)
    } else {
        let mut found = format!("{:?}", &values[..values.len().min(8)]);
        if values.len() > 8 {
            found.push_str(" ...");
        }
        Err(Error::Offsets { op, tokens, found })
    }
}
