//! Matrix products: batched `matmul`, and `linear` with its bias and activation fused.

use graft_kernels::activation::Activation;
use graft_kernels::cuda::{self, Target};
use graft_kernels::gemm::{Batch, Epilogue, MatRef, Operands};
use graft_kernels::{Float, gemm as kernel, reduce as kernel_reduce};
use half::{bf16, f16};

use super::elementwise::add_assign;
use super::product::{Last, product, summand};
use super::quantised::weight_dtype;
use super::{accumulator, cast, parameter, rows_of, same_dtype, workspace};
use crate::error::{Error, Result};
use crate::tensor::TensorElement;
use crate::{Category, DType, Memory, Shape, Tensor, with_float};

/// Evaluates the body with the types of a product's operands and result. Where one is bf16, the
/// others may be f32: weights and their gradients beside bf16 activations.
macro_rules! with_product {
    ($op:expr, $dtypes:expr, ($a:ident, $b:ident, $c:ident) => $body:expr) => {
        with_product!(@match $op, $dtypes, $a, $b, $c, $body,
            F32 f32 F32 f32 F32 f32,
            F64 f64 F64 f64 F64 f64,
            F16 f16 F16 f16 F16 f16,
            Bf16 bf16 Bf16 bf16 Bf16 bf16,
            Bf16 bf16 Bf16 bf16 F32 f32,
            Bf16 bf16 F32 f32 Bf16 bf16,
            Bf16 bf16 F32 f32 F32 f32,
            F32 f32 Bf16 bf16 F32 f32)
    };
    (@match $op:expr, $dtypes:expr, $a:ident, $b:ident, $c:ident, $body:expr,
     $($da:ident $ta:ident $db:ident $tb:ident $dc:ident $tc:ident),*) => {
        match $dtypes {
            $((DType::$da, DType::$db, DType::$dc) => {
                type $a = $ta;
                type $b = $tb;
                type $c = $tc;
                $body
            })*
            (a, b, c) => {
                return Err(Error::argument(
                    $op,
                    format!("there is no product of {a} and {b} in {c}"),
                ));
            }
        }
    };
}

pub(super) use with_product;

/// How the operands of a product with activations of `dtype` are multiplied.
pub(super) fn operands(dtype: DType) -> Operands {
    if dtype == DType::Bf16 {
        Operands::Bf16
    } else {
        Operands::AsStored
    }
}

/// How a weight matrix is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum WeightLayout {
    /// `[out, in]`: most families
    OutIn,
    /// `[in, out]`: GPT-2's Conv1D
    InOut,
}

/// What [`linear`] computes beside the product.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Linear {
    /// How the weight is stored
    pub layout: WeightLayout,
    /// Applied to `x·w + bias`
    pub activation: Option<Activation>,
}

impl Linear {
    /// `(in, out)` features of a weight.
    fn features(&self, weight: &Tensor) -> Result<(usize, usize)> {
        match (weight.shape().len(), self.layout) {
            (2, WeightLayout::OutIn) => Ok((weight.shape()[1], weight.shape()[0])),
            (2, WeightLayout::InOut) => Ok((weight.shape()[0], weight.shape()[1])),
            _ => Err(Error::shape(
                "linear",
                "the weight",
                weight.shape(),
                match self.layout {
                    WeightLayout::OutIn => "[out, in]",
                    WeightLayout::InOut => "[in, out]",
                },
            )),
        }
    }

    /// The weight as a view `[in, out]`.
    pub fn input_by_output(&self, weight: &Tensor) -> Result<Tensor> {
        match self.layout {
            WeightLayout::OutIn => weight.t(),
            WeightLayout::InOut => Ok(weight.clone()),
        }
    }
}

/// `activation(x·w + bias)`: `x [.., in]` gives `[.., out]`. With `save`, also the pre-activation,
/// which the activation's backward needs. Weight and bias may be f32 beside bf16 activations; the
/// weight is then rounded on its way into the product, and nothing is copied. It may also be bf16 beside
/// f32 ones, or codes: a frozen weight's types.
///
/// # Errors
/// Inner sizes that differ, a bias that is not `[out]`, types that do not go together.
pub fn linear(
    m: &Memory,
    p: &Linear,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    save: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    linear_as(m, p, x, weight, bias, save, x.dtype())
}

/// [`linear`] with a result of another type: f32 logits of bf16 activations.
pub(super) fn linear_as(
    m: &Memory,
    p: &Linear,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    save: bool,
    dtype: DType,
) -> Result<(Tensor, Option<Tensor>)> {
    let op = "linear";
    let (inputs, outputs) = p.features(weight)?;
    let (rows, columns) = rows_of(op, "the input", x)?;
    if columns != inputs {
        return Err(Error::shape(
            op,
            format!("the input, for a weight {}", weight.shape()),
            x.shape(),
            format!("[.., {inputs}]"),
        ));
    }
    weight_dtype(op, weight, x.dtype())?;
    let bias = bias
        .map(|bias| parameter(op, "the bias", bias, outputs, x.dtype(), m))
        .transpose()?;
    let x = x.contiguous(m)?;
    let weight = p.input_by_output(weight)?;
    let shape = x.shape().replaced(x.shape().rank() - 1, Some(outputs));
    let mut y = Tensor::empty(m, dtype, &shape)?;
    let mut pre = (save && p.activation.is_some())
        .then(|| Tensor::empty(m, dtype, &shape))
        .transpose()?;
    if weight.dtype().is_quantised() {
        let last = Last {
            bias: bias.as_ref(),
            activation: p.activation,
            pre: pre.as_mut(),
            ..Last::default()
        };
        let x = x.reshape(&[rows, inputs])?;
        product(m, &x, &weight, &mut y, false, last)?;
        return Ok((y, pre));
    }
    let operands = operands(x.dtype());
    if let Some(on) = m.gpu() {
        let x = x.reshape(&[rows, inputs])?;
        let weight = factor(operands, &weight)?;
        let products = products(operands, single(rows * outputs), &x, &weight, dtype)?;
        let mut scratch = products_workspace(m, &products, None)?;
        on.run(|gpu| {
            let epilogue = cuda::gemm::Epilogue {
                bias: bias.as_ref().map(Tensor::device).transpose()?,
                activation: p.activation,
                pre_activation: pre.as_mut().map(Tensor::device_mut).transpose()?,
                ..Default::default()
            };
            let (x, weight) = (x.device_strided()?, weight.device_strided()?);
            let (y, scratch) = (y.device_mut()?, scratch.device_mut()?);
            cuda::gemm::gemm(gpu, &products, x, weight, y, false, epilogue, scratch)?;
            Ok(())
        })?;
        return Ok((y, pre));
    }
    with_product!(op, (x.dtype(), weight.dtype(), dtype), (X, W, Y) => {
        let needed = kernel::gemm_workspace::<Y>(operands, rows, outputs, inputs);
        let mut scratch = workspace(m, dtype, needed)?;
        if !y.is_planned() {
            let epilogue = Epilogue {
                bias: bias.as_ref().map(|t| t.slice::<<Y as Float>::Acc>()).transpose()?,
                activation: p.activation,
                pre_activation: pre.as_mut().map(|t| t.slice_mut::<Y>()).transpose()?,
            };
            kernel::gemm(
                operands,
                MatRef::row_major(x.slice::<X>()?, rows, inputs),
                matrix::<W>(&weight, inputs, outputs)?,
                y.slice_mut::<Y>()?,
                false,
                epilogue,
                scratch.slice_mut::<<Y as Float>::Acc>()?,
            );
        }
    });
    Ok((y, pre))
}

/// The gradient of [`linear`]'s input, of `shape`: from `dy [.., out]`, the gradient after the
/// activation's backward, in whose type it is. It is added to `sum`, if there is one, in whose
/// storage the result lies if nothing else holds that.
///
/// # Errors
/// A gradient or a weight that does not fit.
pub fn input_gradient(
    m: &Memory,
    linear: &Linear,
    weight: &Tensor,
    dy: &Tensor,
    shape: &Shape,
    sum: Option<Tensor>,
) -> Result<Tensor> {
    let op = "linear backward";
    weight_dtype(op, weight, dy.dtype())?;
    let (rows, outputs) = rows_of(op, "the gradient", dy)?;
    let w = linear.input_by_output(weight)?; // [in, out]
    let flat = dy.contiguous(m)?.reshape(&[rows, outputs])?;
    if let Some(sum) = sum {
        let mut dx = summand(m, sum, dy, shape)?;
        product(m, &flat, &w.t()?, &mut dx, true, Last::default())?;
        return Ok(dx);
    }
    if weight.dtype().is_quantised() {
        let mut dx = Tensor::empty(m, dy.dtype(), &[rows, w.shape()[0]])?;
        product(m, &flat, &w.t()?, &mut dx, false, Last::default())?;
        return dx.reshape(shape);
    }
    matmul_as(m, operands(dy.dtype()), &flat, &w.t()?, dy.dtype())?.reshape(shape)
}

/// The gradient of [`linear`]'s weight, in its layout and its `dtype`: from `x [.., in]` and `dy
/// [.., out]`, the gradient after the activation's backward.
///
/// # Errors
/// Row counts that differ, types that do not go together.
pub fn weight_gradient(
    m: &Memory,
    layout: WeightLayout,
    x: &Tensor,
    dy: &Tensor,
    dtype: DType,
) -> Result<Tensor> {
    let op = "linear backward";
    let (rows, inputs) = rows_of(op, "the input", x)?;
    let (dy_rows, outputs) = rows_of(op, "the gradient", dy)?;
    if rows != dy_rows {
        return Err(Error::shape(
            op,
            "the gradient",
            dy.shape(),
            format!("{rows} rows"),
        ));
    }
    let x = x.contiguous(m)?.reshape(&[rows, inputs])?;
    let dy = dy.contiguous(m)?.reshape(&[rows, outputs])?;
    let operands = operands(x.dtype());
    match layout {
        WeightLayout::OutIn => narrow_product(m, operands, &dy.t()?, &x, dtype),
        WeightLayout::InOut => narrow_product(m, operands, &x.t()?, &dy, dtype),
    }
}

/// Products of so few columns are computed as their transposes.
const NARROW: usize = 8;

/// `a·b` of two matrices, of which b may be narrow. Its transpose is then a product of few rows,
/// which reads the large factor once, where it lies, and has the same bits.
pub(super) fn narrow_product(
    m: &Memory,
    operands: Operands,
    a: &Tensor,
    b: &Tensor,
    dtype: DType,
) -> Result<Tensor> {
    let (rows, columns) = (a.shape()[0], b.shape()[1]);
    let like = a.dtype() == b.dtype();
    if m.gpu().is_some() || !like || columns > NARROW || rows <= columns {
        return matmul_as(m, operands, a, b, dtype);
    }
    matmul_as(m, operands, &b.t()?, &a.t()?, dtype)?
        .t()?
        .contiguous(m)
}

/// The sum over all rows of `x [.., columns]`: `[columns]` in `dtype`, the gradient of a bias.
///
/// # Errors
/// A tensor without dimensions.
pub fn sum_to_columns(m: &Memory, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let op = "sum over rows";
    let (rows, columns) = rows_of(op, "the input", x)?;
    let x = x.contiguous(m)?;
    if let Some(on) = m.gpu() {
        let mut y = Tensor::empty(m, dtype, &[columns])?;
        let need = cuda::reduce::sum_rows_workspace(rows, columns);
        let mut scratch = workspace(m, x.dtype(), need)?;
        on.run(|gpu| {
            let (y, scratch) = (y.device_mut()?, scratch.device_mut()?);
            Ok(cuda::reduce::sum_rows(
                gpu,
                x.device()?,
                [rows, columns],
                y,
                scratch,
            )?)
        })?;
        return Ok(y);
    }
    let mut y = Tensor::empty(m, accumulator(x.dtype()), &[columns])?;
    with_float!(op, x.dtype(), T => {
        let mut scratch = workspace(m, x.dtype(), kernel_reduce::sum_rows_workspace(rows, columns))?;
        if !y.is_planned() {
            kernel_reduce::sum_rows(
                x.slice::<T>()?,
                rows,
                columns,
                y.slice_mut::<<T as Float>::Acc>()?,
                false,
                scratch.slice_mut::<<T as Float>::Acc>()?,
            );
        }
    });
    cast(m, &y, dtype)
}

/// `a·b` over the last two dimensions: `[.., m, k]` and `[.., k, n]` give `[.., m, n]`. Leading
/// dimensions broadcast. Transposed views cost nothing.
///
/// # Errors
/// Inner or leading dimensions that do not fit, types that differ.
pub fn matmul(mem: &Memory, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_dtype("matmul", "the second input", b, a.dtype())?;
    matmul_as(mem, operands(a.dtype()), a, b, a.dtype())
}

/// [`matmul`] of operands of two types, in a third.
pub(super) fn matmul_as(
    mem: &Memory,
    operands: Operands,
    a: &Tensor,
    b: &Tensor,
    dtype: DType,
) -> Result<Tensor> {
    let op = "matmul";
    let (ra, rb) = (a.shape().rank(), b.shape().rank());
    if ra < 2 || rb < 2 || a.shape()[ra - 1] != b.shape()[rb - 2] {
        return Err(Error::shape(
            op,
            format!("the second input, for a first one {}", a.shape()),
            b.shape(),
            match a.shape().last() {
                Some(k) if ra >= 2 => format!("[.., {k}, _]"),
                _ => "two matrices".into(),
            },
        ));
    }
    let (rows, inner, columns) = (a.shape()[ra - 2], a.shape()[ra - 1], b.shape()[rb - 1]);
    let lead = Shape::from_dims(&a.shape()[..ra - 2])
        .broadcast(&Shape::from_dims(&b.shape()[..rb - 2]))
        .ok_or_else(|| {
            Error::shape(
                op,
                "the second input's leading dimensions",
                b.shape(),
                format!("ones that broadcast with {}", a.shape()),
            )
        })?;
    let full = |tail: [usize; 2]| [&lead[..], &tail].concat();
    let mut c = Tensor::empty(mem, dtype, &full([rows, columns]))?;
    let (a, a_stride) = batch_stride(&a.expand(&full([rows, inner]))?, mem)?;
    let (b, b_stride) = batch_stride(&b.expand(&full([inner, columns]))?, mem)?;
    let batch = Batch {
        count: lead.count(),
        a_stride,
        b_stride,
        c_stride: rows * columns,
    };
    if let Some(on) = mem.gpu() {
        let (a, b) = (factor(operands, &a)?, factor(operands, &b)?);
        let products = products(operands, batch, &a, &b, dtype)?;
        let mut scratch = products_workspace(mem, &products, None)?;
        on.run(|gpu| {
            let (a, b) = (a.device_strided()?, b.device_strided()?);
            let (c, scratch) = (c.device_mut()?, scratch.device_mut()?);
            let none = cuda::gemm::Epilogue::default();
            cuda::gemm::gemm(gpu, &products, a, b, c, false, none, scratch)?;
            Ok(())
        })?;
        return Ok(c);
    }
    with_product!(op, (a.dtype(), b.dtype(), dtype), (A, B, C) => {
        let needed =
            kernel::gemm_batched_workspace::<C>(operands, batch.count, rows, columns, inner);
        let mut scratch = workspace(mem, dtype, needed)?;
        if !c.is_planned() {
            kernel::gemm_batched(
                operands,
                batch,
                matrix::<A>(&a, rows, inner)?,
                matrix::<B>(&b, inner, columns)?,
                c.slice_mut::<C>()?,
                false,
                scratch.slice_mut::<<C as Float>::Acc>()?,
            );
        }
    });
    Ok(c)
}

/// `sum += a·b` for two matrices, or the beginning of that sum, in `dtype`.
pub(super) fn add_product(
    mem: &Memory,
    operands: Operands,
    (a, b): (&Tensor, &Tensor),
    sum: &mut Option<Tensor>,
    dtype: DType,
) -> Result<()> {
    let Some(c) = sum else {
        *sum = Some(matmul_as(mem, operands, a, b, dtype)?);
        return Ok(());
    };
    let Some(on) = mem.gpu() else {
        return add_assign(c, &matmul_as(mem, operands, a, b, dtype)?);
    };
    let products = products(operands, single(c.count()), a, b, dtype)?;
    let mut scratch = products_workspace(mem, &products, None)?;
    on.run(|gpu| {
        let (a, b) = (a.device_strided()?, b.device_strided()?);
        let (c, scratch) = (c.device_mut()?, scratch.device_mut()?);
        let none = cuda::gemm::Epilogue::default();
        cuda::gemm::gemm(gpu, &products, a, b, c, true, none, scratch)?;
        Ok(())
    })
}

/// A factor as products on a GPU read it: in place of a weight that is multiplied in bf16 its copy, which is made once.
pub(super) fn factor(operands: Operands, x: &Tensor) -> Result<Tensor> {
    let weight = x.memory().category() == Category::Weights;
    match operands {
        Operands::Bf16 if weight && x.dtype() == DType::F32 => x.rounded(),
        _ => Ok(x.clone()),
    }
}

/// Products of the matrices that the last two dimensions of `a` and `b` are, for a GPU.
pub(super) fn products(
    operands: Operands,
    batch: Batch,
    a: &Tensor,
    b: &Tensor,
    dtype: DType,
) -> Result<cuda::gemm::Products> {
    let layout = |x: &Tensor| {
        let rank = x.shape().rank();
        cuda::gemm::Layout {
            scalar: x.dtype().into(),
            rows: x.shape()[rank - 2],
            cols: x.shape()[rank - 1],
            row_stride: x.strides()[rank - 2],
            col_stride: x.strides()[rank - 1],
            aligned: x.begins_aligned(),
        }
    };
    Ok(cuda::gemm::Products {
        kernels: cuda::gemm::Kernels::asked_for()?,
        operands,
        batch,
        a: layout(a),
        b: layout(b),
        c: dtype.into(),
    })
}

/// One product with a result of `count` elements.
pub(super) fn single(count: usize) -> Batch {
    Batch {
        count: 1,
        a_stride: 0,
        b_stride: 0,
        c_stride: count,
    }
}

/// Workspace for products on a GPU, and for a second pair of factors; a plan reckons with the latest that there are
/// kernels for.
pub(super) fn products_workspace(
    m: &Memory,
    products: &cuda::gemm::Products,
    second: Option<&cuda::gemm::Products>,
) -> Result<Tensor> {
    let target = m
        .opened_gpu()
        .map_or(Target::Sm90a, |gpu| gpu.limits().target);
    let bytes = match second {
        None => products.workspace(target)?,
        Some(second) => cuda::gemm::pair_workspace([products, second], target)?,
    };
    workspace(m, DType::F32, bytes.div_ceil(size_of::<f32>()))
}

/// The last two dimensions of a tensor as a kernel's matrix.
pub(super) fn matrix<T: TensorElement>(
    x: &Tensor,
    rows: usize,
    cols: usize,
) -> Result<MatRef<'_, T>> {
    let rank = x.shape().rank();
    Ok(MatRef {
        data: x.strided_slice::<T>()?,
        rows,
        cols,
        row_stride: x.strides()[rank - 2],
        col_stride: x.strides()[rank - 1],
    })
}

/// The distance between the matrices of a batch; a copy if no single distance leads through them.
fn batch_stride(x: &Tensor, m: &Memory) -> Result<(Tensor, usize)> {
    let lead = x.shape().rank() - 2;
    if x.count() == 0 {
        // An empty view's strides may lead past its storage.
        return Ok((x.clone(), 0));
    }
    let mut stride = 0;
    let mut covered = 1;
    for axis in (0..lead).rev() {
        let (length, step) = (x.shape()[axis], x.strides()[axis]);
        if length == 1 {
            continue;
        }
        if covered == 1 {
            stride = step;
        } else if step != stride * covered {
            let copy = x.copy(m)?;
            let stride = copy.strides()[lead - 1];
            return Ok((copy, stride));
        }
        covered *= length;
    }
    Ok((x.clone(), stride))
}
