//! What a user meets who has read the README alone: nothing that is lost, nothing that is passed over in silence, numbers
//! that agree.

mod as_trained;
mod messages;
mod no_effect;
mod outputs;

use graft_tests::runs::{Said, Trainer};

pub(crate) const TRAINER: Trainer = Trainer(env!("CARGO_BIN_EXE_trainer_under_test"));

/// Runs, and expects a usage error of clap's; returns what it said.
pub(crate) fn misused(arguments: &[&str]) -> Said {
    let said = TRAINER.run(arguments);
    assert_eq!(said.code, Some(2), "{}{}", said.out, said.err);
    said
}
