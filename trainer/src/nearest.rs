//! The name a misspelt one was probably meant to be.

/// The candidate nearest to `name`, if one is near enough to be worth suggesting: at most a third of the longer
/// name's letters changed (and never all of them). Of equals, the first.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut best: Option<(usize, &str)> = None;
    for candidate in candidates {
        let changes = distance(&fold(name), &fold(candidate));
        let longer = name.chars().count().max(candidate.chars().count());
        // Very short names need a little room: `bs` for `lr` is no typo, `l` for `lr` is.
        let allowed = (longer / 3).max(1);
        if changes <= allowed && changes < longer && best.is_none_or(|(least, _)| changes < least) {
            best = Some((changes, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// Spelling that is not a mistake in the letters: case, and `-` or a blank for `_`.
fn fold(name: &str) -> Vec<char> {
    name.chars()
        .flat_map(char::to_lowercase)
        .map(|c| if c == '-' || c == ' ' { '_' } else { c })
        .collect()
}

/// Insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`, no place edited twice
/// (the optimal string alignment distance; Boytsov 2011, "Indexing methods for approximate dictionary
/// searching", section 2). Three rows of `b.len() + 1` counts.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before = vec![0; b.len() + 1];
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1; b.len() + 1];
        for j in 0..b.len() {
            let substituted = above[j] + usize::from(a[i] != b[j]);
            row[j + 1] = substituted.min(above[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                row[j + 1] = row[j + 1].min(before[j - 1] + 1);
            }
        }
        before = std::mem::replace(&mut above, row);
    }
    above[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chars(s: &str) -> Vec<char> {
        s.chars().collect()
    }

    #[test]
    fn distances_by_hand() {
        for (a, b, want) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "abc", 0),
            ("kitten", "sitting", 3),
            ("ab", "ba", 1),
            ("optimzer", "optimizer", 1),
            // No place is edited twice: `ca` to `abc` costs 3, not 2.
            ("ca", "abc", 3),
        ] {
            assert_eq!(distance(&chars(a), &chars(b)), want, "{a} {b}");
            assert_eq!(distance(&chars(b), &chars(a)), want, "{b} {a}");
        }
    }

    #[test]
    fn suggests_only_what_is_near() {
        let names = ["batch_size", "max_tokens", "epochs", "lr"];
        assert_eq!(nearest("batchsize", names), Some("batch_size"));
        assert_eq!(nearest("Batch-Size", names), Some("batch_size"));
        assert_eq!(nearest("epoch", names), Some("epochs"));
        assert_eq!(nearest("l", names), Some("lr"));
        assert_eq!(nearest("colour", names), None);
        assert_eq!(nearest("bs", names), None);
    }
}
