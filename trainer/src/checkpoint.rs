//! Checkpoints: what a stopped run needs to go on as if it had not been stopped, to the bit.
//!
//! A checkpoint is one safetensors file in the directory that a run is writing, replaced whole: the weights that some epoch
//! trains, the optimizer's state, and as metadata where the run was. What is frozen is in the base; the order of the
//! examples, dropout and the batches are functions of the seed and of counters. So none of that is in it, and what it depends
//! on (data, tokenizer, configuration, the weights as they were loaded) is there as hashes, which a resumed run must find
//! again.
//!
//! The best weights so far are beside it ([`ASIDE_FILE`](crate::model::ASIDE_FILE)). They may be of an epoch behind the
//! checkpoint: a run that goes on from there passes that epoch again, and sets the same bits aside.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use graft_models::safetensors::{TensorView, write};
use graft_models::{SafetensorsFile, little_endian};
use graft_nn::{Optimizer, ParamId, TrainableSet};
use graft_tensor::{Category, Tensor};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::certificate::{hex, sha256_hex};
use crate::config::{Every, RunConfig};
use crate::error::{Error, Result, list_names};
use crate::model::{Hashes, Model};
use crate::network::{Network, NetworkConfig};
use crate::progress::Progress;
use crate::run_dir::{CHECKPOINT_FILE, RunDir};
use crate::steps::Counters;

/// The metadata's key in the file.
const STATE: &str = "graft_checkpoint";

/// Of the metadata.
const FORMAT: u32 = 1;

/// Before the names of weights; the optimizer's tensors have [`slot`] before theirs.
const WEIGHTS: &str = "weights.";

/// Before the names of an optimizer's first or second tensors.
fn slot(number: usize) -> String {
    format!("optimizer.{number}.")
}

/// The evaluation of the best epoch so far.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Best<Q> {
    /// From 1
    pub epoch: usize,
    /// Its quality
    pub quality: Q,
}

/// Where a run was.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State<Q> {
    format: u32,
    /// Bytes of `metrics.jsonl`
    pub metrics: u64,
    /// Duration of the run so far
    pub elapsed: Duration,
    /// Of the loop
    pub counters: Counters,
    /// Parameters of which the audit knew nothing yet
    pub unaudited: Vec<String>,
    /// The best epoch so far, if any was evaluated
    pub best: Option<Best<Q>>,
    /// Updates of each parameter that has moved
    updates: BTreeMap<String, u64>,
    /// What the run depends on
    inputs: Hashes,
    /// The weights as they were loaded
    before: Hashes,
}

/// SHA-256 of all that steers a run beside its configuration: data files, tokenizer, the model's configuration. None of a
/// run that writes no checkpoint: nothing is read for what nobody keeps.
///
/// # Errors
/// A file that cannot be read.
pub(crate) fn inputs<N: Network>(config: &RunConfig, model: &Model<N>) -> Result<Hashes> {
    let mut hashes = Hashes::new();
    if config.train.checkpoint == Every::Never {
        return Ok(hashes);
    }
    let files = [
        ("data.train", Some(&config.data.train)),
        ("data.eval", config.data.eval.as_ref()),
    ];
    for (key, path) in files {
        let Some(path) = path else { continue };
        let mut sha = Sha256::new();
        File::open(path)
            .and_then(|mut file| io::copy(&mut file, &mut sha))
            .map_err(|e| Error::io("read", path, e))?;
        hashes.insert(key.to_owned(), hex(&sha.finalize()));
    }
    for (name, bytes) in model.tokenizer.files() {
        hashes.insert(name.to_owned(), sha256_hex(bytes));
    }
    let text = model.config.text();
    hashes.insert("config.json".to_owned(), sha256_hex(text.as_bytes()));
    Ok(hashes)
}

/// Writes the checkpoints of a run when they are due, and ends the run when it is told to.
pub(crate) struct Checkpoints<'a, Q> {
    every: Every,
    stop: &'a AtomicBool,
    /// All that some epoch trains
    trained: &'a TrainableSet,
    before: &'a Hashes,
    inputs: Hashes,
    begun: Instant,
    /// Duration of the run before this process
    pub earlier: Duration,
    /// When the last one was written, and at which step
    last: (Instant, u64),
    /// The best epoch so far
    pub best: Option<Best<Q>>,
}

impl<'a, Q: Serialize + DeserializeOwned + Clone> Checkpoints<'a, Q> {
    /// For a run that began at `begun` and trains `trained`, whose weights were `before` when they were loaded.
    pub fn new(
        every: Every,
        stop: &'a AtomicBool,
        trained: &'a TrainableSet,
        before: &'a Hashes,
        inputs: Hashes,
        begun: Instant,
    ) -> Checkpoints<'a, Q> {
        Checkpoints {
            every,
            stop,
            trained,
            before,
            inputs,
            begun,
            earlier: Duration::ZERO,
            last: (begun, 0),
            best: None,
        }
    }

    /// Duration of the run, that before this process included.
    pub fn elapsed(&self) -> Duration {
        self.earlier + self.begun.elapsed()
    }

    /// Whether the run is to end where it is.
    fn told_to_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether a checkpoint is due at these counters.
    fn is_due(&self, counters: &Counters) -> bool {
        match self.every {
            Every::Never => false,
            _ if self.told_to_stop() => true,
            Every::Steps(steps) => counters.step - self.last.1 >= steps,
            Every::Epochs(epochs) => {
                counters.sums.steps == 0 && (counters.epoch as u64).is_multiple_of(epochs)
            }
            Every::Minutes(minutes) => self.last.0.elapsed().as_secs() >= 60 * minutes,
        }
    }

    /// Whether [`Checkpoints::reached`] would do anything at these counters: what they count is to be done then.
    pub fn wants(&self, counters: &Counters) -> bool {
        self.told_to_stop() || self.is_due(counters)
    }

    /// Told after each step, and after each epoch's evaluation: writes a checkpoint if one is due. One that cannot be
    /// written ends the run only if that was to stop there.
    ///
    /// # Errors
    /// [`Error::Stopped`], when the run was told to stop.
    pub fn reached<N: Network>(
        &mut self,
        counters: &Counters,
        unaudited: impl FnOnce() -> Vec<String>,
        optimizer: &Optimizer,
        model: &Model<N>,
        run_dir: &mut RunDir,
        progress: &mut Progress,
    ) -> Result<()> {
        let stop = self.told_to_stop();
        if self.is_due(counters) {
            let written = self.write(counters, unaudited(), optimizer, model, run_dir);
            match written {
                Ok(()) => self.last = (Instant::now(), counters.step),
                Err(error) if stop => return Err(error),
                Err(error) => {
                    // Not again in every step.
                    self.last = (Instant::now(), counters.step);
                    progress.say(&format!("no checkpoint, the run goes on: {error}"));
                }
            }
        }
        match stop {
            false => Ok(()),
            true => Err(Error::stopped(
                counters.step,
                run_dir.target(),
                run_dir.has_checkpoint(),
            )),
        }
    }

    fn write<N: Network>(
        &self,
        counters: &Counters,
        unaudited: Vec<String>,
        optimizer: &Optimizer,
        model: &Model<N>,
        run_dir: &mut RunDir,
    ) -> Result<()> {
        let p = &model.parameters;
        let (mut tensors, mut updates) = (Vec::new(), BTreeMap::new());
        for id in self.trained.ids() {
            let parameter = p.get(id);
            let name = parameter.name();
            tensors.push((format!("{WEIGHTS}{name}"), p.value(id)?));
            if let Some((count, state)) = optimizer.state(id) {
                updates.insert(name.to_owned(), count);
                let named = |(i, tensor)| (slot(i) + name, tensor);
                tensors.extend(state.iter().enumerate().map(named));
            }
        }
        let bytes = tensors
            .iter()
            .map(|(_, tensor)| Ok(little_endian(tensor)?))
            .collect::<Result<Vec<_>>>()?;
        let views = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, tensor), data)| TensorView {
                name,
                dtype: tensor.dtype(),
                shape: tensor.shape(),
                data,
            });
        let state = State {
            format: FORMAT,
            metrics: run_dir.metrics().persist()?,
            elapsed: self.elapsed(),
            counters: counters.clone(),
            unaudited,
            best: self.best.clone(),
            updates,
            inputs: self.inputs.clone(),
            before: self.before.clone(),
        };
        let path = run_dir.path().join(CHECKPOINT_FILE);
        let text = toml::to_string(&state).map_err(|e| {
            let what = format!("the state of the run cannot be written: {e}");
            Error::config(path.display(), what, "set train.checkpoint=never")
        })?;
        let metadata = BTreeMap::from([(STATE.to_owned(), text)]);
        write(&path, &metadata, views)?;
        run_dir.keep();
        Ok(())
    }

    /// Takes weights and state from the checkpoint in `run_dir`, and cuts the metrics to what they were.
    ///
    /// # Errors
    /// A file that cannot be read; a model, data or tokenizer other than those of the run.
    pub fn resume<N: Network>(
        &mut self,
        model: &mut Model<N>,
        optimizer: &mut Optimizer,
        run_dir: &mut RunDir,
    ) -> Result<State<Q>> {
        let path = run_dir.path().join(CHECKPOINT_FILE);
        let mut file = SafetensorsFile::open(&path)?;
        let state: State<Q> = read_state(&path, file.metadata())?;
        let of_model = ("the model", "base", &state.before, self.before);
        let of_inputs = ("the data", "file", &state.inputs, &self.inputs);
        for (what, of, then, now) in [of_model, of_inputs] {
            unchanged(&path, (what, of), then, now)?;
        }
        let p = &mut model.parameters;
        let mut slots: BTreeMap<ParamId, Vec<(usize, Tensor)>> = BTreeMap::new();
        let mut found = BTreeSet::new();
        file.read_each(&mut |_| true, &mut |info, bytes| {
            let dtype = info
                .dtype
                .dtype()
                .expect("read_each refuses types that it cannot read");
            let states = [0, 1].map(|i| (Some(i), slot(i)));
            let kinds = [(None, WEIGHTS.to_owned())].into_iter().chain(states);
            for (kind, prefix) in kinds {
                let Some(name) = info.name.strip_prefix(&prefix) else {
                    continue;
                };
                let id = p.find(name)?;
                let shape = p.get(id).shape().to_vec();
                let memory = match kind {
                    None => p.memory().clone(),
                    Some(_) => p.memory().with(Category::Optimizer),
                };
                let tensor = Tensor::from_bytes(&memory, dtype, &shape, bytes)?;
                match kind {
                    None => {
                        p.set(id, tensor)?;
                        found.insert(id);
                    }
                    Some(i) => slots.entry(id).or_default().push((i, tensor)),
                }
            }
            Ok(())
        })?;
        if let Some(missing) = self.trained.ids().find(|id| !found.contains(id)) {
            let what = format!("the tensor `{}` is missing", p.get(missing).name());
            return Err(unusable(&path, what));
        }
        let mut states = Vec::with_capacity(state.updates.len());
        for (name, &count) in &state.updates {
            let id = p.find(name)?;
            let mut tensors = slots.remove(&id).unwrap_or_default();
            tensors.sort_by_key(|(i, _)| *i);
            states.push((id, count, tensors.into_iter().map(|(_, t)| t).collect()));
        }
        optimizer.restore(p, state.counters.step, states)?;
        run_dir.metrics().cut(state.metrics)?;
        self.earlier = state.elapsed;
        self.best = state.best.clone();
        self.last = (Instant::now(), state.counters.step);
        Ok(state)
    }
}

fn unusable(path: &Path, what: String) -> Error {
    let help = "begin again with `trainer train --restart` and the settings of that run";
    Error::config(path.display(), what, help)
}

/// The metadata of a checkpoint.
fn read_state<Q: DeserializeOwned>(
    path: &Path,
    metadata: &BTreeMap<String, String>,
) -> Result<State<Q>> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Some(text) = metadata.get(STATE) else {
        let what = format!("the file is no checkpoint: its metadata have no `{STATE}`");
        return Err(unusable(path, what));
    };
    let wrong = |e: toml::de::Error| {
        let what = format!("the metadata `{STATE}` are not understood: {}", e.message());
        unusable(path, what)
    };
    let Format { format } = toml::from_str(text).map_err(wrong)?;
    if format != FORMAT {
        let what = format!("the checkpoint has format {format}, expected {FORMAT}");
        let help = "resume with the version of the trainer that wrote it";
        return Err(Error::config(path.display(), what, help));
    }
    toml::from_str(text).map_err(wrong)
}

/// Refuses hashes that are others than those of the run.
fn unchanged(path: &Path, (what, of): (&str, &str), then: &Hashes, now: &Hashes) -> Result<()> {
    let names = then.keys().chain(now.keys());
    let mut other: Vec<&String> = names
        .filter(|name| then.get(*name) != now.get(*name))
        .collect();
    other.sort();
    other.dedup();
    if other.is_empty() {
        return Ok(());
    }
    let what = format!(
        "{what} is not what it was when the run began: {} changed since",
        list_names(&other, 4)
    );
    let help = format!(
        "put the {of} back as it was, or begin again with `trainer train --restart` and the settings of that run"
    );
    Err(Error::config(path.display(), what, help))
}
