//! One product of two matrices into a tensor that is there: over what it holds, or added to that.

use graft_kernels::Float;
use graft_kernels::activation::Activation;
use graft_kernels::cuda;
use graft_kernels::gemm::{self as kernel, Epilogue};
use half::{bf16, f16};

use super::linalg::{factor, matrix, operands, products, products_workspace, single, with_product};
use super::{quantised, workspace};
use crate::error::{Error, Result};
use crate::{DType, Memory, Shape, Tensor};

/// What happens to a product on its way out.
#[derive(Default)]
pub(super) struct Last<'a> {
    pub bias: Option<&'a Tensor>,
    pub activation: Option<Activation>,
    pub pre: Option<&'a mut Tensor>,
    /// On a GPU: what the activation's slope, and not the activation itself, is taken of, as a factor
    pub slope_of: Option<&'a Tensor>,
    /// Two factors `[rows, _]` and `[_, columns]` whose product is added before anything else is done
    pub beside: Option<[&'a Tensor; 2]>,
}

/// `y = x·w`, or `y += x·w`, and what is to be done last: `x [rows, in]` contiguous, `w [in, out]`, `y` contiguous.
pub(super) fn product(
    m: &Memory,
    x: &Tensor,
    w: &Tensor,
    y: &mut Tensor,
    mut accumulate: bool,
    mut last: Last,
) -> Result<()> {
    let (rows, inner, columns) = (x.shape()[0], x.shape()[1], w.shape()[1]);
    if w.shape()[0] != inner || y.count() != rows * columns {
        let expected = format!("[{inner}, {}]", y.count() / rows.max(1));
        return Err(Error::shape("a product", "a factor", w.shape(), expected));
    }
    if m.gpu().is_none()
        && let Some([a, b]) = last.beside.take()
    {
        // The short product first: the large one is added to it where its blocks are still in the cache.
        product(m, a, b, y, accumulate, Last::default())?;
        accumulate = true;
    }
    if w.dtype().is_quantised() {
        return quantised::product(m, x, w, y, accumulate, last);
    }
    let (operands, dtype) = (operands(x.dtype()), y.dtype());
    if let Some(on) = m.gpu() {
        let w = &factor(operands, w)?;
        let of = |a, b| products(operands, single(rows * columns), a, b, dtype);
        let products = of(x, w)?;
        let beside = match last.beside {
            Some([a, b]) => {
                let (a, b) = (factor(operands, a)?, factor(operands, b)?);
                Some((of(&a, &b)?, a, b))
            }
            None => None,
        };
        let second = beside.as_ref().map(|(second, ..)| second);
        let mut scratch = products_workspace(m, &products, second)?;
        on.run(|gpu| {
            let epilogue = cuda::gemm::Epilogue {
                bias: last.bias.map(Tensor::device).transpose()?,
                activation: last.activation,
                pre_activation: last.pre.map(Tensor::device_mut).transpose()?,
                slope_of: last.slope_of.map(Tensor::device).transpose()?,
                ..Default::default()
            };
            let (x, w) = (x.device_strided()?, w.device_strided()?);
            let (y, scratch) = (y.device_mut()?, scratch.device_mut()?);
            match &beside {
                None => cuda::gemm::gemm(gpu, &products, x, w, y, accumulate, epilogue, scratch)?,
                Some((second, a, b)) => {
                    let (a, b) = ([x, a.device_strided()?], [w, b.device_strided()?]);
                    let pair = [&products, second];
                    cuda::gemm::gemm_pair(gpu, pair, a, b, y, accumulate, epilogue, scratch)?;
                }
            }
            Ok(())
        })?;
        return Ok(());
    }
    with_product!("a product", (x.dtype(), w.dtype(), dtype), (X, W, Y) => {
        let needed = kernel::gemm_workspace::<Y>(operands, rows, columns, inner);
        let mut scratch = workspace(m, dtype, needed)?;
        if !y.is_planned() {
            let bias = last.bias.map(|t| t.slice::<<Y as Float>::Acc>()).transpose()?;
            let epilogue = Epilogue {
                bias,
                activation: last.activation,
                pre_activation: last.pre.map(|t| t.slice_mut::<Y>()).transpose()?,
            };
            kernel::gemm(
                operands,
                matrix::<X>(x, rows, inner)?,
                matrix::<W>(w, inner, columns)?,
                y.slice_mut::<Y>()?,
                accumulate,
                epilogue,
                scratch.slice_mut::<<Y as Float>::Acc>()?,
            );
        }
    });
    Ok(())
}

/// `sum` as something that a gradient of `shape`, in the type of `dy`, can be added to in place.
pub(super) fn summand(m: &Memory, sum: Tensor, dy: &Tensor, shape: &Shape) -> Result<Tensor> {
    if sum.shape() != shape || sum.dtype() != dy.dtype() {
        return Err(Error::shape(
            "linear backward",
            format!("the sum so far ({})", sum.dtype()),
            sum.shape(),
            format!("{shape} ({})", dy.dtype()),
        ));
    }
    sum.into_owned(m)
}
