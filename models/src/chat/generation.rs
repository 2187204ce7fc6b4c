//! `{% generation %}` ... `{% endgeneration %}`: the part of a template that writes the assistant's words.
//!
//! transformers adds this tag to Jinja. Here it becomes a filter block, whose output the filter puts between two
//! marks; they are taken out of the rendered text again, and tell where it was. The marks are code points that Unicode
//! reserves for uses inside a program.

use std::ops::Range;

use serde_json::Value;

/// The filter that marks.
pub(super) const FILTER: &str = "graft_generation";

const OPEN: char = '\u{fdd0}';
const CLOSE: char = '\u{fdd1}';

/// Puts the marks around a block's output.
pub(super) fn mark(text: &str) -> String {
    format!("{OPEN}{text}{CLOSE}")
}

/// Replaces the tags by those of a filter block; whether there were any.
///
/// # Errors
/// The reason, if the template holds one of the marks.
pub(super) fn rewrite(source: &str) -> Result<(String, bool), String> {
    if source.contains([OPEN, CLOSE]) {
        return Err("the template holds U+FDD0 or U+FDD1, which are no characters".to_string());
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        // A comment hides what is in it.
        if let Some(comment) = rest[..start].find("{#") {
            let end = rest[comment..]
                .find("#}")
                .map_or(rest.len(), |end| comment + end + 2);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        let body = &rest[start + 2..];
        let open = body.len() - body.trim_start_matches(['-', '+']).len();
        let name = body[open..].trim_start();
        let replaced = [("generation", "filter"), ("endgeneration", "endfilter")]
            .into_iter()
            .find_map(|(tag, by)| {
                let after = name.strip_prefix(tag)?;
                // Nothing else may stand in the tag.
                let close = after.trim_start();
                let ends = close.trim_start_matches(['-', '+']).starts_with("%}");
                ends.then_some((by, after))
            });
        out.push_str(&rest[..start + 2 + open]);
        match replaced {
            Some((by, after)) => {
                found = true;
                out.push(' ');
                out.push_str(by);
                if by == "filter" {
                    out.push(' ');
                    out.push_str(FILTER);
                }
                rest = after;
            }
            None => rest = &body[open..],
        }
    }
    out.push_str(rest);
    Ok((out, found))
}

/// Whether a mark occurs anywhere in a value.
pub(super) fn has_mark(value: &Value) -> bool {
    let marked = |text: &str| text.contains([OPEN, CLOSE]);
    match value {
        Value::String(text) => marked(text),
        Value::Array(list) => list.iter().any(has_mark),
        Value::Object(map) => map
            .iter()
            .any(|(key, value)| marked(key) || has_mark(value)),
        _ => false,
    }
}

/// The text without marks, and the bytes of it that stood between them; `None` if marks do not pair.
pub(super) fn spans(rendered: &str) -> Option<(String, Vec<Range<usize>>)> {
    let mut text = String::with_capacity(rendered.len());
    let mut spans = Vec::new();
    let mut open = None;
    for c in rendered.chars() {
        match (c, open) {
            (OPEN, None) => open = Some(text.len()),
            (CLOSE, Some(start)) => {
                spans.push(start..text.len());
                open = None;
            }
            (OPEN | CLOSE, _) => return None,
            _ => text.push(c),
        }
    }
    open.is_none().then_some((text, spans))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_become_filter_blocks() {
        let (out, found) =
            rewrite("a{%- generation -%}b{%endgeneration%}c{% if generation %}{%+ generation +%}")
                .unwrap();
        assert!(found);
        assert_eq!(
            out,
            "a{%- filter graft_generation -%}b{% endfilter%}c{% if generation %}{%+ filter graft_generation +%}"
        );
        for source in [
            "",
            "{% generation",
            "{# {% generation %} #}x",
            "{% generations %}",
            "{{ generation }}",
            "{%",
        ] {
            assert_eq!(rewrite(source).unwrap(), (source.to_string(), false));
        }
        assert!(rewrite("\u{fdd0}").is_err());
    }

    #[test]
    fn marks_pair_or_are_refused() {
        let text = format!("é{}b{}{}", mark("xü"), mark(""), mark("c"));
        assert_eq!(
            spans(&text),
            Some(("éxübc".to_string(), vec![2..5, 6..6, 6..7]))
        );
        for bad in [
            "\u{fdd0}",
            "\u{fdd1}",
            "\u{fdd1}\u{fdd0}",
            "\u{fdd0}\u{fdd0}\u{fdd1}\u{fdd1}",
        ] {
            assert_eq!(spans(bad), None);
        }
    }
}
