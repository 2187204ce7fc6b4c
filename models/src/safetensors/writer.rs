//! Writes safetensors files, byte for byte as the reference implementation lays them out.
//!
//! Tensors are ordered by element type, the most aligned first, then by name; with a header padded to eight bytes,
//! every tensor then begins at a multiple of its element's size and can be mapped into memory and used in place.
//! Metadata keys are sorted, so equal tensors give equal files.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use graft_tensor::DType;

use super::dtype::FileDtype;
use super::header::{MAX_HEADER_BYTES, MAX_RANK, METADATA_KEY};
use crate::atomic;
use crate::error::{Error, Result};

/// A tensor to write.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Its name; not empty, and not `__metadata__`.
    pub name: &'a str,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions, outermost first; at most [`MAX_RANK`].
    pub shape: &'a [usize],
    /// Its bytes, row-major and little-endian.
    pub data: &'a [u8],
}

impl<'a> From<(&'a str, DType, &'a [usize], &'a [u8])> for TensorView<'a> {
    fn from((name, dtype, shape, data): (&'a str, DType, &'a [usize], &'a [u8])) -> TensorView<'a> {
        TensorView {
            name,
            dtype,
            shape,
            data,
        }
    }
}

/// The metadata without which transformers refuses a file: `{"format": "pt"}`.
pub fn pt_metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_string(), "pt".to_string())])
}

/// Writes a file at `path`, which appears complete or not at all.
///
/// `metadata` is left out of the header when empty; transformers needs [`pt_metadata`].
///
/// # Errors
/// [`Error::Unwritable`] or [`Error::ByteLength`] for a tensor that the format cannot hold or that has the wrong
/// number of bytes, [`Error::Io`]. Whatever was at `path` before is then still there.
pub fn write<'a>(
    path: impl AsRef<Path>,
    metadata: &BTreeMap<String, String>,
    tensors: impl IntoIterator<Item = impl Into<TensorView<'a>>>,
) -> Result<()> {
    let path = path.as_ref();
    let mut tensors: Vec<TensorView<'a>> = tensors.into_iter().map(Into::into).collect();
    let header = lay_out(&path.display().to_string(), metadata, &mut tensors)?;
    atomic::write_file(path, |file| {
        file.write_all(&header)?;
        tensors
            .iter()
            .try_for_each(|tensor| file.write_all(tensor.data))
    })
}

/// The bytes that [`write()`] writes.
///
/// # Errors
/// As [`write()`], without the I/O.
pub fn to_bytes<'a>(
    metadata: &BTreeMap<String, String>,
    tensors: impl IntoIterator<Item = impl Into<TensorView<'a>>>,
) -> Result<Vec<u8>> {
    let mut tensors: Vec<TensorView<'a>> = tensors.into_iter().map(Into::into).collect();
    let mut bytes = lay_out("safetensors bytes", metadata, &mut tensors)?;
    for tensor in &tensors {
        bytes.extend_from_slice(tensor.data);
    }
    Ok(bytes)
}

/// Orders the tensors and returns length and header, padded.
fn lay_out(
    file: &str,
    metadata: &BTreeMap<String, String>,
    tensors: &mut [TensorView<'_>],
) -> Result<Vec<u8>> {
    let rank = |tensor: &TensorView| FileDtype::from(tensor.dtype) as usize;
    tensors.sort_by(|a, b| rank(b).cmp(&rank(a)).then(a.name.cmp(b.name)));
    let mut names = std::collections::HashSet::new();
    let mut header = vec![0u8; 8];
    header.push(b'{');
    if !metadata.is_empty() {
        write_json(&mut header, METADATA_KEY);
        header.push(b':');
        write_json(&mut header, metadata);
    }
    let mut offset = 0u64;
    for tensor in tensors.iter() {
        let refuse = |reason: &str| Error::Unwritable {
            file: file.to_string(),
            tensor: tensor.name.to_string(),
            reason: reason.to_string(),
        };
        if tensor.name.is_empty() || tensor.name == METADATA_KEY {
            return Err(refuse(
                "a tensor needs a name, and `__metadata__` is not one",
            ));
        }
        if !names.insert(tensor.name) {
            return Err(refuse(
                "another tensor has the same name; tensors of one file need different names",
            ));
        }
        if tensor.shape.len() > MAX_RANK {
            return Err(refuse(&format!(
                "it has {} dimensions, at most {MAX_RANK} can be read back",
                tensor.shape.len()
            )));
        }
        let expected = tensor
            .shape
            .iter()
            .try_fold(tensor.dtype.size() as u64, |product, &dim| {
                product.checked_mul(dim as u64)
            })
            .ok_or_else(|| refuse("its size overflows 64 bits"))?;
        if expected != tensor.data.len() as u64 {
            return Err(Error::ByteLength {
                file: file.to_string(),
                tensor: tensor.name.to_string(),
                shape: tensor.shape.iter().map(|&dim| dim as u64).collect(),
                expected,
                found: tensor.data.len() as u64,
            });
        }
        if header.len() > 9 {
            header.push(b',');
        }
        let end = offset + expected;
        write_json(&mut header, tensor.name);
        let _ = write!(
            header,
            ":{{\"dtype\":\"{}\",\"shape\":",
            FileDtype::from(tensor.dtype)
        );
        write_json(&mut header, tensor.shape);
        let _ = write!(header, ",\"data_offsets\":[{offset},{end}]}}");
        offset = end;
    }
    header.push(b'}');
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = header.len() as u64 - 8;
    if length > MAX_HEADER_BYTES {
        return Err(Error::Unwritable {
            file: file.to_string(),
            tensor: METADATA_KEY.to_string(),
            reason: format!("the header takes {length} bytes, readers accept {MAX_HEADER_BYTES}"),
        });
    }
    header[..8].copy_from_slice(&length.to_le_bytes());
    Ok(header)
}

/// Appends a value as JSON. Writing strings, maps of strings and lists of numbers to memory cannot fail.
fn write_json<T: serde::Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    let _ = serde_json::to_writer(out, value);
}
