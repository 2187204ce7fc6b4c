//! The commands about exact differences: `diff`, `apply`, `revert`.

use std::path::PathBuf;

use clap::Args;
use graft_models::delta::{self, Restored};

use super::print;
use crate::error::Result;
use crate::report::{Table, thousands};

/// Arguments of `trainer diff`.
#[derive(Debug, Args)]
#[command(
    after_help = "BASE and TUNED are safetensors files, or models with one: directories, wheels, ids in the local \
cache.

Example:
  trainer diff BASE runs/head -o head.delta"
)]
pub struct DiffArgs {
    /// What the tuned model was made from.
    #[arg(value_name = "BASE")]
    pub base: String,
    /// The tuned model.
    #[arg(value_name = "TUNED")]
    pub tuned: String,
    /// File to write.
    #[arg(short, long, value_name = "DELTA")]
    pub out: PathBuf,
}

/// Arguments of `trainer apply`.
#[derive(Debug, Args)]
#[command(
    after_help = "The output has the SHA-256 of the tuned model's weights, or there is none.

Example:
  trainer apply BASE head.delta -o model.safetensors"
)]
pub struct ApplyArgs {
    /// The model that the delta was made with.
    #[arg(value_name = "BASE")]
    pub base: String,
    /// What `trainer diff` wrote.
    #[arg(value_name = "DELTA")]
    pub delta: PathBuf,
    /// The safetensors file to write.
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Arguments of `trainer revert`.
#[derive(Debug, Args)]
#[command(
    after_help = "The output has the SHA-256 of the base's weights, or there is none.

Example:
  trainer revert runs/head head.delta -o base.safetensors"
)]
pub struct RevertArgs {
    /// The tuned model that the delta was made with.
    #[arg(value_name = "TUNED")]
    pub tuned: String,
    /// What `trainer diff` wrote.
    #[arg(value_name = "DELTA")]
    pub delta: PathBuf,
    /// The safetensors file to write.
    #[arg(short, long, value_name = "FILE")]
    pub out: PathBuf,
}

pub(super) fn diff(args: &DiffArgs) -> Result<()> {
    let made = delta::diff(&args.base, &args.tuned, &args.out)?;
    let mut table = Table::new();
    let share = 100.0 * made.bytes as f64 / made.files[1].max(1) as f64;
    table
        .row("tensors as in the base", made.same)
        .row("changed", made.changed)
        .row("new", made.new)
        .row("only in the base", made.gone)
        .row("tuned file, bytes", thousands(made.files[1]))
        .row(
            "delta, bytes",
            format!("{} ({share:.2} %)", thousands(made.bytes)),
        )
        .row("output", args.out.display());
    print(&table.to_string())
}

pub(super) fn apply(args: &ApplyArgs) -> Result<()> {
    say(
        &delta::apply(&args.base, &args.delta, &args.out)?,
        &args.out,
    )
}

pub(super) fn revert(args: &RevertArgs) -> Result<()> {
    say(
        &delta::revert(&args.tuned, &args.delta, &args.out)?,
        &args.out,
    )
}

fn say(restored: &Restored, out: &std::path::Path) -> Result<()> {
    print(&format!(
        "{}: {} tensors, {} bytes, SHA-256 {}\n",
        out.display(),
        restored.tensors,
        thousands(restored.bytes),
        restored.sha256
    ))
}
