//! Configurations that are refused, and in which words.

use super::*;

#[test]
fn unknown_keys_name_the_nearest_and_the_line() {
    for (text, place, help) in [
        (
            "[optimizer]\nlr = 1.0\nwieght_decay = 0.1",
            "run.toml:3",
            "`optimizer.weight_decay`",
        ),
        ("[optimizr]\nlr = 1.0", "run.toml:2", "`optimizer.lr`"),
        ("[train]\nlr = 1.0", "run.toml:2", "`optimizer.lr`"),
        ("lr = 1.0", "run.toml:1", "`optimizer.lr`"),
        ("optimizer.lrr = 1.0", "run.toml:1", "`optimizer.lr`"),
        ("batch-size = 1", "run.toml:1", "`train.batch_size`"),
        ("[optimiser]", "run.toml:1", "section [optimizer]"),
        (
            "[optimizer]\nzzzzzzzz = 1",
            "run.toml:2",
            "the keys of [optimizer] are kind, lr",
        ),
        (
            "[zzzzzzzz]\nqqqqqqqq = 1",
            "run.toml:2",
            "the sections are model, data",
        ),
        ("model = \"x\"", "run.toml:1", "its keys are path"),
        ("[[train]]\nseed = 1", "run.toml:1", "its keys are epochs"),
        // Of several, the first in the file.
        (
            "[train]\nzz = 1\nepoch = 1\n[data]\ntrains = 1",
            "run.toml:2",
            "keys of [train]",
        ),
    ] {
        let (message, said_help) = said(parse(text));
        assert!(
            message.starts_with(&format!("/exp/{place}: ")),
            "{text}: {message}"
        );
        assert!(said_help.contains(help), "{text}: {said_help}");
    }
}

#[test]
fn wrong_values_are_shown_with_their_place() {
    for (more, found, expected) in [
        (
            "[optimizer]\nlr = -1.0",
            "`optimizer.lr` is -1.0",
            "above 0",
        ),
        ("[optimizer]\nlr = 0", "`optimizer.lr` is 0", "above 0"),
        ("[optimizer]\nlr = nan", "`optimizer.lr` is nan", "above 0"),
        ("[optimizer]\nlr = inf", "`optimizer.lr` is inf", "above 0"),
        (
            "[optimizer]\nlr = \"fast\"",
            "`optimizer.lr` is \"fast\"",
            "above 0",
        ),
        (
            "[optimizer]\nkind = \"adam\"",
            "is \"adam\"",
            "\"adamw\" or \"sgd\"",
        ),
        (
            "[optimizer]\nwarmup = 1.5",
            "is 1.5",
            "whole number of steps",
        ),
        ("[optimizer]\nwarmup = -3", "is -3", "whole number of steps"),
        (
            "[optimizer]\nbetas = [0.9]",
            "is [0.9]",
            "two numbers in [0, 1)",
        ),
        (
            "[optimizer]\nbetas = [0.9, 1.0]",
            "is [0.9, 1.0]",
            "two numbers in [0, 1)",
        ),
        ("[strategy]\ndropout = 1.0", "is 1.0", "[0, 1)"),
        ("[strategy]\nname = \"last:0\"", "is \"last:0\"", "last:K"),
        (
            "[strategy]\nrules = [\"thaw *\"]",
            "is [\"thaw *\"]",
            "freeze PATTERN",
        ),
        ("[train]\nepochs = 0", "`train.epochs` is 0", "1 or more"),
        (
            "[train]\nepochs = 1.5",
            "`train.epochs` is 1.5",
            "1 or more",
        ),
        ("[train]\nbatch_size = -1", "is -1", "1 or more"),
        ("[train]\nseed = -1", "is -1", "from 0"),
        ("[task]\nkind = \"regress\"", "is \"regress\"", "classify"),
    ] {
        let (message, _) = said(minimal_with(more));
        // MINIMAL has seven lines, the value stands on the second line of what follows.
        assert!(
            message.starts_with("/exp/run.toml:9: "),
            "{more}: {message}"
        );
        assert!(
            message.contains(found) && message.contains(expected),
            "{more}: {message}"
        );
    }
}

#[test]
fn invalid_toml_has_a_line() {
    let (message, _) = said(parse("[model]\npath = \"x\"\n[data\n"));
    assert!(
        message.starts_with("/exp/run.toml:3: invalid TOML"),
        "{message}"
    );
    let (message, _) = said(parse("[model]\npath = 'a'\npath = 'b'\n"));
    assert!(
        message.starts_with("/exp/run.toml:3: invalid TOML"),
        "{message}"
    );
}

#[test]
fn required_keys_are_asked_for() {
    for (key, flag) in [
        ("model.path", "--model"),
        ("data.train", "--train"),
        ("output.dir", "--out"),
    ] {
        let (section, last) = key.split_once('.').unwrap();
        let mut table: toml::Table = MINIMAL.parse().unwrap();
        table[section].as_table_mut().unwrap().remove(last);
        let (message, help) = said(parse(&table.to_string()));
        assert!(
            message.contains(&format!("`{key}` is missing")),
            "{message}"
        );
        assert!(help.contains(flag), "{help}");
    }
}

#[test]
fn set_is_checked_like_the_file() {
    let mut settings = Settings::parse(MINIMAL, Path::new("/exp/run.toml")).unwrap();
    assert!(said(settings.set("optimizer.lr")).0.contains("no `=`"));
    let (message, help) = said(settings.set("optimizer.learning_rate=3"));
    assert!(
        message.starts_with("--set optimizer.learning_rate=3: unknown key"),
        "{message}"
    );
    assert!(help.contains("`optimizer.lr`"), "{help}");
    settings.set("train.epochs=1\nseed = 2").unwrap();
    assert!(
        said(RunConfig::resolve(settings))
            .0
            .contains("`train.epochs` is")
    );
}

#[test]
fn what_excludes_each_other_is_refused_at_one_level_only() {
    let (message, _) = said(minimal_with("[train]\nbatch_size = 4\nmax_tokens = 64"));
    assert!(
        message.starts_with("/exp/run.toml:10: `train.max_tokens`"),
        "{message}"
    );
    assert!(message.contains("run.toml:9"), "{message}");

    let (message, help) = said(minimal_with("[optimizer]\nmomentum = 0.9"));
    assert!(
        message.starts_with("/exp/run.toml:9: `optimizer.momentum` has no effect"),
        "{message}"
    );
    assert!(help.contains("\"sgd\""), "{help}");
    // The file's betas are passed over when the flag chooses another optimizer.
    let text = format!("{MINIMAL}[optimizer]\nbetas = [0.9, 0.99]\n");
    let mut settings = Settings::parse(&text, Path::new("/exp/run.toml")).unwrap();
    settings.set("optimizer.kind=sgd").unwrap();
    let config = RunConfig::resolve(settings).unwrap();
    assert_eq!(config.optimizer.kind, OptimizerKind::Sgd { momentum: 0.9 });

    let (message, _) = said(minimal_with("[data.x]\n"));
    assert!(message.contains("data"), "{message}");
}

#[test]
fn columns_are_distinct() {
    let text = MINIMAL.replace("[output]", "label = \"text\"\n[output]");
    let (message, _) = said(parse(&text));
    assert!(
        message.starts_with("/exp/run.toml:6: `data.text` and `data.label`"),
        "{message}"
    );
}

#[test]
fn the_output_never_replaces_the_input() {
    for (out, key) in [
        ("models/bert", "model.path"),
        ("models", "model.path"),
        (".", "model.path"),
        ("train.jsonl", "data.train"),
    ] {
        let (message, _) = said(parse(&MINIMAL.replace("\"out\"", &format!("\"{out}\""))));
        assert!(
            message.contains(&format!("would replace `{key}`")),
            "{message}"
        );
    }
    assert!(parse(&MINIMAL.replace("\"out\"", "\"models/bert-tuned\"")).is_ok());
    // Nor what is kept for later runs.
    let (message, _) = said(minimal_with("[train]\ncache_dir = \"out/kept\"\n"));
    assert!(
        message.contains("would replace `train.cache_dir`"),
        "{message}"
    );

    // Seen through links and `..`, too.
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("m")).unwrap();
    std::fs::create_dir(dir.path().join("other")).unwrap();
    let text = MINIMAL
        .replace("models/bert", "m")
        .replace("\"out\"", "\"other/../m\"");
    let settings = Settings::parse(&text, &dir.path().join("run.toml")).unwrap();
    assert!(
        said(RunConfig::resolve(settings))
            .0
            .contains("would replace")
    );
}

#[test]
fn strategies_that_contradict_the_rest_say_what_to_do() {
    let (message, help) = said(minimal_with("[strategy]\nname = \"full+norms\"\n"));
    assert!(
        message.starts_with("/exp/run.toml:9: `strategy.name` is \"full+norms\", expected head"),
        "{message}"
    );
    assert!(help.contains("leave out what is beside it"), "{help}");
    let text = "[strategy]\nname = \"gradual\"\n[train]\nepochs = 1\n";
    let (message, help) = said(minimal_with(text));
    assert!(message.starts_with("/exp/run.toml:11: "), "{message}");
    assert!(help.contains("leave out gradual"), "{help}");
    let text = "[strategy]\nname = \"gradual:2+llrd\"\nrules = [\"lr *.bias x2\", \"decay * 0\"]\n";
    let config = minimal_with(text).unwrap();
    assert_eq!(config.strategy.name.to_string(), "full+gradual:2+llrd:0.9");
    assert_eq!(config.strategy.rules.len(), 2);
}
