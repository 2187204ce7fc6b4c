//! Reverse-mode automatic differentiation.
//!
//! A [`Tape`] is a program of plain-data operations ([`Op`]) that executes as it is recorded. Each
//! operation asks which of its inputs need a gradient; that alone decides what is saved
//! ([`Op::saves`]) and what backward computes. [`gradcheck`](gradcheck::gradcheck) holds any
//! function of tensors against finite differences.
#![forbid(unsafe_code)]

mod backward;
pub mod error;
mod forward;
mod functions;
pub mod gradcheck;
pub mod gradients;
pub mod op;
mod pending;
mod rebuild;
pub mod tape;

pub use error::{Error, Result};
pub use gradcheck::{GradCheck, gradcheck};
pub use gradients::Gradients;
pub use op::{Op, OpKind, Saves};
pub use tape::{Tape, Var};
