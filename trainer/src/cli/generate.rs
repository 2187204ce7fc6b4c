//! The command `generate`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use graft_models::{CausalLm, ChatOptions};
use graft_tensor::Device;
use serde_json::{Value, json};

use super::output;
use crate::adapted::{AdapterArgs, Choice};
use crate::config::Precision;
use crate::conversations::template;
use crate::data::{Chats, Columns, Conversation, Dataset, Example};
use crate::device::DeviceArgs;
use crate::error::{Error, Result};
use crate::generate::{Options, Sampling, check, encode, generate};
use crate::model::Model;
use crate::train::on_threads;

/// Prompts that are continued at once.
const PROMPTS_EACH: usize = 8;

/// Arguments of `trainer generate`.
#[derive(Debug, Args)]
#[command(
    after_help = "The continuation of --prompt is written as it comes; for --prompts, a JSON object for each. With --chat, prompts are what a user says, and the model's own chat template puts them into words for the model.

Examples:
  trainer generate --model runs/adapted --prompt 'The lessee shall'
  trainer generate --model runs/adapted --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 7
  trainer generate --model runs/adapted --prompts prompts.jsonl --stop '\\n\\n' --out texts.jsonl
  trainer generate --model runs/chat --chat --prompt 'What is a lessee?'"
)]
pub struct GenerateArgs {
    /// A run directory, or any language model of a supported family.
    #[arg(long, value_name = "DIR")]
    pub model: String,
    /// Adapters beside the model.
    #[command(flatten)]
    pub adapters: AdapterArgs,
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
    /// Texts to continue (.jsonl, .csv, .tsv); with --chat, conversations to answer (.jsonl).
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Column of the texts to continue, or of the messages; prompt, or messages, if absent.
    // Not `requires = "prompts"`: clap lets that pass where --prompt is given, which excludes --prompts.
    #[arg(long, value_name = "NAME", conflicts_with = "prompt")]
    pub text_column: Option<String>,
    /// Answer as the assistant, through the model's chat template.
    #[arg(long)]
    pub chat: bool,
    /// What the system says before --prompt, with --chat.
    #[arg(
        long,
        value_name = "TEXT",
        requires = "chat",
        conflicts_with = "prompts"
    )]
    pub system: Option<String>,
    /// File to write, with --prompts; standard output if absent.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
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
    /// Seed of the choice; 0 if absent.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Type of activations, kept keys and values, and products: f32 or bf16. Matrices are held in it, too, where no adapter
    /// stands beside them; other weights stay f32.
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub precision: Precision,
    /// Worker threads; results do not depend on it.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
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
            ("--threads", self.threads),
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
            ("--seed", self.seed.is_some()),
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
            end: Vec::new(),
            seed: self.seed.unwrap_or(0),
        })
    }
}

pub(super) fn run(args: &GenerateArgs) -> Result<()> {
    let options = args.options()?;
    on_threads(args.threads, "--threads", || continue_all(args, options))
}

/// What is to be continued: the object's member that says it in the output, and the tokens.
struct Prompt {
    said: Value,
    ids: Vec<u32>,
}

/// What is to be continued, as it was read.
enum Source {
    Texts(Vec<Example>),
    Chats(Chats),
}

/// Reads what is to be continued.
fn read(args: &GenerateArgs) -> Result<Source> {
    let column = |default: &str| args.text_column.clone().unwrap_or_else(|| default.into());
    Ok(match (&args.prompts, args.chat) {
        (Some(path), false) => {
            let columns = Columns::texts(column("prompt"));
            let data = Dataset::read(path, &columns)?;
            Source::Texts(data.examples)
        }
        (Some(path), true) => Source::Chats(Chats::read(path, &column("messages"))?),
        (None, chat) => {
            let prompt = args.prompt.clone().unwrap_or_default();
            if !chat {
                return Ok(Source::Texts(vec![Example {
                    text: prompt,
                    text_pair: None,
                    label: None,
                    words: None,
                    line: 1,
                }]));
            }
            let system = args.system.as_ref();
            let system = system.map(|text| json!({"role": "system", "content": text}));
            let user = json!({"role": "user", "content": prompt});
            Source::Chats(Chats {
                path: "--prompt".into(),
                rows: vec![Conversation {
                    messages: system.into_iter().chain([user]).collect(),
                    tools: None,
                    variables: Default::default(),
                    line: 1,
                }],
            })
        }
    })
}

/// The tokens of what is to be continued. A conversation ends where the assistant's answer begins, and the token that ends
/// its turn ends the text. An error names the line of `file`, if there is one.
fn encode_all(
    model: &Model<CausalLm>,
    source: Source,
    file: Option<&Path>,
    options: &mut Options,
) -> Result<Vec<Prompt>> {
    let checked = |line: usize, ids: Result<Vec<u32>>| {
        let ids = ids.and_then(|ids| check(model, &ids).map(|()| ids));
        ids.map_err(|error| match file {
            Some(path) => error.of_row(path, line),
            None => error,
        })
    };
    match source {
        Source::Texts(texts) => texts
            .into_iter()
            .map(|row| {
                let ids = checked(row.line, encode(model, &row.text))?;
                let said = row.text.into();
                Ok(Prompt { said, ids })
            })
            .collect(),
        Source::Chats(chats) => {
            let template = template(&model.tokenizer)?;
            options.end.extend(template.end_of_turn(&model.tokenizer));
            chats
                .rows
                .into_iter()
                .map(|row| {
                    let render = ChatOptions {
                        add_generation_prompt: true,
                        tools: row.tools,
                        variables: row.variables,
                        ..ChatOptions::default()
                    };
                    let text = template.render(&row.messages, &render);
                    let ids = text.and_then(|text| model.tokenizer.encode_bare(&text));
                    let ids = checked(row.line, ids.map_err(Error::from))?;
                    let said = row.messages.into();
                    Ok(Prompt { said, ids })
                })
                .collect()
        }
    }
}

fn continue_all(args: &GenerateArgs, mut options: Options) -> Result<()> {
    output::check(args.out.as_deref(), args.prompts.as_deref())?;
    let source = read(args)?;
    let choice = Choice::of(&args.model, &args.adapters)?;
    let mut model = choice.single()?.causal(&args.device.open()?)?.model;
    model.parameters.compute_in(args.precision.dtype())?;
    if model.parameters.memory().device() == Device::Cpu {
        model.parameters.hold_as_computed()?;
    }
    let prompts = encode_all(&model, source, args.prompts.as_deref(), &mut options)?;
    let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
    if args.prompts.is_none() {
        let mut out = io::stdout().lock();
        // A reader that has gone away ends the text.
        let said =
            |result: io::Result<()>| result.map_err(|e| Error::io("write", output::name(None), e));
        let outcome = generate(&model, &ids, 0, &options, &mut |_, piece| {
            said(out.write_all(piece.as_bytes()).and_then(|()| out.flush()))
        });
        return match outcome {
            Ok(_) => said(out.write_all(b"\n").and_then(|()| out.flush())),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            Err(error) => Err(error),
        };
    }
    let name = if args.chat { "messages" } else { "prompt" };
    let mut lines = Vec::new();
    for (part, prompts) in prompts.chunks(PROMPTS_EACH).enumerate() {
        let first = part * PROMPTS_EACH;
        let ids = &ids[first..first + prompts.len()];
        let all = generate(&model, ids, first, &options, &mut |_, _| Ok(()))?;
        for (prompt, done) in prompts.iter().zip(all) {
            let line = json!({
                name: prompt.said,
                "text": done.text,
                "tokens": done.tokens,
                "finish": done.finish,
            });
            lines.extend_from_slice(format!("{line}\n").as_bytes());
        }
    }
    output::write(args.out.as_deref(), &lines)
}
