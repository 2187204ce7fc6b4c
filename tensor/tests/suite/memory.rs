use graft_tensor::ops::elementwise::add_assign;
use graft_tensor::ops::{self, Unary};
use graft_tensor::{Category, DType, Error, Memory, Tensor};

use crate::common::{ids, upload};

fn floats(m: &Memory, count: usize) -> Tensor {
    Tensor::zeros(m, DType::F32, &[count]).unwrap()
}

#[test]
fn what_is_freed_is_counted_as_freed_and_reused() {
    let m = Memory::cpu().with(Category::Gradients);
    let x = floats(&m, 1000);
    let view = x.narrow(0, 0, 10).unwrap();
    drop(x);
    assert_eq!(
        m.usage().live(Category::Gradients),
        4000,
        "a view keeps its storage"
    );
    drop(view);
    let usage = m.usage();
    assert_eq!(
        (
            usage.live(Category::Gradients),
            usage.peak(Category::Gradients)
        ),
        (0, 4000)
    );
    assert_eq!(
        (usage.held, usage.peak_total),
        (4032, 4000),
        "whole cache lines"
    );
    let again = floats(&m.with(Category::Weights), 1000);
    assert_eq!(m.usage().held, 4032, "the same bytes for another category");
    assert_eq!(m.usage().live(Category::Weights), 4000);
    drop(again);
}

#[test]
fn a_loop_of_like_work_holds_no_more_than_its_first_rounds() {
    for m in [Memory::cpu(), Memory::planned()] {
        let round = |n: usize| {
            // Inputs come from outside, of several lengths.
            let n = n * 37 % 50;
            let ids = ids(&m, &vec![1; 10 + n]);
            let x = upload(&m, DType::F32, vec![1.0; 400 + n], &[40 * 10 + n]);
            let y = ops::unary(&m, Unary::Exp, &x.narrow(0, 0, 400).unwrap()).unwrap();
            (ids, x, y)
        };
        (0..50).for_each(|n| drop(round(n)));
        let held = m.usage().held;
        (50..100).for_each(|n| drop(round(n)));
        assert_eq!(m.usage().held, held);
        assert_eq!(m.usage().live, [0; 5]);
    }
}

#[test]
fn reused_blocks_are_seen_as_new() {
    let m = Memory::cpu();
    drop(Tensor::full(&m, DType::F32, &[100], 7.0).unwrap());
    let zeros = Tensor::zeros(&m, DType::F32, &[90]).unwrap();
    assert_eq!(zeros.to_f64().unwrap(), [0.0; 90]);
    drop(zeros);
    let doubled = ops::affine(&m, &upload(&m, DType::F32, vec![2.0; 95], &[95]), 2.0, 0.0).unwrap();
    assert_eq!(doubled.to_f64().unwrap(), [4.0; 95]);
}

#[test]
fn peaks_restart_at_what_is_in_use() {
    let m = Memory::cpu();
    let kept = floats(&m, 100);
    drop(floats(&m, 1000));
    assert_eq!(m.usage().peak_total, 4400);
    m.reset_peak();
    assert_eq!(m.usage().peak_total, 400);
    assert_eq!(m.usage().peak(Category::Activations), 400);
    drop(kept);
    assert_eq!(m.usage().peak_total, 400);
}

#[test]
fn scratch_space_is_gone_after_the_call() {
    let m = Memory::cpu();
    let (a, b) = (floats(&m, 64 * 64), floats(&m, 64 * 64));
    let (a, b) = (a.reshape(&[64, 64]).unwrap(), b.reshape(&[64, 64]).unwrap());
    let c = ops::matmul(&m, &a, &b).unwrap();
    assert_eq!(m.usage().live(Category::Workspace), 0);
    assert_eq!(m.usage().live(Category::Activations), 3 * 64 * 64 * 4);
    drop(c);
}

#[test]
fn recounting_moves_what_is_unique_and_copies_what_is_shared() {
    for m in [Memory::cpu(), Memory::planned()] {
        let x = floats(&m, 100);
        let before = m.usage().held;
        let x = x.recount(Category::Gradients).unwrap();
        assert_eq!(x.memory().category(), Category::Gradients);
        let usage = m.usage();
        assert_eq!(usage.live(Category::Activations), 0);
        assert_eq!(usage.live(Category::Gradients), 400);
        assert_eq!(usage.held, before, "no copy");
        let shared = x.clone();
        let weights = x.recount(Category::Weights).unwrap();
        assert!(!weights.shares_storage(&shared));
        let usage = m.usage();
        assert_eq!(usage.live(Category::Gradients), 400);
        assert_eq!(usage.live(Category::Weights), 400);
        let same = shared.clone().recount(Category::Gradients).unwrap();
        assert!(same.shares_storage(&shared), "nothing to move");
        drop((same, shared, weights));
        assert_eq!(m.usage().live, [0; 5]);
    }
}

#[test]
fn only_what_nobody_else_holds_is_written_in_place() {
    let m = Memory::cpu();
    let mut x = floats(&m, 4);
    let one = Tensor::full(&m, DType::F32, &[4], 1.0).unwrap();
    let clone = x.clone();
    assert!(!x.is_unique());
    let error = add_assign(&mut x, &one).unwrap_err();
    assert_eq!(error, Error::Shared { shape: *x.shape() });
    assert_eq!(
        error.to_string(),
        "cannot write in place: the tensor [4] is shared; drop the tape and other clones first"
    );
    assert_eq!(clone.to_f64().unwrap(), [0.0; 4]);
    drop(clone);
    assert!(x.is_unique());
    add_assign(&mut x, &one).unwrap();
    assert_eq!(x.to_f64().unwrap(), [1.0; 4]);
    let view = x.narrow(0, 1, 2).unwrap();
    assert!(matches!(x.slice_mut::<f32>(), Err(Error::Shared { .. })));
    drop(x);
    // The view is the only holder now, and lies side by side.
    let mut view = view;
    add_assign(&mut view, &one.narrow(0, 0, 2).unwrap()).unwrap();
    assert_eq!(view.to_f64().unwrap(), [2.0; 2]);
}

#[test]
fn clones_of_a_handle_are_one_allocator() {
    let m = Memory::cpu();
    let weights = m.with(Category::Weights);
    let x = floats(&weights, 10);
    assert_eq!(m.usage(), weights.usage());
    assert_eq!(m.usage().live(Category::Weights), 40);
    assert_eq!(
        (m.category(), weights.category()),
        (Category::Activations, Category::Weights)
    );
    drop(x);
    assert_ne!(
        Memory::cpu().usage(),
        m.usage(),
        "another allocator never held anything"
    );
}

#[test]
fn plans_hold_no_floats_but_real_integers() {
    let m = Memory::planned();
    let x = Tensor::full(&m, DType::F32, &[1_000_000_000], 1.0).unwrap();
    assert!(x.is_planned());
    assert_eq!(m.usage().live(Category::Activations), 4_000_000_000);
    assert_eq!(
        x.to_f64().unwrap_err().to_string(),
        "the tensor [1000000000] belongs to a memory plan and holds no elements"
    );
    let i = ids(&m, &[3, 4]);
    assert!(!i.is_planned());
    assert_eq!(i.to_vec::<i64>().unwrap(), [3, 4]);
    let y = ops::argmax(&m, &x.reshape(&[1000, 1_000_000]).unwrap()).unwrap();
    assert_eq!(
        y.to_vec::<i64>().unwrap(),
        [0; 1000],
        "valid indices, to go on with"
    );
}
