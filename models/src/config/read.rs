//! Typed values out of a config's keys, with errors that name file and key.

use graft_tensor::DType;
use serde_json::{Map, Value};

use super::{DTYPE_NAMES, Family, HiddenAct, Labels, MAX_LABELS, ProblemType, activation_named};
use crate::error::{Error, Result, Shown};
use crate::json::describe;

/// Takes typed values out of a config, with errors that name file and key.
pub(super) struct Reader<'a> {
    pub(super) file: &'a str,
    pub(super) raw: &'a Map<String, Value>,
}

impl Reader<'_> {
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.raw.get(key)
    }

    pub(super) fn found(&self, key: &str) -> String {
        self.get(key)
            .map_or_else(|| "nothing".to_string(), describe)
    }

    pub(super) fn wrong(
        &self,
        key: &str,
        found: String,
        expected: impl Into<String>,
        help: impl Into<String>,
    ) -> Error {
        Error::Config {
            file: self.file.to_string(),
            key: key.to_string(),
            found,
            expected: expected.into(),
            help: help.into(),
        }
    }

    pub(super) fn family(&self) -> Result<Family> {
        let named = self.get("model_type").and_then(Value::as_str);
        Family::ALL
            .into_iter()
            .find(|f| named == Some(f.model_type()))
            .ok_or_else(|| {
                let supported = Family::ALL.map(Family::model_type).join(", ");
                let help = "use a model of one of these families";
                self.wrong(
                    "model_type",
                    self.found("model_type"),
                    format!("one of {supported}"),
                    help,
                )
            })
    }

    /// Things that would silently compute something else.
    pub(super) fn refuse_unsupported(&self) -> Result<()> {
        let help = "use a checkpoint without it";
        match self.get("position_embedding_type") {
            None | Some(Value::Null) => {}
            Some(Value::String(kind)) if kind == "absolute" => {}
            Some(other) => {
                return Err(self.wrong(
                    "position_embedding_type",
                    describe(other),
                    "\"absolute\"",
                    help,
                ));
            }
        }
        for key in ["is_decoder", "add_cross_attention"] {
            match self.get(key) {
                None | Some(Value::Null | Value::Bool(false)) => {}
                Some(other) => {
                    return Err(self.wrong(
                        key,
                        describe(other),
                        "false: only encoders are supported",
                        help,
                    ));
                }
            }
        }
        match self.get("pruned_heads") {
            None | Some(Value::Null) => {}
            Some(Value::Object(heads)) if heads.is_empty() => {}
            Some(other) => {
                let expected = "no pruned heads";
                return Err(self.wrong("pruned_heads", describe(other), expected, help));
            }
        }
        match self.get("quantization_config") {
            None | Some(Value::Null) => Ok(()),
            Some(other) => {
                let expected = "no quantisation";
                Err(self.wrong(
                    "quantization_config",
                    describe(other),
                    expected,
                    "use the checkpoint in full precision",
                ))
            }
        }
    }

    /// A whole number from 1 to `max` under the first spelling that is there; all that are there must agree.
    pub(super) fn size(&self, spellings: &[&str], max: u64) -> Result<usize> {
        let mut value = None;
        for key in spellings.iter().filter(|key| self.raw.contains_key(**key)) {
            let this = self.number(key, 1, max)?;
            if let Some(other) = value.replace(this).filter(|other| *other != this) {
                let expected = format!("{other}, as under `{}`", spellings[0]);
                return Err(self.wrong(key, this.to_string(), expected, "remove one of the two"));
            }
        }
        value.ok_or_else(|| {
            let expected = format!("a whole number from 1 to {max}");
            self.wrong(
                spellings[0],
                "nothing".to_string(),
                expected,
                "take the config.json that belongs to the checkpoint",
            )
        })
    }

    pub(super) fn number(&self, key: &str, min: u64, max: u64) -> Result<usize> {
        self.get(key)
            .and_then(Value::as_u64)
            .filter(|n| (min..=max).contains(n))
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| {
                let expected = format!("a whole number from {min} to {max}");
                self.wrong(
                    key,
                    self.found(key),
                    expected,
                    "take the config.json that belongs to the checkpoint",
                )
            })
    }

    /// A probability below 1; `None` for null or nothing.
    pub(super) fn rate(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|p| (0.0..1.0).contains(p)) {
                Some(p) => Ok(Some(p)),
                None => Err(self.wrong(
                    key,
                    describe(value),
                    "a number from 0 to below 1",
                    "0 turns dropout off",
                )),
            },
        }
    }

    /// A number above 0 and at most 1; `None` for nothing.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|x| *x > 0.0 && *x <= 1.0) {
                Some(x) => Ok(Some(x)),
                None => {
                    let help = "take the config.json that belongs to the checkpoint";
                    Err(self.wrong(key, describe(value), "a number above 0 and at most 1", help))
                }
            },
        }
    }

    pub(super) fn activation(&self, key: &str) -> Result<HiddenAct> {
        match self.get(key) {
            None => Ok(HiddenAct::Gelu),
            Some(value) => value.as_str().and_then(activation_named).ok_or_else(|| {
                let supported = HiddenAct::NAMES.map(|(name, _)| name).join(", ");
                self.wrong(
                    key,
                    describe(value),
                    format!("one of {supported}"),
                    "use a checkpoint with one of these",
                )
            }),
        }
    }

    pub(super) fn labels(&self) -> Result<Labels> {
        let count_key = ["num_labels", "_num_labels"]
            .into_iter()
            .find(|key| self.raw.contains_key(*key));
        let count = count_key
            .map(|key| self.number(key, 1, MAX_LABELS as u64))
            .transpose()?;
        let labels = match self.get("id2label") {
            None | Some(Value::Null) => count.map_or_else(Labels::default, Labels::numbered),
            Some(Value::Object(names)) => {
                let mut by_id = vec![None; names.len()];
                for (id, name) in names {
                    let slot = id.parse::<usize>().ok().and_then(|id| by_id.get_mut(id));
                    match (slot, name) {
                        (Some(slot @ None), Value::String(name)) => *slot = Some(name.clone()),
                        _ => {
                            let found = format!("\"{}\": {}", Shown(id), describe(name));
                            let expected =
                                format!("a string for each id from 0 to {}", names.len() - 1);
                            return Err(self.wrong(
                                "id2label",
                                found,
                                expected,
                                "number the labels without gaps",
                            ));
                        }
                    }
                }
                Labels::checked(by_id.into_iter().flatten().collect(), self.file)?
            }
            Some(other) => {
                let expected = "an object of labels by id";
                return Err(self.wrong(
                    "id2label",
                    describe(other),
                    expected,
                    "write {\"0\": \"first label\", ...}",
                ));
            }
        };
        if let (Some(key), Some(count)) = (count_key, count)
            && count != labels.count()
        {
            let expected = format!("{}, the number of labels in `id2label`", labels.count());
            return Err(self.wrong(key, count.to_string(), expected, "remove it"));
        }
        match self.get("label2id") {
            None | Some(Value::Null) => {}
            Some(Value::Object(ids)) => {
                let agree = |name: &String, id: &Value| {
                    id.as_u64()
                        .and_then(|id| labels.names.get(usize::try_from(id).ok()?))
                        == Some(name)
                };
                if let Some((name, id)) = ids.iter().find(|(name, id)| !agree(name, id)) {
                    let found = format!("\"{}\": {}", Shown(name), describe(id));
                    return Err(self.wrong(
                        "label2id",
                        found,
                        "the inverse of `id2label`",
                        "correct or remove it",
                    ));
                }
                if ids.len() != labels.count() {
                    let expected = format!("{}, as in `id2label`", labels.count());
                    return Err(self.wrong(
                        "label2id",
                        format!("{} labels", ids.len()),
                        expected,
                        "correct or remove it",
                    ));
                }
            }
            Some(other) => {
                let expected = "an object of ids by label";
                return Err(self.wrong("label2id", describe(other), expected, "remove it"));
            }
        }
        Ok(labels)
    }

    pub(super) fn problem_type(&self) -> Result<Option<ProblemType>> {
        match self.get("problem_type") {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let named = value
                    .as_str()
                    .and_then(|s| ProblemType::ALL.into_iter().find(|p| p.name() == s));
                named.map(Some).ok_or_else(|| {
                    let names = ProblemType::ALL.map(ProblemType::name).join(", ");
                    self.wrong(
                        "problem_type",
                        describe(value),
                        format!("one of {names}"),
                        "correct or remove it",
                    )
                })
            }
        }
    }

    pub(super) fn architectures(&self) -> Result<Vec<String>> {
        let wrong = |value: &Value| {
            self.wrong(
                "architectures",
                describe(value),
                "a list of class names",
                "correct or remove it",
            )
        };
        match self.get("architectures") {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(value @ Value::Array(list)) => list
                .iter()
                .map(|name| {
                    name.as_str()
                        .map(str::to_string)
                        .ok_or_else(|| wrong(value))
                })
                .collect(),
            Some(other) => Err(wrong(other)),
        }
    }

    pub(super) fn dtype(&self) -> Result<Option<DType>> {
        let mut dtype = None;
        for key in ["dtype", "torch_dtype"] {
            let Some(value) = self.get(key).filter(|v| !v.is_null()) else {
                continue;
            };
            let name = value
                .as_str()
                .map(|s| s.strip_prefix("torch.").unwrap_or(s));
            let Some((_, this)) = DTYPE_NAMES.into_iter().find(|(n, _)| name == Some(n)) else {
                let names = DTYPE_NAMES.map(|(n, _)| n).join(", ");
                return Err(self.wrong(
                    key,
                    describe(value),
                    format!("one of {names}"),
                    "correct or remove it",
                ));
            };
            if dtype.replace(this).is_some_and(|other| other != this) {
                let expected = format!("the same as `dtype`, {}", self.found("dtype"));
                return Err(self.wrong(key, describe(value), expected, "remove one of the two"));
            }
        }
        Ok(dtype)
    }
}
