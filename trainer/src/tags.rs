//! Labels of words as tags of entities: `B-` begins one, `I-` goes on with it, `O` is outside of all (Ramshaw and Marcus
//! 1995; Tjong Kim Sang and De Meulder 2003). `E-` or `L-` ends one, `S-` or `U-` is one by itself, where they are used.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Where in an entity a word stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Position {
    Begin,
    Inside,
    End,
    Single,
}

/// The letters of positions, in the order in which labels are numbered.
const LETTERS: [(char, Position); 6] = [
    ('B', Position::Begin),
    ('I', Position::Inside),
    ('E', Position::End),
    ('L', Position::End),
    ('S', Position::Single),
    ('U', Position::Single),
];

/// The label of a word outside of all entities.
pub const OUTSIDE: &str = "O";

/// What a label says of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    Outside,
    /// In an entity of the kind of this number
    Within(Position, usize),
}

/// The labels of a head over words, and what they say of entities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tags {
    labels: Vec<String>,
    /// One for each label; none where labels are no tags of entities
    tags: Option<Vec<Tag>>,
    /// The names of the entities' kinds
    kinds: Vec<String>,
}

/// Some consecutive words that are one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Entity {
    /// The number of its kind
    pub kind: usize,
    /// The numbers of its words
    pub words: Range<usize>,
}

/// A label in an entity: position and what follows the letter, `-` and a kind or nothing.
fn parse(label: &str) -> Option<(Position, &str)> {
    let first = label.chars().next()?;
    let rest = &label[first.len_utf8()..];
    let (_, position) = LETTERS.into_iter().find(|(letter, _)| *letter == first)?;
    (rest.is_empty() || rest.starts_with('-')).then_some((position, rest))
}

/// The kind of an entity by what follows the letter; one without a name is called `_`, as seqeval does.
fn kind_of(rest: &str) -> &str {
    match rest.strip_prefix('-') {
        None | Some("") => "_",
        Some(kind) => kind,
    }
}

/// Whether a label is a tag of entities.
pub fn is_tag(label: &str) -> bool {
    label == OUTSIDE || parse(label).is_some()
}

/// The labels for entities in which some labels occur, all of them tags: `O`, then for each kind the letters that occur
/// anywhere, and `B` and `I` in any case. None if there is no kind.
pub fn complete(labels: &BTreeSet<&str>) -> Option<Vec<String>> {
    let found: Vec<(char, &str)> = labels
        .iter()
        .filter_map(|label| Some((label.chars().next()?, parse(label)?.1)))
        .collect();
    let kinds: BTreeSet<&str> = found.iter().map(|(_, rest)| *rest).collect();
    let used = |letter| matches!(letter, 'B' | 'I') || found.iter().any(|(l, _)| *l == letter);
    let letters = || LETTERS.into_iter().map(|(l, _)| l).filter(|&l| used(l));
    let tags = kinds
        .iter()
        .flat_map(|rest| letters().map(move |l| format!("{l}{rest}")));
    let all: Vec<String> = [OUTSIDE.to_owned()].into_iter().chain(tags).collect();
    (all.len() > 1).then_some(all)
}

impl Tags {
    /// What these labels say. If one of them is no tag of entities, each word's label is by itself.
    pub fn of(labels: &[String]) -> Tags {
        let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, rest) in labels.iter().filter_map(|label| parse(label)) {
            kinds.insert(kind_of(rest), 0);
        }
        let are_tags = !kinds.is_empty() && labels.iter().all(|label| is_tag(label));
        for (number, place) in kinds.values_mut().enumerate() {
            *place = number;
        }
        let tag = |label: &String| match parse(label) {
            Some((position, rest)) => Tag::Within(position, kinds[kind_of(rest)]),
            None => Tag::Outside,
        };
        Tags {
            tags: are_tags.then(|| labels.iter().map(tag).collect()),
            kinds: match are_tags {
                true => kinds.keys().map(|&kind| kind.to_owned()).collect(),
                false => Vec::new(),
            },
            labels: labels.to_vec(),
        }
    }

    /// The names of the labels, by number.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The names of the kinds of entities, sorted; none if labels are no tags of entities.
    pub fn kinds(&self) -> Option<&[String]> {
        self.tags.as_ref().map(|_| &self.kinds[..])
    }

    /// The label of a word outside of all entities.
    pub fn outside(&self) -> Option<u32> {
        let tags = self.tags.as_ref()?;
        let place = tags.iter().position(|tag| *tag == Tag::Outside)?;
        Some(place as u32)
    }

    /// The label of a word that has a part in the token of the word before, which has this label: it goes on with the
    /// entity.
    pub fn continued(&self, label: u32) -> u32 {
        let Some(tags) = &self.tags else { return label };
        let Tag::Within(_, kind) = tags[label as usize] else {
            return label;
        };
        let inside = Tag::Within(Position::Inside, kind);
        let place = tags.iter().position(|tag| *tag == inside);
        place.map_or(label, |place| place as u32)
    }

    /// The entities of a text by the labels of its words, in their order; none where labels are no tags. A word without a
    /// label is outside. As in seqeval's default mode, an entity also begins where `I-` or `E-` follows on what is none of
    /// its kind.
    ///
    /// # Panics
    /// When there is no such label.
    pub fn entities(&self, labels: &[Option<u32>]) -> Vec<Entity> {
        let Some(tags) = &self.tags else {
            return Vec::new();
        };
        let mut found: Vec<Entity> = Vec::new();
        let mut last = None;
        for (word, label) in labels.iter().enumerate() {
            let tag = label.map_or(Tag::Outside, |label| tags[label as usize]);
            let Tag::Within(position, kind) = tag else {
                last = None;
                continue;
            };
            let goes_on = matches!(position, Position::Inside | Position::End)
                && last.is_some_and(|(before, of)| {
                    of == kind && matches!(before, Position::Begin | Position::Inside)
                });
            match found.last_mut().filter(|_| goes_on) {
                Some(entity) => entity.words.end = word + 1,
                None => found.push(Entity {
                    kind,
                    words: word..word + 1,
                }),
            }
            last = Some((position, kind));
        }
        found
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn tags(labels: &[&str]) -> Tags {
        let labels: Vec<String> = labels.iter().map(|label| (*label).to_owned()).collect();
        Tags::of(&labels)
    }

    #[test]
    fn labels_are_completed() {
        let all = |labels: &[&str]| complete(&labels.iter().copied().collect());
        let expected = ["O", "B-date", "I-date", "B-party", "I-party"];
        assert_eq!(all(&["B-party", "I-date"]).unwrap(), expected);
        let expected = ["O", "B-x", "I-x", "E-x", "S-x"];
        assert_eq!(all(&["O", "S-x", "E-x"]).unwrap(), expected);
        assert_eq!(all(&["O", "B", "I"]).unwrap(), ["O", "B", "I"]);
        assert_eq!(all(&["O"]), None);
    }

    #[test]
    fn labels_that_are_no_tags_are_by_themselves() {
        let nouns = tags(&["NOUN", "VERB", "O"]);
        assert_eq!((nouns.kinds(), nouns.outside()), (None, None));
        assert_eq!(nouns.entities(&[Some(0), Some(0), None]), []);
        assert_eq!(nouns.continued(1), 1);
        assert!(!is_tag("Brand") && !is_tag("") && !is_tag("O-x") && !is_tag("É-x"));
        let named = tags(&["O", "B-x-y", "I-x-y", "B", "B-"]);
        assert_eq!(named.kinds().unwrap(), ["_", "x-y"]);
        assert_eq!((named.outside(), named.continued(1)), (Some(0), 2));
        assert_eq!((named.continued(0), named.continued(3)), (0, 3));
    }

    #[test]
    fn entities_begin_where_their_kind_changes() {
        let tags = tags(&["O", "B-a", "I-a", "B-b", "I-b", "E-a", "S-a"]);
        let of = |labels: &[u32]| -> Vec<(usize, Range<usize>)> {
            let labels: Vec<Option<u32>> = labels.iter().copied().map(Some).collect();
            let found = tags.entities(&labels).into_iter();
            found.map(|entity| (entity.kind, entity.words)).collect()
        };
        assert_eq!(of(&[1, 2, 0, 3]), [(0, 0..2), (1, 3..4)]);
        assert_eq!(of(&[1, 1, 2]), [(0, 0..1), (0, 1..3)]);
        assert_eq!(of(&[2, 4, 4]), [(0, 0..1), (1, 1..3)]);
        assert_eq!(
            of(&[1, 5, 2, 6, 2]),
            [(0, 0..2), (0, 2..3), (0, 3..4), (0, 4..5)]
        );
        assert_eq!(of(&[]), []);
        let gap = tags.entities(&[Some(1), None, Some(2)]);
        assert_eq!(gap.len(), 2, "{gap:?}");
    }
}
