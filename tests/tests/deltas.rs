//! `trainer diff`, `apply` and `revert` over what runs leave, as a user calls them.

use std::path::Path;

use graft_tests::fixture;
use graft_tests::runs::{Task, Trainer, language_model};

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// What two models differ by, written, and both restored from it to the bit: how many tensors changed, and what of them is
/// new.
fn there_and_back(task: &Task, base: &str, tuned: &str) -> [usize; 3] {
    let (delta, out) = (task.text("delta"), task.text("restored.safetensors"));
    let said = TRAINER.succeeds(["diff", base, tuned, "-o", &delta]).out;
    let weights = |dir: &str| std::fs::read(Path::new(dir).join("model.safetensors")).unwrap();
    TRAINER.succeeds(["apply", base, &delta, "-o", &out]);
    assert!(std::fs::read(&out).unwrap() == weights(tuned), "{tuned}");
    TRAINER.succeeds(["revert", tuned, &delta, "-o", &out]);
    assert!(std::fs::read(&out).unwrap() == weights(base), "{tuned}");
    let size = std::fs::metadata(&delta).unwrap().len() as usize;
    assert!(size < weights(tuned).len(), "{tuned}: {size} bytes");
    let number = |name: &str| -> usize {
        let row = said.lines().find(|line| line.trim().starts_with(name));
        let last = row.unwrap().split_whitespace().last().unwrap();
        last.parse().unwrap()
    };
    ["tensors as in the base", "changed", "new"].map(number)
}

#[test]
fn merged_adapters_and_other_runs_are_restored_to_the_bit() {
    let task = Task::new(60, 12);
    let base = fixture("tiny-bert");
    let base = base.to_str().unwrap();
    let few = ["--epochs", "1", "--lr", "0.01"];
    for (strategy, changed) in [
        // Queries and values of two layers, and the output layer.
        ("lora", 6),
        ("dora", 6),
        // Keys and values with their biases, and what is behind attention and the feed-forward block; the output layer.
        ("ia3", 2 * (2 + 2 + 1 + 1) + 2),
        // Weights and biases of five norms, and the whole head.
        ("lora+head+norms", 4 + 10 + 4),
        ("bitfit", 0),
    ] {
        let more = [&few[..], &["--strategy", strategy]].concat();
        TRAINER.succeeds(task.train(Path::new(base), "run", &more));
        let run = task.text("run");
        TRAINER.succeeds(["verify", &run]);
        let mut tuned = run.clone();
        if strategy != "bitfit" {
            tuned = task.text("merged");
            TRAINER.succeeds(["merge", "--model", &run, "--out", &tuned]);
        }
        let [same, found, new] = there_and_back(&task, base, &tuned);
        assert_eq!(new, 0, "{strategy}");
        if changed > 0 {
            assert_eq!(found, changed, "{strategy}: {same} are the same");
        }
    }
}

#[test]
fn a_decoder_s_merged_adapter_is_restored_to_the_bit() {
    let task = Task::new(1, 1);
    let text = "line after line of the text\n".repeat(40);
    std::fs::write(task.path("text.txt"), text).unwrap();
    let data = task.text("text.txt");
    for (family, changed) in [("tiny-gpt2", 2), ("tiny-llama", 4), ("tiny-qwen2", 4)] {
        let base = task.text(family);
        language_model(Path::new(&base), family);
        let (run, merged) = (task.text("run"), task.text("merged"));
        let arguments = [
            "train", "--task", "clm", "--model", &base, "--train", &data, "--out", &run,
        ];
        let more = ["--strategy", "lora", "--epochs", "1", "--max-length", "24"];
        TRAINER.succeeds([&arguments[..], &more].concat());
        TRAINER.succeeds(["merge", "--model", &run, "--out", &merged]);
        let [_, found, new] = there_and_back(&task, &base, &merged);
        assert_eq!((found, new), (changed, 0), "{family}");
    }
}

/// An adapter's run holds no whole model: what it changes is already apart.
#[test]
fn an_adapter_that_is_not_merged_is_no_tuned_model() {
    let task = Task::new(24, 6);
    let base = fixture("tiny-bert");
    let more = ["--strategy", "lora", "--epochs", "1"];
    TRAINER.succeeds(task.train(&base, "run", &more));
    let (run, delta) = (task.text("run"), task.text("delta"));
    let refused = TRAINER.refuses(["diff", base.to_str().unwrap(), &run, "-o", &delta]);
    assert!(refused.contains("merge"), "{refused}");
    assert!(!Path::new(&delta).exists());
}
