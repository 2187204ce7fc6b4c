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

#[test]
fn a_dropout_that_nothing_trained_lies_below_is_refused() {
    let task = Task::new(24, 6);
    language_model(&task.path("gpt"), "tiny-gpt2");
    let train = |strategy: &str, dropout: &str| {
        let more = ["--strategy", strategy, "--dropout", dropout];
        task.train(&task.path("gpt"), "run", &more)
    };
    let said = TRAINER.refuses(train("head", "0.5"));
    assert!(
        said.contains("strategy.dropout: 0.5 has no effect"),
        "{said}"
    );
    let mut plan = train("head", "0.5");
    plan[0] = "plan".to_owned();
    assert!(TRAINER.refuses(plan).contains("has no effect"));
    // None at all is what there is then; and a layer has some.
    TRAINER.succeeds(train("head", "0"));
    TRAINER.succeeds(train("last:1", "0.5"));
    // An encoder's head has one of its own.
    let more = ["--strategy", "head", "--dropout", "0.5"];
    TRAINER.succeeds(task.train(&fixture("tiny-bert"), "bert", &more));
}

#[test]
fn parts_of_an_adapter_that_the_model_has_nothing_for_are_refused() {
    let task = Task::new(24, 6);
    let train = |strategy: &str, settings: &[&str]| {
        let mut more = vec!["--strategy", strategy];
        settings.iter().for_each(|s| more.extend(["--set", *s]));
        task.train(&fixture("tiny-bert"), "run", &more)
    };
    for (strategy, setting, want) in [
        (
            "lora",
            "adapter.layers=[0,9]",
            "no target of the adapter is in layer 9; name some of 0 to 1",
        ),
        (
            "adapter",
            "adapter.layers=[2]",
            "no target of the adapter is in layer 2; name some of 0 to 1",
        ),
        (
            "lora",
            "adapter.rank_pattern=[\"querry 4\"]",
            "rank_pattern: \"querry\" decides about no target of the adapter; the nearest is",
        ),
        (
            "dora",
            "adapter.alpha_pattern=[\"key 4\"]",
            "alpha_pattern: \"key\" decides about no target",
        ),
        // The first match decides, so the second has nothing left.
        (
            "lora",
            "adapter.rank_pattern=[\"query 4\",\"layer.0.*query 2\"]",
            "rank_pattern: \"layer.0.*query\" decides about no target",
        ),
        (
            "ia3",
            "adapter.feedforward=[\"dence\"]",
            "no target of the adapter ends in dence, whose inputs are to be scaled",
        ),
        (
            "lora",
            "adapter.alpha=0",
            "`adapter.alpha` is 0, expected a number other than 0",
        ),
        (
            "lora",
            "adapter.rank=9000000",
            "a rank of 9000000; it must be 1 to 1048576",
        ),
    ] {
        let said = TRAINER.refuses(train(strategy, &[setting]));
        assert!(said.contains(want), "{setting}: {said}");
    }
    let patterns = "adapter.rank_pattern=[\"layer.0.*query 2\",\"query 4\"]";
    TRAINER.succeeds(train("lora", &["adapter.layers=[1,0]", patterns]));
}

#[test]
fn a_choice_among_no_adapters_is_refused() {
    let task = Task::new(6, 2);
    let (model, data) = (fixture("tiny-bert"), task.text("eval.jsonl"));
    let model = model.to_str().unwrap();
    let said = TRAINER.refuses(["eval", "--model", model, "--data", &data, "--use", "a"]);
    assert!(
        said.contains("--use: there is no adapter to choose `a` from"),
        "{said}"
    );
}

#[test]
fn a_warmup_that_outlasts_the_run_is_pointed_out() {
    let task = Task::new(24, 6);
    let train = |warmup: &str| {
        let more = ["--strategy", "head", "--epochs", "1", "--set", warmup];
        TRAINER
            .succeeds(task.train(&fixture("tiny-bert"), "run", &more))
            .err
    };
    let long = "optimizer.warmup is 9 steps, and the run has 2";
    assert!(train("optimizer.warmup=9").contains(long));
    assert!(!train("optimizer.warmup=1").contains("optimizer.warmup"));
}

#[test]
fn an_adapter_is_listed_without_a_head_of_other_labels() {
    let task = Task::new(24, 6);
    let base = fixture("tiny-bert");
    TRAINER.succeeds(task.train(&base, "run", &["--strategy", "lora"]));
    let said = TRAINER.refuses(["inspect", &task.text("run"), "--labels", "1"]);
    assert!(said.contains("--labels: a model has a head"), "{said}");
    let shown = TRAINER.succeeds(["inspect", base.to_str().unwrap(), "--labels", "1"]);
    assert!(shown.out.contains("hidden 32, 1 label,"), "{}", shown.out);
}

#[test]
fn a_column_of_a_file_without_columns_is_refused() {
    let task = Task::new(6, 2);
    language_model(&task.path("gpt"), "tiny-gpt2");
    let (model, run, out) = (task.text("gpt"), task.text("run"), task.text("tokens"));
    let text = task.lines("plain.txt", |i| format!("the {i} of them"));
    let column = ["--text-column", "body"];
    let commands: [&[&str]; 4] = [
        &["eval", "--model", &model, "--data", &text],
        &["data", "show", &text, "--model", &model, "--task", "clm"],
        &[
            "tokenizer",
            "--data",
            &text,
            "--vocab-size",
            "300",
            "--out",
            &out,
        ],
        &[
            "train", "--task", "clm", "--model", &model, "--train", &text, "--out", &run,
        ],
    ];
    for command in commands {
        let said = TRAINER.refuses([command, &column].concat());
        assert!(said.contains("--text-column: "), "{command:?}: {said}");
        assert!(said.contains("a .txt file has no columns"), "{said}");
    }
    // One file with columns is enough, and so is the name that is meant where none is given.
    let (rows, usual) = (task.text("train.jsonl"), task.text("usual"));
    let both = [
        "tokenizer",
        "--data",
        &text,
        "--data",
        &rows,
        "--vocab-size",
        "300",
        "--out",
        &out,
    ];
    assert!(
        TRAINER
            .refuses([&both[..], &column].concat())
            .contains("the column `body` is missing")
    );
    let quick = ["--epochs", "1", "--text-column", "text"];
    let train = [
        "train", "--task", "clm", "--model", &model, "--train", &text, "--out", &usual,
    ];
    TRAINER.succeeds([&train[..], &quick].concat());
    let merge = [
        "merge",
        "--model",
        &usual,
        "--out",
        &out,
        "--text-column",
        "body",
    ];
    assert!(misused(&merge).err.contains("--data <FILE>"));
}

#[test]
fn a_tokenizer_is_not_made_of_nothing() {
    let task = Task::new(6, 2);
    let empty = task.text("empty.txt");
    std::fs::write(&empty, "\n \n").unwrap();
    let out = task.text("tokens");
    let said = TRAINER.refuses([
        "tokenizer",
        "--data",
        &empty,
        "--vocab-size",
        "300",
        "--out",
        &out,
    ]);
    assert!(said.contains("--data: no file holds any text"), "{said}");
}
