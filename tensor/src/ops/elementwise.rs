//! Operations that treat each element alone: activations, arithmetic, casts, dropout.

pub use graft_kernels::activation::{Activation, Glu, Needs, Unary};
pub use graft_kernels::binary::Binary;
use graft_kernels::cuda;
use graft_kernels::philox::Key;
use graft_kernels::{
    activation as kernel, binary as kernel_binary, copy, dropout as kernel_dropout,
};

use super::{beside, quantised, reduce::Reduce, same_dtype};
use crate::error::{Error, Result};
use crate::{DType, Memory, Shape, Tensor, with_float};

/// A function of one element, over all elements.
///
/// # Errors
/// A type that is no float.
pub fn unary(m: &Memory, kind: Unary, x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous(m)?;
    let mut y = Tensor::empty(m, x.dtype(), x.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            Ok(cuda::activation::unary(
                gpu,
                kind,
                x.device()?,
                y.device_mut()?,
            )?)
        })?;
        return Ok(y);
    }
    with_float!("unary", x.dtype(), T => {
        if !y.is_planned() {
            kernel::unary(kind, x.slice::<T>()?, y.slice_mut::<T>()?);
        }
    });
    Ok(y)
}

/// The gradient of [`unary`]'s input. `saved` is its input or its output, as
/// [`Unary::backward_needs`] says.
///
/// # Errors
/// Shapes or types that differ.
pub fn unary_backward(
    m: &Memory,
    kind: Unary,
    saved: Option<&Tensor>,
    dy: &Tensor,
) -> Result<Tensor> {
    let op = "unary backward";
    let dy = dy.contiguous(m)?;
    let saved = match (kind.backward_needs(), saved) {
        (Needs::Neither, _) => None,
        (_, Some(saved)) => Some(beside(op, "the saved tensor", saved, &dy, m)?),
        (needs, None) => {
            return Err(Error::argument(op, format!("{kind:?} needs its {needs:?}")));
        }
    };
    let mut dx = Tensor::empty(m, dy.dtype(), dy.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let saved = saved.as_ref().map(|t| t.device()).transpose()?;
            let (dy, dx) = (dy.device()?, dx.device_mut()?);
            Ok(cuda::activation::unary_backward(gpu, kind, saved, dy, dx)?)
        })?;
        return Ok(dx);
    }
    with_float!(op, dy.dtype(), T => {
        if !dx.is_planned() {
            let saved = match &saved {
                Some(saved) => saved.slice::<T>()?,
                None => &[],
            };
            let (x, y): (&[T], &[T]) = match kind.backward_needs() {
                Needs::Input => (saved, &[]),
                Needs::Output => (&[], saved),
                Needs::Neither => (&[], &[]),
            };
            kernel::unary_backward(kind, x, y, dy.slice::<T>()?, dx.slice_mut::<T>()?);
        }
    });
    Ok(dx)
}

/// An activation function over all elements.
///
/// # Errors
/// A type that is no float.
pub fn activation(m: &Memory, kind: Activation, x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous(m)?;
    let mut y = Tensor::empty(m, x.dtype(), x.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            Ok(cuda::activation::activation(
                gpu,
                kind,
                x.device()?,
                y.device_mut()?,
            )?)
        })?;
        return Ok(y);
    }
    with_float!("activation", x.dtype(), T => {
        if !y.is_planned() {
            kernel::activation(kind, x.slice::<T>()?, y.slice_mut::<T>()?);
        }
    });
    Ok(y)
}

/// The gradient of an activation's input, from that input (`x`, the pre-activation) and the
/// gradient of its result, whose storage it takes over if nothing else holds that.
///
/// # Errors
/// Shapes or types that differ.
pub fn activation_backward(m: &Memory, kind: Activation, x: &Tensor, dy: Tensor) -> Result<Tensor> {
    let op = "activation backward";
    let mut grad = dy.into_owned(m)?;
    let x = beside(op, "the pre-activation", x, &grad, m)?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (x, grad) = (x.device()?, grad.device_mut()?);
            Ok(cuda::activation::activation_backward(gpu, kind, x, grad)?)
        })?;
        return Ok(grad);
    }
    with_float!(op, grad.dtype(), T => {
        if !grad.is_planned() {
            kernel::activation_backward(kind, x.slice::<T>()?, grad.slice_mut::<T>()?);
        }
    });
    Ok(grad)
}

/// A gated unit: `act(gate) * up`.
///
/// # Errors
/// Shapes or types that differ.
pub fn glu(m: &Memory, kind: Glu, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let gate = gate.contiguous(m)?;
    let up = beside("glu", "up", up, &gate, m)?;
    let mut y = Tensor::empty(m, gate.dtype(), gate.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (gate, up) = (gate.device()?, up.device()?);
            Ok(cuda::activation::glu(gpu, kind, gate, up, y.device_mut()?)?)
        })?;
        return Ok(y);
    }
    with_float!("glu", gate.dtype(), T => {
        if !y.is_planned() {
            kernel::glu(kind, gate.slice::<T>()?, up.slice::<T>()?, y.slice_mut::<T>()?);
        }
    });
    Ok(y)
}

/// The gradients of [`glu`]'s inputs, those that are asked for.
///
/// # Errors
/// Shapes or types that differ.
pub fn glu_backward(
    m: &Memory,
    kind: Glu,
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
    needs: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let op = "glu backward";
    let dy = dy.contiguous(m)?;
    let gate = beside(op, "gate", gate, &dy, m)?;
    let up = beside(op, "up", up, &dy, m)?;
    let output = |wanted: bool| {
        wanted
            .then(|| Tensor::empty(m, dy.dtype(), dy.shape()))
            .transpose()
    };
    let (mut dgate, mut dup) = (output(needs[0])?, output(needs[1])?);
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            Ok(cuda::activation::glu_backward(
                gpu,
                kind,
                gate.device()?,
                up.device()?,
                dy.device()?,
                dgate.as_mut().map(|t| t.device_mut()).transpose()?,
                dup.as_mut().map(|t| t.device_mut()).transpose()?,
            )?)
        })?;
        return Ok([dgate, dup]);
    }
    with_float!(op, dy.dtype(), T => {
        if !m.is_planned() {
            kernel::glu_backward(
                kind,
                gate.slice::<T>()?,
                up.slice::<T>()?,
                dy.slice::<T>()?,
                dgate.as_mut().map(|t| t.slice_mut::<T>()).transpose()?,
                dup.as_mut().map(|t| t.slice_mut::<T>()).transpose()?,
            );
        }
    });
    Ok([dgate, dup])
}

/// `x * scale + shift`.
///
/// # Errors
/// A type that is no float.
pub fn affine(m: &Memory, x: &Tensor, scale: f64, shift: f64) -> Result<Tensor> {
    let x = x.contiguous(m)?;
    let mut y = Tensor::empty(m, x.dtype(), x.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (x, y) = (x.device()?, y.device_mut()?);
            Ok(cuda::activation::affine(gpu, x, scale, shift, y)?)
        })?;
        return Ok(y);
    }
    with_float!("affine", x.dtype(), T => {
        if !y.is_planned() {
            kernel::affine(x.slice::<T>()?, scale, shift, y.slice_mut::<T>()?);
        }
    });
    Ok(y)
}

/// A function of two elements, with broadcasting.
///
/// # Errors
/// Shapes that do not broadcast, types that differ.
pub fn binary(m: &Memory, kind: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_dtype("binary", "the second input", b, a.dtype())?;
    let shape = a.shape().broadcast(b.shape()).ok_or_else(|| {
        Error::shape(
            "binary",
            "the second input",
            b.shape(),
            format!("one that broadcasts with {}", a.shape()),
        )
    })?;
    let mut y = Tensor::empty(m, a.dtype(), &shape)?;
    if y.is_planned() {
        return Ok(y);
    }
    let flat = a.shape() == b.shape() && a.is_contiguous() && b.is_contiguous();
    let expanded = match flat {
        true => None,
        false => Some([a.expand(&shape)?, b.expand(&shape)?]),
    };
    let [a, b] = expanded.as_ref().map_or([a, b], |both| both.each_ref());
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            if flat {
                let (a, b) = (a.device()?, b.device()?);
                return Ok(cuda::binary::binary(gpu, kind, a, b, y.device_mut()?)?);
            }
            Ok(cuda::binary::binary_strided(
                gpu,
                kind,
                &shape,
                a.device_strided()?,
                a.strides(),
                b.device_strided()?,
                b.strides(),
                y.device_mut()?,
            )?)
        })?;
        return Ok(y);
    }
    with_float!("binary", a.dtype(), T => {
        if flat {
            kernel_binary::binary(kind, a.slice::<T>()?, b.slice::<T>()?, y.slice_mut::<T>()?);
        } else {
            kernel_binary::binary_strided(
                kind,
                &shape,
                a.strided_slice::<T>()?,
                a.strides(),
                b.strided_slice::<T>()?,
                b.strides(),
                y.slice_mut::<T>()?,
            );
        }
    });
    Ok(y)
}

/// `y += x`, in place.
///
/// # Errors
/// Shapes or types that differ, or a `y` that is shared.
pub fn add_assign(y: &mut Tensor, x: &Tensor) -> Result<()> {
    let m = y.memory().clone();
    let x = beside("add in place", "the addend", x, y, &m)?;
    if y.is_planned() {
        return Ok(());
    }
    if let Some(on) = m.gpu() {
        return on.run(|gpu| Ok(cuda::binary::add_assign(gpu, y.device_mut()?, x.device()?)?));
    }
    with_float!("add in place", y.dtype(), T => {
        kernel_binary::add_assign(y.slice_mut::<T>()?, x.slice::<T>()?);
    });
    Ok(())
}

/// Sums a gradient over the dimensions that were broadcast from `shape`.
///
/// # Errors
/// A shape that does not broadcast to the gradient's.
pub fn reduce_to_shape(m: &Memory, dy: &Tensor, shape: &Shape) -> Result<Tensor> {
    if dy.shape() == shape {
        return Ok(dy.clone());
    }
    if shape.broadcast(dy.shape()).as_ref() != Some(dy.shape()) {
        return Err(Error::shape(
            "sum over broadcast dimensions",
            "the gradient",
            dy.shape(),
            format!("one that {shape} broadcasts to"),
        ));
    }
    let mut dy = dy.clone();
    while dy.shape().rank() > shape.rank() {
        dy = super::reduce(m, Reduce::Sum, &dy, 0, false)?;
    }
    for axis in 0..shape.rank() {
        if shape[axis] == 1 && dy.shape()[axis] != 1 {
            dy = super::reduce(m, Reduce::Sum, &dy, axis, true)?;
        }
    }
    Ok(dy)
}

/// The same values as another float type, rounded to nearest; from f64 to a short type by way of
/// f32. Of codes, what they stand for, as a view of the same strides.
///
/// # Errors
/// Types that are no floats: to codes, it is [`quantise`](super::quantise) that leads.
pub fn cast(m: &Memory, x: &Tensor, to: DType) -> Result<Tensor> {
    if x.dtype() == to {
        return Ok(x.clone());
    }
    if x.dtype().is_quantised() {
        return quantised::numbers(m, x, to);
    }
    let x = x.contiguous(m)?;
    let mut y = Tensor::empty(m, to, x.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| Ok(cuda::copy::convert(gpu, x.device()?, y.device_mut()?)?))?;
        return Ok(y);
    }
    with_float!("cast", x.dtype(), S => with_float!("cast", to, D => {
        if !y.is_planned() {
            copy::convert(x.slice::<S>()?, y.slice_mut::<D>()?);
        }
    }));
    Ok(y)
}

/// Zeroes each element with probability `p` and scales the others by `1 / (1 - p)`. The mask is a
/// function of `key` and the element's index, so the same on `dy` is the backward pass.
///
/// # Errors
/// A probability outside `[0, 1)`.
pub fn dropout(m: &Memory, x: &Tensor, p: f64, key: Key) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        return Err(Error::argument(
            "dropout",
            format!("p is {p}, not in [0, 1)"),
        ));
    }
    let x = x.contiguous(m)?;
    let mut y = Tensor::empty(m, x.dtype(), x.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (x, y) = (x.device()?, y.device_mut()?);
            Ok(cuda::dropout::dropout(gpu, x, y, p, key)?)
        })?;
        return Ok(y);
    }
    with_float!("dropout", x.dtype(), T => {
        if !y.is_planned() {
            kernel_dropout::dropout(x.slice::<T>()?, y.slice_mut::<T>()?, p, key);
        }
    });
    Ok(y)
}

/// [`dropout`] of a tensor whose storage it takes over if nothing else holds that.
///
/// # Errors
/// As [`dropout`].
pub fn dropout_backward(m: &Memory, dy: Tensor, p: f64, key: Key) -> Result<Tensor> {
    let mut grad = dy.into_owned(m)?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            Ok(cuda::dropout::dropout_in_place(
                gpu,
                grad.device_mut()?,
                p,
                key,
            )?)
        })?;
        return Ok(grad);
    }
    with_float!("dropout backward", grad.dtype(), T => {
        if !grad.is_planned() {
            kernel_dropout::dropout_in_place(grad.slice_mut::<T>()?, p, key);
        }
    });
    Ok(grad)
}

/// 1 where a maximum or minimum of `a` and `b` is `a` (ties included), else 0; shaped as the
/// result.
///
/// # Errors
/// As [`binary`].
pub fn selects_first(m: &Memory, kind: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let chosen = binary(m, kind, a, b)?; // broadcast shape
    let a = a.expand(chosen.shape())?;
    let a = a.contiguous(m)?;
    let mut mask = Tensor::empty(m, a.dtype(), a.shape())?;
    if let Some(on) = m.gpu() {
        on.run(|gpu| {
            let (a, chosen) = (a.device()?, chosen.device()?);
            Ok(cuda::binary::equal(gpu, a, chosen, mask.device_mut()?)?)
        })?;
        return Ok(mask);
    }
    with_float!("selection", a.dtype(), T => {
        if !mask.is_planned() {
            let one = <T as graft_kernels::Float>::narrow(graft_kernels::Real::ONE);
            let (a, chosen) = (a.slice::<T>()?, chosen.slice::<T>()?);
            for (i, to) in mask.slice_mut::<T>()?.iter_mut().enumerate() {
                *to = if a[i] == chosen[i] { one } else { T::default() };
            }
        }
    });
    Ok(mask)
}
