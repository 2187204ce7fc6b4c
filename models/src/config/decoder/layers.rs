//! What a decoder's config says about its layers, and what it must not say.

use serde_json::{Map, Value};

use super::family::{Defaults, Keys};
use super::{DecoderFamily, LayerKind, Positions};
use crate::config::read::Reader;
use crate::config::rope::{ORIGINAL_POSITIONS, RopeParameters, base, refuse_partial};
use crate::config::{HiddenAct, MAX_HIDDEN, MAX_POSITIONS, MAX_VOCAB};
use crate::error::Result;
use crate::json::describe;

/// Things that would silently compute something else.
pub(super) fn refuse_unsupported(read: &Reader) -> Result<()> {
    for (key, expected) in [
        ("add_cross_attention", "false: there is no encoder beside"),
        ("is_encoder_decoder", "false: there is no encoder beside"),
        ("use_bidirectional_attention", "false: attention is causal"),
    ] {
        read.only(key, &[&Value::Bool(false)], expected)?;
    }
    for key in ["pruned_heads", "per_layer_config"] {
        let none = Value::Object(Map::new());
        read.only(key, &[&none], "none: layers are alike")?;
    }
    if read.decoder_family()? == DecoderFamily::Gemma3 {
        let expected = "null: Gemma 3 has no cap there";
        read.only("attn_logit_softcapping", &[], expected)?;
    }
    let expected = "true: a head that labels tokens has a bias";
    read.only("token_classification_bias", &[&Value::Bool(true)], expected)?;
    refuse_partial(read)?;
    read.refuse_quantised()
}

pub(super) fn kv_heads(read: &Reader, defaults: &Defaults, heads: usize) -> Result<usize> {
    let key = "num_key_value_heads";
    let default = match read.get(key) {
        None => defaults.kv_heads.unwrap_or(heads),
        Some(_) => heads,
    };
    let kv_heads = read.optional_size(&[key], MAX_HIDDEN)?.unwrap_or(default);
    if heads.is_multiple_of(kv_heads) {
        return Ok(kv_heads);
    }
    let expected = format!("a divisor of the {heads} query heads");
    let help = "correct the one that does not fit the checkpoint";
    Err(read.wrong(key, kv_heads.to_string(), expected, help))
}

pub(super) fn head_dim(
    read: &Reader,
    defaults: &Defaults,
    keys: &Keys,
    hidden: usize,
    heads: usize,
) -> Result<usize> {
    let default = match read.get("head_dim") {
        None => defaults.head_dim,
        Some(_) => None,
    };
    let stated = read.optional_size(&["head_dim"], MAX_HIDDEN)?.or(default);
    if let Some(head_dim) = stated {
        return Ok(head_dim);
    }
    if hidden.is_multiple_of(heads) {
        return Ok(hidden / heads);
    }
    let found = format!("{heads} heads for a width of {hidden}");
    let help = "correct the one that does not fit the checkpoint";
    Err(read.wrong(keys.heads[0], found, "a divisor of the width", help))
}

/// The nonlinearity; a gated layer has three to choose from.
pub(super) fn hidden_act(
    read: &Reader,
    keys: &Keys,
    defaults: &Defaults,
    gpt2: bool,
) -> Result<HiddenAct> {
    let act = read.activation(keys.hidden_act, defaults.hidden_act)?;
    if !gpt2 && matches!(act, HiddenAct::Relu | HiddenAct::Tanh) {
        let expected = "silu, gelu, gelu_pytorch_tanh or another name for one of these";
        let help = "use a checkpoint with one of these";
        return Err(read.wrong(keys.hidden_act, read.found(keys.hidden_act), expected, help));
    }
    Ok(act)
}

/// What the layers see, and the window of those that do not see everything.
pub(super) fn layer_kinds(
    read: &Reader,
    family: DecoderFamily,
    layers: usize,
) -> Result<(Vec<LayerKind>, Option<usize>)> {
    let window_key = "sliding_window";
    let (has_window, default_window) = match family {
        DecoderFamily::Gpt2 | DecoderFamily::Llama => (false, None),
        DecoderFamily::Qwen2 | DecoderFamily::Qwen3 => {
            (read.flag("use_sliding_window", false)?, Some(4096))
        }
        _ => (true, Some(4096)),
    };
    let window = match read.get(window_key) {
        _ if !has_window => None,
        None => default_window,
        Some(_) => read.optional_size(&[window_key], 1 << 32)?,
    };
    let pattern = |full: &dyn Fn(usize) -> bool| -> Vec<LayerKind> {
        let kind = |i| match window.is_none() || full(i) {
            true => LayerKind::Full,
            false => LayerKind::Sliding,
        };
        (0..layers).map(kind).collect()
    };
    let implied = match family {
        DecoderFamily::Gpt2 | DecoderFamily::Llama => pattern(&|_| true),
        DecoderFamily::Mistral => pattern(&|_| false),
        DecoderFamily::Qwen2 | DecoderFamily::Qwen3 => {
            let first = match read.get("max_window_layers") {
                None => 28,
                Some(_) => read.number("max_window_layers", 0, u64::from(u32::MAX))?,
            };
            pattern(&|i| i < first)
        }
        DecoderFamily::Gemma2 => pattern(&|i| i % 2 == 1),
        DecoderFamily::Gemma3 => {
            let every = read
                .optional_size(&["sliding_window_pattern"], 1 << 32)?
                .unwrap_or(6);
            pattern(&|i| (i + 1) % every == 0)
        }
    };
    let key = "layer_types";
    let kinds = match read.get(key) {
        None | Some(Value::Null) => return Ok((implied, window)),
        // transformers does not look at this key in GPT-2.
        Some(_) if family == DecoderFamily::Gpt2 => return Ok((implied, window)),
        Some(Value::Array(list)) => list
            .iter()
            .map(|value| {
                let named = |name: &str| LayerKind::NAMES.into_iter().find(|(n, _)| *n == name);
                let kind = value.as_str().and_then(named).map(|(_, kind)| kind);
                kind.ok_or_else(|| {
                    let expected = "full_attention or sliding_attention for each layer";
                    let help = "use a checkpoint with these";
                    read.wrong(key, describe(value), expected, help)
                })
            })
            .collect::<Result<Vec<_>>>()?,
        Some(other) => {
            let help = "take the config.json that belongs to the checkpoint";
            return Err(read.wrong(key, describe(other), "a list of names", help));
        }
    };
    let help = "correct or remove it";
    if kinds.len() != layers {
        let expected = format!("{layers} entries, one for each layer");
        return Err(read.wrong(key, format!("{} entries", kinds.len()), expected, help));
    }
    let fixed = matches!(family, DecoderFamily::Llama | DecoderFamily::Mistral);
    if fixed && kinds != implied {
        let expected = format!("the same for every layer: {family} has no other");
        return Err(read.wrong(key, read.found(key), expected, help));
    }
    if window.is_none() && kinds.contains(&LayerKind::Sliding) {
        let found = format!("no window for the {key} that have one");
        return Err(read.wrong(window_key, found, "a number of tokens", help));
    }
    Ok((kinds, window))
}

/// Base and scaling of rotary positions, as version 4 spells them or as version 5 does.
pub(super) fn rotary(
    read: &Reader,
    family: DecoderFamily,
    defaults: &Defaults,
    head_dim: usize,
    max_positions: usize,
) -> Result<Positions> {
    if !head_dim.is_multiple_of(2) {
        let help = "take the config.json that belongs to the checkpoint";
        let expected = "an even number: dimensions are rotated in pairs";
        return Err(read.wrong("head_dim", head_dim.to_string(), expected, help));
    }
    let (five, four) = (
        read.object("rope_parameters")?,
        read.object("rope_scaling")?,
    );
    if five.is_some() && four.is_some() {
        let expected = "nothing beside `rope_parameters`, which says the same";
        return Err(read.wrong(
            "rope_scaling",
            read.found("rope_scaling"),
            expected,
            "remove one of the two",
        ));
    }
    let theta = base(read, "rope_theta")?.unwrap_or(defaults.theta);
    let original = read.optional_size(&[ORIGINAL_POSITIONS], MAX_POSITIONS)?;
    let positions = (max_positions, original);
    if family != DecoderFamily::Gemma3 {
        let full = RopeParameters::read(five.or(four).as_ref(), theta, positions)?;
        let sliding = full;
        return Ok(Positions::Rotary { full, sliding });
    }
    let local = base(read, "rope_local_base_freq")?.unwrap_or(1e4);
    let (full, sliding) = match five {
        Some(five) => (
            five.object("full_attention")?,
            five.object("sliding_attention")?,
        ),
        None => (four, None),
    };
    Ok(Positions::Rotary {
        full: RopeParameters::read(full.as_ref(), theta, positions)?,
        sliding: RopeParameters::read(sliding.as_ref(), local, positions)?,
    })
}

/// One token id or a list of them; none for null, nothing, and the -1 of some old configs.
pub(super) fn tokens(read: &Reader, key: &str) -> Result<Vec<usize>> {
    let id = |value: &Value| {
        let id = value.as_u64().filter(|id| *id < MAX_VOCAB);
        id.map(|id| id as usize).ok_or_else(|| {
            let help = "take the config.json that belongs to the checkpoint";
            read.wrong(key, describe(value), "a token id", help)
        })
    };
    match read.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(value) if value.as_i64() == Some(-1) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}
