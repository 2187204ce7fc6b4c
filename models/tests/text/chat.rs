//! Conversations through chat templates, against transformers.

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
        "chatml_generation" => ("qwen2", &[("eos_token", "<|im_end|>")]),
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

#[test]
fn texts_are_those_of_transformers() {
    let rows = rows();
    let mut refused = 0;
    for row in &rows {
        let (_, template) = template(&row.template);
        let rendered = template.render(&row.messages, &options(row));
        match (&row.text, &row.error) {
            (Some(text), None) => assert_eq!(
                &rendered.unwrap(),
                text,
                "{} {:?}",
                row.template,
                row.messages
            ),
            (None, Some(raised)) => {
                let error = rendered.unwrap_err();
                assert!(matches!(&error, Error::Template { .. }), "{error}");
                assert!(
                    error.to_string().contains(&format!(
                        "refuses the conversation: {}",
                        &raised[..raised.len().min(40)]
                    )),
                    "{error}"
                );
                refused += 1;
            }
            _ => panic!("a row has a text or an error"),
        }
    }
    assert!(rows.len() >= 140 && refused >= 6);
}

#[test]
fn supervised_tokens() {
    let mut checked = 0;
    for row in rows().iter().filter(|row| row.mask.is_some()) {
        let (t, template) = template(&row.template);
        let found = template.supervise(&t, &row.messages, &options(row));
        let name = format!("{} {:?}", row.template, row.messages);
        let Some(mask) = row.mask.as_ref().unwrap() else {
            let error = found.unwrap_err().to_string();
            assert!(
                error.contains("is no prefix of the whole") && error.contains("{% generation %}"),
                "{error}"
            );
            continue;
        };
        if !mask.contains(&1) {
            let error = found.unwrap_err().to_string();
            assert!(
                error.contains("no token of the conversation is the assistant's"),
                "{name}: {error}"
            );
            continue;
        }
        let found = found.unwrap();
        assert_eq!(Some(&found.text), row.text.as_ref(), "{name}");
        assert_eq!(Some(&found.ids()), row.ids.as_ref(), "{name}");
        let ours: Vec<u8> = found.mask.iter().map(|&m| m.into()).collect();
        let shown = |mask: &[u8]| -> Vec<&str> {
            let tokens = found.tokens.iter().zip(mask).filter(|(_, m)| **m == 1);
            tokens
                .map(|(token, _)| &found.text[token.span.clone()])
                .collect()
        };
        assert_eq!(&ours, mask, "{name}: {:?} {:?}", shown(&ours), shown(mask));
        checked += 1;
    }
    assert!(checked >= 50, "{checked}");
}

/// The text of the supervised tokens, turn by turn, for the words of one conversation.
#[test]
fn a_turn_ends_with_its_token() {
    let messages = [
        json!({"role": "user", "content": "What is 2 + 2?"}),
        json!({"role": "assistant", "content": "Four."}),
        json!({"role": "user", "content": "Sure?"}),
        json!({"role": "assistant", "content": "Yes."}),
    ];
    for (kind, expected) in [
        ("chatml", "Four.<|im_end|>Yes.<|im_end|>"),
        ("chatml_generation", "Four.<|im_end|>Yes.<|im_end|>"),
        ("llama2", " Four. </s> Yes. </s>"),
        ("llama3", "Four.<|eot_id|>Yes.<|eot_id|>"),
        ("gemma", "Four.<end_of_turn>Yes.<end_of_turn>"),
        ("mistral", " Four.</s> Yes.</s>"),
    ] {
        let (t, template) = template(kind);
        let found = template
            .supervise(&t, &messages, &ChatOptions::default())
            .unwrap();
        let text: String = found
            .tokens
            .iter()
            .zip(&found.mask)
            .filter(|(_, m)| **m)
            .map(|(token, _)| &found.text[token.span.clone()])
            .collect();
        assert_eq!(text, expected, "{kind}");
    }
}

#[test]
fn an_answer_without_words_is_not_learnt_where_it_is_written_otherwise() {
    let (t, template) = template("chatml");
    let user = json!({"role": "user", "content": "go on"});
    let nothing = json!({"role": "assistant", "content": ""});
    let answer = json!({"role": "assistant", "content": "I am."});
    let none = ChatOptions::default();
    let found = template
        .supervise(
            &t,
            &[user.clone(), nothing.clone(), user.clone(), answer],
            &none,
        )
        .unwrap();
    // ChatML with tools leaves out the line feed behind `assistant` there.
    assert!(found.text.contains("<|im_start|>assistant<|im_end|>"));
    let tokens = found.tokens.iter().zip(&found.mask).filter(|(_, m)| **m);
    let learnt: String = tokens.map(|(t, _)| &found.text[t.span.clone()]).collect();
    assert_eq!(learnt, "I am.<|im_end|>");
    let error = template.supervise(&t, &[user, nothing], &none).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("no token of the conversation is the assistant's"),
        "{error}"
    );
}

#[test]
fn a_template_that_rewrites_what_was_said_is_refused() {
    let (t, _) = template("chatml");
    // What the assistant thought is left out of all messages but the last.
    let source = "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.thinking %}({{ m.thinking }}){% endif %}\
                  {{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let user = json!({"role": "user", "content": "why?"});
    let answer = json!({"role": "assistant", "content": "so.", "thinking": "hm"});
    let error = plain(source)
        .supervise(
            &t,
            &[user.clone(), answer.clone(), user, answer],
            &ChatOptions::default(),
        )
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("message 1: the conversation up to it is no prefix of the whole")
            && error.contains("{% generation %}"),
        "{error}"
    );
}

#[test]
fn the_end_of_a_turn() {
    for (kind, expected) in [
        ("chatml", Some("<|im_end|>")),
        ("llama2", Some("</s>")),
        ("llama3", Some("<|eot_id|>")),
        ("gemma", Some("<end_of_turn>")),
        ("mistral", Some("</s>")),
    ] {
        let (t, template) = template(kind);
        let id = template.end_of_turn(&t);
        let token = id.and_then(|id| t.id_to_token(id));
        assert_eq!(token.as_deref(), expected, "{kind}");
    }
    let (t, _) = template("chatml");
    let mute = plain("{% for m in messages %}{{ m.content }}{% endfor %}");
    assert_eq!(mute.end_of_turn(&t), None);
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

#[test]
fn templates_that_fail_say_where() {
    for source in [
        "{% for %}",
        "{{ x",
        "{% if x %}",
        "{% endif %}",
        "{% generation %}",
        "{{ x | }}",
        "{% nonsense %}",
    ] {
        let error = ChatTemplate::new("t.jinja", source, BTreeMap::new())
            .unwrap_err()
            .to_string();
        assert!(error.contains("t.jinja: line 1: syntax error"), "{error}");
    }
    let error = fails("a\nb\n{{ raise_exception('no ' ~ messages[0].role) }}");
    assert!(
        error.contains("line 3: the template refuses the conversation: no user"),
        "{error}"
    );
    for (source, part) in [
        ("\n{{ messages | nothing }}", "nothing"),
        ("\n{{ nothing() }}", "nothing"),
        ("\n{{ nothing.at.all }}", "undefined value"),
        ("\n{{ messages[0].content.nothing() }}", "nothing"),
        ("\n{{ 1 / 0 }}", "line 2"),
        ("\n{{ 'a' + 1 }}", "line 2"),
        ("\n{{ messages | tojson(nothing=1) }}", "nothing"),
        ("\n{{ nothing | tojson }}", "undefined"),
        ("\n{{ strftime_now('%Q') }}", "`%Q` is not known"),
        ("\n{% include 'x' %}", "line 2"),
    ] {
        let found = ChatTemplate::new("t.jinja", source, BTreeMap::new());
        let error = match found {
            Ok(_) => fails(source),
            Err(error) => error.to_string(),
        };
        assert!(
            error.contains(part) && error.contains("line 2"),
            "{source}: {error}"
        );
    }
    let long = " ".repeat((1 << 20) + 1);
    let error = ChatTemplate::new("t", &long, BTreeMap::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("this is no chat template"), "{error}");
    let deep = "{% if 1 %}".repeat(100_000);
    assert!(ChatTemplate::new("t", &deep, BTreeMap::new()).is_err());
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(ChatTemplate::new("t", &deep, BTreeMap::new()).is_err());
}

#[test]
fn templates_that_do_not_end() {
    // A list of the list twice, sixty times: small in memory, without end in text.
    let doubled = |then: &str| {
        format!(
            "{{% set ns = namespace(x=[]) %}}{{% for i in range(60) %}}{{% set ns.x = [ns.x, ns.x] %}}{{% endfor %}}{then}"
        )
    };
    let loops = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
    for source in [
        loops,
        // Doubles a string forty times: the work is small, the text would fill any memory.
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'a' * 1000000000000 }}",
        "{{ range(1000000000) | list | length }}",
        "{% for i in range(90000) %}{% for j in range(90) %}{{ messages | tojson(indent=60) }}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        &doubled("{{ ns.x | tojson }}"),
        &doubled("{{ ns.x }}"),
        &doubled("{{ ns.x | string | length }}"),
        &doubled("{{ 'a' ~ ns.x }}"),
        &doubled("{{ ns.x ~ 'a' }}"),
        &doubled("{% set y = 1 ~ [ns.x] ~ 2 %}"),
        &doubled("{{ ns.x | upper }}"),
        &doubled("{{ ns.x | trim | length }}"),
        &doubled("{{ 'a' | replace('a', ns.x) }}"),
        &doubled("{{ '%(a)s' | format(a=ns.x) }}"),
        &doubled("{{ ns.x | indent(3) }}"),
        "{% set t = 'a\n' * 90000 %}{{ t | indent(width=10000000) }}",
        "{% set t = 'a' * 900000 %}{{ t | replace('a', t) }}",
        &doubled("{{ [ns.x, ns.x] | join(',') }}"),
        &doubled("{{ ','.join([ns.x]) }}"),
        // Twice as long sixty times: the engine makes no list of it, and text only as it is paid for.
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ 'a' ~ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | join }}",
    ] {
        let started = std::time::Instant::now();
        let error = fails(source);
        assert!(started.elapsed() < Duration::from_secs(20), "{source}");
        let known = [
            "does not end",
            "recursion",
            "too large",
            "too many",
            "range",
        ];
        assert!(
            known.iter().any(|part| error.contains(part)),
            "{source}: {error}"
        );
    }
    assert!(fails(loops).contains("does not end"));
    // The engine pays nothing for comparisons; a clock ends them.
    let two = "{% set ns = namespace(x=[], y=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}\
               {% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}";
    let started = std::time::Instant::now();
    assert!(fails(two).contains("does not end"));
    assert!(started.elapsed() < Duration::from_secs(30));
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(9000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}";
    assert!(fails(deep).contains("more than 64 levels"));
}

#[test]
fn lists_are_joined_to_text_as_python_writes_them() {
    let messages = [json!({"role": "user", "content": "hello"})];
    let text = |source: &str| {
        plain(source)
            .render(&messages, &ChatOptions::default())
            .unwrap()
    };
    assert_eq!(
        text("{{ 'a' ~ [1, 'b', none] ~ {'k': true} }}"),
        "a[1, 'b', None]{'k': True}"
    );
    assert_eq!(text("{{ 1 ~ 2 * 3 ~ nothing ~ (4, 5) }}"), "16(4, 5)");
    assert_eq!(
        text("{{ ['a', ['b']] | join('-') }}{{ '+'.join(['c', 'd']) }}"),
        "a-['b']c+d"
    );
    assert_eq!(
        text("{{ ' a ' | trim | upper }}{{ 'aXbX' | replace('X', '-') }}"),
        "Aa-b-"
    );
    assert_eq!(
        text("{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent(width=1, first=true) }}"),
        "a\n  b a\n b"
    );
    assert_eq!(
        text("{{ '%s!' | format('x') }}{{ '<' | e }}{{ 'a b' | split | length }}"),
        "x!&lt;2"
    );
}

#[test]
fn messages_that_are_none() {
    let template = plain("{% for m in messages %}{{ m.role }}{% endfor %}");
    for (message, part) in [
        (json!("hi"), "message 1 is \"hi\", expected an object"),
        (json!({"content": "hi"}), "message 1: `role` is nothing"),
        (json!({"role": null}), "message 1: `role` is null"),
        (json!({"role": 3}), "message 1: `role` is 3"),
    ] {
        let messages = [json!({"role": "user"}), message];
        let error = template
            .render(&messages, &ChatOptions::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(template.render(&[], &ChatOptions::default()).unwrap(), "");
}

#[test]
fn generation_marks() {
    let t = tokenizer("gpt2");
    let source = "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}\n\
                  {% endgeneration %}{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}";
    let messages = [
        json!({"role": "user", "content": "ü"}),
        json!({"role": "assistant", "content": "yes, it is"}),
    ];
    let found = plain(source)
        .supervise(&t, &messages, &ChatOptions::default())
        .unwrap();
    assert_eq!(found.text, "U: ü\nA: yes, it is\n");
    let kept = found.tokens.iter().zip(&found.mask).filter(|(_, m)| **m);
    let kept: String = kept
        .map(|(token, _)| &found.text[token.span.clone()])
        .collect();
    assert_eq!(kept.trim_start(), "yes, it is\n");
    // The marks themselves cannot come from outside.
    let bad = [json!({"role": "assistant", "content": "a\u{fdd1}b"})];
    let error = plain(source)
        .render(&bad, &ChatOptions::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("U+FDD0 or U+FDD1"), "{error}");
    assert!(ChatTemplate::new("t", "\u{fdd0}", BTreeMap::new()).is_err());
    // Without marks in the template they are nothing special.
    assert_eq!(
        plain("{{ messages[0].content }}")
            .render(&bad, &ChatOptions::default())
            .unwrap(),
        "a\u{fdd1}b"
    );
    let apart = "{% set x %}{% generation %}abc{% endgeneration %}{% endset %}{{ x[1:] }}";
    assert!(fails(apart).contains("was taken apart"));
}

#[test]
fn prefixes_must_be_prefixes() {
    let t = tokenizer("gpt2");
    let messages = [
        json!({"role": "user", "content": "a"}),
        json!({"role": "assistant", "content": "b"}),
        json!({"role": "assistant", "content": "c"}),
    ];
    let supervise = |source: &str| plain(source).supervise(&t, &messages, &ChatOptions::default());
    // The number of messages stands in front.
    let error =
        supervise("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
            .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("message 1: the conversation up to it is no prefix of the whole: at byte 0"),
        "{text}"
    );
    assert!(text.contains("has `2ab`, the whole `3abc`"), "{text}");
    // The prompt is not what stands in front of an answer.
    let prompt = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant>{% endif %}";
    let text = supervise(prompt).unwrap_err().to_string();
    assert!(
        text.contains("what a model is given to write it is no prefix"),
        "{text}"
    );
    // Without special tokens everything behind the prompt is the assistant's, white space too.
    let found = supervise("{% for m in messages %}{{ m.content }}\n{% endfor %}").unwrap();
    assert_eq!(
        (found.text.as_str(), found.mask),
        ("a\nb\nc\n", vec![false, false, true, true, true, true])
    );
    let users = [json!({"role": "user", "content": "a"})];
    let error = plain("{{ messages[0].content }}")
        .supervise(&t, &users, &ChatOptions::default())
        .unwrap_err();
    assert!(
        error.to_string().contains("no token of the conversation"),
        "{error}"
    );
}

#[test]
fn dates_and_variables() {
    let template = plain(
        "{{ strftime_now('%d %b %Y') }} {{ enable_thinking }} {{ tools is none }} {{ eos_token is defined }}",
    );
    let mut options = ChatOptions {
        now: UNIX_EPOCH + Duration::from_secs(1_709_211_845),
        ..ChatOptions::default()
    };
    assert_eq!(
        template.render(&[], &options).unwrap(),
        "29 Feb 2024  True False"
    );
    options
        .variables
        .insert("enable_thinking".to_string(), json!(false));
    options
        .variables
        .insert("eos_token".to_string(), json!("x"));
    options.tools = Some(Vec::new());
    assert_eq!(
        template.render(&[], &options).unwrap(),
        "29 Feb 2024 False False True"
    );
    // Reasoning has three names.
    let template = plain(
        "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}{{ messages[0] | length }}",
    );
    let messages = [json!({"role": "assistant", "reasoning": "r", "content": null})];
    assert_eq!(template.render(&messages, &options).unwrap(), "rr4");
}

#[test]
fn templates_of_a_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::copy(fixture("../bpe/qwen2.json"), at("tokenizer.json")).unwrap();
    let load = || {
        let source = ModelSource::directory(dir.path()).unwrap();
        ChatTemplate::of(&Tokenizer::load(&source, 1000).unwrap())
    };
    let config = |template: Value| {
        let config = json!({"eos_token": "<|im_end|>", "chat_template": template});
        fs::write(at("tokenizer_config.json"), config.to_string()).unwrap();
        load()
    };
    let messages = [json!({"role": "user", "content": "hi"})];
    let mut options = ChatOptions::default();
    let text = |template: ChatTemplate, options: &ChatOptions| {
        template.render(&messages, options).unwrap()
    };
    assert!(load().unwrap().is_none());
    assert!(config(Value::Null).unwrap().is_none());
    let one = config(json!("{{ messages[0].content ~ eos_token }}"))
        .unwrap()
        .unwrap();
    assert_eq!(text(one, &options), "hi<|im_end|>");
    let named =
        json!([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]);
    assert_eq!(text(config(named.clone()).unwrap().unwrap(), &options), "d");
    options.tools = Some(vec![json!({})]);
    assert_eq!(text(config(named.clone()).unwrap().unwrap(), &options), "t");
    for (bad, part) in [
        (json!(3), "chat_template: found 3, expected a string"),
        (
            json!([{"name": "default"}]),
            "give each a `name` and a `template`",
        ),
        (
            json!([{"name": "rag", "template": "x"}]),
            "no template is named `default`, there are `rag`",
        ),
        (json!("{% if"), "syntax error"),
    ] {
        let error = config(bad).unwrap_err().to_string();
        assert!(
            error.contains("tokenizer_config.json") && error.contains(part),
            "{error}"
        );
    }
    // A file of its own goes first, with the line breaks of any system.
    config(named).unwrap();
    fs::write(
        at("chat_template.jinja"),
        "{% if true %}\r\nfile\r\n{% endif %}\r\n",
    )
    .unwrap();
    assert_eq!(text(load().unwrap().unwrap(), &options), "file\n");
    fs::write(at("chat_template.jinja"), b"\xff").unwrap();
    assert!(load().unwrap_err().to_string().contains("not UTF-8"));
    // And is saved with the tokenizer.
    let out = tempfile::tempdir().unwrap();
    let source = ModelSource::directory(dir.path()).unwrap();
    Tokenizer::load(&source, 1000)
        .unwrap()
        .save(out.path())
        .unwrap();
    assert!(out.path().join("chat_template.jinja").is_file());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// Valid templates, with some bytes changed.
    #[test]
    fn damaged_templates_never_panic(
        kind in prop::sample::select(vec!["chatml", "chatml_generation", "llama3", "gemma", "mistral", "python"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(b"{}%-+#'\"()[]|.~ \n0a*".to_vec())), 1..4),
    ) {
        let mut bytes = fs::read(fixture(&format!("{kind}.jinja"))).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let source = String::from_utf8_lossy(&bytes);
        if let Ok(template) = ChatTemplate::new("t", &source, BTreeMap::new()) {
            let messages = [json!({"role": "user", "content": "hello"}), json!({"role": "assistant", "content": "x"})];
            let _ = template.render(&messages, &ChatOptions::default());
        }
    }

    #[test]
    fn any_template_is_refused_or_rendered(source in "[{}%#'a-e\\-|()\\[\\]. \n0-9+*~=]{0,60}") {
        if let Ok(template) = ChatTemplate::new("t", &source, BTreeMap::new()) {
            let _ = template.render(&[json!({"role": "user", "content": "a"})], &ChatOptions::default());
        }
    }

    /// Whatever is said, the mask covers the assistant's words and the ends of its turns alone.
    #[test]
    fn any_conversation_is_supervised(texts in prop::collection::vec(any::<String>(), 1..5)) {
        let (t, template) = template("llama3");
        let mut messages = Vec::new();
        for text in &texts {
            messages.push(json!({"role": "user", "content": format!("q{text}")}));
            messages.push(json!({"role": "assistant", "content": format!("r{text}s")}));
        }
        let found = template.supervise(&t, &messages, &ChatOptions::default()).unwrap();
        let supervised: String = found.tokens.iter().zip(&found.mask).filter(|(_, m)| **m)
            .scan(0, |reached, (token, _)| {
                // Tokens that share a character each have all of it.
                let start = token.span.start.max(*reached);
                *reached = (*reached).max(token.span.end);
                Some(&found.text[start..token.span.end.max(start)])
            })
            .collect();
        let expected: String = texts.iter().map(|text| format!("r{text}s<|eot_id|>")).collect();
        prop_assert_eq!(supervised, expected);
    }
}
