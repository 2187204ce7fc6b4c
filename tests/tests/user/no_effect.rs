//! An option that could have no effect is refused, and never passed over.

use graft_tests::fixture;
use graft_tests::runs::{Task, language_model};

use crate::{TRAINER, misused};

#[test]
fn more_tokens_than_the_model_has_positions_are_refused() {
    let task = Task::new(24, 6);
    let model = fixture("tiny-bert");
    let all = graft_tests::json(&model.join("config.json"))["max_position_embeddings"].to_string();
    let too_many = (all.parse::<usize>().unwrap() + 1).to_string();
    let want = format!("it is {too_many}, but the model has {all} positions");
    for strategy in ["head", "prompt"] {
        let with = |length: &str| {
            let more = ["--strategy", strategy, "--max-length", length];
            task.train(&model, strategy, &more)
        };
        let said = TRAINER.refuses(with(&too_many));
        assert!(said.contains(&want), "{strategy}: {said}");
        // All of them may be asked for: virtual tokens take some without a word.
        let more = ["--set", "adapter.tokens=3"];
        let tokens = if strategy == "prompt" { &more[..] } else { &[] };
        let tokens = tokens.iter().map(|s| (*s).to_owned());
        TRAINER.succeeds(with(&all).into_iter().chain(tokens));
        let (run, data) = (task.text(strategy), task.text("eval.jsonl"));
        for command in ["eval", "predict"] {
            let arguments = [command, "--model", &run, "--data", &data];
            TRAINER.succeeds(arguments);
            let said = TRAINER.refuses([&arguments[..], &["--max-length", &too_many]].concat());
            assert!(said.contains(&want), "{command}: {said}");
        }
    }
}

#[test]
fn a_language_model_is_evaluated_without_labels_or_second_texts() {
    let task = Task::new(6, 2);
    language_model(&task.path("gpt"), "tiny-gpt2");
    let (model, data) = (task.text("gpt"), task.text("eval.jsonl"));
    for flag in ["--label-column", "--text-pair-column"] {
        let said = TRAINER.refuses(["eval", "--model", &model, "--data", &data, flag, "label"]);
        assert!(
            said.contains(&format!("{flag}: it has no effect: the task is clm")),
            "{said}"
        );
    }
}

#[test]
fn generation_takes_no_option_that_it_has_no_use_for() {
    let task = Task::new(6, 2);
    language_model(&task.path("gpt"), "tiny-gpt2");
    let model = task.text("gpt");
    let base = ["generate", "--model", &model, "--prompt", "the"];
    let with = |more: &[&'static str]| [&base[..], more].concat();
    for (flag, value) in [("--out", "texts.jsonl"), ("--text-column", "prompt")] {
        let said = misused(&with(&[flag, value])).err;
        assert!(
            said.contains(flag) && said.contains("cannot be used with"),
            "{said}"
        );
    }
    let said = TRAINER.refuses(with(&["--seed", "3"]));
    assert!(
        said.contains("--seed: it has no effect at temperature 0"),
        "{said}"
    );
    TRAINER.succeeds(with(&[
        "--seed",
        "3",
        "--temperature",
        "1",
        "--max-new-tokens",
        "2",
    ]));
}
