//! Launchers of `activation.cu`.

use super::launch::args;
use super::pointwise::{by_type, check, check_some, group, spread};
use super::{Gpu, Result, Slice, SliceMut};
use crate::activation::{Activation, Glu, Needs, Unary};

/// The number of a kind in `activation.cuh`.
pub(super) fn number(kind: Activation) -> i32 {
    match kind {
        Activation::Gelu => 0,
        Activation::GeluTanh => 1,
        Activation::Relu => 2,
        Activation::Tanh => 3,
        Activation::Silu => 4,
    }
}

/// The number of a kind in `activation.cu`.
fn glu_number(kind: Glu) -> i32 {
    match kind {
        Glu::Swiglu => 0,
        Glu::Geglu => 1,
        Glu::GegluTanh => 2,
    }
}

/// Where a function of the table is computed.
enum At {
    /// By the kernels of activations
    Activation(Activation),
    /// By those of the table, under this number
    Table(i32),
}

fn value_at(kind: Unary) -> At {
    match kind {
        Unary::Gelu => At::Activation(Activation::Gelu),
        Unary::GeluTanh => At::Activation(Activation::GeluTanh),
        Unary::Relu => At::Activation(Activation::Relu),
        Unary::Tanh => At::Activation(Activation::Tanh),
        Unary::Silu => At::Activation(Activation::Silu),
        Unary::Exp => At::Table(0),
        Unary::Ln => At::Table(1),
        Unary::Sqrt => At::Table(2),
        Unary::Sigmoid => At::Table(3),
        Unary::Neg => At::Table(4),
        Unary::Abs => At::Table(5),
        Unary::Square => At::Table(6),
        Unary::Reciprocal => At::Table(7),
        Unary::Erf => At::Table(8),
        Unary::Sin => At::Table(9),
        Unary::Cos => At::Table(10),
    }
}

fn slope_at(kind: Unary) -> At {
    match kind {
        // These two are given the value, not the argument that the activations' kernel takes.
        Unary::Tanh => At::Table(11),
        Unary::Relu => At::Table(12),
        other => value_at(other),
    }
}

/// `y[i] = kind(x[i])`.
///
/// # Errors
/// Types other than f32 and bf16.
///
/// # Panics
/// If lengths or types differ.
pub fn activation(gpu: &Gpu, kind: Activation, x: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    check!("activation", y, x.count(), x.scalar());
    let name = by_type!("activation", x.scalar())?;
    let launch = spread(gpu, x.count(), group(x.scalar()));
    gpu.launch(
        "activation",
        name,
        launch,
        args![number(kind), x, y, x.count()],
    )
}

/// `dx[i] = dy[i] · kind'(x[i])`, with `x` from before the activation.
///
/// # Errors
/// As [`activation`].
///
/// # Panics
/// As [`activation`].
fn slope(
    gpu: &Gpu,
    kind: Activation,
    x: Slice<'_>,
    dy: Slice<'_>,
    dx: &SliceMut<'_>,
) -> Result<()> {
    let name = by_type!("activation_backward", x.scalar())?;
    let launch = spread(gpu, x.count(), group(x.scalar()));
    let args = args![number(kind), x, dy, dx, x.count()];
    gpu.launch("activation", name, launch, args)
}

/// `grad[i] *= kind'(x[i])`, with `x` from before the activation.
///
/// # Errors
/// As [`activation`].
///
/// # Panics
/// As [`activation`].
pub fn activation_backward(
    gpu: &Gpu,
    kind: Activation,
    x: Slice<'_>,
    grad: SliceMut<'_>,
) -> Result<()> {
    check!("activation_backward", grad, x.count(), x.scalar());
    slope(gpu, kind, x, grad.as_slice(), &grad)
}

/// `y[i] = kind(x[i])`.
///
/// # Errors
/// As [`activation`].
///
/// # Panics
/// As [`activation`].
pub fn unary(gpu: &Gpu, kind: Unary, x: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    let number = match value_at(kind) {
        At::Activation(kind) => return activation(gpu, kind, x, y),
        At::Table(number) => number,
    };
    check!("unary", y, x.count(), x.scalar());
    let name = by_type!("unary", x.scalar())?;
    let launch = spread(gpu, x.count(), group(x.scalar()));
    gpu.launch("activation", name, launch, args![number, x, y, x.count()])
}

/// `dx[i] = dy[i] · kind'(x[i])`; `saved` is the argument or the value, as [`Unary::backward_needs`]
/// says, or absent.
///
/// # Errors
/// As [`activation`].
///
/// # Panics
/// If lengths or types differ, or what is needed is absent.
pub fn unary_backward(
    gpu: &Gpu,
    kind: Unary,
    saved: Option<Slice<'_>>,
    dy: Slice<'_>,
    dx: SliceMut<'_>,
) -> Result<()> {
    let saved = match (kind.backward_needs(), saved) {
        (Needs::Neither, _) => dy, // read, and without influence
        (needs, saved) => saved.unwrap_or_else(|| panic!("{kind:?} needs its {needs:?}")),
    };
    check!("unary_backward", saved, dy.count(), dy.scalar());
    check!("unary_backward", dx, dy.count(), dy.scalar());
    let number = match slope_at(kind) {
        At::Activation(kind) => return slope(gpu, kind, saved, dy, &dx),
        At::Table(number) => number,
    };
    let name = by_type!("unary_backward", dy.scalar())?;
    let launch = spread(gpu, dy.count(), group(dy.scalar()));
    let args = args![number, saved, dy, dx, dy.count()];
    gpu.launch("activation", name, launch, args)
}

/// `y[i] = activation(gate[i]) · up[i]`.
///
/// # Errors
/// As [`activation`].
///
/// # Panics
/// As [`activation`].
pub fn glu(gpu: &Gpu, kind: Glu, gate: Slice<'_>, up: Slice<'_>, y: SliceMut<'_>) -> Result<()> {
    check!("glu", up, gate.count(), gate.scalar());
    check!("glu", y, gate.count(), gate.scalar());
    let name = by_type!("glu", gate.scalar())?;
    let launch = spread(gpu, gate.count(), group(gate.scalar()));
    let args = args![glu_number(kind), gate, up, y, gate.count()];
    gpu.launch("activation", name, launch, args)
}

/// The gradients of [`glu`]'s arguments, those that are asked for.
///
/// # Errors
/// As [`activation`].
///
/// # Panics
/// As [`activation`].
pub fn glu_backward(
    gpu: &Gpu,
    kind: Glu,
    gate: Slice<'_>,
    up: Slice<'_>,
    dy: Slice<'_>,
    dgate: Option<SliceMut<'_>>,
    dup: Option<SliceMut<'_>>,
) -> Result<()> {
    let (count, scalar) = (dy.count(), dy.scalar());
    check!("glu_backward", gate, count, scalar);
    check!("glu_backward", up, count, scalar);
    check_some!("glu_backward", dgate, count, scalar);
    check_some!("glu_backward", dup, count, scalar);
    if dgate.is_none() && dup.is_none() {
        return Ok(());
    }
    let name = by_type!("glu_backward", scalar)?;
    let launch = spread(gpu, count, group(scalar));
    let args = args![glu_number(kind), gate, up, dy, dgate, dup, count];
    gpu.launch("activation", name, launch, args)
}

/// `y[i] = x[i]·scale + shift`.
///
/// # Errors
/// As [`activation`].
///
/// # Panics
/// As [`activation`].
pub fn affine(gpu: &Gpu, x: Slice<'_>, scale: f64, shift: f64, y: SliceMut<'_>) -> Result<()> {
    check!("affine", y, x.count(), x.scalar());
    let name = by_type!("affine", x.scalar())?;
    let launch = spread(gpu, x.count(), group(x.scalar()));
    let args = args![x, scale as f32, shift as f32, y, x.count()];
    gpu.launch("activation", name, launch, args)
}
