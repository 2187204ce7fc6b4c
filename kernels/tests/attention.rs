//! Attention against its definition, in f64 and with plain loops; gradients against finite
//! differences of that; all storage types, instruction sets and numbers of threads.

use graft_kernels::attention::{
    Attention, Packed, attention, attention_backward, attention_backward_with,
    attention_backward_workspace, attention_with, attention_workspace,
};
use graft_kernels::philox::{self, Key};
use graft_kernels::{Float, Isa, Real};
use half::{bf16, f16};
use proptest::prelude::*;

/// A problem with its inputs, which every type is rounded from. q, k and v are packed side by
/// side, with a gap after each row.
#[derive(Clone, Debug)]
struct Case {
    p: Attention,
    offsets: Vec<i64>,
    fused: Vec<f64>,
    dout: Vec<f64>,
}

const GAP: usize = 3;

impl Case {
    fn new(p: Attention, lengths: &[usize], seed: u32) -> Case {
        let mut offsets = vec![0i64];
        for &n in lengths {
            offsets.push(offsets.last().unwrap() + n as i64);
        }
        let tokens = *offsets.last().unwrap() as usize;
        let width = (p.heads + 2 * p.kv_heads) * p.head_dim + GAP;
        // Multiples of 1/16 in -1..1 are exact in every type.
        let number = |stream: u32| {
            move |i| {
                (f64::from(philox::uniform(Key([seed, stream]), i as u64)) * 32.0).floor() / 16.0
                    - 1.0
            }
        };
        let fused = (0..tokens * width).map(number(0)).collect();
        let dout = (0..tokens * p.heads * p.head_dim).map(number(1)).collect();
        Case {
            p,
            offsets,
            fused,
            dout,
        }
    }

    fn tokens(&self) -> usize {
        *self.offsets.last().unwrap() as usize
    }

    /// Elements in a row, and where k and v begin in it.
    fn layout(&self) -> (usize, usize, usize) {
        let k = self.p.heads * self.p.head_dim;
        let kv = self.p.kv_heads * self.p.head_dim;
        (k + 2 * kv + GAP, k, k + kv)
    }

    fn packed<'a, T>(&self, fused: &'a [T]) -> [Packed<'a, T>; 3] {
        let (row_stride, k, v) = self.layout();
        [0, k, v].map(|first| Packed {
            data: fused.get(first..).unwrap_or(&[]),
            row_stride,
        })
    }

    fn row<'a>(&self, fused: &'a [f64], first: usize, t: usize, h: usize) -> &'a [f64] {
        &fused[t * self.layout().0 + first + h * self.p.head_dim..][..self.p.head_dim]
    }

    /// Output and lse by the definition.
    fn naive(&self, fused: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let p = &self.p;
        let (_, k, v) = self.layout();
        let (dim, tokens) = (p.head_dim, self.tokens());
        let mut out = vec![0.0; tokens * p.heads * dim];
        let mut lse = vec![f64::NEG_INFINITY; p.heads * tokens];
        for pair in self.offsets.windows(2) {
            let (start, len) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
            for (h, i) in (0..p.heads).flat_map(|h| (0..len).map(move |i| (h, i))) {
                let g = h * p.kv_heads / p.heads;
                let query = self.row(fused, 0, start + i, h);
                let seen = |j: &usize| {
                    (!p.causal || *j <= i) && p.window.is_none_or(|w| i.abs_diff(*j) < w)
                };
                let scores: Vec<(usize, f64)> = (0..len)
                    .filter(seen)
                    .map(|j| {
                        let key = self.row(fused, k, start + j, g);
                        let s = query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * p.scale;
                        (j, p.softcap.map_or(s, |c| c * (s / c).tanh()))
                    })
                    .collect();
                let sum: f64 = scores.iter().map(|(_, s)| s.exp()).sum();
                lse[h * tokens + start + i] = sum.ln();
                for (j, s) in scores {
                    let weight = s.exp() / sum * self.mask(h, start + i, j);
                    let value = self.row(fused, v, start + j, g);
                    let out = &mut out[((start + i) * p.heads + h) * dim..][..dim];
                    out.iter_mut()
                        .zip(value)
                        .for_each(|(o, v)| *o += weight * v);
                }
            }
        }
        (out, lse)
    }

    fn mask(&self, h: usize, token: usize, j: usize) -> f64 {
        let counter = [(j / 4) as u32, token as u32, h as u32, 1];
        let word = philox::block(self.p.key, counter)[j % 4];
        let kept = f64::from(word >> 8) / f64::from(1 << 24) >= self.p.dropout;
        if kept {
            1.0 / (1.0 - self.p.dropout)
        } else {
            0.0
        }
    }

    /// The weighted sum of the output whose gradient dout is.
    fn objective(&self, fused: &[f64]) -> f64 {
        self.naive(fused)
            .0
            .iter()
            .zip(&self.dout)
            .map(|(o, d)| o * d)
            .sum()
    }

    fn forward<T: Float>(&self, isa: Isa) -> (Vec<T>, Vec<T::Acc>) {
        let fused: Vec<T> = round(&self.fused);
        let [q, k, v] = self.packed(&fused);
        // NaN wherever something is read that has not been written.
        let nan = T::Acc::from_f64(f64::NAN);
        let mut out = vec![T::narrow(nan); self.dout.len()];
        let mut lse = vec![nan; self.tokens() * self.p.heads];
        let mut workspace = vec![nan; attention_workspace(&self.p, &self.offsets)];
        attention_with(
            isa,
            &self.p,
            &self.offsets,
            q,
            k,
            v,
            &mut out,
            &mut lse,
            &mut workspace,
        );
        (out, lse)
    }

    /// dq, dk, dv, those of them that `need` names.
    fn backward<T: Float>(&self, isa: Isa, need: [bool; 3]) -> [Option<Vec<T>>; 3] {
        let (out, lse) = self.forward::<T>(isa);
        let (fused, dout): (Vec<T>, Vec<T>) = (round(&self.fused), round(&self.dout));
        let [q, k, v] = self.packed(&fused);
        let nan = T::Acc::from_f64(f64::NAN);
        let sizes = [self.p.heads, self.p.kv_heads, self.p.kv_heads];
        let mut grads = [0, 1, 2].map(|i| {
            need[i].then(|| vec![T::narrow(nan); self.tokens() * sizes[i] * self.p.head_dim])
        });
        let [dq, dk, dv] = grads.each_mut().map(|grad| grad.as_deref_mut());
        let mut workspace = vec![nan; attention_backward_workspace(&self.p, &self.offsets)];
        attention_backward_with(
            isa,
            &self.p,
            &self.offsets,
            q,
            k,
            v,
            &out,
            &lse,
            &dout,
            dq,
            dk,
            dv,
            &mut workspace,
        );
        grads
    }
}

fn round<T: Float>(x: &[f64]) -> Vec<T> {
    x.iter().map(|&x| T::narrow(T::Acc::from_f64(x))).collect()
}

fn wide<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.widen().to_f64()).collect()
}

fn bits<T: Float>(x: &[T]) -> Vec<u64> {
    x.iter().map(|x| x.widen().to_f64().to_bits()).collect()
}

#[track_caller]
fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            g == w || (g - w).abs() <= tolerance * (1.0 + w.abs()),
            "{what}: element {i} is {g}, expected {w}"
        );
    }
}

/// Every combination of options, over shapes that cross the edges of tiles (8, 16, 32), strips
/// (32) and blocks (128).
fn cases(longest: usize) -> impl Strategy<Value = Case> {
    let heads = prop_oneof![Just((1, 1)), Just((2, 2)), Just((3, 1)), Just((4, 2))];
    let dim = prop_oneof![1usize..20, Just(32), Just(40), 60usize..70];
    let length = prop_oneof![4 => 0usize..40, 1 => 0usize..longest];
    let window = prop_oneof![
        2 => Just(None), 2 => (1usize..12).prop_map(Some), 1 => (1usize..200).prop_map(Some),
        1 => Just(Some(0)), 1 => Just(Some(usize::MAX))
    ];
    let softcap = prop_oneof![2 => Just(None), 1 => (0.5f64..20.0).prop_map(Some)];
    let dropout = prop_oneof![2 => Just(0.0), 1 => 0.05f64..0.9];
    let lengths = proptest::collection::vec(length, 0..4);
    (
        heads,
        dim,
        any::<bool>(),
        window,
        softcap,
        dropout,
        lengths,
        any::<u32>(),
    )
        .prop_map(
            |((heads, kv_heads), head_dim, causal, window, softcap, dropout, lengths, seed)| {
                let scale = 1.5 / (head_dim as f64).sqrt();
                let key = Key([seed, 77]);
                let p = Attention {
                    heads,
                    kv_heads,
                    head_dim,
                    causal,
                    window,
                    softcap,
                    scale,
                    dropout,
                    key,
                };
                Case::new(p, &lengths, seed)
            },
        )
}

const FULL: [bool; 3] = [true; 3];

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn forward_is_the_definition(case in cases(300)) {
        let (out, lse) = case.naive(&case.fused);
        for isa in Isa::available() {
            let (o, l) = case.forward::<f64>(isa);
            close("f64 out", &o, &out, 1e-12);
            close("f64 lse", &l, &lse, 1e-12);
            let (o, l) = case.forward::<f32>(isa);
            // Scores up to about 10 have an error of 64 roundings of 6e-8, which the exponential
            // makes relative; sums of weights keep it.
            close("f32 out", &wide(&o), &out, 2e-5);
            close("f32 lse", &wide(&l), &lse, 2e-5);
        }
    }

    #[test]
    fn short_types_round_the_f32_result(case in cases(150)) {
        // Inputs are exact in all types and sums are f32 in all three: only the last step differs.
        let (out, lse) = case.forward::<f32>(Isa::detect());
        let (o, l) = case.forward::<bf16>(Isa::detect());
        prop_assert_eq!(bits(&o), bits(&out.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()));
        prop_assert_eq!(bits(&l), bits(&lse));
        let (o, l) = case.forward::<f16>(Isa::detect());
        prop_assert_eq!(bits(&o), bits(&out.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()));
        prop_assert_eq!(bits(&l), bits(&lse));
        let full = case.backward::<f32>(Isa::detect(), FULL);
        let short = case.backward::<bf16>(Isa::detect(), FULL);
        for (full, short) in full.iter().flatten().zip(short.iter().flatten()) {
            // The rounded output enters by its product with dout: 2^-9 of about sqrt(dim).
            close("bf16 gradient", &wide(short), &wide(full), 0.03);
        }
    }

    #[test]
    fn gradients_are_the_slopes(case in cases(150)) {
        let grads = case.backward::<f64>(Isa::detect(), FULL).map(Option::unwrap);
        let (stride, k, v) = case.layout();
        let sizes = [case.p.heads, case.p.kv_heads, case.p.kv_heads].map(|h| h * case.p.head_dim);
        let tokens = case.tokens();
        for (n, first) in [0, k, v].into_iter().enumerate() {
            // A random direction sees every element, single elements say where it is wrong.
            let direction = |i: usize| f64::from(philox::uniform(Key([n as u32, 5]), i as u64)) - 0.5;
            let count = tokens * sizes[n];
            let mut probes = vec![None];
            probes.extend((0..count).step_by(count / 3 + 1).map(Some));
            for probe in probes {
                let weight = |i: usize| match probe {
                    None => direction(i),
                    Some(at) => f64::from(u8::from(i == at)),
                };
                let moved = |by: f64| {
                    let mut fused = case.fused.clone();
                    for i in 0..count {
                        fused[i / sizes[n] * stride + first + i % sizes[n]] += by * weight(i);
                    }
                    case.objective(&fused)
                };
                // The step's square (1e-10) and rounding (1e-16 * objective / step) both stay
                // well below the tolerance.
                let step = 1e-5;
                let slope = (moved(step) - moved(-step)) / (2.0 * step);
                let got: f64 = (0..count).map(|i| grads[n][i] * weight(i)).sum();
                let size = case.objective(&case.fused).abs();
                prop_assert!(
                    (slope - got).abs() < 1e-7 * (1.0 + slope.abs() + size),
                    "gradient {n} along {probe:?}: {got}, slope {slope}"
                );
            }
        }
    }

    #[test]
    fn what_is_not_asked_for_changes_nothing(case in cases(150), subset in 0usize..8) {
        let full = case.backward::<f32>(Isa::detect(), FULL);
        let need = [subset & 1 != 0, subset & 2 != 0, subset & 4 != 0];
        let part = case.backward::<f32>(Isa::detect(), need);
        for (n, (part, full)) in part.iter().zip(&full).enumerate() {
            prop_assert_eq!(part.is_some(), need[n]);
            if let (Some(part), Some(full)) = (part, full) {
                prop_assert_eq!(bits(part), bits(full), "gradient {}", n);
            }
        }
    }

    #[test]
    fn instruction_sets_agree(case in cases(300)) {
        let base = case.backward::<f64>(Isa::Portable, FULL);
        for isa in Isa::available() {
            let got = case.backward::<f64>(isa, FULL);
            for (got, base) in got.iter().flatten().zip(base.iter().flatten()) {
                close("f64 gradient", got, base, 1e-11);
            }
            let got = case.backward::<f32>(isa, FULL);
            for (got, base) in got.iter().flatten().zip(base.iter().flatten()) {
                close("f32 gradient", &wide(got), base, 3e-4);
            }
        }
    }
}

fn plain(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
    Attention {
        heads,
        kv_heads,
        head_dim,
        causal: false,
        window: None,
        softcap: None,
        scale: 1.0 / (head_dim as f64).sqrt(),
        dropout: 0.0,
        key: Key([1, 2]),
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let p = Attention {
        dropout: 0.1,
        ..plain(4, 2, 32)
    };
    let causal = Attention {
        causal: true,
        window: Some(90),
        softcap: Some(5.0),
        ..p
    };
    for p in [p, causal] {
        let case = Case::new(p, &[300, 17, 0, 129, 64, 1, 40], 3);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let (out, lse) = case.forward::<f32>(Isa::detect());
                let grads = case.backward::<f32>(Isa::detect(), FULL);
                let mut all = vec![bits(&out), bits(&lse)];
                all.extend(grads.iter().flatten().map(|grad| bits(grad)));
                all
            })
        };
        let one = with(1);
        for threads in [2, 3, 7] {
            assert_eq!(one, with(threads), "{threads} threads");
        }
    }
}

#[test]
fn large_heads() {
    for dim in [80, 128, 200, 256] {
        let case = Case::new(
            Attention {
                causal: true,
                ..plain(2, 1, dim)
            },
            &[140, 5],
            9,
        );
        let (out, lse) = case.naive(&case.fused);
        let (o, l) = case.forward::<f32>(Isa::detect());
        close("out", &wide(&o), &out, 2e-5);
        close("lse", &wide(&l), &lse, 2e-5);
        let (got, want) = (
            case.backward::<f32>(Isa::detect(), FULL),
            case.backward::<f64>(Isa::Portable, FULL),
        );
        for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
            close("gradient", &wide(got), want, 1e-4);
        }
    }
}

#[test]
fn dropped_weights_have_the_expected_moments() {
    // Equal scores give weights 1 / len; with values of 1 the output is the kept share, grown by
    // 1 / (1 - p): mean 1, variance p / (1 - p) / len.
    let (len, dropout) = (256, 0.3);
    let p = Attention {
        dropout,
        ..plain(8, 8, 1)
    };
    let mut case = Case::new(p, &[len, len], 0);
    let (stride, k, v) = case.layout();
    for row in case.fused.chunks_exact_mut(stride) {
        row[..k].fill(0.0);
        row[v..v + 8].fill(1.0);
    }
    let (out, _) = case.forward::<f32>(Isa::detect());
    let n = out.len() as f64;
    let mean = wide(&out).iter().sum::<f64>() / n;
    let variance = wide(&out)
        .iter()
        .map(|x| (x - mean) * (x - mean))
        .sum::<f64>()
        / n;
    let expected = dropout / (1.0 - dropout) / len as f64;
    // Five standard errors, of the mean and of the variance of n nearly normal numbers.
    assert!(
        (mean - 1.0).abs() < 5.0 * (expected / n).sqrt(),
        "mean {mean}"
    );
    assert!(
        (variance / expected - 1.0).abs() < 5.0 * (2.0 / n).sqrt(),
        "variance {variance}"
    );
}

#[test]
fn hidden_tokens_have_no_say() {
    // NaN in a query and a key that no earlier query sees, and in all of another sequence. (A
    // hidden value is not protected: its weight is 0, and 0 times NaN is NaN.)
    let p = Attention {
        causal: true,
        ..plain(2, 2, 16)
    };
    let mut case = Case::new(p, &[50, 30, 20], 4);
    let clean = case.forward::<f32>(Isa::detect());
    let (stride, _, v) = case.layout();
    case.fused[49 * stride..][..v].fill(f64::NAN);
    case.fused[80 * stride..].fill(f64::NAN);
    let dirty = case.forward::<f32>(Isa::detect());
    let row = 2 * 16;
    for t in 0..100 {
        let at = t * row..(t + 1) * row;
        if t == 49 || t >= 80 {
            assert!(dirty.0[at].iter().all(|x| x.is_nan()), "token {t}");
        } else {
            assert_eq!(bits(&clean.0[at.clone()]), bits(&dirty.0[at]), "token {t}");
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut case = Case::new(plain(1, 1, 8), &[70], 8);
    case.p.scale = 1e4;
    let (out, lse) = case.forward::<f32>(Isa::detect());
    assert!(out.iter().chain(&lse).all(|x| x.is_finite()));
    let grads = case.backward::<f32>(Isa::detect(), FULL);
    assert!(grads.iter().flatten().flatten().all(|x| x.is_finite()));
}

#[test]
#[should_panic(expected = "attention: out is not [tokens, heads * head_dim]")]
fn output_size_is_checked() {
    let (p, x) = (plain(1, 1, 4), [0.0f32; 8]);
    let x = Packed {
        data: &x,
        row_stride: 4,
    };
    attention(
        &p,
        &[0, 2],
        x,
        x,
        x,
        &mut [0.0; 7],
        &mut [0.0; 2],
        &mut [0.0; 9999],
    );
}

#[test]
#[should_panic(expected = "attention: k has 7 elements, 2 rows 4 apart need 8")]
fn operand_size_is_checked() {
    let (p, x) = (plain(1, 1, 4), [0.0f32; 8]);
    let q = Packed {
        data: &x,
        row_stride: 4,
    };
    let k = Packed {
        data: &x[1..],
        row_stride: 4,
    };
    attention(
        &p,
        &[0, 2],
        q,
        k,
        q,
        &mut [0.0; 8],
        &mut [0.0; 2],
        &mut [0.0; 9999],
    );
}

#[test]
#[should_panic(expected = "attention: 3 heads of 4 dimensions over 2 key heads")]
fn heads_are_checked() {
    let x = Packed {
        data: &[0.0f32; 0],
        row_stride: 4,
    };
    attention(&plain(3, 2, 4), &[0], x, x, x, &mut [], &mut [], &mut []);
}

#[test]
#[should_panic(expected = "attention_backward: dv does not have 4 elements for each of 2 tokens")]
fn gradient_size_is_checked() {
    let (p, x) = (plain(1, 1, 4), [0.0f32; 8]);
    let q = Packed {
        data: &x,
        row_stride: 4,
    };
    let (mut dv, mut workspace) = ([0.0; 4], [0.0; 9999]);
    attention_backward(
        &p,
        &[0, 2],
        q,
        q,
        q,
        &x,
        &[0.0; 2],
        &x,
        None,
        None,
        Some(&mut dv),
        &mut workspace,
    );
}

#[test]
#[should_panic(expected = "attention: workspace of 3 elements")]
fn workspace_is_checked() {
    let (p, x) = (plain(1, 1, 4), [0.0f32; 8]);
    let q = Packed {
        data: &x,
        row_stride: 4,
    };
    attention(
        &p,
        &[0, 2],
        q,
        q,
        q,
        &mut [0.0; 8],
        &mut [0.0; 2],
        &mut [0.0; 3],
    );
}
