use std::collections::BTreeMap;

use graft_tests::{fixture, tensors};

use super::{Bench, TRAINER};

/// One step of plain SGD: what each tensor moved by.
fn deltas(bench: &Bench, family: &str, more: &[&str]) -> BTreeMap<String, Vec<f64>> {
    let plain = [
        "--epochs",
        "1",
        "--batch-size",
        "64",
        "--lr",
        "0.5",
        "--dropout",
        "0",
        "--set",
        "optimizer.kind=sgd",
        "--set",
        "optimizer.momentum=0",
        "--set",
        "optimizer.clip_norm=0",
        "--set",
        "optimizer.weight_decay=0",
        "--set",
        "optimizer.warmup=0",
        "--set",
        "optimizer.schedule=constant",
    ];
    let more: Vec<&str> = plain.iter().chain(more).copied().collect();
    TRAINER.succeeds(bench.train(family, "run", &more));
    let model = match family {
        "tiny-bert" => fixture(family),
        _ => bench.path(family),
    };
    let before = tensors(&model.join("model.safetensors"));
    let after = bench.weights("run");
    let values = |t: &graft_tensor::Tensor| t.to_f64().unwrap();
    let pairs = before
        .iter()
        .filter_map(|(name, b)| Some((name, b, after.get(name)?)));
    pairs
        .filter(|(_, before, after)| before.shape() == after.shape())
        .map(|(name, before, after)| {
            let moved = values(after)
                .iter()
                .zip(values(before))
                .map(|(a, b)| a - b)
                .collect();
            (name.clone(), moved)
        })
        .collect()
}

#[test]
fn each_layer_moves_less_than_the_one_above() {
    let bench = Bench::new();
    for family in ["tiny-bert", "tiny-gpt2"] {
        let plain = deltas(&bench, family, &[]);
        let slowed = deltas(&bench, family, &["--strategy", "llrd:0.5"]);
        let mut seen = [0; 4];
        for (name, full) in &plain {
            let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
            let depth = match () {
                () if has(&[".layer.1.", ".h.1."]) => 1,
                () if has(&[".layer.0.", ".h.0."]) => 2,
                () if has(&["embeddings", ".wte", ".wpe"]) => 3,
                () => 0,
            };
            seen[depth] += 1;
            let factor = 0.5f64.powi(depth as i32);
            // What a weight moves by is known to its last digit.
            let digit = f64::from(f32::EPSILON);
            for (a, b) in full.iter().zip(&slowed[name]) {
                assert!(
                    (a * factor - b).abs() <= 4.0 * digit,
                    "{family} {name}: {a} {b}"
                );
            }
            let size = |x: &[f64]| x.iter().map(|x| x.abs()).fold(0.0, f64::max);
            assert!(
                name.contains("key.bias") || size(full) > 1e-5,
                "{family} {name} {}",
                size(full)
            );
        }
        assert!(seen.iter().all(|&count| count > 0), "{family} {seen:?}");
    }
}

#[test]
fn rules_set_rate_and_decay() {
    let bench = Bench::new();
    let plain = deltas(&bench, "tiny-bert", &[]);
    let rules = [
        "--rule",
        "lr *.layer.1.* x0.25",
        "--rule",
        "lr *.query.weight 1.0",
    ];
    let ruled = deltas(&bench, "tiny-bert", &rules);
    let sum = |x: &[f64]| x.iter().map(|x| x.abs()).sum::<f64>();
    for (name, factor) in [
        ("bert.encoder.layer.1.output.dense.weight", 0.25),
        ("bert.encoder.layer.1.attention.self.query.weight", 2.0),
        ("bert.encoder.layer.0.attention.self.query.weight", 2.0),
        ("bert.encoder.layer.0.output.dense.weight", 1.0),
    ] {
        let ratio = sum(&ruled[name]) / sum(&plain[name]);
        assert!((ratio / factor - 1.0).abs() < 1e-2, "{name}: {ratio}");
    }
    // At a tiny rate, decay is all that moves: the weight shrinks by lr * decay.
    let decay = ["--rule", "decay *.layer.0.output.dense.weight 0.1"];
    let moved = deltas(&bench, "tiny-bert", &decay);
    let name = "bert.encoder.layer.0.output.dense.weight";
    let weight = &tensors(&fixture("tiny-bert").join("model.safetensors"))[name];
    let weight = weight.to_f64().unwrap();
    for ((moved, plain), weight) in moved[name].iter().zip(&plain[name]).zip(weight) {
        let expected = plain - 0.5 * 0.1 * weight;
        assert!((moved - expected).abs() < 1e-6, "{moved} {expected}");
    }
    let other = "bert.encoder.layer.1.output.dense.weight";
    assert_eq!(moved[other], plain[other]);
    let refused = |rule: &str, more: &[&str]| {
        let more: Vec<&str> = ["--rule", rule].iter().chain(more).copied().collect();
        TRAINER.refuses(bench.train("tiny-bert", "run", &more))
    };
    let said = refused("lr bert.embeddings.* 1e-3", &["--strategy", "head"]);
    assert!(said.contains("about frozen parameters only"), "{said}");
    let said = refused("lr bert.embedings.* 1e-3", &[]);
    assert!(
        said.contains("the nearest name is bert.embeddings."),
        "{said}"
    );
    let said = refused("lr bert.* 0", &[]);
    assert!(said.contains("lr PATTERN 1e-4"), "{said}");
}

#[test]
fn inspect_shows_what_comes_of_them() {
    let model = fixture("tiny-bert");
    let said = TRAINER.succeeds([
        "inspect",
        model.to_str().unwrap(),
        "--strategy",
        "last:2+llrd:0.5",
        "--rule",
        "lr classifier.* 1e-3",
        "--rule",
        "decay *.query.weight 0.3",
    ]);
    let line = |name: &str| {
        let found = said.out.lines().find(|line| line.starts_with(name));
        found
            .unwrap_or_else(|| panic!("{name}: {}", said.out))
            .trim_end()
    };
    // The default rate of this strategy is 1e-4.
    assert!(line("classifier.weight").ends_with("  train  lr x10"));
    assert!(line("bert.pooler.dense.bias").ends_with("  train"));
    assert!(line("bert.encoder.layer.1.output.dense.bias").ends_with("  train  lr x0.5"));
    let query = line("bert.encoder.layer.0.attention.self.query.weight");
    assert!(query.ends_with("  train  lr x0.25  decay 0.3"), "{query}");
    assert!(line("bert.embeddings.LayerNorm.bias").ends_with("  freeze"));
    assert!(said.out.contains("last:2+llrd:0.5 trains"), "{}", said.out);
}
