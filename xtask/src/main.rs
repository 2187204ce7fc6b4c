//! Chores of the workspace.
//!
//! `cargo run -p xtask -- ptx [NAME...]` makes the PTX of the CUDA sources again, of those that are
//! named or of all that changed. The compiler's library is the one in the folder that the variable
//! GRAFT_NVRTC names, or what `scripts/nvrtc` fetches.
//!
//! `cargo run -p xtask -- simulation` builds the simulated GPU and prints its path. It needs a C++
//! compiler: the one that the variable CXX names, or c++.
#![forbid(unsafe_code)]

mod simulation;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use graft_kernels::cuda::SOURCES;
use graft_kernels::cuda::nvrtc::Compiler;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.split_first() {
        Some((task, names)) if task == "ptx" => ptx(names),
        Some((task, [])) if task == "simulation" => simulation::build(),
        _ => Err("use: cargo run -p xtask -- ptx [NAME...], or simulation".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The folder of the compiler's library: the one that the variable names, or what `scripts/nvrtc` fetches.
fn compiler_folder() -> Result<PathBuf, Box<dyn std::error::Error>> {
    if let Some(folder) = std::env::var_os("GRAFT_NVRTC") {
        return Ok(folder.into());
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/nvrtc");
    let output = Command::new(&script).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("{} failed: {}", script.display(), output.status).into());
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
    let to = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels/src/cuda/ptx");
    for source in SOURCES {
        for &(target, ptx) in source.ptx {
            let current = ptx.starts_with(&source.stamp());
            let wanted = names.iter().any(|n| n == source.name) || (names.is_empty() && !current);
            if !wanted {
                continue;
            }
            let text = compiler.ptx(source, target)?;
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
