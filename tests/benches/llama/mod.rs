//! A model of the size of Llama 3 8B, frozen, with LoRA of rank 16 beside every linear layer but the head.
//!
//! Weights repeat a block of random numbers: to draw eight billion would take longer than the steps.

use graft_models::{CausalLm, DecoderConfig};
use graft_nn::adapters::{DEFAULT, finish, rules};
use graft_nn::{FreezePolicy, Parameters, Role, TrainableSet};
use graft_tensor::ops::random::{self, Key};
use graft_tensor::ops::{cast, quantise, write_rows};
use graft_tensor::{Category, DType, Memory, Tensor};
use graft_trainer::adapter::put;
use graft_trainer::config::{AdapterKind, AdapterSettings, TargetSetting};

pub const VOCABULARY: usize = 128_256;
const RANK: usize = 16;
/// Elements that are drawn.
const BLOCK: usize = 1 << 22;

const CONFIG: &str = r#"{
  "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
  "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
  "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
  "tie_word_embeddings": false, "attention_dropout": 0.0
}"#;

/// The model, its linear layers held in `base`, and what is trained. Embedding, head and norms are f32.
pub fn adapted(p: &mut Parameters, base: DType) -> (CausalLm, TrainableSet) {
    let config = DecoderConfig::parse("config.json", CONFIG.as_bytes()).expect("valid");
    let lm = CausalLm::new(p, &config).expect("supported");
    let memory = p.memory().clone();
    let block = Block::draw(&memory);
    let all: Vec<_> = p
        .iter()
        .map(|(id, one)| (id, one.role(), *one.shape()))
        .collect();
    let mut codes: Vec<Tensor> = Vec::new();
    for (id, role, shape) in all {
        let [rows, columns] = shape[..] else {
            continue; // norms
        };
        let linear = matches!(role, Role::Linear(_));
        let value = match (linear, base.is_quantised()) {
            (true, true) => {
                // On this machine, once for each shape.
                let found = codes.iter().position(|codes| *codes.shape() == shape);
                let at = found.unwrap_or_else(|| {
                    let here = memory.on_cpu();
                    let numbers = Block::draw(&here).fill(&here, DType::F32, [rows, columns]);
                    codes.push(quantise(&here, &numbers, base).expect("finite"));
                    codes.len() - 1
                });
                codes[at].to_memory(&memory).expect("it fits")
            }
            (true, false) => block.fill(&memory, base, [rows, columns]),
            _ => block.fill(&memory, DType::F32, [rows, columns]),
        };
        if linear {
            p.hold(id, base).expect("a linear layer");
        }
        p.set(id, value).expect("of its shape");
    }
    let settings = AdapterSettings {
        rank: Some(RANK),
        targets: Some(TargetSetting::AllLinear),
        ..AdapterSettings::usual(AdapterKind::Lora)
    };
    put(p, &config, AdapterKind::Lora, &settings).expect("it fits");
    p.initialise(0).expect("memory suffices");
    finish(p, DEFAULT, 0).expect("LoRA begins by itself");
    let rules = rules(p, DEFAULT);
    let set = FreezePolicy { rules }.resolve(p).expect("adapters");
    (lm, set)
}

/// Normal numbers of standard deviation 0.02, to be repeated.
struct Block(Tensor);

impl Block {
    fn draw(memory: &Memory) -> Block {
        let memory = memory.with(Category::Workspace);
        let numbers = random::normal(&memory, Key::new(0, 0, 0), &[BLOCK], 0.0, 0.02);
        Block(numbers.expect("memory suffices"))
    }

    fn fill(&self, memory: &Memory, dtype: DType, [rows, columns]: [usize; 2]) -> Tensor {
        let scratch = memory.with(Category::Workspace);
        let block = cast(&scratch, &self.0, dtype).expect("a float type");
        let some = BLOCK / columns;
        let block = block.narrow(0, 0, some * columns).expect("no more");
        let block = block.reshape(&[some, columns]).expect("as many");
        let mut all = Tensor::empty(memory, dtype, &[rows, columns]).expect("it fits");
        for first in (0..rows).step_by(some) {
            let some = block.narrow(0, 0, some.min(rows - first)).expect("no more");
            write_rows(memory, &mut all, first, &some).expect("rows of it");
        }
        all
    }
}
