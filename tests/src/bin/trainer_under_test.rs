//! The `trainer` binary again, under a name of its own: cargo gives the path of a binary only to the tests of the
//! package that it belongs to.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    graft_trainer::cli::run(std::env::args_os())
}
