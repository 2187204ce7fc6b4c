//! The CUDA sources as a shared library for the CPU; see `kernels/src/cuda/simulation/`.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use graft_kernels::cuda::{SOURCES, Source, Target};

/// Builds the library in target/simulation, of what changed, and prints its path.
pub fn build() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()?;
    let cuda = root.join("kernels/src/cuda");
    let to = root.join("target/simulation");
    std::fs::create_dir_all(&to)?;
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let compile = |from: &Path, object: &Path| {
        run(Command::new(&compiler)
            .args(["-std=c++17", "-O1", "-fPIC", "-w", "-c", "-o"])
            .arg(object)
            .arg("-include")
            .arg(cuda.join("simulation/device.hpp"))
            .arg(format!("-I{}", cuda.display()))
            .arg(from))
    };
    let header = std::fs::read_to_string(cuda.join("simulation/device.hpp"))?;
    let mut objects: Vec<PathBuf> = Vec::new();
    for source in SOURCES {
        let of = |target| source.ptx(target);
        let Some(ptx) = of(Target::Sm80).or_else(|| of(Target::Sm70)) else {
            continue; // for devices that it does not simulate
        };
        let (unit, object) = (
            to.join(format!("{}.cpp", source.name)),
            to.join(format!("{}.o", source.name)),
        );
        // What it is made of stands in it: sources, headers, and what takes the compiler's place.
        let text = format!(
            "{}{}\n/* {header} */\n",
            source.stamp(),
            unit_of(source, ptx)?
        );
        let current = std::fs::read_to_string(&unit).is_ok_and(|old| old == text);
        if !current || !object.exists() {
            std::fs::remove_file(&object).or_else(|e| match e.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(e),
            })?;
            std::fs::write(&unit, text)?;
            compile(&unit, &object)?;
        }
        objects.push(object);
    }
    let scheduler = to.join("scheduler.o");
    compile(&cuda.join("simulation/scheduler.cpp"), &scheduler)?;
    objects.push(scheduler);
    let library = to.join("libgraft_simulation.so");
    run(Command::new(&compiler)
        .args(["-shared", "-o"])
        .arg(&library)
        .args(&objects))?;
    println!("{}", library.display());
    Ok(())
}

/// The source, and the registration of each of its kernels, whose names the PTX has.
fn unit_of(source: &Source, ptx: &str) -> Result<String, Box<dyn Error>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../kernels/src")
        .join(format!("{}.cu", source.name))
        .canonicalize()?;
    let mut unit = format!("#include \"{}\"\n", file.display());
    for line in ptx.lines() {
        if let Some(rest) = line.strip_prefix(".visible .entry ") {
            let name = rest.trim_end_matches(['(', ')']).trim();
            writeln!(unit, "REGISTER({name})")?;
        }
    }
    Ok(unit)
}

fn run(command: &mut Command) -> Result<(), Box<dyn Error>> {
    let status = command
        .status()
        .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{} failed: {status}", command.get_program().display()).into()),
    }
}
