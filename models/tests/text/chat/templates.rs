//! Templates that fail, do not end or are not there, and what they can say.

use super::*;

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
