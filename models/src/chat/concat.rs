//! `a ~ b`: values joined to text.
//!
//! The engine turns a list or dictionary into text before anything is paid for, and one that holds another twice, which
//! holds another twice, and so on, is small in memory and without end in text. So each operand of `~` is passed through a
//! filter that writes such a value as Python does and pays while it writes: `a ~ b` becomes `a|graft_text ~ b|graft_text`.

/// The filter that writes lists and dictionaries, and leaves every other value as it is.
pub(super) const FILTER: &str = "graft_text";

/// Words that end an operand.
const ENDS: [&str; 6] = ["and", "or", "not", "in", "if", "else"];

/// Puts the filter behind each operand of `~`. What is no Jinja comes out as it went in, or is refused later.
pub(super) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len() + source.len() / 16);
    let mut rest = source;
    let opens = |rest: &str| {
        let is_tag = |at: &usize| matches!(rest.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
        rest.match_indices('{').map(|(at, _)| at).find(is_tag)
    };
    while let Some(start) = opens(rest) {
        out.push_str(&rest[..start + 2]);
        let kind = rest.as_bytes()[start + 1];
        rest = &rest[start + 2..];
        if kind == b'#' {
            let end = rest.find("#}").map_or(rest.len(), |end| end + 2);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        let close = if kind == b'{' { "}}" } else { "%}" };
        let name = rest.trim_start_matches(['-', '+']).trim_start();
        let is_raw = kind == b'%'
            && name.strip_prefix("raw").is_some_and(|behind| {
                !behind.starts_with(|c: char| c.is_alphanumeric() || c == '_')
            });
        let length = block(rest, close, &mut out);
        rest = &rest[length..];
        if is_raw {
            // Text up to the tag that ends it.
            let end = rest.find("endraw").unwrap_or(rest.len());
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    out.push_str(rest);
    out
}

/// Writes the inside of a tag with the filters, up to and with the `close` that ends it; says how long it was.
fn block(source: &str, close: &str, out: &mut String) -> usize {
    // For each bracket that is open, and outside all of them: whether this is the right operand of a `~`.
    let mut operand = vec![false];
    // Whether something of an operand has been read: a minus there is none of its own.
    let mut begun = false;
    let mut after_is = false;
    let mut at = 0;
    while at < source.len() {
        let rest = &source[at..];
        let c = rest.chars().next().unwrap_or_default();
        let top = operand.len() - 1;
        let sign = usize::from(rest.starts_with(['-', '+']));
        if top == 0 && rest[sign..].starts_with(close) {
            end_operand(&mut operand[top], out);
            out.push_str(&rest[..sign + close.len()]);
            return at + sign + close.len();
        }
        let length = match c {
            '"' | '\'' => quoted(rest),
            c if c.is_alphanumeric() || c == '_' => {
                let word = |c: char| c.is_alphanumeric() || c == '_';
                rest.find(|c| !word(c)).unwrap_or(rest.len())
            }
            c => c.len_utf8(),
        };
        let token = &rest[..length];
        match token {
            "~" => {
                push_filter(out);
                operand[top] = true;
            }
            "(" | "[" | "{" => operand.push(false),
            ")" | "]" | "}" => {
                end_operand(&mut operand[top], out);
                if top > 0 {
                    operand.pop();
                }
            }
            "," | ":" | "=" | "!" | "<" | ">" | "+" => end_operand(&mut operand[top], out),
            "-" if begun => end_operand(&mut operand[top], out),
            "not" if after_is => {}
            word if ENDS.contains(&word) && !out.ends_with('.') => {
                end_operand(&mut operand[top], out)
            }
            _ => {}
        }
        if !c.is_whitespace() {
            after_is = token == "is";
            begun = !matches!(
                token,
                "~" | "(" | "[" | "{" | "," | ":" | "=" | "+" | "-" | "*" | "/" | "%"
            );
        }
        out.push_str(token);
        at += length;
    }
    source.len()
}

fn end_operand(operand: &mut bool, out: &mut String) {
    if std::mem::take(operand) {
        push_filter(out);
    }
}

/// In front of the white space that ends what was written.
fn push_filter(out: &mut String) {
    let end = out.trim_end().len();
    out.insert_str(end, &format!("|{FILTER}"));
}

/// The length of a string literal with its quotes.
fn quoted(text: &str) -> usize {
    let quote = text.as_bytes()[0];
    let mut escaped = false;
    for (i, &byte) in text.as_bytes().iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b if b == quote => return i + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_found() {
        for (source, expected) in [
            ("", ""),
            ("a ~ b", "a ~ b"),
            ("{{ a ~ b }}", "{{ a|F ~ b|F }}"),
            ("{{- a~b -}} ~", "{{- a|F~b|F -}} ~"),
            ("{{ a ~ b ~ 'x ~ }}' }}", "{{ a|F ~ b|F ~ 'x ~ }}'|F }}"),
            (
                "{% set x = a.b[0] ~ f(c ~ d, e) %}",
                "{% set x = a.b[0]|F ~ f(c|F ~ d|F, e)|F %}",
            ),
            (
                "{{ a ~ b if c ~ d else e ~ -f }}",
                "{{ a|F ~ b|F if c|F ~ d|F else e|F ~ -f|F }}",
            ),
            (
                "{{ a ~ b - 1 + c ~ 2 * d | g }}",
                "{{ a|F ~ b|F - 1 + c|F ~ 2 * d | g|F }}",
            ),
            (
                "{{ a ~ b == c ~ d and e }}",
                "{{ a|F ~ b|F == c|F ~ d|F and e }}",
            ),
            ("{{ a ~ b is not none }}", "{{ a|F ~ b is not none|F }}"),
            ("{{ a ~ x.not }}", "{{ a|F ~ x.not|F }}"),
            (
                "{{ [a ~ b, {'k': c ~ d}] }}",
                "{{ [a|F ~ b|F, {'k': c|F ~ d|F}] }}",
            ),
            (
                "{{ {'a': {'b': 1}}.a ~ 'é' }}",
                "{{ {'a': {'b': 1}}.a|F ~ 'é'|F }}",
            ),
            ("{# a ~ b #}{{ c }}", "{# a ~ b #}{{ c }}"),
            (
                "{% raw %}{{ a ~ b }}{% endraw %}{{ a ~ b }}",
                "{% raw %}{{ a ~ b }}{% endraw %}{{ a|F ~ b|F }}",
            ),
            ("{{ a ~ ", "{{ a|F ~ "),
            ("{{ 'open", "{{ 'open"),
        ] {
            assert_eq!(
                rewrite(source),
                expected.replace("|F", &format!("|{FILTER}")),
                "{source}"
            );
        }
    }
}
