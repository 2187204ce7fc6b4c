//! How each family spells the names of the same tensors.

use crate::config::Family;

/// The names of a family's modules, without `.weight` and `.bias`.
pub(crate) struct Names {
    /// In front of every tensor of the encoder in a model with a head
    pub prefix: &'static str,
    pub layer: &'static str,
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    pub attention_output: &'static str,
    pub attention_norm: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    pub output_norm: &'static str,
}

impl Family {
    pub(crate) fn names(self) -> Names {
        let bert = Names {
            prefix: "bert.",
            layer: "encoder.layer",
            query: "attention.self.query",
            key: "attention.self.key",
            value: "attention.self.value",
            attention_output: "attention.output.dense",
            attention_norm: "attention.output.LayerNorm",
            up: "intermediate.dense",
            down: "output.dense",
            output_norm: "output.LayerNorm",
        };
        match self {
            Family::Bert => bert,
            Family::Roberta => Names {
                prefix: "roberta.",
                ..bert
            },
            Family::DistilBert => Names {
                prefix: "distilbert.",
                layer: "transformer.layer",
                query: "attention.q_lin",
                key: "attention.k_lin",
                value: "attention.v_lin",
                attention_output: "attention.out_lin",
                attention_norm: "sa_layer_norm",
                up: "ffn.lin1",
                down: "ffn.lin2",
                output_norm: "output_layer_norm",
            },
        }
    }
}

/// Tensors that checkpoints hold beside an encoder and its classification head, and that a
/// classifier has no use for: buffers that can be computed, and the heads of pretraining.
pub(crate) fn is_dispensable(name: &str) -> bool {
    const BUFFERS: [&str; 2] = ["embeddings.position_ids", "embeddings.token_type_ids"];
    const HEADS: [&str; 6] = [
        "cls.",
        "lm_head.",
        "vocab_transform.",
        "vocab_layer_norm.",
        "vocab_projector.",
        "qa_outputs.",
    ];
    BUFFERS.iter().any(|buffer| {
        name.strip_suffix(buffer)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }) || HEADS.iter().any(|head| name.starts_with(head))
}

/// TensorFlow's names of a norm's weight and bias, which old checkpoints still carry.
pub(crate) fn modern(name: &str) -> String {
    if let Some(rest) = name.strip_suffix("LayerNorm.gamma") {
        return format!("{rest}LayerNorm.weight");
    }
    if let Some(rest) = name.strip_suffix("LayerNorm.beta") {
        return format!("{rest}LayerNorm.bias");
    }
    name.to_owned()
}
