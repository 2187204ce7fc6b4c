//! Conversations as token ids: the model's own template writes them, and the assistant's tokens are supervised, the one
//! that ends its turn included.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use graft_models::{
    CausalLm, ChatOptions, ChatTemplate, DecoderConfig, Supervised, TokenBatch, Tokenizer,
};
use graft_tensor::ops::loss::IGNORE;
use rayon::prelude::*;

use crate::corpus::{Corpus, Pass};
use crate::data::{Chats, Conversation};
use crate::documents::sequence_length;
use crate::error::{Error, Result};
use crate::report::{counted, thousands};

/// What templates that write the date take for now: a run is the same on every day. 26 July 2024, which the templates of
/// Llama 3 write where they know no date.
const TRAINING_DAY: Duration = Duration::from_secs(1_721_952_000);

/// The moment that conversations to learn from are written at.
fn now() -> SystemTime {
    UNIX_EPOCH + TRAINING_DAY
}

/// Tokenized conversations.
#[derive(Debug)]
pub struct Conversations {
    /// Of each conversation
    ids: Vec<Vec<u32>>,
    /// For each of its tokens, whether it is the assistant's
    supervised: Vec<Vec<bool>>,
    lengths: Vec<usize>,
    targets: Vec<usize>,
    /// Conversations that were cut
    truncated: usize,
    /// Most tokens of one
    length: usize,
}

/// The template of a model.
///
/// # Errors
/// It has none, or one that cannot be used.
pub fn template(tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    ChatTemplate::of(tokenizer)?.ok_or_else(|| {
        let what = "the model has no chat template, which turns messages into text";
        let help = "put a chat_template.jinja into its directory, or name a chat model";
        Error::config("model.path", what, help)
    })
}

/// A conversation's tokens, and which of them are the assistant's; `path` is the file it comes from.
///
/// # Errors
/// The template refuses it, or no token of it is the assistant's.
pub fn supervise(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    path: &Path,
    row: &Conversation,
) -> Result<Supervised> {
    let options = ChatOptions {
        add_generation_prompt: false,
        tools: row.tools.clone(),
        variables: row.variables.clone(),
        now: now(),
    };
    template
        .supervise(tokenizer, &row.messages, &options)
        .map_err(|error| Error::from(error).of_row(path, row.line))
}

/// Of tokens `[n]`, how many are supervised and have one in front of them that predicts them.
fn predicted(supervised: &[bool]) -> usize {
    supervised.iter().skip(1).filter(|s| **s).count()
}

impl Corpus for Conversations {
    type Network = CausalLm;
    type Rows = Chats;

    fn read(path: &Path, column: &str) -> Result<Chats> {
        Chats::read(path, column)
    }

    /// # Errors
    /// A model without a template; a conversation that the template refuses, or none of whose tokens is the assistant's,
    /// among those that `max_length` leaves.
    fn new(
        config: &DecoderConfig,
        tokenizer: &Tokenizer,
        chats: &Chats,
        max_length: Option<usize>,
    ) -> Result<Conversations> {
        let length = sequence_length(config.max_tokens(), max_length, None)?;
        let template = template(tokenizer)?;
        let learn = |row: &Conversation| -> Result<(Vec<u32>, Vec<bool>, bool)> {
            let found = supervise(&template, tokenizer, &chats.path, row)?;
            let (mut ids, mut supervised) = (found.ids(), found.mask);
            let cut = ids.len() > length;
            ids.truncate(length);
            supervised.truncate(length);
            if predicted(&supervised) == 0 {
                let whole = found.tokens.len();
                let what = match cut {
                    true => format!(
                        "none of the first {length} tokens of the conversation's {whole} is the assistant's"
                    ),
                    false => "the assistant's tokens have none in front of them".to_owned(),
                };
                let help = match cut {
                    true => "raise data.max_length, or remove the row",
                    false => "begin the conversation with another message",
                };
                return Err(Error::data(&chats.path, Some(row.line), what, help));
            }
            Ok((ids, supervised, cut))
        };
        let rows: Vec<Result<_>> = chats.rows.par_iter().map(learn).collect();
        let count = rows.len();
        let mut all = Conversations {
            ids: Vec::with_capacity(count),
            supervised: Vec::with_capacity(count),
            lengths: Vec::with_capacity(count),
            targets: Vec::with_capacity(count),
            truncated: 0,
            length,
        };
        for row in rows {
            // The first error of the file, whichever was found first.
            let (ids, supervised, cut) = row?;
            all.lengths.push(ids.len());
            all.targets.push(predicted(&supervised));
            all.ids.push(ids);
            all.supervised.push(supervised);
            all.truncated += usize::from(cut);
        }
        Ok(all)
    }

    fn note(&self, path: &Path) -> String {
        let count = |n: usize| thousands(n as u64);
        let tokens = self.lengths.iter().sum();
        let cut = match self.truncated {
            0 => String::new(),
            n => format!("; {} were cut to {}", count(n), count(self.length)),
        };
        format!(
            "{}: {}, {}, {} of them the assistant's{cut}",
            path.display(),
            counted(self.ids.len(), "conversation"),
            counted(tokens, "token"),
            count(self.targets.iter().sum()),
        )
    }

    fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    fn targets(&self, sequence: usize) -> usize {
        self.targets[sequence]
    }

    fn truncated(&self) -> usize {
        self.truncated
    }

    fn pack(&self, _: Pass, sequences: &[usize]) -> (TokenBatch, Vec<i64>) {
        let mut batch = TokenBatch::new();
        let mut next = Vec::new();
        for &i in sequences {
            let (ids, supervised) = (&self.ids[i], &self.supervised[i]);
            batch.ids.extend(ids.iter().map(|&id| i64::from(id)));
            batch.offsets.push(batch.ids.len() as i64);
            let behind = ids.iter().zip(supervised).skip(1);
            next.extend(behind.map(|(&id, &s)| if s { i64::from(id) } else { IGNORE }));
            next.push(IGNORE);
        }
        batch.type_ids = vec![0; batch.ids.len()];
        (batch, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_in_front_predicts_a_supervised_one() {
        let data = Conversations {
            ids: vec![vec![5, 6, 7, 8], vec![9, 10]],
            supervised: vec![vec![false, true, false, true], vec![true, true]],
            lengths: vec![4, 2],
            targets: vec![2, 1],
            truncated: 0,
            length: 10,
        };
        let (batch, next) = data.pack(Pass::Evaluation, &[1, 0]);
        assert_eq!(batch.ids, [9, 10, 5, 6, 7, 8]);
        assert_eq!(batch.offsets, [0, 2, 6]);
        // A first token is the assistant's here, and nothing predicts it.
        assert_eq!(next, [10, IGNORE, 6, IGNORE, 8, IGNORE]);
        assert_eq!(predicted(&data.supervised[1]), 1);
    }
}
