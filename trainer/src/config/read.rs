//! Single settings, read as the types that they have.

use std::path::{Path, PathBuf};

use super::{Origin, Settings};
use crate::error::{Error, Result};

/// A setting that has no default.
pub(super) fn required<T>(value: Option<T>, key: &str, flag: &str) -> Result<T> {
    value.ok_or_else(|| {
        Error::config(
            "configuration",
            format!("`{key}` is missing"),
            format!("give {flag}, or set {key} in the configuration file"),
        )
    })
}

/// A whole number, 1 or more.
pub(super) fn count(s: &Settings, key: &str) -> Result<Option<usize>> {
    Ok(
        s.get(key, "a whole number, 1 or more", |n: &usize| *n >= 1)?
            .map(|(n, _)| n),
    )
}

/// A number that is `ok`, which `expected` says in words.
pub(super) fn number(
    s: &Settings,
    key: &str,
    expected: &str,
    ok: impl Fn(f64) -> bool,
) -> Result<Option<f64>> {
    Ok(s.get(key, expected, |x: &f64| ok(*x))?.map(|(x, _)| x))
}

/// A value whose type says all about what is allowed.
pub(super) fn choice<T: serde::de::DeserializeOwned>(
    s: &Settings,
    key: &str,
    expected: &str,
) -> Result<Option<T>> {
    Ok(s.get(key, expected, |_| true)?.map(|(value, _)| value))
}

/// A value that is read from words, whose mistakes have messages of their own.
pub(super) fn worded<T>(s: &Settings, key: &str, expected: &str) -> Result<Option<T>>
where
    T: std::str::FromStr<Err = String>,
{
    let Some((text, origin)) = s.get(key, expected, |_: &String| true)? else {
        return Ok(None);
    };
    text.parse().map(Some).map_err(|what| {
        let shown = text.escape_debug();
        Error::config(
            origin,
            format!("`{key}` is \"{shown}\", expected {expected}"),
            what,
        )
    })
}

/// An absolute path: one from a file is relative to the file's directory, others to the working directory.
pub(super) fn path(s: &Settings, key: &str) -> Result<Option<PathBuf>> {
    let given = s.get(key, "a path", |p: &PathBuf| !p.as_os_str().is_empty())?;
    given
        .map(|(given, origin)| absolute(given, &origin))
        .transpose()
}

fn absolute(given: PathBuf, origin: &Origin) -> Result<PathBuf> {
    let relative = match origin {
        Origin::File { path, .. } => path.parent().unwrap_or(Path::new("")).join(given),
        Origin::Set(_) | Origin::Flag(_) => given,
    };
    std::path::absolute(&relative).map_err(|e| Error::io("find", &relative, e))
}

/// The model: what exists on disk is made absolute, and so is all that cannot be a hub id.
pub(super) fn model_path(s: &Settings) -> Result<Option<String>> {
    let key = "model.path";
    let Some((given, origin)) = s.get(key, "a path or a hub id", |p: &String| !p.is_empty())?
    else {
        return Ok(None);
    };
    let path = absolute(PathBuf::from(&given), &origin)?;
    if !path.exists() && is_hub_id(&given) {
        return Ok(Some(given));
    }
    match path.to_str() {
        Some(text) => Ok(Some(text.to_owned())),
        None => Err(Error::config(
            origin,
            format!("`{key}` is {}, which is not valid UTF-8", path.display()),
            "use a path that is valid UTF-8; the configuration is kept as TOML",
        )),
    }
}

/// Whether a text has the form `org/name` or `org/name@revision`.
fn is_hub_id(text: &str) -> bool {
    let word = |part: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(inner)
    };
    let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
    let words = id
        .split_once('/')
        .is_some_and(|(org, name)| word(org) && word(name));
    words && revision.split('/').all(word)
}
