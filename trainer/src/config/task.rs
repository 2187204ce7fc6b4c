//! Kinds of tasks.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use clap::builder::PossibleValue;
use graft_models::ProblemType;

use crate::data::{LABELS, TOKENS};

/// What a run learns to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskKind {
    /// What a text or a pair of texts is: one label, any number of labels, or a number; or a label for each of its words.
    Texts(ProblemType),
    /// The next token of documents: a causal language model.
    Clm,
    /// The assistant's tokens of conversations: a causal language model.
    Chat,
    /// Hidden tokens of documents: a masked language model.
    Mlm,
}

impl TaskKind {
    /// Where nothing else is said.
    pub const CLASSIFY: TaskKind = TaskKind::Texts(ProblemType::SingleLabel);

    /// A label for each word.
    pub const NER: TaskKind = TaskKind::Texts(ProblemType::Tokens);

    const ALL: [TaskKind; 7] = [
        TaskKind::CLASSIFY,
        TaskKind::Texts(ProblemType::MultiLabel),
        TaskKind::Texts(ProblemType::Regression),
        TaskKind::NER,
        TaskKind::Clm,
        TaskKind::Chat,
        TaskKind::Mlm,
    ];

    fn name(self) -> &'static str {
        match self {
            TaskKind::Texts(ProblemType::SingleLabel) => "classify",
            TaskKind::Texts(ProblemType::MultiLabel) => "multilabel",
            TaskKind::Texts(ProblemType::Regression) => "regression",
            TaskKind::Texts(ProblemType::Tokens) => "ner",
            TaskKind::Clm => "clm",
            TaskKind::Chat => "chat",
            TaskKind::Mlm => "mlm",
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            TaskKind::Texts(ProblemType::SingleLabel) => "One label per text or pair of texts",
            TaskKind::Texts(ProblemType::MultiLabel) => {
                "Any number of labels per text or pair of texts"
            }
            TaskKind::Texts(ProblemType::Regression) => "A number per text or pair of texts",
            TaskKind::Texts(ProblemType::Tokens) => {
                "A label per word: named entities, or tags of any other kind"
            }
            TaskKind::Clm => "The next token of documents: a causal language model",
            TaskKind::Chat => "The assistant's tokens of conversations: a causal language model",
            TaskKind::Mlm => "Hidden tokens of documents: a masked language model",
        }
    }

    /// Column of the text where none is named.
    pub fn text_column(self) -> &'static str {
        match self {
            TaskKind::Chat => "messages",
            TaskKind::NER => TOKENS,
            _ => "text",
        }
    }

    /// Column of the label where none is named, of a task that has labels.
    pub fn label_column(self) -> Option<&'static str> {
        match self {
            TaskKind::NER => Some(LABELS),
            TaskKind::Texts(_) => Some("label"),
            TaskKind::Clm | TaskKind::Chat | TaskKind::Mlm => None,
        }
    }
}

impl fmt::Display for TaskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for TaskKind {
    type Err = String;

    fn from_str(text: &str) -> Result<TaskKind, String> {
        let named = Self::ALL.into_iter().find(|task| task.name() == text);
        named.ok_or_else(|| format!("`{text}` is no kind of task"))
    }
}

impl ValueEnum for TaskKind {
    fn value_variants<'a>() -> &'a [TaskKind] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()).help(self.meaning()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_read_as_they_are_written() {
        for task in TaskKind::ALL {
            assert_eq!(task.to_string().parse(), Ok(task));
        }
        assert!("regress".parse::<TaskKind>().is_err());
    }
}
