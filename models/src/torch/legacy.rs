//! Files of `torch.save` before version 1.6: five pickles, then the storages one after the other.
//!
//! The pickles are PyTorch's number, the version of the protocol, facts about the machine, the object itself, and
//! the list of the storages' keys. Each storage is its number of elements (8 bytes) and its elements.

use std::collections::HashMap;
use std::ops::Range;

use super::pickle::{MAX_PICKLE, Pickle};
use super::refusal::{Refusal, Refused};
use super::value::Value;
use super::{Bytes, state_dict};
use crate::error::{Result, Shown};
use crate::strided::StridedTensor;

/// The first pickle: the number 0x1950a86a20f9469cfc6c.
pub(super) const MAGIC: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

/// The only version of the protocol there was.
const PROTOCOL: i64 = 1001;

/// Bytes that are read first. The pickles of most models fit.
const FIRST_BYTES: u64 = 1 << 20;

/// The tensors of a file that begins with [`MAGIC`].
pub(super) fn read(file: &mut Bytes) -> Result<Vec<StridedTensor>> {
    let file_len = file.len();
    let mut bytes = file.read(0..file_len.min(FIRST_BYTES))?;
    let mut parsed = Pickles::read(&bytes);
    if matches!(&parsed, Err(refusal) if refusal.truncated) && file_len > FIRST_BYTES {
        bytes = file.read(0..file_len.min(2 * MAX_PICKLE))?;
        parsed = Pickles::read(&bytes);
    }
    let pickles = file.refuse(parsed)?;
    let storages = file.refuse(pickles.storages(file_len))?;
    let counts: Vec<Range<u64>> = storages
        .iter()
        .map(|s| s.bytes.start - 8..s.bytes.start)
        .collect();
    for (storage, count) in storages.iter().zip(file.read_all(&counts)?) {
        let stated = count.try_into().map_or(0, u64::from_le_bytes);
        if stated != storage.len {
            let reason = format!(
                "storage `{}` has {stated} elements here and {} in the pickle",
                Shown(storage.key),
                storage.len
            );
            return Err(Refusal::damaged(storage.bytes.start - 8, reason).of(&file.name));
        }
    }
    let places: HashMap<&str, &Range<u64>> = storages.iter().map(|s| (s.key, &s.bytes)).collect();
    let tensors = state_dict(&pickles.object, pickles.object_at, &|key| {
        places.get(key).map(|&range| range.clone())
    });
    file.refuse(tensors)
}

/// The pickles in front of the storages.
struct Pickles<'a> {
    object: Pickle<'a>,
    object_at: u64,
    keys: Vec<&'a str>,
    /// Where the storages begin.
    end: u64,
}

struct Storage<'a> {
    key: &'a str,
    /// In elements.
    len: u64,
    bytes: Range<u64>,
}

impl<'a> Pickles<'a> {
    fn read(bytes: &'a [u8]) -> Refused<Pickles<'a>> {
        let mut at = MAGIC.len();
        let mut next = || {
            let start = at;
            let pickle = Pickle::read(&bytes[start..], start as u64)?;
            at += pickle.len;
            if pickle.len as u64 > MAX_PICKLE {
                let reason = format!(
                    "a pickle of {} bytes, where {MAX_PICKLE} are the most",
                    pickle.len
                );
                return Err(Refusal::convert(start as u64, reason));
            }
            Ok((pickle, start as u64))
        };
        let (version, version_at) = next()?;
        if !matches!(version.root(), Value::Int(PROTOCOL)) {
            let reason = format!(
                "protocol {}, expected {PROTOCOL}",
                version.root().describe()
            );
            return Err(Refusal::convert(version_at, reason));
        }
        let (machine, machine_at) = next()?;
        let little = match machine.root() {
            Value::Dict(items) => items.iter().any(|&(key, value)| {
                matches!(machine.get(key), Value::Str("little_endian"))
                    && matches!(machine.get(value), Value::Bool(true))
            }),
            _ => false,
        };
        if !little {
            let reason = "the machine that wrote this file was not little-endian";
            return Err(Refusal::convert(machine_at, reason));
        }
        let (object, object_at) = next()?;
        let (list, list_at) = next()?;
        let Value::List(items) = list.root() else {
            let reason = format!(
                "expected the list of storages, found {}",
                list.root().describe()
            );
            return Err(Refusal::damaged(list_at, reason));
        };
        let mut keys = Vec::with_capacity(items.len());
        for &id in items {
            match *list.get(id) {
                Value::Str(key) => keys.push(key),
                ref other => {
                    let reason =
                        format!("expected the key of a storage, found {}", other.describe());
                    return Err(Refusal::damaged(list_at, reason));
                }
            }
        }
        Ok(Pickles {
            object,
            object_at,
            keys,
            end: at as u64,
        })
    }

    /// Where the storages lie, by the sizes that the object's pickle states; they fill the file to its end.
    fn storages(&self, file_len: u64) -> Refused<Vec<Storage<'a>>> {
        let mut sizes: HashMap<&str, (u64, u64)> = HashMap::new();
        for tensor in self.object.tensors() {
            let storage = &tensor.storage;
            let size = storage.dtype.map_or(1, |dtype| dtype.bits() / 8);
            let first = *sizes.entry(storage.key).or_insert((storage.len, size));
            if first != (storage.len, size) {
                let reason = format!("storage `{}` is described in two ways", Shown(storage.key));
                return Err(Refusal::damaged(tensor.at, reason));
            }
        }
        let mut storages = Vec::with_capacity(self.keys.len());
        let mut position = self.end;
        for &key in &self.keys {
            let Some((len, size)) = sizes.remove(key) else {
                let reason = format!(
                    "storage `{}` is listed twice or belongs to no tensor",
                    Shown(key)
                );
                return Err(Refusal::damaged(position, reason));
            };
            let range = position.checked_add(8).and_then(|start| {
                let end = start.checked_add(len.checked_mul(size)?)?;
                (end <= file_len).then_some(start..end)
            });
            let Some(bytes) = range else {
                let reason = format!(
                    "storage `{}` of {len} times {size} bytes ends beyond the file's {file_len}: it was cut off",
                    Shown(key)
                );
                return Err(Refusal::truncated(position, reason));
            };
            position = bytes.end;
            storages.push(Storage { key, len, bytes });
        }
        if position != file_len {
            let reason = format!("{} bytes behind the last storage", file_len - position);
            return Err(Refusal::damaged(position, reason));
        }
        Ok(storages)
    }
}
