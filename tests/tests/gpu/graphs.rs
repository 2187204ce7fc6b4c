//! Work that comes up again and is sent in graphs does what it does when each launch goes by itself.

use graft_kernels::cuda::Sent;
use graft_nn::Optimizer;
use graft_nn::optimizer::Rule;
use graft_tensor::DType;

use crate::model::{Model, Trained, gpu, load, load_dropping};

/// More launches than any step has here: a part of a step ends where numbers are sent or read.
const ALL: usize = 1 << 20;

fn adamw() -> Optimizer {
    Optimizer::new(Rule::adamw(), 0.01, true).unwrap()
}

fn bytes(model: &Model) -> Vec<Vec<u8>> {
    let ids = model.parameters.iter().map(|(id, _)| id);
    ids.map(|id| model.parameters.value(id).unwrap().to_bytes().unwrap())
        .collect()
}

/// What was sent since `before`.
fn since(before: Sent, now: Sent) -> Sent {
    Sent {
        alone: now.alone - before.alone,
        in_graphs: now.in_graphs - before.in_graphs,
        graphs: now.graphs - before.graphs,
        made: now.made - before.made,
        set: now.set - before.set,
    }
}

/// Losses, norms and weights of six steps, with dropout and without, of which the last go in graphs.
#[test]
#[ignore = "needs a GPU"]
fn steps_in_graphs_have_the_bits_of_steps_without() {
    for (name, compute, trained, dropout, lengths) in [
        ("tiny-bert", DType::F32, Trained::Full, 0.1, &[7, 128][..]),
        ("tiny-bert", DType::Bf16, Trained::Last, 0.0, &[ALL]),
        ("tiny-gpt2", DType::Bf16, Trained::Full, 0.1, &[128]),
        ("tiny-llama", DType::Bf16, Trained::Lora, 0.0, &[ALL]),
    ] {
        let run = |together: usize| {
            let memory = gpu();
            let device = memory.opened_gpu().unwrap();
            device.send_together(Some(together)).unwrap();
            let mut model = load_dropping(name, &memory, compute, trained, dropout);
            let mut optimizer = adamw();
            let mut steps = Vec::new();
            let mut last = Sent::default();
            for step in 0..6 {
                let before = device.sent();
                steps.push(model.step(&mut optimizer, 1e-3, step));
                last = since(before, device.sent());
            }
            ((steps, bytes(&model)), last)
        };
        let (wanted, alone) = run(1);
        let what = format!("{name} {compute} {trained:?}");
        assert!(alone.in_graphs == 0 && alone.alone > 0, "{what}: {alone:?}");
        for &together in lengths {
            let (found, last) = run(together);
            assert!(found == wanted, "{what}, {together} together");
            assert_eq!(last.alone + last.in_graphs, alone.alone, "{what}: tasks");
            assert!(last.in_graphs > last.alone, "{what}: {last:?}");
            // Keys of dropout differ from step to step.
            assert!(last.set > 0 || dropout == 0.0, "{what}: {last:?}");
        }
    }
}

/// Steps of which each is sent before anybody looks at the one before: once they are like those before, each is one graph,
/// what this machine sends and reads included, and they have the bits of steps that were waited for.
#[test]
#[ignore = "needs a GPU"]
fn a_step_that_nobody_waits_for_is_one_graph() {
    for (name, compute, trained, dropout) in [
        ("tiny-bert", DType::F32, Trained::Full, 0.1),
        ("tiny-bert", DType::Bf16, Trained::Last, 0.0),
        ("tiny-gpt2", DType::Bf16, Trained::Full, 0.1),
        ("tiny-llama", DType::Bf16, Trained::Lora, 0.0),
    ] {
        let what = format!("{name} {compute} {trained:?}");
        let wanted = {
            let memory = gpu();
            let alone = Some(1);
            memory.opened_gpu().unwrap().send_together(alone).unwrap();
            let mut model = load_dropping(name, &memory, compute, trained, dropout);
            let mut optimizer = adamw();
            let steps: Vec<_> = (0..6)
                .map(|step| model.step(&mut optimizer, 1e-3, step))
                .collect();
            (steps, bytes(&model))
        };
        let memory = gpu();
        let device = memory.opened_gpu().unwrap();
        let mut model = load_dropping(name, &memory, compute, trained, dropout);
        let mut optimizer = adamw();
        let (mut steps, mut waiting) = (Vec::new(), None);
        let mut last = Sent::default();
        for step in 0..6 {
            let before = device.sent();
            let sent = model.send(&mut optimizer, 1e-3, step);
            last = since(before, device.sent());
            if let Some(sent) = waiting.replace(sent) {
                steps.push(model.settle(&mut optimizer, sent));
            }
        }
        steps.extend(waiting.map(|sent| model.settle(&mut optimizer, sent)));
        assert!((steps, bytes(&model)) == wanted, "{what}");
        assert_eq!((last.graphs, last.alone, last.made), (1, 0, 0), "{what}");
    }
}

/// Models in turns, training and evaluation, what is trained changing on the way, gradients of two batches in one step.
#[test]
#[ignore = "needs a GPU"]
fn what_is_asked_for_in_between_changes_nothing() {
    let run = |together: usize| {
        let memory = gpu();
        let device = memory.opened_gpu().unwrap();
        device.send_together(Some(together)).unwrap();
        let mut bert = load("tiny-bert", &memory, DType::F32, Trained::Full);
        let mut llama = load("tiny-llama", &memory, DType::Bf16, Trained::Full);
        let full = std::mem::replace(
            &mut bert.set,
            load("tiny-bert", &memory, DType::F32, Trained::Last).set,
        );
        let (mut first, mut second) = (adamw(), adamw());
        let mut found = Vec::new();
        for step in 0..6 {
            if step == 3 {
                bert.set = full.clone();
            }
            found.push(bert.step(&mut first, 1e-3, step));
            if step % 3 != 1 {
                found.push(llama.step(&mut second, 1e-3, step));
            }
            if step % 2 == 0 {
                let logits = bert.logits();
                found.push((logits[0], logits[1]));
            }
            let (loss, mut gradients) = bert.gradients(100 + step);
            let again = bert.add_gradients(&bert.set, 200 + step, &mut gradients);
            let (p, set) = (&mut bert.parameters, &bert.set);
            let done = first.step(p, set, &mut gradients, 1e-3, Some(0.5)).unwrap();
            found.push((loss + again, done.gradient_norm));
        }
        ((found, bytes(&bert), bytes(&llama)), device.sent())
    };
    let (wanted, alone) = run(1);
    let (found, sent) = run(64);
    assert!(found == wanted);
    assert_eq!(sent.alone + sent.in_graphs, alone.alone);
    assert!(3 * sent.in_graphs > sent.alone, "{sent:?}");
}
