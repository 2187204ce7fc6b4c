//! `pytorch_model.bin`: what `torch.save` wrote, read without running it.
//!
//! Such a file is a pickle, a program that Python runs on loading, and the bytes of storages beside it; since 2020 in
//! a zip archive (`archive.rs`), before that one after the other (`legacy.rs`). `pickle.rs` reads the program as data:
//! it knows how tensors are described and refuses everything else by name and offset. Here the descriptions are
//! checked against the storages that the file really has. Nothing is allocated for a size that only the file claims.
//!
//! What may be in it is one dictionary of tensors, as `model.state_dict()` gives it: views, transposes and parts of
//! shared storages, parameters, all element types. A checkpoint of a training run, where that dictionary lies under
//! a key beside other things, is refused with the keys it has.

use std::collections::HashMap;
use std::io::{Read, Seek};
use std::ops::Range;
use std::path::Path;

use self::pickle::Pickle;
use self::refusal::{Refusal, Refused};
use self::value::{Tensor, Value};
use crate::error::{Error, Result, Shown, some_of};
use crate::safetensors::header::other_format;
use crate::safetensors::reader::{Seekable, plain_file};
use crate::safetensors::{ByteSource, Checkpoint, FileDtype, Problem, TensorInfo};
use crate::strided::{StridedFile, StridedTensor, span};

mod archive;
mod call;
mod legacy;
mod opcode;
mod pickle;
pub(crate) mod refusal;
mod value;

/// The file of a checkpoint in one piece, as transformers named it.
pub const PYTORCH_FILE: &str = "pytorch_model.bin";

/// The index of a checkpoint in shards.
pub const PYTORCH_INDEX_FILE: &str = "pytorch_model.bin.index.json";

/// Opens a file of `torch.save` wherever it lies, as a checkpoint of its own. A model's folder is opened with
/// [`Checkpoint::open`].
///
/// # Errors
/// [`Error::Io`]; [`Error::Weights`] with the reason for refusing the file.
pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
    let path = path.as_ref();
    from_source(path.display().to_string(), plain_file(path)?).map(Checkpoint::strided)
}

/// [`open`] for any reader that can seek; `name` stands for it in messages.
///
/// # Errors
/// As there.
pub fn from_reader(
    name: impl Into<String>,
    reader: impl Read + Seek + Send + 'static,
) -> Result<Checkpoint> {
    let name = name.into();
    let source = Seekable::new(reader).map_err(|e| Error::io("read", &name, e))?;
    from_source(name, Box::new(source)).map(Checkpoint::strided)
}

/// Opens a file of `torch.save`: its description is read and checked, no tensor yet; `name` stands for it in messages.
pub(crate) fn from_source(name: String, source: Box<dyn ByteSource>) -> Result<StridedFile> {
    let mut file = Bytes { name, source };
    let start = file.read(0..file.len().min(64))?;
    let tensors = if start.starts_with(b"PK\x03\x04") {
        from_zip(&mut file)?
    } else if start.starts_with(legacy::MAGIC) {
        legacy::read(&mut file)?
    } else {
        let reason = match (start.as_slice(), other_format(&start)) {
            ([], _) => "the file is empty".to_string(),
            ([0x80, 2..=5, ..], _) => "this is a Python pickle, but not a file of torch.save".to_string(),
            (_, Some(Problem::OtherFormat { kind, help })) => {
                format!("this is {kind}, not a file of torch.save; {help}")
            }
            _ => "this is not a file of torch.save: it begins neither with a zip archive nor with PyTorch's number"
                .to_string(),
        };
        return Err(Refusal::convert(0, reason).of(&file.name));
    };
    Ok(StridedFile::new(file.name, tensors, file.source))
}

/// A source with its name, read in pieces.
struct Bytes {
    name: String,
    source: Box<dyn ByteSource>,
}

impl Bytes {
    fn len(&self) -> u64 {
        self.source.byte_len()
    }

    /// Reads a range whole. It is not allocated at once: the length of an archive's entry is only a claim.
    fn read(&mut self, range: Range<u64>) -> Result<Vec<u8>> {
        let mut pieces = self.read_all(&[range])?;
        Ok(pieces.pop().unwrap_or_default())
    }

    /// Reads ranges that rise and do not overlap.
    fn read_all(&mut self, ranges: &[Range<u64>]) -> Result<Vec<Vec<u8>>> {
        let mut pieces = Vec::new();
        self.source
            .read_ranges(ranges, &mut |i, reader| {
                let mut bytes = Vec::new();
                let len = ranges[i].end - ranges[i].start;
                if (reader.read_to_end(&mut bytes)? as u64) < len {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                pieces.push(bytes);
                Ok(())
            })
            .map_err(|e| Error::io("read", &self.name, e))?;
        Ok(pieces)
    }

    fn refuse<T>(&self, refused: Refused<T>) -> Result<T> {
        refused.map_err(|refusal| refusal.of(&self.name))
    }
}

/// The tensors of a zip archive.
fn from_zip(file: &mut Bytes) -> Result<Vec<StridedTensor>> {
    let file_len = file.len();
    let tail = file.read(file_len.saturating_sub(archive::END_BYTES + 76)..file_len)?;
    let end = file.refuse(archive::End::find(&tail, file_len))?;
    let directory = file.read(end.directory.clone())?;
    let entries = file.refuse(end.parse(&directory))?;
    let heads: Vec<Range<u64>> = entries
        .iter()
        .map(|e| e.header..e.header + archive::LOCAL + e.name.len() as u64)
        .collect();
    let mut contents: HashMap<&str, Range<u64>> = HashMap::new();
    for (i, head) in file.read_all(&heads)?.iter().enumerate() {
        let limit = heads
            .get(i + 1)
            .map_or(end.directory.start, |next| next.start);
        let range = file.refuse(archive::content(&entries[i], head, limit))?;
        contents.insert(&entries[i].name, range);
    }
    // One folder holds everything.
    let root = match entries.first().and_then(|e| e.name.split_once('/')) {
        Some((root, _)) if contents.contains_key(format!("{root}/data.pkl").as_str()) => root,
        _ => {
            let names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
            let reason = format!(
                "this zip archive is not one of torch.save: no data.pkl in its one folder, it holds {}",
                some_of(&names)
            );
            return Err(Refusal::convert(0, reason).of(&file.name));
        }
    };
    let inside = |name: &str| contents.get(format!("{root}/{name}").as_str()).cloned();
    let program = inside("data.pkl").unwrap_or_default();
    if let Some(stray) = entries.iter().find(|e| {
        e.name
            .split_once('/')
            .is_none_or(|(folder, _)| folder != root)
    }) {
        let reason = format!(
            "entry `{}` lies outside the folder `{}`",
            Shown(&stray.name),
            Shown(root)
        );
        return Err(Refusal::damaged(stray.header, reason).of(&file.name));
    }
    if inside("constants.pkl").is_some() {
        let reason = "this is a TorchScript archive, a program and not weights alone";
        return Err(Refusal::convert(program.start, reason).of(&file.name));
    }
    if let Some(range) = inside("byteorder") {
        let order = file.read(range.start..range.end.min(range.start + 16))?;
        if order != b"little" {
            let order = String::from_utf8_lossy(&order).into_owned();
            let reason = format!("byte order `{}`, expected `little`", Shown(&order));
            return Err(Refusal::convert(range.start, reason).of(&file.name));
        }
    }
    if program.end - program.start > pickle::MAX_PICKLE {
        let reason = format!(
            "a pickle of {} bytes, where {} are the most",
            program.end - program.start,
            pickle::MAX_PICKLE
        );
        return Err(Refusal::convert(program.start, reason).of(&file.name));
    }
    let bytes = file.read(program.clone())?;
    let pickle = file.refuse(Pickle::read(&bytes, program.start))?;
    if pickle.len != bytes.len() {
        let at = program.start + pickle.len as u64;
        return Err(Refusal::damaged(at, "bytes behind the pickle's STOP").of(&file.name));
    }
    let tensors = state_dict(&pickle, program.start, &|key| {
        inside(&format!("data/{key}"))
    });
    file.refuse(tensors)
}

/// The tensors of a pickle's one dictionary, each checked against its storage. `storages` gives a storage's bytes in
/// the file, by its key.
fn state_dict(
    pickle: &Pickle,
    at: u64,
    storages: &dyn Fn(&str) -> Option<Range<u64>>,
) -> Refused<Vec<StridedTensor>> {
    let Value::Dict(items) = pickle.root() else {
        let reason = format!(
            "expected a dictionary of tensors, as state_dict() gives it, found {}",
            pickle.root().describe()
        );
        return Err(Refusal::convert(at, reason));
    };
    let mut tensors = Vec::with_capacity(items.len());
    let mut seen = std::collections::HashSet::new();
    for &(key, value) in items {
        let &Value::Str(name) = pickle.get(key) else {
            let reason = format!("a key that is no string: {}", pickle.get(key).describe());
            return Err(Refusal::convert(at, reason));
        };
        if !seen.insert(name) {
            let reason = format!("the key `{}` occurs twice", Shown(name));
            return Err(Refusal::damaged(at, reason));
        }
        match pickle.get(value) {
            Value::Tensor(tensor) => tensors.push(placed(name, tensor, storages)?),
            other => {
                let keys: Vec<&str> = items
                    .iter()
                    .filter_map(|&(key, _)| match pickle.get(key) {
                        Value::Str(name) => Some(*name),
                        _ => None,
                    })
                    .collect();
                return Err(Refusal {
                    offset: at,
                    reason: format!(
                        "`{}` holds {}, expected a tensor; the keys are {}",
                        Shown(name),
                        other.describe(),
                        some_of(&keys)
                    ),
                    help: "save the model's state_dict() alone, or better as safetensors",
                    truncated: false,
                });
            }
        }
    }
    Ok(tensors)
}

/// A tensor with its place in the file.
fn placed(
    name: &str,
    tensor: &Tensor,
    storages: &dyn Fn(&str) -> Option<Range<u64>>,
) -> Refused<StridedTensor> {
    let refuse =
        |reason: String| Refusal::damaged(tensor.at, format!("tensor `{}`: {reason}", Shown(name)));
    let storage = &tensor.storage;
    let key = Shown(storage.key);
    let Some(bytes) = storages(storage.key) else {
        return Err(refuse(format!("the file has no storage `{key}`")));
    };
    let size = tensor.dtype.bits() / 8;
    let stated = storage
        .len
        .checked_mul(storage.dtype.map_or(1, |dtype| dtype.bits() / 8));
    let found = bytes.end - bytes.start;
    if stated != Some(found) {
        let dtype = storage.dtype.map_or("bytes", FileDtype::name);
        return Err(refuse(format!(
            "its storage `{key}` should be {} of {dtype}, and has {found} bytes",
            storage.len
        )));
    }
    let elements =
        span(&tensor.shape, &tensor.strides, tensor.offset, found / size).map_err(|reason| {
            let mut refusal = refuse(reason);
            refusal.help = "save it with every tensor made .contiguous(), or as safetensors";
            refusal
        })?;
    // Cannot overflow: the elements lie in the storage, the storage in the file.
    let range = bytes.start + elements.start * size..bytes.start + elements.end * size;
    Ok(StridedTensor {
        info: TensorInfo {
            name: name.to_string(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            range,
        },
        strides: tensor.strides.clone(),
    })
}
