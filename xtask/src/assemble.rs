//! Checks of the kernels that need no GPU: their PTX is what the compiler makes of the sources, and the assembler finds
//! room for every kernel in the registers of each device.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use graft_kernels::cuda::nvrtc::{Compiler, for_older_drivers};
use graft_kernels::cuda::{SOURCES, Source, Target};

use crate::{compiler_folder, fetched, ptx_folder};

/// Kernels that keep some values in memory for want of registers, one a line; all others must not.
const LIST: &str = "spills.txt";

/// How many other processes must fail to make the PTX that is committed before it counts as out of date: where a library
/// and its memory lie differs between processes, and on that it depends now and then in which order NVRTC numbers
/// registers (one process of five for one source).
const OTHER_PROCESSES: usize = 24;

/// What the assembler says of a function: a kernel, or what one calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cost {
    registers: usize,
    stored: usize,
    loaded: usize,
}

impl Cost {
    fn spills(&self) -> bool {
        self.stored + self.loaded > 0
    }
}

/// By function and device.
type Costs = BTreeMap<(String, String), Cost>;
/// Bytes stored and loaded, by kernel and device.
type Spills = BTreeMap<(String, String), (usize, usize)>;

/// Compiles every source for each of its targets and compares with the PTX that is committed; assembles for each device
/// what that device would run and compares the spills with the list.
pub fn check() -> Result<(), Box<dyn Error>> {
    let compiler = Compiler::load(Some(&compiler_folder()?))?;
    let mut wrong = String::new();
    let mut compiled = 0;
    for source in SOURCES {
        for &(target, ptx) in source.ptx {
            compiled += 1;
            let same = for_older_drivers(&compiler.ptx(source, target)?) == ptx
                || (0..OTHER_PROCESSES).any(|_| made_by_another_process(source, target) == ptx);
            if !same {
                let name = format!("{}.{}.ptx", source.name, target.architecture());
                writeln!(
                    wrong,
                    "{name} is not what NVRTC makes of {}.cu; run `cargo run -p xtask -- ptx {}`",
                    source.name, source.name
                )?;
            }
        }
    }
    let (major, minor) = compiler.version();
    println!(
        "{compiled} PTX files compared with what NVRTC {major}.{minor} makes of their sources"
    );

    let costs = assemble_all()?;
    let found: BTreeMap<_, _> = costs.iter().filter(|(_, cost)| cost.spills()).collect();
    let text = std::fs::read_to_string(ptx_folder().join(LIST))?;
    let listed = read_list(&text)?;
    for (at @ (kernel, device), cost) in &found {
        if listed.get(*at) != Some(&(cost.stored, cost.loaded)) {
            let Cost { stored, loaded, .. } = cost;
            let expected = match listed.get(*at) {
                Some((stored, loaded)) => format!("{stored} and {loaded} are listed"),
                None => "no spills are listed".into(),
            };
            writeln!(
                wrong,
                "{kernel} on {device}: {stored} bytes of spills stored and {loaded} loaded, {expected}; make it need \
                 fewer registers, or list it in {LIST} as `{kernel} {device} {stored} {loaded}`"
            )?;
        }
    }
    for (kernel, device) in listed.keys() {
        if !found.contains_key(&(kernel.clone(), device.clone())) {
            writeln!(
                wrong,
                "{kernel} on {device} spills nothing; take it out of {LIST}"
            )?;
        }
    }
    let most = costs.values().map(|cost| cost.registers).max();
    println!(
        "{} functions assembled for {} devices: at most {} registers, {} with spills",
        costs.len(),
        Target::ALL.len(),
        most.unwrap_or(0),
        found.len()
    );
    if wrong.is_empty() {
        return Ok(());
    }
    Err(wrong.trim_end().to_owned().into())
}

/// What this program makes of a source when it is run once more; nothing if that fails.
fn made_by_another_process(source: &Source, target: Target) -> String {
    let output = std::env::current_exe().and_then(|program| {
        Command::new(program)
            .args(["print", source.name, target.architecture()])
            .output()
    });
    output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

/// The device that has what a target asks for and no more.
fn device(target: Target) -> String {
    target.architecture().replace("compute", "sm")
}

/// What each device would run, assembled for it, on as many threads as there are.
fn assemble_all() -> Result<Costs, Box<dyn Error>> {
    let ptxas = match std::env::var_os("GRAFT_PTXAS") {
        Some(file) => PathBuf::from(file),
        None => fetched("ptxas")?,
    };
    let aside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/assembled");
    std::fs::create_dir_all(&aside)?;
    let all = Target::ALL.into_iter().flat_map(|device| {
        let runs = move |source: &&Source| source.ptx(source.best(device)).is_some();
        let sources = SOURCES.iter().filter(runs);
        sources.map(move |source| (source, source.best(device), device))
    });
    let (queue, costs) = (Mutex::new(all), Mutex::new(Ok(Costs::new())));
    let next = || queue.lock().expect("no thread panics").next();
    let work = || {
        while let Some((source, target, on)) = next() {
            let done = assemble(&ptxas, &aside, source, target, &device(on));
            let mut costs = costs.lock().expect("no thread panics");
            match (&mut *costs, done) {
                (Ok(costs), Ok(more)) => {
                    for (function, cost) in more {
                        // What several sources call is assembled in each.
                        let known = costs.entry(function).or_default();
                        if cost.stored >= known.stored {
                            *known = cost;
                        }
                    }
                }
                (Ok(_), Err(error)) => *costs = Err(error),
                (Err(_), _) => {}
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let costs = costs.into_inner().expect("no thread panics");
    Ok(costs?)
}

fn assemble(
    ptxas: &Path,
    aside: &Path,
    source: &Source,
    target: Target,
    device: &str,
) -> Result<Costs, String> {
    let ptx = ptx_folder().join(format!("{}.{}.ptx", source.name, target.architecture()));
    let output = Command::new(ptxas)
        .args(["-v", &format!("-arch={device}"), "-o"])
        .arg(aside.join(format!("{}.{device}.cubin", source.name)))
        .arg(&ptx)
        .output()
        .map_err(|e| {
            format!(
                "{}: {e}; name the assembler in GRAFT_PTXAS",
                ptxas.display()
            )
        })?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{} for {device}: {text}", ptx.display()));
    }
    let costs = read_costs(&text, device);
    let expected = source.ptx(target).unwrap_or_default();
    let expected = expected.matches(".visible .entry").count();
    // Beside them there are functions that they call.
    if costs.len() < expected {
        let found = costs.len();
        return Err(format!(
            "{} for {device}: {found} of {expected} kernels are in what the assembler prints:\n{text}",
            ptx.display()
        ));
    }
    Ok(costs)
}

/// What `ptxas -v` prints of each function: its name, then its stack and spills, then, of kernels, registers.
fn read_costs(text: &str, device: &str) -> Costs {
    let mut costs = Costs::new();
    let mut function = None;
    // The number that stands before some words.
    let before = |line: &str, words: &str| -> Option<usize> {
        let (start, _) = line.split_once(words)?;
        start.split_whitespace().last()?.parse().ok()
    };
    for line in text.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            function = Some((name.trim().to_owned(), device.to_owned()));
        }
        let Some(function) = &function else { continue };
        if let Some(stored) = before(line, "bytes spill stores") {
            let cost = costs.entry(function.clone()).or_default();
            cost.stored = stored;
            cost.loaded = before(line, "bytes spill loads").unwrap_or(0);
        }
        if let (Some(registers), Some(cost)) = (before(line, "registers"), costs.get_mut(function))
        {
            cost.registers = registers;
        }
    }
    costs
}

/// The list: kernel, device and bytes on a line, after `#` a remark.
fn read_list(text: &str) -> Result<Spills, String> {
    let mut list = Spills::new();
    for (number, line) in text.lines().enumerate() {
        let words: Vec<&str> = line
            .split('#')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let entry = match words[..] {
            [] => continue,
            [kernel, device, stored, loaded] => stored
                .parse()
                .ok()
                .zip(loaded.parse().ok())
                .map(|bytes: (usize, usize)| ((kernel.to_owned(), device.to_owned()), bytes)),
            _ => None,
        };
        let Some((at, bytes)) = entry else {
            return Err(format!(
                "{LIST}, line {}: `{line}` is not `KERNEL DEVICE BYTES BYTES`",
                number + 1
            ));
        };
        list.insert(at, bytes);
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_assembler_prints_is_read() {
        let text = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'first' for 'sm_80'\n\
            ptxas info    : Function properties for first\n    \
            8 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads\n\
            ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size\n\
            ptxas info    : Function properties for _Z5calledf\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Compiling entry function 'second' for 'sm_80'\n\
            ptxas info    : Function properties for second\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 16 registers, used 0 barriers\n";
        let costs = read_costs(text, "sm_80");
        let of = |name: &str| costs[&(name.to_owned(), "sm_80".to_owned())];
        let first = Cost {
            registers: 255,
            stored: 24,
            loaded: 28,
        };
        assert_eq!(of("first"), first);
        assert!(first.spills());
        assert_eq!((of("second").registers, of("second").spills()), (16, false));
        assert!(!of("_Z5calledf").spills());
    }

    #[test]
    fn the_list_is_read_and_its_mistakes_are_named() {
        let list = read_list("# remark\nfirst sm_80 24 28 # why\n\n").unwrap();
        assert_eq!(list[&("first".into(), "sm_80".into())], (24, 28));
        let error = read_list("# remark\nfirst sm_80 24\n").unwrap_err();
        assert!(error.contains("line 2"), "{error}");
        assert!(read_list("first sm_80 many 28").is_err());
    }
}
