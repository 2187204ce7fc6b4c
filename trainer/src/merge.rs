//! Folds an adapter into its base, and proves by the logits that the result computes the same.
//!
//! The proof is on what was written: the merged model is read back from its files, and its logits of every text are held
//! against those of base and adapter apart. What differs by more than the tolerance is not kept.
//!
//! An adapter that was trained beside a base in bf16, NF4 or int8 is folded into the base as its files have it, as PEFT
//! does; how far that is from what was trained, is said.

use std::io;
use std::path::Path;

use graft_models::atomic::StagedDir;
use graft_models::{
    CausalLm, Classifier, Config, DecoderClassifier, DecoderConfig, MaskedConfig, MaskedLm,
    ModelConfig, TokenBatch,
};
use graft_nn::{Forward, adapters};
use graft_tensor::Memory;
use serde::Serialize;

use crate::adapted::Choice;
use crate::config::{Base, TaskKind};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::network::Network;
use crate::run_dir;

/// The proof's file in the output.
pub const MERGE_FILE: &str = "merge.json";
/// What logits may differ by at most, relative to the largest: some dozens of roundings of f32.
pub const TOLERANCE: f64 = 1e-5;
/// Tokens of a text that are looked at, at most.
const MOST_TOKENS: usize = 256;

/// Texts of several kinds, for a proof without any given.
const TEXTS: [&str; 8] = [
    "The quick brown fox jumps over the lazy dog.",
    "In the event of termination, each party shall return all confidential information within thirty days.",
    "I would not recommend this kettle: it leaks, it whistles, and it never boils.",
    "What is the capital of France, and how many people live there?",
    "def add(a, b):\n    return a + b",
    "1, 2, 3, 5, 8, 13, 21, 34",
    "It was the best of times, it was the worst of times.",
    "ok",
];

/// What a merge, or a check of one, has shown.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Proof {
    /// The base, as the adapter names it.
    pub base: String,
    /// The adapter.
    pub adapter: String,
    /// Texts whose logits were compared.
    pub texts: usize,
    /// Logits that were compared.
    pub logits: usize,
    /// The largest difference of a logit.
    pub max_difference: f64,
    /// The largest magnitude of a logit.
    pub largest_logit: f64,
    /// What the difference may be at most, relative to the largest logit or 1.
    pub tolerance: f64,
    /// Of an adapter that was trained beside a base in another type than f32.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trained_on: Option<TrainedOn>,
}

/// How far a merged model is from what was trained: the base it is merged into is not the one that the adapter saw.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainedOn {
    /// What the base was held in.
    pub base: Base,
    /// The largest difference of a logit between the merged model, and that base and the adapter.
    pub max_difference: f64,
}

/// The largest difference between the logits of some texts.
fn furthest(texts: &[[Vec<f64>; 2]]) -> f64 {
    let mut worst = 0.0f64;
    for [apart, merged] in texts {
        if apart.len() != merged.len() {
            worst = f64::INFINITY;
        }
        for (a, b) in apart.iter().zip(merged) {
            // A NaN is as bad as it gets.
            let gap = (a - b).abs();
            worst = worst.max(if gap.is_nan() { f64::INFINITY } else { gap });
        }
    }
    worst
}

impl Proof {
    fn new(choice: &Choice, adapter: &str, tolerance: f64, texts: &[[Vec<f64>; 2]]) -> Proof {
        let worst = furthest(texts);
        let apart = texts.iter().flat_map(|[apart, _]| apart);
        let largest = apart.fold(0.0f64, |largest, a| largest.max(a.abs()));
        let count = texts.iter().map(|[apart, _]| apart.len()).sum();
        Proof {
            base: choice.base().to_owned(),
            adapter: adapter.to_owned(),
            texts: texts.len(),
            logits: count,
            max_difference: worst,
            largest_logit: largest,
            tolerance,
            trained_on: None,
        }
    }

    /// Whether the logits are the same within the tolerance.
    pub fn holds(&self) -> bool {
        self.logits > 0 && self.max_difference <= self.tolerance * self.largest_logit.max(1.0)
    }

    fn required(self, what: &str) -> Result<Proof> {
        if self.holds() {
            return Ok(self);
        }
        let help = "an adapter on an embedding that is the head too cannot be merged; otherwise check that base, adapter \
                    and merged model belong together";
        let what = format!(
            "{what}: over {} logits of {} texts it differs from base and adapter by up to {:.3e}, allowed are {:.1e}",
            self.logits,
            self.texts,
            self.max_difference,
            self.tolerance * self.largest_logit.max(1.0)
        );
        Err(Error::config(&self.adapter, what, help))
    }
}

/// A kind of model whose logits of a text can be had.
trait Logits: Network {
    /// All logits of a batch with one text in it.
    fn of(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Vec<f64>>;

    /// Positions of a model.
    fn most_tokens(config: &Self::Config) -> usize;

    /// The merged model in a directory.
    fn read(dir: &str, memory: &Memory) -> Result<Model<Self>>;
}

/// [`Logits`] of a network of `graft_models`, from the function that reads its model, and the one that tells its longest
/// text.
macro_rules! logits_of {
    ($network:ident, $read:expr, $most_tokens:expr) => {
        impl Logits for $network {
            fn of(&self, f: &mut Forward, batch: &TokenBatch) -> Result<Vec<f64>> {
                Ok($network::forward(self, f, batch)?.value().to_f64()?)
            }

            fn most_tokens(config: &Self::Config) -> usize {
                $most_tokens(config)
            }

            fn read(dir: &str, memory: &Memory) -> Result<Model<$network>> {
                $read(dir, memory)
            }
        }
    };
}

logits_of!(Classifier, Model::trained, ModelConfig::max_tokens);
logits_of!(DecoderClassifier, Model::trained, DecoderConfig::max_tokens);
logits_of!(CausalLm, Model::causal, DecoderConfig::max_tokens);
logits_of!(MaskedLm, Model::masked, |c: &MaskedConfig| c.0.max_tokens());

/// The logits of each text that has tokens.
fn logits<N: Logits>(model: &Model<N>, texts: &[String]) -> Result<Vec<Vec<f64>>> {
    let limit = N::most_tokens(&model.config).min(MOST_TOKENS);
    let mut all = Vec::with_capacity(texts.len());
    for text in texts {
        let encoding = model.tokenizer.encode(text, None, limit)?;
        let batch = TokenBatch::pack([&encoding]);
        if batch.tokens() == 0 {
            continue;
        }
        let mut f = Forward::evaluate(&model.parameters);
        all.push(model.network.of(&mut f, &batch)?);
    }
    Ok(all)
}

fn pairs(apart: Vec<Vec<f64>>, merged: Vec<Vec<f64>>) -> Vec<[Vec<f64>; 2]> {
    apart.into_iter().zip(merged).map(|(a, b)| [a, b]).collect()
}

/// What to do with a merged model.
#[derive(Debug, Clone, Copy)]
pub enum Merged<'a> {
    /// Write it here
    Write(&'a Path),
    /// It is here: hold it against base and adapter
    Check(&'a Path),
}

/// Folds the adapter in use into its base and writes the result, or checks one that was written before; returns the proof
/// that the logits of `texts` (or of some that come with the program) are the same.
///
/// # Errors
/// No adapter; files that cannot be used; an output that is no earlier merge; logits that differ, and then nothing is
/// written.
pub fn merge(
    choice: &Choice,
    merged: Merged,
    texts: Option<Vec<String>>,
    tolerance: f64,
    memory: &Memory,
) -> Result<Proof> {
    let texts = texts.unwrap_or_else(|| TEXTS.map(str::to_owned).to_vec());
    let adapters = choice.single()?.in_use();
    let Some(name) = adapters.first() else {
        let what = format!("{} is a model without an adapter", choice.base());
        let help = "name the directory of a run with an adapter, or give --adapter DIR";
        return Err(Error::config("--model", what, help));
    };
    let config = choice.config()?;
    match (choice.task(&config), config) {
        (TaskKind::Texts(_), Config::Encoder(_)) => {
            let read = |choice: &Choice| Ok(choice.classifier::<Classifier>(memory)?.model);
            go(choice, name, read, merged, &texts, tolerance, memory)
        }
        (TaskKind::Texts(_), Config::Decoder(_)) => {
            let read = |choice: &Choice| Ok(choice.classifier::<DecoderClassifier>(memory)?.model);
            go(choice, name, read, merged, &texts, tolerance, memory)
        }
        (TaskKind::Clm | TaskKind::Chat, _) => {
            let read = |choice: &Choice| Ok(choice.causal(memory)?.model);
            go(choice, name, read, merged, &texts, tolerance, memory)
        }
        (TaskKind::Mlm, _) => {
            let read = |choice: &Choice| Ok(choice.masked(memory)?.model);
            go(choice, name, read, merged, &texts, tolerance, memory)
        }
    }
}

fn go<N: Logits>(
    choice: &Choice,
    name: &str,
    read: impl Fn(&Choice) -> Result<Model<N>>,
    merged: Merged,
    texts: &[String],
    tolerance: f64,
    memory: &Memory,
) -> Result<Proof> {
    let mut model = read(&choice.held_in(Base::F32))?;
    let set = model.parameters.adapters().active();
    if let Some(why) = set.and_then(|set| set.config().method.unmergeable()) {
        let what = format!("the adapter {name} cannot be merged: {why}");
        let help = "use it beside its base: --model takes its directory, and --adapter several";
        return Err(Error::config("merge", what, help));
    }
    // What was rounded to be held is not what a merged model is made of: that is the base as its files have it.
    let trained = match choice.held() {
        Base::F32 => None,
        base => Some((base, logits(&read(choice)?, texts)?)),
    };
    let apart = logits(&model, texts)?;
    let prove = |dir: &Path, what: &str| -> Result<Proof> {
        let again = logits(&N::read(&dir.to_string_lossy(), memory)?, texts)?;
        let trained_on = trained.as_ref().map(|(base, trained)| TrainedOn {
            base: *base,
            max_difference: furthest(&pairs(trained.clone(), again.clone())),
        });
        let proof = Proof::new(choice, name, tolerance, &pairs(apart.clone(), again));
        Proof {
            trained_on,
            ..proof
        }
        .required(what)
    };
    let out = match merged {
        Merged::Check(dir) => return prove(dir, "this is not the merged model"),
        Merged::Write(out) => out,
    };
    run_dir::replaceable(out, MERGE_FILE, "merge")?;
    adapters::merge(&mut model.parameters)?;
    let staged = StagedDir::create(out)?;
    model.save_description(staged.path())?;
    model.save_weights(staged.path())?;
    drop(model);
    let proof = prove(staged.path(), "the merged model is not kept")?;
    let path = staged.path().join(MERGE_FILE);
    let text = serde_json::to_string_pretty(&proof).map_err(io::Error::from);
    text.and_then(|text| std::fs::write(&path, text + "\n"))
        .map_err(|e| Error::io("write", &path, e))?;
    staged.commit()?;
    Ok(proof)
}
