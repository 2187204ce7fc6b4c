//! The `trainer` binary. Everything is in the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    graft_trainer::cli::run(std::env::args_os())
}
