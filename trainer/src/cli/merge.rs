//! The command `merge`.

use std::path::PathBuf;

use clap::Args;

use super::print;
use crate::adapted::{AdapterArgs, Choice};
use crate::data::{Columns, Dataset};
use crate::device::DeviceArgs;
use crate::error::{Error, Result};
use crate::merge::{Merged, TOLERANCE, merge};
use crate::report::{Table, thousands};

/// Arguments of `trainer merge`.
#[derive(Debug, Args)]
#[command(
    after_help = "The result is read back, and its logits of every text are held against those of base and adapter apart; what differs is not kept. With --check, a model that was merged before, by whatever program, is held against them.

Examples:
  trainer merge --model runs/lora --out merged
  trainer merge --model BASE --adapter ADAPTER --data texts.jsonl --out merged
  trainer merge --model runs/lora --check merged"
)]
pub struct MergeArgs {
    /// A run with an adapter, a directory that PEFT wrote, or a base for --adapter.
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// Directory of the merged model.
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "check",
        conflicts_with = "check"
    )]
    pub out: Option<PathBuf>,
    /// A model that was merged before, to be checked.
    #[arg(long, value_name = "DIR")]
    pub check: Option<PathBuf>,
    /// Texts to compare on (.jsonl, .csv, .tsv); some come with the program.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Column of the text, with --data; text, if absent.
    #[arg(long, value_name = "NAME", requires = "data")]
    pub text_column: Option<String>,
    /// What logits may differ by at most, relative to the largest or 1.
    #[arg(long, value_name = "X", default_value_t = TOLERANCE)]
    pub tolerance: f64,
    /// Adapters beside the model.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
}

pub(super) fn run(args: &MergeArgs) -> Result<()> {
    if !(args.tolerance.is_finite() && args.tolerance >= 0.0) {
        let what = format!("it is {}, expected a number, 0 or more", args.tolerance);
        return Err(Error::config("--tolerance", what, "correct the value"));
    }
    let texts = args.data.as_ref().map(|path| -> Result<Vec<String>> {
        let columns = Columns::texts(args.text_column.as_deref().unwrap_or("text"));
        let examples = Dataset::read(path, &columns)?.examples.into_iter();
        Ok(examples.map(|example| example.text).collect())
    });
    let merged = match (&args.check, &args.out) {
        (Some(dir), _) => Merged::Check(dir),
        (None, Some(dir)) => Merged::Write(dir),
        (None, None) => {
            let what = "nothing says where the merged model is to be";
            return Err(Error::config("--out", what, "give --out DIR"));
        }
    };
    let choice = Choice::of(&args.model, &args.adapters)?;
    let memory = args.device.open()?;
    let proof = merge(&choice, merged, texts.transpose()?, args.tolerance, &memory)?;
    let mut table = Table::new();
    table.row("base", &proof.base);
    table.row("texts", thousands(proof.texts as u64));
    table.row("logits", thousands(proof.logits as u64));
    table.row(
        "largest difference",
        format!(
            "{:.3e} (the largest logit is {:.3})",
            proof.max_difference, proof.largest_logit
        ),
    );
    if let Some(trained) = &proof.trained_on {
        let what = format!("beside a base in {}", trained.base);
        let difference = format!("{:.3e} from that", trained.max_difference);
        table.row(what, difference);
    }
    if let Some(dir) = &args.out {
        table.row("output", dir.display());
    }
    print(&table.to_string())
}
