//! A safetensors file as bytes: a header, and tensors without a gap.

use std::io::{self, Cursor, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::refuse;
use crate::adapter::ADAPTER_CONFIG_FILE;
use crate::error::{Error, Result};
use crate::safetensors::header::PREFIX;
use crate::safetensors::reader::{Seekable, plain_file};
use crate::safetensors::{ByteSource, Header, INDEX_FILE, SINGLE_FILE, TensorInfo};
use crate::source::ModelSource;

/// A weight file, open.
pub(super) struct Weights {
    pub name: String,
    source: Box<dyn ByteSource>,
    /// Length, header and padding
    pub header: Vec<u8>,
    /// In the order of their bytes
    pub tensors: Vec<TensorInfo>,
}

/// The hashes of a file and its tensors.
pub(super) struct Hashes {
    pub file: String,
    pub tensors: Vec<String>,
}

impl Weights {
    /// Opens what a user names: a safetensors file, a directory, an archive or the id of a model in the cache with a
    /// `model.safetensors` in it.
    pub fn open(spec: &str) -> Result<Weights> {
        let path = Path::new(spec);
        let is_file = path.is_file() && path.extension().is_some_and(|e| e == "safetensors");
        if is_file {
            return Weights::new(spec.to_owned(), plain_file(path)?);
        }
        // What has no config.json may hold weights all the same.
        let source = match path.is_dir() {
            true => ModelSource::directory(path)?,
            false => ModelSource::resolve(spec)?,
        };
        match source.bytes(SINGLE_FILE)? {
            Some((name, bytes)) if source.path().is_some() => Weights::new(name, bytes),
            // An archive is decompressed from its start each time: once is enough.
            Some((name, mut bytes)) => {
                let mut all = Vec::new();
                let read = bytes.read_from(0, &mut |r| r.read_to_end(&mut all).map(|_| ()));
                read.map_err(|e| Error::io("read", &name, e))?;
                let seekable = Seekable::new(Cursor::new(all));
                let seekable = seekable.map_err(|e| Error::io("read", &name, e))?;
                Weights::new(name, Box::new(seekable))
            }
            None if source.has_file(INDEX_FILE) => Err(refuse(
                spec,
                "its weights are in several files",
                "name the safetensors files one by one: each has a delta of its own",
            )),
            None if source.has_file(ADAPTER_CONFIG_FILE) => Err(refuse(
                spec,
                "it is an adapter, which is apart from its base already",
                "keep it as it is, or name what `trainer merge` makes of it",
            )),
            None => Err(Error::MissingFile {
                place: source.to_string(),
                name: SINGLE_FILE.to_owned(),
                help: "name a safetensors file, or a directory with one".to_owned(),
            }),
        }
    }

    fn new(name: String, mut source: Box<dyn ByteSource>) -> Result<Weights> {
        let len = source.byte_len();
        let mut header = Vec::new();
        let mut parsed = None;
        source
            .read_from(0, &mut |reader| {
                reader.take(PREFIX).read_to_end(&mut header)?;
                let length = match Header::check_length(&header, len) {
                    Ok(length) => length,
                    Err(problem) => {
                        parsed = Some(Err(problem));
                        return Ok(());
                    }
                };
                reader.take(length).read_to_end(&mut header)?;
                parsed = Some(Header::parse(&header[PREFIX as usize..], len));
                Ok(())
            })
            .map_err(|e| Error::io("read the header of", &name, e))?;
        match parsed {
            Some(Ok(parsed)) => Ok(Weights {
                tensors: parsed.tensors().to_vec(),
                name,
                source,
                header,
            }),
            Some(Err(problem)) => Err(Error::Safetensors {
                file: name,
                problem: Box::new(problem),
            }),
            None => Err(refuse(&name, "it has no header", "name a safetensors file")),
        }
    }

    /// Number of bytes of the whole file.
    pub fn len(&self) -> u64 {
        self.source.byte_len()
    }

    /// The bytes of one tensor.
    pub fn read(&mut self, tensor: usize) -> Result<Vec<u8>> {
        let range = self.tensors[tensor].range.clone();
        let length = range.end - range.start;
        let mut bytes = Vec::new();
        let read = self.source.read_from(range.start, &mut |reader| {
            // Grows with what is there.
            match reader.take(length).read_to_end(&mut bytes)? as u64 == length {
                true => Ok(()),
                false => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        });
        read.map_err(|e| Error::io("read", &self.name, e))?;
        Ok(bytes)
    }

    /// Reads everything once.
    pub fn hash(&mut self) -> Result<Hashes> {
        let mut file = Sha256::new();
        file.update(&self.header);
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for i in 0..self.tensors.len() {
            let bytes = self.read(i)?;
            file.update(&bytes);
            tensors.push(hex(Sha256::digest(&bytes).as_slice()));
        }
        Ok(Hashes {
            file: hex(file.finalize().as_slice()),
            tensors,
        })
    }
}

/// The tensors that a header lists, in the order of their bytes, for a file of `len` bytes.
pub(super) fn parse_header(file: &Path, header: &[u8], len: u64) -> Result<Vec<TensorInfo>> {
    let problem = |problem| Error::Safetensors {
        file: file.display().to_string(),
        problem: Box::new(problem),
    };
    let length = Header::check_length(header, len).map_err(problem)?;
    if header.len() as u64 != PREFIX + length {
        let reason = format!(
            "a header of {} bytes says that it has {length}",
            header.len()
        );
        return Err(refuse(file, reason, "make the delta again"));
    }
    let parsed = Header::parse(&header[PREFIX as usize..], len).map_err(problem)?;
    Ok(parsed.tensors().to_vec())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
