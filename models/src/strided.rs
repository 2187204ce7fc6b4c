//! Tensors that lie in a file with strides: views, transposes and slices of larger blocks, read as if they were
//! row-major.
//!
//! `pytorch_model.bin` keeps tensors as views of storages, llm.c keeps the layers of one kind in one block with its
//! matrices the other way around. Both readers describe what they found as [`StridedTensor`]s and leave the reading
//! to [`StridedFile`]. That every byte of a tensor lies in the file, and none is used twice by it, is checked by
//! [`span`] before a tensor is described.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;

use crate::error::{Error, Result, Shown, nearest_name};
use crate::safetensors::reader::{check_length, supported};
use crate::safetensors::{ByteSource, TensorInfo};

/// Rows and columns that are transposed at a time, so that both sides stay in the nearest cache.
const TILE: usize = 32;

/// A tensor and where its elements lie.
#[derive(Clone, Debug)]
pub(crate) struct StridedTensor {
    /// Name, element type, shape; the range runs from the first element's first byte to the last one's last.
    pub info: TensorInfo,
    /// Elements from one index to the next, for each dimension.
    pub strides: Vec<u64>,
}

/// Bytes from the first to the last element of a tensor that begins `offset` elements into a storage of `len`
/// elements, as a range of elements in the storage; the reason, if it has none.
///
/// What passes uses no element of the storage twice, so it is never larger than the storage.
pub(crate) fn span(
    shape: &[u64],
    strides: &[u64],
    offset: u64,
    len: u64,
) -> Result<Range<u64>, String> {
    if shape.len() != strides.len() {
        return Err(format!(
            "{} dimensions, but {} strides",
            shape.len(),
            strides.len()
        ));
    }
    if shape.contains(&0) {
        return match offset <= len {
            true => Ok(offset..offset),
            false => Err(format!(
                "it begins at element {offset} of a storage of {len}"
            )),
        };
    }
    let mut by_stride: Vec<(u64, u64)> = strides
        .iter()
        .copied()
        .zip(shape.iter().copied())
        .filter(|&(_, size)| size > 1)
        .collect();
    by_stride.sort_unstable();
    let mut extent = 1u64;
    for (stride, size) in by_stride {
        if stride < extent {
            return Err(format!(
                "shape {shape:?} with strides {strides:?} uses elements of its storage more than once"
            ));
        }
        extent = stride
            .checked_mul(size - 1)
            .and_then(|last| last.checked_add(extent))
            .ok_or_else(|| format!("shape {shape:?} with strides {strides:?} overflows"))?;
    }
    match offset.checked_add(extent) {
        Some(end) if end <= len => Ok(offset..end),
        _ => Err(format!(
            "shape {shape:?} with strides {strides:?} from element {offset} on takes {extent} elements, but its \
             storage has {len}"
        )),
    }
}

/// Strides of a row-major tensor.
pub(crate) fn row_major(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1u64; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis].max(1));
    }
    strides
}

/// An open file of strided tensors.
pub(crate) struct StridedFile {
    name: String,
    /// By rising start of their ranges.
    infos: Vec<TensorInfo>,
    /// Of the tensor at the same position.
    strides: Vec<Vec<u64>>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
    source: Box<dyn ByteSource>,
}

impl fmt::Debug for StridedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StridedFile")
            .field("name", &self.name)
            .field("tensors", &self.infos.len())
            .finish_non_exhaustive()
    }
}

impl StridedFile {
    /// A file of these tensors, whose names are distinct and whose ranges lie in the source.
    pub(crate) fn new(
        name: String,
        mut tensors: Vec<StridedTensor>,
        source: Box<dyn ByteSource>,
    ) -> StridedFile {
        tensors.sort_by_key(|t| (t.info.range.start, t.info.range.end));
        let by_name = tensors
            .iter()
            .enumerate()
            .map(|(i, t)| (t.info.name.clone(), i))
            .collect();
        let (infos, strides) = tensors.into_iter().map(|t| (t.info, t.strides)).unzip();
        StridedFile {
            name,
            infos,
            strides,
            by_name,
            metadata: BTreeMap::new(),
            source,
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    pub(crate) fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.infos[i])
    }

    /// Empty: these formats have none.
    pub(crate) fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// As [`SafetensorsFile::read_into`](crate::SafetensorsFile::read_into).
    pub(crate) fn read_into(&mut self, name: &str, into: &mut [u8]) -> Result<()> {
        let Some(&index) = self.by_name.get(name) else {
            return Err(Error::NoSuchTensor {
                file: self.name.clone(),
                tensor: name.to_string(),
                near: nearest_name(name, self.infos.iter().map(|t| t.name.as_str())),
            });
        };
        let info = &self.infos[index];
        supported(&self.name, info)?;
        check_length(&self.name, info, into.len())?;
        self.read_chosen(&[index], &mut |_, bytes| {
            into.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// As [`SafetensorsFile::read_each`](crate::SafetensorsFile::read_each); the buffer grows to the largest stretch
    /// of the file that tensors share.
    pub(crate) fn read_each(
        &mut self,
        wanted: &mut dyn FnMut(&TensorInfo) -> bool,
        visit: &mut dyn FnMut(&TensorInfo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut chosen = Vec::new();
        for (index, info) in self.infos.iter().enumerate().filter(|(_, t)| wanted(t)) {
            supported(&self.name, info)?;
            chosen.push(index);
        }
        self.read_chosen(&chosen, visit)
    }

    /// Reads the tensors at these positions, which rise.
    fn read_chosen(
        &mut self,
        chosen: &[usize],
        visit: &mut dyn FnMut(&TensorInfo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        // Tensors whose ranges overlap are cut out of one buffer.
        let mut stretches: Vec<(Range<u64>, Vec<usize>)> = Vec::new();
        for &index in chosen {
            let range = &self.infos[index].range;
            match stretches.last_mut() {
                Some((stretch, members)) if range.start < stretch.end => {
                    stretch.end = stretch.end.max(range.end);
                    members.push(index);
                }
                _ => stretches.push((range.clone(), vec![index])),
            }
        }
        let ranges: Vec<Range<u64>> = stretches.iter().map(|(range, _)| range.clone()).collect();
        let (infos, strides) = (&self.infos, &self.strides);
        let mut failed = None;
        let mut buffer = Vec::new();
        let mut gathered = Vec::new();
        let mut current = 0;
        let outcome = self.source.read_ranges(&ranges, &mut |i, reader| {
            if failed.is_some() {
                return Ok(());
            }
            current = i;
            let (stretch, members) = &stretches[i];
            let len = stretch.end - stretch.start;
            buffer.clear();
            if (std::io::copy(reader, &mut buffer)?) < len {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            for &index in members {
                let info = &infos[index];
                let start = (info.range.start - stretch.start) as usize;
                let bytes = &buffer[start..start + (info.range.end - info.range.start) as usize];
                let dense = match is_row_major(&info.shape, &strides[index]) {
                    true => bytes,
                    false => {
                        gather(info, &strides[index], bytes, &mut gathered);
                        &gathered
                    }
                };
                if let Err(error) = visit(info, dense) {
                    failed = Some(error);
                    break;
                }
            }
            Ok(())
        });
        if let Some(error) = failed {
            return Err(error);
        }
        outcome.map_err(|e| {
            let (range, members) = &stretches[current];
            let name = Shown(&infos[members[0]].name).to_string();
            let action = format!(
                "read tensor `{name}` (bytes {}..{}) of",
                range.start, range.end
            );
            Error::io(action, &self.name, e)
        })
    }
}

/// Whether the elements lie one after the other in the order of their indices.
fn is_row_major(shape: &[u64], strides: &[u64]) -> bool {
    let mut expected = 1;
    shape.contains(&0)
        || shape.iter().zip(strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
}

/// Copies a tensor's elements into row-major order. `bytes` is its range.
fn gather(info: &TensorInfo, strides: &[u64], bytes: &[u8], into: &mut Vec<u8>) {
    let size = (info.dtype.bits() / 8) as usize;
    into.clear();
    into.resize(info.byte_len() as usize, 0);
    if into.is_empty() {
        return;
    }
    // To exactly two inner dimensions and any number of outer ones.
    let mut dims: Vec<(usize, usize)> = info
        .shape
        .iter()
        .zip(strides)
        .map(|(&n, &stride)| (n as usize, stride as usize * size))
        .collect();
    while dims.len() < 2 {
        dims.insert(0, (1, 0));
    }
    let inner = dims.split_off(dims.len() - 2);
    let [(rows, row_step), (columns, column_step)] = [inner[0], inner[1]];
    let matrix = rows * columns * size;
    let mut index = vec![0usize; dims.len()];
    for block in into.chunks_exact_mut(matrix) {
        let base: usize = index.iter().zip(&dims).map(|(i, (_, step))| i * step).sum();
        for r0 in (0..rows).step_by(TILE) {
            for c0 in (0..columns).step_by(TILE) {
                for r in r0..rows.min(r0 + TILE) {
                    for c in c0..columns.min(c0 + TILE) {
                        let from = base + r * row_step + c * column_step;
                        let to = (r * columns + c) * size;
                        block[to..to + size].copy_from_slice(&bytes[from..from + size]);
                    }
                }
            }
        }
        for axis in (0..dims.len()).rev() {
            index[axis] += 1;
            if index[axis] < dims[axis].0 {
                break;
            }
            index[axis] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors::FileDtype;

    #[test]
    fn spans_lie_in_their_storage_and_use_nothing_twice() {
        assert_eq!(span(&[2, 3], &[3, 1], 0, 6), Ok(0..6));
        assert_eq!(span(&[3, 2], &[1, 3], 4, 10), Ok(4..10));
        assert_eq!(span(&[], &[], 5, 6), Ok(5..6));
        assert_eq!(span(&[2, 1, 2], &[4, 77, 2], 1, 8), Ok(1..8));
        assert_eq!(span(&[0, 9], &[u64::MAX, 1], 3, 3), Ok(3..3));
        for (shape, strides, offset, len) in [
            (vec![2, 3], vec![3, 1], 1, 6),
            (vec![4], vec![0], 0, 4),
            (vec![3, 2], vec![1, 1], 0, 6),
            (vec![2], vec![u64::MAX], 0, 6),
            (vec![u64::MAX], vec![2], 0, 6),
            (vec![1], vec![1], u64::MAX, 6),
            (vec![0], vec![1], 7, 6),
            (vec![2], vec![], 0, 6),
        ] {
            assert!(
                span(&shape, &strides, offset, len).is_err(),
                "{shape:?} {strides:?}"
            );
        }
    }

    #[test]
    fn gathering_is_indexing() {
        // Larger than a tile in both inner dimensions, and every order of the axes.
        let dims = [2u64, 37, 45];
        let elements: u64 = dims.iter().product();
        let bytes: Vec<u8> = (0..elements as u16).flat_map(u16::to_le_bytes).collect();
        let dense = row_major(&dims);
        for order in [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ] {
            let shape: Vec<u64> = order.iter().map(|&a| dims[a]).collect();
            let strides: Vec<u64> = order.iter().map(|&a| dense[a]).collect();
            let info = TensorInfo {
                name: String::new(),
                dtype: FileDtype::U16,
                shape: shape.clone(),
                range: 0..bytes.len() as u64,
            };
            let mut out = Vec::new();
            gather(&info, &strides, &bytes, &mut out);
            let mut expected = Vec::new();
            for i in 0..shape[0] {
                for j in 0..shape[1] {
                    for k in 0..shape[2] {
                        let at = i * strides[0] + j * strides[1] + k * strides[2];
                        expected.extend((at as u16).to_le_bytes());
                    }
                }
            }
            assert_eq!(out, expected, "{order:?}");
            assert_eq!(is_row_major(&shape, &strides), order == [0, 1, 2]);
        }
    }
}
