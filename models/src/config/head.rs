//! What a model is for, which configs of all families state alike: its class, and what the outputs of a classification
//! head are called and mean.

use serde_json::{Map, Value};

use super::put;
use super::read::Reader;
use crate::error::{Error, Result, Shown};

/// How the names of transformers' classes end that classify texts...
const TEXTS: &str = "ForSequenceClassification";
/// ...and tokens.
const TOKENS: &str = "ForTokenClassification";

/// What a model is for.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadConfig {
    /// Classes of transformers that can load the checkpoint.
    pub architectures: Vec<String>,
    /// The names of a classification head's outputs.
    pub labels: Labels,
    /// What these outputs mean, if it is stated.
    pub problem_type: Option<ProblemType>,
}

impl HeadConfig {
    /// Whether the checkpoint says that this class of transformers can load it.
    pub fn is(&self, class: &str) -> bool {
        self.architectures.iter().any(|name| name == class)
    }

    /// What the outputs of a classification head mean: what the class says, or `problem_type`, or how many there are.
    pub fn problem(&self) -> ProblemType {
        self.problem_with(&self.labels)
    }

    /// [`HeadConfig::problem`] if the outputs had these labels and nothing new were stated.
    pub fn problem_with(&self, labels: &Labels) -> ProblemType {
        match self.is_any(TOKENS) {
            true => ProblemType::Tokens,
            false => ProblemType::of(self.problem_type, labels),
        }
    }

    /// Whether one of the classes is of a kind, by the end of its name.
    fn is_any(&self, kind: &str) -> bool {
        self.architectures.iter().any(|class| class.ends_with(kind))
    }

    /// A classifier's.
    pub(super) fn classifier(class: &str, labels: Labels, problem_type: ProblemType) -> HeadConfig {
        HeadConfig {
            architectures: vec![class.to_string()],
            labels,
            problem_type: problem_type.name().map(|_| problem_type),
        }
    }

    /// That of a model whose outputs are the vocabulary. Labels that the file stated, whose keys are `raw`, are gone.
    pub(super) fn vocabulary(class: &str, raw: &mut Map<String, Value>) -> HeadConfig {
        for key in ["id2label", "label2id", "num_labels"] {
            raw.remove(key);
        }
        HeadConfig {
            architectures: vec![class.to_string()],
            labels: Labels::default(),
            problem_type: None,
        }
    }

    pub(super) fn read(read: &Reader) -> Result<HeadConfig> {
        Ok(HeadConfig {
            labels: read.labels()?,
            problem_type: read.problem_type()?,
            architectures: read.architectures()?,
        })
    }

    /// Sets the keys of a file.
    pub(super) fn put(&self, map: &mut Map<String, Value>) {
        // A file that names no class stays as it is, whether it says null, [] or nothing.
        if !self.architectures.is_empty() {
            put(map, &["architectures"], self.architectures.clone().into());
        }
        let classifies = self.is_any(TEXTS) || self.is_any(TOKENS);
        if classifies || map.contains_key("id2label") || self.labels != Labels::default() {
            let names = self.labels.names().iter().enumerate();
            let id2label: Map<_, _> = names
                .clone()
                .map(|(i, n)| (i.to_string(), n.clone().into()))
                .collect();
            let label2id: Map<_, _> = names.map(|(i, n)| (n.clone(), i.into())).collect();
            put(map, &["id2label"], id2label.into());
            put(map, &["label2id"], label2id.into());
            // Old spellings of the count; the labels say it.
            map.remove("num_labels");
            map.remove("_num_labels");
        }
        match self.problem_type.and_then(ProblemType::name) {
            Some(name) => put(map, &["problem_type"], name.into()),
            None => {
                map.remove("problem_type");
            }
        }
    }
}

/// What the outputs of the head mean, and so which loss fits them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProblemType {
    /// Each output is a number to predict.
    Regression,
    /// Exactly one label is right.
    SingleLabel,
    /// Any number of labels is right.
    MultiLabel,
    /// Exactly one label is right, of each token. The class says it, and no `problem_type`.
    Tokens,
}

impl ProblemType {
    /// Those that a configuration states, and how.
    pub(super) const STATED: [(&'static str, ProblemType); 3] = [
        ("regression", ProblemType::Regression),
        ("single_label_classification", ProblemType::SingleLabel),
        ("multi_label_classification", ProblemType::MultiLabel),
    ];

    /// What the outputs of a head over texts mean where a configuration may state it, by the rule of transformers: without a
    /// statement, a single output is a number, and of several one is right.
    fn of(stated: Option<ProblemType>, labels: &Labels) -> ProblemType {
        stated.unwrap_or(match labels.count() {
            1 => ProblemType::Regression,
            _ => ProblemType::SingleLabel,
        })
    }

    /// `problem_type` in config.json, where it has such a name.
    fn name(self) -> Option<&'static str> {
        let mut stated = Self::STATED.into_iter();
        let (name, _) = stated.find(|(_, problem)| *problem == self)?;
        Some(name)
    }
}

/// The names of the outputs, by index: distinct, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labels {
    pub(super) names: Vec<String>,
}

impl Labels {
    /// Names in the order of the outputs.
    ///
    /// # Errors
    /// [`Error::Config`] if there are none, too many, or two are the same.
    pub fn new(names: Vec<String>) -> Result<Labels> {
        Self::checked(names, "the labels given")
    }

    /// `LABEL_0`, `LABEL_1`, ... as transformers names what nobody named; at least one.
    pub fn numbered(count: usize) -> Labels {
        Labels {
            names: (0..count.max(1)).map(|i| format!("LABEL_{i}")).collect(),
        }
    }

    /// The names in the order of the outputs.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Number of outputs.
    pub fn count(&self) -> usize {
        self.names.len()
    }

    /// The output that has this name.
    pub fn id(&self, name: &str) -> Option<usize> {
        self.names.iter().position(|n| n == name)
    }

    pub(super) fn checked(names: Vec<String>, file: &str) -> Result<Labels> {
        let wrong = |found: String, expected: &str, help: &str| Error::Config {
            file: file.to_string(),
            key: "id2label".to_string(),
            found,
            expected: expected.to_string(),
            help: help.to_string(),
        };
        if names.is_empty() || names.len() > MAX_LABELS {
            let expected = format!("between 1 and {MAX_LABELS}");
            return Err(wrong(
                format!("{} labels", names.len()),
                &expected,
                "state the labels of the task",
            ));
        }
        let mut seen = std::collections::HashSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(name.as_str())) {
            return Err(wrong(
                format!("the label \"{}\" twice", Shown(twice)),
                "distinct labels",
                "rename one of them",
            ));
        }
        Ok(Labels { names })
    }
}

impl Default for Labels {
    /// Two numbered labels: what transformers assumes when a config states none.
    fn default() -> Labels {
        Labels::numbered(2)
    }
}

/// Most labels of a head.
pub const MAX_LABELS: usize = 1 << 20;
