//! Functions of one element: activations, their gated forms, and the rest of the unary table.
//!
//! Every loop here is one pass: the derivative shares the exponential of its function.

use crate::element::{Float, Real};
use crate::math;
use crate::parallel::for_each_chunk;
use crate::simd::{Arch, kernel, public};

/// A layer's non-linearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x·Φ(x)`, by the error function: D. Hendrycks, K. Gimpel, "Gaussian Error Linear Units",
    /// 2016.
    Gelu,
    /// The same with Φ approximated by a hyperbolic tangent, from the same paper.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// `tanh(x)`
    Tanh,
    /// `x·sigmoid(x)`
    Silu,
}

impl Activation {
    /// Every one.
    pub const ALL: [Activation; 5] = [
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Tanh,
        Activation::Silu,
    ];
}

/// A function of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Unary {
    /// eˣ
    Exp,
    /// Natural logarithm
    Ln,
    /// Square root
    Sqrt,
    /// Hyperbolic tangent
    Tanh,
    /// 1 / (1 + e⁻ˣ)
    Sigmoid,
    /// `max(x, 0)`; NaN stays NaN.
    Relu,
    /// `x·Φ(x)`
    Gelu,
    /// `x·Φ(x)`, approximately, by a hyperbolic tangent
    GeluTanh,
    /// `x·sigmoid(x)`
    Silu,
    /// `-x`
    Neg,
    /// `|x|`; its derivative at 0 is 0.
    Abs,
    /// `x²`
    Square,
    /// `1 / x`
    Reciprocal,
    /// The error function
    Erf,
    /// Sine, x in radians
    Sin,
    /// Cosine, x in radians
    Cos,
}

/// What a derivative is computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Needs {
    /// The function's argument.
    Input,
    /// The function's value.
    Output,
    /// Nothing: it is constant.
    Neither,
}

impl Unary {
    /// Every one.
    pub const ALL: [Unary; 16] = [
        Unary::Exp,
        Unary::Ln,
        Unary::Sqrt,
        Unary::Tanh,
        Unary::Sigmoid,
        Unary::Relu,
        Unary::Gelu,
        Unary::GeluTanh,
        Unary::Silu,
        Unary::Neg,
        Unary::Abs,
        Unary::Square,
        Unary::Reciprocal,
        Unary::Erf,
        Unary::Sin,
        Unary::Cos,
    ];

    /// What [`unary_backward`] reads; the other slice may be empty.
    pub fn backward_needs(self) -> Needs {
        match self {
            Unary::Exp
            | Unary::Sqrt
            | Unary::Tanh
            | Unary::Sigmoid
            | Unary::Relu
            | Unary::Reciprocal => Needs::Output,
            Unary::Ln
            | Unary::Gelu
            | Unary::GeluTanh
            | Unary::Silu
            | Unary::Abs
            | Unary::Square
            | Unary::Erf
            | Unary::Sin
            | Unary::Cos => Needs::Input,
            Unary::Neg => Needs::Neither,
        }
    }
}

/// A feed-forward gate: `activation(gate) · up`. N. Shazeer, "GLU Variants Improve Transformer",
/// 2020.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Glu {
    /// `silu(gate) · up`
    Swiglu,
    /// `gelu(gate) · up`
    Geglu,
    /// `gelu(gate) · up` with GELU by hyperbolic tangent
    GegluTanh,
}

impl Glu {
    /// Every one.
    pub const ALL: [Glu; 3] = [Glu::Swiglu, Glu::Geglu, Glu::GegluTanh];
}

/// A function as a type, so that loops are compiled for each.
trait Op: 'static {
    const NEEDS: Needs;
    fn value<A: Arch, R: Real>(x: R) -> R;
    /// The derivative at x, where the value is y. Reads only what `NEEDS` says.
    fn slope<A: Arch, R: Real>(x: R, y: R) -> R;
}

macro_rules! op {
    ($name:ident, $needs:ident, $arch:ident, |$x:ident| $value:expr, |$sx:ident, $sy:ident| $slope:expr) => {
        struct $name;
        impl Op for $name {
            const NEEDS: Needs = Needs::$needs;
            #[inline(always)]
            fn value<$arch: Arch, R: Real>($x: R) -> R {
                $value
            }
            #[inline(always)]
            fn slope<$arch: Arch, R: Real>($sx: R, $sy: R) -> R {
                $slope
            }
        }
    };
}

#[inline(always)]
fn constant<R: Real>(value: f64) -> R {
    R::from_f64(value)
}

/// √(2/π), of GELU by hyperbolic tangent.
const ROOT_2_OVER_PI: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
const CUBIC: f64 = 0.044715;

/// (1 + tanh(u)) / 2 = sigmoid(2u), and 1 minus that, with u = √(2/π)·(x + 0.044715 x³).
#[inline(always)]
fn tanh_gate<A: Arch, R: Real>(x: R) -> (R, R) {
    let inner = A::fma(constant::<R>(2.0 * ROOT_2_OVER_PI * CUBIC) * x, x * x, {
        constant::<R>(2.0 * ROOT_2_OVER_PI) * x
    });
    math::logistic::<A, R>(inner)
}

#[inline(always)]
fn gelu_tanh_slope<A: Arch, R: Real>(x: R) -> R {
    let (s, rest) = tanh_gate::<A, R>(x);
    // Beyond |x| = 1000 the factor s(1-s) is 0; the square must not become infinite.
    let (square, limit) = (x * x, constant::<R>(1e6));
    let square = if square > limit { limit } else { square };
    let growth = A::fma(
        constant::<R>(6.0 * ROOT_2_OVER_PI * CUBIC),
        square,
        constant::<R>(2.0 * ROOT_2_OVER_PI),
    );
    A::fma(x * s * rest, growth, s)
}

#[inline(always)]
fn gelu_slope<A: Arch, R: Real>(x: R) -> R {
    let (below, density) = math::normal::<A, R>(x);
    A::fma(x, density, below)
}

#[inline(always)]
fn silu_slope<A: Arch, R: Real>(x: R) -> R {
    let (s, rest) = math::logistic::<A, R>(x);
    A::fma(x * s, rest, s)
}

#[inline(always)]
fn sign<R: Real>(x: R) -> R {
    let positive = if x > R::ZERO { R::ONE } else { x };
    if x < R::ZERO { -R::ONE } else { positive }
}

op!(Exp, Output, A, |x| math::exp::<A, R>(x), |_x, y| y);
op!(Ln, Input, A, |x| math::ln::<A, R>(x), |x, _y| R::ONE / x);
op!(Sqrt, Output, A, |x| x.sqrt(), |_x, y| constant::<R>(0.5)
    / y);
op!(Tanh, Output, A, |x| math::tanh::<A, R>(x), |_x, y| A::fma(
    -y,
    y,
    R::ONE
));
op!(Sigmoid, Output, A, |x| math::sigmoid::<A, R>(x), |_x, y| y
    * (R::ONE - y));
op!(
    Relu,
    Output,
    A,
    |x| if x < R::ZERO { R::ZERO } else { x },
    |_x, y| if y > R::ZERO { R::ONE } else { R::ZERO }
);
op!(
    Gelu,
    Input,
    A,
    |x| x * math::normal::<A, R>(x).0,
    |x, _y| gelu_slope::<A, R>(x)
);
op!(
    GeluTanh,
    Input,
    A,
    |x| x * tanh_gate::<A, R>(x).0,
    |x, _y| gelu_tanh_slope::<A, R>(x)
);
op!(Silu, Input, A, |x| x * math::sigmoid::<A, R>(x), |x, _y| {
    silu_slope::<A, R>(x)
});
op!(Neg, Neither, A, |x| -x, |_x, _y| -R::ONE);
op!(Abs, Input, A, |x| x.abs(), |x, _y| sign(x));
op!(Square, Input, A, |x| x * x, |x, _y| x + x);
op!(Reciprocal, Output, A, |x| R::ONE / x, |_x, y| -(y * y));
op!(
    Erf,
    Input,
    A,
    |x| math::erf::<A, R>(x),
    |x, _y| constant::<R>(std::f64::consts::FRAC_2_SQRT_PI) * math::exp::<A, R>(-(x * x))
);
op!(
    Sin,
    Input,
    A,
    |x| constant::<R>(x.to_f64().sin()),
    |x, _y| constant::<R>(x.to_f64().cos())
);
op!(
    Cos,
    Input,
    A,
    |x| constant::<R>(x.to_f64().cos()),
    |x, _y| constant::<R>(-x.to_f64().sin())
);

#[inline(always)]
fn in_place<A: Arch, O: Op, R: Real>(x: &mut [R]) {
    for x in x {
        *x = O::value::<A, R>(*x);
    }
}

/// `x[i] = kind(x[i])`, inside a function that has the architecture's instructions: for kernels
/// that apply an activation on their way.
#[inline(always)]
pub(crate) fn apply_all<A: Arch, R: Real>(kind: Activation, x: &mut [R]) {
    match kind {
        Activation::Gelu => in_place::<A, Gelu, R>(x),
        Activation::GeluTanh => in_place::<A, GeluTanh, R>(x),
        Activation::Relu => in_place::<A, Relu, R>(x),
        Activation::Tanh => in_place::<A, Tanh, R>(x),
        Activation::Silu => in_place::<A, Silu, R>(x),
    }
}

kernel! {
    fn map[A: Arch, O: Op, T: Float](isa: Isa, x: &[T], y: &mut [T]) {
        for (x, y) in x.iter().zip(y) {
            *y = T::narrow(O::value::<A, T::Acc>(x.widen()));
        }
    }
}

/// The slope at x. An operation that wants its value gets it computed; else that falls away.
#[inline(always)]
fn slope_at<A: Arch, O: Op, R: Real>(x: R) -> R {
    let y = if O::NEEDS == Needs::Output {
        O::value::<A, R>(x)
    } else {
        R::ZERO
    };
    O::slope::<A, R>(x, y)
}

kernel! {
    /// From the argument.
    fn back_input[A: Arch, O: Op, T: Float](isa: Isa, x: &[T], dy: &[T], dx: &mut [T]) {
        for ((x, dy), dx) in x.iter().zip(dy).zip(dx) {
            *dx = T::narrow(dy.widen() * slope_at::<A, O, T::Acc>(x.widen()));
        }
    }
}

kernel! {
    /// From the argument, over the gradient.
    fn back_in_place[A: Arch, O: Op, T: Float](isa: Isa, x: &[T], grad: &mut [T]) {
        for (x, grad) in x.iter().zip(grad) {
            *grad = T::narrow(grad.widen() * slope_at::<A, O, T::Acc>(x.widen()));
        }
    }
}

kernel! {
    /// From the value.
    fn back_output[A: Arch, O: Op, T: Float](isa: Isa, y: &[T], dy: &[T], dx: &mut [T]) {
        for ((y, dy), dx) in y.iter().zip(dy).zip(dx) {
            *dx = T::narrow(dy.widen() * O::slope::<A, T::Acc>(T::Acc::ZERO, y.widen()));
        }
    }
}

/// Runs an expression with `O` standing for the type of the operation.
macro_rules! with_op {
    ($kind:expr, $table:ident { $($name:ident)* }, $run:expr) => {
        match $kind {
            $($table::$name => {
                type O = $name;
                $run
            })*
        }
    };
}

public! {
    /// `y[i] = kind(x[i])`.
    pub fn activation, activation_with[T: Float](
        isa: Isa, kind: Activation, x: &[T], y: &mut [T]
    ) {
        assert_eq!(x.len(), y.len(), "activation: x and y differ in length");
        with_op!(
            kind,
            Activation { Gelu GeluTanh Relu Tanh Silu },
            for_each_chunk(y.len(), (x, y), |_, (x, y)| map::<O, T>(isa, x, y))
        );
    }
}

public! {
    /// `grad[i] = grad[i] · kind'(x[i])`, with `x` from before the activation: the gradient of the
    /// result becomes that of the argument.
    pub fn activation_backward, activation_backward_with[T: Float](
        isa: Isa, kind: Activation, x: &[T], grad: &mut [T]
    ) {
        assert_eq!(x.len(), grad.len(), "activation_backward: x and grad differ in length");
        with_op!(
            kind,
            Activation { Gelu GeluTanh Relu Tanh Silu },
            for_each_chunk(grad.len(), (x, grad), |_, (x, grad)| {
                back_in_place::<O, T>(isa, x, grad);
            })
        );
    }
}

public! {
    /// `y[i] = kind(x[i])`.
    pub fn unary, unary_with[T: Float](isa: Isa, kind: Unary, x: &[T], y: &mut [T]) {
        assert_eq!(x.len(), y.len(), "unary: x and y differ in length");
        with_op!(
            kind,
            Unary {
                Exp Ln Sqrt Tanh Sigmoid Relu Gelu GeluTanh Silu Neg Abs Square Reciprocal Erf Sin
                Cos
            },
            for_each_chunk(y.len(), (x, y), |_, (x, y)| map::<O, T>(isa, x, y))
        );
    }
}

public! {
    /// `dx[i] = dy[i] · kind'(x[i])`, with `y = kind(x)`. What [`Unary::backward_needs`] does not
    /// ask for is not read and may be empty.
    pub fn unary_backward, unary_backward_with[T: Float](
        isa: Isa, kind: Unary, x: &[T], y: &[T], dy: &[T], dx: &mut [T]
    ) {
        assert_eq!(dy.len(), dx.len(), "unary_backward: dy and dx differ in length");
        let given = match kind.backward_needs() {
            Needs::Input => x,
            Needs::Output => y,
            Needs::Neither => dy, // read, and without influence
        };
        assert_eq!(
            given.len(),
            dx.len(),
            "unary_backward: {kind:?} needs its {:?} as long as dx",
            kind.backward_needs()
        );
        with_op!(
            kind,
            Unary {
                Exp Ln Sqrt Tanh Sigmoid Relu Gelu GeluTanh Silu Neg Abs Square Reciprocal Erf Sin
                Cos
            },
            for_each_chunk(dx.len(), (given, dy, dx), |_, (given, dy, dx)| match O::NEEDS {
                Needs::Input => back_input::<O, T>(isa, given, dy, dx),
                _ => back_output::<O, T>(isa, given, dy, dx),
            })
        );
    }
}

kernel! {
    fn gate_forward[A: Arch, O: Op, T: Float](isa: Isa, gate: &[T], up: &[T], y: &mut [T]) {
        for ((gate, up), y) in gate.iter().zip(up).zip(y) {
            *y = T::narrow(O::value::<A, T::Acc>(gate.widen()) * up.widen());
        }
    }
}

kernel! {
    fn gate_backward[A: Arch, O: Op, T: Float](
        isa: Isa, gate: &[T], up: &[T], dy: &[T], dgate: &mut [T], dup: &mut [T]
    ) {
        for ((((gate, up), dy), dgate), dup) in gate.iter().zip(up).zip(dy).zip(dgate).zip(dup) {
            let (gate, dy) = (gate.widen(), dy.widen());
            *dup = T::narrow(dy * O::value::<A, T::Acc>(gate));
            *dgate = T::narrow(dy * up.widen() * O::slope::<A, T::Acc>(gate, T::Acc::ZERO));
        }
    }
}

kernel! {
    fn gate_backward_gate[A: Arch, O: Op, T: Float](
        isa: Isa, gate: &[T], up: &[T], dy: &[T], dgate: &mut [T]
    ) {
        for (((gate, up), dy), dgate) in gate.iter().zip(up).zip(dy).zip(dgate) {
            let slope = O::slope::<A, T::Acc>(gate.widen(), T::Acc::ZERO);
            *dgate = T::narrow(dy.widen() * up.widen() * slope);
        }
    }
}

public! {
    /// `y[i] = activation(gate[i]) · up[i]`.
    pub fn glu, glu_with[T: Float](isa: Isa, kind: Glu, gate: &[T], up: &[T], y: &mut [T]) {
        assert_eq!(gate.len(), y.len(), "glu: gate and y differ in length");
        assert_eq!(up.len(), y.len(), "glu: up and y differ in length");
        let (n, slices) = (y.len(), (gate, up, y));
        match kind {
            Glu::Swiglu => for_each_chunk(n, slices, |_, (gate, up, y)| {
                gate_forward::<Silu, T>(isa, gate, up, y);
            }),
            Glu::Geglu => for_each_chunk(n, slices, |_, (gate, up, y)| {
                gate_forward::<Gelu, T>(isa, gate, up, y);
            }),
            Glu::GegluTanh => for_each_chunk(n, slices, |_, (gate, up, y)| {
                gate_forward::<GeluTanh, T>(isa, gate, up, y);
            }),
        }
    }
}

/// One block of [`glu_backward`].
fn glu_block<O: Op, T: Float>(
    isa: crate::simd::Isa,
    gate: &[T],
    up: &[T],
    dy: &[T],
    dgate: Option<&mut [T]>,
    dup: Option<&mut [T]>,
) {
    match (dgate, dup) {
        (Some(dgate), Some(dup)) => gate_backward::<O, T>(isa, gate, up, dy, dgate, dup),
        (Some(dgate), None) => gate_backward_gate::<O, T>(isa, gate, up, dy, dgate),
        // dup = dy · activation(gate) has the form of the forward pass.
        (None, Some(dup)) => gate_forward::<O, T>(isa, gate, dy, dup),
        (None, None) => (),
    }
}

public! {
    /// `dgate[i] = dy[i]·up[i]·activation'(gate[i])` and `dup[i] = dy[i]·activation(gate[i])`,
    /// each if asked for.
    pub fn glu_backward, glu_backward_with[T: Float](
        isa: Isa, kind: Glu, gate: &[T], up: &[T], dy: &[T],
        dgate: Option<&mut [T]>, dup: Option<&mut [T]>
    ) {
        let n = dy.len();
        assert_eq!(gate.len(), n, "glu_backward: gate and dy differ in length");
        assert_eq!(up.len(), n, "glu_backward: up and dy differ in length");
        if let Some(dgate) = &dgate {
            assert_eq!(dgate.len(), n, "glu_backward: dgate and dy differ in length");
        }
        if let Some(dup) = &dup {
            assert_eq!(dup.len(), n, "glu_backward: dup and dy differ in length");
        }
        for_each_chunk(n, (gate, up, dy, dgate, dup), |_, (gate, up, dy, dgate, dup)| match kind {
            Glu::Swiglu => glu_block::<Silu, T>(isa, gate, up, dy, dgate, dup),
            Glu::Geglu => glu_block::<Gelu, T>(isa, gate, up, dy, dgate, dup),
            Glu::GegluTanh => glu_block::<GeluTanh, T>(isa, gate, up, dy, dgate, dup),
        });
    }
}

kernel! {
    fn scale_shift[A: Arch, T: Float](
        isa: Isa, x: &[T], scale: T::Acc, shift: T::Acc, y: &mut [T]
    ) {
        for (x, y) in x.iter().zip(y) {
            *y = T::narrow(A::fma(x.widen(), scale, shift));
        }
    }
}

public! {
    /// `y[i] = x[i]·scale + shift`.
    pub fn affine, affine_with[T: Float](
        isa: Isa, x: &[T], scale: f64, shift: f64, y: &mut [T]
    ) {
        assert_eq!(x.len(), y.len(), "affine: x and y differ in length");
        let (scale, shift) = (T::Acc::from_f64(scale), T::Acc::from_f64(shift));
        for_each_chunk(y.len(), (x, y), |_, (x, y)| scale_shift(isa, x, scale, shift, y));
    }
}
