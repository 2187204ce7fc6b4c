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

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::dtype::FileDtype;
use super::problem::Problem;

mod walk;

use walk::{RawTensor, read};

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
        let raw = read(text)?;
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
