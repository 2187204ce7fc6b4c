use graft_tensor::ops::elementwise::{add_assign, selects_first};
use graft_tensor::ops::random::Key;
use graft_tensor::ops::{self, Activation, Binary, Glu, Needs, Unary};
use graft_tensor::{DType, Shape};
use ndarray::{ArrayD, IxDyn, Zip};

use crate::common::*;

/// Roundings within an elementary function, with room for one that is correct to a few units.
const FUNCTION: f64 = 12.0;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn gelu_tanh(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    0.5 * x * (1.0 + inner.tanh())
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / 2f64.sqrt()))
}

fn oracle(kind: Unary, x: f64) -> f64 {
    match kind {
        Unary::Exp => x.exp(),
        Unary::Ln => x.ln(),
        Unary::Sqrt => x.sqrt(),
        Unary::Tanh => x.tanh(),
        Unary::Sigmoid => sigmoid(x),
        Unary::Relu => x.max(0.0),
        Unary::Gelu => gelu(x),
        Unary::GeluTanh => gelu_tanh(x),
        Unary::Silu => x * sigmoid(x),
        Unary::Neg => -x,
        Unary::Abs => x.abs(),
        Unary::Square => x * x,
        Unary::Reciprocal => 1.0 / x,
        Unary::Erf => erf(x),
        Unary::Sin => x.sin(),
        Unary::Cos => x.cos(),
    }
}

pub fn activate(kind: Activation, x: f64) -> f64 {
    match kind {
        Activation::Gelu => gelu(x),
        Activation::GeluTanh => gelu_tanh(x),
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
        Activation::Silu => x * sigmoid(x),
    }
}

/// From 0.25 where the function or its slope ends at 0.
fn domain(kind: Unary) -> (f64, f64) {
    match kind {
        Unary::Ln | Unary::Sqrt | Unary::Reciprocal => (0.25, 4.0),
        _ => (-4.0, 4.0),
    }
}

#[test]
fn functions_of_one_element() {
    for kind in Unary::ALL {
        cases(|case| {
            let (low, high) = domain(kind);
            let x = case.between(0, &case.dims, low, high);
            let y = run1(|m| ops::unary(m, kind, &x.on(m)));
            let want = x.values.mapv(|x| oracle(kind, x));
            // The tails of GELU and SiLU are differences of numbers of the order of x.
            let scale = x.values.mapv(|x| x.abs().max(1.0));
            near(&y, &want, FUNCTION, &scale);
        });
    }
}

#[test]
fn slopes_of_functions_of_one_element() {
    for kind in Unary::ALL {
        cases(|case| {
            let (low, high) = domain(kind);
            let x = case.between(0, &case.dims, low, high);
            let dy = case.between(1, &case.dims, -1.0, 1.0);
            let needs = kind.backward_needs();
            let saved = match needs {
                Needs::Input => Some(x),
                // What the type keeps of the output is what its backward sees.
                Needs::Output => {
                    let mut y = case.between(0, &case.dims, low, high);
                    y.values
                        .mapv_inplace(|x| round(case.dtype, oracle(kind, x)));
                    Some(y)
                }
                Needs::Neither => None,
            };
            let gradient = |m: &_, t: DType| {
                let saved = saved.as_ref().map(|s| s.cast_on(t, m));
                ops::unary_backward(m, kind, saved.as_ref(), &dy.cast_on(t, m)).map(|g| vec![g])
            };
            // Slopes reach 1/x² = 16 and exp(4) = 55.
            near_f64(case, gradient, FUNCTION, 55.0);
        });
    }
}

#[test]
fn activations_and_their_slopes() {
    for kind in Activation::ALL {
        cases(|case| {
            let x = case.between(0, &case.dims, -4.0, 4.0);
            let dy = case.between(1, &case.dims, -1.0, 1.0);
            let y = run1(|m| ops::activation(m, kind, &x.on(m)));
            near_by(&y, &x.values.mapv(|x| activate(kind, x)), FUNCTION, 4.0);
            let gradient = |m: &_, t| {
                let (x, dy) = (x.cast_on(t, m), dy.cast_on(t, m));
                // Once over the gradient's own storage, once beside it.
                let shared = ops::activation_backward(m, kind, &x, dy.clone())?;
                let own = ops::activation_backward(m, kind, &x, dy)?;
                assert_eq!(m.is_planned(), own.is_planned());
                if !m.is_planned() {
                    assert_eq!(own.to_f64()?, shared.to_f64()?);
                }
                Ok(vec![own])
            };
            near_f64(case, gradient, FUNCTION, 4.0);
        });
    }
}

#[test]
fn gated_units_and_their_slopes() {
    for kind in Glu::ALL {
        cases(|case| {
            let (gate, up) = (case.input(0, &case.dims), case.input(1, &case.dims));
            let dy = case.between(2, &case.dims, -1.0, 1.0);
            let y = run1(|m| ops::glu(m, kind, &gate.on(m), &up.on(m)));
            let act = match kind {
                Glu::Swiglu => Activation::Silu,
                Glu::Geglu => Activation::Gelu,
                Glu::GegluTanh => Activation::GeluTanh,
            };
            let want = gate.values.mapv(|x| activate(act, x)) * &up.values;
            near_by(&y, &want, FUNCTION, 4.0);
            let needs = [case.flags[0], case.flags[1]];
            let gradient = |m: &_, t| {
                let (gate, up, dy) = (gate.cast_on(t, m), up.cast_on(t, m), dy.cast_on(t, m));
                let parts = ops::glu_backward(m, kind, &gate, &up, &dy, needs)?;
                assert_eq!(parts.each_ref().map(Option::is_some), needs);
                Ok(parts.into_iter().flatten().collect())
            };
            near_f64(case, gradient, FUNCTION, 4.0);
        });
    }
}

#[test]
fn affine() {
    cases(|case| {
        let x = case.input(0, &case.dims);
        let y = run1(|m| ops::affine(m, &x.on(m), -1.7, 0.3));
        // Scale and shift are rounded, and the two operations.
        near_by(&y, &x.values.mapv(|x| x * -1.7 + 0.3), 4.0, 4.0);
    });
}

/// Two shapes that broadcast: lengths of 1 by the case's flags, leading dimensions left out.
fn broadcasting(case: &Case) -> (Vec<usize>, Vec<usize>) {
    let mut a = case.dims.to_vec();
    let mut b = case.dims.to_vec();
    for axis in 0..4 {
        match (case.flags[axis], (case.pick >> axis) & 1) {
            (true, 0) => a[axis] = 1,
            (true, _) => b[axis] = 1,
            _ => {}
        }
    }
    (a, b.split_off(case.pick / 16 % 5))
}

#[test]
fn functions_of_two_elements_broadcast() {
    for kind in Binary::ALL {
        cases(|case| {
            let (a, b) = broadcasting(case);
            let a = case.input(0, &a);
            let b = match kind {
                Binary::Div => case.between(1, &b, 0.25, 2.0),
                _ => case.input(1, &b),
            };
            let y = run1(|m| ops::binary(m, kind, &a.on(m), &b.on(m)));
            let shape = broadcast(a.shape(), b.shape());
            let mut want = ArrayD::zeros(IxDyn(&shape));
            Zip::from(&mut want)
                .and_broadcast(&a.values)
                .and_broadcast(&b.values)
                .for_each(|w, &a, &b| {
                    *w = match kind {
                        Binary::Add => a + b,
                        Binary::Sub => a - b,
                        Binary::Mul => a * b,
                        Binary::Div => a / b,
                        Binary::Max => a.max(b),
                        Binary::Min => a.min(b),
                    }
                });
            near_by(&y, &want, 1.0, 0.0);
            if matches!(kind, Binary::Max | Binary::Min) {
                let first = run1(|m| selects_first(m, kind, &a.on(m), &b.on(m)));
                let a = a.values.broadcast(IxDyn(&shape)).unwrap();
                let mut want = want;
                Zip::from(&mut want)
                    .and(&a)
                    .for_each(|w, a| *w = f64::from(*w == *a));
                equal(&first, &want);
            }
        });
    }
}

#[test]
fn gradients_of_broadcasts_are_summed() {
    cases(|case| {
        let (shape, _) = broadcasting(case);
        let shape = shape[case.pick / 16 % 5..].to_vec();
        let dy = case.input(0, &case.dims);
        let to = Shape::new(&shape).unwrap();
        let y = run1(|m| ops::reduce_to_shape(m, &dy.on(m), &to));
        let mut want = dy.values.clone();
        let mut size = dy.values.mapv(f64::abs);
        let mut passes = 0.0;
        for lead in [true, false] {
            for axis in 0..4 {
                let back = 4 - axis;
                let gone = back > shape.len();
                let own = shape.len().checked_sub(back);
                let one = own.is_some_and(|own| shape[own] == 1 && case.dims[axis] != 1);
                if lead == gone && (gone || one) {
                    let at = ndarray::Axis(axis);
                    want = want.sum_axis(at).insert_axis(at);
                    size = size.sum_axis(at).insert_axis(at);
                    passes += 1.0;
                }
            }
        }
        let reshape = |x: ArrayD<f64>| x.into_shape_with_order(IxDyn(&shape)).unwrap();
        let (want, size) = (reshape(want), reshape(size));
        // Each pass over one dimension rounds to the type itself.
        let roundings = passes * (7.0 + unit(case.dtype) / unit(wide(case.dtype)));
        near(&y, &want, roundings, &size);
    });
}

#[test]
fn sums_in_place() {
    cases(|case| {
        let (x, y) = (case.input(0, &case.dims), case.input(1, &case.dims).plain());
        let sum = run1(|m| {
            let mut y = y.on(m);
            add_assign(&mut y, &x.on(m))?;
            Ok(y)
        });
        near_by(&sum, &(&x.values + &y.values), 1.0, 0.0);
    });
}

#[test]
fn casts_round_to_nearest() {
    for to in FLOATS {
        cases(|case| {
            let x = case.between(0, &case.dims, -300.0, 300.0);
            let y = run1(|m| ops::cast(m, &x.on(m), to));
            assert_eq!(y.dtype, to);
            equal(&y, &x.values.mapv(|x| round(to, x)));
        });
    }
}

#[test]
fn dropout_is_a_mask_of_the_key_and_the_place() {
    cases(|case| {
        let x = case.between(0, &case.dims, 0.5, 2.0);
        let p = case.of(&[0.0, 0.1, 0.5, 0.9]);
        let key = Key::new(case.seed, 1, 2);
        let y = run1(|m| ops::dropout(m, &x.on(m), p, key));
        let again = run1(|m| ops::dropout_backward(m, x.on(m), p, key));
        assert_eq!(again.values, y.values, "in place");
        // Of ones of another type, the mask alone.
        let ones = run1(|m| {
            ops::dropout(
                m,
                &upload(m, DType::F64, vec![1.0; x.values.len()], x.shape()),
                p,
                key,
            )
        });
        let kept = 1.0 / (1.0 - p);
        assert!(ones.values.iter().all(|&y| y == 0.0 || y == kept));
        near_by(&y, &(&x.values * &ones.values), 2.0, 0.0);
    });
    let share = |seed| {
        let ones = |m: &_| upload(m, DType::F32, vec![1.0; 40_000], &[40_000]);
        let y = run1(|m| ops::dropout(m, &ones(m), 0.3, Key::new(seed, 0, 0)));
        y.values.iter().filter(|&&y| y == 0.0).count() as f64 / 40_000.0
    };
    // Binomial: a standard deviation of 0.0023; five of them.
    assert!((share(1) - 0.3).abs() < 0.0115);
    assert_ne!(share(1), share(2));
}
