//! What a run says before it begins.

use std::fmt::Write as _;

use graft_tests::fixture;
use graft_tests::runs::Task;

use crate::TRAINER;

#[test]
fn numbers_far_from_where_a_new_head_begins_are_pointed_out() {
    let task = Task::new(6, 2);
    let said = |name: &str, unit: f64| {
        let mut rows = String::new();
        for i in 0..24 {
            let number = f64::from(i % 4 + 1) * unit;
            writeln!(rows, "{{\"text\": \"{i}\", \"label\": {number}}}").unwrap();
        }
        std::fs::write(task.path(name), rows).unwrap();
        let (model, data, out) = (fixture("tiny-bert"), task.text(name), task.text("run"));
        let base = ["train", "--task", "regression", "--epochs", "2"];
        let model = ["--model", model.to_str().unwrap()];
        let files = [
            "--train",
            &data,
            "--out",
            &out,
            "--set",
            "train.audit=false",
        ];
        TRAINER.succeeds([&base[..], &model, &files].concat()).err
    };
    let far = said("amounts.jsonl", 1000.0);
    let want = "the numbers are 2.5000e3 on average, with a standard deviation of 1.1180e3";
    assert!(far.contains(want), "{far}");
    assert!(!said("scores.jsonl", 1.0).contains("on average"));
}
