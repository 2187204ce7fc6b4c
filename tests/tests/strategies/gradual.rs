use graft_tests::runs::{records, snapshot};
use graft_trainer::certificate::Certificate;

use super::{Bench, TRAINER, names};

/// Which of a tiny model's parts a tensor belongs to: 0 for embeddings, 1 and 2 for the layers, 3 for the head.
fn part(name: &str) -> usize {
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    match name {
        _ if has(&[".layer.0.", ".layers.0.", ".h.0."]) => 1,
        _ if has(&[".layer.1.", ".layers.1.", ".h.1."]) => 2,
        _ if has(&["embeddings", "embed_tokens", ".wte", ".wpe"]) => 0,
        _ => 3,
    }
}

#[test]
fn what_has_not_thawed_is_certified_as_frozen() {
    let bench = Bench::new();
    for family in ["tiny-bert", "tiny-roberta", "tiny-gpt2", "tiny-llama"] {
        for (strategy, epochs, lowest) in [
            ("gradual", "2", [3, 0, 0]),
            ("gradual", "3", [3, 2, 0]),
            ("gradual:1", "2", [3, 2, 2]),
            ("gradual:1", "3", [3, 2, 1]),
            ("last:2+gradual", "3", [3, 2, 1]),
        ] {
            let more = ["--strategy", strategy, "--epochs", epochs, "--lr", "1e-3"];
            TRAINER.succeeds(bench.train(family, "run", &more));
            let end = &records(&bench.path("run"), "end")[0];
            let kept = end["best_epoch"].as_u64().unwrap() as usize;
            let trained = bench.trained("run");
            for name in names(&bench.path("run")) {
                let expected = part(&name) >= lowest[kept - 1];
                assert_eq!(
                    trained.contains(&name),
                    expected,
                    "{family} {strategy} {name} {kept}"
                );
            }
            let text = std::fs::read_to_string(bench.path("run").join("certificate.json")).unwrap();
            let path = std::path::Path::new("certificate.json");
            let certificate = Certificate::parse(&text, path).unwrap();
            for tensor in certificate.tensors {
                assert_eq!(
                    tensor.before != tensor.after,
                    tensor.trainable,
                    "{family} {strategy} {}",
                    tensor.name
                );
            }
        }
    }
}

#[test]
fn a_cut_that_moves_changes_no_bit() {
    let bench = Bench::new();
    let weights = |out: &str, more: &[&str]| {
        let common = [
            "--strategy",
            "gradual:1",
            "--lr",
            "2e-3",
            "--dropout",
            "0.2",
        ];
        let more: Vec<&str> = common.iter().chain(more).copied().collect();
        TRAINER.succeeds(bench.train("tiny-bert", out, &more));
        let run = snapshot(&bench.path(out));
        let left: Vec<&String> = run
            .keys()
            .filter(|name| name.contains("features"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        (
            run["model.safetensors"].clone(),
            records(&bench.path(out), "eval"),
        )
    };
    // Two epochs with each cut but the first, so that there is something to keep for.
    for epochs in ["3", "6"] {
        let plain = weights("off", &["--epochs", epochs, "--set", "train.cache=off"]);
        let kept = bench.task.text("kept");
        let dir = format!("train.cache_dir={kept}");
        for more in [
            &["--set", "train.cache=memory"][..],
            &["--set", "train.cache=file", "--set", "train.cache_memory=0"],
            &["--set", &dir],
            // What the run before has left, for each cut.
            &["--set", &dir],
            &["--threads", "1"],
        ] {
            let more: Vec<&str> = ["--epochs", epochs].iter().chain(more).copied().collect();
            let found = weights("run", &more);
            assert!(found.0 == plain.0, "{more:?}");
            assert_eq!(found.1, plain.1, "{more:?}");
        }
        // A file for the head and one for each layer that training began at.
        let files = std::fs::read_dir(&kept).unwrap().count();
        assert_eq!(
            files, 2,
            "the head, and the second layer; nothing is kept below the first"
        );
    }
}

#[test]
fn until_something_thaws_a_run_is_that_of_the_head() {
    let bench = Bench::new();
    let losses = |strategy: &str, epochs: &str| -> Vec<f64> {
        let schedule = [
            "--set",
            "optimizer.schedule=constant",
            "--set",
            "optimizer.warmup=0",
        ];
        let more = ["--strategy", strategy, "--epochs", epochs, "--lr", "1e-3"];
        let more: Vec<&str> = more.iter().chain(&schedule).copied().collect();
        TRAINER.succeeds(bench.train("tiny-bert", "run", &more));
        let steps = records(&bench.path("run"), "step");
        steps.iter().map(|s| s["loss"].as_f64().unwrap()).collect()
    };
    let (gradual, head) = (losses("gradual", "3"), losses("head", "3"));
    let first = head.len() / 3;
    assert_eq!(gradual[..first], head[..first]);
    assert!(gradual[first + 1..] != head[first + 1..]);
}
