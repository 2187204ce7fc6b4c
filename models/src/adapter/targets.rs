//! The layers that have an adapter where nothing else is said: those that PEFT takes for each family, so that an adapter
//! trained here and one trained there are of the same make.

use graft_nn::Parameters;

use crate::config::{DecoderConfig, DecoderFamily, Family, HeadConfig, ModelConfig, ProblemType};
use crate::decoder::Projections;
use crate::load::Stored;
use crate::masked::MaskedConfig;

/// What virtual tokens stand beside, and how wide they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontSizes {
    /// The end of the name of the words' embedding
    pub words: &'static str,
    /// The end of the names of the layers that make keys
    pub keys: &'static str,
    /// Layers
    pub layers: usize,
    /// Heads of queries
    pub heads: usize,
    /// Width of a token's hidden state
    pub hidden: usize,
    /// Heads of keys
    pub key_heads: usize,
    /// Width of a layer's keys, and of its values
    pub key_width: usize,
}

/// A family's usual targets.
pub trait Adaptable: Stored {
    /// LoRA's: the ends of the names of its modules.
    fn lora_targets(&self) -> &'static [&'static str];

    /// IA³'s, and those among them whose inputs are scaled.
    fn ia3_targets(&self) -> (&'static [&'static str], &'static [&'static str]);

    /// A bottleneck adapter's: the layers that write to the residual stream, one behind attention and one behind the
    /// feed-forward block.
    fn bottleneck_targets(&self) -> &'static [&'static str];

    /// A prompt's and a prefix's.
    fn front(&self) -> FrontSizes;

    /// What PEFT calls the task, of a model with a classification head if it `classifies`.
    fn task_type(&self, classifies: bool) -> Option<&'static str>;
}

impl Adaptable for ModelConfig {
    fn lora_targets(&self) -> &'static [&'static str] {
        match self.family {
            Family::Bert | Family::Roberta => &["query", "value"],
            Family::DistilBert => &["q_lin", "v_lin"],
        }
    }

    fn ia3_targets(&self) -> (&'static [&'static str], &'static [&'static str]) {
        match self.family {
            Family::Bert | Family::Roberta => {
                (&["key", "value", "output.dense"], &["output.dense"])
            }
            Family::DistilBert => (&["k_lin", "v_lin", "lin2"], &["lin2"]),
        }
    }

    fn bottleneck_targets(&self) -> &'static [&'static str] {
        match self.family {
            Family::Bert | Family::Roberta => &["output.dense"],
            Family::DistilBert => &["out_lin", "lin2"],
        }
    }

    fn front(&self) -> FrontSizes {
        FrontSizes {
            words: "word_embeddings",
            keys: self.family.names().key,
            layers: self.layers,
            heads: self.heads,
            hidden: self.hidden_size,
            key_heads: self.heads,
            key_width: self.hidden_size,
        }
    }

    fn task_type(&self, classifies: bool) -> Option<&'static str> {
        classifies.then(|| of_classifier(&self.head))
    }
}

impl Adaptable for DecoderConfig {
    fn lora_targets(&self) -> &'static [&'static str] {
        match self.family {
            DecoderFamily::Gpt2 => &["c_attn"],
            _ => &["q_proj", "v_proj"],
        }
    }

    fn ia3_targets(&self) -> (&'static [&'static str], &'static [&'static str]) {
        match self.family {
            DecoderFamily::Gpt2 => (&["c_attn", "mlp.c_proj"], &["mlp.c_proj"]),
            DecoderFamily::Llama | DecoderFamily::Mistral => {
                (&["k_proj", "v_proj", "down_proj"], &["down_proj"])
            }
            _ => (&["q_proj", "v_proj", "down_proj"], &["down_proj"]),
        }
    }

    fn bottleneck_targets(&self) -> &'static [&'static str] {
        match self.family {
            DecoderFamily::Gpt2 => &["c_proj"],
            _ => &["o_proj", "down_proj"],
        }
    }

    fn front(&self) -> FrontSizes {
        let names = self.family.names();
        FrontSizes {
            words: names.words,
            keys: match names.projections {
                Projections::Fused(name) => name,
                Projections::Apart([_, keys, _]) => keys,
            },
            layers: self.layers,
            heads: self.heads,
            hidden: self.hidden_size,
            key_heads: self.kv_heads,
            key_width: self.kv_heads * self.head_dim,
        }
    }

    fn task_type(&self, classifies: bool) -> Option<&'static str> {
        Some(match classifies {
            true => of_classifier(&self.head),
            false => "CAUSAL_LM",
        })
    }
}

impl Adaptable for MaskedConfig {
    fn lora_targets(&self) -> &'static [&'static str] {
        self.0.lora_targets()
    }

    fn ia3_targets(&self) -> (&'static [&'static str], &'static [&'static str]) {
        self.0.ia3_targets()
    }

    fn bottleneck_targets(&self) -> &'static [&'static str] {
        self.0.bottleneck_targets()
    }

    fn front(&self) -> FrontSizes {
        self.0.front()
    }

    fn task_type(&self, _: bool) -> Option<&'static str> {
        // PEFT has no name for it.
        None
    }
}

/// What PEFT calls a classifier's task: of texts...
pub(super) const TEXTS: &str = "SEQ_CLS";
/// ...and of tokens.
pub(super) const TOKENS: &str = "TOKEN_CLS";

fn of_classifier(head: &HeadConfig) -> &'static str {
    match head.problem() {
        ProblemType::Tokens => TOKENS,
        _ => TEXTS,
    }
}

/// The modules of a model's classification head, which no pretrained checkpoint holds: they are trained and kept with
/// an adapter.
pub fn head_modules(p: &Parameters, config: &impl Stored) -> Vec<String> {
    let mut modules: Vec<String> = Vec::new();
    for (_, parameter) in p.iter().filter(|(_, q)| config.is_task_specific(q.name())) {
        let module = parameter.name().split('.').next().unwrap_or_default();
        if !modules.iter().any(|known| known == module) {
            modules.push(module.to_owned());
        }
    }
    modules
}
