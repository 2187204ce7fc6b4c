//! How each family spells the names of the same tensors.

use crate::config::DecoderFamily;

/// The names of a family's modules, without `.weight` and `.bias`.
pub(crate) struct Names {
    /// In front of every tensor of the decoder in a model with a head
    pub prefix: &'static str,
    pub words: &'static str,
    pub positions: &'static str,
    pub layer: &'static str,
    pub attention_norm: &'static str,
    pub projections: Projections,
    pub attention_output: &'static str,
    /// Of queries and keys, where there are any
    pub query_norm: &'static str,
    pub key_norm: &'static str,
    /// Of what the attention gives, where there is one (Gemma)
    pub attention_output_norm: &'static str,
    pub mlp_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    /// Of what the feed-forward layer gives, where there is one (Gemma)
    pub mlp_output_norm: &'static str,
    pub final_norm: &'static str,
}

/// Queries, keys and values side by side in one tensor, or in three.
pub(crate) enum Projections {
    Fused(&'static str),
    Apart([&'static str; 3]),
}

/// The matrix of the logits, where it is not the token embedding.
pub(crate) const LM_HEAD: &str = "lm_head";
/// The classification head.
pub(crate) const SCORE: &str = "score";
/// GPT-2's over tokens.
pub(crate) const CLASSIFIER: &str = "classifier";

impl DecoderFamily {
    pub(crate) fn names(self) -> Names {
        let llama = Names {
            prefix: "model.",
            words: "embed_tokens",
            positions: "",
            layer: "layers",
            attention_norm: "input_layernorm",
            projections: Projections::Apart([
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
            ]),
            attention_output: "self_attn.o_proj",
            query_norm: "self_attn.q_norm",
            key_norm: "self_attn.k_norm",
            attention_output_norm: "post_attention_layernorm",
            mlp_norm: "post_attention_layernorm",
            gate: "mlp.gate_proj",
            up: "mlp.up_proj",
            down: "mlp.down_proj",
            mlp_output_norm: "post_feedforward_layernorm",
            final_norm: "norm",
        };
        match self {
            DecoderFamily::Gpt2 => Names {
                prefix: "transformer.",
                words: "wte",
                positions: "wpe",
                layer: "h",
                attention_norm: "ln_1",
                projections: Projections::Fused("attn.c_attn"),
                attention_output: "attn.c_proj",
                mlp_norm: "ln_2",
                up: "mlp.c_fc",
                down: "mlp.c_proj",
                final_norm: "ln_f",
                ..llama
            },
            DecoderFamily::Llama
            | DecoderFamily::Mistral
            | DecoderFamily::Qwen2
            | DecoderFamily::Qwen3 => llama,
            DecoderFamily::Gemma2 | DecoderFamily::Gemma3 => Names {
                mlp_norm: "pre_feedforward_layernorm",
                ..llama
            },
        }
    }

    /// Tensors that checkpoints hold although they can be computed.
    pub(crate) fn is_buffer(self, name: &str) -> bool {
        // The causal mask of GPT-2, with and without what is added to hidden scores; the frequencies of rotary
        // positions, which old versions of transformers kept with each layer.
        const GPT2: [&str; 2] = ["attn.bias", "attn.masked_bias"];
        const ROTARY: [&str; 1] = ["rotary_emb.inv_freq"];
        let buffers = match self {
            DecoderFamily::Gpt2 => &GPT2[..],
            _ => &ROTARY[..],
        };
        buffers.iter().any(|buffer| {
            name.strip_suffix(buffer)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
    }
}
