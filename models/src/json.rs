//! JSON objects from strangers' files: read with duplicate keys refused, at every level.
//!
//! `serde_json` keeps the last of two equal keys without a word. A config that says `"hidden_size"` twice means two
//! different models to two different readers, so here it is an error that names the key and its place.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::{Error, Result, Shown};

/// Parses `bytes` as one JSON object without duplicate keys, followed by nothing but white space.
pub(crate) fn parse_object(file: &str, bytes: &[u8]) -> Result<Map<String, Value>> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = Strict
        .deserialize(&mut json)
        .and_then(|value| json.end().map(|()| value))
        .map_err(|e| Error::json(file, &e))?;
    match value {
        Value::Object(map) => Ok(map),
        other => Err(Error::Json {
            file: file.to_string(),
            line: 1,
            column: 1,
            reason: format!("expected an object `{{...}}`, found {}", describe(&other)),
        }),
    }
}

/// A value in a few words, for messages: its kind, and what it says if that is short.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_string(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => format!("\"{}\"", Shown(s)),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(map) => format!("an object of {} keys", map.len()),
    }
}

/// Builds a [`Value`], refusing duplicate keys.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: de::Error>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_u64<E: de::Error>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_i64<E: de::Error>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }

    fn visit_f64<E: de::Error>(self, v: f64) -> Result<Value, E> {
        Number::from_f64(v)
            .map(Value::Number)
            .ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E: de::Error>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_string()))
    }

    fn visit_string<E: de::Error>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = seq.next_element_seed(Strict)? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                let key = Shown(&key);
                return Err(de::Error::custom(format!(
                    "the key `{key}` occurs twice; remove one of them"
                )));
            }
            let value = entries.next_value_seed(Strict)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// Sets top-level keys of a JSON object to `null`, leaving every other byte as it is.
///
/// Parsing and printing again would be simpler, but may change the last digit of a unigram score; a tokenizer that
/// is copied should be the tokenizer that was loaded. `bytes` must already have been parsed as one object: the scan
/// relies on it being well formed. Keys written with escapes are not recognised (no known writer does that).
pub(crate) fn null_top_level(bytes: &[u8], keys: &[&str]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut depth = 0usize;
    // The string last seen at depth 1, if it can still turn out to be a key.
    let mut last_string: Option<&[u8]> = None;
    // Set while the value of one of `keys` is being dropped.
    let mut dropping = false;
    let mut i = 0;
    while i < bytes.len() {
        let start = i;
        i += 1;
        match bytes[start] {
            b'"' => {
                while i < bytes.len() && bytes[i] != b'"' {
                    i += if bytes[i] == b'\\' { 2 } else { 1 };
                }
                i = (i + 1).min(bytes.len());
                if depth == 1 && !dropping {
                    last_string = bytes.get(start + 1..i - 1);
                }
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    dropping = false;
                }
            }
            b',' if depth == 1 => {
                dropping = false;
                last_string = None;
            }
            b':' if depth == 1 && !dropping => {
                let key = last_string.take();
                if key.is_some_and(|key| keys.iter().any(|k| k.as_bytes() == key)) {
                    out.extend_from_slice(b":null");
                    dropping = true;
                    continue;
                }
            }
            _ => {}
        }
        if !dropping {
            out.extend_from_slice(&bytes[start..i]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_keys_are_found_at_every_level() {
        let error = parse_object("c.json", br#"{"a": 1, "b": {"x": [ {"y": 1, "y": 1} ]}}"#)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("c.json") && error.contains("`y` occurs twice"),
            "{error}"
        );
        assert!(parse_object("c.json", br#"{"a": {"b": 1}, "b": {"a": 1}}"#).is_ok());
    }

    #[test]
    fn a_file_that_is_no_json_is_to_be_taken_again_or_mended() {
        let said = parse_object("config.json", b"{\n\"model_type\": bert}").unwrap_err();
        assert_eq!(
            said.to_string(),
            "config.json: line 2, column 15: expected value; take the file again from where the model came from, or \
             mend it there"
        );
    }

    #[test]
    fn objects_only_and_nothing_after_them() {
        assert!(
            parse_object("c", b"[1]")
                .unwrap_err()
                .to_string()
                .contains("a list of 1")
        );
        assert!(parse_object("c", b"{} {}").is_err());
        assert!(parse_object("c", b"").is_err());
        assert!(
            parse_object("c", &[b'['; 100_000]).is_err(),
            "deep nesting is an error, not a stack overflow"
        );
    }

    #[test]
    fn values_survive() {
        let text = r#"{"a":[null,true,-3,18446744073709551615,0.5,1e-12,"é\n"],"b":{}}"#;
        let map = parse_object("c", text.as_bytes()).unwrap();
        assert_eq!(
            Value::Object(map),
            serde_json::from_str::<Value>(text).unwrap()
        );
    }

    #[test]
    fn nulling_touches_only_the_named_top_level_values() {
        let text = r#"{ "version":"1.0", "truncation" : {"a":"}\"]","b":[1,{"c":2}]},
 "padding":[1,2] ,"model":{"truncation":{"x":1},"s":[1.10, 1e-05]},"t":"padding","u":["padding"], "v" :1}"#;
        let out = null_top_level(text.as_bytes(), &["truncation", "padding"]);
        let expected = r#"{ "version":"1.0", "truncation" :null,
 "padding":null,"model":{"truncation":{"x":1},"s":[1.10, 1e-05]},"t":"padding","u":["padding"], "v" :1}"#;
        let squeeze = |s: &str| s.split_whitespace().collect::<String>();
        assert_eq!(
            squeeze(std::str::from_utf8(&out).unwrap()),
            squeeze(expected)
        );
        let mut value: Value = serde_json::from_str(text).unwrap();
        value["truncation"] = Value::Null;
        value["padding"] = Value::Null;
        assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), value);
    }

    #[test]
    fn nulling_the_last_value_keeps_the_brace() {
        assert_eq!(
            null_top_level(br#"{"a":1,"padding":{"x":[]}}"#, &["padding"]),
            br#"{"a":1,"padding":null}"#
        );
        assert_eq!(
            null_top_level(br#"{"padding":null}"#, &["padding"]),
            br#"{"padding":null}"#
        );
        assert_eq!(
            null_top_level(br#"{"padding":"a,b"}"#, &["padding"]),
            br#"{"padding":null}"#
        );
        assert_eq!(
            null_top_level(br#"{"a":"padding"}"#, &["padding"]),
            br#"{"a":"padding"}"#
        );
    }
}
