//! The command line: arguments in, exit code out.
//!
//! 0 is success, 1 anything a user can correct (with a message and a help on standard error), 2 a usage error that
//! clap reports.

mod commands;
mod data;
mod delta;
mod generate;
mod merge;
mod output;
mod run_args;
mod signals;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme};

pub use data::{Colour, DataArgs, DataCommand, ShowArgs, TokenizerArgs};
pub use delta::{ApplyArgs, DiffArgs, RevertArgs};
pub use generate::GenerateArgs;
pub use merge::MergeArgs;
pub use run_args::RunArgs;

use crate::adapted::AdapterArgs;
use crate::config::{KEYS, RunConfig, TaskKind};
use crate::data::{has_columns, without_columns};
use crate::device::DeviceArgs;
use crate::error::{Error, Result, list_names};
use crate::report::RunReport;
use crate::run_dir;

/// Fine-tunes pretrained language models.
#[derive(Debug, Parser)]
#[command(name = "trainer", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a classifier or a language model on your data.
    Train(Box<TrainArgs>),
    /// Train a language model from nothing: a configuration, a tokenizer and text.
    Pretrain(Box<PretrainArgs>),
    /// Go on with a training that was stopped.
    Resume(ResumeArgs),
    /// Say what memory a training would need, without running it.
    Plan(Box<PlanArgs>),
    /// Measure a trained classifier on labelled data, or a language model on documents or conversations.
    Eval(EvalArgs),
    /// Label texts.
    Predict(PredictArgs),
    /// Continue texts with a language model.
    Generate(GenerateArgs),
    /// Look at data as a task sees them.
    Data(DataArgs),
    /// Make a tokenizer from texts.
    Tokenizer(TokenizerArgs),
    /// List a model's tensors, and what a strategy would train of them.
    Inspect(InspectArgs),
    /// Fold an adapter into its base, and prove on texts that the result computes the same.
    Merge(MergeArgs),
    /// Set runs beside each other: what was trained, how well, at what price.
    Compare(CompareArgs),
    /// Check a configuration and print it with every default filled in.
    Config(Box<ConfigArgs>),
    /// Say what this machine has to compute with, and whether its GPUs can be used.
    Doctor,
    /// Check that a run's model is what its certificate says, tensor by tensor.
    Verify(VerifyArgs),
    /// Write what makes one model's weights out of another's, exactly.
    Diff(DiffArgs),
    /// Make the tuned model's weights out of the base and a difference.
    Apply(ApplyArgs),
    /// Make the base's weights out of the tuned model and a difference.
    Revert(RevertArgs),
}

/// Arguments of `trainer train`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  trainer train run.toml --set optimizer.lr=1e-4
  trainer train --model DIR --train train.jsonl --eval test.jsonl --strategy head --out runs/head
  trainer train --model DIR --train train.csv --strategy last:2 --epochs 5 --out runs/last2
  trainer train --model DIR --train train.jsonl --strategy lora --rank 16 --targets all-linear --out runs/lora
  trainer train --task ner --model DIR --train train.conll --eval test.conll --out runs/entities
  trainer train --task clm --model GPT --train domain.txt --eval held-out.txt --out runs/adapted
  trainer train --task chat --model CHAT --train chat.jsonl --eval held-out.jsonl --out runs/chat
  trainer train --task mlm --model BERT --train domain.txt --eval held-out.txt --out runs/domain

`trainer config --keys` lists every setting.")]
pub struct TrainArgs {
    /// The run's settings.
    #[command(flatten)]
    pub run: RunArgs,
    /// Begin again, although a run of this name was stopped and could be resumed.
    #[arg(long)]
    pub restart: bool,
}

/// Arguments of `trainer resume`.
#[derive(Debug, Args)]
#[command(
    after_help = "Takes up a run that was killed, interrupted or failed where its last checkpoint is, with the settings that it \
had, and ends with the bits that it would have had. Data and model must be what they were.

Example:
  trainer resume runs/full"
)]
pub struct ResumeArgs {
    /// The --out of the run.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Other worker threads than the run's; results do not depend on it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub threads: Option<u32>,
}

/// Arguments of `trainer plan`.
#[derive(Debug, Args)]
#[command(
    after_help = "Takes what `trainer train` takes, and runs the same code on tensors without numbers: no weight is read.

The sum is what tensors take together. The process takes some dozens of MiB more, for the program, the tokenizer and the
texts.

Example:
  trainer plan --model DIR --train train.jsonl --strategy last:2 --batch-size 32"
)]
pub struct PlanArgs {
    /// The run's settings.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Arguments of `trainer pretrain`.
#[derive(Debug, Args)]
#[command(
    after_help = "The same as `trainer train` with task.kind = \"clm\" (or \"mlm\", if that is said) and model.init = \"random\".

Examples:
  trainer tokenizer --data text.txt --out CONFIG
  trainer pretrain --model CONFIG --train text.txt --eval other.txt --out runs/small

`trainer config --keys` lists every setting."
)]
pub struct PretrainArgs {
    /// The run's settings.
    #[command(flatten)]
    pub run: RunArgs,
    /// Begin again, although a run of this name was stopped and could be resumed.
    #[arg(long)]
    pub restart: bool,
}

/// The columns of a data file.
#[derive(Debug, Clone, Args)]
pub struct ColumnArgs {
    /// Column of the text, or of the messages; text, or messages, if absent.
    #[arg(long, value_name = "NAME")]
    pub text_column: Option<String>,
    /// Column of the second text.
    #[arg(long, value_name = "NAME")]
    pub text_pair_column: Option<String>,
}

/// Arguments of `trainer eval`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "A language model is measured by its perplexity over what it was trained on: every token but a document's first; the assistant's tokens of conversations; hidden tokens.

Examples:
  trainer eval --model runs/head --data test.jsonl
  trainer eval --model runs/adapted --data held-out.txt
  trainer eval --model runs/chat --task chat --data held-out.jsonl"
)]
pub struct EvalArgs {
    /// A run directory, or any classifier or language model of a supported family.
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// Adapters beside the model.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Labelled examples (.jsonl, .csv, .tsv; for ner also .conll and its kin), documents (also .txt), or conversations (.jsonl).
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// What to measure: classify, multilabel, regression, ner, clm, chat or mlm; what a run was trained for, or the model's class says, if absent.
    #[arg(long, value_name = "KIND")]
    pub task: Option<TaskKind>,
    /// Column of the label; label, or for ner labels, if absent.
    #[arg(long, value_name = "NAME")]
    pub label_column: Option<String>,
    /// The columns.
    #[command(flatten)]
    pub columns: ColumnArgs,
    /// Most tokens of one example, a longer one is cut; what the run was trained with, or else the model's positions (clm:
    /// at most 1024, mlm: at most 512), if absent.
    #[arg(long, value_name = "N")]
    pub max_length: Option<usize>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `trainer predict`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Writes a JSON object for each text, in their order.

Example:
  trainer predict --model runs/head --data texts.jsonl --out labels.jsonl")]
pub struct PredictArgs {
    /// A run directory, or any classifier of a supported family.
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// Adapters beside the model.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Texts (.jsonl, .csv, .tsv); for ner texts or lists of words (.jsonl), or a word a line (.conll and its kin).
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// File to write; standard output if absent.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// The columns.
    #[command(flatten)]
    pub columns: ColumnArgs,
    /// Most tokens of one text, a longer one is cut; what the run was trained with, or else the model's positions, if absent.
    #[arg(long, value_name = "N")]
    pub max_length: Option<usize>,
    /// Add the raw logits, in the order of the model's labels.
    #[arg(long)]
    pub logits: bool,
}

/// Arguments of `trainer inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  trainer inspect DIR
  trainer inspect DIR --strategy last:2 --labels 12")]
pub struct InspectArgs {
    /// Model: a directory, a .whl or .zip with one in it, or a hub id in the local cache; or the directory of an adapter.
    #[arg(value_name = "DIR")]
    pub model: String,
    /// Mark what this strategy would train: head, last:K, bitfit, norms, lora, rslora, dora, ia3, adapter, prompt, prefix or full, with gradual and llrd, joined by +.
    #[arg(long, value_name = "STRATEGY")]
    pub strategy: Option<String>,
    /// A rule to refine the strategy with, `train GLOB`, `freeze GLOB`, `lr GLOB x0.5` or `decay GLOB 0.1`; may be
    /// repeated.
    #[arg(long, value_name = "RULE", requires = "strategy")]
    pub rule: Vec<String>,
    /// Show the model with a head for this many labels; a number to be predicted is one.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub labels: Option<u32>,
    /// What these labels are for: classify, multilabel, regression or ner; classify if absent.
    #[arg(long, value_name = "KIND", requires = "labels")]
    pub task: Option<TaskKind>,
}

/// Arguments of `trainer compare`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  trainer compare runs/head runs/last2 runs/full")]
pub struct CompareArgs {
    /// Run directories.
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
}

/// Arguments of `trainer config`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  trainer config run.toml --set optimizer.lr=1e-4
  trainer config --model bert --train train.jsonl --strategy last:2 --out runs/a > run.toml
  trainer config --keys")]
pub struct ConfigArgs {
    /// List every key of a configuration with its meaning and its default, and do nothing else.
    #[arg(long)]
    pub keys: bool,
    /// The run's settings.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Arguments of `trainer verify`.
#[derive(Debug, Args)]
#[command(
    after_help = "Fails, naming the tensor, when one bit of a frozen tensor differs from before training, when a \
trained tensor is not what training left, or when a tensor is missing or new.

Example:
  trainer verify runs/a"
)]
pub struct VerifyArgs {
    /// Run directory.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
}

/// Runs a command line, whose first item is the program's name.
pub fn run<I>(arguments: I) -> ExitCode
where
    I: IntoIterator,
    I::Item: Into<OsString> + Clone,
{
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(usage) => {
            // Help and version go to standard output and are no error; clap knows. Nothing is left to do if the
            // stream is closed.
            let _ = usage.print();
            return ExitCode::from(usage.exit_code().clamp(0, 255) as u8);
        }
    };
    let outcome = match &cli.command {
        Command::Train(args) => args
            .run
            .resolve()
            .and_then(|config| train(&config, args.restart)),
        Command::Pretrain(args) => args
            .run
            .pretraining()
            .and_then(|config| train(&config, args.restart)),
        Command::Resume(args) => resume(args),
        Command::Plan(args) => plan(args),
        Command::Eval(args) => commands::eval(args),
        Command::Predict(args) => commands::predict(args),
        Command::Generate(args) => generate::run(args),
        Command::Data(args) => data::data(args),
        Command::Tokenizer(args) => data::tokenizer(args),
        Command::Inspect(args) => commands::inspect(args),
        Command::Merge(args) => merge::run(args),
        Command::Compare(args) => {
            crate::compare::compare(&args.runs).and_then(|table| print(&table))
        }
        Command::Config(args) => config(args),
        Command::Doctor => print(&crate::device::doctor()),
        Command::Verify(args) => verify(args),
        Command::Diff(args) => delta::diff(args),
        Command::Apply(args) => delta::apply(args),
        Command::Revert(args) => delta::revert(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = io::stderr().write_all(render(&error, io::stderr().is_terminal()).as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn train(config: &RunConfig, restart: bool) -> Result<()> {
    let out = &config.output.dir;
    if restart {
        if run_dir::is_resumable(out) {
            // What is wrong with data, model or settings is said while there is still a run to go on with.
            crate::train::plan(config)?;
        }
        run_dir::discard(out)?;
    }
    // What an earlier run has left there was not reached by this one, which does not begin then.
    let foreign = run_dir::is_resumable(out);
    let stop = signals::stop()?;
    let report = crate::train::train_until(config, &stop);
    ended(report.map(Some), out, !foreign)
}

fn resume(args: &ResumeArgs) -> Result<()> {
    let threads = args.threads.map(|n| n as usize);
    let stop = signals::stop()?;
    let report = crate::train::resume(&args.run, threads, &stop);
    ended(report, &args.run, true)
}

/// Prints the report of a run at `out`, or says what is left of one that failed, if what there is is `its`.
fn ended(run: Result<Option<RunReport>>, out: &Path, its: bool) -> Result<()> {
    match run {
        Ok(Some(report)) => print(&report.to_string()),
        Ok(None) => print(&format!(
            "{}: the run had ended, and is in its place now\n",
            out.display()
        )),
        Err(error @ Error::Stopped { .. }) => Err(error),
        Err(error) => {
            if its && run_dir::is_resumable(out) {
                let out = out.display();
                eprintln!("what was reached is kept: `trainer resume {out}` goes on from there");
            }
            Err(error)
        }
    }
}

fn plan(args: &PlanArgs) -> Result<()> {
    let mut run = args.run.clone();
    // Nothing is written: a plan needs no place for it.
    run.out.get_or_insert_with(|| PathBuf::from(".graft-plan"));
    print(&crate::train::plan(&run.resolve()?)?.to_string())
}

fn config(args: &ConfigArgs) -> Result<()> {
    if args.keys {
        let width = KEYS.iter().map(|key| key.name.len()).max().unwrap_or(0);
        let list: String = KEYS
            .iter()
            .map(|key| format!("{:<width$}  {}\n", key.name, key.meaning))
            .collect();
        return print(&list);
    }
    print(&args.run.resolve()?.to_toml()?)
}

fn verify(args: &VerifyArgs) -> Result<()> {
    let verdict = crate::verify::verify_run(&args.run)?;
    if !verdict.passed() {
        return Err(crate::verify::failed(&args.run, &verdict));
    }
    let mut text = format!(
        "{}: passed\n  {} frozen tensors are bit for bit what they were before training\n  {} trained tensors are what \
         training left\n",
        args.run.display(),
        verdict.frozen,
        verdict.trainable
    );
    if !verdict.unmoved.is_empty() {
        let names = list_names(&verdict.unmoved, 8);
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  warning: trainable, but did not move: {names}");
    }
    print(&text)
}

/// Refuses the name of a column, given by `flag`, where no file has columns; `words` says that these are labelled.
fn column_applies<'a>(
    (flag, column): (&str, Option<&str>),
    words: bool,
    mut files: impl Iterator<Item = &'a PathBuf>,
) -> Result<()> {
    match column.is_some() && !files.any(|file| has_columns(file, words)) {
        true => {
            let what = format!("it has no effect: {}", without_columns(words));
            Err(Error::config(flag, what, "leave it out"))
        }
        false => Ok(()),
    }
}

/// Writes to standard output. A reader that has gone away (`| head`) is no error.
fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    output::said(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// An error as it is shown: message and help, unwrapped, so that paths can be copied.
pub fn render(error: &Error, terminal: bool) -> String {
    let theme = if terminal {
        GraphicalTheme::unicode()
    } else {
        GraphicalTheme::none()
    };
    let handler = GraphicalReportHandler::new_themed(theme)
        .with_wrap_lines(false)
        .without_cause_chain();
    let mut text = String::new();
    if handler.render_report(&mut text, error).is_err() {
        text = format!("{error}\n");
        if let Some(help) = error.help() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "help: {help}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn errors_are_not_wrapped() {
        let long = format!("{}/run.toml", "deep/".repeat(60));
        let text = render(
            &Error::config(&long, "unknown key `lrr`", "did you mean `lr`?"),
            false,
        );
        assert!(
            text.contains(&format!("{long}: unknown key `lrr`")),
            "{text}"
        );
        assert!(text.contains("help: did you mean `lr`?"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}
