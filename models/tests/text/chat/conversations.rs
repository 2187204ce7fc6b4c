//! What conversations become, and which of their tokens are learnt.

use super::*;

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
