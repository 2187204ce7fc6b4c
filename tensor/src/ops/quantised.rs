//! Weights as codes: to codes, back to numbers, and products with them.
//!
//! A quantised matrix is a tensor of type [`DType::Nf4`] or [`DType::Int8`]; its views are as good as it is, but none of
//! them can be copied into another order. On a CPU its codes become numbers while a product packs them; on a GPU the
//! weight of one product becomes numbers of the type that is multiplied, in scratch memory.

use graft_kernels::cuda;
use graft_kernels::gemm::{self as kernel, CodesRef, Epilogue};
use graft_kernels::quantised;
use half::bf16;

use super::linalg::{matrix, operands};
use super::product::{self, Last};
use super::{cast, parameter_dtype, workspace};
use crate::error::{Error, Result};
use crate::{Category, DType, Memory, Tensor};

/// Codes of type `to` for the elements of `x`, in row-major order: x of any shape and any float type, as f32.
///
/// # Errors
/// A type that has no codes; an element that is not finite.
pub fn quantise(m: &Memory, x: &Tensor, to: DType) -> Result<Tensor> {
    let op = "quantise";
    let Some(format) = to.format() else {
        return Err(Error::DType {
            op,
            what: "the result".into(),
            found: to,
            expected: "nf4 or int8".into(),
        });
    };
    let mut y = Tensor::empty(m, to, x.shape())?;
    if x.is_on_device() {
        // Once for each weight, while it is loaded.
        let here = Memory::cpu();
        return quantise(&here, &x.to_memory(&here)?, to)?.to_memory(m);
    }
    if m.gpu().is_some() && !m.is_planned() {
        return quantise(&Memory::cpu(), x, to)?.to_memory(m);
    }
    let scratch = x.memory().with(Category::Workspace);
    let x = cast(&scratch, x, DType::F32)?;
    let x = x.contiguous(&scratch)?;
    let need = quantised::quantise_workspace(format, x.count());
    let mut magnitudes = workspace(m, DType::F32, need)?;
    if y.is_planned() || x.is_planned() {
        return Ok(y);
    }
    let (values, magnitudes) = (x.slice::<f32>()?, magnitudes.slice_mut::<f32>()?);
    match quantised::quantise(format, values, y.codes_mut()?, magnitudes) {
        Ok(()) => Ok(y),
        Err(bad) => Err(Error::argument(
            op,
            format!(
                "element {} is {}, for which {to} has no code; a model with such weights cannot be used",
                bad.at, values[bad.at]
            ),
        )),
    }
}

/// The numbers that codes stand for, in a float type; a view of the same strides. In bf16, f32 numbers rounded to it.
pub(super) fn numbers(m: &Memory, x: &Tensor, to: DType) -> Result<Tensor> {
    let Some(format) = x.dtype().format() else {
        return cast(m, x, to);
    };
    if !matches!(to, DType::F32 | DType::Bf16) {
        let wide = numbers(&m.with(Category::Workspace), x, DType::F32)?;
        return cast(m, &wide, to);
    }
    let mut y = Tensor::empty(m, to, &[x.stored()])?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (codes, y) = (x.device_codes()?, y.device_mut()?);
            Ok(cuda::quantised::dequantise(gpu, format, codes, y)?)
        })?;
        return Ok(y.seen_as(x));
    }
    if !y.is_planned() {
        let codes = x.codes()?;
        match to {
            DType::F32 => quantised::dequantise(codes, y.slice_mut::<f32>()?),
            _ => quantised::dequantise(codes, y.slice_mut::<bf16>()?),
        }
    }
    Ok(y.seen_as(x))
}

/// Checks that a weight's type goes with activations of `dtype`: as other parameters do, or short or quantised, if it is
/// frozen.
pub(super) fn weight_dtype(op: &'static str, weight: &Tensor, dtype: DType) -> Result<()> {
    let computes = matches!(dtype, DType::F32 | DType::Bf16);
    let held = weight.dtype() == DType::Bf16 || weight.dtype().is_quantised();
    match computes && held {
        true => Ok(()),
        false => parameter_dtype(op, "the weight", weight, dtype),
    }
}

/// [`product::product`] with codes for the weight, `w [in, out]`.
pub(super) fn product(
    m: &Memory,
    x: &Tensor,
    w: &Tensor,
    y: &mut Tensor,
    accumulate: bool,
    last: Last,
) -> Result<()> {
    let (rows, inner, columns) = (x.shape()[0], x.shape()[1], w.shape()[1]);
    if m.gpu().is_some() {
        let w = numbers(&m.with(Category::Workspace), w, x.dtype())?;
        return product::product(m, x, &w, y, accumulate, last);
    }
    macro_rules! multiply {
        ($x:ty, $y:ty) => {{
            let operands = operands(x.dtype());
            let need = kernel::gemm_workspace::<$y>(operands, rows, columns, inner);
            let mut scratch = workspace(m, DType::F32, need)?;
            if !y.is_planned() {
                let bias = last.bias.map(|t| t.slice::<f32>()).transpose()?;
                let epilogue = Epilogue {
                    bias,
                    activation: last.activation,
                    pre_activation: last.pre.map(|t| t.slice_mut::<$y>()).transpose()?,
                };
                kernel::gemm_codes(
                    operands,
                    matrix::<$x>(x, rows, inner)?,
                    CodesRef {
                        data: w.codes()?.skip(w.first()),
                        rows: inner,
                        cols: columns,
                        row_stride: w.strides()[0],
                        col_stride: w.strides()[1],
                    },
                    y.slice_mut::<$y>()?,
                    accumulate,
                    epilogue,
                    scratch.slice_mut::<f32>()?,
                );
            }
        }};
    }
    match (x.dtype(), y.dtype()) {
        (DType::F32, DType::F32) => multiply!(f32, f32),
        (DType::Bf16, DType::Bf16) => multiply!(bf16, bf16),
        (DType::Bf16, DType::F32) => multiply!(bf16, f32),
        (x, y) => {
            let what = format!("there is no product of {x} and {} in {y}", w.dtype());
            return Err(Error::argument("linear", what));
        }
    }
    Ok(())
}
