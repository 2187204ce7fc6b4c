//! The tape's promises: what is frozen costs nothing, checkpoints and replays change no bit, and
//! mistakes are named.

use graft_autograd::{Error, Gradients, Result, Tape, Var};
use graft_tensor::ops::{Activation, Attention, WeightLayout};
use graft_tensor::{Category, Memory, Tensor};

fn values(memory: &Memory, seed: u64, shape: &[usize]) -> Tensor {
    let key = graft_tensor::ops::random::Key::new(seed, 0, 0);
    graft_tensor::ops::random::normal(memory, key, shape, 0.0, 0.5).unwrap()
}

const HIDDEN: usize = 8;

/// One transformer block with dropout; parameters `4 * layer ..`.
fn block(
    tape: &mut Tape,
    x: &Var,
    offsets: &Var,
    p: &[Tensor],
    layer: usize,
    trained: bool,
) -> Result<Var> {
    let w: Vec<Var> = (0..4)
        .map(|i| {
            tape.parameter(
                4 * layer + i,
                &format!("w{layer}.{i}"),
                &p[4 * layer + i],
                trained,
            )
        })
        .collect();
    let q = tape.linear(x, &w[0], None, WeightLayout::OutIn, None)?;
    let attention = Attention {
        dropout: 0.2,
        ..Attention::bidirectional(2, HIDDEN / 2)
    };
    let heads = tape.attention(&attention, &q, x, x, offsets)?;
    let heads = tape.dropout(&heads, 0.1)?;
    let h = tape.layer_norm(&heads, Some(x), Some(&w[3]), None, 1e-5)?;
    let up = tape.linear(&h, &w[1], None, WeightLayout::OutIn, Some(Activation::Gelu))?;
    let down = tape.linear(&up, &w[2], None, WeightLayout::OutIn, None)?;
    tape.add(&down, &h)
}

fn weights(memory: &Memory, layers: usize) -> Vec<Tensor> {
    let shapes = [[HIDDEN, HIDDEN], [16, HIDDEN], [HIDDEN, 16]];
    let memory = memory.with(Category::Weights);
    (0..layers)
        .flat_map(|layer| {
            let mut list: Vec<Tensor> = shapes
                .iter()
                .enumerate()
                .map(|(i, shape)| values(&memory, (4 * layer + i) as u64 + 1, shape))
                .collect();
            list.push(values(&memory, 99, &[HIDDEN]));
            list
        })
        .collect()
}

struct Step {
    tape: Tape,
    loss: Var,
}

/// A step over `layers` blocks, of which those below `frozen` are frozen and those in
/// `checkpointed` are recomputed.
fn record(
    memory: &Memory,
    p: &[Tensor],
    layers: usize,
    frozen: usize,
    checkpointed: std::ops::Range<usize>,
    step: u64,
) -> Step {
    let mut tape = Tape::new(memory, 7, step);
    let mut x = tape.input(values(memory, 50, &[6, HIDDEN]));
    let offsets = Tensor::from_vec::<i64>(memory, vec![0, 2, 6], &[3]).unwrap();
    let offsets = tape.input(offsets);
    for layer in 0..layers {
        let trained = layer >= frozen;
        x = if checkpointed.contains(&layer) {
            tape.checkpoint(|tape| block(tape, &x, &offsets, p, layer, trained))
        } else {
            block(&mut tape, &x, &offsets, p, layer, trained)
        }
        .unwrap();
    }
    let loss = tape.sum_all(&x).unwrap();
    Step { tape, loss }
}

fn gradients(step: &mut Step) -> Vec<(usize, Vec<f64>)> {
    let mut gradients = Gradients::new();
    step.tape.backward(&step.loss, &mut gradients).unwrap();
    gradients
        .iter()
        .map(|(key, tensor)| (key, tensor.to_f64().unwrap()))
        .collect()
}

#[test]
fn a_frozen_prefix_saves_nothing() {
    let memory = Memory::cpu();
    let p = weights(&memory, 3);
    let saved = |frozen| record(&memory, &p, 3, frozen, 0..0, 0).tape.saved_bytes();
    let (all, last, none) = (saved(0), saved(2), saved(3));
    assert_eq!(none, 0);
    // What the last block saves does not depend on those below it; each costs about a third.
    assert!(last * 3 <= all + all / 8, "{last} of {all}");
}

#[test]
fn frozen_activations_are_freed_at_once() {
    let memory = Memory::cpu();
    let p = weights(&memory, 8);
    let peak = |layers| {
        memory.reset_peak();
        drop(record(&memory, &p, layers, layers, 0..0, 0));
        memory.usage().peak(Category::Activations)
    };
    assert_eq!(
        peak(3),
        peak(8),
        "a frozen trunk needs no more memory for being deeper"
    );
}

#[test]
fn an_evaluation_computes_the_same_and_records_nothing() {
    let memory = Memory::cpu();
    let p = weights(&memory, 2);
    let run = |mut tape: Tape| {
        let mut x = tape.input(values(&memory, 50, &[6, HIDDEN]));
        let offsets = Tensor::from_vec::<i64>(&memory, vec![0, 2, 6], &[3]).unwrap();
        let offsets = tape.input(offsets);
        x = block(&mut tape, &x, &offsets, &p, 0, true).unwrap();
        let second = |tape: &mut Tape| block(tape, &x, &offsets, &p, 1, true);
        x = tape.checkpoint(second).unwrap();
        let best = tape.argmax(&x);
        (tape, x, best)
    };
    let (recorded, wanted, refused) = run(Tape::new(&memory, 0, 0));
    assert!(recorded.needs_gradient(&wanted) && refused.is_err());
    let (mut tape, found, best) = run(Tape::evaluation(&memory));
    let bits = |x: &Var| x.value().to_vec::<f32>().unwrap();
    assert_eq!(bits(&found), bits(&wanted));
    best.expect("no gradient has to pass");
    assert!(tape.is_empty() && !tape.needs_gradient(&found));
    let loss = tape.sum_all(&found).unwrap();
    let error = tape.backward(&loss, &mut Gradients::new()).unwrap_err();
    assert_eq!(error, Error::NothingTrainable);
}

#[test]
fn gradients_of_a_frozen_run_equal_those_of_the_full_run() {
    let memory = Memory::cpu();
    let p = weights(&memory, 3);
    let full = gradients(&mut record(&memory, &p, 3, 0, 0..0, 0));
    let part = gradients(&mut record(&memory, &p, 3, 2, 0..0, 0));
    assert_eq!(full.len(), 12);
    assert_eq!(part[..], full[8..]);
}

#[test]
fn a_frozen_linear_does_not_keep_its_input() {
    let memory = Memory::cpu();
    let saved = |weight_trained| {
        let mut tape = Tape::new(&memory, 0, 0);
        let x = tape.parameter(0, "x", &values(&memory, 1, &[100, 8]), true);
        let w = tape.parameter(1, "w", &values(&memory, 2, &[4, 8]), weight_trained);
        tape.linear(&x, &w, None, WeightLayout::OutIn, None)
            .unwrap();
        tape.saved_bytes()
    };
    assert_eq!(
        saved(false),
        4 * 8 * 4,
        "the weight alone, which is there anyway"
    );
    assert_eq!(saved(true), 4 * 8 * 4 + 100 * 8 * 4);
}

#[test]
fn checkpointing_changes_no_bit_and_saves_memory() {
    let memory = Memory::cpu();
    let p = weights(&memory, 3);
    let mut plain = record(&memory, &p, 3, 0, 0..0, 3);
    let expected = gradients(&mut plain);
    for checkpointed in [0..1, 0..3, 1..3] {
        let mut step = record(&memory, &p, 3, 0, checkpointed.clone(), 3);
        assert!(step.tape.saved_bytes() < record(&memory, &p, 3, 0, 0..0, 3).tape.saved_bytes());
        assert_eq!(gradients(&mut step), expected, "{checkpointed:?}");
    }
}

/// Each operation that can rebuild its result, in front of one that saves it, and through another.
#[test]
fn rebuilding_changes_no_bit_and_saves_memory() {
    let memory = Memory::cpu();
    let p: Vec<Tensor> = [&[6, 8][..], &[6, 8], &[8], &[8], &[8, 8], &[5, 8]]
        .iter()
        .enumerate()
        .map(|(i, shape)| values(&memory, i as u64, shape))
        .collect();
    type Build = fn(&mut Tape, &[Var]) -> Result<Var>;
    let ops: [(&str, Build); 7] = [
        ("layer norm", |t, v| {
            t.layer_norm(&v[0], None, Some(&v[2]), Some(&v[3]), 1e-5)
        }),
        ("layer norm of a sum", |t, v| {
            t.layer_norm(&v[0], Some(&v[1]), Some(&v[2]), None, 1e-5)
        }),
        ("rms norm", |t, v| t.rms_norm(&v[0], None, &v[2], 0.0, 1e-5)),
        ("rms norm of a sum", |t, v| {
            t.rms_norm(&v[0], Some(&v[1]), &v[2], 1.0, 1e-5)
        }),
        ("gated unit", |t, v| {
            t.glu(graft_tensor::ops::Glu::Swiglu, &v[0], &v[1])
        }),
        ("linear", |t, v| {
            let gelu = Some(Activation::Gelu);
            t.linear(&v[0], &v[4], Some(&v[2]), WeightLayout::OutIn, gelu)
        }),
        ("square", |t, v| {
            t.unary(graft_tensor::ops::Unary::Square, &v[0])
        }),
    ];
    for (name, op) in ops {
        for mask in 0..32u32 {
            let run = |keep: bool| {
                let mut tape = Tape::new(&memory, 0, 0);
                if keep {
                    tape.keep_everything();
                }
                let needs = |i: usize| i == 5 || mask >> i & 1 == 1;
                let v: Vec<Var> = (0..6)
                    .map(|i| tape.parameter(i, &format!("p{i}"), &p[i], needs(i)))
                    .collect();
                let y = op(&mut tape, &v).unwrap();
                // Rebuilt for the norm's own backward, which is rebuilt for the linear's.
                let y = tape.layer_norm(&y, None, None, None, 1e-5).unwrap();
                let z = tape.linear(&y, &v[5], None, WeightLayout::OutIn, None);
                let loss = tape.sum_all(&z.unwrap()).unwrap();
                drop(y);
                let saved = tape.saved_bytes();
                (saved, gradients(&mut Step { tape, loss }))
            };
            let ((some, rebuilt), (all, kept)) = (run(false), run(true));
            assert_eq!(rebuilt, kept, "{name}, needs {mask:05b}");
            assert!(some <= all, "{name}, needs {mask:05b}: {some} of {all}");
            if mask == 31 {
                assert!(some < all, "{name}: {some} of {all}");
            }
        }
    }
}

#[test]
fn checkpoints_of_several_blocks_and_nested_ones_are_one_region() {
    let memory = Memory::cpu();
    let p = weights(&memory, 2);
    let expected = gradients(&mut record(&memory, &p, 2, 0, 0..0, 1));
    let mut tape = Tape::new(&memory, 7, 1);
    let x = tape.input(values(&memory, 50, &[6, HIDDEN]));
    let offsets = Tensor::from_vec::<i64>(&memory, vec![0, 2, 6], &[3]).unwrap();
    let offsets = tape.input(offsets);
    let y = tape
        .checkpoint(|tape| {
            let y = tape.checkpoint(|tape| block(tape, &x, &offsets, &p, 0, true))?;
            block(tape, &y, &offsets, &p, 1, true)
        })
        .unwrap();
    let loss = tape.sum_all(&y).unwrap();
    assert_eq!(gradients(&mut Step { tape, loss }), expected);
}

#[test]
fn a_replay_equals_a_recording() {
    let memory = Memory::cpu();
    let p = weights(&memory, 3);
    for checkpointed in [0..0, 1..2] {
        let mut fresh = record(&memory, &p, 3, 1, checkpointed.clone(), 5);
        let expected_loss = fresh.loss.value().item().unwrap();
        let expected = gradients(&mut fresh);
        // Recorded at another step and with other weights, and used up by a backward pass.
        let others: Vec<Tensor> = p.iter().map(|t| values(&memory, 1000, t.shape())).collect();
        let mut step = record(&memory, &others, 3, 1, checkpointed, 0);
        assert_ne!(gradients(&mut step), expected);
        let x = values(&memory, 50, &[6, HIDDEN]);
        let offsets = Tensor::from_vec::<i64>(&memory, vec![0, 2, 6], &[3]).unwrap();
        let loss = step.tape.replay(5, |node, key| match (node, key) {
            (_, Some(key)) => p[key].clone(),
            (0, None) => x.clone(),
            _ => offsets.clone(),
        });
        step.loss = loss.unwrap().unwrap();
        assert_eq!(step.loss.value().item().unwrap(), expected_loss);
        assert_eq!(gradients(&mut step), expected);
    }
}

#[test]
fn a_replay_refuses_other_shapes() {
    let memory = Memory::cpu();
    let mut tape = Tape::new(&memory, 0, 0);
    let x = tape.input(values(&memory, 1, &[2, 3]));
    tape.sum_all(&x).unwrap();
    let other = values(&memory, 1, &[3, 2]);
    let error = tape.replay(0, |_, _| other.clone()).unwrap_err();
    assert!(error.to_string().contains("[2, 3]"), "{error}");
}

#[test]
fn tied_weights_share_a_gradient() {
    let memory = Memory::cpu();
    let w = Tensor::from_vec(&memory, vec![3.0f64], &[1]).unwrap();
    let mut tape = Tape::new(&memory, 0, 0);
    let a = tape.parameter(4, "w", &w, true);
    let b = tape.parameter(4, "w", &w, true);
    let y = tape.mul(&a, &b).unwrap();
    let loss = tape.sum_all(&y).unwrap();
    let mut gradients = Gradients::new();
    tape.backward(&loss, &mut gradients).unwrap();
    assert_eq!(gradients.get(4).unwrap().item().unwrap(), 6.0);
}

#[test]
fn gradients_add_up_over_passes_and_are_counted() {
    let memory = Memory::cpu();
    let w = values(&memory, 1, &[100]);
    let mut gradients = Gradients::new();
    for _ in 0..3 {
        let mut tape = Tape::new(&memory, 0, 0);
        let w = tape.parameter(0, "w", &w, true);
        let loss = tape.sum_all(&w).unwrap();
        tape.backward(&loss, &mut gradients).unwrap();
    }
    assert_eq!(gradients.get(0).unwrap().to_f64().unwrap(), [3.0; 100]);
    assert_eq!(memory.usage().live(Category::Gradients), 400);
}

#[test]
fn mistakes_are_named() {
    let memory = Memory::cpu();
    let mut tape = Tape::new(&memory, 0, 0);
    let w = tape.parameter(0, "w", &values(&memory, 1, &[2]), true);
    let constant = tape.input(values(&memory, 2, &[2]));
    let mut gradients = Gradients::new();
    let error = tape.backward(&w, &mut gradients).unwrap_err();
    assert!(matches!(error, Error::NotScalar { .. }), "{error}");
    let apart = tape.sum_all(&constant).unwrap();
    let error = tape.backward(&apart, &mut gradients).unwrap_err();
    assert_eq!(error, Error::NothingTrainable);
    let loss = tape.sum_all(&w).unwrap();
    tape.backward(&loss, &mut gradients).unwrap();
    let error = tape.backward(&loss, &mut gradients).unwrap_err();
    assert_eq!(error, Error::Consumed);
    let trainable = [(0, "w"), (1, "pooler.bias"), (2, "unused.weight")];
    let error = gradients.require(trainable.into_iter()).unwrap_err();
    let names = vec!["pooler.bias".to_owned(), "unused.weight".to_owned()];
    assert_eq!(error, Error::NoGradient { names });
}

#[test]
fn a_program_can_be_read() {
    let memory = Memory::cpu();
    let mut tape = Tape::new(&memory, 0, 0);
    let x = tape.input(values(&memory, 1, &[5, 3]));
    let w = tape.parameter(0, "dense.weight", &values(&memory, 2, &[4, 3]), true);
    let y = tape
        .linear(&x, &w, None, WeightLayout::OutIn, None)
        .unwrap();
    tape.sum_all(&y).unwrap();
    let text = tape.to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4);
    assert!(
        lines[1].contains("dense.weight") && lines[1].ends_with('*'),
        "{text}"
    );
    assert!(lines[2].starts_with("%2 f32 [5, 4] = Linear"), "{text}");
}

#[test]
fn a_plan_needs_the_memory_of_the_real_step() {
    let usage = |memory: Memory| {
        let p = weights(&memory, 3);
        let mut step = record(&memory, &p, 3, 1, 1..2, 0);
        let mut gradients = Gradients::new();
        step.tape.backward(&step.loss, &mut gradients).unwrap();
        memory.usage()
    };
    assert_eq!(usage(Memory::planned()), usage(Memory::cpu()));
}
