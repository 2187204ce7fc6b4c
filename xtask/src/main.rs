//! Chores of the workspace.
//!
//! `cargo run -p xtask -- ptx [NAME...]` makes the PTX of the CUDA sources again, of those that are
//! named or of all that changed. The compiler's library is the one in the folder that the variable
//! GRAFT_NVRTC names; `scripts/nvrtc` fetches it and prints that folder.
//!
//! `cargo run -p xtask -- simulation` builds the simulated GPU and prints its path. It needs a C++
//! compiler: the one that the variable CXX names, or c++.
#![forbid(unsafe_code)]

mod simulation;

use std::path::Path;
use std::process::ExitCode;

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
    let folder = std::env::var_os("GRAFT_NVRTC");
    let compiler = Compiler::load(folder.as_deref().map(Path::new))?;
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
