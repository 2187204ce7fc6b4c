//! Matrix products: batched `matmul`, and how tensors become the factors of a kernel.

use graft_kernels::Float;
use graft_kernels::cuda::{self, Target};
use graft_kernels::gemm::{self as kernel, Batch, MatRef, Operands};
use half::{bf16, f16};

use super::elementwise::add_assign;
use super::{same_dtype, workspace};
use crate::error::{Error, Result};
use crate::tensor::TensorElement;
use crate::{Category, DType, Memory, Shape, Tensor};

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
    let turned = matmul_as(m, operands, &b.t()?, &a.t()?, dtype)?.t()?;
    Ok(turned.contiguous(m)?.into_owned())
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
