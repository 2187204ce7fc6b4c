//! The walk over a header's JSON, which stops at the first thing that should not be there.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::{FileDtype, MAX_RANK, METADATA_KEY, PREFIX, Problem};
use crate::error::json_reason;

/// A tensor as the header gives it; offsets in the data section.
pub(super) struct RawTensor {
    pub name: String,
    pub dtype: FileDtype,
    pub shape: Vec<u64>,
    pub start: u64,
    pub end: u64,
}

pub(super) struct RawHeader {
    pub tensors: Vec<RawTensor>,
    pub metadata: BTreeMap<String, String>,
}

/// Reads the text of a header.
pub(super) fn read(text: &str) -> Result<RawHeader, Problem> {
    let walk = Walk::default();
    let mut parser = serde_json::Deserializer::from_str(text);
    HeaderSeed { walk: &walk }
        .deserialize(&mut parser)
        .and_then(|raw| parser.end().map(|()| raw))
        .map_err(|error| walk.explain(text, &error))
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
