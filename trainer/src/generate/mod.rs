//! Text that a language model goes on with.
//!
//! Several prompts are continued at once, each at the price of its new tokens (a cache holds the keys and values of the
//! others). What one of them becomes does not depend on its neighbours: a row of a product does not, and the random
//! numbers are functions of (seed, number of the prompt, token).

mod sample;
mod stop;

use graft_models::{CausalLm, DecodeStream, KvCache, TokenBatch, end_tokens};
use graft_nn::Forward;
use graft_tensor::ops::random::{Key, uniform};
use graft_tensor::{Memory, awake};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::model::Model;
pub use sample::Sampling;
use stop::Stops;

/// How to go on, and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// How a token is chosen
    pub sampling: Sampling,
    /// Most tokens to add; 1 or more
    pub max_new_tokens: usize,
    /// Texts before which to stop; none of them empty
    pub stop: Vec<String>,
    /// Tokens that end a text, beside those that the model states
    pub end: Vec<u32>,
    /// Of the random numbers
    pub seed: u64,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// The model ended it.
    End,
    /// A stop text came.
    Stop,
    /// There are as many new tokens as were asked for.
    Length,
    /// The model has no more positions.
    Context,
}

/// A text that was generated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// What follows the prompt
    pub text: String,
    /// New tokens, one that ends the text included
    pub tokens: usize,
    /// Why it ended
    pub finish: Finish,
}

/// A text while it grows.
struct Growing<'m> {
    /// Its number among the prompts
    number: usize,
    /// Prompt and new tokens
    ids: Vec<u32>,
    prompt_tokens: usize,
    stream: DecodeStream<'m>,
    stops: Stops<'m>,
    text: String,
}

/// Which tokens the tokenizer has: a model's vocabulary may be larger.
fn known(model: &Model<CausalLm>) -> Vec<bool> {
    (0..model.config.vocab_size as u32)
        .map(|id| model.tokenizer.id_to_token(id).is_some())
        .collect()
}

/// The tokens of a prompt, with the special tokens that the tokenizer adds to a text.
///
/// # Errors
/// An empty prompt, where no token begins a text; a prompt that cannot be encoded.
pub fn encode(model: &Model<CausalLm>, prompt: &str) -> Result<Vec<u32>> {
    if prompt.is_empty() && model.tokenizer.added_tokens(false) == 0 {
        let begin = model.config.bos_token_id;
        return match begin.filter(|&id| id < model.config.vocab_size) {
            Some(id) => Ok(vec![id as u32]),
            None => Err(Error::config(
                "prompt",
                "the prompt is empty, and the model has no token that begins a text",
                "give it some text",
            )),
        };
    }
    Ok(model.tokenizer.encode(prompt, None, usize::MAX)?.ids)
}

/// Refuses a prompt with no token, or with more than the model has positions.
pub(crate) fn check(model: &Model<CausalLm>, ids: &[u32]) -> Result<()> {
    let (tokens, positions) = (ids.len(), model.config.max_tokens());
    if (1..=positions).contains(&tokens) {
        return Ok(());
    }
    let what = format!("the prompt has {tokens} tokens, but the model has {positions} positions");
    let help = match tokens {
        0 => "give it some text",
        _ => "shorten it",
    };
    Err(Error::config("prompt", what, help))
}

/// Continues `prompts` of token ids, of which the first has the number `first` among all (for its random numbers). `emit`
/// is handed each text's number within `prompts` and its pieces as soon as they are certain: whole characters, and nothing
/// of a stop text.
///
/// # Errors
/// A prompt with no token, or with more than the model has positions; as the model's passes; those of `emit`.
pub fn generate(
    model: &Model<CausalLm>,
    prompts: &[Vec<u32>],
    first: usize,
    options: &Options,
    emit: &mut dyn FnMut(usize, &str) -> Result<()>,
) -> Result<Vec<Generated>> {
    awake(|| continue_all(model, prompts, first, options, emit))
}

fn continue_all(
    model: &Model<CausalLm>,
    prompts: &[Vec<u32>],
    first: usize,
    options: &Options,
    emit: &mut dyn FnMut(usize, &str) -> Result<()>,
) -> Result<Vec<Generated>> {
    let (positions, known) = (model.config.max_tokens(), known(model));
    let mut ends = end_tokens(&model.config, &model.tokenizer)?;
    ends.extend(&options.end);
    let mut growing = Vec::with_capacity(prompts.len());
    for (number, ids) in prompts.iter().enumerate() {
        check(model, ids)?;
        let mut stream = model.tokenizer.stream(true);
        // What a token stands for may depend on those before it.
        for &id in ids {
            stream.push(id)?;
        }
        growing.push(Growing {
            number,
            prompt_tokens: ids.len(),
            ids: ids.clone(),
            stream,
            stops: Stops::new(&options.stop),
            text: String::new(),
        });
    }
    let longest = growing.iter().map(|g| g.ids.len()).max().unwrap_or(0);
    let capacity = (longest.saturating_add(options.max_new_tokens)).min(positions);
    let parameters = &model.parameters;
    let mut cache = KvCache::new(parameters, &model.config, prompts.len(), capacity)?;
    let mut done: Vec<Option<Generated>> = vec![None; prompts.len()];
    let mut new: Vec<Vec<i64>> = growing.iter().map(|g| widened(&g.ids)).collect();
    let here = Memory::cpu(); // where tokens are drawn, wherever the model is
    while !growing.is_empty() {
        let batch = TokenBatch::of_ids(new.iter().map(Vec::as_slice));
        let mut f = Forward::evaluate(parameters);
        let logits = model.network.advance(&mut f, &batch, &mut cache)?;
        let mut logits = logits.value().to_f64()?;
        let rows = logits.chunks_mut(model.config.vocab_size);
        let mut goes_on = Vec::with_capacity(growing.len());
        let mut rest = Vec::with_capacity(growing.len());
        new.clear();
        for (place, (mut text, row)) in growing.into_iter().zip(rows).enumerate() {
            let count = text.ids.len() - text.prompt_tokens;
            let key = Key::new(options.seed, count as u64, (first + text.number) as u64);
            let random = uniform(&here, key, &[1], 0.0, 1.0)?.item()?;
            let token = options.sampling.choose(row, &known, &text.ids, random);
            let Some(token) = token else {
                return Err(Error::not_numbers());
            };
            let number = text.number;
            match text.add(token, &ends, options, positions, &mut |s| emit(number, s))? {
                Some(finish) => {
                    done[number] = Some(text.end(finish, &mut |s| emit(number, s))?);
                }
                None => {
                    goes_on.push(place);
                    new.push(vec![i64::from(token)]);
                    rest.push(text);
                }
            }
        }
        cache.keep(&goes_on);
        growing = rest;
    }
    // Each text has left the loop by its end.
    Ok(done.into_iter().flatten().collect())
}

fn widened(ids: &[u32]) -> Vec<i64> {
    ids.iter().map(|&id| i64::from(id)).collect()
}

impl Growing<'_> {
    /// Takes a new token; says if the text ends with it.
    fn add(
        &mut self,
        token: u32,
        ends: &[u32],
        options: &Options,
        positions: usize,
        emit: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Option<Finish>> {
        self.ids.push(token);
        if ends.contains(&token) {
            return Ok(Some(Finish::End));
        }
        let piece = self.stream.push(token)?;
        let (piece, stopped) = self.stops.push(&piece);
        say(&mut self.text, &piece, emit)?;
        Ok(if stopped {
            Some(Finish::Stop)
        } else if self.ids.len() - self.prompt_tokens == options.max_new_tokens {
            Some(Finish::Length)
        } else if self.ids.len() > positions {
            Some(Finish::Context)
        } else {
            None
        })
    }

    /// Hands out what still waits.
    fn end(
        self,
        mut finish: Finish,
        emit: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Generated> {
        let tokens = self.ids.len() - self.prompt_tokens;
        let (mut text, mut stops) = (self.text, self.stops);
        if finish != Finish::Stop {
            let (mut piece, stopped) = stops.push(&self.stream.finish()?);
            if stopped {
                finish = Finish::Stop;
            } else {
                piece.push_str(&stops.finish());
            }
            say(&mut text, &piece, emit)?;
        }
        Ok(Generated {
            text,
            tokens,
            finish,
        })
    }
}

fn say(text: &mut String, piece: &str, emit: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
    if !piece.is_empty() {
        text.push_str(piece);
        emit(piece)?;
    }
    Ok(())
}
