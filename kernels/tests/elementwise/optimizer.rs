use crate::support::*;
use graft_kernels::optimizer::*;
use graft_kernels::{Real, parallel};
use half::{bf16, f16};
use proptest::prelude::*;

fn adam(step: u64) -> AdamW {
    AdamW {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.1,
        step,
        grad_scale: 0.5,
    }
}

/// PyTorch's formula, one element.
fn adam_reference(p: &AdamW, w: &mut f64, g: f64, m: &mut f64, v: &mut f64) {
    let (g, t) = (g * p.grad_scale, p.step as i32);
    *w *= 1.0 - p.lr * p.weight_decay;
    *m = p.beta1 * *m + (1.0 - p.beta1) * g;
    *v = p.beta2 * *v + (1.0 - p.beta2) * g * g;
    let denominator = v.sqrt() / (1.0 - p.beta2.powi(t)).sqrt() + p.eps;
    *w -= p.lr / (1.0 - p.beta1.powi(t)) * *m / denominator;
}

fn adam_steps<T: Stored>(n: usize, steps: u64, seed: u64, tolerance: f64) {
    on_each(|isa| {
        let mut w: Vec<T> = stored(n, seed, -1.0, 1.0);
        let (mut m, mut v) = (vec![T::default(); n], vec![T::default(); n]);
        let (mut rw, mut rm, mut rv) = (widen(&w), vec![0.0; n], vec![0.0; n]);
        for step in 1..=steps {
            let g: Vec<T> = stored(n, seed + step, -2.0, 2.0);
            adamw_with(isa, &adam(step), &mut w, &g, &mut m, &mut v);
            for i in 0..n {
                let g = g[i].widen().to_f64();
                adam_reference(&adam(step), &mut rw[i], g, &mut rm[i], &mut rv[i]);
            }
        }
        let (w, m, v) = (widen(&w), widen(&m), widen(&v));
        for i in 0..n {
            let errors = [
                (w[i] - rw[i]).abs(),
                (m[i] - rm[i]).abs(),
                (v[i] - rv[i]).abs(),
            ];
            assert!(
                errors.iter().all(|error| *error <= tolerance),
                "element {i} after {steps} steps: {errors:?}"
            );
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn adamw_follows_pytorch(n in 0usize..200, steps in 1u64..12, seed in any::<u32>()) {
        let seed = u64::from(seed);
        // Each step rounds w (below 1.2), m and v (below 1) once, and the update of at most
        // 0.1 a few times.
        adam_steps::<f64>(n, steps, seed, 1e-15 * steps as f64);
        adam_steps::<f32>(n, steps, seed, 1.5e-7 * steps as f64);
    }

    #[test]
    fn sums_of_squares(n in 0usize..3000, seed in any::<u32>()) {
        fn check<T: Stored>(n: usize, seed: u32) {
            let x: Vec<T> = stored(n, u64::from(seed), -3.0, 3.0);
            let want: f64 = widen(&x).iter().map(|x| x * x).sum();
            on_each(|isa| {
                let got = sum_squares_with(isa, &x);
                // The oracle adds n numbers below 9 one by one.
                assert!((got - want).abs() <= 1e-16 * 9.0 * (n * n) as f64, "{got} != {want}");
            });
        }
        for_all_types!(check(n, seed));
    }

    #[test]
    fn one_bad_element_is_found(n in 1usize..70_000, at in any::<u32>(), bad in 0usize..3) {
        fn check<T: Stored>(n: usize, at: usize, bad: f64) {
            let mut x: Vec<T> = stored(n, 1, -3.0, 3.0);
            on_each(|isa| assert!(all_finite_with(isa, &x)));
            x[at] = T::narrow(T::Acc::from_f64(bad));
            on_each(|isa| assert!(!all_finite_with(isa, &x)));
        }
        let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][bad];
        for_all_types!(check(n, at as usize % n, bad));
    }
}

#[test]
fn adamw_first_step_by_hand() {
    // m̂ = g and v̂ = g² after one step, so the weight moves by lr·sign(g) after its decay.
    let p = AdamW {
        grad_scale: 1.0,
        eps: 0.0,
        ..adam(1)
    };
    let (mut w, mut m, mut v) = ([2.0f64, -1.0], [0.0; 2], [0.0; 2]);
    adamw(&p, &mut w, &[0.3, -7.0], &mut m, &mut v);
    for (w, want) in w.iter().zip([2.0 * 0.999 - 0.01, -0.999 + 0.01]) {
        assert!((w - want).abs() < 1e-15, "{w} != {want}");
    }
    // In 16 bits nothing becomes infinite or NaN on the way.
    for step in [1, 2, 100_000] {
        let (mut w, mut m, mut v) = ([bf16::ONE; 3], [bf16::ZERO; 3], [bf16::ZERO; 3]);
        let g = [bf16::MAX, bf16::MIN_POSITIVE, bf16::ZERO];
        adamw(
            &AdamW {
                eps: 1e-8,
                ..adam(step)
            },
            &mut w[1..],
            &g[1..],
            &mut m[1..],
            &mut v[1..],
        );
        assert!(w.iter().all(|w| w.is_finite()), "{w:?}");
    }
    let mut w = [f16::ONE];
    adamw(
        &adam(1),
        &mut w,
        &[f16::ZERO],
        &mut [f16::ZERO],
        &mut [f16::ZERO],
    );
    assert_eq!(w[0], f16::from_f32(0.999));
}

fn sgd_steps(p: Sgd, seed: u64) {
    let n = 70;
    on_each(|isa| {
        let mut w: Vec<f32> = stored(n, seed, -1.0, 1.0);
        // What the velocity held before the first step must not matter.
        let mut velocity = vec![f32::NAN; n];
        let (mut rw, mut rv) = (widen(&w), vec![0.0; n]);
        for step in 0..6 {
            let p = Sgd {
                first_step: step == 0,
                ..p
            };
            let g: Vec<f32> = stored(n, seed + 1 + step, -2.0, 2.0);
            let buffer = (p.momentum != 0.0).then_some(&mut velocity[..]);
            sgd_with(isa, &p, &mut w, &g, buffer);
            for i in 0..n {
                let g = f64::from(g[i]) * p.grad_scale + p.weight_decay * rw[i];
                let update = if p.momentum == 0.0 {
                    g
                } else {
                    rv[i] = if step == 0 {
                        g
                    } else {
                        p.momentum * rv[i] + (1.0 - p.dampening) * g
                    };
                    if p.nesterov {
                        g + p.momentum * rv[i]
                    } else {
                        rv[i]
                    }
                };
                rw[i] -= p.lr * update;
            }
        }
        for i in 0..n {
            assert!(
                (f64::from(w[i]) - rw[i]).abs() < 2e-6,
                "{p:?} on {isa:?}: {} != {}",
                w[i],
                rw[i]
            );
        }
    });
}

#[test]
fn sgd_follows_pytorch() {
    let plain = Sgd {
        lr: 0.1,
        momentum: 0.0,
        dampening: 0.0,
        nesterov: false,
        weight_decay: 0.01,
        first_step: true,
        grad_scale: 0.5,
    };
    sgd_steps(plain, 1);
    sgd_steps(
        Sgd {
            momentum: 0.9,
            ..plain
        },
        2,
    );
    sgd_steps(
        Sgd {
            momentum: 0.9,
            dampening: 0.3,
            ..plain
        },
        3,
    );
    sgd_steps(
        Sgd {
            momentum: 0.9,
            nesterov: true,
            ..plain
        },
        4,
    );
}

#[test]
fn squares_do_not_overflow() {
    let x = [1e30f32; 100];
    assert!((sum_squares(&x) / 1e62 - 1.0).abs() < 1e-6);
    assert!(sum_squares(&[1.0, f32::NAN]).is_nan());
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let n = 3 * parallel::GRAIN + 29;
    let g: Vec<f32> = stored(n, 1, -5.0, 5.0);
    same_on_any_pool("optimizer", || {
        let (mut w, mut m, mut v) = (g.clone(), vec![0.0; n], vec![0.0; n]);
        adamw(&adam(3), &mut w, &g, &mut m, &mut v);
        (bits(&w), bits(&m), bits(&v), sum_squares(&g).to_bits())
    });
}

#[test]
#[should_panic(expected = "adamw: steps are counted from 1")]
fn steps_count_from_one() {
    adamw::<f32>(&adam(0), &mut [], &[], &mut [], &mut []);
}

#[test]
#[should_panic(expected = "sgd: momentum 0.9 needs a velocity")]
fn momentum_needs_a_velocity() {
    let p = Sgd {
        lr: 0.1,
        momentum: 0.9,
        dampening: 0.0,
        nesterov: false,
        weight_decay: 0.0,
        first_step: true,
        grad_scale: 1.0,
    };
    sgd(&p, &mut [1f32], &[1.0], None);
}

#[test]
#[should_panic(expected = "adamw: v and weight differ in length")]
fn lengths_are_checked() {
    adamw(
        &adam(1),
        &mut [1f32; 2],
        &[1.0; 2],
        &mut [0.0; 2],
        &mut [0.0; 3],
    );
}
