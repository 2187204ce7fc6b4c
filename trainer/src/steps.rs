//! The loop over batches and optimizer steps. The next batch is prepared while the present one is computed; a GPU has the
//! next step before this machine looks at what the present one did.

use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use graft_autograd::Gradients;
use graft_nn::optimizer::{Rule as UpdateRule, SentStep, Step};
use graft_nn::{Audit, Decay, Forward, Optimizer, Rates, Schedule, TrainableSet};
use graft_tensor::{Item, Memory, Usage};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoints, State};
use crate::config::{OptimizerKind, RunConfig, Schedule as ConfigSchedule};
use crate::error::{Error, Result, list_names};
use crate::model::Model;
use crate::network::Network;
use crate::plan::read_one_later;
use crate::progress::Progress;
use crate::record::Record;
use crate::run_dir::RunDir;
use crate::task::Task;

/// The error for numbers that have left what f32 can hold.
pub(crate) fn diverged(step: u64, what: String) -> Error {
    let help = match step {
        // Nothing has moved yet.
        1 => "check the model's weights and lower optimizer.lr",
        _ => "lower optimizer.lr, or raise optimizer.warmup",
    };
    Error::config(format!("step {step}"), what, help)
}

/// Runs `consume` over `prepare` of each item, in their order. A thread beside it prepares the next item while
/// `consume` is at work on the present one; it ends when `consume` does.
fn ahead<I: Send, T: Send, R>(
    items: impl Iterator<Item = I> + Send,
    prepare: impl Fn(I) -> T + Send,
    consume: impl FnOnce(&mut dyn Iterator<Item = T>) -> R,
) -> R {
    std::thread::scope(|scope| {
        // One waits in the channel while another is being prepared.
        let (to, from) = sync_channel(1);
        scope.spawn(move || {
            for item in items {
                if to.send(prepare(item)).is_err() {
                    // The consumer has stopped.
                    break;
                }
            }
        });
        consume(&mut from.into_iter())
    })
}

/// How far the loop is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Counters {
    /// Epochs that have ended
    pub epoch: usize,
    /// Steps done
    pub step: u64,
    /// Forward passes, which key the random numbers
    pub passes: u64,
    /// Tokens trained on
    pub tokens: u64,
    /// Duration of the steps
    pub training: Duration,
    /// Of the epoch that has not ended
    pub sums: Sums,
}

/// Sums over the steps of an epoch.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Sums {
    /// How many
    pub steps: usize,
    /// Of all supervised examples or tokens
    pub loss: f64,
    /// How many these are
    pub targets: usize,
    /// Tokens
    pub tokens: u64,
    /// Duration
    pub training: Duration,
}

/// What a run writes while it goes on.
pub(crate) struct Records<'r, 'a, Q> {
    /// Its directory
    pub run_dir: &'r mut RunDir,
    /// For the user
    pub progress: &'r mut Progress,
    /// To go on from
    pub checkpoints: &'r mut Checkpoints<'a, Q>,
}

/// A step that was sent to where the model is. A GPU is at work on it while the next one is asked for, and only then does
/// this machine look at what it did.
pub(crate) struct Sent {
    /// From 1
    number: u64,
    lr: f64,
    targets: usize,
    tokens: u64,
    /// Its loss, in parts
    shares: Vec<Item>,
    /// Its update, or why there is none
    step: graft_nn::Result<SentStep>,
}

impl Sent {
    /// True if nothing has to be waited for.
    fn is_known(&self) -> bool {
        self.shares.iter().all(Item::is_known)
    }
}

/// The state of the loop over optimizer steps.
pub(crate) struct Loop<'a> {
    config: &'a RunConfig,
    optimizer: Optimizer,
    rates: Rates,
    /// Until it has seen enough
    audit: Option<Audit>,
    schedule: Schedule,
    begun: Instant,
    /// How far it is
    pub counters: Counters,
    /// From the run's beginning to the end of the first step
    pub startup: Duration,
    usage: Option<Usage>,
}

impl<'a> Loop<'a> {
    /// For a run of `total` steps that began at `begun`, in which parameters move at `rates`.
    ///
    /// # Errors
    /// A schedule whose rate is zero in every step.
    pub fn new(
        config: &'a RunConfig,
        rates: Rates,
        total: u64,
        begun: Instant,
    ) -> Result<Loop<'a>> {
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
        let schedule = Schedule {
            decay: match o.schedule {
                ConfigSchedule::Constant => Decay::Constant,
                ConfigSchedule::Linear => Decay::Linear,
                ConfigSchedule::Cosine => Decay::Cosine,
            },
            warmup: o.warmup.steps(total),
            total,
        };
        if config.train.audit && total > 0 && (0..total).all(|step| schedule.factor(step) == 0.0) {
            let (steps, warmup) = (total, schedule.warmup);
            return Err(Error::config(
                "optimizer.warmup",
                format!(
                    "the learning rate is zero in every step: the run has {steps}, and the warmup of {warmup} begins at 0"
                ),
                "set optimizer.warmup=0, or train for more steps",
            ));
        }
        let mut optimizer = Optimizer::new(rule, o.weight_decay, !o.no_decay)?;
        optimizer.set_rates(rates.clone());
        Ok(Loop {
            config,
            optimizer,
            rates,
            audit: None,
            schedule,
            begun,
            counters: Counters::default(),
            startup: Duration::ZERO,
            usage: None,
        })
    }

    /// Told before the first step that trains `set`.
    ///
    /// # Errors
    /// No memory for the optimizer's state, of a set that was resolved over the model.
    pub fn begin<N: Network>(&mut self, model: &Model<N>, set: &TrainableSet) -> Result<()> {
        self.optimizer.prepare(&model.parameters, set)?;
        if self.config.train.audit {
            self.audit = Some(Audit::new(&model.parameters, set)?);
        }
        Ok(())
    }

    /// Goes on where a run was stopped: takes weights, the optimizer's state and the counters from its checkpoint.
    /// [`Loop::rejoin`] comes before the next step.
    ///
    /// # Errors
    /// As [`Checkpoints::resume`].
    pub fn resume<N: Network, Q: Serialize + DeserializeOwned + Clone>(
        &mut self,
        model: &mut Model<N>,
        records: &mut Records<'_, '_, Q>,
    ) -> Result<State<Q>> {
        let run_dir = &mut *records.run_dir;
        let checkpoints = &mut *records.checkpoints;
        let state = checkpoints.resume(model, &mut self.optimizer, run_dir)?;
        self.counters = state.counters.clone();
        Ok(state)
    }

    /// Told in place of [`Loop::begin`] before a step in the midst of those that train `set`, with the parameters of which
    /// the audit knew nothing yet.
    ///
    /// # Errors
    /// As there.
    pub fn rejoin<N: Network>(
        &mut self,
        model: &Model<N>,
        set: &TrainableSet,
        unaudited: &[String],
    ) -> Result<()> {
        self.optimizer.prepare(&model.parameters, set)?;
        if self.config.train.audit && !unaudited.is_empty() {
            self.audit = Some(Audit::resume(&model.parameters, set, unaudited)?);
        }
        Ok(())
    }

    /// The parameters of which the audit knows nothing yet.
    fn open<N: Network>(&self, model: &Model<N>) -> Vec<String> {
        let audit = self.audit.as_ref();
        let open = audit.map_or_else(Vec::new, |audit| audit.open(&model.parameters));
        open.into_iter().map(str::to_owned).collect()
    }

    /// Told when a step has ended, and when an epoch was evaluated: here a checkpoint may be written, or the run may end.
    ///
    /// # Errors
    /// As [`Checkpoints::reached`].
    pub fn reached<N: Network, Q: Serialize + DeserializeOwned + Clone>(
        &self,
        model: &Model<N>,
        records: &mut Records<'_, '_, Q>,
    ) -> Result<()> {
        let Records {
            run_dir,
            progress,
            checkpoints,
        } = records;
        checkpoints.reached(
            &self.counters,
            || self.open(model),
            &self.optimizer,
            model,
            run_dir,
            progress,
        )
    }

    /// What the audit could not find out, for the user.
    pub fn unaudited<N: Network>(&self, model: &Model<N>) -> Vec<String> {
        let names = self.open(model);
        match names.is_empty() {
            true => Vec::new(),
            false => vec![format!(
                "the run was too short to tell whether all that is trained takes part: nothing is known of {}",
                list_names(&names, 4)
            )],
        }
    }

    /// Trains `set` on the batches of one epoch, from the step on that was not done yet.
    ///
    /// # Errors
    /// A loss that is not finite; as the task's passes; the run was told to stop.
    pub fn epoch<T: Task>(
        &mut self,
        batches: &[Vec<usize>],
        model: &mut Model<T::Network>,
        (task, set): (&T, &TrainableSet),
        records: &mut Records<'_, '_, T::Quality>,
    ) -> Result<()> {
        let epoch = self.counters.epoch + 1;
        let done = self.counters.sums.steps * self.config.train.accumulate;
        let rest = &batches[done.min(batches.len())..];
        ahead(
            rest.iter(),
            |batch| task.prepare(epoch, batch),
            |prepared| self.steps(rest, prepared, model, (task, set), records),
        )?;
        let sums = std::mem::take(&mut self.counters.sums);
        self.counters.epoch = epoch;
        self.usage = Some(model.parameters.memory().usage());
        records.run_dir.metrics().write(&Record::Epoch {
            epoch,
            step: self.counters.step,
            loss: sums.loss / sums.targets as f64,
            tokens: sums.tokens,
            seconds: sums.training.as_secs_f64(),
        })
    }

    fn steps<T: Task>(
        &mut self,
        batches: &[Vec<usize>],
        prepared: &mut dyn Iterator<Item = T::Batch>,
        model: &mut Model<T::Network>,
        (task, set): (&T, &TrainableSet),
        records: &mut Records<'_, '_, T::Quality>,
    ) -> Result<()> {
        let groups = batches.chunks(self.config.train.accumulate);
        let last = groups.len();
        let mut since = Instant::now();
        let mut waiting = None;
        for (i, group) in groups.enumerate() {
            let examples = || group.iter().flatten().copied();
            let targets = examples().map(|i| task.targets(i)).sum();
            let tokens = examples().map(|i| task.lengths()[i] as u64).sum();
            let mut batches = prepared.take(group.len());
            let sent = self.send(&mut batches, (targets, tokens), model, (task, set));
            // A GPU has the next step by now.
            if let Some(before) = waiting.take() {
                self.tell(before, &mut since, model, set, records)?;
            }
            let sent = sent?;
            // Behind the last one the epoch is evaluated.
            let looked_at = i + 1 == last || records.checkpoints.wants(&self.counters);
            if sent.is_known() || self.audit.is_some() || looked_at {
                self.tell(sent, &mut since, model, set, records)?;
                if i + 1 < last {
                    self.reached(model, records)?;
                    since = Instant::now();
                }
            } else {
                waiting = Some(sent);
            }
        }
        Ok(())
    }

    /// Settles a step, and tells what it did; it took the time since the one before it was told, which was at `since`.
    ///
    /// # Errors
    /// As [`Loop::settle`]; metrics that cannot be written.
    fn tell<N: Network, Q: Serialize + DeserializeOwned + Clone>(
        &mut self,
        sent: Sent,
        since: &mut Instant,
        model: &Model<N>,
        set: &TrainableSet,
        records: &mut Records<'_, '_, Q>,
    ) -> Result<()> {
        let (step, lr, targets, tokens) = (sent.number, sent.lr, sent.targets, sent.tokens);
        let (loss, done) = self.settle(model, set, sent)?;
        let took = since.elapsed();
        if self.startup.is_zero() {
            self.startup = self.begun.elapsed();
        }
        let counters = &mut self.counters;
        counters.tokens += tokens;
        counters.training += took;
        counters.sums.loss += loss * targets as f64;
        counters.sums.targets += targets;
        counters.sums.tokens += tokens;
        counters.sums.training += took;
        records.progress.step(loss, tokens, took);
        records.run_dir.metrics().write(&Record::Step {
            epoch: counters.epoch + 1,
            step,
            loss,
            lr,
            grad_norm: done.gradient_norm,
            tokens,
            tokens_per_second: tokens as f64 / took.as_secs_f64().max(1e-9),
        })?;
        *since = Instant::now();
        Ok(())
    }

    /// One optimizer step over some batches with so many targets and tokens together, sent to where the model is.
    ///
    /// # Errors
    /// As the task's passes.
    pub fn send<T: Task>(
        &mut self,
        batches: &mut dyn Iterator<Item = T::Batch>,
        (targets, tokens): (usize, u64),
        model: &mut Model<T::Network>,
        (task, set): (&T, &TrainableSet),
    ) -> Result<Sent> {
        let mut gradients = Gradients::new();
        let mut shares = Vec::new();
        for batch in batches {
            let seed = self.config.train.seed;
            let mut f = Forward::train(&model.parameters, set, seed, self.counters.passes);
            self.counters.passes += 1;
            let share = task.loss(&mut f, model, batch, targets)?;
            shares.push(read_one_later(share.value())?);
            f.backward(share, &mut gradients)?;
        }
        let lr = self.config.optimizer.lr * self.schedule.factor(self.counters.step);
        let clip = Some(self.config.optimizer.clip_norm).filter(|&norm| norm > 0.0);
        if let Some(audit) = &mut self.audit {
            audit.before(&gradients)?;
        }
        let step = self
            .optimizer
            .send(&mut model.parameters, set, &mut gradients, lr, clip);
        model.parameters.memory().submit()?;
        self.counters.step += 1;
        self.counters.sums.steps += 1;
        Ok(Sent {
            number: self.counters.step,
            lr,
            targets,
            tokens,
            shares,
            step,
        })
    }

    /// Waits for a step: its loss, and what the optimizer did.
    ///
    /// # Errors
    /// A loss or a gradient that is not finite; what the audit found.
    pub fn settle<N: Network>(
        &mut self,
        model: &Model<N>,
        set: &TrainableSet,
        sent: Sent,
    ) -> Result<(f64, Step)> {
        let mut loss = 0.0;
        for share in sent.shares {
            loss += share.wait()?;
        }
        // Where the loss is not finite its gradients mostly are not either; the loss says more.
        if !loss.is_finite() {
            return Err(diverged(sent.number, format!("the loss is {loss}")));
        }
        let done = self.optimizer.settle(&model.parameters, set, sent.step?)?;
        self.audit(model, sent.number, (loss, done.gradient_norm, sent.lr))?;
        Ok((loss, done))
    }

    /// Looks at what the step did, while the audit goes on.
    fn audit<N: Network>(
        &mut self,
        model: &Model<N>,
        step: u64,
        (loss, norm, lr): (f64, f64, f64),
    ) -> Result<()> {
        let Some(audit) = &mut self.audit else {
            return Ok(());
        };
        let rates = &self.rates;
        let of = |id| lr * rates.get(id).lr;
        let peak = step > self.schedule.warmup;
        let findings = audit.after(&model.parameters, loss, norm, of, peak)?;
        if audit.is_done() {
            self.audit = None;
        }
        match findings.is_empty() {
            true => Ok(()),
            false => Err(Error::audit(step, findings)),
        }
    }

    /// Memory of tensors at the worst moments of the run.
    pub fn usage(&self, memory: &Memory) -> Usage {
        self.usage.unwrap_or_else(|| memory.usage())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn items_come_in_order_and_one_ahead() {
        let prepared = Mutex::new(0usize);
        let prepare = |i: usize| {
            *prepared.lock().unwrap() += 1;
            i * i
        };
        let squares: Vec<usize> = ahead(0..50, prepare, |items| {
            (0..)
                .zip(items)
                .map(|(taken, square)| {
                    // This one, one in the channel, one that waits to get there, and one more on its way.
                    assert!(*prepared.lock().unwrap() <= taken + 4);
                    square
                })
                .collect()
        });
        assert_eq!(squares, (0..50).map(|i| i * i).collect::<Vec<_>>());
        assert_eq!(*prepared.lock().unwrap(), 50);
    }

    #[test]
    fn a_consumer_that_stops_stops_the_producer() {
        let first = ahead(0usize.., |i| i, |items| items.next());
        assert_eq!(first, Some(0));
    }

    #[test]
    fn the_next_item_is_prepared_while_one_is_consumed() {
        // Each side waits for the other to be at work: without the overlap, neither would ever go on.
        let (ready, at_work) = std::sync::mpsc::channel();
        let prepare = move |i: usize| {
            ready.send(i).unwrap();
            i
        };
        ahead(0..10, prepare, |items| {
            assert_eq!(at_work.recv().unwrap(), 0);
            for i in items {
                if i < 9 {
                    assert_eq!(
                        at_work.recv().unwrap(),
                        i + 1,
                        "prepared while {i} is consumed"
                    );
                }
            }
        });
    }
}
