//! Whether a run's first steps do what its policy says: what is trained moves, and nothing else does.
//!
//! A training run that is wired wrongly still runs, and its loss may even fall. What the audit holds against it:
//!
//! - A trained parameter whose gradient is zero in every element. Some are so at first and rightly: where two matrices
//!   are multiplied and one begins as zeros (an adapter's, a new head's), the other has no gradient before that one has
//!   moved. Each step that moves something can bring gradients to more; so a zero gradient is a fault only when steps
//!   have gone by ([`PATIENCE`]) that moved what they could and brought nothing new.
//! - A trained parameter that has a gradient and kept every bit. While the rate warms up, an update may be smaller than
//!   the last digit of a weight; so this is a fault only once the rate has reached its peak. A gradient that is nothing
//!   but rounding (the bias of keys shifts all scores of a query alike, and softmax does not see that) may round away.
//! - A frozen parameter that changed, by whatever means.
//! - A value that is not finite after the step.
//!
//! A step whose loss is exactly 0 proves nothing either way and is passed over.

use std::collections::BTreeMap;
use std::fmt;

use graft_autograd::Gradients;
use graft_tensor::ops::optimizer::{all_finite, sum_squares};
use graft_tensor::{DType, Tensor};

use crate::error::{Error, Result};
use crate::parameters::{ParamId, Parameters};
use crate::trainable::TrainableSet;

/// Steps that move parameters and bring no gradient to any other, after which a gradient that is still zero is a fault.
pub const PATIENCE: u64 = 2;

/// A gradient that is smaller than the whole by this factor is rounding.
const NEGLIGIBLE: f64 = 1.0 / (1 << 20) as f64;

/// What an audit holds against a run.
#[derive(Clone, PartialEq, Debug)]
pub enum Finding {
    /// Nothing the parameter computes reaches the loss
    ZeroGradient {
        /// The parameter
        name: String,
        /// Steps in which it was looked at
        steps: u64,
    },
    /// The parameter has a gradient, and no bit of it changed
    NotMoved {
        /// The parameter
        name: String,
        /// Its learning rate in the last step
        lr: f64,
    },
    /// The parameter is frozen, and changed
    FrozenMoved {
        /// The parameter
        name: String,
    },
    /// The parameter holds a number that is not finite
    NotFinite {
        /// The parameter
        name: String,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::ZeroGradient { name, steps: 1 } => write!(
                f,
                "`{name}` is trained, and its gradient is zero: nothing it computes reaches the loss"
            ),
            Finding::ZeroGradient { name, steps } => write!(
                f,
                "`{name}` is trained, and its gradient was zero in all of {steps} steps: nothing it computes reaches the \
                 loss"
            ),
            Finding::NotMoved { name, lr } => write!(
                f,
                "`{name}` is trained and has a gradient, and did not move: at a learning rate of {lr:e} its update is \
                 lost in rounding, or was not made"
            ),
            Finding::FrozenMoved { name } => write!(f, "`{name}` is frozen, and changed"),
            Finding::NotFinite { name } => {
                write!(f, "`{name}` is no longer finite after the step")
            }
        }
    }
}

/// A trained parameter that is being looked at.
#[derive(Debug)]
struct Watched {
    /// Of its value, as it was when the audit began
    checksum: u64,
    /// Norm of its gradient in the present step
    norm: f64,
    has_gradient: bool,
    moved: bool,
}

/// Watches the steps of a run until nothing is open; see the [module](self).
#[derive(Debug)]
pub struct Audit {
    watched: BTreeMap<ParamId, Watched>,
    /// Checksums of frozen values, until they were compared
    frozen: Vec<(ParamId, u64)>,
    /// Steps looked at
    steps: u64,
    /// Whether the present step brought a first gradient to something
    news: bool,
    /// Whether the step before moved anything
    moved: bool,
    /// Steps, each behind one that moved something, since the last one with news
    quiet: u64,
}

impl Audit {
    /// Begins to watch, before the first step that trains `set`.
    ///
    /// # Errors
    /// An empty set; a parameter without a value.
    pub fn new(parameters: &Parameters, set: &TrainableSet) -> Result<Audit> {
        if set.is_empty() {
            return Err(Error::NothingTrainable);
        }
        let (mut watched, mut frozen) = (BTreeMap::new(), Vec::new());
        for (id, _) in parameters.iter() {
            let checksum = checksum(parameters.value(id)?)?;
            match set.contains(id) {
                true => {
                    let new = Watched {
                        checksum,
                        norm: 0.0,
                        has_gradient: false,
                        moved: false,
                    };
                    watched.insert(id, new);
                }
                false => frozen.push((id, checksum)),
            }
        }
        Ok(Audit {
            watched,
            frozen,
            steps: 0,
            news: false,
            moved: false,
            quiet: 0,
        })
    }

    /// Goes on, before a later step, with an audit of which these parameters were [open](Audit::open): the others, and all
    /// that is frozen, were found right.
    ///
    /// # Errors
    /// As [`Audit::new`].
    pub fn resume(
        parameters: &Parameters,
        set: &TrainableSet,
        open: &[impl AsRef<str>],
    ) -> Result<Audit> {
        let mut audit = Audit::new(parameters, set)?;
        audit.frozen.clear();
        audit.watched.retain(|&id, _| {
            let name = parameters.get(id).name();
            open.iter().any(|open| open.as_ref() == name)
        });
        Ok(audit)
    }

    /// True when there is nothing left to watch.
    pub fn is_done(&self) -> bool {
        self.watched.is_empty() && self.frozen.is_empty()
    }

    /// Looks at the gradients of a step, before the optimizer consumes them.
    ///
    /// # Errors
    /// A gradient that cannot be read.
    pub fn before(&mut self, gradients: &Gradients) -> Result<()> {
        self.news = false;
        for (id, watched) in &mut self.watched {
            // That one is missing, the optimizer refuses.
            let Some(gradient) = gradients.get(id.key()) else {
                continue;
            };
            watched.norm = sum_squares(gradient)?.sqrt();
            if !watched.has_gradient && !is_zero(gradient)? {
                watched.has_gradient = true;
                self.news = true;
            }
        }
        Ok(())
    }

    /// Looks at the parameters after the step that followed [`Audit::before`]: it had the loss `loss`, gradients of the
    /// norm `norm`, and the learning rate `lr` of each parameter; `peak` says that no later step has a higher rate.
    ///
    /// # Errors
    /// A value that cannot be read. What is wrong with the run is no error here but a finding.
    pub fn after(
        &mut self,
        parameters: &Parameters,
        loss: f64,
        norm: f64,
        lr: impl Fn(ParamId) -> f64,
        peak: bool,
    ) -> Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let name = |id| parameters.get(id).name().to_owned();
        for (id, before) in std::mem::take(&mut self.frozen) {
            if checksum(parameters.value(id)?)? != before {
                findings.push(Finding::FrozenMoved { name: name(id) });
            }
        }
        if loss == 0.0 && norm == 0.0 {
            return Ok(findings);
        }
        self.steps += 1;
        self.quiet = match (self.news, self.moved) {
            (true, _) => 0,
            (false, true) => self.quiet + 1,
            (false, false) => self.quiet,
        };
        self.moved = self.watched.keys().any(|&id| lr(id) > 0.0);
        let dead = norm == 0.0 || self.quiet >= PATIENCE;
        let mut open = BTreeMap::new();
        for (id, mut watched) in std::mem::take(&mut self.watched) {
            let value = parameters.value(id)?;
            if !watched.moved && checksum(value)? != watched.checksum {
                watched.moved = true;
                if !all_finite(value)? {
                    findings.push(Finding::NotFinite { name: name(id) });
                    continue;
                }
            }
            match (watched.has_gradient, watched.moved) {
                (true, true) => {}
                (false, _) if dead => findings.push(Finding::ZeroGradient {
                    name: name(id),
                    steps: self.steps,
                }),
                (true, false) if peak => {
                    if watched.norm > NEGLIGIBLE * norm {
                        let lr = lr(id);
                        findings.push(Finding::NotMoved { name: name(id), lr });
                    }
                }
                _ => {
                    open.insert(id, watched);
                }
            }
        }
        self.watched = open;
        Ok(findings)
    }

    /// The trained parameters of which nothing is known when the run has ended: too few steps, or none at a rate above
    /// zero.
    pub fn open<'a>(&self, parameters: &'a Parameters) -> Vec<&'a str> {
        let ids = self.watched.keys();
        ids.map(|&id| parameters.get(id).name()).collect()
    }
}

/// True if every element is zero.
fn is_zero(x: &Tensor) -> Result<bool> {
    if x.is_on_device() {
        return Ok(sum_squares(x)? == 0.0);
    }
    if x.dtype() == DType::F32 && x.is_contiguous() {
        return Ok(x.slice::<f32>()?.iter().all(|&x| x == 0.0));
    }
    Ok(x.to_f64()?.iter().all(|&x| x == 0.0))
}

/// A number that is another one after any change of a single element, and after all but one in 2^64 of other changes.
fn checksum(x: &Tensor) -> Result<u64> {
    if x.dtype() == DType::F32 && x.is_contiguous() && !x.is_on_device() {
        return Ok(mix(x.slice::<f32>()?, |x| u64::from(x.to_bits())));
    }
    Ok(mix(&x.to_bytes()?, |&byte| u64::from(byte)))
}

/// A polynomial in an odd number over the words, in eight parts that a processor computes side by side.
fn mix<T>(words: &[T], bits: impl Fn(&T) -> u64) -> u64 {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut lanes = [0u64; 8];
    let blocks = words.chunks_exact(8);
    let rest = blocks.remainder();
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block) {
            *lane = lane.wrapping_mul(ODD).wrapping_add(bits(word));
        }
    }
    for (lane, word) in lanes.iter_mut().zip(rest) {
        *lane = lane.wrapping_mul(ODD).wrapping_add(bits(word));
    }
    lanes
        .iter()
        .fold(0, |sum, lane| sum.rotate_left(7).wrapping_mul(ODD) ^ lane)
}
