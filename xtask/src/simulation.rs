//! The CUDA sources as a shared library for the CPU; see `kernels/src/cuda/simulation/`.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use graft_kernels::cuda::{SOURCES, Source, Target};

type Failure = Box<dyn Error + Send + Sync>;

/// The simulation's own files, beside its headers: what every kernel runs on, and the driver.
const PARTS: [&str; 9] = [
    "scheduler",
    "instructions",
    "hopper",
    "races",
    "clocks",
    "shadow",
    "reports",
    "fixed",
    "driver",
];
/// Its own kernels, for tests.
const OWN: [&str; 2] = ["planted", "products"];
const HEADERS: [&str; 8] = [
    "device.hpp",
    "hopper.hpp",
    "races.hpp",
    "clocks.hpp",
    "shadow.hpp",
    "reports.hpp",
    "scheduler.hpp",
    "fixed.hpp",
];

/// One file to compile.
struct Unit {
    /// What is compiled: a file of the simulation, or one that is written for a source
    from: PathBuf,
    object: PathBuf,
    /// All that the object is made of, which is kept beside it
    text: String,
    architecture: &'static str,
    /// Whether its accesses to memory are watched
    watched: bool,
}

/// Builds the library in target/simulation, of what changed, and prints its path: the kernels of `target`, `watched` if
/// the order of their accesses to memory is to be checked. Beside it, in `driver/`, a libcuda.so over the same kernels.
pub fn build(target: Target, watched: bool) -> Result<(), Failure> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()?;
    let cuda = root.join("kernels/src/cuda");
    let folder = match watched {
        true => format!("{}-watched", target.architecture()),
        false => target.architecture().into(),
    };
    let to = root.join("target/simulation").join(folder);
    std::fs::create_dir_all(to.join("driver"))?;
    let read = |name: &str| std::fs::read_to_string(cuda.join("simulation").join(name));
    let headers = HEADERS
        .map(read)
        .into_iter()
        .collect::<Result<String, _>>()?;
    let mut units = Vec::new();
    for source in SOURCES {
        let best = source.best(target);
        let Some(ptx) = source.ptx(best) else {
            continue; // for later devices
        };
        let from = to.join(format!("{}.cpp", source.name));
        let own = unit_of(source, ptx)?;
        units.push(Unit {
            text: format!("{own}/* {}{headers} */\n", source.stamp()),
            object: from.with_extension("o"),
            architecture: architecture(best),
            watched,
            from,
        });
    }
    for name in OWN {
        let file = cuda.join(format!("simulation/{name}.cu"));
        let from = to.join(format!("{name}.cpp"));
        let own = format!("namespace {{\n#include \"{}\"\n}}\n", file.display());
        units.push(Unit {
            text: format!("{own}/* {}{headers} */\n", std::fs::read_to_string(&file)?),
            object: from.with_extension("o"),
            architecture: architecture(target),
            watched,
            from,
        });
    }
    for name in PARTS {
        units.push(Unit {
            from: cuda.join(format!("simulation/{name}.cpp")),
            object: to.join(format!("{name}.o")),
            text: format!("{}/* {headers} */\n", read(&format!("{name}.cpp"))?),
            architecture: architecture(target),
            watched: false,
        });
    }
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let compile = |unit: &Unit| -> Result<(), Failure> {
        let made_of = unit.object.with_extension("cpp");
        let current = std::fs::read_to_string(&made_of).is_ok_and(|old| old == unit.text);
        if current && unit.object.exists() {
            return Ok(());
        }
        std::fs::remove_file(&unit.object).or_else(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(e),
        })?;
        std::fs::write(&made_of, &unit.text)?;
        let mut command = Command::new(&compiler);
        command.args(["-std=c++17", "-fPIC", "-w", "-Wno-psabi", "-c", "-o"]);
        command.arg(&unit.object);
        command.arg(format!("-D__CUDA_ARCH__={}", unit.architecture));
        // Hooks on every access, which races.cpp has; lines, for its reports.
        match unit.watched {
            true => command.args(["-O1", "-fsanitize=thread", "-g1"]),
            false => command.arg(if unit.from.starts_with(&to) {
                "-O1"
            } else {
                "-O2"
            }),
        };
        if watched {
            command.arg("-DGRAFT_RACES");
        }
        command
            .arg("-include")
            .arg(cuda.join("simulation/device.hpp"));
        command.arg(format!("-I{}", cuda.display()));
        run(command.arg(&unit.from))
    };
    each(&units, compile)?;
    let (driver, objects): (Vec<&Path>, Vec<&Path>) = units
        .iter()
        .map(|unit| unit.object.as_path())
        .partition(|object| object.ends_with("driver.o"));
    let library = to.join("libgraft_simulation.so");
    let link = |to: &Path, objects: &[&Path]| {
        // Of two libraries in one process, each calls its own functions.
        run(Command::new(&compiler)
            .args(["-shared", "-Wl,-Bsymbolic", "-o"])
            .arg(to)
            .args(objects)
            .arg("-ldl"))
    };
    link(&library, &objects)?;
    link(&to.join("driver/libcuda.so"), &[objects, driver].concat())?;
    println!("{}", library.display());
    Ok(())
}

/// The compiler's number of a target.
fn architecture(target: Target) -> &'static str {
    match target {
        Target::Sm70 => "700",
        Target::Sm80 => "800",
        Target::Sm90a => "900",
    }
}

/// Compiles as many at a time as this machine has processors; the first error.
fn each(
    units: &[Unit],
    compile: impl Fn(&Unit) -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), Failure> {
        while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
            compile(unit)?;
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// The source, and the registration of each of its kernels, whose names the PTX has.
fn unit_of(source: &Source, ptx: &str) -> Result<String, Failure> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../kernels/src")
        .join(format!("{}.cu", source.name))
        .canonicalize()?;
    // Sources have functions of the same names; each has its own.
    let mut unit = format!("namespace {{\n#include \"{}\"\n}}\n", file.display());
    for line in ptx.lines() {
        if let Some(rest) = line.strip_prefix(".visible .entry ") {
            let name = rest.trim_end_matches(['(', ')']).trim();
            writeln!(unit, "REGISTER({name})")?;
        }
    }
    Ok(unit)
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command
        .status()
        .map_err(|e| format!("{}: {e}", command.get_program().display()))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{} failed: {status}", command.get_program().display()).into()),
    }
}
