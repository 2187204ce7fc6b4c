//! The header of a safetensors file: parsed once, checked completely.
//!
//! After [`Header::parse`] every tensor's bytes are known to lie inside the file, in ranges that cover the data
//! section once and without holes, and each range is as long as shape and element type say. No later step needs to
//! check again.
//!
//! Stricter than the reference implementation, on purpose:
//! - a name that occurs twice (there the last one wins), also inside `__metadata__`;
//! - keys other than `dtype`, `shape`, `data_offsets` (there ignored);
//! - a tensor described by a list, or an element type by an object (there accepted by accident);
//! - `"__metadata__": null`, and a header that does not begin with `{`, which the format forbids;
//! - more than [`MAX_RANK`] dimensions.
//!
//! More lenient: the element type `C64`, which version 0.6 of the crate did not know yet.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::dtype::FileDtype;
use super::problem::Problem;
use crate::error::json_reason;

/// Longest header that is read, in bytes: the limit of the reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 8;

/// Bytes of the header length in front of the header.
pub(crate) const PREFIX: u64 = 8;

/// The header key that is no tensor.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// Where and what one tensor is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its element type in the file.
    pub dtype: FileDtype,
    /// Its dimensions, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// Its bytes, from the start of the file; where a format stores tensors with strides, from the first byte of the
    /// first element to the last byte of the last.
    pub range: Range<u64>,
}

impl TensorInfo {
    /// Number of its bytes, one element after the other.
    pub fn byte_len(&self) -> u64 {
        if self.shape.contains(&0) {
            return 0;
        }
        // Cannot overflow: whoever made this has checked the product.
        self.shape.iter().product::<u64>() * self.dtype.bits() / 8
    }
}

/// A header that has passed every check.
#[derive(Clone, Debug)]
pub struct Header {
    /// Tensors by rising offset.
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

impl Header {
    /// Parses and checks a header.
    ///
    /// `json` is the header without the eight bytes of its length, padding included; `file_len` is the length of
    /// the whole file in bytes.
    ///
    /// # Errors
    /// The first [`Problem`] found.
    pub fn parse(json: &[u8], file_len: u64) -> Result<Header, Problem> {
        match json.first() {
            Some(b'{') => {}
            Some(&byte) => {
                return Err(Problem::HeaderStart {
                    found: format!("byte {byte:#04x}"),
                });
            }
            None => {
                return Err(Problem::HeaderStart {
                    found: "nothing".to_string(),
                });
            }
        }
        let text = std::str::from_utf8(json).map_err(|e| Problem::NotUtf8 {
            offset: PREFIX + e.valid_up_to() as u64,
        })?;
        let walk = Walk::default();
        let mut parser = serde_json::Deserializer::from_str(text);
        let raw = HeaderSeed { walk: &walk }
            .deserialize(&mut parser)
            .and_then(|raw| parser.end().map(|()| raw))
            .map_err(|error| walk.explain(text, &error))?;
        let data_start = PREFIX + json.len() as u64;
        let tensors = lay_out(raw.tensors, data_start, file_len)?;
        let by_name = tensors
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.clone(), i))
            .collect();
        Ok(Header {
            tensors,
            by_name,
            metadata: raw.metadata,
        })
    }

    /// Checks the stated header length against limit and file, given the first bytes of the file.
    ///
    /// `start` holds up to 32 bytes from the start of the file.
    pub(crate) fn check_length(start: &[u8], file_len: u64) -> Result<u64, Problem> {
        let Some(prefix) = start.first_chunk::<8>() else {
            return Err(Problem::TooShort { found: file_len });
        };
        let claimed = u64::from_le_bytes(*prefix);
        let available = file_len.saturating_sub(PREFIX);
        if claimed <= MAX_HEADER_BYTES && claimed <= available {
            return Ok(claimed);
        }
        // Only a length that cannot be right is explained by other formats: 0x80 0x02 may also begin a fine file.
        if let Some(problem) = other_format(start) {
            return Err(problem);
        }
        Err(if claimed > MAX_HEADER_BYTES {
            Problem::HeaderTooLarge {
                claimed,
                limit: MAX_HEADER_BYTES,
            }
        } else {
            Problem::HeaderTruncated { claimed, available }
        })
    }

    /// The tensors, by rising offset.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// The free-form strings under `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// Names formats that are often found under a name that promises safetensors.
pub(crate) fn other_format(start: &[u8]) -> Option<Problem> {
    let convert = "it can run code when loaded and is never opened; load it with transformers where you trust it \
                   and save it with save_pretrained(safe_serialization=True)";
    let (kind, help) = match start {
        [b'P', b'K', 3, 4, ..] => (
            "a zip archive (a PyTorch pickle checkpoint, or a wheel)",
            convert,
        ),
        [0x80, 2..=5, ..] => ("a Python pickle", convert),
        _ if start.starts_with(b"version https://git-lfs") => (
            "a Git LFS pointer",
            "run `git lfs pull` in the checkout to fetch the file itself",
        ),
        _ if start.starts_with(b"GGUF") => (
            "a GGUF file",
            "use the safetensors checkpoint that it was made from",
        ),
        _ if start.starts_with(b"<!") || start.starts_with(b"<html") => {
            ("an HTML page", "the download failed, fetch the file again")
        }
        _ => return None,
    };
    Some(Problem::OtherFormat { kind, help })
}

/// Checks sizes and ranges, and turns ranges of the data section into ranges of the file.
fn lay_out(
    mut raw: Vec<RawTensor>,
    data_start: u64,
    file_len: u64,
) -> Result<Vec<TensorInfo>, Problem> {
    // Empty tensors share their start with the next one and must come before it.
    raw.sort_by_key(|t| (t.start, t.end));
    let data_len = file_len.saturating_sub(data_start);
    let mut tensors = Vec::with_capacity(raw.len());
    let mut position = 0;
    for RawTensor {
        name: tensor,
        dtype,
        shape,
        start,
        end,
    } in raw
    {
        if end < start {
            return Err(Problem::ReversedRange { tensor, start, end });
        }
        let Some(bits) = shape
            .iter()
            .try_fold(1u64, |product, &dim| product.checked_mul(dim))
            .and_then(|elements| elements.checked_mul(dtype.bits()))
        else {
            return Err(Problem::SizeOverflow {
                tensor,
                shape,
                dtype,
            });
        };
        if bits % 8 != 0 {
            return Err(Problem::PartialByte {
                tensor,
                shape,
                dtype,
            });
        }
        let expected = bits / 8;
        if end - start != expected {
            return Err(Problem::WrongLength {
                tensor,
                shape,
                dtype,
                expected,
                start,
                end,
            });
        }
        if start < position {
            return Err(Problem::Overlap {
                tensor,
                start,
                previous_end: position,
            });
        }
        if start > position {
            return Err(Problem::Hole {
                tensor,
                start,
                previous_end: position,
            });
        }
        if end > data_len {
            return Err(Problem::DataTruncated {
                tensor,
                end: data_start.saturating_add(end),
                file_len,
            });
        }
        position = end;
        // Cannot overflow: both lie within the file.
        let range = data_start + start..data_start + end;
        tensors.push(TensorInfo {
            name: tensor,
            dtype,
            shape,
            range,
        });
    }
    if position < data_len {
        return Err(Problem::TrailingBytes {
            offset: data_start + position,
            extra: data_len - position,
        });
    }
    Ok(tensors)
}

/// A tensor as the header gives it; offsets in the data section.
struct RawTensor {
    name: String,
    dtype: FileDtype,
    shape: Vec<u64>,
    start: u64,
    end: u64,
}

struct RawHeader {
    tensors: Vec<RawTensor>,
    metadata: BTreeMap<String, String>,
}

/// What the walk over the JSON knows beyond what serde's errors can carry.
#[derive(Default)]
struct Walk {
    /// The reason for stopping, when it is ours and not the parser's.
    problem: RefCell<Option<Problem>>,
    /// The tensor whose description is being read.
    tensor: RefCell<Option<String>>,
}

impl Walk {
    /// Stops the parser for a reason of our own.
    fn stop<E: de::Error>(&self, problem: Problem) -> E {
        *self.problem.borrow_mut() = Some(problem);
        E::custom("refused")
    }

    fn current(&self) -> String {
        self.tensor.borrow().clone().unwrap_or_default()
    }

    /// Turns the parser's error into a problem with an offset in the file.
    fn explain(&self, text: &str, error: &serde_json::Error) -> Problem {
        let line_start = text
            .split_inclusive('\n')
            .take(error.line().saturating_sub(1))
            .map(str::len)
            .sum::<usize>();
        let at = (line_start + error.column()).min(text.len()) as u64;
        match self.problem.take() {
            Some(Problem::DuplicateKey { tensor, key, .. }) => Problem::DuplicateKey {
                offset: PREFIX + at,
                tensor,
                key,
            },
            Some(problem) => problem,
            None => Problem::Json {
                offset: PREFIX + at,
                tensor: self.tensor.take(),
                reason: json_reason(error),
            },
        }
    }
}

/// Reads the whole header object.
struct HeaderSeed<'w> {
    walk: &'w Walk,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = RawHeader;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<RawHeader, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object that maps tensor names to descriptions")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<RawHeader, A::Error> {
        let mut seen = std::collections::HashSet::new();
        let mut header = RawHeader {
            tensors: Vec::new(),
            metadata: BTreeMap::new(),
        };
        while let Some(name) = entries.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(self.walk.stop(Problem::DuplicateKey {
                    offset: 0,
                    tensor: None,
                    key: name,
                }));
            }
            *self.walk.tensor.borrow_mut() = Some(name.clone());
            if name == METADATA_KEY {
                header.metadata = entries.next_value_seed(MetadataSeed { walk: self.walk })?;
            } else {
                header
                    .tensors
                    .push(entries.next_value_seed(TensorSeed { walk: self.walk })?);
            }
            *self.walk.tensor.borrow_mut() = None;
        }
        Ok(header)
    }
}

/// Reads `__metadata__`: strings under distinct names.
struct MetadataSeed<'w> {
    walk: &'w Walk,
}

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut metadata = BTreeMap::new();
        while let Some(key) = entries.next_key::<String>()? {
            if metadata.contains_key(&key) {
                let tensor = Some(METADATA_KEY.to_string());
                return Err(self.walk.stop(Problem::DuplicateKey {
                    offset: 0,
                    tensor,
                    key,
                }));
            }
            let value = entries.next_value::<String>()?;
            metadata.insert(key, value);
        }
        Ok(metadata)
    }
}

/// Reads one tensor's description; its name is the walk's current one.
struct TensorSeed<'w> {
    walk: &'w Walk,
}

impl<'de> DeserializeSeed<'de> for TensorSeed<'_> {
    type Value = RawTensor;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<RawTensor, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed<'_> {
    type Value = RawTensor;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `dtype`, `shape` and `data_offsets`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<RawTensor, A::Error> {
        let walk = self.walk;
        let name = walk.current();
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = entries.next_key::<String>()? {
            let again = match key.as_str() {
                "dtype" => {
                    let found = entries.next_value::<String>()?;
                    let Some(known) = FileDtype::from_name(&found) else {
                        return Err(walk.stop(Problem::UnknownDtype {
                            tensor: name,
                            found,
                        }));
                    };
                    dtype.replace(known).is_some()
                }
                "shape" => shape
                    .replace(entries.next_value_seed(ShapeSeed { walk })?)
                    .is_some(),
                "data_offsets" => offsets
                    .replace(entries.next_value::<(u64, u64)>()?)
                    .is_some(),
                _ => return Err(walk.stop(Problem::UnknownKey { tensor: name, key })),
            };
            if again {
                return Err(walk.stop(Problem::DuplicateKey {
                    offset: 0,
                    tensor: Some(name),
                    key,
                }));
            }
        }
        let missing = |key| {
            walk.stop(Problem::MissingKey {
                tensor: name.clone(),
                key,
            })
        };
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let (start, end) = offsets.ok_or_else(|| missing("data_offsets"))?;
        Ok(RawTensor {
            name,
            dtype,
            shape,
            start,
            end,
        })
    }
}

/// Reads a shape, at most [`MAX_RANK`] long, without ever holding a longer one.
struct ShapeSeed<'w> {
    walk: &'w Walk,
}

impl<'de> DeserializeSeed<'de> for ShapeSeed<'_> {
    type Value = Vec<u64>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Vec<u64>, D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeSeed<'_> {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of whole numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut dims: A) -> Result<Vec<u64>, A::Error> {
        let mut shape = Vec::new();
        while let Some(dim) = dims.next_element::<u64>()? {
            if shape.len() == MAX_RANK {
                let tensor = self.walk.current();
                return Err(self.walk.stop(Problem::RankTooHigh {
                    tensor,
                    limit: MAX_RANK,
                }));
            }
            shape.push(dim);
        }
        Ok(shape)
    }
}
