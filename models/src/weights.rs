//! One file of weights in any of the formats that a checkpoint may have, and how the formats name their files.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::safetensors::{INDEX_FILE, SINGLE_FILE, SafetensorsFile, TensorInfo};
use crate::strided::StridedFile;
use crate::torch::{PYTORCH_FILE, PYTORCH_INDEX_FILE};

/// A format in which a model's folder may hold weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Safetensors,
    Torch,
}

impl Format {
    /// In the order of preference.
    pub(crate) const ALL: [Format; 2] = [Format::Safetensors, Format::Torch];

    /// The file of a checkpoint in one piece.
    pub(crate) fn single(self) -> &'static str {
        match self {
            Format::Safetensors => SINGLE_FILE,
            Format::Torch => PYTORCH_FILE,
        }
    }

    /// The index of a checkpoint in shards.
    pub(crate) fn index(self) -> &'static str {
        match self {
            Format::Safetensors => INDEX_FILE,
            Format::Torch => PYTORCH_INDEX_FILE,
        }
    }

    /// How the names of shards end.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Format::Safetensors => ".safetensors",
            Format::Torch => ".bin",
        }
    }
}

/// An open file of weights.
#[derive(Debug)]
pub(crate) enum WeightsFile {
    Safetensors(SafetensorsFile),
    Strided(StridedFile),
}

impl WeightsFile {
    pub(crate) fn name(&self) -> &str {
        match self {
            WeightsFile::Safetensors(file) => file.name(),
            WeightsFile::Strided(file) => file.name(),
        }
    }

    pub(crate) fn metadata(&self) -> &BTreeMap<String, String> {
        match self {
            WeightsFile::Safetensors(file) => file.metadata(),
            WeightsFile::Strided(file) => file.metadata(),
        }
    }

    pub(crate) fn tensors(&self) -> &[TensorInfo] {
        match self {
            WeightsFile::Safetensors(file) => file.infos(),
            WeightsFile::Strided(file) => file.tensors(),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&TensorInfo> {
        match self {
            WeightsFile::Safetensors(file) => file.get(name),
            WeightsFile::Strided(file) => file.get(name),
        }
    }

    pub(crate) fn read_into(&mut self, name: &str, into: &mut [u8]) -> Result<()> {
        match self {
            WeightsFile::Safetensors(file) => file.read_into(name, into),
            WeightsFile::Strided(file) => file.read_into(name, into),
        }
    }

    pub(crate) fn read_each(
        &mut self,
        wanted: &mut dyn FnMut(&TensorInfo) -> bool,
        visit: &mut dyn FnMut(&TensorInfo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        match self {
            WeightsFile::Safetensors(file) => file.read_each(wanted, visit),
            WeightsFile::Strided(file) => file.read_each(wanted, visit),
        }
    }

    pub(crate) fn read_pieces(
        &mut self,
        wanted: &mut dyn FnMut(&TensorInfo) -> bool,
        visit: &mut dyn FnMut(&TensorInfo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        match self {
            WeightsFile::Safetensors(file) => file.read_pieces(wanted, visit),
            WeightsFile::Strided(file) => file.read_each(wanted, visit),
        }
    }
}
