//! The set of labels of a task, numbered.

use std::collections::{BTreeSet, HashMap};

use super::Dataset;
use crate::error::{Error, Result, list_names};

/// Label names, numbered from 0 in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelSet {
    names: Vec<String>,
    ids: HashMap<String, u32>,
}

impl LabelSet {
    /// The labels that occur in training examples: sorted as numbers when all are integers, else by their bytes.
    ///
    /// # Errors
    /// Fewer than two labels: there would be nothing to learn.
    ///
    /// # Panics
    /// When the examples were read without labels.
    pub fn from_training(data: &Dataset) -> Result<LabelSet> {
        let distinct: BTreeSet<&str> = data
            .examples
            .iter()
            .map(|e| e.label.as_deref().expect("examples were read with labels"))
            .collect();
        if distinct.len() < 2 {
            let names: Vec<&str> = distinct.into_iter().collect();
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
        let mut names: Vec<&str> = distinct.into_iter().collect();
        // `01` and `1` are different names of one number: then only their spelling can order them.
        let number = |name: &&str| {
            name.parse::<i128>()
                .ok()
                .filter(|n| n.to_string() == **name)
        };
        if names.iter().all(|name| number(name).is_some()) {
            names.sort_by_key(number);
        }
        Ok(LabelSet::from_names(
            names.into_iter().map(str::to_owned).collect(),
        ))
    }

    /// Labels in the order of a model's `id2label`. Of equal names the first counts.
    pub fn from_names(names: Vec<String>) -> LabelSet {
        let mut ids = HashMap::with_capacity(names.len());
        for (id, name) in names.iter().enumerate() {
            ids.entry(name.clone()).or_insert(id as u32);
        }
        LabelSet { names, ids }
    }

    /// The names, by number.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The number of a label.
    pub fn id(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    /// The number of each example's label, `[n]`.
    ///
    /// # Errors
    /// A label that is not in the set: names the first such line, how many lines there are in all, and the set.
    ///
    /// # Panics
    /// When the examples were read without labels.
    pub fn encode(&self, data: &Dataset) -> Result<Vec<u32>> {
        let mut unknown = data.examples.iter().filter_map(|e| {
            let label = e.label.as_deref().expect("examples were read with labels");
            self.id(label).is_none().then_some((e.line, label))
        });
        if let Some((line, label)) = unknown.next() {
            let more = unknown.count();
            let others = match more {
                0 => String::new(),
                1 => " (and so does 1 more row)".to_owned(),
                _ => format!(" (and so do {more} more rows)"),
            };
            return Err(Error::data(
                &data.path,
                Some(line),
                format!(
                    "the row has the unknown label `{}`{others}",
                    label.escape_debug()
                ),
                format!(
                    "the known labels are {}; correct or remove the row",
                    list_names(&self.names, 20)
                ),
            ));
        }
        let ids = data
            .examples
            .iter()
            .filter_map(|e| self.id(e.label.as_deref()?));
        Ok(ids.collect())
    }

    /// How many examples have each label, `[classes]`, of numbers from [`LabelSet::encode`].
    pub fn count(&self, ids: &[u32]) -> Vec<usize> {
        let mut counts = vec![0; self.names.len()];
        for &id in ids {
            counts[id as usize] += 1;
        }
        counts
    }
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
        let names = |labels: &[&str]| {
            LabelSet::from_training(&data(labels))
                .unwrap()
                .names()
                .to_vec()
        };
        assert_eq!(names(&["pos", "neg", "pos"]), ["neg", "pos"]);
        assert_eq!(names(&["10", "9", "-1", "9"]), ["-1", "9", "10"]);
        assert_eq!(names(&["10", "9", "x"]), ["10", "9", "x"]);
        assert_eq!(names(&["1", "01"]), ["01", "1"]);
        let error = LabelSet::from_training(&data(&["a", "a"])).unwrap_err();
        assert!(
            error.to_string().contains("the label `a`, expected two"),
            "{error}"
        );
    }

    #[test]
    fn unknown_labels_name_line_and_set() {
        let set = LabelSet::from_names(vec!["neg".into(), "pos".into()]);
        let known = data(&["pos", "neg", "pos"]);
        assert_eq!(set.encode(&known).unwrap(), [1, 0, 1]);
        assert_eq!(set.count(&[1, 0, 1]), [1, 2]);
        let error = set.encode(&data(&["pos", "Pos", "neutral"])).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("d.csv:3: the row has the unknown label `Pos`"),
            "{message}"
        );
        assert!(message.contains("1 more row"), "{message}");
        assert!(
            error
                .help()
                .unwrap()
                .to_string()
                .contains("`neg` and `pos`")
        );
    }
}
