//! A row of a data file as a task sees it: its tokens' text, and which of them are supervised.

use std::path::Path;

use graft_models::{
    Classifier, Config, DecoderClassifier, DecoderConfig, MaskedConfig, ModelConfig, ModelSource,
    ProblemType, Tokenizer, WordPlace,
};
use graft_tensor::ops::loss::IGNORE;

use crate::config::TaskKind;
use crate::conversations::{Conversations, supervise, template};
use crate::corpus::{Corpus, Pass};
use crate::data::{Chats, Columns, Dataset, Label};
use crate::documents::Documents;
use crate::encode::{Encoded, longest_text};
use crate::error::{Error, Result};
use crate::hidden::Hidden;
use crate::network::Network;
use crate::tags::OUTSIDE;

/// Which row, and how it is read.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// The model whose tokenizer and template it is
    pub model: &'a str,
    /// The data file
    pub data: &'a Path,
    /// What is learnt from it
    pub task: TaskKind,
    /// Column of the text or of the messages
    pub column: &'a str,
    /// From 1
    pub row: usize,
    /// Most tokens of a sequence
    pub max_length: Option<usize>,
}

/// A row's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Its line in the file
    pub line: usize,
    /// Each token's text, and whether it is supervised
    pub pieces: Vec<(String, bool)>,
}

/// Escape sequences around supervised text on a terminal: green, and the normal colour again.
const GREEN: &str = "\u{1b}[32m";
const PLAIN: &str = "\u{1b}[0m";

/// Reads a row as a run of that task would.
///
/// # Errors
/// A file, row or model that cannot be used; a task without supervised tokens.
pub fn show(request: &Request) -> Result<Shown> {
    let source = ModelSource::resolve(request.model)?;
    let pick = |count: usize| match request.row {
        row if (1..=count).contains(&row) => Ok(row - 1),
        row => {
            let what = format!("there is no row {row}, the file has {count}");
            Err(Error::data(
                request.data,
                None,
                what,
                "name one of them with --row",
            ))
        }
    };
    match request.task {
        TaskKind::Chat => {
            let config = DecoderConfig::load(&source)?;
            let tokenizer = Tokenizer::load(&source, config.vocab_size)?;
            let mut chats = Chats::read(request.data, request.column)?;
            let place = pick(chats.rows.len())?;
            chats.rows = vec![chats.rows.swap_remove(place)];
            // As the run checks it.
            let learnt = Conversations::new(&config, &tokenizer, &chats, request.max_length)?;
            let row = &chats.rows[0];
            let found = supervise(&template(&tokenizer)?, &tokenizer, request.data, row)?;
            let mut said = 0;
            let kept = learnt.lengths()[0];
            let tokens = found.tokens.iter().zip(&found.mask).take(kept);
            let pieces = tokens.map(|(token, &supervised)| {
                // Tokens that share a character each have all of it.
                let text = &found.text[token.span.start.max(said)..token.span.end.max(said)];
                said = token.span.end.max(said);
                (text.to_owned(), supervised)
            });
            Ok(Shown {
                line: row.line,
                pieces: pieces.collect(),
            })
        }
        TaskKind::Clm => {
            let config = DecoderConfig::load(&source)?;
            let tokenizer = Tokenizer::load(&source, config.vocab_size)?;
            documents::<Documents>(request, &config, &tokenizer, pick)
        }
        TaskKind::Mlm => {
            let config = MaskedConfig(ModelConfig::load(&source)?);
            let tokenizer = Tokenizer::load(&source, config.0.vocab_size)?;
            documents::<Hidden>(request, &config, &tokenizer, pick)
        }
        TaskKind::NER => {
            let asked = request.max_length;
            let (vocab_size, limit) = match Config::load(&source)? {
                Config::Encoder(config) => {
                    let limit = longest_text::<Classifier>(&config, asked)?;
                    (config.vocab_size, limit)
                }
                Config::Decoder(config) => {
                    let limit = longest_text::<DecoderClassifier>(&config, asked)?;
                    (config.vocab_size, limit)
                }
            };
            let tokenizer = Tokenizer::load(&source, vocab_size)?;
            words(request, &tokenizer, limit, pick)
        }
        task @ TaskKind::Texts(_) => {
            let what = format!("`{task}` supervises what a text is, and no token");
            Err(Error::config("--task", what, "name chat, clm, mlm or ner"))
        }
    }
}

/// One text whose words have labels: its tokens, behind those that are supervised the label in brackets, if it is not `O`.
fn words(
    request: &Request,
    tokenizer: &Tokenizer,
    limit: usize,
    pick: impl Fn(usize) -> Result<usize>,
) -> Result<Shown> {
    let columns = Columns {
        label: TaskKind::NER.label_column().map(str::to_owned),
        problem: ProblemType::Tokens,
        ..Columns::texts(request.column)
    };
    let mut data = Dataset::read(request.data, &columns)?;
    let place = pick(data.examples.len())?;
    data.examples = vec![data.examples.swap_remove(place)];
    let encoded = Encoded::with(limit, tokenizer, &data)?;
    let example = &data.examples[0];
    let names = example.label.iter().flat_map(Label::names);
    let mut labels = vec![None; encoded.lengths[0]];
    for (place, name) in encoded.words[0].iter().zip(names) {
        if let WordPlace::At(token) = place {
            labels[*token as usize] = Some(name);
        }
    }
    let mut stream = tokenizer.stream(false);
    let mut pieces = Vec::with_capacity(labels.len());
    for (&id, label) in encoded.encodings[0].ids.iter().zip(labels) {
        let mut text = stream.push(id)?;
        if let Some(label) = label.filter(|label| *label != OUTSIDE) {
            text.push_str(&format!("[{label}]"));
        }
        pieces.push((text, label.is_some()));
    }
    if let Some((text, _)) = pieces.last_mut() {
        text.push_str(&stream.finish()?);
    }
    Ok(Shown {
        line: example.line,
        pieces,
    })
}

/// One document: all its sequences, one after the other.
fn documents<C: Corpus<Rows = Dataset>>(
    request: &Request,
    config: &<C::Network as Network>::Config,
    tokenizer: &Tokenizer,
    pick: impl Fn(usize) -> Result<usize>,
) -> Result<Shown> {
    let mut data = C::read(request.data, request.column)?;
    let place = pick(data.examples.len())?;
    data.examples = vec![data.examples.swap_remove(place)];
    let corpus = C::new(config, tokenizer, &data, request.max_length)?;
    let sequences: Vec<usize> = (0..corpus.lengths().len()).collect();
    let seed = 0;
    let (batch, targets) = corpus.pack(Pass::Epoch { epoch: 1, seed }, &sequences);
    // A token that is predicted is the next one; one that is filled in stands in its place.
    let shift = usize::from(request.task == TaskKind::Clm);
    let mut stream = tokenizer.stream(false);
    let mut pieces = Vec::with_capacity(batch.ids.len());
    for (i, &id) in batch.ids.iter().enumerate() {
        let supervised = i >= shift && targets[i - shift] != IGNORE;
        pieces.push((stream.push(id as u32)?, supervised));
    }
    if let Some((text, _)) = pieces.last_mut() {
        text.push_str(&stream.finish()?);
    }
    Ok(Shown {
        line: data.examples[0].line,
        pieces,
    })
}

/// The task of a model where none is named: that of its class.
///
/// # Errors
/// A model that cannot be read.
pub fn usual_task(model: &str) -> Result<TaskKind> {
    Ok(match Config::load(&ModelSource::resolve(model)?)? {
        Config::Encoder(_) => TaskKind::Mlm,
        Config::Decoder(_) => TaskKind::Chat,
    })
}

impl Shown {
    /// How many tokens there are, and how many of them are supervised.
    pub fn counts(&self) -> (usize, usize) {
        let supervised = self.pieces.iter().filter(|(_, supervised)| *supervised);
        (self.pieces.len(), supervised.count())
    }

    /// The text in lines: those of supervised tokens begin with `> ` and are green where there is `colour`. A line ends
    /// where the text has a line feed, which is written as `↵`, and where supervision begins or ends.
    pub fn lines(&self, colour: bool) -> String {
        let mut out = String::new();
        let mut line = String::new();
        let mut green = false;
        let mut flush = |line: &mut String, green: bool| {
            if !line.is_empty() {
                let (on, off) = if green && colour {
                    (GREEN, PLAIN)
                } else {
                    ("", "")
                };
                let mark = if green { '>' } else { ' ' };
                out.push_str(&format!("{on}{mark} {line}{off}\n"));
                line.clear();
            }
        };
        for (text, supervised) in &self.pieces {
            if *supervised != green {
                flush(&mut line, green);
                green = *supervised;
            }
            for c in text.chars() {
                match c {
                    '\n' => {
                        line.push('↵');
                        flush(&mut line, green);
                    }
                    // A terminal would obey it.
                    c if c.is_control() => line.extend(c.escape_debug()),
                    c => line.push(c),
                }
            }
        }
        flush(&mut line, green);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn supervised_text_has_lines_of_its_own() {
        let piece = |text: &str, supervised: bool| (text.to_owned(), supervised);
        let shown = Shown {
            line: 1,
            pieces: vec![
                piece("user\n", false),
                piece("a\u{1b}[31m", false),
                piece("", true),
                piece("Four", true),
                piece(".\n\nYes", true),
                piece("<end>", true),
                piece("\n", false),
            ],
        };
        assert_eq!(
            shown.lines(false),
            "  user↵\n  a\\u{1b}[31m\n> Four.↵\n> ↵\n> Yes<end>\n  ↵\n"
        );
        assert_eq!(
            shown.lines(true),
            "  user↵\n  a\\u{1b}[31m\n\u{1b}[32m> Four.↵\u{1b}[0m\n\u{1b}[32m> ↵\u{1b}[0m\n\u{1b}[32m> Yes<end>\u{1b}[0m\n  ↵\n"
        );
        assert_eq!(shown.counts(), (7, 4));
    }
}
