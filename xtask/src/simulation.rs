//! The CUDA sources as a shared library for the CPU; see `kernels/src/cuda/simulation/`.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use graft_kernels::cuda::{SOURCES, Source, Target};

/// Builds the library in target/simulation, of what changed, and prints its path: the kernels of `target`. Beside it, in
/// `driver/`, a libcuda.so over the same kernels.
pub fn build(target: Target) -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()?;
    let cuda = root.join("kernels/src/cuda");
    let architecture = match target {
        Target::Sm70 => "700",
        Target::Sm80 => "800",
        Target::Sm90a => return Err("instructions of sm_90a are not simulated".into()),
    };
    let to = root.join("target/simulation").join(target.architecture());
    std::fs::create_dir_all(to.join("driver"))?;
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let compile = |from: &Path, object: &Path| {
        run(Command::new(&compiler)
            .args(["-std=c++17", "-O1", "-fPIC", "-w", "-c", "-o"])
            .arg(object)
            .arg(format!("-D__CUDA_ARCH__={architecture}"))
            .arg("-include")
            .arg(cuda.join("simulation/device.hpp"))
            .arg(format!("-I{}", cuda.display()))
            .arg(from))
    };
    let header = std::fs::read_to_string(cuda.join("simulation/device.hpp"))?;
    // Compiles what is not current: `text` is all that the object is made of.
    let update = |unit: &Path, text: &str, from: &Path| -> Result<PathBuf, Box<dyn Error>> {
        let object = unit.with_extension("o");
        let current = std::fs::read_to_string(unit).is_ok_and(|old| old == text);
        if !current || !object.exists() {
            std::fs::remove_file(&object).or_else(|e| match e.kind() {
                std::io::ErrorKind::NotFound => Ok(()),
                _ => Err(e),
            })?;
            std::fs::write(unit, text)?;
            compile(from, &object)?;
        }
        Ok(object)
    };
    let mut objects: Vec<PathBuf> = Vec::new();
    for source in SOURCES {
        let Some(ptx) = source.ptx(source.best(target)) else {
            continue; // for later devices
        };
        let unit = to.join(format!("{}.cpp", source.name));
        let made_of = (source.stamp(), unit_of(source, ptx)?);
        let text = format!("{}{}\n/* {header} */\n", made_of.0, made_of.1);
        objects.push(update(&unit, &text, &unit)?);
    }
    let mut apart = Vec::new();
    for name in ["scheduler", "driver"] {
        let from = cuda.join(format!("simulation/{name}.cpp"));
        let text = format!("{}\n/* {header} */\n", std::fs::read_to_string(&from)?);
        apart.push(update(&to.join(format!("{name}.cpp")), &text, &from)?);
    }
    objects.push(apart.remove(0));
    let library = to.join("libgraft_simulation.so");
    let link = |to: &Path, objects: &[PathBuf]| {
        // Of two libraries in one process, each calls its own functions.
        run(Command::new(&compiler)
            .args(["-shared", "-Wl,-Bsymbolic", "-o"])
            .arg(to)
            .args(objects))
    };
    link(&library, &objects)?;
    objects.extend(apart);
    link(&to.join("driver/libcuda.so"), &objects)?;
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
