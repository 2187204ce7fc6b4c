//! Every operation against finite differences in f64: 64 random cases each, and in each case every
//! combination of inputs that need a gradient. The table [`case`] is an exhaustive match: an
//! operation without a check does not compile.

use graft_autograd::{Error, GradCheck, Gradients, OpKind, Result, Tape, Var, gradcheck};
use graft_tensor::ops::attention::Attention;
use graft_tensor::ops::rope::Rope;
use graft_tensor::ops::{Activation, Binary, Glu, Linear, Lora, Pool, Reduce, Unary, WeightLayout};
use graft_tensor::{DType, Memory, Tensor};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

type Function = Box<dyn Fn(&mut Tape, &[Var]) -> Result<Var>>;

/// Inputs and the function of them that is checked.
struct Case {
    inputs: Vec<Tensor>,
    run: Function,
}

fn case_of(
    inputs: Vec<Tensor>,
    run: impl Fn(&mut Tape, &[Var]) -> Result<Var> + 'static,
) -> Option<Case> {
    Some(Case {
        inputs,
        run: Box::new(run),
    })
}

/// What a random case is made from; proptest shrinks it.
#[derive(Clone, Debug)]
struct Draw {
    seed: u64,
    dims: [usize; 4],
    flags: [bool; 4],
    pick: usize,
    memory: Memory,
}

impl Draw {
    /// Distinct values between -1.5 and 1.5 in random order, none within a finite difference of
    /// zero or of another: maxima and kinks stay where they are.
    fn spread(&self, which: u64, shape: &[usize]) -> Tensor {
        let count: usize = shape.iter().product();
        let mut order: Vec<usize> = (0..count).collect();
        let key = graft_tensor::ops::random::Key::new(self.seed, which, 0);
        graft_tensor::ops::random::shuffle(key, &mut order);
        let step = 3.0 / count.max(2) as f64;
        let data = order
            .iter()
            .map(|&i| (i as f64 + 0.5 - (count / 2) as f64) * step)
            .collect();
        Tensor::from_vec::<f64>(&self.memory, data, shape).unwrap()
    }

    /// The same, from 0.5 to 3.5.
    fn positive(&self, which: u64, shape: &[usize]) -> Tensor {
        let data = self.spread(which, shape).to_vec::<f64>().unwrap();
        let data = data.iter().map(|x| x + 2.0).collect();
        Tensor::from_vec::<f64>(&self.memory, data, shape).unwrap()
    }

    fn integers(&self, which: u64, count: usize, limit: usize) -> Tensor {
        let x = self.spread(which, &[count.max(1)]).to_vec::<f64>().unwrap();
        let data = (0..count)
            .map(|i| ((x[i] + 1.5) * 1000.0) as i64 % limit as i64)
            .collect();
        Tensor::from_vec::<i64>(&self.memory, data, &[count]).unwrap()
    }

    /// Offsets of sequences of the four lengths, and the number of tokens.
    fn offsets(&self, least: usize) -> (Tensor, usize) {
        let mut ends = vec![0];
        for n in self.dims {
            ends.push(ends[ends.len() - 1] + (n + least - 1) as i64);
        }
        let tokens = ends[4] as usize;
        (Tensor::from_vec(&self.memory, ends, &[5]).unwrap(), tokens)
    }

    fn pick<T: Copy>(&self, from: &[T]) -> T {
        from[self.pick % from.len()]
    }
}

/// A random case of an operation; `None` for those that are checked by a test of their own.
fn case(kind: OpKind, d: &Draw) -> Option<Case> {
    let [a, b, c, e] = d.dims;
    let [f0, f1, f2, _] = d.flags;
    match kind {
        OpKind::Leaf => case_of(vec![d.spread(0, &[a, b])], |_, x| Ok(x[0].clone())),
        // No gradient passes, which finite differences would not agree with.
        OpKind::Detach | OpKind::ArgMax => None,
        OpKind::Linear => {
            let layout = d.pick(&[WeightLayout::OutIn, WeightLayout::InOut]);
            let activation = [
                None,
                Some(Activation::Gelu),
                Some(Activation::GeluTanh),
                Some(Activation::Tanh),
                Some(Activation::Silu),
                Some(Activation::Relu),
            ][d.pick % 6];
            let weight = match layout {
                WeightLayout::OutIn => [e, c],
                WeightLayout::InOut => [c, e],
            };
            let mut inputs = vec![d.spread(0, &[a, b, c]), d.spread(1, &weight)];
            if f0 {
                inputs.push(d.spread(2, &[e]));
            }
            if activation == Some(Activation::Relu) {
                // One input feature: pre-activations x·w + 2 or products that stay off the kink.
                inputs[0] = d.positive(0, &[a, b, c]);
                inputs[1] = d.positive(1, &weight);
            }
            case_of(inputs, move |t, x| {
                t.linear(&x[0], &x[1], x.get(2), layout, activation)
            })
        }
        OpKind::Lora => {
            let layout = if f1 {
                WeightLayout::InOut
            } else {
                WeightLayout::OutIn
            };
            let activation = [
                None,
                Some(Activation::Gelu),
                Some(Activation::Tanh),
                Some(Activation::Silu),
            ][d.pick % 4];
            let weight = match layout {
                WeightLayout::OutIn => [e, c],
                WeightLayout::InOut => [c, e],
            };
            // The rank is the second dimension of x too: any number from 1 to 4.
            let mut inputs = vec![
                d.spread(0, &[a, b, c]),
                d.spread(1, &weight),
                d.spread(2, &[b, c]),
                d.spread(3, &[e, b]),
            ];
            if f0 {
                inputs.push(d.spread(4, &[e]));
            }
            let lora = Lora {
                linear: Linear { layout, activation },
                scale: if d.flags[3] { 0.6 } else { 1.0 },
                dropout: if f2 { 0.3 } else { 0.0 },
            };
            case_of(inputs, move |t, x| {
                t.lora(&x[0], &x[1], x.get(4), [&x[2], &x[3]], lora)
            })
        }
        OpKind::MatMul => {
            let (p, q) = d
                .pick(
                    &[
                        (vec![a, b], vec![b, c]),
                        (vec![e, a, b], vec![b, c]),
                        (vec![a, b], vec![e, b, c]),
                        (vec![2, e, a, b], vec![e, b, c]),
                        (vec![2, 1, a, b], vec![1, e, b, c]),
                    ]
                    .map(|pair| &*Box::leak(Box::new(pair))),
                )
                .clone();
            let inputs = vec![d.spread(0, &p), d.spread(1, &q)];
            case_of(inputs, |t, x| t.matmul(&x[0], &x[1]))
        }
        OpKind::Binary => {
            let kind = d.pick(&Binary::ALL);
            let p = vec![a, if f0 { 1 } else { b }, c];
            let q = if f1 {
                vec![c]
            } else {
                vec![a, b, if f2 { 1 } else { c }]
            };
            let first = d.spread(0, &p);
            // Shifted by a third of the smallest step, so that no pair ties.
            let steps = p.iter().product::<usize>().max(q.iter().product());
            let shift = 1.0 / steps.max(2) as f64;
            let second = d.positive(1, &q).to_vec::<f64>().unwrap();
            let second = match kind {
                Binary::Div => second,
                _ => second.iter().map(|x| x - 2.0 + shift).collect(),
            };
            let second = Tensor::from_vec(&d.memory, second, &q).unwrap();
            case_of(vec![first, second], move |t, x| {
                t.binary(kind, &x[0], &x[1])
            })
        }
        OpKind::Affine => case_of(vec![d.spread(0, &[a, b])], |t, x| {
            t.affine(&x[0], -1.7, 0.3)
        }),
        OpKind::Unary => {
            let kind = d.pick(&Unary::ALL);
            let x = match kind {
                Unary::Ln | Unary::Sqrt | Unary::Reciprocal => d.positive(0, &[a, b, c]),
                _ => d.spread(0, &[a, b, c]),
            };
            case_of(vec![x], move |t, x| t.unary(kind, &x[0]))
        }
        OpKind::Glu => {
            let kind = d.pick(&Glu::ALL);
            let inputs = vec![d.spread(0, &[a, b]), d.spread(1, &[a, b])];
            case_of(inputs, move |t, x| t.glu(kind, &x[0], &x[1]))
        }
        OpKind::Reduce => {
            let kind = d.pick(&[Reduce::Sum, Reduce::Mean, Reduce::Max]);
            let axis = d.pick(&[0, 1, 2, 1]);
            case_of(vec![d.spread(0, &[a, b, c])], move |t, x| {
                t.reduce(kind, &x[0], axis, f0)
            })
        }
        OpKind::SumAll => case_of(vec![d.spread(0, &[a, b])], |t, x| t.sum_all(&x[0])),
        OpKind::Reshape => case_of(vec![d.spread(0, &[a, b, c])], move |t, x| {
            // After a permutation the input is a strided view.
            let x = if f0 {
                t.permute(&x[0], &[2, 0, 1])?
            } else {
                x[0].clone()
            };
            t.reshape(&x, &[a * b, c])
        }),
        OpKind::Permute => case_of(vec![d.spread(0, &[a, b, c])], |t, x| {
            t.permute(&x[0], &[2, 0, 1])
        }),
        OpKind::Narrow => {
            let (start, length) = (d.pick % b, b - d.pick % b);
            case_of(vec![d.spread(0, &[a, b, c])], move |t, x| {
                t.narrow(&x[0], 1, start, length)
            })
        }
        OpKind::Expand => case_of(vec![d.spread(0, &[a, 1])], move |t, x| {
            t.expand(&x[0], &[c, a, b])
        }),
        OpKind::Concat => {
            let inputs = vec![
                d.spread(0, &[a, b, e]),
                d.spread(1, &[a, c, e]),
                d.spread(2, &[a, 1, e]),
            ];
            case_of(inputs, |t, x| t.concat(&[&x[0], &x[1], &x[2]], 1))
        }
        OpKind::GatherRows => {
            let inputs = vec![d.spread(0, &[a, b]), d.integers(1, c * e, a)];
            case_of(inputs, |t, x| t.gather_rows(&x[0], &x[1]))
        }
        OpKind::LayerNorm => {
            let c = c + 1;
            let mut inputs = vec![d.spread(0, &[a, b, c])];
            for (there, which, shape) in
                [(f0, 1, vec![a, b, c]), (f1, 2, vec![c]), (f2, 3, vec![c])]
            {
                if there {
                    inputs.push(d.spread(which, &shape));
                }
            }
            let dropout = if d.flags[3] { 0.3 } else { 0.0 };
            case_of(inputs, move |t, x| {
                let mut rest = x[1..].iter();
                let mut next = |there: bool| if there { rest.next() } else { None };
                let (residual, weight, bias) = (next(f0), next(f1), next(f2));
                t.layer_norm_dropped(&x[0], dropout, residual, weight, bias, 0.1)
            })
        }
        OpKind::RmsNorm => {
            let mut inputs = vec![d.spread(0, &[a, b, c]), d.spread(1, &[c])];
            if f0 {
                inputs.push(d.spread(2, &[a, b, c]));
            }
            case_of(inputs, move |t, x| {
                t.rms_norm(&x[0], x.get(2), &x[1], if f1 { 1.0 } else { 0.0 }, 0.1)
            })
        }
        OpKind::L2Normalize => case_of(vec![d.spread(0, &[a, b + 1])], |t, x| {
            t.l2_normalize(&x[0], 1e-12)
        }),
        OpKind::Softmax => case_of(vec![d.spread(0, &[a, b, c])], move |t, x| {
            if f0 {
                t.log_softmax(&x[0])
            } else {
                t.softmax(&x[0])
            }
        }),
        OpKind::Attention => {
            let (offsets, tokens) = d.offsets(0);
            let kv_heads = a.min(2);
            let heads = kv_heads * b.min(2);
            let head_dim = c;
            let attention = Attention {
                kv_heads,
                causal: f0,
                window: f1.then_some(e),
                softcap: f2.then_some(1.3),
                scale: 0.7,
                dropout: if d.flags[3] { 0.3 } else { 0.0 },
                ..Attention::bidirectional(heads, head_dim)
            };
            if d.pick.is_multiple_of(3) && kv_heads == heads {
                // Query, key and value as strided slices of one fused projection.
                let width = heads * head_dim;
                let inputs = vec![d.spread(0, &[tokens, 3 * width]), offsets];
                return case_of(inputs, move |t, x| {
                    let q = t.narrow(&x[0], 1, 0, width)?;
                    let k = t.narrow(&x[0], 1, width, width)?;
                    let v = t.narrow(&x[0], 1, 2 * width, width)?;
                    t.attention(&attention, &q, &k, &v, &x[1])
                });
            }
            let inputs = vec![
                d.spread(0, &[tokens, heads * head_dim]),
                d.spread(1, &[tokens, kv_heads * head_dim]),
                d.spread(2, &[tokens, kv_heads * head_dim]),
                offsets,
            ];
            case_of(inputs, move |t, x| {
                t.attention(&attention, &x[0], &x[1], &x[2], &x[3])
            })
        }
        OpKind::Rope => {
            let (heads, half) = (a, b);
            let rope = Rope {
                heads,
                rotary_dim: 2 * half,
                interleaved: f0,
            };
            let head_dim = 2 * half + usize::from(f1);
            let table = |f: fn(f64) -> f64| {
                let data = (0..8 * half).map(|i| f(i as f64 * 0.37) as f32).collect();
                Tensor::from_vec::<f32>(&d.memory, data, &[8, half]).unwrap()
            };
            let inputs = vec![
                d.spread(0, &[c, heads * head_dim]),
                table(f64::cos),
                table(f64::sin),
                d.integers(1, c, 8),
            ];
            case_of(inputs, move |t, x| t.rope(rope, &x[0], &x[1], &x[2], &x[3]))
        }
        OpKind::Dropout => case_of(vec![d.spread(0, &[a, b, c])], |t, x| t.dropout(&x[0], 0.4)),
        OpKind::Pool => {
            let (offsets, tokens) = d.offsets(1);
            let kind = d.pick(&Pool::ALL);
            let inputs = vec![d.spread(0, &[tokens, b]), offsets];
            case_of(inputs, move |t, x| t.pool(kind, &x[0], &x[1]))
        }
        OpKind::CrossEntropy => {
            let smoothing = if f0 { 0.2 } else { 0.0 };
            let targets = targets(d, a, b, f1);
            let inputs = vec![d.spread(0, &[a, b]), targets];
            case_of(inputs, move |t, x| t.cross_entropy(&x[0], &x[1], smoothing))
        }
        OpKind::LinearCrossEntropy => {
            let smoothing = if f0 { 0.2 } else { 0.0 };
            let mut inputs = vec![
                targets(d, a, b, f1),
                d.spread(0, &[a, c]),
                d.spread(1, &[b, c]),
            ];
            if f2 {
                inputs.push(d.spread(2, &[b]));
            }
            let cap = d.flags[3].then_some(1.5);
            case_of(inputs, move |t, x| {
                t.linear_cross_entropy(&x[1], &x[2], x.get(3), &x[0], smoothing, cap)
            })
        }
        OpKind::BceWithLogits => {
            let share = d.spread(1, &[a, b]).to_vec::<f64>().unwrap();
            let share = share.iter().map(|x| (x + 1.5) / 3.0).collect();
            let share = Tensor::from_vec::<f64>(&d.memory, share, &[a, b]).unwrap();
            // Targets take no gradient: they are a constant of the function.
            case_of(vec![d.spread(0, &[a, b])], move |t, x| {
                let targets = t.input(share.clone());
                t.bce_with_logits(&x[0], &targets)
            })
        }
        // f64 to f64 is the identity; through f32, differences would see the rounding, so that
        // way is checked by `a_cast_rounds_the_gradient`.
        OpKind::Cast => case_of(vec![d.spread(0, &[a, b])], |t, x| t.cast(&x[0], DType::F64)),
    }
}

fn targets(d: &Draw, rows: usize, classes: usize, ignore_first: bool) -> Tensor {
    let mut targets = d.integers(9, rows, classes).to_vec::<i64>().unwrap();
    if ignore_first && rows > 1 {
        targets[0] = graft_tensor::ops::loss::IGNORE;
    }
    Tensor::from_vec(&d.memory, targets, &[rows]).unwrap()
}

/// The gradients under a mask, in f64, and what was saved for them.
fn gradients_of(case: &Case, needs: &[bool], seed: u64) -> Result<(Vec<Option<Vec<f64>>>, usize)> {
    let memory = Memory::cpu();
    let mut tape = Tape::new(&memory, seed, 0);
    let vars: Vec<Var> = case
        .inputs
        .iter()
        .enumerate()
        .map(|(i, x)| tape.parameter(i, "input", x, needs[i]))
        .collect();
    let y = (case.run)(&mut tape, &vars)?;
    let saved = tape.saved_bytes();
    let mut gradients = Gradients::new();
    if needs.contains(&true) {
        let dy = (0..y.value().count())
            .map(|i| 0.5 + (i as f64).sin())
            .collect();
        let dy = Tensor::from_vec::<f64>(&memory, dy, y.shape())?;
        tape.backward_from(&y, dy, &mut gradients)?;
    }
    let all = (0..needs.len())
        .map(|i| gradients.get(i).map(|g| g.to_f64()).transpose())
        .collect::<graft_tensor::Result<_>>()?;
    Ok((all, saved))
}

fn check(kind: OpKind) {
    let dims = [1usize..5, 1usize..5, 1usize..5, 1usize..5];
    let strategy = (any::<u64>(), dims, any::<[bool; 4]>(), 0usize..96);
    let config = Config {
        cases: 64,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new(config);
    let result = runner.run(&strategy, |(seed, dims, flags, pick)| {
        let draw = Draw {
            seed,
            dims,
            flags,
            pick,
            memory: Memory::cpu(),
        };
        let Some(case) = case(kind, &draw) else {
            return Err(TestCaseError::fail("not in the table"));
        };
        let float: Vec<bool> = case
            .inputs
            .iter()
            .map(|x| x.dtype() == DType::F64)
            .collect();
        let options = GradCheck {
            seed,
            ..GradCheck::default()
        };
        gradcheck(&case.inputs, &float, options, &case.run)
            .map_err(|e| TestCaseError::fail(e.to_string()))?;
        // Whatever is left out, the rest stays the same to the bit and nothing else appears.
        let fail = |e: Error| TestCaseError::fail(e.to_string());
        let (full, _) = gradients_of(&case, &float, seed).map_err(fail)?;
        for mask in 0..1usize << case.inputs.len() {
            let needs: Vec<bool> = (0..float.len()).map(|i| mask >> i & 1 == 1).collect();
            if needs
                .iter()
                .zip(&float)
                .any(|(need, float)| *need && !float)
            {
                continue;
            }
            let (some, saved) = gradients_of(&case, &needs, seed).map_err(fail)?;
            for i in 0..needs.len() {
                let expected = if needs[i] { full[i].clone() } else { None };
                prop_assert_eq!(&some[i], &expected, "input {} under mask {:?}", i, needs);
            }
            if mask == 0 {
                prop_assert_eq!(
                    saved,
                    0,
                    "nothing needs a gradient, yet something was saved"
                );
            }
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{kind:?}: {error}");
    }
}

macro_rules! checks {
    ($($test:ident: $kind:ident),* $(,)?) => {
        $(#[test] fn $test() { check(OpKind::$kind); })*

        /// The operations that have a check by finite differences.
        const CHECKED: &[OpKind] = &[$(OpKind::$kind),*];
    };
}

checks! {
    leaf: Leaf, linear: Linear, lora: Lora, matmul: MatMul, binary: Binary, affine: Affine, unary: Unary,
    glu: Glu, reduce: Reduce, sum_all: SumAll, reshape: Reshape, permute: Permute,
    narrow: Narrow, expand: Expand, concat: Concat, gather_rows: GatherRows,
    layer_norm: LayerNorm, rms_norm: RmsNorm, l2_normalize: L2Normalize, softmax: Softmax,
    attention: Attention, rope: Rope, dropout: Dropout, pool: Pool,
    cross_entropy: CrossEntropy, linear_cross_entropy: LinearCrossEntropy,
    bce_with_logits: BceWithLogits, cast: Cast,
}

/// Every operation through which a gradient flows is checked; the other two have tests below.
#[test]
fn no_operation_is_left_out() {
    for kind in OpKind::ALL {
        let apart = matches!(kind, OpKind::Detach | OpKind::ArgMax);
        assert_eq!(CHECKED.contains(kind), !apart, "{kind:?}");
    }
}

#[test]
fn detach_stops_the_gradient() {
    let memory = Memory::cpu();
    let mut tape = Tape::new(&memory, 0, 0);
    let x = Tensor::from_vec(&memory, vec![2.0, -3.0], &[2]).unwrap();
    let x = tape.parameter(0, "x", &x, true);
    let constant = tape.detach(&x).unwrap();
    let y = tape.mul(&x, &constant).unwrap();
    let loss = tape.sum_all(&y).unwrap();
    let mut gradients = Gradients::new();
    tape.backward(&loss, &mut gradients).unwrap();
    // d(x * c)/dx = c, where d(x * x)/dx would be 2x
    assert_eq!(gradients.get(0).unwrap().to_f64().unwrap(), [2.0, -3.0]);
}

#[test]
fn argmax_refuses_a_path_that_needs_a_gradient() {
    let memory = Memory::cpu();
    let mut tape = Tape::new(&memory, 0, 0);
    let w = Tensor::from_vec(&memory, vec![0.1, 0.7, 0.2, 0.4], &[2, 2]).unwrap();
    let w = tape.parameter(3, "classifier.weight", &w, true);
    let scaled = tape.scale(&w, 2.0).unwrap();
    let error = tape.argmax(&scaled).unwrap_err();
    assert_eq!(
        error,
        Error::NoBackward {
            op: "ArgMax".into(),
            parameter: "classifier.weight".into()
        }
    );
    let apart = tape.detach(&scaled).unwrap();
    let best = tape.argmax(&apart).unwrap();
    assert_eq!(best.value().to_vec::<i64>().unwrap(), [1, 1]);
}

#[test]
fn a_cast_rounds_the_gradient() {
    let memory = Memory::cpu();
    for to in [DType::F32, DType::Bf16, DType::F16] {
        let mut tape = Tape::new(&memory, 0, 0);
        let x = Tensor::from_vec(&memory, vec![1.0, 2.5], &[2]).unwrap();
        let x = tape.parameter(0, "x", &x, true);
        let short = tape.cast(&x, to).unwrap();
        let y = tape.scale(&short, 3.0).unwrap();
        let loss = tape.sum_all(&y).unwrap();
        let mut gradients = Gradients::new();
        tape.backward(&loss, &mut gradients).unwrap();
        let gradient = gradients.get(0).unwrap();
        assert_eq!(gradient.dtype(), DType::F64);
        assert_eq!(gradient.to_f64().unwrap(), [3.0, 3.0]);
    }
}
