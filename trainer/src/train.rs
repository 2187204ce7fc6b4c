//! The training recipe, from files to a run directory.
//!
//! What it does: reads the data and a model, trains what the policy leaves trainable, evaluates after every epoch, keeps
//! the best model, and certifies what moved and what did not. What a task is made of is in `task/`, and what a stopped run
//! goes on from in `checkpoint.rs`.
//!
//! What it does not: distributed training.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use graft_models::{Classifier, Config, DecoderClassifier, ModelSource};
use graft_nn::TrainableSet;
use graft_tensor::ops::optimizer::all_finite;
use graft_tensor::ops::random::{Key, shuffle};
use graft_tensor::{Category, Memory};

use crate::adapter;
use crate::batch::{BatchSize, epoch_batches};
use crate::certificate::{Certificate, TensorEntry};
use crate::checkpoint::{Best, Checkpoints, inputs};
use crate::config::{RunConfig, TaskKind, Warmup};
use crate::conversations::Conversations;
use crate::course::Course;
use crate::device::DeviceChoice;
use crate::documents::Documents;
use crate::dropout;
use crate::error::{Error, Result};
use crate::hidden::Hidden;
use crate::model::{Hashes, Model};
use crate::network::Network;
use crate::plan::{Plan, check, rehearse};
use crate::progress::Progress;
use crate::record::Record;
use crate::report::{BestEvaluation, RunReport, counted, peak_rss, thousands};
use crate::run_dir::RunDir;
use crate::steps::{Loop, Records, diverged};
use crate::task::{Classify, Quality, Task, Tokens};
use crate::verify::hash_tensors;

/// Examples within which batches are grouped by length, in batches of the configured size.
const GROUP_WINDOW: usize = 1024;

/// Calls a function with the task that a configuration names for its type.
macro_rules! for_task {
    ($config:ident, $function:ident($($argument:expr),*)) => {
        match $config.task.kind {
            TaskKind::Texts(_) => {
                match Config::load(&ModelSource::resolve(&$config.model.path)?)? {
                    Config::Encoder(_) => $function::<Classify<Classifier>>($($argument),*),
                    Config::Decoder(_) => $function::<Classify<DecoderClassifier>>($($argument),*),
                }
            }
            TaskKind::Clm => $function::<Tokens<Documents>>($($argument),*),
            TaskKind::Chat => $function::<Tokens<Conversations>>($($argument),*),
            TaskKind::Mlm => $function::<Tokens<Hidden>>($($argument),*),
        }
    };
}

/// Runs a training from its configuration, on as many threads as it says.
///
/// # Errors
/// Data, model or settings that cannot be used; an output directory that cannot be replaced. An earlier run in that
/// directory stays whole unless this one ends well.
pub fn train(config: &RunConfig) -> Result<RunReport> {
    train_until(config, &AtomicBool::new(false))
}

/// [`train`], ended at the next step's end once `stop` is true. What was reached is then kept in a checkpoint, unless the
/// configuration says that there are none.
///
/// # Errors
/// As there; [`Error::Stopped`].
pub fn train_until(config: &RunConfig, stop: &AtomicBool) -> Result<RunReport> {
    on_threads(config.train.threads, "train.threads", || {
        for_task!(config, run(config, RunDir::create(config)?, stop))
    })
}

/// Goes on with the run at `out` that was stopped, by whatever, where its last checkpoint is, or begins it again if there is
/// none. What comes of it has the bits that the run would have had. `threads`: other than those of the run. Returns none if
/// the run had ended and only had to be put into its place.
///
/// # Errors
/// No run was stopped there; data or model are not what they were; as [`train_until`].
pub fn resume(out: &Path, threads: Option<usize>, stop: &AtomicBool) -> Result<Option<RunReport>> {
    let (run_dir, config) = RunDir::resume(out)?;
    if run_dir.has_ended() {
        run_dir.put_into_place()?;
        return Ok(None);
    }
    let (threads, place) = match threads {
        Some(_) => (threads, "--threads"),
        None => (config.train.threads, "train.threads"),
    };
    let config = &config;
    let report = on_threads(threads, place, || {
        for_task!(config, run(config, run_dir, stop))
    })?;
    Ok(Some(report))
}

/// More threads than any machine has a use for; starting them would take minutes.
const MOST_THREADS: usize = 1024;

/// Runs `work` on so many threads, or on all cores; `place` is where the number was given.
///
/// # Errors
/// Those of `work`; as many threads cannot be started.
pub(crate) fn on_threads<T: Send>(
    threads: Option<usize>,
    place: &str,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let Some(threads) = threads else {
        // On one of the pool's own threads: from another, each operation would wait for them to wake.
        return rayon::scope(|_| work());
    };
    if threads > MOST_THREADS {
        let what = format!("it is {threads}, expected {MOST_THREADS} at most");
        return Err(Error::config(place, what, "ask for fewer threads"));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| {
        let what = format!("cannot start {threads} threads: {e}");
        Error::config(place, what, "ask for fewer threads")
    })?;
    pool.install(work)
}

/// What a run needs of memory, by category. No weight is read.
///
/// # Errors
/// Data, model or settings that cannot be used.
pub fn plan(config: &RunConfig) -> Result<Plan> {
    fn of<T: Task>(config: &RunConfig) -> Result<Plan> {
        // A plan for a GPU needs none.
        let device = match config.train.device {
            DeviceChoice::On(device) => device,
            DeviceChoice::Auto => config.train.device.open()?.0.device(),
        };
        let loaded = T::load(config, &Memory::planned_for(device))?;
        let (mut model, mut task, mut hashes) = (loaded.model, loaded.meanwhile, loaded.hashes);
        adapter::begin(config, &mut model, &mut hashes)?;
        let course = Course::new(config, &model.network, &model.parameters)?;
        dropout::check(config, &task, &mut model, course.all())?;
        rehearse(config, &mut task, &mut model, &hashes)
    }
    for_task!(config, of(config))
}

fn run<T: Task>(config: &RunConfig, mut run_dir: RunDir, stop: &AtomicBool) -> Result<RunReport> {
    let begun = Instant::now();
    let (memory, note) = config.train.device.open()?;
    let loaded = T::load(config, &memory)?;
    let (mut model, mut before, mut task) = (loaded.model, loaded.hashes, loaded.meanwhile);
    let changed = adapter::begin(config, &mut model, &mut before)?;
    model
        .parameters
        .compute_in(config.train.precision.dtype())?;
    let course = Course::new(config, &model.network, &model.parameters)?;
    adapter::check(
        &mut model.parameters,
        course.all(),
        &loaded.report.initialised,
    )?;
    dropout::check(config, &task, &mut model, course.all())?;
    check(config, &mut task, &mut model, &before)?;
    let trainable = course.all().count(&model.parameters) as u64;
    let epochs = plan_epochs(config, task.lengths());
    let accumulate = config.train.accumulate;
    let steps: u64 = epochs
        .iter()
        .map(|e| e.len().div_ceil(accumulate) as u64)
        .sum();
    let (examples, truncated) = (task.lengths().len(), task.truncated());

    let mut progress = Progress::stderr(steps);
    say(note.into_iter().collect(), &mut progress);
    say(
        long_warmup(config, steps).into_iter().collect(),
        &mut progress,
    );
    say(task.take_notes(), &mut progress);
    let mut trainer = Loop::new(config, course.rates.clone(), steps, begun)?;
    let sources = inputs(config, &model)?;
    let (every, all) = (config.train.checkpoint, course.all());
    let mut checkpoints = Checkpoints::new(every, stop, all, &before, sources, begun);
    let mut records = Records {
        run_dir: &mut run_dir,
        progress: &mut progress,
        checkpoints: &mut checkpoints,
    };
    let resumed = match records.run_dir.has_checkpoint() {
        true => Some(trainer.resume(&mut model, &mut records)?),
        false => None,
    };
    match &resumed {
        Some(state) => {
            let step = state.counters.step;
            records.progress.skip(step);
            records.progress.say(&format!("resumed after step {step}"));
            records.run_dir.metrics().write(&Record::Resume { step })?;
        }
        None => {
            records.run_dir.metrics().cut(0)?;
            records.run_dir.metrics().write(&Record::Start {
                examples,
                truncated,
                labels: T::labels(&model),
                parameters: model.parameters.count() as u64,
                trainable,
                steps,
            })?;
        }
    }

    let from = trainer.counters.epoch;
    for (i, batches) in epochs.iter().enumerate().skip(from) {
        let epoch = i + 1;
        let set = course.set(i);
        // A stopped run has begun what it was at unless it was stopped between two epochs.
        let goes_on = resumed
            .as_ref()
            .filter(|state| i == from && (state.counters.sums.steps > 0 || !course.begins(i)));
        if course.begins(i) && goes_on.is_none() && i > 0 {
            let count = thousands(set.count(&model.parameters) as u64);
            let line = format!("epoch {epoch}: thawed, {count} parameters are trained");
            records.progress.say(&line);
        }
        if course.begins(i) || goes_on.is_some() {
            let trained = (set, course.stretch(i));
            task.begin(config, &model, &before, trained, records.run_dir.path());
            say(task.take_notes(), records.progress);
            match goes_on {
                Some(state) => trainer.rejoin(&model, set, &state.unaudited)?,
                None => trainer.begin(&model, set)?,
            }
        }
        trainer.epoch(batches, &mut model, (&task, set), &mut records)?;
        let step = trainer.counters.step;
        say(task.take_notes(), records.progress);
        weights_are_finite(&model, set, step)?;
        let result = task.evaluate(&model, step)?;
        say(task.take_notes(), records.progress);
        if let Some(quality) = result {
            let best = records.checkpoints.best.as_ref();
            let is_best = best.is_none_or(|best| quality.beats(&best.quality));
            let line = quality.line();
            let mark = if is_best { ", the best so far" } else { "" };
            records
                .progress
                .say(&format!("epoch {epoch}: {line}{mark}"));
            let record = quality.record(epoch, step, is_best);
            records.run_dir.metrics().write(&record)?;
            if is_best {
                // The last epoch's weights are still there when the model is saved.
                if epoch < epochs.len() {
                    model.set_aside(all, records.run_dir.path())?;
                }
                records.checkpoints.best = Some(Best { epoch, quality });
            }
        }
        // Behind the last one, what is left takes no longer than a checkpoint.
        if epoch < epochs.len() {
            trainer.reached(&model, &mut records)?;
        }
    }
    let (best, seconds) = (checkpoints.best.take(), checkpoints.elapsed());
    say(trainer.unaudited(&model), &mut progress);
    let (kept, notes) = task.finish();
    say(notes, &mut progress);
    progress.finish();
    let kept_epoch = best.as_ref().map_or(epochs.len(), |best| best.epoch);
    if kept_epoch < epochs.len() {
        model.restore(run_dir.path())?;
    }
    match config.strategy.name.adapter {
        None => model.save_weights(run_dir.path())?,
        Some(_) => adapter::save(&mut model, &config.model.path, run_dir.path())?,
    }
    model.save_description(run_dir.path())?;
    // What thawed behind the kept epoch is as frozen in it as the rest.
    let set = course.set(kept_epoch - 1);
    let certificate = certify(config, &model, set, (&before, &changed), &run_dir)?;
    let (peak, usage) = (peak_rss(), trainer.usage(&memory));
    run_dir.metrics().write(&Record::End {
        steps: trainer.counters.step,
        best_epoch: kept_epoch,
        tokens: trainer.counters.tokens,
        seconds: seconds.as_secs_f64(),
        peak_tensors: usage.peak_total as u64,
        peak_rss: peak,
    })?;
    let out = run_dir.target().display().to_string();
    run_dir.commit(&certificate)?;
    Ok(RunReport {
        strategy: config.strategy.name.to_string(),
        parameters: model.parameters.count() as u64,
        trainable,
        examples,
        truncated,
        epochs: epochs.len(),
        steps: trainer.counters.step,
        tokens: trainer.counters.tokens,
        training: trainer.counters.training,
        total: seconds,
        startup: trainer.startup,
        batches: (
            epochs.iter().map(|batches| batches.len() as u64).sum(),
            match config.train.batch {
                BatchSize::Tokens(budget) => Some(budget),
                BatchSize::Examples(_) => None,
            },
        ),
        kept,
        best: best.map(|best| BestEvaluation {
            epoch: best.epoch,
            measures: best.quality.measures(),
        }),
        peak_rss: peak,
        usage: Category::ALL.map(|c| (c, usage.peak(c))).to_vec(),
        peak_tensors: usage.peak_total,
        out,
    })
}

/// What the user should know of a warmup that does not end before a run of so many steps does.
fn long_warmup(config: &RunConfig, steps: u64) -> Option<String> {
    let Warmup::Steps(asked) = config.optimizer.warmup else {
        return None;
    };
    (asked >= steps).then(|| {
        format!(
            "optimizer.warmup is {}, and the run has {}: the learning rate rises all the way, to its peak at the end",
            counted(asked as usize, "step"),
            thousands(steps)
        )
    })
}

fn say(lines: Vec<String>, progress: &mut Progress) {
    lines.iter().for_each(|line| progress.say(line));
}

/// Refuses to go on with, or to keep, a model that the last step before an epoch's end has broken: no later loss
/// would tell.
fn weights_are_finite<N: Network>(model: &Model<N>, set: &TrainableSet, step: u64) -> Result<()> {
    for id in set.ids() {
        if !all_finite(model.parameters.value(id)?)? {
            let name = model.parameters.get(id).name();
            return Err(diverged(step, format!("the tensor `{name}` is not finite")));
        }
    }
    Ok(())
}

/// The batches of every epoch, planned ahead: with a token budget their number differs, and the schedule needs the sum.
pub(crate) fn plan_epochs(config: &RunConfig, lengths: &[usize]) -> Vec<Vec<Vec<usize>>> {
    let window = config.train.group_by_length.then_some(GROUP_WINDOW);
    (0..config.train.epochs)
        .map(|epoch| {
            let mut call = 0;
            epoch_batches(lengths, config.train.batch, window, |items| {
                call += 1;
                shuffle(Key::new(config.train.seed, epoch as u64, call), items);
            })
        })
        .collect()
}

/// Hashes what was written, and refuses to certify a run in which a frozen tensor moved.
fn certify<N: Network>(
    config: &RunConfig,
    model: &Model<N>,
    set: &TrainableSet,
    (before, changed): (&Hashes, &Hashes),
    run_dir: &RunDir,
) -> Result<Certificate> {
    let moved = |name: &str, what: &str| Error::Certificate {
        path: run_dir.target().to_path_buf(),
        what: format!("the tensor `{name}` {what}; the run is not kept"),
        help: "this is a defect of the trainer: please report it with the configuration".into(),
    };
    let spec = config.model.path.clone();
    let hash = run_dir.config_sha256().to_owned();
    if config.strategy.name.adapter.is_some() {
        let hashes = (before, changed);
        let entries = adapter::entries(model, set, hashes, run_dir.path(), &moved)?;
        return Ok(Certificate::new(spec, hash, entries));
    }
    let mut after = hash_tensors(run_dir.path())?;
    let mut entries = Vec::with_capacity(before.len());
    for (id, parameter) in model.parameters.iter() {
        let name = parameter.name();
        let Some(found) = after.remove(name) else {
            return Err(moved(name, "was not written"));
        };
        let trainable = set.contains(id);
        if !trainable && found.sha256 != before[name] {
            return Err(moved(name, "is frozen and changed"));
        }
        entries.push(TensorEntry {
            name: name.to_owned(),
            dtype: found.dtype,
            shape: found.shape,
            trainable,
            before: before[name].clone(),
            after: found.sha256,
        });
    }
    Ok(Certificate::new(spec, hash, entries))
}
