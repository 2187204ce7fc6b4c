//! The training recipe for classification, from files to a run directory.
//!
//! What it does: reads the data, loads a pretrained encoder with a head for the data's labels, trains what the policy
//! leaves trainable, evaluates after every epoch, keeps the best model, and certifies what moved and what did not.
//!
//! What it does not: distributed training, tasks other than classification, resuming an interrupted run.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use graft_autograd::Gradients;
use graft_models::Classifier;
use graft_nn::optimizer::Rule as UpdateRule;
use graft_nn::{Decay, Forward, FreezePolicy, Optimizer, Rule, Schedule, TrainableSet, losses};
use graft_tensor::ops::optimizer::all_finite;
use graft_tensor::ops::random::{Key, shuffle};
use graft_tensor::{Category, Memory, Tensor, Usage};

use crate::batch::epoch_batches;
use crate::certificate::{Certificate, TensorEntry, sha256_hex};
use crate::config::Strategy;
use crate::config::{OptimizerKind, Rule as ConfigRule, RunConfig, Schedule as ConfigSchedule};
use crate::data::{Columns, Dataset, training_labels};
use crate::encode::Encoded;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, Labelled, logits};
use crate::features::Features;
use crate::model::Model;
use crate::progress::Progress;
use crate::report::{BestEvaluation, RunReport, peak_rss};
use crate::run_dir::{Record, RunDir};
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
    let training = Dataset::read(&config.data.train, &columns)?;
    let memory = Memory::cpu();
    let seed = config.train.seed;
    let (mut model, loaded) = Model::for_task(
        &config.model.path,
        training_labels(&training)?,
        config.strategy.dropout,
        seed,
        &memory,
    )?;
    let max_length = config.data.max_length;
    let training = Labelled::new(&model, &training, max_length)?;
    let evaluation = match &config.data.eval {
        Some(path) => Some(Labelled::read(&model, path, &columns, max_length)?),
        None => None,
    };
    let set = policy(
        &model.classifier,
        config.strategy.name,
        &config.strategy.rules,
    )?
    .resolve(&model.parameters)?;
    let before = hash_parameters(&model)?;
    let epochs = plan_epochs(config, &training.encoded);
    let accumulate = config.train.accumulate;
    let steps: u64 = epochs
        .iter()
        .map(|e| e.len().div_ceil(accumulate) as u64)
        .sum();

    let mut progress = Progress::stderr(steps);
    for line in notes(config, &training, evaluation.as_ref(), &loaded.initialised) {
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

    let frozen_trunk = model.classifier.trunk_is_frozen(&model.parameters, &set);
    let features = |examples: usize| {
        frozen_trunk
            .then(|| Features::for_examples(&model, examples))
            .flatten()
    };
    let mut training_features = features(training.labels.len());
    let mut evaluation_features = features(evaluation.as_ref().map_or(0, |data| data.labels.len()));
    let counts = training.counts(&model.config.labels);
    let mut trainer = Loop::new(config, steps)?;
    let mut best: Option<(usize, Evaluation)> = None;
    for (i, batches) in epochs.iter().enumerate() {
        let epoch = i + 1;
        trainer.epoch(
            epoch,
            batches,
            &mut model,
            &set,
            &training,
            training_features.as_mut(),
            &mut run_dir,
            &mut progress,
        )?;
        weights_are_finite(&model, &set, trainer.step)?;
        let Some(data) = &evaluation else { continue };
        let logits = logits(&model, &data.encoded, evaluation_features.as_mut())?;
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
            model.save_weights(run_dir.path())?;
            best = Some((epoch, result));
        }
    }
    progress.finish();
    if best.is_none() {
        model.save_weights(run_dir.path())?;
    }
    model.save_description(run_dir.path())?;
    let peak = peak_rss();
    run_dir.metrics().write(&Record::End {
        steps: trainer.step,
        best_epoch: best.as_ref().map_or(epochs.len(), |(epoch, _)| *epoch),
        tokens: trainer.tokens,
        seconds: begun.elapsed().as_secs_f64(),
        peak_rss: peak,
    })?;
    let certificate = certify(config, &model, &set, &before, &run_dir)?;
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

/// The error for numbers that have left what f32 can hold.
fn diverged(step: u64, what: String) -> Error {
    let help = "lower optimizer.lr, or raise optimizer.warmup";
    Error::config(format!("step {step}"), what, help)
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

/// SHA-256 of every parameter's bytes, by name.
fn hash_parameters(model: &Model) -> Result<BTreeMap<String, String>> {
    let parameters = &model.parameters;
    parameters
        .iter()
        .map(|(id, p)| {
            let bytes = parameters.value(id)?.to_bytes()?;
            Ok((p.name().to_owned(), sha256_hex(&bytes)))
        })
        .collect()
}

/// Hashes what was written, and refuses to certify a run in which a frozen tensor moved.
fn certify(
    config: &RunConfig,
    model: &Model,
    set: &TrainableSet,
    before: &BTreeMap<String, String>,
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

/// The state of the loop over optimizer steps.
struct Loop<'a> {
    config: &'a RunConfig,
    optimizer: Optimizer,
    schedule: Schedule,
    step: u64,
    /// Forward passes, which key the random numbers
    passes: u64,
    tokens: u64,
    elapsed: Duration,
    usage: Option<Usage>,
}

impl<'a> Loop<'a> {
    fn new(config: &'a RunConfig, total: u64) -> Result<Loop<'a>> {
        let o = &config.optimizer;
        let rule = match o.kind {
            OptimizerKind::AdamW { betas, eps } => UpdateRule::AdamW {
                beta1: betas[0],
                beta2: betas[1],
                eps,
            },
            OptimizerKind::Sgd { momentum } => UpdateRule::Sgd {
                momentum,
                nesterov: false,
            },
        };
        Ok(Loop {
            config,
            optimizer: Optimizer::new(rule, o.weight_decay, !o.no_decay)?,
            schedule: Schedule {
                decay: match o.schedule {
                    ConfigSchedule::Constant => Decay::Constant,
                    ConfigSchedule::Linear => Decay::Linear,
                    ConfigSchedule::Cosine => Decay::Cosine,
                },
                warmup: o.warmup.steps(total),
                total,
            },
            step: 0,
            passes: 0,
            tokens: 0,
            elapsed: Duration::ZERO,
            usage: None,
        })
    }

    fn epoch(
        &mut self,
        epoch: usize,
        batches: &[Vec<usize>],
        model: &mut Model,
        set: &TrainableSet,
        data: &Labelled,
        mut features: Option<&mut Features>,
        run_dir: &mut RunDir,
        progress: &mut Progress,
    ) -> Result<()> {
        let (mut loss_sum, mut epoch_tokens, begun) = (0.0, 0, self.elapsed);
        for group in batches.chunks(self.config.train.accumulate) {
            let started = Instant::now();
            let rows: usize = group.iter().map(Vec::len).sum();
            let mut gradients = Gradients::new();
            let (mut loss, mut tokens) = (0.0, 0);
            for batch in group {
                let features = features.as_deref_mut();
                loss += self.pass(model, set, data, batch, rows, features, &mut gradients)?;
                tokens += batch
                    .iter()
                    .map(|&i| data.encoded.lengths[i] as u64)
                    .sum::<u64>();
            }
            if !loss.is_finite() {
                return Err(diverged(self.step + 1, format!("the loss is {loss}")));
            }
            let lr = self.config.optimizer.lr * self.schedule.factor(self.step);
            let clip = Some(self.config.optimizer.clip_norm).filter(|&norm| norm > 0.0);
            let done = self
                .optimizer
                .step(&mut model.parameters, set, &mut gradients, lr, clip)?;
            let took = started.elapsed();
            self.step += 1;
            self.tokens += tokens;
            self.elapsed += took;
            epoch_tokens += tokens;
            loss_sum += loss * rows as f64;
            progress.step(loss, tokens, took);
            run_dir.metrics().write(&Record::Step {
                epoch,
                step: self.step,
                loss,
                lr,
                grad_norm: done.gradient_norm,
                tokens,
                tokens_per_second: tokens as f64 / took.as_secs_f64().max(1e-9),
            })?;
        }
        self.usage = Some(model.parameters.memory().usage());
        run_dir.metrics().write(&Record::Epoch {
            epoch,
            step: self.step,
            loss: loss_sum / data.labels.len() as f64,
            tokens: epoch_tokens,
            seconds: (self.elapsed - begun).as_secs_f64(),
        })
    }

    /// One forward and backward pass; returns its share of the step's mean loss.
    fn pass(
        &mut self,
        model: &Model,
        set: &TrainableSet,
        data: &Labelled,
        batch: &[usize],
        rows_of_step: usize,
        features: Option<&mut Features>,
        gradients: &mut Gradients,
    ) -> Result<f64> {
        let first = match features {
            Some(features) => Some(features.rows(model, &data.encoded, batch)?),
            None => None,
        };
        let mut f = Forward::train(&model.parameters, set, self.config.train.seed, self.passes);
        self.passes += 1;
        let logits = match first {
            Some(first) => {
                let first = f.input(first);
                model.classifier.classify(&mut f, &first)?
            }
            None => model
                .classifier
                .forward(&mut f, &data.encoded.pack(batch))?,
        };
        let targets: Vec<i64> = batch.iter().map(|&i| i64::from(data.labels[i])).collect();
        let count = targets.len();
        let targets = Tensor::from_vec(f.memory(), targets, &[count])?;
        let targets = f.input(targets);
        let loss = losses::cross_entropy(&mut f, &logits, &targets, 0.0, rows_of_step as f64)?;
        drop(logits);
        let value = loss.value().item()?;
        f.backward(loss, gradients)?;
        Ok(value)
    }

    /// Memory by category, at the worst moments of the run.
    fn usage(&self, memory: &Memory) -> Vec<(Category, usize)> {
        let usage = self.usage.unwrap_or_else(|| memory.usage());
        Category::ALL.map(|c| (c, usage.peak(c))).to_vec()
    }
}
