//! The way through NVIDIA's driver, over one that is simulated (`kernels/src/cuda/simulation/driver.cpp`): what can be
//! wrong with it is said so that it can be mended, and an earlier run is left as it was; where nothing is wrong, a run
//! gives the bits that it gives on the simulated GPU.
//!
//! `scripts/test-simulation` builds that driver, names its folder in GRAFT_DRIVER and runs these tests.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use graft_tests::fixture;
use graft_tests::runs::{LABELS, Said, Task, Trainer, records, snapshot};
use serde_json::json;

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));
const QUICK: [&str; 4] = ["--strategy", "last:1", "--epochs", "1"];

fn folder() -> PathBuf {
    let folder = std::env::var_os("GRAFT_DRIVER");
    folder
        .expect("GRAFT_DRIVER names the folder of the simulated libcuda")
        .into()
}

fn command(settings: &[(&str, &str)], arguments: &[String]) -> Command {
    let mut command = TRAINER.command(arguments);
    command
        .env("LD_LIBRARY_PATH", folder())
        .env_remove("GRAFT_CUDA_SIMULATION")
        .envs(settings.iter().copied());
    command
}

fn run(settings: &[(&str, &str)], arguments: &[String]) -> Said {
    let output = command(settings, arguments).output().unwrap();
    Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn owned(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|s| (*s).to_owned()).collect()
}

/// A task with an earlier run in `run`.
fn bench() -> (Task, BTreeMap<String, Vec<u8>>) {
    let task = Task::new(24, 12);
    TRAINER.succeeds(task.train(&fixture("tiny-bert"), "run", &QUICK));
    let earlier = snapshot(&task.path("run"));
    (task, earlier)
}

/// What the driver is like, the device that is asked for, and what the message says.
type Case = (
    &'static [(&'static str, &'static str)],
    &'static str,
    &'static [&'static str],
);

const UNUSABLE: [Case; 8] = [
    (
        &[("GRAFT_DRIVER_DEVICES", "0")],
        "cuda:0",
        &[
            "no CUDA-capable device is detected",
            "check `nvidia-smi`",
            "--device cpu",
        ],
    ),
    (
        &[("GRAFT_DRIVER_DEVICES", "2")],
        "cuda:2",
        &["there is no cuda:2", "has 2 GPU(s), numbered from 0"],
    ),
    (
        &[("GRAFT_DRIVER_CAPABILITY", "61")],
        "cuda:0",
        &["compute capability 6.1", "7.0 or later is needed"],
    ),
    (
        &[("GRAFT_DRIVER_VERSION", "11080")],
        "cuda:0",
        &[
            "the driver (CUDA 11.8) is older",
            "update the driver to one for CUDA 12.0 or later",
        ],
    ),
    (
        &[("GRAFT_DRIVER_PTX", "78")],
        "cuda:0",
        &[
            "is older than the kernels' PTX",
            "unsupported toolchain",
            "update the driver",
        ],
    ),
    // PTX that is to be made anew, without a compiler.
    (
        &[
            ("GRAFT_CUDA_COMPILE", "/nowhere/at/all"),
            ("GRAFT_NVRTC", "/nowhere/at/all"),
        ],
        "cuda:0",
        &["loading NVRTC failed", "/nowhere/at/all"],
    ),
    // Variables that mean nothing.
    (
        &[("GRAFT_CUDA_TARGET", "sm_80")],
        "cuda:0",
        &["GRAFT_CUDA_TARGET is \"sm_80\"; use compute_70 or compute_80"],
    ),
    (
        &[("GRAFT_CUDA_GRAPHS", "many")],
        "cuda:0",
        &["GRAFT_CUDA_GRAPHS is \"many\"; use a number"],
    ),
];

#[test]
#[ignore = "needs the simulated driver"]
fn what_cannot_be_used_is_refused_and_earlier_runs_stay() {
    let (task, earlier) = bench();
    for (settings, device, wanted) in UNUSABLE {
        let more = [&QUICK[..], &["--device", device]].concat();
        let said = run(settings, &task.train(&fixture("tiny-bert"), "run", &more));
        assert_eq!(said.code, Some(1), "{settings:?}: {}", said.err);
        assert!(!said.err.contains("panicked"), "{}", said.err);
        for part in wanted {
            assert!(said.err.contains(part), "`{part}` is not in: {}", said.err);
        }
        assert!(snapshot(&task.path("run")) == earlier, "{settings:?}");
    }
}

/// What `auto` passes over is named, and the run goes on without.
#[test]
#[ignore = "needs the simulated driver"]
fn auto_says_why_it_takes_the_cpu() {
    let task = Task::new(24, 12);
    for (settings, device, wanted) in &UNUSABLE[..4] {
        if *device != "cuda:0" {
            continue; // the first device of the two is a good one
        }
        let more = [&QUICK[..], &["--device", "auto"]].concat();
        let said = run(settings, &task.train(&fixture("tiny-bert"), "run", &more));
        assert_eq!(said.code, Some(0), "{settings:?}: {}", said.err);
        assert!(said.err.contains("computing on the CPU"), "{}", said.err);
        assert!(
            said.err.contains(wanted[0]),
            "`{}`: {}",
            wanted[0],
            said.err
        );
    }
}

#[test]
#[ignore = "needs the simulated driver"]
fn the_doctor_tells_each_device() {
    let said = |settings: &[(&str, &str)]| run(settings, &owned(&["doctor"])).out;
    let two = said(&[("GRAFT_DRIVER_DEVICES", "2")]);
    assert!(two.contains("cuda:0: simulated device 0, 4.0 GiB"), "{two}");
    assert!(two.contains("cuda:1: simulated device 1"), "{two}");
    assert_eq!(two.matches("kernels run").count(), 2, "{two}");
    for (settings, device, wanted) in UNUSABLE {
        if device == "cuda:0" {
            let text = said(settings);
            assert!(text.contains(wanted[0]), "`{}`: {text}", wanted[0]);
            assert!(!text.contains("kernels run"), "{text}");
        }
    }
}

/// Too little for the weights; too little for the plan, with what would fit; and, where the plan is overruled, too
/// little in the middle of the run.
#[test]
#[ignore = "needs the simulated driver"]
fn too_little_memory_is_told_by_category_with_what_fits() {
    let (task, earlier) = bench();
    let refused = |memory: &str, more: &[&str], wanted: &[&str]| {
        let more = [&QUICK[..], &["--device", "cuda:0"], more].concat();
        let arguments = task.train(&fixture("tiny-bert"), "run", &more);
        let said = run(&[("GRAFT_DRIVER_MEMORY", memory)], &arguments);
        assert_eq!(said.code, Some(1), "{memory}: {}", said.err);
        assert!(!said.err.contains("panicked"), "{}", said.err);
        for part in wanted {
            assert!(said.err.contains(part), "`{part}` is not in: {}", said.err);
        }
        assert!(snapshot(&task.path("run")) == earlier, "{memory}");
    };
    let told = ["out of memory", "weights ", "activations ", "trainer plan"];
    refused("40000", &[], &told);
    let planned = [
        "the run needs",
        "are free",
        "activations",
        "what fits: train.batch_size=",
    ];
    refused("500000", &[], &planned);
    refused("500000", &["--set", "train.memory_limit=0"], &told);
}

/// Memory that suffices for short texts alone: what was reached before the first long one is kept, and with more memory the
/// run ends as one that was never stopped.
#[test]
#[ignore = "needs the simulated driver"]
fn memory_that_runs_out_in_the_middle_leaves_a_run_that_goes_on() {
    let task = Task::new(24, 12);
    let words = [
        "quiet water field",
        "engine shout thunder",
        "nine three eleven",
    ];
    let row = |i: usize| {
        let times = if [0, 5, 10].contains(&i) { 20 } else { 1 };
        let text = vec![words[i % 3]; times].join(" ");
        json!({"text": text, "label": LABELS[i % 3]}).to_string() + "\n"
    };
    std::fs::write(
        task.path("train.jsonl"),
        (0..24).map(row).collect::<String>(),
    )
    .unwrap();
    let arguments = |out| {
        let more = "--strategy full --epochs 1 --batch-size 4 --seed 1 --device cuda:0 --set train.memory_limit=0";
        let mut more: Vec<&str> = more.split(' ').collect();
        more.extend(["--checkpoint", "1 step"]);
        task.train(&fixture("tiny-bert"), out, &more)
    };
    let whole = run(&[], &arguments("whole"));
    assert_eq!(whole.code, Some(0), "{}", whole.err);
    let said = run(&[("GRAFT_DRIVER_MEMORY", "640000")], &arguments("run"));
    assert_eq!(said.code, Some(1), "{}", said.err);
    assert!(!said.err.contains("panicked"), "{}", said.err);
    for part in [
        "out of memory",
        "weights ",
        "activations ",
        "of the GPU's 640000 this process holds ",
        "smaller batches",
        "trainer resume",
    ] {
        assert!(said.err.contains(part), "`{part}` is not in: {}", said.err);
    }
    let steps = records(&task.path(".run.graft-new"), "step").len();
    assert!((1..6).contains(&steps), "{steps} steps before it");
    let resumed = run(&[], &owned(&["resume", &task.text("run")]));
    assert_eq!(resumed.code, Some(0), "{}", resumed.err);
    let weights = |name: &str| std::fs::read(task.path(name).join("model.safetensors")).unwrap();
    assert!(weights("run") == weights("whole"));
}

/// The oldest driver that is taken, which knows the PTX of its time alone.
#[test]
#[ignore = "needs the simulated driver"]
fn kernels_run_on_a_driver_for_cuda_12_0() {
    let settings = [
        ("GRAFT_DRIVER_VERSION", "12000"),
        ("GRAFT_DRIVER_PTX", "80"),
    ];
    let said = run(&settings, &owned(&["doctor"]));
    assert!(said.out.contains("driver for CUDA 12.0"), "{}", said.out);
    assert!(said.out.contains("kernels run"), "{}", said.out);
}

/// The driver's calls give what the simulated GPU's give, whose kernels are the same.
#[test]
#[ignore = "needs the simulated driver"]
fn a_run_through_the_driver_has_the_bits_of_one_on_the_simulated_gpu() {
    let task = Task::new(24, 12);
    let more = [&QUICK[..], &["--device", "cuda:0", "--precision", "bf16"]].concat();
    let arguments = |out| task.train(&fixture("tiny-bert"), out, &more);
    let said = run(&[], &arguments("driver"));
    assert_eq!(said.code, Some(0), "{}", said.err);
    let simulation = folder().join("../libgraft_simulation.so");
    let output = TRAINER
        .command(arguments("simulation"))
        .env("GRAFT_CUDA_SIMULATION", simulation)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let weights = |name: &str| std::fs::read(task.path(name).join("model.safetensors")).unwrap();
    assert!(weights("driver") == weights("simulation"));
    // Without graphs, and where the driver has no memory for them.
    for setting in [("GRAFT_CUDA_GRAPHS", "0"), ("GRAFT_DRIVER_GRAPHS", "0")] {
        let said = run(&[setting], &arguments("alone"));
        assert_eq!(said.code, Some(0), "{setting:?}: {}", said.err);
        assert!(weights("alone") == weights("driver"), "{setting:?}");
        std::fs::remove_dir_all(task.path("alone")).unwrap();
    }
    let losses = |name: &str| -> Vec<f64> {
        let steps = records(&task.path(name), "step");
        steps
            .iter()
            .map(|step| step["loss"].as_f64().unwrap())
            .collect()
    };
    assert_eq!(losses("driver"), losses("simulation"));
    assert!(!losses("driver").is_empty());
    let said = run(&[], &owned(&["verify", &task.text("driver")]));
    assert!(said.out.contains("passed"), "{}{}", said.out, said.err);
}

/// How often a run asks the driver for launches and copies by themselves, for graphs, and waits.
fn counts(arguments: &[String]) -> [i64; 3] {
    let said = run(&[("GRAFT_DRIVER_COUNTS", "1")], arguments);
    assert_eq!(said.code, Some(0), "{}", said.err);
    let line = said.err.lines().find(|l| l.starts_with("simulated driver"));
    let words = line.unwrap().split_whitespace();
    let numbers: Vec<i64> = words.filter_map(|word| word.parse().ok()).collect();
    numbers.try_into().unwrap()
}

/// A run whose batches have one shape sends each further step as one graph, no launch or copy beside it, and waits once for it.
#[test]
#[ignore = "needs the simulated driver"]
fn a_further_step_of_a_run_is_one_graph() {
    let task = Task::new(24, 12);
    let of = |steps: usize| {
        // All as long as the limit.
        let row = |i: usize| json!({"text": "word ".repeat(40), "label": LABELS[i % LABELS.len()]});
        let rows: String = (0..4 * steps).map(|i| format!("{}\n", row(i))).collect();
        std::fs::write(task.path("train.jsonl"), rows).unwrap();
        let more = "--strategy full --epochs 1 --batch-size 4 --max-length 16 --seed 1 --device cuda:0 \
                    --set train.audit=false";
        let more: Vec<&str> = more.split_whitespace().collect();
        let out = format!("run{steps}");
        counts(&task.train(&fixture("tiny-bert"), &out, &more))
    };
    let (eight, twelve) = (of(8), of(12));
    let further = [0, 1, 2].map(|i| twelve[i] - eight[i]);
    assert_eq!(
        further,
        [0, 4, 4],
        "tasks alone, graphs and waits of four steps"
    );
}
