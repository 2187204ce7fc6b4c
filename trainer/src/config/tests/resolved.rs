//! What a configuration comes to.

use graft_models::Strategy as Part;

use super::*;

const EVERYTHING: &str = r#"
[model]
path = "/m"
init = "pretrained"
base = "f32"
[data]
train = "a.csv"
eval = "b.csv"
text = "premise"
text_pair = "hypothesis"
label = "gold"
max_length = 128
[task]
kind = "classify"
[strategy]
name = "last:2"
rules = ["freeze *", "train encoder.layer.5.*"]
dropout = 0.0
[optimizer]
kind = "sgd"
lr = 0.03
weight_decay = 0
momentum = 0.5
no_decay = false
clip_norm = 0.0
schedule = "cosine"
warmup = 100
[train]
epochs = 7
max_tokens = 4096
accumulate = 2
group_by_length = true
precision = "bf16"
audit = false
seed = 9223372036854775807
threads = 2
cache = "memory"
cache_memory = 0
memory_limit = 4096
cache_dir = "kept"
[output]
dir = "o"
"#;

const LORA: &str = r#"
[strategy]
name = "rslora+norms"
[adapter]
rank = 4
alpha = 2.5
dropout = 0.1
targets = ["query", "output.dense"]
layers = [0, 5]
rank_pattern = ["layer.0.* 2", "query 8"]
alpha_pattern = ["query 7.5"]
init = "orthogonal"
plus = 16.0
bias = "adapted"
modules_to_save = ["pooler"]
"#;
const IA3: &str = r#"
[strategy]
name = "ia3"
[adapter]
targets = "all-linear"
feedforward = ["output.dense"]
"#;
const BOTTLENECK: &str = r#"
[strategy]
name = "adapter+norms"
[adapter]
size = 12
layers = [1]
"#;
const PROMPT: &str = r#"
[strategy]
name = "prompt"
[adapter]
tokens = 9
text = "Which class is it?"
"#;
const PREFIX: &str = r#"
[strategy]
name = "prefix+norms"
[adapter]
projection = 24
"#;

#[test]
fn defaults_are_filled_in() {
    let config = minimal_with("").unwrap();
    assert_eq!(config.model.path, "/exp/models/bert");
    assert_eq!(config.data.train, Path::new("/exp/train.jsonl"));
    assert_eq!(config.data.eval, None);
    assert_eq!(
        (config.data.text.as_str(), config.data.label.as_deref()),
        ("text", Some("label"))
    );
    assert_eq!(config.strategy.name, Strategy::full());
    assert_eq!(config.optimizer.lr, 5e-5);
    assert_eq!(
        config.optimizer.kind,
        OptimizerKind::AdamW {
            betas: [0.9, 0.999],
            eps: 1e-8
        }
    );
    assert_eq!(config.optimizer.warmup, Warmup::Ratio(0.1));
    assert_eq!(config.train.batch, BatchSize::Examples(16));
    assert_eq!((config.train.epochs, config.train.seed), (3, 0));
    assert_eq!(config.train.cache, CacheKind::File);
    assert_eq!(
        (config.train.cache_memory, config.train.cache_dir),
        (Some(256), None)
    );
}

#[test]
fn default_learning_rate_follows_strategy_and_optimizer() {
    for (strategy, kind, lr) in [
        ("head", "adamw", 1e-3),
        ("last:2", "adamw", 1e-4),
        ("full", "adamw", 5e-5),
        ("norms+bitfit", "adamw", 2e-3),
        ("last:2+bitfit+gradual", "adamw", 1e-4),
        ("llrd", "adamw", 5e-5),
        ("lora", "adamw", 2e-3),
        ("rslora", "adamw", 2e-3),
        ("adapter", "adamw", 2e-3),
        ("prompt", "adamw", 3e-2),
        ("prefix", "sgd", 3.0),
        ("dora+norms", "adamw", 2e-3),
        ("ia3", "adamw", 3e-2),
        ("rslora", "sgd", 2e-1),
        ("ia3", "sgd", 3.0),
        ("head", "sgd", 1e-1),
        ("last:2", "sgd", 1e-2),
        ("full", "sgd", 5e-3),
        ("bitfit", "sgd", 2e-1),
    ] {
        let text = format!("[strategy]\nname = \"{strategy}\"\n[optimizer]\nkind = \"{kind}\"\n");
        assert_eq!(
            minimal_with(&text).unwrap().optimizer.lr,
            lr,
            "{strategy} {kind}"
        );
    }
}

#[test]
fn adapters_have_a_section_of_their_own() {
    let adapter = |text: &str| minimal_with(text).unwrap().adapter;
    assert_eq!(adapter(""), None);
    let usual = adapter("[strategy]\nname = \"lora\"\n").unwrap();
    assert_eq!(usual, AdapterSettings::usual(AdapterKind::Lora));
    assert_eq!((usual.rank, usual.alpha), (Some(8), Some(16.0)));
    let ranked = adapter("[strategy]\nname = \"dora\"\n[adapter]\nrank = 3\n").unwrap();
    assert_eq!((ranked.rank, ranked.alpha), (Some(3), Some(6.0)));
    let all = adapter(LORA).unwrap();
    let names = ["query", "output.dense"].map(str::to_owned).to_vec();
    assert_eq!(all.targets, Some(TargetSetting::Names(names)));
    assert_eq!(all.rank_pattern[0].name, "layer.0.*");
    assert_eq!((all.rank_pattern[1].value, all.plus), (8, Some(16.0)));
    assert_eq!(
        adapter(IA3).unwrap().targets,
        Some(TargetSetting::AllLinear)
    );
    let lora = "[strategy]\nname = \"lora\"\n[adapter]\n";
    for (text, wanted) in [
        (
            format!("{lora}rank = 0\n"),
            "`adapter.rank` is 0, expected a whole number, 1 or more",
        ),
        (
            format!("{lora}dropout = 1.0\n"),
            "expected a number in [0, 1)",
        ),
        (format!("{lora}plus = 0.0\n"), "expected a number above 0"),
        (
            format!("{lora}targets = []\n"),
            "expected \"all-linear\" or a list of names",
        ),
        (
            format!("{lora}rank_pattern = [\"query\"]\n"),
            "a list of an expression and a rank each",
        ),
        (
            format!("{lora}rank_pattern = [\"query x\"]\n"),
            "a list of an expression and a rank each",
        ),
        (
            format!("{lora}feedforward = [\"a\"]\n"),
            "`adapter.feedforward` has no effect: `strategy.name` has lora",
        ),
        (
            "[adapter]\nrank = 4\n".to_owned(),
            "`adapter.rank` has no effect: `strategy.name` has no adapter",
        ),
        (
            format!("{BOTTLENECK}rank = 2\n"),
            "`adapter.rank` has no effect: `strategy.name` has adapter",
        ),
        (
            format!("{PROMPT}layers = [1]\n"),
            "`adapter.layers` has no effect: `strategy.name` has prompt",
        ),
        (
            format!("{PREFIX}text = \"a\"\n"),
            "`adapter.text` has no effect: `strategy.name` has prefix",
        ),
        (
            format!("{lora}size = 8\n"),
            "`adapter.size` has no effect: `strategy.name` has lora",
        ),
        (
            format!("{IA3}plus = 2.0\n"),
            "`adapter.plus` has no effect: `strategy.name` has ia3",
        ),
    ] {
        let (message, _) = said(minimal_with(&text));
        assert!(message.contains(wanted), "{text}: {message}");
    }
}

#[test]
fn a_resolved_configuration_resolves_to_itself() {
    let adamw = "[optimizer]\nbetas = [0.8, 0.95]\neps = 1e-6\nwarmup = 0.0\nlr = 1e-7\n";
    let adapted = [LORA, IA3, BOTTLENECK, PROMPT, PREFIX].map(|text| minimal_with(text).unwrap());
    let others = [parse(EVERYTHING).unwrap(), minimal_with(adamw).unwrap()];
    for config in others.into_iter().chain(adapted) {
        let text = config.to_toml().unwrap();
        let settings = Settings::parse(&text, Path::new("/elsewhere/config.toml")).unwrap();
        assert_eq!(RunConfig::resolve(settings).unwrap(), config, "{text}");
    }
}

#[test]
fn every_key_is_read_and_written() {
    let config = parse(EVERYTHING).unwrap();
    let mut text = config.to_toml().unwrap();
    for more in [
        "[train]\nbatch_size = 3",
        LORA,
        IA3,
        BOTTLENECK,
        PROMPT,
        PREFIX,
    ] {
        text += &minimal_with(more).unwrap().to_toml().unwrap();
    }
    for key in KEYS {
        let line = format!("\n{} = ", key.last());
        assert!(
            text.contains(&line) || text.starts_with(&line[1..]),
            "{} in {text}",
            key.name
        );
    }
    assert_eq!(config.train.batch, BatchSize::Tokens(4096));
    assert_eq!(config.optimizer.kind, OptimizerKind::Sgd { momentum: 0.5 });
    assert_eq!(config.optimizer.warmup, Warmup::Steps(100));
    assert_eq!(
        config.strategy.rules[1].to_string(),
        "train encoder.layer.5.*"
    );
    assert_eq!(config.train.seed, i64::MAX as u64);
}

#[test]
fn flags_override_set_overrides_the_file() {
    let text = format!("{MINIMAL}[optimizer]\nlr = 1.0\n[train]\nepochs = 1\nbatch_size = 4\n");
    let mut settings = Settings::parse(&text, Path::new("/exp/run.toml")).unwrap();
    settings.flag("train.epochs", "--epochs", 9);
    settings.set("optimizer.lr=2").unwrap();
    settings.set("train.epochs=5").unwrap();
    settings.set("train.max_tokens=64").unwrap();
    settings.set("strategy.name=last:3").unwrap();
    settings.set("strategy.rules=[\"train *.bias\"]").unwrap();
    settings.set("data.label=1").unwrap();
    let config = RunConfig::resolve(settings).unwrap();
    assert_eq!((config.optimizer.lr, config.train.epochs), (2.0, 9));
    assert_eq!(config.train.batch, BatchSize::Tokens(64));
    assert_eq!(config.strategy.name, Strategy::of(Part::Last(3)));
    assert_eq!(config.strategy.rules.len(), 1);
    assert_eq!(config.data.label.as_deref(), Some("1"));
}

#[test]
fn flag_paths_are_relative_to_the_working_directory() {
    let mut settings = Settings::parse(MINIMAL, Path::new("/exp/run.toml")).unwrap();
    settings.flag("output.dir", "--out", "here");
    let config = RunConfig::resolve(settings).unwrap();
    assert_eq!(
        config.output.dir,
        std::env::current_dir().unwrap().join("here")
    );
}

#[test]
fn hub_ids_are_kept_unless_they_are_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let resolve = |spec: &str| {
        let text = MINIMAL.replace("./models/bert", spec);
        let settings = Settings::parse(&text, &dir.path().join("run.toml")).unwrap();
        RunConfig::resolve(settings).unwrap().model.path
    };
    let here = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    assert_eq!(resolve("org/name"), "org/name");
    assert_eq!(resolve("org/name@refs/pr/1"), "org/name@refs/pr/1");
    for path in ["bert", "a/b/c", "org/.name", "a b/c"] {
        assert_eq!(resolve(path), here(path));
    }
    std::fs::create_dir_all(dir.path().join("org/name")).unwrap();
    assert_eq!(resolve("org/name"), here("org/name"));
}

#[test]
fn where_frozen_outputs_are_kept() {
    // What says that none are kept is said over a file's own settings.
    let text = format!("{MINIMAL}[train]\ncache_memory = 3\ncache_dir = \"kept\"\n");
    let mut settings = Settings::parse(&text, Path::new("/exp/run.toml")).unwrap();
    settings.set("train.cache=off").unwrap();
    let over = RunConfig::resolve(settings).unwrap().train;
    assert_eq!((over.cache_memory, over.cache_dir), (None, None));
    let train = |text: &str| minimal_with(&format!("[train]\n{text}\n")).map(|c| c.train);
    assert_eq!(train("cache = \"off\"").unwrap().cache, CacheKind::Off);
    assert_eq!(train("cache_memory = 0").unwrap().cache_memory, Some(0));
    assert_eq!(train("cache = \"off\"").unwrap().cache_memory, None);
    let dir = train("cache_dir = \"kept\"").unwrap().cache_dir;
    assert_eq!(dir.as_deref(), Some(Path::new("/exp/kept")));
    for (text, expected) in [
        (
            "cache = \"disk\"",
            "expected \"off\", \"memory\" or \"file\"",
        ),
        ("cache_memory = -1", "expected a whole number, 0 or more"),
        ("cache_dir = \"\"", "expected a path"),
        (
            "cache = \"off\"\ncache_dir = \"kept\"",
            "`train.cache_dir` has no effect: `train.cache` is \"off\"",
        ),
        (
            "cache = \"off\"\ncache_memory = 3",
            "`train.cache_memory` has no effect: `train.cache` is \"off\"",
        ),
    ] {
        let (message, _) = said(train(text));
        assert!(message.contains(expected), "{message}");
    }
}
