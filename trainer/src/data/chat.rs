//! Conversations: JSON Lines with a list of messages in each row.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};

use super::jsonl::{LINES_EACH, Row, lines_of, wrong_type};
use super::{is_jsonl, read_text};
use crate::error::{Error, Result};

/// Column of the descriptions of tools.
const TOOLS: &str = "tools";
/// Column of further variables of the template.
const VARIABLES: &str = "chat_template_kwargs";

/// One row of a file of conversations.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// Its messages, each an object with at least a `role`.
    pub messages: Vec<Value>,
    /// Descriptions of tools, as JSON schemas, from the column `tools`.
    pub tools: Option<Vec<Value>>,
    /// Further variables of the template, from the column `chat_template_kwargs`.
    pub variables: Map<String, Value>,
    /// The line on which the row stands, from 1.
    pub line: usize,
}

/// All conversations of one file; there is at least one.
#[derive(Debug, Clone, PartialEq)]
pub struct Chats {
    /// The file.
    pub path: PathBuf,
    /// Its rows in their order.
    pub rows: Vec<Conversation>,
}

impl Chats {
    /// Reads a JSON Lines file whole; `column` holds the messages.
    ///
    /// # Errors
    /// Another extension, a file that cannot be read, is not UTF-8 or holds no row, a malformed row, a column that is
    /// missing or holds something else, no message.
    pub fn read(path: &Path, column: &str) -> Result<Chats> {
        if !is_jsonl(path) {
            let what = "conversations are read from JSON Lines: expected a name ending in .jsonl";
            let help = "write a JSON object with a list of messages on each line";
            return Err(Error::data(path, None, what, help));
        }
        let text = read_text(path)?;
        let rows: Vec<Result<Conversation>> = lines_of(&text)
            .par_iter()
            .with_min_len(LINES_EACH)
            .map(|&(line, content)| conversation(path, line, content, column))
            .collect();
        // The first error of the file, whichever was found first.
        let rows = rows.into_iter().collect::<Result<Vec<_>>>()?;
        if rows.is_empty() {
            let help = format!("expected at least one row with `{column}`");
            return Err(Error::data(path, None, "the file is empty", help));
        }
        Ok(Chats {
            path: path.to_path_buf(),
            rows,
        })
    }
}

fn conversation(path: &Path, line: usize, content: &str, column: &str) -> Result<Conversation> {
    const EXAMPLE: &str = "{\"messages\": [{\"role\": \"user\", \"content\": \"...\"}, {\"role\": \"assistant\", \"content\": \"...\"}]}";
    let row = Row::parse(path, line, content, EXAMPLE)?;
    let messages = match row.column(path, line, "text", column)? {
        Value::Array(messages) => messages.clone(),
        other => return Err(wrong_type(path, line, column, other, "a list of messages")),
    };
    if messages.is_empty() {
        let what = format!("the column `{}` holds no message", column.escape_debug());
        let help = "give the row messages or remove it";
        return Err(Error::data(path, Some(line), what, help));
    }
    for content in messages.iter().filter_map(|message| message.get("content")) {
        if content.is_number() || content.is_boolean() {
            let expected = "a string, or a list of parts";
            return Err(wrong_type(path, line, "content", content, expected));
        }
    }
    let tools = match row.get(TOOLS) {
        None | Some(Value::Null) => None,
        Some(Value::Array(tools)) => Some(tools.clone()),
        Some(other) => return Err(wrong_type(path, line, TOOLS, other, "a list of tools")),
    };
    let variables = match row.get(VARIABLES) {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(variables)) => variables.clone(),
        Some(other) => return Err(wrong_type(path, line, VARIABLES, other, "an object")),
    };
    Ok(Conversation {
        messages,
        tools,
        variables,
        line,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> Result<Chats> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        Chats::read(&path, "messages")
    }

    #[test]
    fn rows_with_tools_and_variables() {
        let text = "\n{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": [{\"name\": \"t\"}], \
                    \"id\": 3}\n\n{\"messages\": [{\"role\": \"user\"}], \"tools\": null, \
                    \"chat_template_kwargs\": {\"enable_thinking\": false}}";
        let chats = read("d.jsonl", text).unwrap();
        assert_eq!((chats.rows[0].line, chats.rows[1].line), (2, 4));
        assert_eq!(chats.rows[0].messages[0]["content"], "a");
        assert_eq!(chats.rows[0].tools.as_ref().unwrap()[0]["name"], "t");
        assert!(chats.rows[1].tools.is_none());
        assert_eq!(chats.rows[1].variables["enable_thinking"], false);
    }

    #[test]
    fn malformed_rows_name_their_line() {
        let good = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n";
        for (bad, want) in [
            ("{\"messages\": [", "malformed JSON"),
            (
                "{\"conversations\": []}",
                "the column `messages` is missing; there is `conversations`",
            ),
            (
                "{\"messages\": \"hi\"}",
                "the column `messages` is a string, expected a list of messages",
            ),
            (
                "{\"messages\": []}",
                "the column `messages` holds no message",
            ),
            (
                "{\"messages\": [{\"role\": \"user\", \"content\": 3}]}",
                "the column `content` is the number 3, expected a string, or a list of parts",
            ),
            (
                "{\"messages\": [1], \"tools\": {}}",
                "the column `tools` is an object, expected a list",
            ),
            (
                "{\"messages\": [1], \"chat_template_kwargs\": 1}",
                "is the number 1, expected an object",
            ),
        ] {
            let said = read("d.jsonl", &format!("{good}{bad}\n{good}")).unwrap_err();
            let said = said.to_string();
            assert!(
                said.contains("d.jsonl:2: ") && said.contains(want),
                "{bad}: {said}"
            );
        }
        assert!(
            read("d.csv", good)
                .unwrap_err()
                .to_string()
                .contains("ending in .jsonl")
        );
        assert!(
            read("d.jsonl", "\n")
                .unwrap_err()
                .to_string()
                .contains("the file is empty")
        );
    }
}
