//! The training recipe for classification, from files to a run directory.
//!
//! What it does: reads the data, loads a pretrained encoder with a head for the data's labels, trains what the policy
//! leaves trainable, evaluates after every epoch, keeps the best model, and certifies what moved and what did not.
//!
//! What it does not: distributed training, tasks other than classification, resuming an interrupted run.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use graft_models::Classifier;
use graft_nn::{FreezePolicy, Rule, TrainableSet};
use graft_tensor::Memory;
use graft_tensor::ops::optimizer::all_finite;
use graft_tensor::ops::random::{Key, shuffle};

use crate::batch::{BatchSize, epoch_batches};
use crate::certificate::{Certificate, TensorEntry};
use crate::config::{Rule as ConfigRule, RunConfig, Strategy};
use crate::data::{Columns, Dataset, training_labels};
use crate::encode::Encoded;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, Labelled, logits};
use crate::features::Features;
use crate::model::{ASIDE_FILE, Hashes, Model};
use crate::progress::Progress;
use crate::report::{BestEvaluation, RunReport, peak_rss};
use crate::run_dir::{Record, RunDir};
use crate::steps::{Loop, Training, diverged, lock};
use crate::verify::hash_tensors;

/// Examples within which batches are grouped by length, in batches of the configured size.
const GROUP_WINDOW: usize = 1024;

/// The policy of a strategy, refined by ordered rules.
///
/// # Errors
/// A strategy that asks for more layers than there are.
pub fn policy(
    classifier: &Classifier,
    strategy: Strategy,
    rules: &[ConfigRule],
) -> Result<FreezePolicy> {
    let strategy = match strategy {
        Strategy::Head => graft_models::Strategy::Head,
        Strategy::Last(layers) => graft_models::Strategy::Last(layers),
        Strategy::Full => graft_models::Strategy::Full,
    };
    let mut policy = classifier.policy(strategy)?;
    policy.rules.extend(rules.iter().map(|rule| Rule {
        train: rule.train,
        glob: rule.pattern.clone(),
    }));
    Ok(policy)
}

/// Runs a training from its configuration, on as many threads as it says.
///
/// # Errors
/// Data, model or settings that cannot be used; an output directory that cannot be replaced. An earlier run in that
/// directory stays whole unless this one ends well.
pub fn train(config: &RunConfig) -> Result<RunReport> {
    match config.train.threads {
        None => run(config),
        Some(threads) => rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|e| {
                let what = format!("cannot start {threads} threads: {e}");
                Error::config("train.threads", what, "ask for fewer threads")
            })?
            .install(|| run(config)),
    }
}

fn run(config: &RunConfig) -> Result<RunReport> {
    let begun = Instant::now();
    let mut run_dir = RunDir::create(config)?;
    let columns = Columns {
        text: config.data.text.clone(),
        text_pair: config.data.text_pair.clone(),
        label: Some(config.data.label.clone()),
    };
    let files = rayon::join(
        || Dataset::read(&config.data.train, &columns),
        || {
            let path = config.data.eval.as_ref();
            path.map(|path| Dataset::read(path, &columns)).transpose()
        },
    );
    let files = (files.0?, files.1?);
    let memory = Memory::cpu();
    let max_length = config.data.max_length;
    let loaded = Model::for_task_while(
        &config.model.path,
        training_labels(&files.0)?,
        config.strategy.dropout,
        config.train.seed,
        &memory,
        |config, tokenizer| {
            let encode = |data: &Dataset| Labelled::with(config, tokenizer, data, max_length);
            Ok((encode(&files.0)?, files.1.as_ref().map(encode).transpose()?))
        },
    )?;
    // The texts are not needed any more, now that they are tokens.
    drop(files);
    let (mut model, before) = (loaded.model, loaded.hashes);
    let (training, evaluation) = loaded.meanwhile;
    model
        .parameters
        .compute_in(config.train.precision.dtype())?;
    let set = policy(
        &model.classifier,
        config.strategy.name,
        &config.strategy.rules,
    )?
    .resolve(&model.parameters)?;
    let epochs = plan_epochs(config, &training.encoded);
    let accumulate = config.train.accumulate;
    let steps: u64 = epochs
        .iter()
        .map(|e| e.len().div_ceil(accumulate) as u64)
        .sum();

    let mut progress = Progress::stderr(steps);
    for line in notes(
        config,
        &training,
        evaluation.as_ref(),
        &loaded.report.initialised,
    ) {
        progress.say(&line);
    }
    run_dir.metrics().write(&Record::Start {
        examples: training.labels.len(),
        truncated: training.encoded.truncated,
        labels: model.config.labels.names().to_vec(),
        parameters: model.parameters.count() as u64,
        trainable: set.count(&model.parameters) as u64,
        steps,
    })?;

    let cut = model.classifier.cut(&set);
    let mut features = Features::new(config, &model, &before, cut, run_dir.path()).map(Mutex::new);
    let say_notes = |features: &Option<Mutex<Features>>, progress: &mut Progress| {
        let notes = features.as_ref().map(|f| lock(f).take_notes());
        notes.iter().flatten().for_each(|line| progress.say(line));
    };
    say_notes(&features, &mut progress);
    let counts = training.counts(&model.config.labels);
    let mut trainer = Loop::new(config, steps, begun)?;
    let mut best: Option<(usize, Evaluation)> = None;
    for (i, batches) in epochs.iter().enumerate() {
        let epoch = i + 1;
        let with = Training {
            set: &set,
            data: &training,
            features: features.as_ref(),
        };
        trainer.epoch(
            epoch,
            batches,
            &mut model,
            &with,
            &mut run_dir,
            &mut progress,
        )?;
        say_notes(&features, &mut progress);
        weights_are_finite(&model, &set, trainer.step)?;
        let Some(data) = &evaluation else { continue };
        let logits = {
            let mut features = features.as_ref().map(lock);
            logits(&model, &data.encoded, features.as_deref_mut())?
        };
        say_notes(&features, &mut progress);
        if !logits.iter().flatten().all(|x| x.is_finite()) {
            return Err(diverged(
                trainer.step,
                "a logit of the evaluation is not finite".into(),
            ));
        }
        let result = Evaluation::new(&logits, &data.labels, &counts);
        let score = result.confusion.score();
        let is_best = best.as_ref().is_none_or(|(_, best)| result.beats(best));
        progress.say(&format!(
            "epoch {epoch}: loss {:.4}, accuracy {:.4}, macro-F1 {:.4}{}",
            result.loss,
            score.accuracy,
            score.macro_f1,
            if is_best { ", the best so far" } else { "" }
        ));
        run_dir.metrics().write(&Record::Eval {
            epoch,
            step: trainer.step,
            loss: result.loss,
            score,
            baseline: result.baseline.score(),
            examples: result.confusion.total(),
            classes: result.confusion.per_class(),
            confusion: result.confusion.rows(),
            best: is_best,
        })?;
        if is_best {
            // The last epoch's weights are still there when the model is saved.
            if epoch < epochs.len() {
                model.set_aside(&set, run_dir.path())?;
            }
            best = Some((epoch, result));
        }
    }
    let kept = features.as_mut().map(|f| lock(f).kept());
    if let Some(features) = features {
        let features = features
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        for line in features.finish() {
            progress.say(&line);
        }
    }
    progress.finish();
    if best
        .as_ref()
        .is_some_and(|(epoch, _)| *epoch < epochs.len())
    {
        model.restore(run_dir.path())?;
    }
    run_dir.remove(ASIDE_FILE)?;
    model.save_weights(run_dir.path())?;
    model.save_description(run_dir.path())?;
    let certificate = certify(config, &model, &set, &before, &run_dir)?;
    let peak = peak_rss();
    run_dir.metrics().write(&Record::End {
        steps: trainer.step,
        best_epoch: best.as_ref().map_or(epochs.len(), |(epoch, _)| *epoch),
        tokens: trainer.tokens,
        seconds: begun.elapsed().as_secs_f64(),
        peak_rss: peak,
    })?;
    let out = run_dir.target().display().to_string();
    run_dir.commit(&certificate)?;
    Ok(RunReport {
        strategy: config.strategy.name.to_string(),
        parameters: model.parameters.count() as u64,
        trainable: set.count(&model.parameters) as u64,
        examples: training.labels.len(),
        truncated: training.encoded.truncated,
        epochs: epochs.len(),
        steps: trainer.step,
        tokens: trainer.tokens,
        training: trainer.elapsed,
        total: begun.elapsed(),
        startup: trainer.startup,
        batches: (
            epochs.iter().map(|batches| batches.len() as u64).sum(),
            match config.train.batch {
                BatchSize::Tokens(budget) => Some(budget),
                BatchSize::Examples(_) => None,
            },
        ),
        kept,
        best: best.map(|(epoch, result)| BestEvaluation {
            epoch,
            score: result.confusion.score(),
            baseline: result.baseline.score(),
        }),
        peak_rss: peak,
        usage: trainer.usage(&memory),
        out,
    })
}

/// Refuses to go on with, or to keep, a model that the last step before an epoch's end has broken: no later loss
/// would tell.
fn weights_are_finite(model: &Model, set: &TrainableSet, step: u64) -> Result<()> {
    for id in set.ids() {
        if !all_finite(model.parameters.value(id)?)? {
            let name = model.parameters.get(id).name();
            return Err(diverged(step, format!("the tensor `{name}` is not finite")));
        }
    }
    Ok(())
}

/// The batches of every epoch, planned ahead: with a token budget their number differs, and the schedule needs the sum.
fn plan_epochs(config: &RunConfig, data: &Encoded) -> Vec<Vec<Vec<usize>>> {
    let window = config.train.group_by_length.then_some(GROUP_WINDOW);
    (0..config.train.epochs)
        .map(|epoch| {
            let mut call = 0;
            epoch_batches(&data.lengths, config.train.batch, window, |items| {
                call += 1;
                shuffle(Key::new(config.train.seed, epoch as u64, call), items);
            })
        })
        .collect()
}

/// What the user should know about the data and the model before the run.
fn notes(
    config: &RunConfig,
    training: &Labelled,
    evaluation: Option<&Labelled>,
    initialised: &[String],
) -> Vec<String> {
    let mut notes = Vec::new();
    let files = [
        (Some(&config.data.train), Some(training)),
        (config.data.eval.as_ref(), evaluation),
    ];
    for (path, data) in files {
        let (Some(path), Some(data)) = (path, data) else {
            continue;
        };
        if data.encoded.truncated > 0 {
            notes.push(format!(
                "{}: {} of {} texts have more tokens than allowed and were cut",
                path.display(),
                data.encoded.truncated,
                data.labels.len()
            ));
        }
        if data.empty > 0 {
            notes.push(format!(
                "{}: {} texts are empty",
                path.display(),
                data.empty
            ));
        }
    }
    if !initialised.is_empty() {
        let names = crate::error::list_names(initialised, 4);
        notes.push(format!("new for this task: {names}"));
    }
    notes
}

/// Hashes what was written, and refuses to certify a run in which a frozen tensor moved.
fn certify(
    config: &RunConfig,
    model: &Model,
    set: &TrainableSet,
    before: &Hashes,
    run_dir: &RunDir,
) -> Result<Certificate> {
    let mut after = hash_tensors(run_dir.path())?;
    let mut entries = Vec::with_capacity(before.len());
    for (id, parameter) in model.parameters.iter() {
        let name = parameter.name();
        let moved = |what: &str| Error::Certificate {
            path: run_dir.target().to_path_buf(),
            what: format!("the tensor `{name}` {what}; the run is not kept"),
            help: "this is a defect of the trainer: please report it with the configuration".into(),
        };
        let Some(found) = after.remove(name) else {
            return Err(moved("was not written"));
        };
        let trainable = set.contains(id);
        if !trainable && found.sha256 != before[name] {
            return Err(moved("is frozen and changed"));
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
    let spec = config.model.path.clone();
    Ok(Certificate::new(
        spec,
        run_dir.config_sha256().to_owned(),
        entries,
    ))
}
