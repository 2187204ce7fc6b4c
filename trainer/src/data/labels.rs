//! The labels of examples, as numbers.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use graft_models::{Labels, ProblemType};

use super::{Dataset, Example, Form, Label};
use crate::encode::Encoded;
use crate::error::{Error, Result, list_names};
use crate::tags::{self, Tags};
use crate::targets::{TaggedText, Targets};
use crate::text_classifier::Outputs;

/// What a head for these training examples gives: an output for each label that occurs, or one for the number. Labels are
/// numbered from 0: sorted as numbers when all are integers, else by their bytes; those of entities are
/// [completed](tags::complete).
///
/// # Errors
/// Fewer labels than there is something to learn from: two, of which one is right, or one, which is right or not; labels
/// that differ in spaces around them alone, of which one is a slip; tags of entities among labels that are none.
///
/// # Panics
/// When the examples were read without labels.
pub fn training_labels(data: &Dataset) -> Result<Outputs> {
    let problem = data.problem;
    let outputs = |labels| Outputs { labels, problem };
    let distinct: BTreeSet<&str> = data
        .examples
        .iter()
        .flat_map(|example| label(example).names())
        .map(String::as_str)
        .collect();
    let mut names: Vec<&str> = distinct.into_iter().collect();
    let few = |found: String, expected: &str| {
        let help = "check that data.label names the right column";
        let what = format!("{found}, expected {expected}");
        Err(Error::data(&data.path, None, what, help))
    };
    // Sorted, such labels need not be neighbours: `a`, `a b`, `a `.
    let mut trimmed: HashMap<&str, &str> = HashMap::new();
    for &name in &names {
        if let Some(other) = trimmed.insert(name.trim(), name) {
            let spelled = |wanted: &str| {
                let has = |example: &&Example| label(example).names().iter().any(|n| n == wanted);
                data.examples.iter().find(has).map(|example| example.line)
            };
            let what = format!(
                "the labels {} differ in spaces alone",
                list_names(&[other, name], 2)
            );
            let help = "write one of the two everywhere";
            return Err(Error::data(
                &data.path,
                spelled(other).max(spelled(name)),
                what,
                help,
            ));
        }
    }
    match problem {
        ProblemType::Regression => return Ok(outputs(Labels::numbered(1))),
        ProblemType::Tokens => match labels_of_entities(data, &names)? {
            Some(names) => return Ok(outputs(Labels::new(names)?)),
            None if names.len() < 2 => {
                let only = list_names(&names, 2);
                return few(
                    format!("every word has the label {only}"),
                    "two labels or more",
                );
            }
            None => {}
        },
        ProblemType::MultiLabel if names.is_empty() => {
            return few("no example has a label".to_owned(), "one or more");
        }
        ProblemType::SingleLabel if names.len() < 2 => {
            let only = list_names(&names, 2);
            return few(
                format!("every example has the label {only}"),
                "two labels or more",
            );
        }
        _ => {}
    }
    // `01` and `1` are different names of one number: then only their spelling can order them.
    let number = |name: &&str| {
        name.parse::<i128>()
            .ok()
            .filter(|n| n.to_string() == **name)
    };
    if names.iter().all(|name| number(name).is_some()) {
        names.sort_by_key(number);
    }
    let names = names.into_iter().map(str::to_owned).collect();
    Ok(outputs(Labels::new(names)?))
}

/// The labels of a head for entities, if the `names` that occur are tags of such.
///
/// # Errors
/// Some are, and others are not: names the first word that has one of these.
fn labels_of_entities(data: &Dataset, names: &[&str]) -> Result<Option<Vec<String>>> {
    let other = |name: &str| !tags::is_tag(name);
    let tag = names.iter().find(|name| name.contains('-') && !other(name));
    let Some(tag) = tag.filter(|_| names.iter().any(|name| other(name))) else {
        let all = names.iter().all(|name| !other(name));
        let names = names.iter().copied().collect();
        return Ok(all.then(|| tags::complete(&names)).flatten());
    };
    let places = data.examples.iter().flat_map(|example| {
        let names = label(example).names().iter().enumerate();
        names.map(move |(word, name)| (line_of(example, word), name))
    });
    let (line, name) = { places }
        .find(|(_, name)| other(name))
        .map_or((None, ""), |(line, name)| (Some(line), name.as_str()));
    let what = format!(
        "the label `{}` is no tag of an entity, and `{}` is one",
        name.escape_debug(),
        tag.escape_debug()
    );
    let help = "write O, or B- or I- and a kind; or let no label begin with such a letter and -";
    Err(Error::data(&data.path, line, what, help))
}

/// The line of a word, or of its row.
fn line_of(example: &Example, word: usize) -> usize {
    match &example.words {
        Some(words) if words.form == Form::Lines => example.line + word,
        _ => example.line,
    }
}

/// What a model with these labels should give for each example, as it was `encoded`.
///
/// # Errors
/// A label that the model does not have: names the first such line, how many more there are, and the labels there
/// are. Words none of which has a token.
///
/// # Panics
/// When the examples were read without labels.
pub fn encode_labels(labels: &Labels, data: &Dataset, encoded: &Encoded) -> Result<Targets> {
    let ids: HashMap<&str, u32> = (0..)
        .zip(labels.names())
        .map(|(id, name)| (name.as_str(), id))
        .collect();
    let unknown = |example: &Example| {
        let mut names = label(example).names().iter().enumerate();
        let (place, name) = names.find(|(_, name)| !ids.contains_key(name.as_str()))?;
        Some((line_of(example, place), name.clone()))
    };
    let mut wrong = data.examples.iter().filter_map(unknown);
    if let Some((line, name)) = wrong.next() {
        let others = match wrong.count() {
            0 => String::new(),
            1 => " (and 1 more row has an unknown one)".to_owned(),
            more => format!(" (and {more} more rows have unknown ones)"),
        };
        return Err(Error::data(
            &data.path,
            Some(line),
            format!("unknown label `{}`{others}", name.escape_debug()),
            format!(
                "the known labels are {}; correct or remove the row",
                list_names(labels.names(), 20)
            ),
        ));
    }
    let all = data.examples.iter().map(label);
    Ok(match data.problem {
        ProblemType::SingleLabel => Targets::Classes {
            classes: labels.count(),
            right: all.map(|label| ids[label.names()[0].as_str()]).collect(),
        },
        ProblemType::MultiLabel => Targets::Sets {
            labels: labels.count(),
            right: all
                .map(|label| {
                    let mut set: Vec<u32> = label
                        .names()
                        .iter()
                        .map(|name| ids[name.as_str()])
                        .collect();
                    set.sort_unstable();
                    set
                })
                .collect(),
        },
        ProblemType::Tokens => Targets::Words {
            tags: Arc::new(Tags::of(labels.names())),
            right: all
                .zip(encoded.words.iter().zip(&encoded.lengths))
                .zip(&data.examples)
                .map(|((label, (places, &tokens)), example)| {
                    let names = label.names().iter().map(|name| ids[name.as_str()]);
                    let text = TaggedText {
                        tokens,
                        words: places.iter().copied().zip(names).collect(),
                    };
                    match text.supervised() {
                        0 => {
                            let what = "no word of the row has a token";
                            let help = "remove the row, or allow more tokens";
                            Err(Error::data(&data.path, Some(example.line), what, help))
                        }
                        _ => Ok(text),
                    }
                })
                .collect::<Result<_>>()?,
        },
        ProblemType::Regression => Targets::Numbers(
            all.map(|label| match label {
                Label::Number(number) => *number,
                other => panic!("labels were read as {other:?}, not as numbers"),
            })
            .collect(),
        ),
    })
}

fn label(example: &Example) -> &Label {
    example
        .label
        .as_ref()
        .expect("examples were read with labels")
}

#[cfg(test)]
mod tests {
    use miette::Diagnostic;

    use super::super::{Columns, tests::read};
    use super::*;

    fn data_of(problem: ProblemType, labels: &[&str]) -> Dataset {
        let text: String = labels.iter().map(|label| format!("a,{label}\n")).collect();
        let columns = Columns {
            problem,
            ..Columns::default()
        };
        let text = format!("text,label\n{text}");
        read("d.csv", text.as_bytes(), &columns).unwrap()
    }

    fn data(labels: &[&str]) -> Dataset {
        data_of(ProblemType::SingleLabel, labels)
    }

    /// Of texts, to which their tokens make no difference.
    fn encode(labels: &Labels, data: &Dataset) -> Result<Targets> {
        encode_labels(labels, data, &Encoded::default())
    }

    #[test]
    fn training_labels_are_sorted() {
        let outputs = |labels: &[&str]| training_labels(&data(labels));
        let names = |labels: &[&str]| outputs(labels).unwrap().labels.names().to_vec();
        assert_eq!(names(&["pos", "neg", "pos"]), ["neg", "pos"]);
        assert_eq!(names(&["10", "9", "-1", "9"]), ["-1", "9", "10"]);
        assert_eq!(names(&["10", "9", "x"]), ["10", "9", "x"]);
        assert_eq!(names(&["1", "01"]), ["01", "1"]);
        let error = outputs(&["a", "a"]).unwrap_err();
        assert!(
            error.to_string().contains("the label `a`, expected two"),
            "{error}"
        );
        let error = outputs(&["a", "a b", "a", "a "]).unwrap_err().to_string();
        assert!(
            error.ends_with("d.csv:5: the labels `a` and `a ` differ in spaces alone"),
            "{error}"
        );
    }

    #[test]
    fn sets_have_a_label_for_each_name_in_them() {
        let problem = ProblemType::MultiLabel;
        let sets = data_of(problem, &["b|a", "", "c|a", "a"]);
        let outputs = training_labels(&sets).unwrap();
        assert_eq!(outputs.labels.names(), ["a", "b", "c"]);
        assert_eq!(
            encode(&outputs.labels, &sets).unwrap(),
            Targets::Sets {
                labels: 3,
                right: vec![vec![0, 1], vec![], vec![0, 2], vec![0]],
            }
        );
        // One label, which a text has or has not, is something to learn; none is not.
        let one = data_of(problem, &["a", ""]);
        assert_eq!(training_labels(&one).unwrap().labels.count(), 1);
        let none = training_labels(&data_of(problem, &["", ""])).unwrap_err();
        assert!(
            none.to_string().contains("no example has a label"),
            "{none}"
        );
        let unknown = data_of(problem, &["a", "b|x", "y"]);
        let said = encode(&outputs.labels, &unknown).unwrap_err();
        assert!(
            said.to_string()
                .contains("d.csv:3: unknown label `x` (and 1 more row"),
            "{said}"
        );
    }

    fn words(name: &str, text: &str) -> Dataset {
        let columns = Columns {
            label: Some("labels".into()),
            problem: ProblemType::Tokens,
            ..Columns::texts("tokens")
        };
        read(name, text.as_bytes(), &columns).unwrap()
    }

    #[test]
    fn labels_of_entities_are_completed_and_others_are_not() {
        let names = |text: &str| training_labels(&words("d.conll", text));
        let of = |text: &str| names(text).unwrap().labels.names().to_vec();
        assert_eq!(
            of("a B-y
b O

c I-x
"),
            ["O", "B-x", "I-x", "B-y", "I-y"]
        );
        assert_eq!(
            of("a NOUN
b DET
"),
            ["DET", "NOUN"]
        );
        assert_eq!(
            of("a 10
b 9
"),
            ["9", "10"]
        );
        for (text, want) in [
            (
                "a O
b O
",
                "d.conll: every word has the label `O`",
            ),
            (
                "a X
b X
",
                "every word has the label `X`",
            ),
            (
                "a O
b B-x

c O
d PER
",
                "d.conll:5: the label `PER` is no tag of an entity, and `B-x` is one",
            ),
        ] {
            let said = names(text).unwrap_err().to_string();
            assert!(said.contains(want), "{said}");
        }
    }

    #[test]
    fn an_unknown_label_of_a_word_names_its_line() {
        let known = training_labels(&words(
            "d.conll",
            "a B-x
b O
",
        ))
        .unwrap();
        let encode = |data: &Dataset| encode(&known.labels, data).unwrap_err().to_string();
        let said = encode(&words(
            "d.conll",
            "a O
b O

c O
d B-z
e B-z

f B-w
",
        ));
        let want = "d.conll:5: unknown label `B-z` (and 1 more row";
        assert!(said.contains(want), "{said}");
        let row = "{\"tokens\": [\"a\", \"b\"], \"labels\": [\"O\", \"B-z\"]}\n";
        let said = encode(&words("d.jsonl", row));
        assert!(said.contains("d.jsonl:1: unknown label `B-z`"), "{said}");
    }

    #[test]
    fn numbers_have_one_output() {
        let problem = ProblemType::Regression;
        let numbers = data_of(problem, &["1.5", "-2"]);
        let outputs = training_labels(&numbers).unwrap();
        assert_eq!((outputs.labels.count(), outputs.problem), (1, problem));
        assert_eq!(
            encode(&outputs.labels, &numbers).unwrap(),
            Targets::Numbers(vec![1.5, -2.0])
        );
    }

    #[test]
    fn unknown_labels_name_line_and_set() {
        let set = Labels::new(vec!["neg".into(), "pos".into()]).unwrap();
        let encode = |labels: &[&str]| encode(&set, &data(labels));
        assert_eq!(
            encode(&["pos", "neg", "pos"]).unwrap(),
            Targets::Classes {
                classes: 2,
                right: vec![1, 0, 1],
            }
        );
        let error = encode(&["pos", "Pos", "neutral"]).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("d.csv:3: unknown label `Pos` (and 1 more row"),
            "{message}"
        );
        assert!(
            error
                .help()
                .unwrap()
                .to_string()
                .contains("`neg` and `pos`")
        );
    }
}
