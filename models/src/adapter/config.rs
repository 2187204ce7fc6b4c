//! `adapter_config.json`, read and written.

use graft_nn::adapters::{AdapterConfig, Bias, LowRankConfig, LowRankInit, Method, Targets};
use serde_json::{Map, Value, json};

use super::targets::{TEXTS, TOKENS};
use super::{ADAPTER_CONFIG_FILE, FrontSizes};
use crate::error::{Error, Result};
use crate::json::{describe, parse_object};
use crate::source::ModelSource;

/// Most entries of a list or a table, and most bytes of a name in one: the largest models have some thousands of
/// modules.
const MAX_ENTRIES: usize = 100_000;
const MAX_NAME: usize = 4096;

/// What `peft_type` is where PEFT has no such adapter.
const BOTTLENECK: &str = "GRAFT_BOTTLENECK";

/// Keys that say nothing about what an adapter computes.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "init_ia3_weights",
    "lora_ga_config",
    "megatron_core",
    "monteclora_config",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    // What a prompt or a prefix began as, and was the product of.
    "encoder_hidden_size",
    "init_weights",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
    // They follow from the model.
    "num_attention_heads",
    "num_layers",
    // Which way round a weight is stored follows from the model.
    "fan_in_fan_out",
];

/// An adapter's configuration as PEFT has it.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredAdapter {
    /// What stands beside which layers
    pub config: AdapterConfig,
    /// The model that it was trained on, as its author named it
    pub base: Option<String>,
    /// PEFT's name of the task, such as `SEQ_CLS`
    pub task_type: Option<String>,
}

impl StoredAdapter {
    /// Whether it is a classifier's: a head is kept with it.
    pub fn classifies(&self) -> bool {
        let task = self.task_type.as_deref();
        task.is_some_and(|task| [TEXTS, TOKENS].contains(&task))
    }

    /// Whether it is a classifier's of tokens.
    pub fn classifies_tokens(&self) -> bool {
        self.task_type.as_deref() == Some(TOKENS)
    }

    /// Reads `adapter_config.json` of a directory.
    ///
    /// # Errors
    /// No such file, or one that [`StoredAdapter::parse`] refuses.
    pub fn load(source: &ModelSource) -> Result<StoredAdapter> {
        let help = "name the directory that PEFT or `trainer train` wrote an adapter to";
        let text = source.require_file(ADAPTER_CONFIG_FILE, help)?;
        StoredAdapter::parse(&source.display_file(ADAPTER_CONFIG_FILE), &text)
    }

    /// Parses an `adapter_config.json`, called `file` in messages.
    ///
    /// # Errors
    /// Text that is no JSON object; values of the wrong kind; methods, and settings that change what an adapter
    /// computes, that are not supported.
    pub fn parse(file: &str, text: &[u8]) -> Result<StoredAdapter> {
        let raw = parse_object(file, text)?;
        let mut keys = Keys {
            file,
            raw: &raw,
            seen: WITHOUT_EFFECT.to_vec(),
        };
        let kind = keys.text("peft_type")?;
        let method = match kind.as_deref() {
            Some("LORA") => Method::LowRank(low_rank(&mut keys)?),
            Some("IA3") => Method::Ia3 {
                feedforward: keys.list("feedforward_modules")?.unwrap_or_default(),
            },
            Some(kind @ ("PROMPT_TUNING" | "PREFIX_TUNING")) => {
                let help = "take the adapter_config.json that PEFT wrote with the weights";
                let count = keys.count("num_virtual_tokens")?;
                let Some(tokens) = count else {
                    return Err(keys.wrong("num_virtual_tokens", "a whole number", help));
                };
                if keys.count("num_transformer_submodules")?.unwrap_or(1) != 1 {
                    let help = "an encoder and a decoder in one model are not supported";
                    return Err(keys.wrong("num_transformer_submodules", "1", help));
                }
                let width = keys.count("token_dim")?;
                match (kind, width) {
                    ("PROMPT_TUNING", _) => Method::Prompt { tokens },
                    (_, Some(width)) => Method::Prefix {
                        tokens,
                        width,
                        projection: None,
                    },
                    _ => return Err(keys.wrong("token_dim", "a whole number", help)),
                }
            }
            Some(BOTTLENECK) => {
                let help = "take the adapter_config.json that was written with the weights";
                if keys.text("activation")?.as_deref() != Some("gelu") {
                    return Err(keys.wrong("activation", "\"gelu\"", help));
                }
                match keys.count("bottleneck_size")? {
                    Some(size) => Method::Bottleneck { size },
                    None => return Err(keys.wrong("bottleneck_size", "a whole number", help)),
                }
            }
            _ => {
                let help = "convert it with PEFT, or merge it into its base there";
                let expected = "\"LORA\", \"IA3\", \"PROMPT_TUNING\" or \"PREFIX_TUNING\"";
                return Err(keys.wrong("peft_type", expected, help));
            }
        };
        let targets = match raw.get("target_modules") {
            // They follow from the model.
            None if method.virtual_tokens() > 0 => Targets::Names(Vec::new()),
            Some(Value::String(all)) if all.eq_ignore_ascii_case("all-linear") => {
                Targets::AllLinear
            }
            Some(Value::String(regex)) if regex.len() <= MAX_NAME => Targets::Regex(regex.clone()),
            _ => match keys.list("target_modules")? {
                Some(names) => Targets::Names(names),
                None => {
                    let help = "take the adapter_config.json that PEFT wrote with the weights";
                    return Err(keys.wrong("target_modules", "a list of names", help));
                }
            },
        };
        keys.seen.push("target_modules");
        let bias = match keys.text("bias")?.as_deref() {
            None | Some("none") => Bias::None,
            Some("all") => Bias::All,
            Some("lora_only") => Bias::Adapted,
            Some(_) => {
                let expected = "\"none\", \"all\" or \"lora_only\"";
                return Err(keys.wrong("bias", expected, "correct it"));
            }
        };
        let layers = match raw.get("layers_to_transform") {
            Some(Value::Number(n)) => n.as_u64().map(|n| vec![n as usize]),
            _ => keys.numbers("layers_to_transform")?,
        };
        let layers_pattern = match raw.get("layers_pattern") {
            Some(Value::String(one)) if one.is_empty() => Vec::new(),
            Some(Value::String(one)) => vec![one.clone()],
            _ => keys.list("layers_pattern")?.unwrap_or_default(),
        };
        keys.seen.extend(["layers_to_transform", "layers_pattern"]);
        let stored = StoredAdapter {
            config: AdapterConfig {
                method,
                targets,
                exclude: keys.list("exclude_modules")?.unwrap_or_default(),
                layers,
                layers_pattern,
                modules_to_save: keys.list("modules_to_save")?.unwrap_or_default(),
                bias,
            },
            base: keys.text("base_model_name_or_path")?,
            task_type: keys.text("task_type")?,
        };
        keys.nothing_else()?;
        Ok(stored)
    }

    /// The text of the `adapter_config.json`, which PEFT reads if it has such adapters. `full` are the names of all adapted
    /// modules, and of those whose inputs are scaled; `transposed` says that weights are stored as `[in, out]`; `sizes`
    /// are the model's.
    pub fn to_json(&self, full: [&[String]; 2], transposed: bool, sizes: &FrontSizes) -> String {
        let c = &self.config;
        let or_null = |list: &[String]| match list {
            [] => Value::Null,
            list => json!(list),
        };
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| {
            map.insert(key.to_owned(), value);
        };
        put("base_model_name_or_path", json!(self.base));
        let front = c.method.virtual_tokens();
        if front == 0 {
            put("bias", json!(bias_name(c.bias)));
            put("exclude_modules", or_null(&c.exclude));
            put("fan_in_fan_out", json!(transposed));
        } else {
            put("num_virtual_tokens", json!(front));
            put("num_layers", json!(sizes.layers));
            put("num_transformer_submodules", json!(1));
        }
        put("inference_mode", json!(true));
        put("modules_to_save", or_null(&c.modules_to_save));
        put("revision", Value::Null);
        put("task_type", json!(self.task_type));
        let targets = match &c.targets {
            Targets::Names(names) => json!(names),
            Targets::Regex(regex) => json!(regex),
            Targets::AllLinear => json!(full[0]),
        };
        match &c.method {
            Method::LowRank(l) => {
                put("peft_type", json!("LORA"));
                put("target_modules", targets);
                put("r", json!(l.rank));
                put("lora_alpha", number(l.alpha));
                put("lora_dropout", json!(l.dropout));
                put("use_rslora", json!(l.rank_stabilised));
                put("use_dora", json!(l.magnitude));
                let ranks = l.rank_pattern.iter().map(|(k, v)| (k.clone(), json!(v)));
                put("rank_pattern", Value::Object(ranks.collect()));
                let alphas = l.alpha_pattern.iter().map(|(k, v)| (k.clone(), number(*v)));
                put("alpha_pattern", Value::Object(alphas.collect()));
                put("layers_to_transform", json!(c.layers));
                put("layers_pattern", or_null(&c.layers_pattern));
                put(
                    "init_lora_weights",
                    match l.init {
                        // PiSSA's is written as the change of the base as it was.
                        LowRankInit::Kaiming | LowRankInit::Pissa => json!(true),
                        LowRankInit::Gaussian => json!("gaussian"),
                        LowRankInit::Orthogonal => json!("orthogonal"),
                    },
                );
            }
            Method::Prompt { .. } => {
                put("peft_type", json!("PROMPT_TUNING"));
                // How PEFT would begin a new one: nothing to these.
                put("prompt_tuning_init", json!("RANDOM"));
                put("num_attention_heads", json!(sizes.heads));
                put("token_dim", json!(sizes.hidden));
            }
            Method::Prefix { width, .. } => {
                put("peft_type", json!("PREFIX_TUNING"));
                put("prefix_projection", json!(false));
                put("encoder_hidden_size", json!(width));
                put("num_attention_heads", json!(sizes.key_heads));
                put("token_dim", json!(width));
            }
            Method::Bottleneck { size } => {
                put("peft_type", json!(BOTTLENECK));
                put("target_modules", targets);
                put("bottleneck_size", json!(size));
                put("activation", json!("gelu"));
                put("layers_to_transform", json!(c.layers));
                put("layers_pattern", or_null(&c.layers_pattern));
            }
            Method::Ia3 { feedforward } => {
                put("peft_type", json!("IA3"));
                put("init_ia3_weights", json!(true));
                // PEFT wants the second list to be a part of the first.
                let part = |names: &Vec<String>| feedforward.iter().all(|f| names.contains(f));
                match &c.targets {
                    Targets::Names(names) if part(names) => {
                        put("target_modules", json!(names));
                        put("feedforward_modules", json!(feedforward));
                    }
                    _ => {
                        put("target_modules", json!(full[0]));
                        put("feedforward_modules", json!(full[1]));
                    }
                }
            }
        }
        map.sort_keys();
        format!("{:#}\n", Value::Object(map))
    }
}

fn bias_name(bias: Bias) -> &'static str {
    match bias {
        Bias::None => "none",
        Bias::All => "all",
        Bias::Adapted => "lora_only",
    }
}

/// A whole number without a fraction, as PEFT writes an alpha.
fn number(x: f64) -> Value {
    match x.fract() == 0.0 && x.abs() < 1e15 {
        true => json!(x as i64),
        false => json!(x),
    }
}

fn low_rank(keys: &mut Keys) -> Result<LowRankConfig> {
    // Beginnings that change the base: the weights in the file then belong to another base than the one that is named.
    let init = match keys.value("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => LowRankInit::Kaiming,
        Some(Value::String(s)) if s == "gaussian" => LowRankInit::Gaussian,
        Some(Value::String(s)) if s == "orthogonal" => LowRankInit::Orthogonal,
        Some(Value::String(s)) if s == "eva" => LowRankInit::Kaiming,
        Some(_) => {
            let help = "such a beginning changes the base: save the adapter in PEFT with \
                        path_initial_model_for_weight_conversion";
            let expected = "true, false, \"gaussian\", \"orthogonal\" or \"eva\"";
            return Err(keys.wrong("init_lora_weights", expected, help));
        }
    };
    keys.seen.push("loftq_config");
    Ok(LowRankConfig {
        rank: keys.count("r")?.unwrap_or(8),
        alpha: keys.number("lora_alpha")?.unwrap_or(8.0),
        rank_stabilised: keys.flag("use_rslora")?,
        magnitude: keys.flag("use_dora")?,
        dropout: keys.number("lora_dropout")?.unwrap_or(0.0),
        rank_pattern: keys.table("rank_pattern", "a whole number", |v| {
            v.as_u64().map(|n| n as usize)
        })?,
        alpha_pattern: keys.table("alpha_pattern", "a number", Value::as_f64)?,
        init,
    })
}

/// The keys of a file, and which of them were read.
struct Keys<'a> {
    file: &'a str,
    raw: &'a Map<String, Value>,
    seen: Vec<&'static str>,
}

impl<'a> Keys<'a> {
    fn wrong(&self, key: &str, expected: &str, help: &str) -> Error {
        Error::Config {
            file: self.file.to_owned(),
            key: key.to_owned(),
            found: self
                .raw
                .get(key)
                .map_or_else(|| "nothing".to_owned(), describe),
            expected: expected.to_owned(),
            help: help.to_owned(),
        }
    }

    /// What stands under a key; null counts as nothing.
    fn value(&mut self, key: &'static str) -> Option<&'a Value> {
        self.seen.push(key);
        self.raw.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.wrong(key, expected, "correct it")),
            },
        }
    }

    fn text(&mut self, key: &'static str) -> Result<Option<String>> {
        self.read(key, "a text", |v| v.as_str().map(str::to_owned))
    }

    fn flag(&mut self, key: &'static str) -> Result<bool> {
        let found = self.read(key, "true or false", Value::as_bool)?;
        Ok(found.unwrap_or(false))
    }

    fn number(&mut self, key: &'static str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    fn count(&mut self, key: &'static str) -> Result<Option<usize>> {
        self.read(key, "a whole number", |v| v.as_u64().map(|n| n as usize))
    }

    fn numbers(&mut self, key: &'static str) -> Result<Option<Vec<usize>>> {
        self.read(key, "a list of whole numbers", |value| {
            let list = value.as_array().filter(|list| list.len() <= MAX_ENTRIES)?;
            list.iter()
                .map(|v| v.as_u64().map(|n| n as usize))
                .collect()
        })
    }

    fn list(&mut self, key: &'static str) -> Result<Option<Vec<String>>> {
        self.read(key, "a list of names", |value| {
            let list = value.as_array().filter(|list| list.len() <= MAX_ENTRIES)?;
            let name = |v: &Value| {
                let name = v.as_str().filter(|s| s.len() <= MAX_NAME)?;
                Some(name.to_owned())
            };
            list.iter().map(name).collect()
        })
    }

    fn table<T>(
        &mut self,
        key: &'static str,
        of: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>> {
        let expected = format!("an object whose values are each {of}");
        let found = self.read(key, &expected, |value| {
            let map = value.as_object().filter(|map| map.len() <= MAX_ENTRIES)?;
            map.iter()
                .map(|(name, v)| {
                    let name = Some(name).filter(|name| name.len() <= MAX_NAME)?;
                    Some((name.clone(), read(v)?))
                })
                .collect()
        })?;
        Ok(found.unwrap_or_default())
    }

    /// Refuses every other key that is in use: what it would do is not known.
    fn nothing_else(&self) -> Result<()> {
        let idle = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::String(text) => text.is_empty(),
            _ => false,
        };
        let used =
            |(key, value): &(&String, &Value)| !self.seen.contains(&key.as_str()) && !idle(value);
        match self.raw.iter().find(used) {
            None => Ok(()),
            Some((key, _)) => {
                let help =
                    "this setting is not supported: train without it, or merge the adapter in PEFT";
                Err(self.wrong(key, "null, false or nothing", help))
            }
        }
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
