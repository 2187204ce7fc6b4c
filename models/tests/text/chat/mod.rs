//! Conversations through chat templates, against transformers.

mod conversations;
mod templates;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use graft_models::{ChatOptions, ChatTemplate, Error, ModelSource, Tokenizer};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::families::tokenizer;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures/chat")
        .join(name)
}

#[derive(Deserialize)]
struct Row {
    template: String,
    messages: Vec<Value>,
    variables: Map<String, Value>,
    tools: Option<Vec<Value>>,
    prompt: bool,
    text: Option<String>,
    error: Option<String>,
    ids: Option<Vec<u32>>,
    #[serde(default, deserialize_with = "present")]
    mask: Option<Option<Vec<u8>>>,
}

/// Tells null from absent.
fn present<'de, D: serde::Deserializer<'de>>(json: D) -> Result<Option<Option<Vec<u8>>>, D::Error> {
    Option::deserialize(json).map(Some)
}

fn rows() -> Vec<Row> {
    serde_json::from_slice(&fs::read(fixture("expected.json")).unwrap()).unwrap()
}

/// The tokenizer and the special tokens that go with a template, as in the fixture's script.
fn model(kind: &str) -> (Tokenizer, BTreeMap<String, String>) {
    let (name, tokens): (&str, &[(&str, &str)]) = match kind {
        "chatml" => (
            "qwen2",
            &[("eos_token", "<|im_end|>"), ("pad_token", "<|endoftext|>")],
        ),
        "chatml_generation" | "chatml_thinking" => ("qwen2", &[("eos_token", "<|im_end|>")]),
        "llama2" => (
            "llama2",
            &[
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("unk_token", "<unk>"),
            ],
        ),
        "llama3" => (
            "llama3",
            &[
                ("bos_token", "<|begin_of_text|>"),
                ("eos_token", "<|eot_id|>"),
            ],
        ),
        "gemma" => ("gemma", &[("bos_token", "<bos>"), ("eos_token", "<eos>")]),
        "mistral" => ("mistral", &[("bos_token", "<s>"), ("eos_token", "</s>")]),
        _ => (
            "gpt2",
            &[
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
            ],
        ),
    };
    let tokens = tokens
        .iter()
        .map(|(role, text)| (role.to_string(), text.to_string()))
        .collect();
    (tokenizer(name), tokens)
}

fn template(kind: &str) -> (Tokenizer, ChatTemplate) {
    let (t, tokens) = model(kind);
    let source = fs::read_to_string(fixture(&format!("{kind}.jinja"))).unwrap();
    (t, ChatTemplate::new(kind, &source, tokens).unwrap())
}

fn options(row: &Row) -> ChatOptions {
    ChatOptions {
        add_generation_prompt: row.prompt,
        tools: row.tools.clone(),
        variables: row.variables.clone(),
        ..ChatOptions::default()
    }
}

fn plain(source: &str) -> ChatTemplate {
    ChatTemplate::new("t.jinja", source, BTreeMap::new()).unwrap()
}

fn fails(source: &str) -> String {
    let messages = [json!({"role": "user", "content": "hello"})];
    let error = plain(source)
        .render(&messages, &ChatOptions::default())
        .unwrap_err();
    assert!(matches!(&error, Error::Template { .. }));
    let text = error.to_string();
    assert!(text.starts_with("t.jinja: ") && text.len() < 1000, "{text}");
    text
}
