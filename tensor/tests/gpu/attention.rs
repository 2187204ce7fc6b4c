//! Attention: forward, gradients, over kept keys.

use graft_kernels::philox::Key;
use graft_tensor::ops::{self, Attention, Kept};
use graft_tensor::{DType, Error, Memory, Tensor};
use proptest::prelude::*;

use crate::common::{assert_close, assert_same, cpu, difference, gpu, integers, normal, on_gpu};

const BOTH: [DType; 2] = [DType::F32, DType::Bf16];

fn offsets(lengths: &[usize]) -> Tensor {
    let mut ends = vec![0];
    for &length in lengths {
        ends.push(ends[ends.len() - 1] + length as i64);
    }
    integers(&ends)
}

/// Query, key, value and the gradient of the output, on the CPU.
fn inputs(p: &Attention, head_dim: usize, tokens: usize, dtype: DType, seed: u64) -> [Tensor; 4] {
    let widths = [p.heads, p.kv_heads, p.kv_heads, p.heads].map(|heads| heads * head_dim);
    let mut seed = 4 * seed;
    widths.map(|width| {
        seed += 1;
        normal(dtype, &[tokens, width], seed)
    })
}

/// Output, log-sum-exp and the gradients that are asked for.
fn run(
    m: &Memory,
    p: &Attention,
    [q, k, v, dout]: [&Tensor; 4],
    offsets: &Tensor,
    needs: [bool; 3],
) -> (Tensor, Tensor, [Option<Tensor>; 3]) {
    let (out, lse) = ops::attention(m, p, q, k, v, offsets).unwrap();
    let grads = ops::attention_backward(m, p, [q, k, v], offsets, &out, &lse, dout, needs).unwrap();
    (out, lse, grads)
}

/// Asserts that a result is the one in f32 of the same inputs. In f32 that leaves the order of sums;
/// in bf16 the output, the weights and their gradients are rounded before they are summed (2^-9 of
/// each term, which add up to some deviations in the worst of 10^5 elements), and the result is (2^-9
/// of itself, hence of the largest). `terms`: the least size of what is summed, where the sum may be
/// next to nothing.
#[track_caller]
fn assert_near(what: &str, found: &Tensor, expected: &Tensor, terms: f64) {
    let values = expected.to_f64().unwrap();
    let squares: f64 = values.iter().map(|x| x * x).sum();
    let size = (squares / values.len().max(1) as f64).sqrt().max(1e-30);
    let largest = values.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let tolerance = if found.dtype() == DType::F32 {
        // Sums over a head and over keys or queries, at most 2000 of them, of numbers that are known
        // to 2^-22: the error of their differences grows as the root, and that of a weight, a few
        // 2^-20 of itself, goes into all that it is multiplied with, the largest gradient too.
        1e-4 + 1e-5 * largest / size
    } else {
        (24.0 + 2.0 * largest / size) / 256.0
    };
    let found = ops::cast(cpu(), &found.to_memory(cpu()).unwrap(), DType::F32).unwrap();
    assert_close(what, &found, expected, tolerance * (terms / size).max(1.0));
}

/// Compares everything with the CPU, in f32 from the same inputs.
#[track_caller]
fn check(p: &Attention, head_dim: usize, lengths: &[usize], dtype: DType, seed: u64) {
    let tokens = lengths.iter().sum();
    let here = inputs(p, head_dim, tokens, dtype, seed);
    let ends = offsets(lengths);
    let wide = here
        .each_ref()
        .map(|x| ops::cast(cpu(), x, DType::F32).unwrap());
    let (out, lse, grads) = run(cpu(), p, wide.each_ref(), &ends, [true; 3]);
    let there = here.each_ref().map(on_gpu);
    let found = run(gpu(), p, there.each_ref(), &on_gpu(&ends), [true; 3]);
    let name = |part: &str| format!("{part} of {dtype} heads of {head_dim}, {lengths:?}, {p:?}");
    assert_near(&name("output"), &found.0, &out, 0.0);
    assert_near(&name("log-sum-exp"), &found.1, &lse, 1.0);
    // A query's gradient is a mean over the keys that it sees of differences of numbers around 1,
    // which are next to nothing where it sees one alone.
    let seen = lengths
        .iter()
        .max()
        .map_or(1, |&n| n.min(p.window.unwrap_or(n)).max(1));
    let terms = 2.0 / (1.0 - p.dropout) / (seen as f64).sqrt();
    for (part, (found, grad)) in ["dq", "dk", "dv"].iter().zip(found.2.iter().zip(&grads)) {
        let (found, grad) = (found.as_ref().unwrap(), grad.as_ref().unwrap());
        assert_near(&name(part), found, grad, terms);
    }
}

fn options(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
    Attention {
        kv_heads,
        ..Attention::bidirectional(heads, head_dim)
    }
}

#[test]
#[ignore = "needs a GPU"]
fn heads_of_every_size() {
    for dtype in BOTH {
        for head_dim in [1, 5, 8, 20, 32, 64, 72, 80, 96, 128, 130, 160, 192, 256] {
            for causal in [false, true] {
                let p = Attention {
                    causal,
                    ..options(2, 1, head_dim)
                };
                check(&p, head_dim, &[65, 2, 130], dtype, head_dim as u64);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn ragged_lengths_with_every_option() {
    let lengths = [1, 7, 64, 0, 65, 200, 15, 129];
    for dtype in BOTH {
        for head_dim in [64, 128, 256] {
            for pick in 0..24 {
                let p = Attention {
                    causal: pick % 2 == 1,
                    window: [None, Some(1), Some(37)][pick / 2 % 3],
                    softcap: (pick / 6 % 2 == 1).then_some(3.0),
                    dropout: if pick / 12 == 1 { 0.2 } else { 0.0 },
                    key: Key::new(7, 8, pick as u64),
                    ..options(4, [4, 2, 1][pick % 3], head_dim)
                };
                check(&p, head_dim, &lengths, dtype, pick as u64);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn long_sequences() {
    for dtype in BOTH {
        for head_dim in [64, 128] {
            for window in [None, Some(300)] {
                let p = Attention {
                    causal: true,
                    window,
                    ..options(2, 1, head_dim)
                };
                check(&p, head_dim, &[1500], dtype, 3);
            }
        }
    }
}

/// On Hopper a block has several tasks, one after the other.
#[test]
#[ignore = "needs a GPU"]
fn more_tasks_than_multiprocessors() {
    let many: Vec<usize> = (0..160).map(|i| 1 + i * 53 % 150).collect();
    let edges = [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 257, 1000];
    for lengths in [&many[..], &edges] {
        for (head_dim, causal, dropout) in [
            (64, false, 0.0),
            (64, true, 0.0),
            (64, false, 0.1),
            (64, true, 0.1),
            (128, false, 0.0),
            (128, true, 0.0),
            (128, false, 0.1),
        ] {
            let p = Attention {
                causal,
                dropout,
                key: Key::new(3, 4, 5),
                ..options(4, 2, head_dim)
            };
            check(&p, head_dim, lengths, DType::Bf16, 11);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn scores_far_from_zero() {
    for dtype in BOTH {
        for scale in [4.0, -4.0] {
            let p = Attention {
                scale,
                ..options(1, 1, 64)
            };
            let [q, k, v, _] = inputs(&p, 64, 100, DType::Bf16, 1);
            let ends = offsets(&[100]);
            let wide = [&q, &k, &v].map(|x| ops::cast(cpu(), x, DType::F32).unwrap());
            let [a, b, c] = &wide;
            let (out, lse) = ops::attention(cpu(), &p, a, b, c, &ends).unwrap();
            let there = [&q, &k, &v].map(|x| on_gpu(&ops::cast(cpu(), x, dtype).unwrap()));
            let [a, b, c] = &there;
            let found = ops::attention(gpu(), &p, a, b, c, &on_gpu(&ends)).unwrap();
            // Scores of up to 150 have errors of 2e-5, which are the weights' relative ones.
            assert_near("output", &found.0, &out, 5.0);
            assert_close("log-sum-exp", &found.1, &lse, 2e-5);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn slices_of_a_fused_projection() {
    for dtype in BOTH {
        // The third has rows that do not begin at 16 bytes.
        for (head_dim, extra) in [(64, 0), (32, 8), (64, 3)] {
            let p = options(2, 2, head_dim);
            let (width, tokens) = (2 * head_dim, 90);
            let fused = normal(dtype, &[tokens, 3 * width + extra], 5);
            let dout = normal(dtype, &[tokens, width], 6);
            let ends = offsets(&[40, 50]);
            let parts =
                |x: &Tensor| [0, 1, 2].map(|i| x.narrow(1, extra + i * width, width).unwrap());
            let copies = parts(&fused).map(|x| on_gpu(&x.contiguous(cpu()).unwrap()));
            let there = parts(&on_gpu(&fused));
            let (ends, dout) = (on_gpu(&ends), on_gpu(&dout));
            let all = |[q, k, v]: &[Tensor; 3]| run(gpu(), &p, [q, k, v, &dout], &ends, [true; 3]);
            let (slices, copies) = (all(&there), all(&copies));
            if extra % 8 == 0 {
                assert_same("output", &slices.0, &copies.0);
                for (slice, copy) in slices.2.iter().zip(&copies.2) {
                    assert_same("gradient", slice.as_ref().unwrap(), copy.as_ref().unwrap());
                }
            } else {
                // In bf16 that is the other kernel.
                let apart = difference(&slices.0, &copies.0);
                assert!(apart < 3e-2, "{apart}");
                for (slice, copy) in slices.2.iter().zip(&copies.2) {
                    let apart = difference(slice.as_ref().unwrap(), copy.as_ref().unwrap());
                    assert!(apart < 6e-2, "{apart}");
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn gradients_that_are_asked_for_are_the_same_and_repeat() {
    for dtype in BOTH {
        for head_dim in [20, 64, 128, 256] {
            let p = Attention {
                causal: true,
                dropout: 0.1,
                ..options(4, 2, head_dim)
            };
            let lengths = [70, 33];
            let there = inputs(&p, head_dim, 103, dtype, 9).map(|x| on_gpu(&x));
            let ends = on_gpu(&offsets(&lengths));
            let all = run(gpu(), &p, there.each_ref(), &ends, [true; 3]);
            for pick in 0..8 {
                let needs = [pick & 1 > 0, pick & 2 > 0, pick & 4 > 0];
                let some = run(gpu(), &p, there.each_ref(), &ends, needs);
                assert_same("output", &some.0, &all.0);
                assert_same("log-sum-exp", &some.1, &all.1);
                for i in 0..3 {
                    assert_eq!(some.2[i].is_some(), needs[i]);
                    if let Some(grad) = &some.2[i] {
                        assert_same("gradient", grad, all.2[i].as_ref().unwrap());
                    }
                }
            }
        }
    }
}

/// Equal scores, and the identity as values: the output is the weights themselves.
#[test]
#[ignore = "needs a GPU"]
fn dropped_weights_are_those_of_the_cpu() {
    for dtype in BOTH {
        for (length, causal) in [(64, false), (128, true), (256, false)] {
            let (sequences, heads) = (2, 2);
            let width = heads * length;
            let tokens = sequences * length;
            let p = Attention {
                causal,
                dropout: 0.25,
                key: Key::new(1, 2, 3),
                ..options(heads, heads, length)
            };
            let zero = Tensor::zeros(cpu(), dtype, &[tokens, width]).unwrap();
            let one = |i: usize| i / width % length == i % length;
            let eye: Vec<f32> = (0..tokens * width)
                .map(|i| f32::from(u8::from(one(i))))
                .collect();
            let eye = Tensor::from_vec(cpu(), eye, &[tokens, width]).unwrap();
            let eye = ops::cast(cpu(), &eye, dtype).unwrap();
            let ends = offsets(&[length; 2]);
            let (here, _) = ops::attention(cpu(), &p, &zero, &zero, &eye, &ends).unwrap();
            let (z, e, ends) = (on_gpu(&zero), on_gpu(&eye), on_gpu(&ends));
            let (there, _) = ops::attention(gpu(), &p, &z, &z, &e, &ends).unwrap();
            let (here, there) = (here.to_f64().unwrap(), there.to_f64().unwrap());
            assert!(here.contains(&0.0) && here.iter().any(|&w| w > 0.0));
            let same = here
                .iter()
                .zip(&there)
                .all(|(a, b)| (*a == 0.0) == (*b == 0.0));
            assert!(same, "{dtype}, {length}: not the same weights are dropped");
        }
    }
}

/// The last `queries` tokens of texts of `lengths` tokens, whose keys lie in slots of their own.
#[track_caller]
fn check_cached(p: &Attention, head_dim: usize, queries: &[usize], lengths: &[i64], dtype: DType) {
    let slot = lengths.iter().max().unwrap() + 3;
    let count = lengths.len() as i64;
    let starts: Vec<i64> = (0..count).map(|s| (count - 1 - s) * slot + 1).collect();
    let rows = (count * slot) as usize;
    let kept = Kept {
        starts: &starts,
        lengths,
    };
    let kv_width = p.kv_heads * head_dim;
    let q = normal(dtype, &[queries.iter().sum(), p.heads * head_dim], 1);
    let kv = normal(dtype, &[rows, 2 * kv_width], 2);
    let ends = offsets(queries);
    let attend = |m: &Memory, q: &Tensor, kv: &Tensor, ends: &Tensor| {
        let (k, v) = (
            kv.narrow(1, 0, kv_width).unwrap(),
            kv.narrow(1, kv_width, kv_width).unwrap(),
        );
        ops::attention_cached(m, p, q, &k, &v, ends, kept).unwrap()
    };
    let [wide_q, wide_kv] = [&q, &kv].map(|x| ops::cast(cpu(), x, DType::F32).unwrap());
    let here = attend(cpu(), &wide_q, &wide_kv, &ends);
    let (q, kv, ends) = (on_gpu(&q), on_gpu(&kv), on_gpu(&ends));
    let there = attend(gpu(), &q, &kv, &ends);
    let what = format!("{dtype} heads of {head_dim}, {queries:?} of {lengths:?}, {p:?}");
    assert_near(&what, &there, &here, 0.0);
    assert_same("again", &attend(gpu(), &q, &kv, &ends), &there);
}

#[test]
#[ignore = "needs a GPU"]
fn few_and_many_queries_over_kept_keys() {
    for dtype in BOTH {
        for head_dim in [20, 64, 80, 128, 256] {
            for (heads, kv_heads) in [(2, 2), (8, 2), (12, 1)] {
                for (window, softcap) in [(None, None), (Some(50), Some(2.0))] {
                    let p = Attention {
                        causal: true,
                        window,
                        softcap,
                        ..options(heads, kv_heads, head_dim)
                    };
                    check_cached(&p, head_dim, &[1], &[1], dtype);
                    check_cached(&p, head_dim, &[1, 1, 1], &[5, 700, 129], dtype);
                    check_cached(&p, head_dim, &[3, 0, 1], &[300, 9, 1], dtype);
                    check_cached(&p, head_dim, &[70, 1, 9], &[150, 400, 9], dtype);
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn what_there_is_no_kernel_for_is_refused() {
    for (dtype, head_dim) in [(DType::F64, 64), (DType::F16, 64), (DType::F32, 257)] {
        let p = options(1, 1, head_dim);
        let x = on_gpu(&normal(dtype, &[3, head_dim], 1));
        let error = ops::attention(gpu(), &p, &x, &x, &x, &on_gpu(&offsets(&[3]))).unwrap_err();
        assert!(matches!(error, Error::Cuda(_)), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs a GPU"]
    fn random_cases(
        lengths in prop::collection::vec(0usize..150, 1..6), eighths in 1usize..33, odd in 0usize..8,
        kv_heads in 1usize..4, group in 1usize..4, causal in any::<bool>(),
        window in prop::option::of(1usize..100), softcap in prop::option::of(1.0f64..10.0),
        dropout in prop_oneof![Just(0.0), 0.05f64..0.6], short in any::<bool>(), seed in 0u64..1000,
    ) {
        // Every fourth size is no multiple of 8.
        let head_dim = if odd < 2 { 8 * eighths - 4 + odd } else { 8 * eighths };
        let p = Attention {
            causal,
            window,
            softcap,
            dropout,
            key: Key::new(seed, 1, 2),
            ..options(kv_heads * group, kv_heads, head_dim)
        };
        prop_assume!(lengths.iter().sum::<usize>() > 0);
        check(&p, head_dim, &lengths, if short { DType::Bf16 } else { DType::F32 }, seed);
    }
}
