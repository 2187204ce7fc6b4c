//! A run on a GPU that was stopped, and goes on.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use graft_tests::fixture;
use graft_tests::runs::{Task, Trainer, snapshot};

/// The program that was carried here, or the one that cargo built.
fn trainer() -> Trainer {
    match std::env::var("GRAFT_TRAINER") {
        Ok(path) => Trainer(path.leak()),
        Err(_) => Trainer(env!("CARGO_BIN_EXE_trainer_under_test")),
    }
}

/// Killed behind some step, in f32 and bf16, with all weights and with an adapter: what comes of the run has the bits of one
/// that nobody disturbed.
#[test]
#[ignore = "needs a GPU"]
fn a_stopped_run_goes_on_to_the_same_bits() {
    let (trainer, task) = (trainer(), Task::new(6, 4));
    let (run, staged) = (task.path("run"), task.path(".run.graft-new"));
    for (strategy, precision) in [("full", "f32"), ("lora", "bf16")] {
        let more = ["--strategy", strategy, "--precision", precision];
        let often = [
            "--device",
            "cuda:0",
            "--epochs",
            "4",
            "--checkpoint",
            "1 step",
        ];
        let arguments = task.train(&fixture("tiny-bert"), "run", &[&more[..], &often].concat());
        trainer.succeeds(&arguments);
        let left = || {
            let mut files = snapshot(&run);
            // These two hold times.
            assert!(files.remove("metrics.jsonl").is_some());
            assert!(files.remove("certificate.json").is_some());
            files
        };
        let undisturbed = left();
        std::fs::remove_dir_all(&run).unwrap();

        let mut child = trainer.command(&arguments).spawn().unwrap();
        let begun = Instant::now();
        let passed = |metrics: PathBuf| {
            let text = std::fs::read_to_string(metrics).unwrap_or_default();
            text.contains("\"step\":2,")
        };
        while !passed(staged.join("metrics.jsonl")) {
            assert!(begun.elapsed() < Duration::from_secs(300), "no second step");
            assert!(child.try_wait().unwrap().is_none(), "the run has ended");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!run.exists(), "the run has ended");
        let said = trainer.succeeds(["resume", run.to_str().unwrap()]);
        assert!(said.err.contains("resumed after step"), "{}", said.err);
        assert!(left() == undisturbed, "{strategy}, {precision}");
        trainer.succeeds(["verify", run.to_str().unwrap()]);
        std::fs::remove_dir_all(&run).unwrap();
    }
}
