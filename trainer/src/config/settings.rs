//! Where settings come from: a TOML file, `--set key=value`, flags. Each value keeps its origin, so that an error
//! found much later still names the line or the flag it came from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::Value;
use toml::de::{DeTable, DeValue};

use super::keys::{KEYS, describe, unknown_key};
use super::{Base, TaskKind};
use crate::error::{Error, Result};

/// Where one setting was given. Later variants override earlier ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of the configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// `--set key=value`, kept as written.
    Set(String),
    /// A flag, with its dashes.
    Flag(&'static str),
}

impl Origin {
    /// 0 for the file, 1 for `--set`, 2 for a flag: the higher one wins.
    pub(super) fn level(&self) -> u8 {
        match self {
            Origin::File { .. } => 0,
            Origin::Set(_) => 1,
            Origin::Flag(_) => 2,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Set(text) => write!(f, "--set {text}"),
            Origin::Flag(name) => f.write_str(name),
        }
    }
}

/// Settings by their dotted key (`optimizer.lr`), each with its origin. Every key is known; values are not
/// checked yet, that is [`super::RunConfig::resolve`]'s part.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    entries: BTreeMap<&'static str, (Value, Origin)>,
}

impl Settings {
    /// No settings: everything is left to flags and defaults.
    pub fn new() -> Settings {
        Settings::default()
    }

    /// The settings of a TOML file.
    ///
    /// # Errors
    /// A file that cannot be read, is no TOML, or has an unknown section or key (the nearest name is suggested).
    pub fn from_file(path: &Path) -> Result<Settings> {
        let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            let lines_before =
                |at: usize| e.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
            let place = Origin::File {
                path: path.to_path_buf(),
                line: 1 + lines_before(e.utf8_error().valid_up_to()),
            };
            Error::config(place, "the file is not UTF-8", "convert it to UTF-8")
        })?;
        Settings::parse(&text, path)
    }

    /// The settings of TOML text that came from `path`.
    ///
    /// # Errors
    /// As [`Settings::from_file`]; of several unknown keys, the first in the file is reported.
    pub fn parse(text: &str, path: &Path) -> Result<Settings> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let line_of = |offset: usize| 1 + text[..offset].matches('\n').count();
        let at = |offset: usize| Origin::File {
            path: path.to_path_buf(),
            line: line_of(offset),
        };
        let invalid = |e: toml::de::Error| {
            Error::config(
                at(e.span().map_or(0, |span| span.start)),
                format!("invalid TOML: {}", e.message()),
                "correct the line; strings need quotes, sections look like [optimizer]",
            )
        };
        // Parsed twice: once for the places, once for plain values. Configurations are small.
        let places = DeTable::parse(text).map_err(invalid)?.into_inner();
        let values: toml::Table = text.parse().map_err(invalid)?;

        let mut settings = Settings::new();
        let mut unknown: Option<(usize, String)> = None;
        let mut note_unknown = |offset: usize, key: String| {
            if unknown.as_ref().is_none_or(|(first, _)| offset < *first) {
                unknown = Some((offset, key));
            }
        };
        for (section, content) in &places {
            let name: &str = section.get_ref();
            let DeValue::Table(keys) = content.get_ref() else {
                note_unknown(section.span().start, name.to_owned());
                continue;
            };
            if keys.is_empty() && !KEYS.iter().any(|k| k.section() == name) {
                note_unknown(section.span().start, name.to_owned());
            }
            for key in keys.keys() {
                let dotted = format!("{name}.{}", key.get_ref());
                match describe(&dotted) {
                    Some(known) => {
                        let value = values[name][key.get_ref().as_ref()].clone();
                        settings
                            .entries
                            .insert(known.name, (value, at(key.span().start)));
                    }
                    None => note_unknown(key.span().start, dotted),
                }
            }
        }
        match unknown {
            Some((offset, key)) => Err(unknown_key(at(offset), &key)),
            None => Ok(settings),
        }
    }

    /// Applies `--set key=value`. The value is read as TOML (`3`, `1e-4`, `[0.9, 0.99]`, `"text"`); what is no TOML
    /// is taken as a bare string (`last:2`).
    ///
    /// # Errors
    /// No `=`, or an unknown key.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let origin = Origin::Set(assignment.to_owned());
        let Some((key, text)) = assignment.split_once('=') else {
            return Err(Error::config(
                origin,
                "there is no `=`",
                "write --set key=value, for example --set optimizer.lr=1e-4",
            ));
        };
        let Some(known) = describe(key.trim()) else {
            return Err(unknown_key(origin, key.trim()));
        };
        let value = toml::from_str::<toml::Table>(&format!("value = {}", text.trim()))
            .ok()
            // A line break in the text could smuggle in more keys: then it is no value.
            .filter(|table| table.len() == 1)
            .and_then(|mut table| table.remove("value"))
            .unwrap_or_else(|| Value::String(text.to_owned()));
        self.insert(known.name, value, origin);
        Ok(())
    }

    /// Applies a flag, named with its dashes, to a known key.
    ///
    /// # Panics
    /// When `key` is no known key: the names come from the program, not from the user.
    pub fn flag(&mut self, key: &str, flag: &'static str, value: impl Into<Value>) {
        let known = describe(key).unwrap_or_else(|| panic!("{flag} sets the unknown key {key}"));
        self.insert(known.name, value.into(), Origin::Flag(flag));
    }

    /// Inserts unless something of higher precedence is there already.
    fn insert(&mut self, key: &'static str, value: Value, origin: Origin) {
        let overridden = self
            .entries
            .get(key)
            .is_some_and(|(_, existing)| existing.level() > origin.level());
        if !overridden {
            self.entries.insert(key, (value, origin));
        }
    }

    /// Where a key was given, if it was.
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.entries.get(key).map(|(_, origin)| origin)
    }

    /// The kind of task, if one is given that there is.
    pub fn task(&self) -> Option<TaskKind> {
        let (value, _) = self.entries.get("task.kind")?;
        value.clone().try_into().ok()
    }

    /// Most tokens of one example, if that is said.
    pub fn max_length(&self) -> Option<usize> {
        let (value, _) = self.entries.get("data.max_length")?;
        value.clone().try_into().ok()
    }

    /// What the base is held in, if that is said.
    pub fn base(&self) -> Option<Base> {
        let (value, _) = self.entries.get("model.base")?;
        value.clone().try_into().ok()
    }

    /// Forgets a key.
    pub(super) fn remove(&mut self, key: &str) {
        self.entries.remove(key);
    }

    /// The value of `key` as a `T` for which `ok` holds, with its origin.
    ///
    /// # Errors
    /// Another type or value: the message says what was found and that `expected` was expected.
    pub(super) fn get<T: DeserializeOwned>(
        &self,
        key: &str,
        expected: &str,
        ok: impl Fn(&T) -> bool,
    ) -> Result<Option<(T, Origin)>> {
        let Some((value, origin)) = self.entries.get(key) else {
            return Ok(None);
        };
        let mut typed = value.clone().try_into::<T>().ok();
        if let (None, Origin::Set(text)) = (&typed, origin) {
            // `--set data.label=1` names a column: the text itself, where its TOML reading does not fit.
            let raw = text.split_once('=').map_or("", |(_, raw)| raw);
            typed = Value::String(raw.to_owned()).try_into::<T>().ok();
        }
        match typed.filter(|typed| ok(typed)) {
            Some(typed) => Ok(Some((typed, origin.clone()))),
            None => Err(Error::config(
                origin,
                format!("`{key}` is {value}, expected {expected}"),
                describe(key).map_or(String::new(), |known| format!("{key}: {}", known.meaning)),
            )),
        }
    }
}
