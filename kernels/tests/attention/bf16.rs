//! Short types. Where the processor does not multiply bf16, they are widened and only the results are rounded. Where it
//! does, weights and the gradients of scores are rounded too, between two products, and nothing else is: what that may
//! cost is computed beside the definition, element by element.

use crate::case::{Case, FULL, bits, cases, close, wide};
use graft_kernels::{Float, Isa};
use half::{bf16, f16};
use proptest::prelude::*;

/// Half a step of bf16, relative to the number that is rounded.
const HALF: f64 = 1.0 / 256.0;

/// What rounding between products may move each element by: of the output and of dq, dk, dv.
struct Bounds {
    out: Vec<f64>,
    grads: [Vec<f64>; 3],
}

impl Bounds {
    /// Weights are off by HALF of themselves, so the output by HALF of the weighted sum of |v|, and
    /// once more by HALF of itself when it is stored. `dot`, its product with its gradient, is off by
    /// the same; a gradient of a score is off by HALF of itself and by its weight times the error of `dot`.
    fn new(case: &Case) -> Bounds {
        let p = &case.p;
        let (_, k, v) = case.layout();
        let (out, lse) = case.naive(&case.fused);
        let tokens = case.tokens();
        let (dim, width) = (p.head_dim, p.heads * p.head_dim);
        let kv_width = p.kv_heads * dim;
        let mut bounds = Bounds {
            out: vec![0.0; out.len()],
            grads: [width, kv_width, kv_width].map(|width| vec![0.0; tokens * width]),
        };
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        for pair in case.offsets.windows(2) {
            let (start, end) = (pair[0] as usize, pair[1] as usize);
            for (h, t) in (0..p.heads).flat_map(|h| (start..end).map(move |t| (h, t))) {
                let g = h * p.kv_heads / p.heads;
                let at = t * width + h * dim..t * width + (h + 1) * dim;
                let (query, dout) = (case.row(&case.fused, 0, t, h), &case.dout[at.clone()]);
                let seen: Vec<usize> = (start..end)
                    .filter(|&j| !p.causal || j <= t)
                    .filter(|&j| p.window.is_none_or(|w| t.abs_diff(j) < w))
                    .collect();
                let weight = |j: usize| {
                    let s = dot(query, case.row(&case.fused, k, j, g)) * p.scale;
                    let s = p.softcap.map_or(s, |c| c * (s / c).tanh());
                    (s - lse[h * tokens + t]).exp()
                };
                let kept = |j: usize| case.mask(h, t, j - start);
                for &j in &seen {
                    let value = case.row(&case.fused, v, j, g);
                    for (bound, x) in bounds.out[at.clone()].iter_mut().zip(value) {
                        *bound += HALF * weight(j) * kept(j) * x.abs();
                    }
                }
                let mut off = 0.0;
                for i in 0..dim {
                    let stored = bounds.out[at.start + i] + HALF * out[at.start + i].abs();
                    off += stored * dout[i].abs();
                }
                let row = dot(&out[at.clone()], dout);
                for &j in &seen {
                    let (key, value) = (
                        case.row(&case.fused, k, j, g),
                        case.row(&case.fused, v, j, g),
                    );
                    let weight = weight(j);
                    let ds = weight * (dot(dout, value) * kept(j) - row);
                    let ds = (HALF * ds.abs() + weight * off) * p.scale;
                    let [dq, dk, dv] = &mut bounds.grads;
                    let from = j * kv_width + g * dim;
                    for d in 0..dim {
                        dq[at.start + d] += ds * key[d].abs();
                        dk[from + d] += ds * query[d].abs();
                        dv[from + d] += HALF * weight * kept(j) * dout[d].abs();
                    }
                }
            }
        }
        bounds
    }
}

/// Beyond the bounds, roundings of f32: those that `close` allows it elsewhere, and HALF of the
/// result when it is stored.
#[track_caller]
fn within(what: &str, got: &[f64], want: &[f64], bounds: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, ((g, w), bound)) in got.iter().zip(want).zip(bounds).enumerate() {
        let bound = 1.01 * bound + HALF * w.abs() + 3e-4 * HALF.max(w.abs());
        assert!(
            g == w || (g - w).abs() <= bound,
            "{what}: element {i} is {g}, expected {w} within {bound}"
        );
    }
}

/// Forward and backward with products of pairs, where the processor has them.
pub fn check(case: &Case) {
    if !Isa::Avx512Bf16.is_available() {
        return;
    }
    let bounds = Bounds::new(case);
    let (out, lse) = case.naive(&case.fused);
    let (o, l) = case.forward::<bf16>(Isa::Avx512Bf16);
    within("out", &wide(&o), &out, &bounds.out);
    close("lse", &wide(&l), &lse, 2e-5);
    let want = case.backward::<f64>(Isa::Portable, FULL);
    let got = case.backward::<bf16>(Isa::Avx512Bf16, FULL);
    for n in 0..3 {
        let (got, want) = (got[n].as_ref().unwrap(), want[n].as_ref().unwrap());
        within(["dq", "dk", "dv"][n], &wide(got), want, &bounds.grads[n]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pairs_are_off_by_what_their_rounding_costs(case in cases(150)) {
        check(&case);
    }

    #[test]
    fn short_types_round_the_f32_result(case in cases(150)) {
        // Inputs are exact in all types and sums are f32 in all three: only the last step differs.
        for isa in Isa::available() {
            let (out, lse) = case.forward::<f32>(isa);
            if isa != Isa::Avx512Bf16 {
                let (o, l) = case.forward::<bf16>(isa);
                let rounded: Vec<bf16> = out.iter().map(|&x| bf16::from_f32(x)).collect();
                prop_assert_eq!(bits(&o), bits(&rounded));
                prop_assert_eq!(bits(&l), bits(&lse));
                let full = case.backward::<f32>(isa, FULL);
                let short = case.backward::<bf16>(isa, FULL);
                for (full, short) in full.iter().flatten().zip(short.iter().flatten()) {
                    // The rounded output enters by its product with dout: 2^-9 of about sqrt(dim).
                    close("bf16 gradient", &wide(short), &wide(full), 0.03);
                }
            }
            let (o, l) = case.forward::<f16>(isa);
            let rounded: Vec<f16> = out.iter().map(|&x| f16::narrow(x)).collect();
            prop_assert_eq!(bits(&o), bits(&rounded));
            prop_assert_eq!(bits(&l), bits(&lse));
        }
    }

    #[test]
    fn what_is_not_asked_for_changes_nothing(case in cases(150), subset in 0usize..8) {
        let full = case.backward::<bf16>(Isa::detect(), FULL);
        let need = [subset & 1 != 0, subset & 2 != 0, subset & 4 != 0];
        let part = case.backward::<bf16>(Isa::detect(), need);
        for (n, (part, full)) in part.iter().zip(&full).enumerate() {
            prop_assert_eq!(part.is_some(), need[n]);
            if let (Some(part), Some(full)) = (part, full) {
                prop_assert_eq!(bits(part), bits(full), "gradient {}", n);
            }
        }
    }
}
