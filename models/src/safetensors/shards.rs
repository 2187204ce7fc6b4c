//! One checkpoint, in one file or in shards under an index.
//!
//! Safetensors go before `pytorch_model.bin` where a folder has both; each may come in shards.
//! `model.safetensors.index.json` (or `pytorch_model.bin.index.json`) maps every tensor's name to the file that holds it. Reading is strict both ways:
//! each shard holds exactly the tensors that the index places there, and `metadata.total_size`, where stated, is the
//! sum of their bytes. A shard is named by a plain file name: the index cannot point out of its directory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::header::TensorInfo;
use super::problem::IndexProblem;
use super::writer::{TensorView, write};
use crate::atomic;
use crate::error::{Error, Result, nearest_name};
use crate::json::{describe, parse_object};
use crate::source::ModelSource;
use crate::strided::StridedFile;
use crate::torch::{PYTORCH_FILE, PYTORCH_INDEX_FILE};
use crate::weights::{Format, WeightsFile};

/// The file of a checkpoint in one piece.
pub const SINGLE_FILE: &str = "model.safetensors";

/// The index of a checkpoint in shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// All tensors of a model, wherever its shards lie.
#[derive(Debug)]
pub struct Checkpoint {
    name: String,
    files: Vec<WeightsFile>,
    /// Tensor name to position in `files`.
    placed: HashMap<String, usize>,
}

impl Checkpoint {
    /// Opens the checkpoint in a directory: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names, or else the same of `pytorch_model.bin`. Reads headers only.
    ///
    /// # Errors
    /// [`Error::MissingFile`] if there is none, [`Error::Safetensors`], [`Error::Weights`], [`Error::Index`],
    /// [`Error::UnsafePath`], [`Error::Io`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Checkpoint> {
        Self::open_in(&ModelSource::directory(dir.as_ref())?)
    }

    /// Opens the checkpoint of a model, wherever that is.
    pub(crate) fn open_in(source: &ModelSource) -> Result<Checkpoint> {
        for format in Format::ALL {
            if let Some(file) = source.weights(format.single(), format)? {
                return Ok(Self::single(file));
            }
            if let Some(text) = source.read_file(format.index())? {
                return Self::sharded(source, format, &text);
            }
        }
        Err(Error::MissingFile {
            place: source.to_string(),
            name: format!("{SINGLE_FILE} (nor {INDEX_FILE}, {PYTORCH_FILE}, {PYTORCH_INDEX_FILE})"),
            help: "a model directory holds its weights as safetensors".to_string(),
        })
    }

    /// A checkpoint in one file whose tensors need not be row-major in it.
    pub(crate) fn strided(file: StridedFile) -> Checkpoint {
        Self::single(WeightsFile::Strided(file))
    }

    fn single(file: WeightsFile) -> Checkpoint {
        let placed = file.tensors().iter().map(|t| (t.name.clone(), 0)).collect();
        Checkpoint {
            name: file.name().to_string(),
            files: vec![file],
            placed,
        }
    }

    /// Opens the shards that an index names.
    fn sharded(source: &ModelSource, format: Format, text: &[u8]) -> Result<Checkpoint> {
        let index_name = source.display_file(format.index());
        let index = Index::parse(&index_name, text, format.suffix())?;
        let mut files = Vec::new();
        let mut placed = HashMap::new();
        let mut total = 0u64;
        for (shard, expected) in &index.shards {
            let problem = |problem| Error::Index {
                file: index_name.clone(),
                problem,
            };
            let Some(file) = source.weights(shard, format)? else {
                let tensor = expected.first().cloned().unwrap_or_default();
                return Err(problem(IndexProblem::MissingShard {
                    shard: shard.clone(),
                    tensor,
                }));
            };
            let found: BTreeSet<&str> = file.tensors().iter().map(|t| t.name.as_str()).collect();
            let absent: Vec<String> = expected
                .iter()
                .filter(|t| !found.contains(t.as_str()))
                .cloned()
                .collect();
            if !absent.is_empty() {
                return Err(problem(IndexProblem::NotInShard {
                    shard: shard.clone(),
                    tensors: absent,
                }));
            }
            let extra: Vec<String> = found
                .iter()
                .filter(|t| !expected.contains(**t))
                .map(|t| t.to_string())
                .collect();
            if !extra.is_empty() {
                return Err(problem(IndexProblem::NotInIndex {
                    shard: shard.clone(),
                    tensors: extra,
                }));
            }
            // Cannot overflow: no tensor is larger than its file.
            total += file.tensors().iter().map(TensorInfo::byte_len).sum::<u64>();
            placed.extend(expected.iter().map(|t| (t.clone(), files.len())));
            files.push(file);
        }
        // What PyTorch's writers state counts tied tensors once, or not.
        let stated = index.total_size.filter(|_| format == Format::Safetensors);
        if let Some(stated) = stated.filter(|&stated| stated != total) {
            let problem = IndexProblem::TotalSize {
                stated,
                actual: total,
            };
            return Err(Error::Index {
                file: index_name,
                problem,
            });
        }
        Ok(Checkpoint {
            name: index_name,
            files,
            placed,
        })
    }

    /// The checkpoint's name in messages: its file, or its index.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All tensors, shard by shard, in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.files.iter().flat_map(WeightsFile::tensors)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.placed.len()
    }

    /// True if there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.placed.is_empty()
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.files[*self.placed.get(name)?].get(name)
    }

    /// `__metadata__` of the first file.
    pub fn metadata(&self) -> Option<&BTreeMap<String, String>> {
        self.files.first().map(WeightsFile::metadata)
    }

    /// Reads one tensor; see [`SafetensorsFile::read_into`](super::SafetensorsFile::read_into).
    ///
    /// # Errors
    /// As there.
    pub fn read_into(&mut self, name: &str, into: &mut [u8]) -> Result<()> {
        match self.placed.get(name) {
            Some(&file) => self.files[file].read_into(name, into),
            None => Err(Error::NoSuchTensor {
                file: self.name.clone(),
                tensor: name.to_string(),
                near: nearest_name(name, self.placed.keys().map(String::as_str)),
            }),
        }
    }

    /// Reads all tensors that `wanted` selects, each file in one pass; see
    /// [`SafetensorsFile::read_each`](super::SafetensorsFile::read_each).
    ///
    /// # Errors
    /// As there.
    pub fn read_each(
        &mut self,
        wanted: &mut dyn FnMut(&TensorInfo) -> bool,
        visit: &mut dyn FnMut(&TensorInfo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.files
            .iter_mut()
            .try_for_each(|file| file.read_each(wanted, visit))
    }

    /// The same in pieces of each tensor; see
    /// [`SafetensorsFile::read_pieces`](super::SafetensorsFile::read_pieces). Of files in other formats, a piece is a whole
    /// tensor.
    ///
    /// # Errors
    /// As there.
    pub fn read_pieces(
        &mut self,
        wanted: &mut dyn FnMut(&TensorInfo) -> bool,
        visit: &mut dyn FnMut(&TensorInfo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.files
            .iter_mut()
            .try_for_each(|file| file.read_pieces(wanted, visit))
    }
}

/// The index, parsed.
struct Index {
    /// Shard file to the names of its tensors.
    shards: BTreeMap<String, BTreeSet<String>>,
    total_size: Option<u64>,
}

impl Index {
    fn parse(file: &str, text: &[u8], suffix: &str) -> Result<Index> {
        let map = parse_object(file, text)?;
        let malformed = |key: &str, found: Option<&Value>, expected| Error::Index {
            file: file.to_string(),
            problem: IndexProblem::Malformed {
                key: key.to_string(),
                found: found.map_or_else(|| "nothing".to_string(), describe),
                expected,
            },
        };
        let weights = match map.get("weight_map") {
            Some(Value::Object(weights)) if !weights.is_empty() => weights,
            other => {
                return Err(malformed(
                    "weight_map",
                    other,
                    "an object that maps tensor names to file names",
                ));
            }
        };
        let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (tensor, shard) in weights {
            let Value::String(name) = shard else {
                let key = format!("weight_map.{tensor}");
                return Err(malformed(&key, Some(shard), "the name of a shard"));
            };
            if !shards.contains_key(name) {
                check_shard_name(file, name, suffix)?;
            }
            shards
                .entry(name.clone())
                .or_default()
                .insert(tensor.clone());
        }
        let total_size = match map.get("metadata") {
            None | Some(Value::Null) => None,
            Some(Value::Object(metadata)) => match metadata.get("total_size") {
                None => None,
                // Some writers state it as a float.
                Some(size) => match size.as_u64().or_else(|| size.as_f64().and_then(whole)) {
                    Some(size) => Some(size),
                    None => {
                        return Err(malformed(
                            "metadata.total_size",
                            Some(size),
                            "a number of bytes",
                        ));
                    }
                },
            },
            other => return Err(malformed("metadata", other, "an object")),
        };
        Ok(Index { shards, total_size })
    }
}

/// A float that is a whole number within the range where floats are exact.
fn whole(x: f64) -> Option<u64> {
    (x >= 0.0 && x <= (1u64 << 53) as f64 && x.fract() == 0.0).then_some(x as u64)
}

/// A shard lies beside its index and has its format; anything else is refused before it becomes a path.
fn check_shard_name(file: &str, name: &str, suffix: &str) -> Result<()> {
    let refuse = |reason| {
        Err(Error::UnsafePath {
            file: file.to_string(),
            name: name.to_string(),
            reason,
        })
    };
    if name.contains(['/', '\\', ':', '\0']) {
        return refuse("it holds a path separator, `:` or NUL");
    }
    if name.starts_with('.') {
        return refuse("it begins with a dot");
    }
    if !name.ends_with(suffix) {
        return refuse(match suffix {
            ".bin" => "it does not end in .bin",
            _ => "it does not end in .safetensors",
        });
    }
    Ok(())
}

/// Writes a checkpoint into a directory: `model.safetensors` if all tensors fit into `max_shard_bytes`, otherwise
/// shards of at most that many bytes of tensors (a larger tensor gets a shard of its own) and their index.
///
/// Tensors go to shards in the order given. Each file appears complete or not at all, but the set of files does
/// not: write into a [`StagedDir`](crate::atomic::StagedDir) to replace a whole model. Files of an earlier
/// checkpoint are not removed.
///
/// # Errors
/// As [`write()`].
pub fn write_checkpoint<'a>(
    dir: impl AsRef<Path>,
    metadata: &BTreeMap<String, String>,
    tensors: impl IntoIterator<Item = impl Into<TensorView<'a>>>,
    max_shard_bytes: u64,
) -> Result<()> {
    let dir = dir.as_ref();
    let tensors: Vec<TensorView<'a>> = tensors.into_iter().map(Into::into).collect();
    let mut shards: Vec<Vec<TensorView<'a>>> = vec![Vec::new()];
    let mut used = 0u64;
    let mut total = 0u64;
    let mut names = std::collections::HashSet::new();
    for tensor in tensors {
        if !names.insert(tensor.name) {
            return Err(Error::Unwritable {
                file: dir.display().to_string(),
                tensor: tensor.name.to_string(),
                reason: "another tensor has the same name".to_string(),
            });
        }
        let bytes = tensor.data.len() as u64;
        total += bytes;
        if used > 0 && used.saturating_add(bytes) > max_shard_bytes {
            shards.push(Vec::new());
            used = 0;
        }
        used += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    if let [only] = shards.as_slice() {
        return write(dir.join(SINGLE_FILE), metadata, only.iter().copied());
    }
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        write(dir.join(&name), metadata, shard.iter().copied())?;
        weight_map.extend(shard.iter().map(|tensor| (tensor.name, name.clone())));
    }
    let index = json!({
        "metadata": { "total_size": total },
        "weight_map": weight_map.into_iter().map(|(k, v)| (k.to_string(), json!(v))).collect::<Map<_, _>>(),
    });
    atomic::write_file(dir.join(INDEX_FILE), |out| writeln!(out, "{index:#}"))
}
