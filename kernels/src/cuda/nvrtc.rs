//! CUDA C++ to PTX, by the compiler library that is found at run time.

use std::ffi::{CStr, CString};
use std::path::Path;

use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use super::environment::{self, variable};
use super::module::{HEADERS, Source, Target, hexadecimal};
use super::{Error, Result};

/// The version of PTX that is committed, which drivers know since CUDA 12.0: the first with all of Hopper's instructions.
pub const OLDEST: &str = "8.0";

/// PTX as the compiler makes it, for drivers that are older than the compiler. It says that it is of the version that came
/// with that; the assembler finds out whether it needs it. Hints that only the assembler of a later one takes are left out.
pub fn for_older_drivers(ptx: &str) -> String {
    let lines = ptx.split_inclusive('\n');
    lines
        .filter(|line| !line.trim_start().starts_with(".pragma \"used_bytes_mask"))
        .map(|line| match line.starts_with(".version ") {
            true => format!(".version {OLDEST}\n"),
            false => line.into(),
        })
        .collect()
}

/// The compiler: NVRTC, from NVIDIA's toolkit or from its Python package.
#[derive(Debug)]
pub struct Compiler {
    version: (i32, i32),
}

impl Compiler {
    /// The compiler in `folder`, or, without one, the one that the system's loader finds.
    ///
    /// # Errors
    /// No such library.
    pub fn load(folder: Option<&Path>) -> Result<Compiler> {
        let missing = |text: String| Error::Call {
            call: "loading NVRTC",
            text,
        };
        if let Some(folder) = folder {
            let entries = std::fs::read_dir(folder)
                .map_err(|error| missing(format!("{}: {error}", folder.display())))?;
            let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            // The compiler asks for its builtins by name alone, and takes them if they are loaded.
            files.sort();
            let mut found = false;
            for file in files {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                if name.starts_with("libnvrtc") && !name.contains(".alt.") {
                    found = true;
                    // SAFETY: a library of the CUDA toolkit, whose initialisers have no conditions.
                    let library = unsafe { environment::library(&file) }.map_err(missing)?;
                    // For as long as the process lives: what follows finds it by its name.
                    std::mem::forget(library);
                }
            }
            if !found {
                return Err(missing(format!("no libnvrtc in {}", folder.display())));
            }
        }
        // SAFETY: it only tries to load libraries of that name.
        if !unsafe { sys::is_culib_present() } {
            return Err(missing(
                "libnvrtc was not found; name its folder in GRAFT_NVRTC".into(),
            ));
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two valid pointers.
        check("nvrtcVersion", unsafe {
            sys::nvrtcVersion(&mut major, &mut minor)
        })?;
        Ok(Compiler {
            version: (major, minor),
        })
    }

    /// The compiler's version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The PTX of a source for a target, with its stamp as first line.
    ///
    /// # Errors
    /// What the compiler objects to.
    pub fn ptx(&self, source: &Source, target: Target) -> Result<String> {
        let text = CString::new(source.text).expect("sources hold no NUL");
        let name = CString::new(format!("{}.cu", source.name)).expect("nor do their names");
        let headers: Vec<(CString, CString)> = HEADERS
            .iter()
            .map(|(name, text)| {
                let c = |text: &str| CString::new(text).expect("headers hold no NUL");
                (c(text), c(name))
            })
            .collect();
        let texts: Vec<_> = headers.iter().map(|h| h.0.as_ptr()).collect();
        let names: Vec<_> = headers.iter().map(|h| h.1.as_ptr()).collect();
        let options: Vec<CString> = [
            format!("--gpu-architecture={}", target.architecture()),
            "--std=c++17".into(),
            // For generic lambdas, which can say nothing of where they run.
            "--device-as-default-execution-space".into(),
        ]
        .into_iter()
        .map(|option| CString::new(option).expect("options hold no NUL"))
        .collect();
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        // SAFETY: strings that end with NUL, and arrays of the lengths that are given.
        check("nvrtcCreateProgram", unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as i32,
                texts.as_ptr(),
                names.as_ptr(),
            )
        })?;
        // SAFETY: the program above, and as many options as are said.
        let compiled =
            unsafe { sys::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr()) };
        let result = if compiled == sys::nvrtcResult::NVRTC_SUCCESS {
            // SAFETY: the size is the one that the first function gives.
            unsafe { output(program, sys::nvrtcGetPTXSize, sys::nvrtcGetPTX) }
                .map(|ptx| source.stamp() + &ptx)
        } else {
            // SAFETY: as above.
            let log = unsafe {
                output(
                    program,
                    sys::nvrtcGetProgramLogSize,
                    sys::nvrtcGetProgramLog,
                )
            };
            Err(Error::Compile {
                file: source.name,
                log: log?,
            })
        };
        // SAFETY: made above, and not used again.
        unsafe { sys::nvrtcDestroyProgram(&mut program) };
        result
    }
}

/// The PTX of a source for a target: from the folder `cache` if it was made before, else made by the
/// compiler in the folder that the variable GRAFT_NVRTC names, and kept.
///
/// # Errors
/// No compiler, or what it objects to. A cache that cannot be written to is none, and neither is a file in it that is not
/// whole.
pub fn cached(cache: &Path, source: &Source, target: Target) -> Result<String> {
    let name = format!(
        "{}.{}.{}.ptx",
        source.name,
        target.architecture(),
        source.hash()
    );
    let file = cache.join(name);
    if let Ok(text) = std::fs::read_to_string(&file)
        && let Some(ptx) = opened(&text, &source.stamp())
    {
        return Ok(ptx.into());
    }
    let folder = variable("GRAFT_NVRTC");
    let text = Compiler::load(folder.as_deref().map(Path::new))?.ptx(source, target)?;
    let part = file.with_extension(format!("{}.part", std::process::id()));
    let kept = std::fs::create_dir_all(cache)
        .and_then(|()| std::fs::write(&part, sealed(&text)))
        .and_then(|()| std::fs::rename(&part, &file));
    if kept.is_err() {
        // A failure leaves nothing to be done: it may not be there.
        let _ = std::fs::remove_file(&part);
    }
    Ok(text)
}

/// What the last line of a kept file begins with.
const SEAL: &str = "// SHA-256 of what stands before: ";

/// PTX as it is kept: a file that lost its end, or that somebody changed, is found out.
fn sealed(ptx: &str) -> String {
    let sum = hexadecimal(Sha256::new_with_prefix(ptx));
    format!("{ptx}{SEAL}{sum}\n")
}

/// The PTX of a kept file, if it begins with `stamp` and is whole.
fn opened<'a>(text: &'a str, stamp: &str) -> Option<&'a str> {
    let (ptx, sum) = text.rsplit_once(SEAL)?;
    let whole = sum.trim_end() == hexadecimal(Sha256::new_with_prefix(ptx));
    (whole && ptx.starts_with(stamp)).then_some(ptx)
}

/// A text that the compiler gives in two steps: its size, and then the bytes.
///
/// # Safety
/// `program` is alive, and `get` writes as many bytes as `size` says.
unsafe fn output(
    program: sys::nvrtcProgram,
    size: unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
    get: unsafe fn(sys::nvrtcProgram, *mut std::ffi::c_char) -> sys::nvrtcResult,
) -> Result<String> {
    let mut bytes = 0;
    // SAFETY: a live program and a valid pointer.
    check("nvrtc output size", unsafe { size(program, &mut bytes) })?;
    let mut text = vec![0u8; bytes.max(1)];
    // SAFETY: room for as many bytes as were announced.
    check("nvrtc output", unsafe {
        get(program, text.as_mut_ptr().cast())
    })?;
    let end = text.iter().position(|&byte| byte == 0);
    text.truncate(end.unwrap_or(text.len()));
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn check(call: &'static str, result: sys::nvrtcResult) -> Result<()> {
    if result == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: the library's own static string.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) };
    Err(Error::Call {
        call,
        text: text.to_string_lossy().into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::SOURCES;
    use super::*;

    #[test]
    fn what_is_committed_is_for_older_drivers() {
        let version = format!("\n.version {OLDEST}\n");
        for source in SOURCES {
            for (target, ptx) in source.ptx {
                let what = (source.name, target);
                assert_eq!(for_older_drivers(ptx), *ptx, "{what:?}");
                assert_eq!(ptx.matches("\n.version ").count(), 1, "{what:?}");
                assert!(ptx.contains(&version), "{what:?}");
            }
        }
    }

    #[test]
    fn what_was_kept_is_taken_if_it_is_whole_and_of_this_source() {
        let source = Source::find("copy").expect("copy.cu");
        let (ptx, stamp) = (source.ptx(Target::Sm80).expect("its PTX"), source.stamp());
        let kept = sealed(ptx);
        assert_eq!(opened(&kept, &stamp), Some(ptx));
        assert_eq!(opened(&kept, "// made of other sources"), None);
        let changed = kept.replacen("add", "sub", 1);
        assert_ne!(changed, kept);
        for damaged in [
            ptx,
            &kept[..kept.len() / 2],
            &kept[..kept.len() - 9],
            "",
            &changed,
        ] {
            assert_eq!(opened(damaged, &stamp), None);
        }
    }
}
