//! The commands about data: `data show`, `tokenizer`.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use graft_models::config::CONFIG_FILE;
use graft_models::tokenizer::TOKENIZER_FILE;
use graft_models::{Config, ModelSource, atomic, train_bpe};

use super::{column_applies, print};
use crate::config::TaskKind;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::report::thousands;
use crate::show::{Request, show, usual_task};

/// Arguments of `trainer data`.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: DataCommand,
}

/// The subcommands of `trainer data`.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Print a row as a task sees it, with the tokens that the loss is over marked.
    Show(ShowArgs),
}

/// When to write colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Colour {
    /// On a terminal, unless the environment has NO_COLOR.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Arguments of `trainer data show`.
#[derive(Debug, Args)]
#[command(
    after_help = "Lines of supervised tokens begin with \"> \", and are green on a terminal; a line feed of the text is shown as ↵. For ner,
labels other than O stand in brackets behind the tokens that are to have them.

Examples:
  trainer data show chat.jsonl --model DIR
  trainer data show domain.jsonl --model DIR --task clm --row 3"
)]
pub struct ShowArgs {
    /// Data file.
    #[arg(value_name = "FILE")]
    pub data: PathBuf,
    /// Model whose tokenizer and chat template are used.
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// What is learnt from the file: chat, clm, mlm or ner; chat for a decoder, mlm for an encoder if absent.
    #[arg(long, value_name = "KIND")]
    pub task: Option<TaskKind>,
    /// Row, from 1.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub row: usize,
    /// Column of the text, of the messages, or of the words.
    #[arg(long, value_name = "NAME")]
    pub text_column: Option<String>,
    /// Most tokens of one sequence.
    #[arg(long, value_name = "N")]
    pub max_length: Option<usize>,
    /// When to write colours.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub color: Colour,
}

pub(super) fn data(args: &DataArgs) -> Result<()> {
    let DataCommand::Show(args) = &args.command;
    let task = match args.task {
        Some(task) => task,
        None => usual_task(&args.model)?,
    };
    let column = ("--text-column", args.text_column.as_deref());
    column_applies(column, task == TaskKind::NER, [&args.data].into_iter())?;
    let shown = show(&Request {
        model: &args.model,
        data: &args.data,
        task,
        column: args.text_column.as_deref().unwrap_or(task.text_column()),
        row: args.row,
        max_length: args.max_length,
    })?;
    let colour = match args.color {
        Colour::Always => true,
        Colour::Never => false,
        Colour::Auto => io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    };
    let (tokens, supervised) = shown.counts();
    print(&format!(
        "{}{}:{}: {} tokens, {} of them supervised\n",
        shown.lines(colour),
        args.data.display(),
        shown.line,
        thousands(tokens as u64),
        thousands(supervised as u64),
    ))
}

/// Arguments of `trainer tokenizer`.
#[derive(Debug, Args)]
#[command(
    after_help = "The tokenizer is byte-level BPE, as GPT-2's; its token 0, <|endoftext|>, begins and ends a text.

Example:
  trainer tokenizer --data text.txt --out DIR    (as large as DIR/config.json says)"
)]
pub struct TokenizerArgs {
    /// Texts (.txt, .jsonl, .csv, .tsv); may be repeated.
    #[arg(long, value_name = "FILE", required = true)]
    pub data: Vec<PathBuf>,
    /// Column of the text; text, if absent.
    #[arg(long, value_name = "NAME")]
    pub text_column: Option<String>,
    /// Most tokens; `vocab_size` of the config.json in --out if absent.
    #[arg(long, value_name = "N")]
    pub vocab_size: Option<usize>,
    /// Directory to write tokenizer.json and tokenizer_config.json into.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

pub(super) fn tokenizer(args: &TokenizerArgs) -> Result<()> {
    let existing = args.out.join(TOKENIZER_FILE);
    if existing.exists() {
        let what = format!("{} is there already", existing.display());
        return Err(Error::config(
            "--out",
            what,
            "remove it, or name another directory",
        ));
    }
    let column = ("--text-column", args.text_column.as_deref());
    column_applies(column, false, args.data.iter())?;
    let vocab_size = vocabulary(args)?;
    let column = args.text_column.as_deref().unwrap_or("text");
    let data = args.data.iter();
    let data: Vec<Dataset> = data
        .map(|path| Dataset::documents(path, column))
        .collect::<Result<_>>()?;
    let examples = data.iter().flat_map(|data| &data.examples);
    // Lines are worked on at once; no token reaches across one in any case.
    let lines: Vec<&str> = examples
        .flat_map(|e| e.text.split_inclusive('\n'))
        .collect();
    if lines.iter().all(|line| line.trim().is_empty()) {
        let help = "name files with text in them";
        return Err(Error::config("--data", "no file holds any text", help));
    }
    let files = train_bpe(lines.iter().copied(), vocab_size)?;
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io("create", &args.out, e))?;
    for (name, bytes) in files {
        atomic::write_file(args.out.join(name), |file| file.write_all(&bytes))?;
    }
    let source = ModelSource::directory(&args.out)?;
    let made = graft_models::Tokenizer::load(&source, vocab_size)?;
    let tokens = thousands(made.tokens() as u64);
    print(&format!("{}: {tokens} tokens\n", existing.display()))
}

/// The size that was asked for, and that config.json agrees with where there is one.
fn vocabulary(args: &TokenizerArgs) -> Result<usize> {
    let config = args.out.join(CONFIG_FILE);
    let refuse = |what: String, help: &str| Err(Error::config(config.display(), what, help));
    let stated = match config.exists() {
        false => None,
        true => match Config::load(&ModelSource::directory(&args.out)?)? {
            Config::Encoder(_) => {
                let what = "it describes an encoder, whose tokenizers are made otherwise";
                return refuse(what.to_owned(), "take the tokenizer of a published one");
            }
            Config::Decoder(config) => {
                let ends = &config.eos_token_ids;
                if *ends != [0] {
                    let what = format!("`eos_token_id` is {ends:?}, expected 0, <|endoftext|>");
                    return refuse(what, "set eos_token_id and bos_token_id to 0");
                }
                Some(config.vocab_size)
            }
        },
    };
    match (args.vocab_size, stated) {
        (Some(asked), Some(stated)) if asked > stated => {
            let what = format!("`vocab_size` is {stated}, expected {asked} or more");
            refuse(what, "ask for no more than that, or correct it")
        }
        (Some(size), _) | (None, Some(size)) => Ok(size),
        (None, None) => {
            let what = format!("it is absent, and {} is not there", config.display());
            Err(Error::config(
                "--vocab-size",
                what,
                "give it, for example 4096",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn arguments(out: &Path, vocab_size: Option<usize>) -> TokenizerArgs {
        TokenizerArgs {
            data: vec![],
            text_column: None,
            vocab_size,
            out: out.to_path_buf(),
        }
    }

    #[test]
    fn the_size_is_that_of_the_configuration_unless_another_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let size = |asked| vocabulary(&arguments(dir.path(), asked));
        assert!(size(None).unwrap_err().to_string().contains("--vocab-size"));
        assert_eq!(size(Some(300)).unwrap(), 300);
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tiny-gpt2");
        let text = std::fs::read_to_string(fixture.join("config.json")).unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, &text).unwrap();
        assert!(size(None).unwrap_err().to_string().contains("expected 0"));
        let text = text.replace("\"eos_token_id\": 2", "\"eos_token_id\": 0");
        std::fs::write(&path, &text).unwrap();
        assert_eq!(size(None).unwrap(), 101);
        assert_eq!(size(Some(100)).unwrap(), 100);
        assert!(
            size(Some(102))
                .unwrap_err()
                .to_string()
                .contains("is 101, expected 102")
        );
    }
}
