//! What a process finds around it: variables, libraries.

use std::error::Error as _;
use std::ffi::OsString;
use std::path::Path;

use libloading::Library;

use super::{Error, Result};

/// What a variable says; nothing if it is empty, as if it were not there.
pub(super) fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// What a variable names, as `read` has it.
///
/// # Errors
/// A value that `read` knows nothing of; `expected` says what there is.
pub(super) fn named<T>(
    name: &'static str,
    expected: &str,
    read: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>> {
    let Some(value) = variable(name) else {
        return Ok(None);
    };
    match value.to_str().and_then(read) {
        Some(read) => Ok(Some(read)),
        None => Err(Error::Variable {
            name,
            found: value.to_string_lossy().into_owned(),
            expected: expected.into(),
        }),
    }
}

/// Loads a library, by its file or by a name that the system's loader looks for.
///
/// # Errors
/// Why it cannot be loaded, in the loader's words.
///
/// # Safety
/// The library's initialisers have no conditions.
pub(super) unsafe fn library(file: &Path) -> std::result::Result<Library, String> {
    // SAFETY: as above.
    unsafe { Library::new(file) }.map_err(|error| reason(&error))
}

/// What the loader says; by itself, an error names its call alone.
pub(super) fn reason(error: &libloading::Error) -> String {
    error
        .source()
        .map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_cannot_be_loaded_has_a_reason() {
        let text = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        for file in [text, "/no/such/library.so"] {
            // SAFETY: the loader refuses what is no library.
            let why = unsafe { library(Path::new(file)) }.unwrap_err();
            assert!(why.contains(file) && why.len() > file.len() + 5, "{why}");
        }
    }
}
