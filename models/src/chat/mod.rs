//! Conversations as a model's own template writes them, and which of their tokens are the assistant's.
//!
//! A chat model comes with a Jinja template that turns a list of messages into text: `chat_template.jinja`, or the
//! key `chat_template` of tokenizer_config.json. [`ChatTemplate`] renders it as transformers does (the same settings,
//! names and filters, see `python.rs`) with `minijinja`. A template is a stranger's program: it can reach nothing but
//! the messages; fuel bounds its time and its memory, and a clock what the engine does without paying (`guard.rs`).
//! [`ChatTemplate::supervise`] finds the tokens to learn from.

use std::collections::BTreeMap;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior, Value as Jinja};
use serde_json::{Map, Value};

use crate::error::{Error, Result, Shown, some_of};
use crate::json::{describe, parse_object};
use crate::tokenizer::{CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, Tokenizer};

mod concat;
mod generation;
mod guard;
mod python;
mod supervise;

pub use supervise::Supervised;

/// Fuel of one rendering, beside one for each byte of its input: an instruction costs 1, and so do 64 bytes of data
/// that the template makes. The templates of published models take less than a thousand for a message.
const FUEL: u64 = 2_000_000;

/// Nested blocks and calls; a macro costs several.
const RECURSION: usize = 200;

/// Longest template, in bytes. The longest published ones have some 20 000.
const MAX_TEMPLATE: usize = 1 << 20;

/// The template that is used unless there is a reason for another.
const DEFAULT: &str = "default";

/// The template for conversations with tools, in models that have one for it alone.
const TOOL_USE: &str = "tool_use";

/// A model's chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    /// How messages call the template.
    file: String,
    environment: Environment<'static>,
    /// Templates that mark the assistant's part with `{% generation %}`.
    marked: Vec<String>,
    /// `bos_token`, `eos_token` and the like.
    tokens: BTreeMap<String, String>,
}

/// What a conversation is rendered with, beside its messages.
#[derive(Clone, Debug)]
pub struct ChatOptions {
    /// Whether the text ends where the assistant's answer would begin.
    pub add_generation_prompt: bool,
    /// Descriptions of tools, as JSON schemas.
    pub tools: Option<Vec<Value>>,
    /// Further variables that the template may know, such as `enable_thinking`. They overrule special tokens.
    pub variables: Map<String, Value>,
    /// What `strftime_now` takes for now (in UTC).
    pub now: SystemTime,
}

impl Default for ChatOptions {
    fn default() -> ChatOptions {
        ChatOptions {
            add_generation_prompt: false,
            tools: None,
            variables: Map::new(),
            now: SystemTime::now(),
        }
    }
}

impl ChatTemplate {
    /// The template that came with a tokenizer: chat_template.jinja, or else that of tokenizer_config.json, which may
    /// be one or a list of named ones. `None` if the model has none.
    ///
    /// # Errors
    /// [`Error::Template`] if it is not what it should be or not Jinja; [`Error::Json`].
    pub fn of(tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
        let tokens = tokenizer.special_tokens().clone();
        if let Some(bytes) = tokenizer.companion(CHAT_TEMPLATE_FILE) {
            let source = std::str::from_utf8(bytes).map_err(|_| {
                let help = "fetch the model again";
                error(CHAT_TEMPLATE_FILE, "it is not UTF-8".to_string(), help)
            })?;
            return Self::new(CHAT_TEMPLATE_FILE, source, tokens).map(Some);
        }
        let Some(bytes) = tokenizer.companion(TOKENIZER_CONFIG_FILE) else {
            return Ok(None);
        };
        let config = parse_object(TOKENIZER_CONFIG_FILE, bytes)?;
        let file = format!("{TOKENIZER_CONFIG_FILE}: chat_template");
        match config.get("chat_template") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(source)) => Self::new(&file, source, tokens).map(Some),
            Some(Value::Array(list)) => {
                let named = list.iter().map(|entry| {
                    let text = |key: &str| entry.get(key).and_then(Value::as_str);
                    match (text("name"), text("template")) {
                        (Some(name), Some(source)) => Ok((name, source)),
                        _ => {
                            let reason = format!("an entry of the list is {}", describe(entry));
                            Err(error(&file, reason, "give each a `name` and a `template`"))
                        }
                    }
                });
                let named = named.collect::<Result<Vec<_>>>()?;
                Self::with_names(&file, &named, tokens).map(Some)
            }
            Some(other) => {
                let reason = format!("found {}, expected a string", describe(other));
                Err(error(&file, reason, "fetch the model again"))
            }
        }
    }

    /// A template from its text. `file` stands for it in messages; `tokens` are the special tokens by role
    /// ([`Tokenizer::special_tokens`]).
    ///
    /// # Errors
    /// [`Error::Template`] if it is not Jinja.
    pub fn new(file: &str, source: &str, tokens: BTreeMap<String, String>) -> Result<ChatTemplate> {
        Self::with_names(file, &[(DEFAULT, source)], tokens)
    }

    fn with_names(
        file: &str,
        named: &[(&str, &str)],
        tokens: BTreeMap<String, String>,
    ) -> Result<ChatTemplate> {
        let mut template = ChatTemplate {
            file: file.to_string(),
            environment: environment(file)?,
            marked: Vec::new(),
            tokens,
        };
        for &(name, source) in named {
            if source.len() > MAX_TEMPLATE {
                let reason = format!("{} bytes, where {MAX_TEMPLATE} are the most", source.len());
                return Err(error(file, reason, "this is no chat template"));
            }
            // As Jinja reads them.
            let source = source.replace("\r\n", "\n").replace('\r', "\n");
            let (source, marked) = generation::rewrite(&source)
                .map_err(|reason| error(file, reason, "remove the character from the template"))?;
            let source = concat::rewrite(&source);
            if marked {
                template.marked.push(name.to_string());
            }
            template
                .environment
                .add_template_owned(name.to_string(), source)
                .map_err(|e| {
                    template.explain(&e, "correct the template, or use another model's")
                })?;
        }
        if !named.iter().any(|(name, _)| *name == DEFAULT) {
            let names: Vec<&str> = named.iter().map(|(name, _)| *name).collect();
            let reason = format!(
                "no template is named `{DEFAULT}`, there are {}",
                some_of(&names)
            );
            return Err(error(file, reason, "name one of them so"));
        }
        Ok(template)
    }

    /// The text of a conversation. Each message is an object with at least a `role`; keys that are null count as
    /// absent.
    ///
    /// # Errors
    /// [`Error::Template`] if a message is none, or the template fails, refuses the conversation or does not end.
    pub fn render(&self, messages: &[Value], options: &ChatOptions) -> Result<String> {
        self.render_marked(messages, options).map(|(text, _)| text)
    }

    /// The text, and the bytes of it that the template marks as the assistant's; `None` if it marks nothing.
    fn render_marked(
        &self,
        messages: &[Value],
        options: &ChatOptions,
    ) -> Result<(String, Option<Vec<std::ops::Range<usize>>>)> {
        let messages = messages
            .iter()
            .enumerate()
            .map(|(i, message)| self.message(i, message))
            .collect::<Result<Vec<Value>>>()?;
        let mut context: Map<String, Value> = self
            .tokens
            .iter()
            .map(|(role, text)| (role.clone(), Value::String(text.clone())))
            .collect();
        context.extend(options.variables.clone());
        context.insert(
            "tools".to_string(),
            options.tools.clone().map_or(Value::Null, Value::Array),
        );
        context.insert("documents".to_string(), Value::Null);
        context.insert(
            "add_generation_prompt".to_string(),
            options.add_generation_prompt.into(),
        );
        context.insert("messages".to_string(), Value::Array(messages));
        let context = Value::Object(context);
        let len = context.to_string().len();
        let name = match options.tools.is_some() && self.environment.get_template(TOOL_USE).is_ok()
        {
            true => TOOL_USE,
            false => DEFAULT,
        };
        let marked = self.marked.iter().any(|m| m == name);
        if marked && generation::has_mark(&context) {
            let reason = "a message holds U+FDD0 or U+FDD1, which mark the assistant's part and are no characters";
            return Err(error(
                &self.file,
                reason.to_string(),
                "remove them from the data",
            ));
        }
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + len as u64));
        python::set_clock(&mut environment, options.now);
        let rendered = guard::render(environment, name, Jinja::from(Serde(&context)))
            .map_err(|e| self.explain(&e, "correct the messages, or the template"))?;
        match marked {
            false => Ok((rendered, None)),
            true => match generation::spans(&rendered) {
                Some((text, spans)) => Ok((text, Some(spans))),
                None => {
                    let reason = "what {% generation %} encloses was taken apart by the template";
                    let help = "let {% generation %} enclose what is written as it is";
                    Err(error(&self.file, reason.to_string(), help))
                }
            },
        }
    }

    /// A message as templates see it: without null, and with its reasoning under the names in use.
    fn message(&self, i: usize, message: &Value) -> Result<Value> {
        let Value::Object(object) = message else {
            let reason = format!("message {i} is {}, expected an object", describe(message));
            return Err(error(
                &self.file,
                reason,
                "write {\"role\": ..., \"content\": ...}",
            ));
        };
        if !matches!(object.get("role"), Some(Value::String(_))) {
            let found = object.get("role").map_or("nothing".to_string(), describe);
            let reason = format!("message {i}: `role` is {found}, expected a string");
            return Err(error(
                &self.file,
                reason,
                "write {\"role\": ..., \"content\": ...}",
            ));
        }
        let mut clean: Map<String, Value> = object
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let names = ["reasoning_content", "thinking", "reasoning"];
        if let Some(reasoning) = names.iter().find_map(|name| clean.get(*name)).cloned() {
            clean.entry("thinking").or_insert_with(|| reasoning.clone());
            clean.insert("reasoning_content".to_string(), reasoning);
        }
        Ok(Value::Object(clean))
    }

    /// Turns the engine's error into ours.
    fn explain(&self, e: &minijinja::Error, help: &str) -> Error {
        let line = e
            .line()
            .map_or(String::new(), |line| format!("line {line}: "));
        let mut detail = e.detail().unwrap_or_default().to_string();
        let mut source = std::error::Error::source(e);
        while let Some(inner) = source {
            detail = match inner.downcast_ref::<minijinja::Error>() {
                Some(inner) => inner.detail().unwrap_or_default().to_string(),
                None => inner.to_string(),
            };
            source = inner.source();
        }
        if let Some(message) = detail.strip_prefix(python::RAISED) {
            let reason = format!(
                "{line}the template refuses the conversation: {}",
                Shown(message)
            );
            return error(&self.file, reason, "correct the messages");
        }
        if e.kind() == ErrorKind::OutOfFuel {
            let reason =
                format!("{line}it does not end, or makes far more text than a conversation has");
            return error(
                &self.file,
                reason,
                "correct the template, or use another model's",
            );
        }
        let colon = if detail.is_empty() { "" } else { ": " };
        let reason = format!("{line}{}{colon}{}", e.kind(), Shown(&detail));
        error(&self.file, reason, help)
    }
}

fn error(file: &str, reason: String, help: &str) -> Error {
    Error::Template {
        file: file.to_string(),
        reason,
        help: help.to_string(),
    }
}

/// The settings and names that transformers gives a template.
fn environment(file: &str) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|e| error(file, e.to_string(), "report this"))?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_recursion_limit(RECURSION);
    environment.set_debug(false);
    environment.add_filter(generation::FILTER, generation::mark);
    python::add(&mut environment);
    guard::add(&mut environment);
    Ok(environment)
}
