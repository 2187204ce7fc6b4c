//! Chores of the workspace.
//!
//! `cargo run -p xtask -- ptx [NAME...]` makes the PTX of the CUDA sources again, of those that are
//! named or of all that changed. The compiler's library is the one in the folder that the variable
//! GRAFT_NVRTC names, or what `scripts/nvidia` fetches.
//!
//! `cargo run -p xtask -- print NAME TARGET` prints what the compiler makes of one source for one target.
//!
//! `cargo run -p xtask -- assemble` checks that the PTX is what the compiler makes, and that no kernel
//! needs more registers than there are, but for those that `spills.txt` lists. The assembler is the
//! file that the variable GRAFT_PTXAS names, or what `scripts/nvidia` fetches.
//!
//! `cargo run -p xtask -- simulation [TARGET [watched]]` builds the simulated GPU, of the kernels for compute_80 or
//! another target, and prints its path; beside it, `driver/libcuda.so` stands in for the driver as a whole. Watched, it
//! checks that accesses to memory are ordered. It needs a C++ compiler: the one that the variable CXX names, or c++.
#![forbid(unsafe_code)]

mod assemble;
mod simulation;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use graft_kernels::cuda::nvrtc::{Compiler, for_older_drivers};
use graft_kernels::cuda::{SOURCES, Target};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.split_first() {
        Some((task, names)) if task == "ptx" => ptx(names),
        Some((task, [name, target])) if task == "print" => print(name, target),
        Some((task, [])) if task == "assemble" => assemble::check(),
        Some((task, options)) if task == "simulation" => simulation(options),
        _ => {
            Err("use: cargo run -p xtask -- ptx [NAME...], print NAME TARGET, assemble, or simulation [TARGET [watched]]".into())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Builds the simulated GPU.
fn simulation(options: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let (target, watched) = match options {
        [] => ("compute_80", false),
        [target] => (target.as_str(), false),
        [target, watched] if watched == "watched" => (target.as_str(), true),
        _ => return Err("use: cargo run -p xtask -- simulation [TARGET [watched]]".into()),
    };
    let found = Target::ALL.into_iter().find(|t| t.architecture() == target);
    let Some(target) = found else {
        let known = Target::ALL.map(Target::architecture).join(", ");
        return Err(format!("there is no target {target}; the targets are {known}").into());
    };
    simulation::build(target, watched).map_err(|error| -> Box<dyn std::error::Error> { error })
}

/// Where the PTX is.
fn ptx_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/src/cuda/ptx")
}

/// The folder of the compiler's library: the one that the variable names, or what `scripts/nvidia` fetches.
fn compiler_folder() -> Result<PathBuf, Box<dyn std::error::Error>> {
    match std::env::var_os("GRAFT_NVRTC") {
        Some(folder) => Ok(folder.into()),
        None => fetched("nvrtc"),
    }
}

/// Where `scripts/nvidia` puts a tool.
fn fetched(tool: &str) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/nvidia");
    let output = Command::new(&script)
        .arg(tool)
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("{} {tool} failed: {}", script.display(), output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim_end().into())
}

/// Makes the PTX of the named sources, or of those whose PTX is out of date.
fn ptx(names: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let known = || {
        SOURCES
            .iter()
            .map(|s| s.name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    if let Some(name) = names.iter().find(|n| SOURCES.iter().all(|s| s.name != *n)) {
        return Err(format!("there is no {name}.cu; the sources are {}", known()).into());
    }
    let compiler = Compiler::load(Some(&compiler_folder()?))?;
    let (major, minor) = compiler.version();
    let to = ptx_folder();
    for source in SOURCES {
        for &(target, ptx) in source.ptx {
            let current = ptx.starts_with(&source.stamp());
            let wanted = names.iter().any(|n| n == source.name) || (names.is_empty() && !current);
            if !wanted {
                continue;
            }
            let text = for_older_drivers(&compiler.ptx(source, target)?);
            let file = to.join(format!("{}.{}.ptx", source.name, target.architecture()));
            std::fs::write(&file, &text)?;
            println!(
                "{}: {} KB by NVRTC {major}.{minor}",
                file.file_name().unwrap_or_default().display(),
                text.len() / 1000
            );
        }
    }
    Ok(())
}

/// Prints the PTX of one source for one target, as the compiler makes it now.
fn print(name: &str, target: &str) -> Result<(), Box<dyn std::error::Error>> {
    let named = SOURCES.iter().filter(|source| source.name == name);
    let mut made = named.flat_map(|source| source.ptx.iter().map(move |&(on, _)| (source, on)));
    let (source, target) = made
        .find(|(_, on)| on.architecture() == target)
        .ok_or_else(|| format!("there is no PTX of {name}.cu for {target}"))?;
    let compiler = Compiler::load(Some(&compiler_folder()?))?;
    let text = for_older_drivers(&compiler.ptx(source, target)?);
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}
