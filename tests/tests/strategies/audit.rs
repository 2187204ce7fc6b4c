use graft_models::safetensors::{TensorView, pt_metadata, write};
use graft_tests::{DECODERS, ENCODERS, fixture};

use super::{Bench, TRAINER};

/// Strategies with the epochs, and the rules or settings that go with them.
const POLICIES: [(&str, &str, &[&str]); 24] = [
    ("head", "2", &[]),
    ("last:1", "2", &[]),
    ("last:2", "1", &[]),
    ("full", "2", &[]),
    ("bitfit", "2", &[]),
    ("norms", "2", &[]),
    ("norms+bitfit", "2", &[]),
    ("last:1+norms", "2", &[]),
    ("gradual", "4", &[]),
    ("last:2+gradual:1", "3", &[]),
    ("llrd", "2", &[]),
    ("last:2+llrd:0.5", "2", &[]),
    ("bitfit+gradual+llrd", "3", &[]),
    (
        "full",
        "2",
        &["freeze *.1.*", "lr *norm* x2", "decay * 0.05"],
    ),
    ("lora", "2", &[]),
    ("lora+head+norms", "2", &["adapter.dropout=0.1"]),
    ("lora", "2", &["adapter.init=pissa", "adapter.rank=4"]),
    (
        "rslora",
        "2",
        &["adapter.targets=all-linear", "adapter.plus=4"],
    ),
    ("dora", "2", &["adapter.init=orthogonal"]),
    ("ia3+llrd:0.8", "2", &[]),
    ("adapter+gradual", "4", &["adapter.size=4"]),
    ("prompt", "3", &["adapter.tokens=4"]),
    ("prefix", "3", &["adapter.tokens=4"]),
    ("prefix+last:1", "3", &["adapter.projection=6"]),
];

const OPTIMIZERS: [&[&str]; 6] = [
    &["optimizer.kind=adamw"],
    &["optimizer.kind=sgd"],
    &["optimizer.kind=adamw", "train.precision=bf16"],
    &[
        "optimizer.kind=sgd",
        "optimizer.momentum=0",
        "optimizer.warmup=0",
    ],
    &[
        "optimizer.weight_decay=0",
        "optimizer.warmup=4",
        "train.accumulate=2",
    ],
    &[
        "optimizer.clip_norm=0",
        "optimizer.schedule=constant",
        "strategy.dropout=0.3",
    ],
];

#[test]
fn good_configurations_raise_nothing() {
    let bench = Bench::new();
    let mut count = 0;
    for (i, family) in ENCODERS.iter().chain(&DECODERS).enumerate() {
        for (j, (strategy, epochs, rules)) in POLICIES.iter().enumerate() {
            let has_biases = !matches!(
                *family,
                "tiny-llama" | "tiny-mistral" | "tiny-qwen3" | "tiny-gemma2" | "tiny-gemma3"
            );
            // All of them with the first families; a third with each of the others.
            let chosen = matches!(*family, "tiny-bert" | "tiny-gpt2") || (i + j) % 3 == 0;
            if !chosen || (strategy.contains("bitfit") && !has_biases) {
                continue;
            }
            let mut more = vec![
                "--strategy",
                strategy,
                "--epochs",
                epochs,
                "--batch-size",
                "4",
            ];
            for setting in OPTIMIZERS[(i + j) % OPTIMIZERS.len()] {
                more.extend(["--set", setting]);
            }
            let norms = match *family {
                "tiny-gpt2" => "lr *.ln_* x2",
                _ => "lr *?orm* x2",
            };
            for rule in *rules {
                match rule.split(['.', ' ']).next() {
                    Some("adapter") => more.extend(["--set", rule]),
                    Some("lr") => more.extend(["--rule", norms]),
                    _ => more.extend(["--rule", rule]),
                }
            }
            let said = TRAINER.run(bench.train(family, "run", &more));
            let what = format!("{family} {more:?}\n{}", said.err);
            assert_eq!(said.code, Some(0), "{what}");
            assert!(!said.err.contains("nothing is known of"), "{what}");
            count += 1;
        }
    }
    assert!(count >= 50, "{count}");
}

/// Mistakes that a user can make, each of which trains without a word where the audit is off.
#[test]
fn seeded_mistakes_are_caught() {
    let bench = Bench::new();
    let quick = ["--epochs", "2", "--batch-size", "4"];
    let faults: [(&[&str], &[&str]); 9] = [
        (
            &["--lr", "1e-30", "--set", "optimizer.weight_decay=0"],
            &["did not move", "optimizer"],
        ),
        (
            &[
                "--rule",
                "lr classifier.weight x1e-20",
                "--set",
                "optimizer.weight_decay=0",
            ],
            &["`classifier.weight`", "did not move"],
        ),
        (
            &[
                "--set",
                "optimizer.kind=sgd",
                "--set",
                "optimizer.clip_norm=1e-30",
                "--set",
                "optimizer.weight_decay=0",
            ],
            &["did not move"],
        ),
        (
            &[
                "--strategy",
                "llrd:1e-12",
                "--set",
                "optimizer.weight_decay=0",
            ],
            &["bert.embeddings", "did not move"],
        ),
        (
            &["--batch-size", "64", "--epochs", "1"],
            &["learning rate is zero in every step", "warmup=0"],
        ),
        (&["--rule", "freeze *"], &["nothing to train"]),
        (
            &[
                "--strategy",
                "lora",
                "--set",
                "adapter.alpha_pattern=[\"query 0\"]",
            ],
            &["query.lora_A.default.weight`", "its gradient was zero"],
        ),
        (
            &["--strategy", "dora", "--rule", "freeze *.lora_B.*"],
            &["value.lora_A.default.weight`", "its gradient was zero"],
        ),
        (
            &[
                "--strategy",
                "ia3",
                "--rule",
                "lr *.ia3_l.* x1e-20",
                "--set",
                "optimizer.weight_decay=0",
            ],
            &["key.ia3_l.default`", "did not move"],
        ),
    ];
    for (more, wanted) in faults {
        let arguments: Vec<&str> = quick.iter().chain(more).copied().collect();
        let said = TRAINER.refuses(bench.train("tiny-bert", "run", &dedup(&arguments)));
        for wanted in wanted.iter().filter(|w| **w != "optimizer") {
            assert!(said.contains(wanted), "{more:?}: {said}");
        }
        assert!(!bench.path("run").exists(), "nothing is left of it");
        if !said.contains("nothing to train") {
            let off = ["--set", "train.audit=false"];
            let arguments: Vec<&str> = arguments.iter().chain(&off).copied().collect();
            TRAINER.succeeds(bench.train("tiny-bert", "off", &dedup(&arguments)));
        }
    }
}

/// Of a flag that stands twice, the last.
fn dedup<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    let mut kept: Vec<&str> = Vec::new();
    for pair in arguments.chunks(2) {
        if !matches!(pair[0], "--set" | "--rule")
            && let Some(at) = kept.iter().position(|flag| *flag == pair[0])
        {
            kept.drain(at..at + 2);
        }
        kept.extend(pair);
    }
    kept
}

#[test]
fn a_checkpoint_with_a_dead_layer_is_caught() {
    let bench = Bench::new();
    // The norm behind the last layer lets nothing through; it is frozen, so that nothing below can learn.
    let dir = bench.path("dead");
    std::fs::create_dir(&dir).unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(fixture("tiny-bert").join(name), dir.join(name)).unwrap();
    }
    let all = graft_tests::tensors(&fixture("tiny-bert").join("model.safetensors"));
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = all
        .iter()
        .map(|(name, tensor)| {
            let mut bytes = tensor.to_bytes().unwrap();
            if name.ends_with("layer.1.output.LayerNorm.weight") {
                bytes.fill(0);
            }
            (name.clone(), tensor.shape().to_vec(), bytes)
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| TensorView {
        name,
        dtype: graft_tensor::DType::F32,
        shape,
        data,
    });
    write(dir.join("model.safetensors"), &pt_metadata(), views).unwrap();
    let more = [
        "--rule",
        "freeze *.layer.1.*",
        "--epochs",
        "2",
        "--batch-size",
        "4",
    ];
    let arguments = bench.task.train(&dir, "run", &more);
    let said = TRAINER.refuses(arguments.iter().map(String::as_str));
    assert!(said.contains("its gradient was zero in all of"), "{said}");
    assert!(
        said.contains("`bert.embeddings.word_embeddings.weight`"),
        "{said}"
    );
    assert!(said.contains("train.audit=false"), "{said}");
    assert!(
        !said.contains("`classifier.weight` is trained"),
        "the head learns: {said}"
    );
}
