//! Typed values out of a config's keys, with errors that name file and key.

use graft_tensor::DType;
use serde_json::{Map, Value};

use super::{
    DTYPE_NAMES, DecoderFamily, Family, HiddenAct, Labels, MAX_LABELS, ProblemType,
    activation_named,
};
use crate::error::{Error, Result, Shown};
use crate::json::describe;

/// What `model_type` says.
pub(super) enum Architecture {
    Encoder(Family),
    Decoder(DecoderFamily),
}

/// Takes typed values out of a config, with errors that name file and key.
pub(super) struct Reader<'a> {
    pub(super) file: &'a str,
    pub(super) raw: &'a Map<String, Value>,
    /// In front of the keys in messages: where `raw` lies within the file
    within: String,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a str, raw: &'a Map<String, Value>) -> Reader<'a> {
        Reader {
            file,
            raw,
            within: String::new(),
        }
    }

    /// The object under `key`; `None` for null or nothing.
    pub(super) fn object(&self, key: &str) -> Result<Option<Reader<'a>>> {
        match self.raw.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(raw)) => Ok(Some(Reader {
                file: self.file,
                raw,
                within: format!("{}{key}.", self.within),
            })),
            Some(other) => {
                let help = "take the config.json that belongs to the checkpoint";
                Err(self.wrong(key, describe(other), "an object", help))
            }
        }
    }

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
            key: format!("{}{key}", self.within),
            found,
            expected: expected.into(),
            help: help.into(),
        }
    }

    /// The architecture; one that is not supported is named beside the `expected` families.
    pub(super) fn architecture(&self, expected: &[&str]) -> Result<Architecture> {
        let named = self.get("model_type").and_then(Value::as_str);
        let encoder = Family::ALL
            .into_iter()
            .find(|f| named == Some(f.model_type()))
            .map(Architecture::Encoder);
        let decoder = DecoderFamily::ALL
            .into_iter()
            .find(|f| named == Some(f.model_type()))
            .map(Architecture::Decoder);
        encoder.or(decoder).ok_or_else(|| {
            self.wrong(
                "model_type",
                self.found("model_type"),
                format!("one of {}", expected.join(", ")),
                "use a model of one of these families",
            )
        })
    }

    pub(super) fn encoder_family(&self) -> Result<Family> {
        let supported = Family::ALL.map(Family::model_type);
        match self.architecture(&supported)? {
            Architecture::Encoder(family) => Ok(family),
            Architecture::Decoder(_) => {
                let supported = supported.join(", ");
                Err(self.wrong(
                    "model_type",
                    self.found("model_type"),
                    format!("an encoder, one of {supported}"),
                    "use a model of one of these families",
                ))
            }
        }
    }

    pub(super) fn decoder_family(&self) -> Result<DecoderFamily> {
        let supported = DecoderFamily::ALL.map(DecoderFamily::model_type);
        match self.architecture(&supported)? {
            Architecture::Decoder(family) => Ok(family),
            Architecture::Encoder(_) => Err(self.wrong(
                "model_type",
                self.found("model_type"),
                format!("a decoder, one of {}", supported.join(", ")),
                "use a model of one of these families",
            )),
        }
    }

    /// Things that would silently compute something else.
    pub(super) fn refuse_unsupported_encoders(&self) -> Result<()> {
        let absolute = Value::from("absolute");
        self.only("position_embedding_type", &[&absolute], "\"absolute\"")?;
        for key in ["is_decoder", "add_cross_attention"] {
            let expected = "false: only encoders are supported";
            self.only(key, &[&Value::Bool(false)], expected)?;
        }
        let none = Value::Object(Map::new());
        self.only("pruned_heads", &[&none], "no pruned heads")?;
        self.refuse_quantised()
    }

    pub(super) fn refuse_quantised(&self) -> Result<()> {
        match self.get("quantization_config") {
            None | Some(Value::Null) => Ok(()),
            Some(other) => {
                let help = "use the checkpoint in full precision";
                Err(self.wrong(
                    "quantization_config",
                    describe(other),
                    "no quantisation",
                    help,
                ))
            }
        }
    }

    /// Refuses every value of a key but null, nothing, and those that are `supported`.
    pub(super) fn only(&self, key: &str, supported: &[&Value], expected: &str) -> Result<()> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if supported.contains(&value) => Ok(()),
            Some(other) => Err(self.wrong(
                key,
                describe(other),
                expected,
                "use a checkpoint without it",
            )),
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

    /// As [`Reader::size`]; `None` for null or nothing.
    pub(super) fn optional_size(&self, spellings: &[&str], max: u64) -> Result<Option<usize>> {
        let stated = |key: &&str| self.get(key).is_some_and(|value| !value.is_null());
        if spellings.iter().any(stated) {
            self.size(spellings, max).map(Some)
        } else {
            Ok(None)
        }
    }

    /// True or false; `default` for null or nothing.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => {
                let help = "take the config.json that belongs to the checkpoint";
                Err(self.wrong(key, describe(other), "true or false", help))
            }
        }
    }

    /// A number above 0; `None` for null or nothing.
    pub(super) fn factor(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|x| *x > 0.0 && *x < 1e12) {
                Some(x) => Ok(Some(x)),
                None => {
                    let help = "take the config.json that belongs to the checkpoint";
                    Err(self.wrong(key, describe(value), "a number above 0", help))
                }
            },
        }
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

    pub(super) fn activation(&self, key: &str, default: HiddenAct) -> Result<HiddenAct> {
        match self.get(key) {
            None => Ok(default),
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
                let named = value.as_str().and_then(|s| {
                    let mut stated = ProblemType::STATED.into_iter();
                    stated.find(|(name, _)| *name == s)
                });
                named.map(|(_, problem)| Some(problem)).ok_or_else(|| {
                    let names = ProblemType::STATED.map(|(name, _)| name).join(", ");
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
