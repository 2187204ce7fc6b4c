//! Layers, the one trainable set, losses, optimizers and schedules.
//!
//! A layer is a plain struct of parameter numbers: it declares its parameters in [`Parameters`] and
//! computes over a [`Forward`] pass. Which parameters are trained, a [`FreezePolicy`] says once, and
//! the [`TrainableSet`] that it yields drives everything else.
#![forbid(unsafe_code)]

pub mod adapters;
pub mod audit;
pub mod error;
mod forward;
pub mod layers;
pub mod losses;
pub mod optimizer;
mod parameters;
mod rates;
pub mod schedule;
mod trainable;

pub use audit::{Audit, Finding};
pub use error::{Error, Result};
pub use forward::Forward;
pub use optimizer::Optimizer;
pub use parameters::{Init, ParamId, Parameter, Parameters, Role};
pub use rates::{Rate, RateRule, Rated, Rates};
pub use schedule::{Decay, Schedule};
pub use trainable::{FreezePolicy, Rule, TrainableSet};
