//! Running the trainer as a user does, on small data that it can learn.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use graft_models::SafetensorsFile;
use serde_json::{Value, json};

/// The trainer's binary.
#[derive(Clone, Copy, Debug)]
pub struct Trainer(pub &'static str);

/// What a finished process left.
#[derive(Debug)]
pub struct Said {
    /// Exit code; none after a signal
    pub code: Option<i32>,
    /// Standard output
    pub out: String,
    /// Standard error
    pub err: String,
}

impl Trainer {
    /// The command, with nothing of this process' environment that decides where models are found. GRAFT_RUNNER is what
    /// stands before the program: an emulator of another processor, with its arguments.
    pub fn command<S: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = S>) -> Command {
        let runner = std::env::var("GRAFT_RUNNER").unwrap_or_default();
        let mut words = runner.split_whitespace().chain([self.0]);
        let mut command = Command::new(words.next().unwrap_or(self.0));
        command.args(words).args(arguments);
        command.env("HF_HOME", "/nowhere/at/all");
        for name in ["HF_HUB_CACHE", "XDG_CACHE_HOME"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs to the end.
    pub fn run<S: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = S>) -> Said {
        let output = self.command(arguments).output().expect("the binary starts");
        let text = |bytes| String::from_utf8(bytes).expect("the trainer writes UTF-8");
        Said {
            code: output.status.code(),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    /// Runs, and expects success.
    pub fn succeeds<S: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = S>) -> Said {
        let said = self.run(arguments);
        assert_eq!(said.code, Some(0), "{}", said.err);
        said
    }

    /// Runs, and expects exit code 1 without a panic; returns standard error.
    pub fn refuses<S: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = S>) -> String {
        let said = self.run(arguments);
        assert_eq!(said.code, Some(1), "{}{}", said.out, said.err);
        assert!(!said.err.contains("panicked"), "{}", said.err);
        assert!(said.out.is_empty(), "{}", said.out);
        said.err
    }
}

/// A classification task in a directory of its own, which a tiny model learns in seconds: three labels, half of the
/// examples have the first, and every label has words of its own among words that all share.
#[derive(Debug)]
pub struct Task {
    dir: tempfile::TempDir,
}

/// The labels of [`Task`].
pub const LABELS: [&str; 3] = ["calm", "loud", "odd"];

const WORDS: [[&str; 4]; 3] = [
    ["quiet", "water", "field", "bridge"],
    ["engine", "shout", "thunder", "drum"],
    ["nine", "three", "eleven", "one"],
];
const SHARED: [&str; 5] = ["the", "and", "it", "is", "a"];

impl Task {
    /// Files `train.jsonl` of `train` rows and `eval.jsonl` of `eval` rows.
    pub fn new(train: usize, eval: usize) -> Task {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut random = Random(train as u64);
        for (name, rows) in [("train.jsonl", train), ("eval.jsonl", eval)] {
            std::fs::write(dir.path().join(name), rows_of(rows, &mut random)).expect("writes");
        }
        Task { dir }
    }

    /// The same with a label for each word in place of the text's: `B-` and that label, or `O` for a word that all share.
    pub fn of_words(train: usize, eval: usize) -> Task {
        let task = Task::new(train, eval);
        for name in ["train.jsonl", "eval.jsonl"] {
            let text = std::fs::read_to_string(task.path(name)).expect("reads");
            let row = |line: &str| {
                let row: Value = serde_json::from_str(line).expect("an object");
                let [text, label] = ["text", "label"].map(|key| row[key].as_str().expect("text"));
                let words: Vec<&str> = text.split(' ').collect();
                let tag = |word: &&str| match SHARED.contains(word) {
                    true => "O".to_owned(),
                    false => format!("B-{label}"),
                };
                let labels: Vec<String> = words.iter().map(tag).collect();
                format!("{}\n", json!({"tokens": words, "labels": labels}))
            };
            let rows: String = text.lines().map(row).collect();
            std::fs::write(task.path(name), rows).expect("writes");
        }
        task
    }

    /// A path in the task's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// [`Task::path`] as text.
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_owned()
    }

    /// Writes a text of 60 lines that says the same things over and over, of which there are seven; its path.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn lines(&self, name: &str, line: impl Fn(usize) -> String) -> String {
        let text: String = (0..60).map(|i| line(i % 7) + "\n").collect();
        std::fs::write(self.path(name), text).expect("writes");
        self.text(name)
    }

    /// `train --model MODEL --train ... --eval ... --out OUT`, and more arguments.
    pub fn train(&self, model: &Path, out: &str, more: &[&str]) -> Vec<String> {
        let mut arguments = vec!["train".to_owned()];
        for (flag, value) in [
            ("--model", model.to_str().expect("UTF-8").to_owned()),
            ("--train", self.text("train.jsonl")),
            ("--eval", self.text("eval.jsonl")),
            ("--out", self.text(out)),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        arguments.extend(more.iter().map(|s| (*s).to_owned()));
        arguments
    }
}

/// A tiny language model in `dir`: configuration and weights of a decoder's fixture, and a tokenizer with a token for
/// each printable character of ASCII and the line feed, from [`FIRST_CHARACTER`] on. Token 2 ends a text.
///
/// # Panics
/// If the files cannot be written.
pub fn language_model(dir: &Path, fixture: &str) {
    std::fs::create_dir_all(dir).expect("a directory");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(crate::fixture(fixture).join(name), dir.join(name)).expect("copies");
    }
    write_tokenizer(dir, (b' '..=b'~').chain([b'\n']));
}

/// A tokenizer in `dir` with a token for each of some bytes, from [`FIRST_CHARACTER`] on. Token 2 ends a text.
///
/// # Panics
/// If the file cannot be written.
pub fn write_tokenizer(dir: &Path, bytes: impl Iterator<Item = u8>) {
    // Byte-level tokenizers spell bytes that are no printable character as characters from U+0100 on, in their order.
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let spelled = |byte: u8| {
        let rank = (0..byte).filter(|b| !printable(b)).count() as u32;
        let code = if printable(&byte) {
            u32::from(byte)
        } else {
            0x100 + rank
        };
        char::from_u32(code).expect("a character").to_string()
    };
    let special = ["<pad>", "<s>", "<|endoftext|>"];
    let tokens = special.iter().map(|s| (*s).to_owned());
    let tokens = tokens.chain(bytes.map(spelled));
    let vocab: serde_json::Map<String, Value> = tokens
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let added = special.iter().enumerate().map(|(id, content)| {
        json!({
            "id": id, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    });
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<Value>>(),
        "pre_tokenizer": bytes,
        "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).expect("writes");
}

/// The token of a space in the tokenizer of [`language_model`]; the other characters follow in their order.
pub const FIRST_CHARACTER: i64 = 3;

/// The tokens of a text in the tokenizer of [`language_model`], and the one that ends it.
pub fn characters(text: &str) -> Vec<i64> {
    let id = |byte: u8| match byte {
        b'\n' => FIRST_CHARACTER + 95,
        _ => FIRST_CHARACTER + i64::from(byte - b' '),
    };
    text.bytes().map(id).chain([2]).collect()
}

fn rows_of(rows: usize, random: &mut Random) -> String {
    let mut text = String::new();
    for i in 0..rows {
        let label = [0, 0, 0, 1, 1, 2][i % 6];
        let words: Vec<&str> = (0..2 + random.below(6))
            .map(|place| match place == 0 || random.below(3) > 0 {
                true => WORDS[label][random.below(4)],
                false => SHARED[random.below(5)],
            })
            .collect();
        let row = json!({"text": words.join(" "), "label": LABELS[label]});
        writeln!(text, "{row}").expect("a String takes everything");
    }
    text
}

/// Numbers without pattern enough for data (Knuth's MMIX congruence, upper bits).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Those that follow from a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// One of 0 to n - 1.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

/// Every file of a directory, by name.
pub fn snapshot(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    entries
        .map(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, std::fs::read(entry.path()).expect("a file"))
        })
        .collect()
}

/// The records of a run's `metrics.jsonl` of one kind.
pub fn records(run: &Path, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("a JSON object"))
        .filter(|record| record["kind"] == kind)
        .collect()
}

/// Flips one bit in the middle of a tensor's bytes in a model file.
pub fn flip_bit(file: &Path, tensor: &str) {
    let opened = SafetensorsFile::open(file).expect("opens");
    let range = opened
        .get(tensor)
        .expect("the tensor is there")
        .range
        .clone();
    let mut bytes = std::fs::read(file).expect("reads");
    bytes[((range.start + range.end) / 2) as usize] ^= 0x10;
    std::fs::write(file, bytes).expect("writes");
}
