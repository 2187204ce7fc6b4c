//! The command `generate`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use graft_models::atomic;
use serde_json::json;

use crate::data::{Columns, Dataset};
use crate::device::DeviceArgs;
use crate::error::{Error, Result};
use crate::generate::{Options, Sampling, generate};
use crate::model::Model;

/// Prompts that are continued at once.
const PROMPTS_EACH: usize = 8;

/// Arguments of `trainer generate`.
#[derive(Debug, Args)]
#[command(
    after_help = "The continuation of --prompt is written as it comes; for --prompts, a JSON object for each.

Examples:
  trainer generate --model runs/adapted --prompt 'The lessee shall'
  trainer generate --model runs/adapted --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 7
  trainer generate --model runs/adapted --prompts prompts.jsonl --stop '\\n\\n' --out texts.jsonl"
)]
pub struct GenerateArgs {
    /// A run directory, or any language model of a supported family.
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Text to continue.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "prompts",
        conflicts_with = "prompts"
    )]
    pub prompt: Option<String>,
    /// Texts to continue (.jsonl, .csv, .tsv).
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Column of the texts to continue.
    #[arg(long, value_name = "NAME", default_value = "prompt")]
    pub text_column: String,
    /// File to write, with --prompts; standard output if absent.
    #[arg(long, value_name = "FILE", requires = "prompts")]
    pub out: Option<PathBuf>,
    /// Tokens to add at most.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Chance: 0 always takes the most likely token, 1 each as often as the model thinks it likely.
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub temperature: f64,
    /// Choose among so many most likely tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Choose among the fewest most likely tokens with this probability together.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Above 1, tokens that were there before are less likely.
    #[arg(
        long,
        value_name = "R",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub repetition_penalty: f64,
    /// Stop before this text; \n is a line feed and \t a tab; may be repeated.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Seed of the choice.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl GenerateArgs {
    fn options(&self) -> Result<Options> {
        let refuse = |flag: &str, found: String, expected: &str| {
            let what = format!("it is {found}, expected {expected}");
            Err(Error::config(flag, what, "correct the value"))
        };
        let finite = |x: f64| x.is_finite();
        if !(finite(self.temperature) && self.temperature >= 0.0) {
            let found = self.temperature.to_string();
            return refuse("--temperature", found, "a number, 0 or more");
        }
        if !(finite(self.repetition_penalty) && self.repetition_penalty > 0.0) {
            let found = self.repetition_penalty.to_string();
            return refuse("--repetition-penalty", found, "a number above 0");
        }
        if let Some(p) = self.top_p.filter(|&p| !(p > 0.0 && p <= 1.0)) {
            return refuse("--top-p", p.to_string(), "a number above 0, 1 at most");
        }
        for (flag, n) in [
            ("--top-k", self.top_k),
            ("--max-new-tokens", Some(self.max_new_tokens)),
        ] {
            if n == Some(0) {
                return refuse(flag, "0".into(), "a whole number, 1 or more");
            }
        }
        if self.stop.iter().any(String::is_empty) {
            return refuse("--stop", "empty".into(), "some text");
        }
        let choosy = [
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
        ];
        if let Some((flag, _)) = choosy.iter().find(|(_, given)| *given)
            && self.temperature == 0.0
        {
            return Err(Error::config(
                flag,
                "it has no effect at temperature 0, which takes the most likely token",
                "give --temperature 1 too, or leave it out",
            ));
        }
        let plain = |stop: &String| stop.replace("\\n", "\n").replace("\\t", "\t");
        Ok(Options {
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                repetition_penalty: self.repetition_penalty,
            },
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.iter().map(plain).collect(),
            seed: self.seed,
        })
    }
}

pub(super) fn run(args: &GenerateArgs) -> Result<()> {
    let options = args.options()?;
    let prompts = args.prompts.as_ref().map(|path| {
        let columns = Columns {
            text: args.text_column.clone(),
            text_pair: None,
            label: None,
        };
        Dataset::read(path, &columns)
    });
    let prompts = prompts.transpose()?;
    let model = Model::causal(&args.model, &args.device.open()?)?;
    let Some(prompts) = prompts else {
        let prompt = args.prompt.as_deref().unwrap_or_default();
        let mut out = io::stdout().lock();
        let outcome = generate(&model, &[prompt], 0, &options, &mut |_, piece| {
            said(out.write_all(piece.as_bytes()).and_then(|()| out.flush()))
        });
        return match outcome {
            Ok(_) => said(out.write_all(b"\n").and_then(|()| out.flush())),
            // A reader that has gone away (`| head`) is no error.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) => Err(error),
        };
    };
    let texts: Vec<&str> = prompts.examples.iter().map(|e| e.text.as_str()).collect();
    let mut lines = Vec::new();
    for (part, texts) in texts.chunks(PROMPTS_EACH).enumerate() {
        let first = part * PROMPTS_EACH;
        let all = generate(&model, texts, first, &options, &mut |_, _| Ok(()))?;
        for (prompt, done) in texts.iter().zip(all) {
            let line = json!({
                "prompt": prompt,
                "text": done.text,
                "tokens": done.tokens,
                "finish": done.finish,
            });
            lines.extend_from_slice(format!("{line}\n").as_bytes());
        }
    }
    match &args.out {
        Some(path) => Ok(atomic::write_file(path, |file| file.write_all(&lines))?),
        None => match io::stdout().lock().write_all(&lines) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => said(result),
        },
    }
}

fn said(result: io::Result<()>) -> Result<()> {
    result.map_err(|e| Error::io("write", Path::new("standard output"), e))
}
