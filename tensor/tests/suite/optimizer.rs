use graft_tensor::ops::optimizer::{AdamW, Sgd, adamw, all_finite, sgd, sum_squares};
use graft_tensor::{DType, Memory};
use ndarray::{ArrayD, IxDyn, Zip};

use crate::common::*;

/// Roundings of weights and state to their type, for each of `steps` steps.
fn roundings(case: &Case, steps: usize) -> f64 {
    steps as f64 * 4.0 * unit(case.dtype) / unit(wide(case.dtype)) + 64.0
}

#[test]
fn adamw_steps() {
    cases(|case| {
        let weight = case.input(0, &case.dims).plain();
        let gradients: Vec<Input> = (1..4)
            .map(|i| case.between(i, &case.dims, 0.25, 1.0))
            .collect();
        let p = |step| AdamW {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-6,
            weight_decay: 0.1,
            step,
            grad_scale: 0.5,
        };
        let parts = run(|m| {
            let mut w = weight.on(m);
            let zeros =
                |m: &Memory| upload(m, case.dtype, vec![0.0; weight.values.len()], &case.dims);
            let (mut first, mut second) = (zeros(m), zeros(m));
            for (i, g) in gradients.iter().enumerate() {
                adamw(&p(i as u64 + 1), &mut w, &g.on(m), &mut first, &mut second)?;
            }
            Ok(vec![w, first, second])
        });
        let zero = ArrayD::zeros(IxDyn(&case.dims));
        let (mut w, mut first, mut second) = (weight.values.clone(), zero.clone(), zero);
        for (i, g) in gradients.iter().enumerate() {
            let step = i as i32 + 1;
            Zip::from(&mut w)
                .and(&mut first)
                .and(&mut second)
                .and(&g.values)
                .for_each(|w: &mut f64, m: &mut f64, v: &mut f64, &g| {
                    let g = 0.5 * g;
                    *w -= 0.01 * 0.1 * *w;
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.99 * *v + 0.01 * g * g;
                    let (m, v) = (
                        *m / (1.0 - 0.9f64.powi(step)),
                        *v / (1.0 - 0.99f64.powi(step)),
                    );
                    *w -= 0.01 * m / (v.sqrt() + 1e-6);
                });
        }
        for (y, want) in parts.iter().zip([&w, &first, &second]) {
            near_by(y, want, roundings(case, 3), 2.0);
        }
    });
}

#[test]
fn sgd_steps() {
    cases(|case| {
        let weight = case.input(0, &case.dims).plain();
        let gradients: Vec<Input> = (1..4).map(|i| case.input(i, &case.dims)).collect();
        let [momentum, nesterov, _, _] = case.flags;
        let p = |first_step| Sgd {
            lr: 0.1,
            momentum: if momentum { 0.9 } else { 0.0 },
            dampening: 0.0,
            nesterov: momentum && nesterov,
            weight_decay: 0.1,
            first_step,
            grad_scale: 0.5,
        };
        let parts = run(|m| {
            let mut w = weight.on(m);
            let mut v =
                momentum.then(|| upload(m, case.dtype, vec![0.0; weight.values.len()], &case.dims));
            for (i, g) in gradients.iter().enumerate() {
                sgd(&p(i == 0), &mut w, &g.on(m), v.as_mut())?;
            }
            Ok([w].into_iter().chain(v).collect())
        });
        let (mut w, mut v) = (weight.values.clone(), ArrayD::zeros(IxDyn(&case.dims)));
        for (i, g) in gradients.iter().enumerate() {
            let g = 0.5 * &g.values + 0.1 * &w;
            v = if i == 0 { g.clone() } else { 0.9 * &v + &g };
            let update = match (momentum, nesterov) {
                (false, _) => g,
                (true, false) => v.clone(),
                (true, true) => g + 0.9 * &v,
            };
            w = w - 0.1 * update;
        }
        near_by(&parts[0], &w, roundings(case, 3), 4.0);
        if let Some(velocity) = parts.get(1) {
            near_by(velocity, &v, roundings(case, 3), 4.0);
        }
    });
}

#[test]
fn squares_and_what_is_not_finite() {
    cases(|case| {
        let m = Memory::cpu();
        let x = case.input(0, &case.dims);
        let want = x.values.mapv(|x| x * x).sum();
        let found = sum_squares(&x.on(&m)).unwrap();
        // Kept in f64, whatever the type.
        let n = x.values.len() as f64 + 1.0;
        assert!(
            (found - want).abs() <= n * unit(DType::F64) * want,
            "{found} for {want}"
        );
        assert!(all_finite(&x.on(&m)).unwrap());
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut x = case.input(0, &case.dims).plain();
            if let Some(last) = x.values.iter_mut().nth(case.pick % (n as usize)) {
                *last = bad;
                assert!(!all_finite(&x.on(&m)).unwrap());
            }
        }
    });
    let plan = Memory::planned();
    let x = upload(&plan, DType::F32, vec![f64::NAN], &[1]);
    assert_eq!((sum_squares(&x), all_finite(&x)), (Ok(0.0), Ok(true)));
}
