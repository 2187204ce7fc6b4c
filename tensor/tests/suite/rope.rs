use graft_tensor::DType;
use graft_tensor::ops::rope::{Rope, rope};

use crate::common::*;

const POSITIONS: usize = 9;

#[test]
fn heads_turn_by_their_positions_angle_and_back() {
    cases(|case| {
        let [tokens, heads, half, rest] = case.dims;
        let (heads, head_dim) = (heads.max(1), 2 * half + rest);
        let p = Rope {
            heads,
            rotary_dim: 2 * half,
            interleaved: case.flags[0],
        };
        let x = case.input(0, &[tokens, heads * head_dim]);
        let positions = case.integers(1, tokens, POSITIONS);
        let angle = |p: usize, i: usize| p as f64 / 100f64.powf(i as f64 / half as f64);
        let table = |m: &_, f: fn(f64) -> f64| {
            let data = (0..POSITIONS * half)
                .map(|n| f(angle(n / half, n % half)))
                .collect();
            upload(m, DType::F32, data, &[POSITIONS, half])
        };
        let turn = |m: &_, inverse| {
            let (cos, sin) = (table(m, f64::cos), table(m, f64::sin));
            rope(m, &p, &x.on(m), &cos, &sin, &ids(m, &positions), inverse)
        };
        for inverse in [false, true] {
            let y = run1(|m| turn(m, inverse));
            let mut want = x.values.clone();
            for t in 0..tokens {
                for (h, i) in (0..heads).flat_map(|h| (0..half).map(move |i| (h, i))) {
                    let at = h * head_dim;
                    let (i0, i1) = if p.interleaved {
                        (2 * i, 2 * i + 1)
                    } else {
                        (i, i + half)
                    };
                    // A product of complex numbers of which one has length 1.
                    let (s, c) = angle(positions[t] as usize, i).sin_cos();
                    let s = if inverse { -s } else { s };
                    let (a, b) = (x.values[[t, at + i0]], x.values[[t, at + i1]]);
                    want[[t, at + i0]] = a * c - b * s;
                    want[[t, at + i1]] = a * s + b * c;
                }
            }
            // The tables are f32 whatever the type.
            let roundings = 3.0 * unit(DType::F32) / unit(wide(case.dtype)) + 4.0;
            near_by(&y, &want, roundings, 4.0);
        }
    });
}
