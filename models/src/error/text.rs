//! How messages put what was found in files: strings, names and lists of them, cut and made safe to print.

use std::fmt;

/// serde_json's message without its trailing position, which the error states in its own fields.
pub(crate) fn json_reason(source: &serde_json::Error) -> String {
    let text = source.to_string();
    let at = format!(" at line {} column {}", source.line(), source.column());
    let text = text.strip_suffix(&at).unwrap_or(&text);
    Shown(text).to_string()
}

/// A string from a file, made safe to print: control characters escaped, and cut after 120 characters, since a
/// hostile header may hold a name of many megabytes.
pub(crate) struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LIMIT: usize = 120;
        for (shown, c) in self.0.chars().enumerate() {
            if shown == LIMIT {
                return write!(f, "… ({} bytes)", self.0.len());
            }
            if c.is_control() {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        Ok(())
    }
}

/// `; the nearest is ...`, or nothing.
pub(super) fn nearest(near: &Option<String>) -> String {
    match near {
        Some(name) => format!("; the nearest is `{}`", Shown(name)),
        None => String::new(),
    }
}

/// A heading and one line per entry, or nothing.
pub(super) fn listed(heading: &str, entries: &[String]) -> String {
    match entries.len() {
        0 => String::new(),
        count => {
            let names: Vec<String> = entries.iter().map(|e| Shown(e).to_string()).collect();
            format!("\n{heading} ({count}):{}", bullets(&names))
        }
    }
}

/// One line per entry.
pub(super) fn bullets(entries: &[String]) -> String {
    entries
        .iter()
        .map(|entry| format!("\n  - {entry}"))
        .collect()
}

/// The first few of a list of names, for messages: `a, b, c and 40 more`.
pub(crate) fn some_of<S: AsRef<str>>(names: &[S]) -> String {
    const FEW: usize = 8;
    let mut text = names
        .iter()
        .take(FEW)
        .map(|name| format!("`{}`", Shown(name.as_ref())))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > FEW {
        text.push_str(&format!(" and {} more", names.len() - FEW));
    }
    text
}

/// The candidate with the smallest edit distance to `name`, if it is near enough to be a likely mistake.
///
/// Long candidates are skipped: the distance costs the product of the lengths.
pub(crate) fn nearest_name<'a>(
    name: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<String> {
    const LONGEST: usize = 160;
    const MOST: usize = 4096;
    if name.len() > LONGEST {
        return None;
    }
    let (distance, best) = candidates
        .take(MOST)
        .filter(|candidate| candidate.len() <= LONGEST)
        .map(|candidate| (edit_distance(name, candidate), candidate))
        .min_by_key(|(distance, _)| *distance)?;
    (distance <= 2 + name.chars().count() / 4).then(|| best.to_string())
}

/// Levenshtein's distance between two strings, by characters (the two-row form of Wagner and Fischer 1974).
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_levenshtein() {
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("weight", "weight"), 0);
    }

    #[test]
    fn nearest_names_are_near() {
        let names = [
            "encoder.layer.0.attention.self.query.weight",
            "pooler.dense.bias",
        ];
        assert_eq!(
            nearest_name("pooler.dense.bais", names.into_iter()).as_deref(),
            Some("pooler.dense.bias")
        );
        assert_eq!(nearest_name("lm_head", names.into_iter()), None);
    }

    #[test]
    fn strings_from_files_are_cut_and_escaped_in_messages() {
        let long = "é".repeat(5000);
        let shown = Shown(&long).to_string();
        assert!(
            shown.ends_with("(10000 bytes)") && shown.chars().count() < 150,
            "{shown}"
        );
        assert_eq!(Shown("a\u{1b}[2J\n").to_string(), "a\\u{1b}[2J\\n");
    }

    #[test]
    fn lists_are_cut() {
        let names: Vec<String> = (0..20).map(|i| format!("t{i}")).collect();
        assert!(some_of(&names).ends_with("`t7` and 12 more"));
        assert_eq!(some_of(&names[..2]), "`t0`, `t1`");
    }
}
