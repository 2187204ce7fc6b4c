//! The labels of examples, as numbers.

use std::collections::{BTreeSet, HashMap};

use graft_models::Labels;

use super::Dataset;
use crate::error::{Error, Result, list_names};

/// The labels that occur in training examples, numbered from 0: sorted as numbers when all are integers, else by
/// their bytes.
///
/// # Errors
/// Fewer than two labels: there would be nothing to learn.
///
/// # Panics
/// When the examples were read without labels.
pub fn training_labels(data: &Dataset) -> Result<Labels> {
    let distinct: BTreeSet<&str> = data.examples.iter().map(label).collect();
    let mut names: Vec<&str> = distinct.into_iter().collect();
    if names.len() < 2 {
        return Err(Error::data(
            &data.path,
            None,
            format!(
                "every example has the label {}, expected two labels or more",
                list_names(&names, 2)
            ),
            "check that data.label names the right column",
        ));
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
    Ok(Labels::new(names.into_iter().map(str::to_owned).collect())?)
}

/// The number of each example's label, `[n]`, in a model's order.
///
/// # Errors
/// A label that the model does not have: names the first such line, how many more there are, and the labels there
/// are.
///
/// # Panics
/// When the examples were read without labels.
pub fn encode_labels(labels: &Labels, data: &Dataset) -> Result<Vec<u32>> {
    let ids: HashMap<&str, u32> = (0..)
        .zip(labels.names())
        .map(|(id, name)| (name.as_str(), id))
        .collect();
    let mut unknown = data.examples.iter().filter(|e| !ids.contains_key(label(e)));
    if let Some(example) = unknown.next() {
        let others = match unknown.count() {
            0 => String::new(),
            1 => " (and 1 more row has an unknown one)".to_owned(),
            more => format!(" (and {more} more rows have unknown ones)"),
        };
        return Err(Error::data(
            &data.path,
            Some(example.line),
            format!("unknown label `{}`{others}", label(example).escape_debug()),
            format!(
                "the known labels are {}; correct or remove the row",
                list_names(labels.names(), 20)
            ),
        ));
    }
    Ok(data.examples.iter().map(|e| ids[label(e)]).collect())
}

/// How many examples have each label, `[classes]`, of numbers below `classes`.
///
/// # Panics
/// When a number is not below `classes`.
pub fn count_labels(classes: usize, ids: &[u32]) -> Vec<usize> {
    let mut counts = vec![0; classes];
    for &id in ids {
        counts[id as usize] += 1;
    }
    counts
}

fn label(example: &super::Example) -> &str {
    example
        .label
        .as_deref()
        .expect("examples were read with labels")
}

#[cfg(test)]
mod tests {
    use miette::Diagnostic;

    use super::super::{Columns, tests::read};
    use super::*;

    fn data(labels: &[&str]) -> Dataset {
        let text: String = labels.iter().map(|label| format!("a,{label}\n")).collect();
        read(
            "d.csv",
            format!("text,label\n{text}").as_bytes(),
            &Columns::default(),
        )
        .unwrap()
    }

    #[test]
    fn training_labels_are_sorted() {
        let names = |labels: &[&str]| training_labels(&data(labels)).unwrap().names().to_vec();
        assert_eq!(names(&["pos", "neg", "pos"]), ["neg", "pos"]);
        assert_eq!(names(&["10", "9", "-1", "9"]), ["-1", "9", "10"]);
        assert_eq!(names(&["10", "9", "x"]), ["10", "9", "x"]);
        assert_eq!(names(&["1", "01"]), ["01", "1"]);
        let error = training_labels(&data(&["a", "a"])).unwrap_err();
        assert!(
            error.to_string().contains("the label `a`, expected two"),
            "{error}"
        );
    }

    #[test]
    fn unknown_labels_name_line_and_set() {
        let set = Labels::new(vec!["neg".into(), "pos".into()]).unwrap();
        let known = data(&["pos", "neg", "pos"]);
        assert_eq!(encode_labels(&set, &known).unwrap(), [1, 0, 1]);
        assert_eq!(count_labels(2, &[1, 0, 1]), [1, 2]);
        let error = encode_labels(&set, &data(&["pos", "Pos", "neutral"])).unwrap_err();
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
