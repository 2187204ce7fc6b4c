//! What a user can get wrong: exit code 1, a message that says where, no panic, and an earlier run left as it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use graft_models::safetensors::{TensorView, pt_metadata, write};
use graft_tensor::Tensor;
use graft_tests::runs::{Task, Trainer, records, snapshot};
use graft_tests::{fixture, tensors};

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));
const QUICK: [&str; 4] = ["--strategy", "head", "--epochs", "1"];

/// A task with an earlier run in `run`, which no mistake may touch.
struct Bench {
    task: Task,
    earlier: BTreeMap<String, Vec<u8>>,
}

impl Bench {
    fn new() -> Bench {
        let task = Task::new(24, 12);
        TRAINER.succeeds(task.train(&fixture("tiny-bert"), "run", &QUICK));
        let earlier = snapshot(&task.path("run"));
        Bench { task, earlier }
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.task.path(name), content).unwrap();
        self.task.text(name)
    }

    /// Expects a training of `model` to be refused, with all of `wanted` in the message.
    fn refuses(&self, model: &Path, more: &[&str], wanted: &[&str]) -> String {
        let said = TRAINER.refuses(self.task.train(model, "run", more));
        for part in wanted {
            assert!(said.contains(part), "`{part}` is not in: {said}");
        }
        self.is_untouched();
        said
    }

    fn is_untouched(&self) {
        assert!(
            snapshot(&self.task.path("run")) == self.earlier,
            "the earlier run changed"
        );
        let left: Vec<String> = std::fs::read_dir(self.task.path("."))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.contains("graft"))
            .collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

#[test]
fn data() {
    let bench = Bench::new();
    let good = std::fs::read_to_string(bench.task.path("train.jsonl")).unwrap();
    let line = |n: usize, bad: &str| {
        let mut lines: Vec<&str> = good.lines().collect();
        lines[n - 1] = bad;
        lines.join("\n")
    };
    let label = r#"{"text": "nine", "label": "strange"}"#;
    let cases: [(&str, &str, String, &[&str]); 13] = [
        (
            "--train",
            "cut.jsonl",
            line(7, r#"{"text": "nine", "label": "odd""#),
            &["cut.jsonl:7:"],
        ),
        (
            "--train",
            "list.jsonl",
            line(3, r#"["nine", "odd"]"#),
            &["list.jsonl:3:"],
        ),
        (
            "--train",
            "number.jsonl",
            line(2, r#"{"text": 9, "label": "odd"}"#),
            &["number.jsonl:2:", "`text`"],
        ),
        (
            "--train",
            "null.jsonl",
            line(2, r#"{"text": "a", "label": null}"#),
            &["null.jsonl:2:", "label"],
        ),
        (
            "--train",
            "nolabel.jsonl",
            line(5, r#"{"text": "nine", "lable": "odd"}"#),
            &["nolabel.jsonl:5:", "`label`", "did you mean `lable`?"],
        ),
        (
            "--train",
            "quote.csv",
            "text,label\na,odd\n\"b,calm\nc,calm\n".into(),
            &["quote.csv:3:", "quote"],
        ),
        (
            "--train",
            "fields.csv",
            "text,label\na,odd\nb,c,calm\n".into(),
            &["fields.csv:3:", "3 fields, expected 2"],
        ),
        (
            "--train",
            "column.csv",
            "text,kind\na,odd\n".into(),
            &["column.csv:1:", "`label`", "`kind`"],
        ),
        (
            "--train",
            "empty.jsonl",
            String::new(),
            &["empty.jsonl: the file is empty"],
        ),
        (
            "--train",
            "header.csv",
            "text,label\n".into(),
            &["header.csv: the file holds no example"],
        ),
        (
            "--train",
            "one.csv",
            "text,label\na,odd\nb,odd\n".into(),
            &["one.csv", "`odd`", "two labels"],
        ),
        (
            "--eval",
            "label.jsonl",
            line(4, label),
            &["label.jsonl:4:", "`strange`", "`calm`"],
        ),
        (
            "--eval",
            "empty.csv",
            " \n".into(),
            &["empty.csv: the file is empty"],
        ),
    ];
    for (flag, name, content, wanted) in cases {
        let path = bench.write(name, content);
        // The last of a flag's values does not count: clap refuses to be given two.
        let mut arguments = bench.task.train(&fixture("tiny-bert"), "run", &QUICK);
        let place = arguments.iter().position(|a| a == flag).unwrap();
        arguments[place + 1] = path;
        let said = TRAINER.refuses(arguments);
        for part in wanted {
            assert!(said.contains(part), "`{part}` is not in: {said}");
        }
        bench.is_untouched();
    }
    bench.refuses(
        &fixture("tiny-bert"),
        &["--label-column", "gold"],
        &["train.jsonl:1:", "`gold`", "data.label"],
    );
}

#[test]
fn settings() {
    let bench = Bench::new();
    let model = fixture("tiny-bert");
    let cases: [(&[&str], &[&str]); 9] = [
        (
            &["--set", "optimizer.learnrate=1"],
            &["unknown key `optimizer.learnrate`"],
        ),
        (
            &["--set", "train.epoch=1"],
            &["unknown key `train.epoch`", "did you mean `train.epochs`?"],
        ),
        (
            &["--strategy", "tail"],
            &["--strategy", "\"tail\"", "last:K"],
        ),
        (
            &["--strategy", "last:99"],
            &["last:99", "the model has 2", "last:2"],
        ),
        (
            &[
                "--set",
                r#"strategy.rules=["train bert.encoder.layer.7.*"]"#,
            ],
            &["train bert.encoder.layer.7.*"],
        ),
        (
            &["--set", r#"strategy.rules=["thaw *"]"#],
            &["thaw *", "freeze"],
        ),
        (&["--set", r#"strategy.rules=["freeze *"]"#], &["train"]),
        (&["--max-length", "2"], &["length of 2", "at least 3"]),
        (&["--threads", "0"], &["--threads", "`train.threads` is 0"]),
    ];
    for (more, wanted) in cases {
        bench.refuses(&model, more, wanted);
    }
    let config = bench.write("run.toml", "[train]\nepochs = 1\nsede = 3\n");
    let mut arguments = bench.task.train(&model, "run", &[]);
    arguments.insert(1, config);
    let said = TRAINER.refuses(arguments);
    assert!(
        said.contains("run.toml:3: unknown key `train.sede`"),
        "{said}"
    );
    assert!(said.contains("did you mean `train.seed`?"), "{said}");
    bench.is_untouched();
}

/// A copy of a fixture's model in the bench.
fn copy_model(bench: &Bench, name: &str) -> PathBuf {
    let to = bench.task.path(name);
    std::fs::create_dir(&to).unwrap();
    for file in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(fixture("tiny-bert").join(file), to.join(file)).unwrap();
    }
    to
}

/// Header and data of a safetensors file.
fn halves(bytes: &[u8]) -> (String, &[u8]) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(length);
    (String::from_utf8(header.to_vec()).unwrap(), data)
}

#[test]
fn damaged_weights() {
    let bench = Bench::new();
    let model = copy_model(&bench, "model");
    let file = model.join("model.safetensors");
    let good = std::fs::read(&file).unwrap();
    let (header, data) = halves(&good);
    let parsed: serde_json::Value = serde_json::from_str(&header).unwrap();
    const TENSOR: &str = "classifier.bias";
    const OTHER: &str = "bert.pooler.dense.bias";
    let with = |key: &str, value: serde_json::Value| {
        let mut header = parsed.clone();
        header[TENSOR][key] = value;
        header.to_string()
    };
    let joined = |header: &str| {
        [
            &(header.len() as u64).to_le_bytes(),
            header.as_bytes(),
            data,
        ]
        .concat()
    };
    let oversized = [&(1u64 << 40).to_le_bytes(), &good[8..]].concat();
    let twice = format!(
        "{{\"{TENSOR}\":{},{}",
        parsed[TENSOR],
        &header.trim_start()[1..]
    );
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (good[..good.len() - 100].to_vec(), &["tensor `"]),
        (good[..50].to_vec(), &["cut off"]),
        (vec![], &["0 bytes"]),
        (oversized, &["the header claims 1099511627776 bytes"]),
        (
            joined(&with("data_offsets", parsed[OTHER]["data_offsets"].clone())),
            &["tensor `"],
        ),
        (joined(&twice), &["`classifier.bias` occurs twice"]),
        (
            joined(&with("shape", vec![4].into())),
            &["`classifier.bias`", "takes 16 bytes"],
        ),
        (
            joined(&with("shape", vec![1; 5000].into())),
            &["`classifier.bias`", "dimensions"],
        ),
        (
            joined(&with("shape", vec![u32::MAX; 3].into())),
            &["`classifier.bias`", "overflows"],
        ),
        (
            joined(&with("dtype", "F33".into())),
            &["`classifier.bias`", "F33"],
        ),
        ([&good[..], b"more"].concat(), &["4 bytes"]),
        (
            b"\x80\x02}q\x00X\x04\x00\x00\x00evilq\x01.".to_vec(),
            &["pickle"],
        ),
    ];
    for (bytes, wanted) in cases {
        std::fs::write(&file, bytes).unwrap();
        let said = bench.refuses(&model, &QUICK, wanted);
        assert!(said.contains(file.to_str().unwrap()), "{said}");
        // Looking at it goes the same way.
        let looked = TRAINER.refuses([Path::new("inspect"), &model]);
        assert!(looked.contains(wanted[0]), "{looked}");
    }
    // Every number is there, and none of the last ones is a number.
    let mut wild = good.clone();
    let end = wild.len();
    wild[end - data.len() / 2..].fill(0xff);
    std::fs::write(&file, wild).unwrap();
    let texts = bench.task.text("eval.jsonl");
    let model_text = model.to_str().unwrap();
    let said = TRAINER.refuses(["predict", "--data", &texts, "--model", model_text]);
    assert!(said.contains("its logits are not numbers"), "{said}");
    bench.refuses(&model, &QUICK, &["step 1", "check the model's weights"]);
    std::fs::remove_file(&file).unwrap();
    std::fs::write(model.join("pytorch_model.bin"), b"\x80\x02}q\x00.").unwrap();
    bench.refuses(
        &model,
        &QUICK,
        &[
            "pytorch_model.bin",
            "not a file of torch.save",
            "safe_serialization",
        ],
    );
}

#[test]
fn weights_of_another_model() {
    let bench = Bench::new();
    let model = copy_model(&bench, "model");
    let file = model.join("model.safetensors");
    let all = tensors(&fixture("tiny-bert").join("model.safetensors"));
    let memory = graft_tensor::Memory::cpu();
    let zeros = |shape: &[usize]| {
        Tensor::from_vec(&memory, vec![0f32; shape.iter().product()], shape).unwrap()
    };
    const BIAS: &str = "bert.encoder.layer.0.output.dense.bias";
    const WEIGHT: &str = "bert.encoder.layer.1.intermediate.dense.weight";
    let cases: [(&str, Option<Tensor>, &[&str]); 4] = [
        (BIAS, None, &["missing", BIAS]),
        (
            "bert.encoder.layer.7.output.dense.bias",
            Some(zeros(&[32])),
            &["unexpected", "bert.encoder.layer.7.output.dense.bias"],
        ),
        (
            WEIGHT,
            Some(zeros(&[32, 64])),
            &["wrong shape", WEIGHT, "[32, 64]", "[64, 32]"],
        ),
        (
            BIAS,
            Some(Tensor::from_vec(&memory, vec![1i64; 32], &[32]).unwrap()),
            &[BIAS, "I64, expected floating-point"],
        ),
    ];
    for (name, value, wanted) in cases {
        let mut changed = all.clone();
        changed.remove(name);
        changed.extend(value.map(|value| (name.to_owned(), value)));
        let bytes: Vec<(&String, &Tensor, Vec<u8>)> = changed
            .iter()
            .map(|(name, tensor)| (name, tensor, tensor.to_bytes().unwrap()))
            .collect();
        let views = bytes.iter().map(|(name, tensor, data)| TensorView {
            name,
            dtype: tensor.dtype(),
            shape: tensor.shape(),
            data,
        });
        write(&file, &pt_metadata(), views).unwrap();
        let said = bench.refuses(&model, &QUICK, wanted);
        assert!(said.contains(file.to_str().unwrap()), "{said}");
    }
}

#[test]
fn missing_files() {
    let bench = Bench::new();
    let nowhere = bench.task.path("nowhere");
    bench.refuses(&nowhere, &QUICK, &["nowhere: no such file or directory"]);
    for name in ["tokenizer.json", "config.json", "model.safetensors"] {
        let model = copy_model(&bench, &format!("without-{name}"));
        std::fs::remove_file(model.join(name)).unwrap();
        bench.refuses(&model, &QUICK, &[model.to_str().unwrap(), name]);
    }
    let model = copy_model(&bench, "broken-config");
    std::fs::write(
        model.join("config.json"),
        "{\n  \"model_type\": \"bert\",\n",
    )
    .unwrap();
    bench.refuses(&model, &QUICK, &["config.json: line 3"]);
    std::fs::write(model.join("config.json"), "{\"model_type\": \"t5\"}").unwrap();
    bench.refuses(
        &model,
        &QUICK,
        &["config.json", "`model_type`", "t5", "gpt2"],
    );
    std::fs::write(model.join("config.json"), "{\"model_type\": \"gpt2\"}").unwrap();
    bench.refuses(&model, &QUICK, &["config.json", "`n_embd`"]);
    let model = copy_model(&bench, "broken-tokenizer");
    std::fs::write(model.join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
    bench.refuses(&model, &QUICK, &["tokenizer.json"]);
}

#[test]
fn a_learning_rate_that_blows_up() {
    let bench = Bench::new();
    for (strategy, optimizer) in [("full", "adamw"), ("head", "sgd"), ("last:1", "sgd")] {
        let said = bench.refuses(
            &fixture("tiny-bert"),
            &[
                "--strategy",
                strategy,
                "--lr",
                "1e30",
                "--set",
                &format!("optimizer.kind={optimizer}"),
                "--set",
                "optimizer.warmup=0",
            ],
            &["step"],
        );
        assert!(
            said.contains("NaN") || said.contains("inf") || said.contains("not finite"),
            "{said}"
        );
        assert!(said.contains("optimizer.lr"), "{said}");
    }
    // One step only: nothing but the evaluation sees what it did.
    bench.refuses(
        &fixture("tiny-bert"),
        &[
            "--strategy",
            "full",
            "--lr",
            "1e38",
            "--epochs",
            "1",
            "--batch-size",
            "64",
            "--set",
            "optimizer.warmup=0",
        ],
        &["optimizer.lr"],
    );
    // And without one, only the weights tell.
    let mut arguments = bench.task.train(
        &fixture("tiny-bert"),
        "run",
        &[
            "--lr",
            "1e300",
            "--epochs",
            "1",
            "--batch-size",
            "64",
            "--set",
            "optimizer.warmup=0",
        ],
    );
    let place = arguments.iter().position(|a| a == "--eval").unwrap();
    arguments.drain(place..place + 2);
    let said = TRAINER.refuses(&arguments);
    assert!(
        said.contains("no longer finite after the step") && said.contains("optimizer.lr"),
        "{said}"
    );
    arguments.extend(["--set", "train.audit=false"].map(str::to_owned));
    let said = TRAINER.refuses(&arguments);
    assert!(
        said.contains("step 1: the tensor `") && said.contains("optimizer.lr"),
        "{said}"
    );
    bench.is_untouched();
}

#[test]
fn long_texts_are_cut_and_counted() {
    let task = Task::new(24, 12);
    let mut rows = std::fs::read_to_string(task.path("train.jsonl")).unwrap();
    for label in ["calm", "odd"] {
        let text = "the quiet bridge ".repeat(40);
        rows.push_str(&format!(
            "{{\"text\": \"{text}\", \"label\": \"{label}\"}}\n"
        ));
    }
    std::fs::write(task.path("train.jsonl"), rows).unwrap();
    for family in ["tiny-bert", "tiny-roberta", "tiny-distilbert"] {
        let said = TRAINER.succeeds(task.train(&fixture(family), "run", &QUICK));
        let note = "train.jsonl: 2 of 26 texts have more tokens than allowed and were cut";
        assert!(said.err.contains(note), "{}", said.err);
        assert!(said.out.contains("2 of them cut"), "{}", said.out);
        assert_eq!(records(&task.path("run"), "start")[0]["truncated"], 2);
    }
    let run = task.text("run");
    let said = TRAINER.succeeds([
        "eval",
        "--model",
        &run,
        "--data",
        &task.text("train.jsonl"),
        "--json",
    ]);
    assert!(said.err.contains("2 of 26 texts"), "{}", said.err);
    let found: serde_json::Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(found["truncated"], 2);
}

#[test]
fn output_paths_that_are_taken() {
    let bench = Bench::new();
    let model = fixture("tiny-bert");
    let file = PathBuf::from(bench.write("notes.txt", "mine"));
    let said = TRAINER.refuses(bench.task.train(&model, "notes.txt", &QUICK));
    assert!(
        said.contains("notes.txt: the output exists and is no directory"),
        "{said}"
    );
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");

    let theirs = bench.task.path("theirs");
    std::fs::create_dir(&theirs).unwrap();
    std::fs::write(theirs.join("thesis.tex"), "years").unwrap();
    let before = snapshot(&theirs);
    let said = TRAINER.refuses(bench.task.train(&model, "theirs", &QUICK));
    assert!(said.contains("`thesis.tex`"), "{said}");
    assert!(snapshot(&theirs) == before);

    // An earlier run with somebody's files among its own is theirs too.
    let out = bench.task.path("run");
    std::fs::create_dir(out.join("figures")).unwrap();
    let said = TRAINER.refuses(bench.task.train(&model, "run", &QUICK));
    assert!(said.contains("`figures`"), "{said}");
    std::fs::remove_dir(out.join("figures")).unwrap();
    bench.is_untouched();
}

#[test]
fn a_killed_run_leaves_the_earlier_one() {
    let bench = Bench::new();
    let model = fixture("tiny-bert");
    let endless = ["--strategy", "full", "--epochs", "1000000"];
    let mut child = TRAINER
        .command(bench.task.train(&model, "run", &endless))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // The staged directory is beside the other; it is being trained once there are steps in it.
    let staged = bench.task.path(".run.graft-new").join("metrics.jsonl");
    let begun = Instant::now();
    while !std::fs::read_to_string(&staged).is_ok_and(|text| text.contains("\"step\"")) {
        assert!(
            child.try_wait().unwrap().is_none(),
            "the run ended by itself"
        );
        assert!(
            begun.elapsed() < Duration::from_secs(120),
            "no step was made"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let said = TRAINER.refuses(bench.task.train(&model, "run", &QUICK));
    assert!(said.contains("another"), "{said}");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(snapshot(&bench.task.path("run")) == bench.earlier);
    TRAINER.succeeds([Path::new("verify"), &bench.task.path("run")]);
    TRAINER.succeeds(
        bench
            .task
            .train(&model, "run", &["--strategy", "full", "--epochs", "1"]),
    );
    assert!(!staged.exists());
    assert_eq!(records(&bench.task.path("run"), "step").len(), 2);
}
