//! Optimizer steps and the reductions that go with them.

use crate::element::{Float, Real};
use crate::parallel::{for_each_chunk, reduce_chunks};
use crate::simd::{Isa, kernel, public};
use crate::sums::{LANES, each_lane, total};
use std::hint::black_box;

/// One step of AdamW: I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", ICLR
/// 2019, in PyTorch's order of operations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// How much of the mean gradient is kept.
    pub beta1: f64,
    /// How much of the mean square is kept.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// The weight shrinks by `lr · weight_decay`, before the update.
    pub weight_decay: f64,
    /// Number of this step; the first is 1.
    pub step: u64,
    /// What the gradient is multiplied with first, for clipping; else 1.
    pub grad_scale: f64,
}

/// One step of stochastic gradient descent, with PyTorch's momentum: the velocity is a sum of
/// gradients, which the learning rate scales when it is applied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// How much of the velocity is kept; 0 for none.
    pub momentum: f64,
    /// How much of the gradient the velocity ignores.
    pub dampening: f64,
    /// Looks ahead by one more step of the velocity: Y. Nesterov 1983.
    pub nesterov: bool,
    /// Added to the gradient as `weight_decay · weight`.
    pub weight_decay: f64,
    /// In the first step the velocity becomes the gradient, whatever it held.
    pub first_step: bool,
    /// What the gradient is multiplied with first, for clipping; else 1.
    pub grad_scale: f64,
}

/// [`AdamW`] in the type that is computed in.
#[derive(Clone, Copy)]
struct Adam<R> {
    keep: R,
    beta1: R,
    one_minus_beta1: R,
    beta2: R,
    one_minus_beta2: R,
    eps: R,
    step_size: R,
    correction: R,
    grad_scale: R,
}

kernel! {
    fn adamw_chunk[A: Arch, T: Float](
        isa: Isa, p: Adam<T::Acc>, weight: &mut [T], grad: &[T], m: &mut [T], v: &mut [T]
    ) {
        for (((weight, grad), m), v) in weight.iter_mut().zip(grad).zip(m).zip(v) {
            let g = grad.widen() * p.grad_scale;
            let mean = A::fma(p.one_minus_beta1, g, p.beta1 * m.widen());
            let square = A::fma(p.one_minus_beta2 * g, g, p.beta2 * v.widen());
            *m = T::narrow(mean);
            *v = T::narrow(square);
            let root = square.sqrt() / p.correction + p.eps;
            *weight = T::narrow(A::fma(-p.step_size, mean / root, weight.widen() * p.keep));
        }
    }
}

public! {
    /// Updates `weight`, its mean gradient `m` and mean square `v` (zero before step 1) in one
    /// pass; all of equal length.
    ///
    /// `weight -= lr·weight_decay·weight`, `m = β₁m + (1-β₁)g`, `v = β₂v + (1-β₂)g²`,
    /// `weight -= lr/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + eps)`.
    pub fn adamw, adamw_with[T: Float](
        isa: Isa, p: &AdamW, weight: &mut [T], grad: &[T], m: &mut [T], v: &mut [T]
    ) {
        assert!(p.step >= 1, "adamw: steps are counted from 1");
        assert_eq!(grad.len(), weight.len(), "adamw: grad and weight differ in length");
        assert_eq!(m.len(), weight.len(), "adamw: m and weight differ in length");
        assert_eq!(v.len(), weight.len(), "adamw: v and weight differ in length");
        let t = p.step as f64;
        let real = T::Acc::from_f64;
        let adam = Adam {
            keep: real(1.0 - p.lr * p.weight_decay),
            beta1: real(p.beta1),
            one_minus_beta1: real(1.0 - p.beta1),
            beta2: real(p.beta2),
            one_minus_beta2: real(1.0 - p.beta2),
            eps: real(p.eps),
            step_size: real(p.lr / (1.0 - p.beta1.powf(t))),
            correction: real((1.0 - p.beta2.powf(t)).sqrt()),
            grad_scale: real(p.grad_scale),
        };
        for_each_chunk(weight.len(), (weight, grad, m, v), |_, (weight, grad, m, v)| {
            adamw_chunk(isa, adam, weight, grad, m, v);
        });
    }
}

/// [`Sgd`] in the type that is computed in.
#[derive(Clone, Copy)]
struct Descent<R> {
    lr: R,
    momentum: R,
    fresh: R,
    ahead: R,
    straight: R,
    weight_decay: R,
    grad_scale: R,
}

kernel! {
    fn sgd_plain[A: Arch, T: Float](isa: Isa, p: Descent<T::Acc>, weight: &mut [T], grad: &[T]) {
        for (weight, grad) in weight.iter_mut().zip(grad) {
            let w = weight.widen();
            let g = A::fma(p.weight_decay, w, grad.widen() * p.grad_scale);
            *weight = T::narrow(A::fma(-p.lr, g, w));
        }
    }
}

kernel! {
    fn sgd_momentum[A: Arch, T: Float](
        isa: Isa, p: Descent<T::Acc>, first: bool, weight: &mut [T], grad: &[T], velocity: &mut [T]
    ) {
        for ((weight, grad), velocity) in weight.iter_mut().zip(grad).zip(velocity) {
            let w = weight.widen();
            let g = A::fma(p.weight_decay, w, grad.widen() * p.grad_scale);
            let moved = A::fma(p.momentum, velocity.widen(), p.fresh * g);
            let v = if first { g } else { moved };
            *velocity = T::narrow(v);
            // Nesterov: g + momentum·v; else v.
            *weight = T::narrow(A::fma(-p.lr, A::fma(p.ahead, v, p.straight * g), w));
        }
    }
}

public! {
    /// Updates `weight`, and `velocity` if there is momentum, in one pass; all of equal length.
    ///
    /// `g += weight_decay·weight`, `velocity = momentum·velocity + (1-dampening)·g` (or `g` in the
    /// first step), `weight -= lr·velocity` (with Nesterov: `lr·(g + momentum·velocity)`).
    pub fn sgd, sgd_with[T: Float](
        isa: Isa, p: &Sgd, weight: &mut [T], grad: &[T], velocity: Option<&mut [T]>
    ) {
        assert_eq!(grad.len(), weight.len(), "sgd: grad and weight differ in length");
        assert!(
            velocity.is_some() || p.momentum == 0.0,
            "sgd: momentum {} needs a velocity",
            p.momentum
        );
        let real = T::Acc::from_f64;
        let descent = Descent {
            lr: real(p.lr),
            momentum: real(p.momentum),
            fresh: real(1.0 - p.dampening),
            ahead: real(if p.nesterov { p.momentum } else { 1.0 }),
            straight: real(if p.nesterov { 1.0 } else { 0.0 }),
            weight_decay: real(p.weight_decay),
            grad_scale: real(p.grad_scale),
        };
        match velocity {
            Some(velocity) if p.momentum != 0.0 => {
                assert_eq!(velocity.len(), weight.len(), "sgd: velocity and weight differ in length");
                let (n, slices) = (weight.len(), (weight, grad, velocity));
                for_each_chunk(n, slices, |_, (weight, grad, velocity)| {
                    sgd_momentum(isa, descent, p.first_step, weight, grad, velocity);
                });
            }
            _ => for_each_chunk(weight.len(), (weight, grad), |_, (weight, grad)| {
                sgd_plain(isa, descent, weight, grad);
            }),
        }
    }
}

/// Partial sums in f64, of which two AVX-512 registers hold all.
const WIDE: usize = 16;

kernel! {
    /// Sums in f64: those of squares of f32 neither overflow nor lose small terms.
    fn wide_sum[A: Arch, T: Float](isa: Isa, squared: bool, x: &[T]) -> f64 {
        let mut lanes = [0.0f64; WIDE];
        let (whole, rest) = x.as_chunks::<WIDE>();
        if squared {
            for x in whole {
                for i in 0..WIDE {
                    let x = x[i].widen().to_f64();
                    lanes[i] = A::fma(x, x, lanes[i]);
                }
            }
        } else {
            for x in whole {
                for i in 0..WIDE {
                    lanes[i] += x[i].widen().to_f64();
                }
            }
        }
        for (i, x) in rest.iter().enumerate() {
            let x = x.widen().to_f64();
            lanes[i] += if squared { x * x } else { x };
        }
        // Sums that are stored are kept in whole vectors until then.
        total(black_box(lanes))
    }
}

/// Σ x, or Σ x², in f64.
pub(crate) fn sum_in_f64<T: Float>(isa: Isa, squared: bool, x: &[T]) -> f64 {
    reduce_chunks(x, &|x: &[T]| wide_sum(isa, squared, x), &|a, b| a + b)
}

public! {
    /// Σ x², summed in f64 by a fixed tree; for the norm of all gradients.
    pub fn sum_squares, sum_squares_with[T: Float](isa: Isa, x: &[T]) -> f64 {
        sum_in_f64(isa, true, x)
    }
}

kernel! {
    fn finite_chunk[A: Arch, T: Float](isa: Isa, x: &[T]) -> bool {
        // x·0 is 0 for what is finite, else NaN, which stays in a sum.
        let mut lanes = [T::Acc::ZERO; LANES];
        each_lane!([lanes], [x = x], |lane| {
            lanes[lane] += x.widen() * T::Acc::ZERO;
        });
        total(lanes) == T::Acc::ZERO
    }
}

public! {
    /// Whether no element is infinite or NaN.
    pub fn all_finite, all_finite_with[T: Float](isa: Isa, x: &[T]) -> bool {
        reduce_chunks(x, &|x: &[T]| finite_chunk(isa, x), &|a, b| a & b)
    }
}
