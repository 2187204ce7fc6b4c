//! Attention of the last tokens over kept keys, against its definition in f64 with plain loops; all storage types,
//! instruction sets and numbers of threads.

use graft_kernels::attention::{
    Attention, Kept, Packed, attention_cached, attention_cached_with, attention_cached_workspace,
};
use graft_kernels::philox::{self, Key};
use graft_kernels::{Float, Isa, Real};
use half::bf16;
use proptest::prelude::*;

/// Sequences of (queries, keys, rows that lie unused in front of the keys).
#[derive(Clone, Debug)]
struct Case {
    p: Attention,
    sequences: Vec<(usize, usize, usize)>,
    seed: u32,
}

struct Data {
    offsets: Vec<i64>,
    starts: Vec<i64>,
    lengths: Vec<i64>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
}

/// Elements behind each row.
const GAP: usize = 3;

impl Case {
    fn widths(&self) -> (usize, usize) {
        (
            self.p.heads * self.p.head_dim + GAP,
            self.p.kv_heads * self.p.head_dim + GAP,
        )
    }

    fn data(&self) -> Data {
        let (mut offsets, mut starts, mut lengths, mut rows) = (vec![0], vec![], vec![], 0);
        for &(queries, keys, unused) in &self.sequences {
            offsets.push(offsets[offsets.len() - 1] + queries as i64);
            starts.push((rows + unused) as i64);
            lengths.push(keys as i64);
            rows += unused + keys;
        }
        // Multiples of 1/16 in -1..1 are exact in every type.
        let numbers = |stream: u32, count: usize| {
            let number = |i| f64::from(philox::uniform(Key([self.seed, stream]), i as u64));
            (0..count)
                .map(|i| (number(i) * 32.0).floor() / 16.0 - 1.0)
                .collect()
        };
        let (width, kv_width) = self.widths();
        let queries = *offsets.last().unwrap() as usize;
        Data {
            offsets,
            starts,
            lengths,
            q: numbers(0, queries * width),
            k: numbers(1, rows * kv_width),
            v: numbers(2, rows * kv_width),
        }
    }

    fn naive(&self, data: &Data) -> Vec<f64> {
        let (p, dim) = (&self.p, self.p.head_dim);
        let (width, kv_width) = self.widths();
        let mut out = Vec::new();
        for (s, &(queries, keys, _)) in self.sequences.iter().enumerate() {
            for (n, h) in (0..queries).flat_map(|n| (0..p.heads).map(move |h| (n, h))) {
                let at = (data.offsets[s] as usize + n) * width + h * dim;
                let query = &data.q[at..at + dim];
                let row = |of: &[f64], j: usize| {
                    let shared = h * p.kv_heads / p.heads;
                    let at = (data.starts[s] as usize + j) * kv_width + shared * dim;
                    of[at..at + dim].to_vec()
                };
                let own = keys - queries + n;
                let seen = (0..=own).filter(|j| p.window.is_none_or(|w| own - j < w));
                let scores: Vec<(usize, f64)> = seen
                    .map(|j| {
                        let dot = query.iter().zip(row(&data.k, j)).map(|(a, b)| a * b);
                        let score = dot.sum::<f64>() * p.scale;
                        (j, p.softcap.map_or(score, |c| c * (score / c).tanh()).exp())
                    })
                    .collect();
                let sum: f64 = scores.iter().map(|(_, s)| s).sum();
                for d in 0..dim {
                    out.push(
                        scores
                            .iter()
                            .map(|(j, s)| s / sum * row(&data.v, *j)[d])
                            .sum(),
                    );
                }
            }
        }
        out
    }

    fn run<T: Float>(&self, isa: Option<Isa>) -> Vec<f64> {
        let data = self.data();
        let (width, kv_width) = self.widths();
        let narrow =
            |x: &[f64]| -> Vec<T> { x.iter().map(|&x| T::narrow(T::Acc::from_f64(x))).collect() };
        let [q, k, v] = [&data.q, &data.k, &data.v].map(|x| narrow(x));
        let packed = |data, row_stride| Packed { data, row_stride };
        let (q, k, v) = (
            packed(&q[..], width),
            packed(&k[..], kv_width),
            packed(&v[..], kv_width),
        );
        let kept = Kept {
            starts: &data.starts,
            lengths: &data.lengths,
        };
        let queries = *data.offsets.last().unwrap() as usize;
        let mut out = narrow(&vec![f64::NAN; queries * self.p.heads * self.p.head_dim]);
        let need = attention_cached_workspace(&self.p, queries, kept);
        let mut workspace = vec![T::Acc::from_f64(f64::NAN); need];
        let (p, offsets) = (&self.p, &data.offsets[..]);
        match isa {
            Some(isa) => {
                attention_cached_with(isa, p, offsets, kept, q, k, v, &mut out, &mut workspace)
            }
            None => attention_cached(p, offsets, kept, q, k, v, &mut out, &mut workspace),
        }
        out.iter().map(|x| x.widen().to_f64()).collect()
    }
}

fn worst(found: &[f64], want: &[f64]) -> f64 {
    assert_eq!(found.len(), want.len());
    let error = |(a, b): (&f64, &f64)| {
        if a.is_nan() {
            f64::INFINITY
        } else {
            (a - b).abs()
        }
    };
    found.iter().zip(want).map(error).fold(0.0, f64::max)
}

fn case() -> impl Strategy<Value = Case> {
    let heads = prop::sample::select(vec![(1, 1), (2, 2), (4, 2), (6, 1), (7, 7), (12, 4)]);
    let sequence = (0usize..4, 0usize..70, 0usize..5);
    let sequences = prop::collection::vec(sequence, 0..5);
    let options = (any::<bool>(), any::<bool>(), 1usize..30);
    (heads, 1usize..140, sequences, options, any::<u32>()).prop_map(
        |((heads, kv_heads), head_dim, sequences, (windowed, capped, window), seed)| Case {
            p: Attention {
                heads,
                kv_heads,
                head_dim,
                causal: true,
                window: windowed.then_some(window),
                softcap: capped.then_some(1.5),
                scale: 1.0 / (head_dim as f64).sqrt(),
                dropout: 0.0,
                key: Key([0, 0]),
            },
            // As many keys as queries at least.
            sequences: sequences
                .into_iter()
                .map(|(q, more, unused)| (q, q + more, unused))
                .collect(),
            seed,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn is_attention_by_its_definition(case in case()) {
        let want = case.naive(&case.data());
        let f64_error = worst(&case.run::<f64>(None), &want);
        prop_assert!(f64_error < 1e-13, "{f64_error:e}");
        for isa in Isa::available() {
            let error = worst(&case.run::<f32>(Some(isa)), &want);
            prop_assert!(error < 2e-6, "{isa:?}: {error:e}");
            // A result is rounded once.
            let error = worst(&case.run::<bf16>(Some(isa)), &want);
            prop_assert!(error < 5e-3, "{isa:?}: {error:e}");
        }
    }
}

#[test]
fn threads_do_not_show() {
    let p = Attention {
        heads: 8,
        kv_heads: 4,
        head_dim: 64,
        causal: true,
        window: None,
        softcap: None,
        scale: 0.125,
        dropout: 0.0,
        key: Key([0, 0]),
    };
    // Texts together, and one alone whose heads are divided among the threads.
    for sequences in [
        vec![(1, 300, 0), (3, 500, 7), (1, 1, 0), (20, 40, 2)],
        vec![(1, 300, 0)],
    ] {
        let case = Case {
            p,
            sequences,
            seed: 3,
        };
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| case.run::<f32>(None))
        };
        let one = run(1);
        assert!(worst(&one, &case.naive(&case.data())) < 2e-6);
        for threads in [2, 3, 5, 9] {
            assert_eq!(one, run(threads), "{threads} threads");
        }
    }
}

#[test]
#[should_panic(expected = "attention_cached: keys and queries do not belong together")]
fn more_queries_than_keys() {
    let mut case = Case {
        p: Attention {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            causal: true,
            window: None,
            softcap: None,
            scale: 1.0,
            dropout: 0.0,
            key: Key([0, 0]),
        },
        sequences: vec![(2, 2, 0)],
        seed: 0,
    };
    assert_eq!(case.run::<f32>(None).len(), 4);
    case.sequences = vec![(2, 1, 3)];
    case.run::<f32>(None);
}
