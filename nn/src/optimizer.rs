//! Optimizers over the trainable set. State exists for trained parameters only.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use graft_autograd::Gradients;
use graft_tensor::{Category, Tensor, ops::optimizer as kernel};

use crate::error::{Error, Result};
use crate::parameters::{ParamId, Parameters};
use crate::rates::Rates;
use crate::trainable::TrainableSet;

/// What the last gradients are made of is allowed for with this part of all that is live then.
const BESIDE: usize = 100;

/// The update rule.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Rule {
    /// AdamW (Loshchilov and Hutter, 2019)
    AdamW {
        /// Decay of the first moment
        beta1: f64,
        /// Decay of the second moment
        beta2: f64,
        /// Added to the root of the second moment
        eps: f64,
    },
    /// Stochastic gradient descent
    Sgd {
        /// Share of the last update that is kept; 0 keeps no state
        momentum: f64,
        /// Nesterov's variant
        nesterov: bool,
    },
}

impl Rule {
    /// AdamW as PyTorch has it by default.
    pub fn adamw() -> Rule {
        Rule::AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        }
    }
}

/// The state of one parameter.
#[derive(Debug)]
struct Slot {
    /// Updates so far
    step: u64,
    /// First and second moment, or velocity
    tensors: Vec<Tensor>,
}

/// An optimizer and its state.
#[derive(Debug)]
pub struct Optimizer {
    rule: Rule,
    weight_decay: f64,
    decay_vectors: bool,
    rates: Rates,
    slots: BTreeMap<ParamId, Slot>,
    step: u64,
    tables: kernel::Tables,
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Step {
    /// Euclidean norm of all gradients before clipping
    pub gradient_norm: f64,
    /// Factor that the gradients were multiplied with
    pub clip: f64,
}

/// A step that was asked for: see [`Optimizer::send`].
#[derive(Debug)]
pub struct SentStep {
    /// Its number, from 1
    step: u64,
    outcome: kernel::Outcome,
}

impl Optimizer {
    /// An optimizer without state. With `decay_vectors` off, biases and the weights of norms (all
    /// that has one dimension) are spared the weight decay.
    ///
    /// # Errors
    /// A setting outside its range.
    pub fn new(rule: Rule, weight_decay: f64, decay_vectors: bool) -> Result<Optimizer> {
        let within = |name, value: f64, low: f64, high: f64, expected| {
            if value >= low && value < high {
                Ok(())
            } else {
                Err(Error::Setting {
                    name,
                    value: value.to_string(),
                    expected,
                })
            }
        };
        within(
            "weight_decay",
            weight_decay,
            0.0,
            f64::INFINITY,
            "0 or more",
        )?;
        match rule {
            Rule::AdamW { beta1, beta2, eps } => {
                within("beta1", beta1, 0.0, 1.0, "at least 0 and below 1")?;
                within("beta2", beta2, 0.0, 1.0, "at least 0 and below 1")?;
                within("eps", eps, f64::MIN_POSITIVE, f64::INFINITY, "above 0")?;
            }
            Rule::Sgd { momentum, nesterov } => {
                within("momentum", momentum, 0.0, 1.0, "at least 0 and below 1")?;
                if nesterov && momentum == 0.0 {
                    within(
                        "momentum",
                        momentum,
                        f64::MIN_POSITIVE,
                        1.0,
                        "above 0 for Nesterov",
                    )?;
                }
            }
        }
        Ok(Optimizer {
            rule,
            weight_decay,
            decay_vectors,
            rates: Rates::default(),
            slots: BTreeMap::new(),
            step: 0,
            tables: kernel::Tables::default(),
        })
    }

    /// Rates of single parameters, from now on.
    pub fn set_rates(&mut self, rates: Rates) {
        self.rates = rates;
    }

    /// Steps done.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// The state of one parameter, if it ever moved: its updates so far, and first and second moment, or velocity.
    pub fn state(&self, id: ParamId) -> Option<(u64, &[Tensor])> {
        let slot = self.slots.get(&id).filter(|slot| slot.step > 0)?;
        Some((slot.step, &slot.tensors))
    }

    /// Goes on where an optimizer had come after `step` steps, with the [`Optimizer::state`] that each parameter had. State
    /// that is there already is dropped.
    ///
    /// # Errors
    /// State of another number, type or shape of tensors than the rule keeps for that parameter.
    pub fn restore(
        &mut self,
        parameters: &Parameters,
        step: u64,
        states: impl IntoIterator<Item = (ParamId, u64, Vec<Tensor>)>,
    ) -> Result<()> {
        let mut slots = BTreeMap::new();
        for (id, step, tensors) in states {
            let weight = parameters.value(id)?;
            let kept = self.states();
            let fits = |t: &Tensor| t.shape() == weight.shape() && t.dtype() == weight.dtype();
            if tensors.len() != kept || !tensors.iter().all(fits) {
                let found: Vec<String> = tensors
                    .iter()
                    .map(|t| format!("{} of {}", t.shape(), t.dtype()))
                    .collect();
                return Err(Error::State {
                    name: parameters.get(id).name().into(),
                    found: found.join(", "),
                    expected: format!("{kept} of {} of {}", weight.shape(), weight.dtype()),
                });
            }
            slots.insert(id, Slot { step, tensors });
        }
        self.slots = slots;
        self.step = step;
        Ok(())
    }

    /// Tensors of state that the rule keeps for each parameter.
    fn states(&self) -> usize {
        match self.rule {
            Rule::AdamW { .. } => 2,
            Rule::Sgd { momentum, .. } => usize::from(momentum > 0.0),
        }
    }

    /// Bytes of state.
    pub fn state_bytes(&self) -> usize {
        self.slots
            .values()
            .flat_map(|slot| &slot.tensors)
            .map(|t| t.count() * t.dtype().size())
            .sum()
    }

    /// Makes what the steps that train `trainable` will hold from one to the next: state for parameters that have none yet,
    /// and room for the gradients, which [`Optimizer::step`] finds all at once. Called before the first of these steps, it
    /// lets state lie beside the weights, and not where activations of that step have left it a place.
    ///
    /// # Errors
    /// The system has no more memory.
    pub fn prepare(&mut self, parameters: &Parameters, trainable: &TrainableSet) -> Result<()> {
        self.begin(parameters, trainable)?;
        let mut gradients = 0;
        for id in trainable.ids() {
            let weight = parameters.value(id)?;
            gradients += weight.dtype().bytes(weight.count());
        }
        let memory = parameters.memory();
        let live: usize = memory.usage().live.iter().sum();
        // When the last gradient comes, something of what it is made of is still there.
        memory.reserve(gradients + (live + gradients) / BESIDE)?;
        Ok(())
    }

    /// [`Optimizer::send`] and [`Optimizer::settle`].
    ///
    /// # Errors
    /// As of both; nothing is updated then.
    pub fn step(
        &mut self,
        parameters: &mut Parameters,
        trainable: &TrainableSet,
        gradients: &mut Gradients,
        lr: f64,
        max_norm: Option<f64>,
    ) -> Result<Step> {
        let sent = self.send(parameters, trainable, gradients, lr, max_norm)?;
        self.settle(parameters, trainable, sent)
    }

    /// Updates every trained parameter at learning rate `lr`, times its own factor, and consumes the
    /// gradients. With `max_norm`, they are first scaled so that their global norm is at most that.
    /// A GPU does it when it gets there; what it did, [`Optimizer::settle`] says.
    ///
    /// # Errors
    /// A trained parameter without a gradient, or whose value something else still holds; one that
    /// is not finite where that is known at once. Nothing is updated then.
    pub fn send(
        &mut self,
        parameters: &mut Parameters,
        trainable: &TrainableSet,
        gradients: &mut Gradients,
        lr: f64,
        max_norm: Option<f64>,
    ) -> Result<SentStep> {
        let trained = trainable
            .ids()
            .map(|id| (id.key(), parameters.get(id).name()));
        gradients.require(trained)?;
        for id in trainable.ids() {
            let value = parameters.value(id)?;
            if !value.is_unique() {
                let shape = *value.shape();
                return Err(graft_tensor::Error::Shared { shape }.into());
            }
        }
        self.begin(parameters, trainable)?;
        let weights = parameters
            .values_mut()
            .filter(|(id, _)| trainable.contains(*id));
        let slots = self
            .slots
            .iter_mut()
            .filter(|(id, _)| trainable.contains(**id));
        let mut updates = Vec::new();
        for ((id, weight), (_, slot)) in weights.zip(slots) {
            let Some(gradient) = gradients.get(id.key()) else {
                continue;
            };
            let decays = self.decay_vectors || weight.shape().rank() > 1;
            let rate = self.rates.get(id);
            let weight_decay = rate
                .decay
                .unwrap_or(if decays { self.weight_decay } else { 0.0 });
            slot.step += 1;
            updates.push(kernel::Update {
                rule: numbers(self.rule, lr * rate.lr, weight_decay, slot.step),
                weight,
                gradient,
                states: slot.tensors.iter_mut().collect(),
            });
        }
        let sent = kernel::send(&mut updates, max_norm, &mut self.tables);
        drop(updates);
        self.step += 1;
        let outcome = match sent {
            Ok(kernel::Outcome::Known(kernel::Stepped::NotFinite(number))) => {
                return Err(self.not_finite(parameters, trainable, self.step, number));
            }
            Ok(outcome) => outcome,
            Err(error) => {
                self.undo(trainable);
                return Err(error.into());
            }
        };
        for id in trainable.ids() {
            gradients.take(id.key());
        }
        let step = self.step;
        Ok(SentStep { step, outcome })
    }

    /// What a step did, which is waited for. Steps may have been sent behind it; they are settled in their order.
    ///
    /// # Errors
    /// A gradient that is not finite. That step has updated nothing; those that were sent behind it may have.
    pub fn settle(
        &mut self,
        parameters: &Parameters,
        trainable: &TrainableSet,
        sent: SentStep,
    ) -> Result<Step> {
        match sent.outcome.wait()? {
            kernel::Stepped::Done { norm, clip } => Ok(Step {
                gradient_norm: norm,
                clip,
            }),
            kernel::Stepped::NotFinite(number) => {
                Err(self.not_finite(parameters, trainable, sent.step, number))
            }
        }
    }

    /// Takes back the count of step `step`, which updated nothing because of gradient number `number`.
    fn not_finite(
        &mut self,
        parameters: &Parameters,
        trainable: &TrainableSet,
        step: u64,
        number: usize,
    ) -> Error {
        self.undo(trainable);
        let id = trainable.ids().nth(number).expect("one for each update");
        let name = parameters.get(id).name().into();
        Error::NonFiniteGradient { name, step }
    }

    /// Gives every trained parameter that has no state yet one of zeros.
    fn begin(&mut self, parameters: &Parameters, trainable: &TrainableSet) -> Result<()> {
        let states = self.states();
        for id in trainable.ids() {
            let Entry::Vacant(place) = self.slots.entry(id) else {
                continue;
            };
            let weight = parameters.value(id)?;
            let memory = weight.memory().with(Category::Optimizer);
            let tensors = (0..states)
                .map(|_| Tensor::zeros(&memory, weight.dtype(), weight.shape()))
                .collect::<graft_tensor::Result<_>>()?;
            place.insert(Slot { step: 0, tensors });
        }
        Ok(())
    }

    /// Takes back the count of a step that did not happen, and state that began with it.
    fn undo(&mut self, trainable: &TrainableSet) {
        self.step -= 1;
        for id in trainable.ids() {
            if let Some(slot) = self.slots.get_mut(&id) {
                slot.step -= 1;
            }
        }
        self.slots.retain(|_, slot| slot.step > 0);
    }
}

/// A rule's numbers for update number `step` of a parameter.
fn numbers(rule: Rule, lr: f64, weight_decay: f64, step: u64) -> kernel::Rule {
    match rule {
        Rule::AdamW { beta1, beta2, eps } => kernel::Rule::AdamW(kernel::AdamW {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            step,
            grad_scale: 1.0,
        }),
        Rule::Sgd { momentum, nesterov } => kernel::Rule::Sgd(kernel::Sgd {
            lr,
            momentum,
            dampening: 0.0,
            nesterov,
            weight_decay,
            first_step: step == 1,
            grad_scale: 1.0,
        }),
    }
}
