//! Attention against its definition, in f64 and with plain loops; gradients against finite
//! differences of that; all storage types, instruction sets and numbers of threads.

mod bf16;
mod case;

use case::{Case, FULL, bits, cases, close, wide};
use graft_kernels::attention::{Attention, Packed, attention, attention_backward};
use graft_kernels::philox::{self, Key};
use graft_kernels::{Float, Isa};

use proptest::prelude::*;

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

/// Output, lse and gradients as bits.
fn everything<T: Float>(case: &Case) -> Vec<Vec<u64>> {
    let (out, lse) = case.forward::<T>(Isa::detect());
    let grads = case.backward::<T>(Isa::detect(), FULL);
    let mut all = vec![bits(&out), bits(&lse)];
    all.extend(grads.iter().flatten().map(|grad| bits(grad)));
    all
}

/// Two kinds of attention: of everything to everything, and with all that hides and bends.
fn kinds() -> [Attention; 2] {
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
    [p, causal]
}

#[test]
fn threads_do_not_change_a_bit() {
    for p in kinds() {
        let case = Case::new(p, &[300, 17, 0, 129, 64, 1, 40], 3);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| [everything::<f32>(&case), everything::<half::bf16>(&case)])
        };
        let one = with(1);
        for threads in [2, 3, 7] {
            assert_eq!(one, with(threads), "{threads} threads");
        }
    }
}

/// Alone, a text has the bits that it has beside others. (Without dropout, whose masks count tokens
/// over all texts.)
#[test]
fn neighbours_do_not_change_a_bit() {
    fn check<T: Float>(p: Attention) {
        let lengths = [300, 17, 129, 64, 1, 40];
        let case = Case::new(p, &lengths, 3);
        let together = everything::<T>(&case);
        let stride = case.layout().0;
        let width = p.heads * p.head_dim;
        let mut start = 0;
        for len in lengths {
            let mut alone = Case::new(p, &[len], 3);
            alone.fused = case.fused[start * stride..][..len * stride].to_vec();
            alone.dout = case.dout[start * width..][..len * width].to_vec();
            for (n, (alone, together)) in everything::<T>(&alone).iter().zip(&together).enumerate()
            {
                if n == 1 {
                    for h in 0..p.heads {
                        let lse = &together[h * case.tokens() + start..][..len];
                        assert_eq!(&alone[h * len..][..len], lse, "{len} tokens, head {h}");
                    }
                } else {
                    let width = together.len() / case.tokens();
                    let part = &together[start * width..][..len * width];
                    assert_eq!(alone, part, "{len} tokens, result {n}");
                }
            }
            start += len;
        }
    }
    for p in kinds() {
        let p = Attention { dropout: 0.0, ..p };
        check::<f32>(p);
        check::<half::bf16>(p);
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
        bf16::check(&case);
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

/// Rows of one head of 4 dimensions.
fn rows(data: &[f32]) -> Packed<'_, f32> {
    Packed {
        data,
        row_stride: 4,
    }
}

#[test]
#[should_panic(expected = "attention: out is not [tokens, heads * head_dim]")]
fn output_size_is_checked() {
    let (p, x) = (plain(1, 1, 4), [0.0f32; 8]);
    let x = rows(&x);
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
    let q = rows(&x);
    let k = rows(&x[1..]);
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
    let x = rows(&[]);
    attention(&plain(3, 2, 4), &[0], x, x, x, &mut [], &mut [], &mut []);
}

#[test]
#[should_panic(expected = "attention_backward: dv does not have 4 elements for each of 2 tokens")]
fn gradient_size_is_checked() {
    let (p, x) = (plain(1, 1, 4), [0.0f32; 8]);
    let q = rows(&x);
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
    let q = rows(&x);
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
