//! The file that a command writes its results to.

use std::io::{self, Write};
use std::path::Path;

use graft_models::atomic;

use crate::error::{Error, Result};

/// What errors call it where no file is named.
const STANDARD_OUTPUT: &str = "standard output";

/// What errors call where the results go.
pub fn name(out: Option<&Path>) -> &Path {
    out.unwrap_or(Path::new(STANDARD_OUTPUT))
}

/// Refuses an `out` that cannot be written to, or that would replace `input`, before anything is computed.
///
/// # Errors
/// No directory that it would lie in; a directory of that name; the file that is read.
pub fn check(out: Option<&Path>, input: Option<&Path>) -> Result<()> {
    let Some(out) = out else { return Ok(()) };
    let refuse = |what: String, help: &str| Err(Error::config("--out", what, help));
    if out.is_dir() {
        let what = format!("{} is a directory", out.display());
        return refuse(what, "name a file");
    }
    if let Some(folder) = out.parent()
        && !(folder.as_os_str().is_empty() || folder.is_dir())
    {
        let what = format!("there is no directory {}", folder.display());
        return refuse(what, "make it first, or name another file");
    }
    let real = |path: &Path| path.canonicalize().ok();
    if let Some(input) = input
        && real(out).is_some_and(|out| real(input) == Some(out))
    {
        let what = format!(
            "it would replace {}, which the texts are read from",
            input.display()
        );
        return refuse(what, "name another file");
    }
    Ok(())
}

/// Writes results to `out`, or to standard output. A reader that has gone away (`| head`) is no error.
///
/// # Errors
/// The system refuses; a file of that name is then as it was.
pub fn write(out: Option<&Path>, results: &[u8]) -> Result<()> {
    match out {
        Some(path) => Ok(atomic::write_file(path, |file| file.write_all(results))?),
        None => said(io::stdout().lock().write_all(results)),
    }
}

/// What became of something written to standard output.
///
/// # Errors
/// The system refuses, and not because the reader has gone away.
pub fn said(result: io::Result<()>) -> Result<()> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::io("write", Path::new(STANDARD_OUTPUT), e))
        }
        _ => Ok(()),
    }
}
