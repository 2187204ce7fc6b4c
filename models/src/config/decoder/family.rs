//! The decoder families: how each spells its keys, and what it assumes.

use std::fmt;

use crate::config::HiddenAct;

/// A family of decoders that share their layers and the names of their tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DecoderFamily {
    /// GPT-2 (Radford et al. 2019): learned positions, layer norms, a fused projection stored `[in, out]`.
    Gpt2,
    /// Llama 2 (Touvron et al. 2023) and 3: rotary positions, RMS norms, SwiGLU.
    Llama,
    /// Mistral (Jiang et al. 2023): Llama with a sliding window.
    Mistral,
    /// Qwen 2: Llama with biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: Llama with norms on queries and keys.
    Qwen3,
    /// Gemma 2 (Gemma Team 2024): four norms a layer, GeGLU, soft caps, every other layer with a window.
    Gemma2,
    /// The text model of Gemma 3: norms on queries and keys in place of soft caps, two bases of rotary positions.
    Gemma3,
}

impl DecoderFamily {
    pub(in crate::config) const ALL: [DecoderFamily; 7] = [
        DecoderFamily::Gpt2,
        DecoderFamily::Llama,
        DecoderFamily::Mistral,
        DecoderFamily::Qwen2,
        DecoderFamily::Qwen3,
        DecoderFamily::Gemma2,
        DecoderFamily::Gemma3,
    ];

    /// `model_type` in config.json.
    pub fn model_type(self) -> &'static str {
        match self {
            DecoderFamily::Gpt2 => "gpt2",
            DecoderFamily::Llama => "llama",
            DecoderFamily::Mistral => "mistral",
            DecoderFamily::Qwen2 => "qwen2",
            DecoderFamily::Qwen3 => "qwen3",
            DecoderFamily::Gemma2 => "gemma2",
            DecoderFamily::Gemma3 => "gemma3_text",
        }
    }

    /// The class of transformers that predicts tokens with this decoder.
    pub fn causal_architecture(self) -> &'static str {
        match self {
            DecoderFamily::Gpt2 => "GPT2LMHeadModel",
            DecoderFamily::Llama => "LlamaForCausalLM",
            DecoderFamily::Mistral => "MistralForCausalLM",
            DecoderFamily::Qwen2 => "Qwen2ForCausalLM",
            DecoderFamily::Qwen3 => "Qwen3ForCausalLM",
            DecoderFamily::Gemma2 => "Gemma2ForCausalLM",
            DecoderFamily::Gemma3 => "Gemma3ForCausalLM",
        }
    }

    /// The class of transformers that puts a classification head on this decoder.
    pub fn classification_architecture(self) -> &'static str {
        match self {
            DecoderFamily::Gpt2 => "GPT2ForSequenceClassification",
            DecoderFamily::Llama => "LlamaForSequenceClassification",
            DecoderFamily::Mistral => "MistralForSequenceClassification",
            DecoderFamily::Qwen2 => "Qwen2ForSequenceClassification",
            DecoderFamily::Qwen3 => "Qwen3ForSequenceClassification",
            DecoderFamily::Gemma2 => "Gemma2ForSequenceClassification",
            DecoderFamily::Gemma3 => "Gemma3TextForSequenceClassification",
        }
    }

    /// The class of transformers that puts a classification head on each token of this decoder, if there is one.
    pub fn token_classification_architecture(self) -> Option<&'static str> {
        match self {
            DecoderFamily::Gpt2 => Some("GPT2ForTokenClassification"),
            DecoderFamily::Llama => Some("LlamaForTokenClassification"),
            DecoderFamily::Mistral => Some("MistralForTokenClassification"),
            DecoderFamily::Qwen2 => Some("Qwen2ForTokenClassification"),
            DecoderFamily::Qwen3 => Some("Qwen3ForTokenClassification"),
            DecoderFamily::Gemma2 => Some("Gemma2ForTokenClassification"),
            DecoderFamily::Gemma3 => None,
        }
    }

    pub(super) fn is_gemma(self) -> bool {
        matches!(self, DecoderFamily::Gemma2 | DecoderFamily::Gemma3)
    }

    /// How this family spells the keys; the first spelling is the one written.
    pub(super) fn keys(self) -> Keys {
        match self {
            // transformers accepts the general names too, through the class's attribute map.
            DecoderFamily::Gpt2 => Keys {
                hidden_size: &["n_embd", "hidden_size"],
                layers: &["n_layer", "num_hidden_layers"],
                heads: &["n_head", "num_attention_heads"],
                intermediate_size: &["n_inner"],
                max_positions: &["n_positions", "max_position_embeddings"],
                hidden_act: "activation_function",
                norm_eps: "layer_norm_epsilon",
                attention_dropout: "attn_pdrop",
            },
            _ => Keys {
                hidden_size: &["hidden_size"],
                layers: &["num_hidden_layers"],
                heads: &["num_attention_heads"],
                intermediate_size: &["intermediate_size"],
                max_positions: &["max_position_embeddings"],
                hidden_act: match self.is_gemma() {
                    true => "hidden_activation",
                    false => "hidden_act",
                },
                norm_eps: "rms_norm_eps",
                attention_dropout: "attention_dropout",
            },
        }
    }

    /// What transformers assumes when a config does not state it.
    pub(super) fn defaults(self) -> Defaults {
        let llama = Defaults {
            kv_heads: None,
            head_dim: None,
            hidden_act: HiddenAct::Silu,
            norm_eps: 1e-6,
            tied: false,
            theta: 1e4,
        };
        match self {
            DecoderFamily::Gpt2 => Defaults {
                hidden_act: HiddenAct::GeluTanh,
                norm_eps: 1e-5,
                tied: true,
                ..llama
            },
            DecoderFamily::Llama => llama,
            DecoderFamily::Mistral => Defaults {
                kv_heads: Some(8),
                ..llama
            },
            DecoderFamily::Qwen2 => Defaults {
                kv_heads: Some(32),
                ..llama
            },
            DecoderFamily::Qwen3 => Defaults {
                kv_heads: Some(32),
                head_dim: Some(128),
                ..llama
            },
            DecoderFamily::Gemma2 | DecoderFamily::Gemma3 => Defaults {
                kv_heads: Some(4),
                head_dim: Some(256),
                hidden_act: HiddenAct::GeluTanh,
                tied: true,
                theta: match self {
                    DecoderFamily::Gemma3 => 1e6,
                    _ => 1e4,
                },
                ..llama
            },
        }
    }
}

pub(super) struct Keys {
    pub hidden_size: &'static [&'static str],
    pub layers: &'static [&'static str],
    pub heads: &'static [&'static str],
    pub intermediate_size: &'static [&'static str],
    pub max_positions: &'static [&'static str],
    pub hidden_act: &'static str,
    pub norm_eps: &'static str,
    pub attention_dropout: &'static str,
}

pub(super) struct Defaults {
    /// As many as query heads, if there is no number
    pub kv_heads: Option<usize>,
    /// Hidden size over heads, if there is no number
    pub head_dim: Option<usize>,
    pub hidden_act: HiddenAct,
    pub norm_eps: f64,
    pub tied: bool,
    pub theta: f64,
}

impl fmt::Display for DecoderFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}
