//! From a configuration and text to a model, and to another domain: the way of `scripts/pretrain-demo`, in small.

use std::fmt::Write as _;
use std::path::Path;

use graft_tests::runs::snapshot;
use serde_json::Value;

use crate::TRAINER;

/// Sentences of these words, by Knuth's MMIX congruence.
fn sentences(words: [[&str; 4]; 4], count: usize, mut state: u64) -> String {
    let mut text = String::new();
    for _ in 0..count {
        let mut word = |place: usize| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            words[place][(state >> 33) as usize % 4]
        };
        let [a, b, c, d] = [0, 1, 2, 3].map(&mut word);
        writeln!(text, "The {a} {b} the {c} {d}.").unwrap();
    }
    text
}

const RIVER: [[&str; 4]; 4] = [
    ["river", "mill", "rain", "bridge"],
    ["turns", "feeds", "meets", "covers"],
    ["field", "stone", "sea", "hill"],
    ["at dusk", "in spring", "again", "slowly"],
];
const CONTRACT: [[&str; 4]; 4] = [
    ["lessee", "licensor", "party", "vendor"],
    ["shall pay", "shall notify", "indemnifies", "releases"],
    ["lessor", "licensee", "purchaser", "agent"],
    ["forthwith", "in writing", "hereunder", "on demand"],
];

fn perplexity(model: &str, data: &str) -> f64 {
    let said = TRAINER.succeeds(["eval", "--json", "--model", model, "--data", data]);
    let said: Value = serde_json::from_str(&said.out).unwrap();
    said["perplexity"].as_f64().unwrap()
}

#[test]
fn a_small_model_is_made_of_text_and_taken_to_another_domain() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for (name, words, count, seed) in [
        ("river.txt", RIVER, 600, 1),
        ("river-other.txt", RIVER, 60, 2),
        ("contract.txt", CONTRACT, 200, 3),
        ("contract-other.txt", CONTRACT, 60, 4),
    ] {
        std::fs::write(path(name), sentences(words, count, seed)).unwrap();
    }
    // The demonstration's own configuration, made smaller.
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/gpt-small/config.json");
    let mut config = graft_tests::json(&config);
    for (key, value) in [
        ("vocab_size", 320),
        ("n_positions", 64),
        ("n_embd", 32),
        ("n_layer", 2),
    ] {
        config[key] = value.into();
    }
    std::fs::create_dir(path("model")).unwrap();
    std::fs::write(path("model/config.json"), config.to_string()).unwrap();
    let (model, text) = (path("model"), path("river.txt"));
    let pretrain = [
        "pretrain", "--model", &model, "--train", &text, "--epochs", "3", "--lr", "5e-3", "--out",
    ];
    let small = path("small");
    let said = TRAINER.refuses(pretrain.iter().copied().chain([small.as_str()]));
    assert!(said.contains("tokenizer.json"), "{said}");

    let both = path("contract.txt");
    let make = [
        "tokenizer",
        "--data",
        &text,
        "--data",
        &both,
        "--out",
        &model,
    ];
    let said = TRAINER.succeeds(make).out;
    assert!(said.contains("tokenizer.json: 320 tokens"), "{said}");
    assert!(TRAINER.refuses(make).contains("is there already"));
    TRAINER.succeeds(pretrain.iter().copied().chain([small.as_str()]));
    TRAINER.succeeds(["verify", &small]);
    // The same settings under their other name are the same run.
    let again = path("again");
    let same = ["train", "--task", "clm", "--init", "random"];
    let rest = pretrain[1..].iter().copied().chain([again.as_str()]);
    TRAINER.succeeds(same.into_iter().chain(rest));
    let weights = |run: &str| snapshot(Path::new(run))["model.safetensors"].clone();
    assert!(weights(&small) == weights(&again));
    let more = [
        "pretrain",
        "--init",
        "pretrained",
        "--model",
        &small,
        "--train",
        &text,
        "--out",
        &again,
    ];
    assert!(TRAINER.refuses(more).contains("begins with random weights"));

    let measure = |run: &str| {
        ["river-other.txt", "contract-other.txt"].map(|data| perplexity(&path(run), &path(data)))
    };
    for (out, strategy) in [("full", "full"), ("last1", "last:1")] {
        let out = path(out);
        TRAINER.succeeds([
            "train",
            "--task",
            "clm",
            "--model",
            &small,
            "--train",
            &both,
            "--strategy",
            strategy,
            "--epochs",
            "4",
            "--lr",
            "3e-3",
            "--out",
            &out,
        ]);
        TRAINER.succeeds(["verify", &out]);
    }
    let [small, full, last] = ["small", "full", "last1"].map(measure);
    // Learnt: what was trained on is far likelier than to a model that knows nothing, which 320 tokens would be.
    assert!(small[0] < 8.0 && small[1] > 3.0 * small[0], "{small:?}");
    // Adapted, and forgotten; less of both where most layers are frozen.
    assert!(
        full[1] < 0.3 * small[1] && full[0] > 1.5 * small[0],
        "{small:?} {full:?}"
    );
    assert!(
        last[1] < small[1] && last[0] < full[0],
        "{small:?} {full:?} {last:?}"
    );
    // Each goes on in its own way, and the same way every time.
    let said = |run: &str| {
        let run = path(run);
        let prompt = [
            "generate",
            "--model",
            &run,
            "--prompt",
            "The lessee",
            "--max-new-tokens",
            "12",
        ];
        TRAINER.succeeds(prompt).out
    };
    assert_eq!(said("full"), said("full"));
    assert!(said("full") != said("small") && said("full").trim().len() > 2);
}
