//! The options of low-rank adapters, as a user sets them: what comes of each in PEFT's two files, and that what is kept
//! computes what was trained.

use std::collections::HashMap;
use std::path::Path;

use graft_tensor::Tensor;
use graft_tests::runs::{Task, Trainer, records};
use graft_tests::{fixture, json, tensors};
use serde_json::{Value, json};

const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));
const LAYER: &str = "base_model.model.bert.encoder.layer";

/// A finished run: what its adapter's configuration says, and its tensors.
struct Run {
    config: Value,
    kept: HashMap<String, Tensor>,
}

impl Run {
    /// Trains with `[adapter]` settings, and holds what was kept against what was trained: by its certificate, by its
    /// accuracy, and merged.
    fn new(task: &Task, name: &str, strategy: &str, settings: &[&str]) -> Run {
        let few = ["--strategy", strategy, "--epochs", "2", "--lr", "0.01"];
        let mut more = few.to_vec();
        for setting in settings {
            more.extend(["--set", setting]);
        }
        TRAINER.succeeds(task.train(&fixture("tiny-bert"), name, &more));
        let (dir, run) = (task.path(name), task.text(name));
        let verified = TRAINER.succeeds(["verify", &run]).out;
        assert!(
            verified.contains("frozen tensors are bit for bit"),
            "{name}"
        );
        let data = task.text("eval.jsonl");
        let said = TRAINER.succeeds(["eval", "--json", "--model", &run, "--data", &data]);
        let said: Value = serde_json::from_str(&said.out).unwrap();
        let best = records(&dir, "eval")
            .into_iter()
            .rfind(|record| record["best"] == true);
        assert_eq!(said["accuracy"], best.unwrap()["accuracy"], "{name}");
        let merged = task.text("merged");
        TRAINER.succeeds(["merge", "--model", &run, "--out", &merged]);
        let proof = json(&Path::new(&merged).join("merge.json"));
        let gap = proof["max_difference"].as_f64().unwrap();
        assert!(gap < 1e-4, "{name}: {proof}");
        Run {
            config: json(&dir.join("adapter_config.json")),
            kept: tensors(&dir.join("adapter_model.safetensors")),
        }
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        match self.kept.get(name) {
            Some(tensor) => tensor.shape().to_vec(),
            None => panic!("{name} is not among {:?}", self.kept.keys()),
        }
    }

    fn has(&self, part: &str) -> bool {
        self.kept.keys().any(|key| key.contains(part))
    }
}

#[test]
fn ranks_alphas_biases_and_modules_are_what_was_said() {
    let task = Task::new(48, 12);
    let run = Run::new(
        &task,
        "patterns",
        "lora",
        &[
            "adapter.rank=4",
            "adapter.alpha=10",
            "adapter.dropout=0.1",
            "adapter.targets=query,output.dense",
            r#"adapter.rank_pattern=["layer.0.*query 2", "output.dense 6"]"#,
            r#"adapter.alpha_pattern=["layer.1.*query 3"]"#,
            "adapter.bias=adapted",
            r#"adapter.modules_to_save=["pooler"]"#,
        ],
    );
    let query = |layer: usize| format!("{LAYER}.{layer}.attention.self.query");
    let shape = |name: String| run.shape(&name);
    assert_eq!(shape(format!("{}.lora_A.weight", query(0))), [2, 32]);
    assert_eq!(shape(format!("{}.lora_B.weight", query(0))), [32, 2]);
    assert_eq!(shape(format!("{}.lora_A.weight", query(1))), [4, 32]);
    for module in ["attention.output.dense", "output.dense"] {
        let at = format!("{LAYER}.1.{module}.lora_A.weight");
        assert_eq!(run.shape(&at)[0], 6, "{at}");
    }
    for kept in ["pooler.dense.weight", "classifier.bias"] {
        assert!(run.has(kept), "{kept}");
    }
    assert!(run.has("layer.0.attention.self.query.base_layer.bias"));
    assert!(!run.has("attention.self.value"));
    let c = &run.config;
    assert_eq!((&c["r"], &c["lora_dropout"]), (&json!(4), &json!(0.1)));
    assert_eq!(c["lora_alpha"].as_f64(), Some(10.0));
    let ranks = json!({"layer.0.*query": 2, "output.dense": 6});
    assert_eq!(c["rank_pattern"], ranks);
    let alpha = &c["alpha_pattern"]["layer.1.*query"];
    assert_eq!(alpha.as_f64(), Some(3.0));
    assert_eq!(c["bias"], "lora_only");
    let modules = c["modules_to_save"].as_array().unwrap();
    for module in ["classifier", "pooler"] {
        assert!(modules.contains(&json!(module)), "{modules:?}");
    }
}

#[test]
fn embeddings_every_linear_layer_and_chosen_layers_are_adapted() {
    let task = Task::new(48, 12);
    let words = Run::new(
        &task,
        "words",
        "rslora",
        &["adapter.rank=3", "adapter.targets=word_embeddings,query"],
    );
    let at = "base_model.model.bert.embeddings.word_embeddings";
    let rows = tensors(&fixture("tiny-bert").join("model.safetensors"));
    let rows = rows["bert.embeddings.word_embeddings.weight"].shape()[0];
    assert_eq!(words.shape(&format!("{at}.lora_embedding_A")), [3, rows]);
    assert_eq!(words.shape(&format!("{at}.lora_embedding_B")), [32, 3]);
    assert_eq!(words.config["use_rslora"], true);

    let all = Run::new(&task, "all", "lora", &["adapter.targets=all-linear"]);
    let adapted = all.kept.keys().filter(|key| key.contains("lora_A"));
    // Six in each of two layers, and the pooler.
    assert_eq!(adapted.count(), 13);
    let one = [
        "adapter.targets=all-linear",
        "adapter.layers=[1]",
        "adapter.init=orthogonal",
    ];
    let one = Run::new(&task, "one", "dora", &one);
    assert!(one.has("layer.1.intermediate.dense.lora_magnitude_vector"));
    assert!(!one.has("layer.0."));
    assert_eq!(one.config["layers_to_transform"], json!([1]));
    assert_eq!(one.config["use_dora"], true);
}

/// Each way to begin: with what is kept before anything moved, the base computes what it did, and what is trained from
/// there is kept as a change of the base's own weights.
#[test]
fn every_beginning_is_no_change_of_the_base() {
    let task = Task::new(48, 12);
    let data = task.text("eval.jsonl");
    // A rate that moves nothing: the head is new, so that its logits are those of the same head without an adapter.
    let train_still = |out: &str, strategy: &[&str]| {
        let few = ["--epochs", "1", "--lr", "1e-30", "--seed", "3"];
        let nothing = ["optimizer.weight_decay=0", "train.audit=false"];
        let mut more = [strategy, &few].concat();
        for setting in nothing {
            more.extend(["--set", setting]);
        }
        TRAINER.succeeds(task.train(&fixture("tiny-bert"), out, &more));
    };
    train_still("head", &["--strategy", "head"]);
    for init in ["kaiming", "gaussian", "orthogonal", "pissa"] {
        let setting = format!("adapter.init={init}");
        let run = Run::new(&task, init, "lora", &[&setting, "adapter.rank=4"]);
        // Of PiSSA's, twice the rank is kept: what was taken out of the weight is put back.
        let rank = if init == "pissa" { 8 } else { 4 };
        let query = format!("{LAYER}.0.attention.self.query.lora_A.weight");
        assert_eq!(run.shape(&query), [rank, 32], "{init}");
        let still = format!("{init}-still");
        train_still(&still, &["--strategy", "lora", "--set", &setting]);
        let logits = |run: &str| -> Vec<f64> {
            let run = task.text(run);
            let predict = ["predict", "--logits", "--data", &data, "--model", &run];
            let said = TRAINER.succeeds(predict).out;
            let row = |line: &str| {
                let row: Value = serde_json::from_str(line).unwrap();
                graft_tests::numbers(&row["logits"])
            };
            said.lines().flat_map(row).collect()
        };
        let gap = graft_tests::max_distance(&logits(&still), &logits("head"));
        assert!(gap < 1e-5, "{init}: {gap:e} from the base");
    }
}
