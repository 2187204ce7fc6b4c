//! Runs that were killed, interrupted or failed, and go on: what comes of them has the bits of a run that nobody disturbed.
#![cfg(unix)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use graft_models::SafetensorsFile;
use graft_tests::runs::{Random, Task, Trainer, language_model, records, snapshot};
use graft_tests::{fixture, tensors};
use serde_json::Value;

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// The directory that a run at `run` is written to.
const STAGED: &str = ".run.graft-new";

/// A kind of run, and its arguments.
struct Case {
    name: &'static str,
    task: Task,
    arguments: Vec<String>,
}

impl Case {
    /// A classifier on the task's texts.
    fn classifier(name: &'static str, more: &[&str]) -> Case {
        Case::on(Task::new(48, 24), name, more)
    }

    /// A classifier of words.
    fn words(name: &'static str, more: &[&str]) -> Case {
        Case::on(
            Task::of_words(48, 24),
            name,
            &[&["--task", "ner"], more].concat(),
        )
    }

    fn on(task: Task, name: &'static str, more: &[&str]) -> Case {
        let common = ["--seed", "5", "--checkpoint", "1 step", "--batch-size", "8"];
        let arguments = task.train(&fixture("tiny-bert"), "run", &[&common, more].concat());
        Case {
            name,
            task,
            arguments,
        }
    }

    /// A language model on a few sentences, in steps of two batches.
    fn language(name: &'static str, more: &[&str]) -> Case {
        let task = Task::new(6, 6);
        language_model(&task.path("gpt"), "tiny-gpt2");
        let line = |i: usize| format!("{{\"text\": \"{} lines, and more\"}}\n", i * i);
        let rows: String = (0..40).map(line).collect();
        std::fs::write(task.path("train.jsonl"), &rows).unwrap();
        let some: String = (40..50).map(line).collect();
        std::fs::write(task.path("eval.jsonl"), some).unwrap();
        let common = [
            "--task",
            "clm",
            "--max-length",
            "16",
            "--set",
            "train.accumulate=2",
        ];
        let common = [&common[..], &["--checkpoint", "1 step"], more].concat();
        let arguments = task.train(&task.path("gpt"), "run", &common);
        Case {
            name,
            task,
            arguments,
        }
    }

    fn run(&self) -> PathBuf {
        self.task.path("run")
    }

    /// What the run leaves but for times: its files, and its metrics and its certificate.
    fn left(&self) -> (BTreeMap<String, Vec<u8>>, Vec<Value>) {
        let mut files = snapshot(&self.run());
        let metrics = files.remove("metrics.jsonl").unwrap();
        let certificate = files.remove("certificate.json").unwrap();
        let mut certificate: Value = serde_json::from_slice(&certificate).unwrap();
        assert!(
            certificate
                .as_object_mut()
                .unwrap()
                .remove("created")
                .is_some()
        );
        let lines = std::str::from_utf8(&metrics).unwrap().lines();
        let records = lines
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .filter(|record| record["kind"] != "resume")
            .map(|mut record| {
                let times = ["tokens_per_second", "seconds", "peak_rss", "peak_tensors"];
                for key in times {
                    record.as_object_mut().unwrap().remove(key);
                }
                record
            })
            .chain([certificate])
            .collect();
        (files, records)
    }

    fn spawn(&self, arguments: &[String]) -> Child {
        let mut command = TRAINER.command(arguments);
        let command = command.stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    fn resume(&self) -> Vec<String> {
        vec!["resume".to_owned(), self.task.text("run")]
    }

    fn clear(&self) {
        for name in ["run", STAGED] {
            let path = self.task.path(name);
            if path.exists() {
                std::fs::remove_dir_all(path).unwrap();
            }
        }
    }
}

fn cases() -> Vec<Case> {
    let llrd = [
        "--strategy",
        "full+llrd:0.8",
        "--epochs",
        "4",
        "--lr",
        "1e-2",
    ];
    let gradual = ["--strategy", "gradual", "--epochs", "4", "--lr", "1e-2"];
    let sgd = [
        "--set",
        "optimizer.kind=sgd",
        "--strategy",
        "last:1",
        "--epochs",
        "4",
    ];
    vec![
        Case::classifier("full", &llrd),
        Case::classifier("gradual", &gradual),
        Case::classifier("sgd", &sgd),
        Case::classifier("lora", &["--strategy", "lora+norms", "--epochs", "4"]),
        Case::words("ner", &["--strategy", "last:1", "--epochs", "4"]),
        Case::classifier(
            "head, bf16",
            &["--strategy", "head", "--precision", "bf16", "--epochs", "6"],
        ),
        Case::language("clm", &["--strategy", "full", "--epochs", "4"]),
        Case::language(
            "dora",
            &[
                "--strategy",
                "dora",
                "--epochs",
                "4",
                "--set",
                "adapter.init=pissa",
            ],
        ),
        Case::classifier(
            "prompt",
            &[
                "--strategy",
                "prompt+norms",
                "--epochs",
                "4",
                "--set",
                "adapter.tokens=4",
            ],
        ),
        Case::classifier(
            "adapter, int8",
            &["--strategy", "adapter", "--base", "int8", "--epochs", "4"],
        ),
        Case::language(
            "prefix, bf16 base",
            &[
                "--strategy",
                "prefix",
                "--base",
                "bf16",
                "--epochs",
                "4",
                "--set",
                "adapter.projection=6",
            ],
        ),
        Case::language(
            "ia3, nf4",
            &["--strategy", "ia3", "--base", "nf4", "--epochs", "4"],
        ),
    ]
}

/// Kills a run where a checkpoint is being written: its temporary file is there.
fn kill_in_a_save(child: &mut Child, staged: &Path, patience: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < patience && child.try_wait().unwrap().is_none() {
        let entries = std::fs::read_dir(staged).into_iter().flatten().flatten();
        let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        if names.any(|name| name.starts_with(".checkpoint.safetensors")) {
            break;
        }
    }
    let _ = child.kill();
    child.wait().unwrap();
}

/// `kill -9` at moments without a pattern, every other one in a save: every run is resumed, and ends as the undisturbed one.
/// `GRAFT_KILLS` says how many (a test of an hour, or of seconds).
#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let kills: usize = match std::env::var("GRAFT_KILLS") {
        Ok(text) => text.parse().expect("GRAFT_KILLS is a number"),
        Err(_) => 44,
    };
    let cases = cases();
    let mut random = Random::new(kills as u64);
    let (mut resumed, mut in_saves) = (0, 0);
    for (i, case) in cases.iter().enumerate() {
        let begun = Instant::now();
        TRAINER.succeeds(&case.arguments);
        let whole = begun.elapsed();
        let (files, metrics) = case.left();
        let own = kills / cases.len() + usize::from(i < kills % cases.len());
        let mut arguments = case.arguments.clone();
        case.clear();
        for kill in 0..own {
            let mut child = case.spawn(&arguments);
            let wait = whole.mul_f64(random.below(1000) as f64 / 1000.0);
            std::thread::sleep(wait);
            if kill % 2 == 0 {
                kill_in_a_save(&mut child, &case.task.path(STAGED), whole);
                in_saves += 1;
            } else {
                let _ = child.kill();
                child.wait().unwrap();
            }
            let staged = case.task.path(STAGED);
            let left = ["checkpoint.safetensors", "certificate.json"];
            let left = left.map(|name| staged.join(name));
            if case.run().exists() {
                // It had ended before.
                assert!(
                    case.left() == (files.clone(), metrics.clone()),
                    "{}",
                    case.name
                );
                case.clear();
                arguments = case.arguments.clone();
            } else if left.iter().any(|path| path.exists()) {
                resumed += 1;
                arguments = case.resume();
                // Now and then from one kill to the next, else to the end.
                if random.below(3) > 0 {
                    TRAINER.succeeds(&arguments);
                    let (then, records) = case.left();
                    assert_eq!(records, metrics, "{}", case.name);
                    for (name, bytes) in &files {
                        assert!(then.get(name) == Some(bytes), "{}: {name}", case.name);
                    }
                    assert_eq!(then.len(), files.len(), "{}: {:?}", case.name, then.keys());
                    TRAINER.succeeds([Path::new("verify"), &case.run()]);
                    case.clear();
                    arguments = case.arguments.clone();
                }
            } else {
                case.clear();
                arguments = case.arguments.clone();
            }
        }
        case.clear();
    }
    println!(
        "{kills} kills, {in_saves} of them meant for saves; {resumed} times a run was resumed"
    );
    assert!(
        resumed * 3 > kills,
        "{resumed} of {kills} runs had a checkpoint"
    );
}

/// A request to terminate ends a run at a step's end, with a checkpoint although none was due; other threads go on with it.
#[test]
fn a_run_that_is_told_to_stop_keeps_what_it_reached() {
    let mut case = Case::classifier("full", &["--strategy", "full", "--epochs", "60"]);
    let place = case.arguments.iter().position(|a| a == "1 step").unwrap();
    case.arguments[place] = "10 minutes".to_owned();
    TRAINER.succeeds(&case.arguments);
    let undisturbed = case.left();
    case.clear();

    let child = case.spawn(&case.arguments);
    let metrics = case.task.path(STAGED).join("metrics.jsonl");
    wait_for(|| std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains("\"step\":20,")));
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &id])
            .status()
            .unwrap()
            .success()
    );
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("stopped after step"), "{said}");
    assert!(said.contains("trainer resume"), "{said}");
    assert!(!case.run().exists());

    // Nobody's run is lost by another one of that name.
    let refused = TRAINER.refuses(&case.arguments);
    assert!(
        refused.contains("was stopped") && refused.contains("--restart"),
        "{refused}"
    );

    let mut resume = case.resume();
    resume.extend(["--threads".to_owned(), "1".to_owned()]);
    let said = TRAINER.succeeds(resume);
    assert!(said.err.contains("resumed after step"), "{}", said.err);
    assert!(case.left() == undisturbed);
    assert_eq!(records(&case.run(), "resume").len(), 1);
    let left = std::fs::read_dir(case.task.path(".")).unwrap().flatten();
    let hidden = left.filter(|e| e.file_name().to_string_lossy().contains("graft"));
    assert_eq!(hidden.count(), 0);

    let refused = TRAINER.refuses(case.resume());
    assert!(refused.contains("the run has ended"), "{refused}");
}

/// Waits until something holds.
fn wait_for(holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(120), "it never came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A run that was killed once there was a checkpoint of an epoch that is not its first.
fn killed(case: &Case) {
    let mut child = case.spawn(&case.arguments);
    let metrics = case.task.path(STAGED).join("metrics.jsonl");
    wait_for(|| std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains("\"step\":20,")));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn what_a_run_depends_on_must_be_as_it_was() {
    let case = Case::classifier("full", &["--strategy", "last:1", "--epochs", "1000"]);
    let model = case.task.path("model");
    std::fs::create_dir(&model).unwrap();
    for (name, bytes) in snapshot(&fixture("tiny-bert")) {
        std::fs::write(model.join(name), bytes).unwrap();
    }
    let mut case = case;
    let place = case.arguments.iter().position(|a| a == "--model").unwrap();
    case.arguments[place + 1] = model.to_str().unwrap().to_owned();
    killed(&case);

    let changed = |path: &Path, change: &dyn Fn(&mut Vec<u8>), wanted: &str| {
        let before = std::fs::read(path).unwrap();
        let mut bytes = before.clone();
        change(&mut bytes);
        std::fs::write(path, bytes).unwrap();
        let said = TRAINER.refuses(case.resume());
        assert!(said.contains(wanted), "`{wanted}` is not in: {said}");
        std::fs::write(path, before).unwrap();
    };
    let swap = |bytes: &mut Vec<u8>| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        let (first, rest) = text.split_once('\n').unwrap();
        *bytes = format!("{rest}{first}\n").into_bytes();
    };
    changed(
        &case.task.path("train.jsonl"),
        &swap,
        "`data.train` changed",
    );
    changed(&case.task.path("eval.jsonl"), &swap, "`data.eval` changed");
    let weights = model.join("model.safetensors");
    // A number of the embeddings, which this run does not train.
    let range = {
        let file = SafetensorsFile::open(&weights).unwrap();
        let name = "bert.embeddings.word_embeddings.weight";
        file.get(name).unwrap().range.clone()
    };
    let frozen = |bytes: &mut Vec<u8>| bytes[range.start as usize] ^= 1;
    changed(
        &weights,
        &frozen,
        "`bert.embeddings.word_embeddings.weight` changed since",
    );
    let staged = case.task.path(STAGED);
    let checkpoint = staged.join("checkpoint.safetensors");
    changed(
        &checkpoint,
        &|bytes| bytes.truncate(1000),
        "checkpoint.safetensors",
    );
    let format = |bytes: &mut Vec<u8>| {
        let at = bytes.windows(10).position(|w| w == b"format = 1").unwrap();
        bytes[at + 9] = b'7';
    };
    changed(&checkpoint, &format, "format 7");
    changed(
        &staged.join("config.resolved.toml"),
        &|bytes| bytes.extend(b"\n[train2]\n"),
        "train2",
    );

    // Nothing of that has cost anything: as it was, the run is taken up.
    let mut child = case.spawn(&case.resume());
    let metrics = staged.join("metrics.jsonl");
    wait_for(|| std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains("\"resume\"")));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn there_must_be_something_to_resume_and_a_restart_forgets_it() {
    let task = Task::new(24, 12);
    let said = TRAINER.refuses(["resume", &task.text("nowhere")]);
    assert!(said.contains("no run of this name was stopped"), "{said}");

    let case = Case::classifier("full", &["--strategy", "full", "--epochs", "1000"]);
    killed(&case);
    let mut restart = case.arguments.clone();
    let place = restart.iter().position(|a| a == "1000").unwrap();
    restart[place] = "1".to_owned();
    restart.push("--restart".to_owned());
    TRAINER.succeeds(&restart);
    assert_eq!(records(&case.run(), "step").len(), 6);
    assert!(!case.task.path(STAGED).exists());
}

/// A run that ends by its own error behind a checkpoint says that it is kept.
#[test]
fn a_run_that_failed_keeps_its_checkpoint() {
    // The first step has the rate 0, the second one breaks the model.
    let rate = [
        "--lr",
        "1e30",
        "--set",
        "optimizer.warmup=100",
        "--set",
        "train.audit=false",
    ];
    let more = [&["--strategy", "full", "--epochs", "40"][..], &rate].concat();
    let case = Case::classifier("full", &more);
    let said = TRAINER.refuses(&case.arguments);
    assert!(said.contains("lower optimizer.lr"), "{said}");
    assert!(said.contains("what was reached is kept"), "{said}");
    assert!(
        case.task
            .path(STAGED)
            .join("checkpoint.safetensors")
            .exists()
    );
    // It is what it was, to the same error.
    let again = TRAINER.refuses(case.resume());
    assert!(
        again.contains("resumed after step") && again.contains("lower optimizer.lr"),
        "{again}"
    );
}

/// A run that was stopped between its last file and its place is put there, whatever has become of data and model.
#[test]
fn a_run_that_had_ended_is_put_into_its_place() {
    let case = Case::classifier("full", &["--strategy", "full", "--epochs", "1"]);
    TRAINER.succeeds(&case.arguments);
    let whole = case.left();
    let staged = case.task.path(STAGED);
    std::fs::rename(case.run(), &staged).unwrap();
    for name in [
        "checkpoint.safetensors",
        "best.safetensors",
        ".certificate.json.graft-tmp-1-1",
    ] {
        std::fs::write(staged.join(name), "cut").unwrap();
    }
    let refused = TRAINER.refuses(&case.arguments);
    assert!(refused.contains("was stopped"), "{refused}");
    std::fs::remove_file(case.task.path("train.jsonl")).unwrap();
    let said = TRAINER.succeeds(case.resume());
    assert!(said.out.contains("the run had ended"), "{}", said.out);
    assert!(case.left() == whole);
}

/// The weights of a checkpoint are those that some epoch trains, and no others.
#[test]
fn a_checkpoint_holds_what_is_trained() {
    let case = Case::classifier("head", &["--strategy", "head", "--epochs", "100000"]);
    killed(&case);
    let path = case.task.path(STAGED).join("checkpoint.safetensors");
    let names: Vec<String> = tensors(&path).into_keys().collect();
    let head = ["pooler.dense", "classifier"];
    let of = |prefix: &str| names.iter().filter(|n| n.starts_with(prefix)).count();
    assert_eq!(
        (of("weights."), of("optimizer.0."), of("optimizer.1.")),
        (4, 4, 4)
    );
    assert_eq!(names.len(), 12);
    assert!(
        names.iter().all(|n| head.iter().any(|h| n.contains(h))),
        "{names:?}"
    );
}
