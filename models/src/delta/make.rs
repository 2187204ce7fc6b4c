//! Making a delta.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use super::packed::{Packer, width};
use super::weights::{Hashes, Weights};
use super::{Described, FORMAT, MANIFEST, Manifest, Origin, Side, check_output};
use crate::atomic;
use crate::error::{Error, Result};
use crate::safetensors::TensorInfo;

/// What a delta is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Tensors of the tuned file that the base has, bit for bit
    pub same: usize,
    /// Tensors that are a tensor of the base, changed
    pub changed: usize,
    /// Tensors that the base has nothing like
    pub new: usize,
    /// Tensors of the base that the tuned file has nothing like, kept for the way back
    pub gone: usize,
    /// Bytes of both files, base first
    pub files: [u64; 2],
    /// Bytes of the delta
    pub bytes: u64,
}

/// Writes to `out` what it takes to make the tuned file out of the base, and the base out of the tuned file. Either is a
/// safetensors file, or a model with one.
///
/// # Errors
/// Files that cannot be read or written; an output that is one of them.
pub fn diff(base: &str, tuned: &str, out: &Path) -> Result<Made> {
    check_output(out, &[Path::new(base), Path::new(tuned)])?;
    let (mut base, mut tuned) = (Weights::open(base)?, Weights::open(tuned)?);
    let (base_hashes, tuned_hashes) = (base.hash()?, tuned.hash()?);
    let (forward, backward) = origins(&base, &tuned, &base_hashes, &tuned_hashes);
    let count = |wanted: fn(&Origin) -> bool| forward.iter().filter(|o| wanted(o)).count();
    let mut made = Made {
        same: count(|o| matches!(o, Origin::Same(_))),
        changed: count(|o| matches!(o, Origin::Xor(_))),
        new: count(|o| matches!(o, Origin::Whole)),
        gone: backward
            .iter()
            .filter(|o| matches!(o, Origin::Whole))
            .count(),
        files: [base.len(), tuned.len()],
        bytes: 0,
    };
    let describe = |weights: &Weights, hashes: Hashes| Described {
        sha256: hashes.file,
        bytes: weights.len(),
        tensors: hashes.tensors,
    };
    let manifest = Manifest {
        format: FORMAT.to_owned(),
        base: describe(&base, base_hashes),
        tuned: describe(&tuned, tuned_hashes),
        forward,
        backward,
    };
    let mut failed = None;
    let written = atomic::write_file(out, |file| {
        let mut packer = Packer::new(file);
        pack(&manifest, &mut base, &mut tuned, &mut packer, &mut failed)?;
        packer.finish()
    });
    if let Some(error) = failed {
        return Err(error);
    }
    written?;
    made.bytes = std::fs::metadata(out)
        .map_err(|e| Error::io("inspect", out, e))?
        .len();
    Ok(made)
}

/// Where the tensors of each file come from.
fn origins(
    base: &Weights,
    tuned: &Weights,
    base_hashes: &Hashes,
    tuned_hashes: &Hashes,
) -> (Vec<Origin>, Vec<Origin>) {
    let by_hash = |hashes: &Hashes| -> HashMap<String, usize> {
        let numbered = hashes.tensors.iter().cloned().enumerate();
        numbered.map(|(i, hash)| (hash, i)).collect()
    };
    let (in_base, in_tuned) = (by_hash(base_hashes), by_hash(tuned_hashes));
    let mut forward = Vec::with_capacity(tuned.tensors.len());
    let mut backward = vec![Origin::Whole; base.tensors.len()];
    for (j, hash) in base_hashes.tensors.iter().enumerate() {
        if let Some(&i) = in_tuned.get(hash) {
            backward[j] = Origin::Same(i);
        }
    }
    for (i, hash) in tuned_hashes.tensors.iter().enumerate() {
        let origin = match in_base.get(hash) {
            Some(&j) => Origin::Same(j),
            None => match counterpart(&tuned.tensors[i], &base.tensors) {
                Some(j) => {
                    if backward[j] == Origin::Whole {
                        backward[j] = Origin::Xor(i);
                    }
                    Origin::Xor(j)
                }
                None => Origin::Whole,
            },
        };
        forward.push(origin);
    }
    (forward, backward)
}

/// The tensor of the same name, type and shape; a model with a head has a prefix in front of the names of a bare one.
fn counterpart(tensor: &TensorInfo, candidates: &[TensorInfo]) -> Option<usize> {
    let fits = |other: &TensorInfo| other.dtype == tensor.dtype && other.shape == tensor.shape;
    let ends = |long: &str, short: &str| {
        let front = long.strip_suffix(short);
        front.is_some_and(|front| front.is_empty() || front.ends_with('.'))
    };
    let exact = |other: &TensorInfo| fits(other) && other.name == tensor.name;
    let near = |other: &TensorInfo| {
        let (a, b) = (tensor.name.as_str(), other.name.as_str());
        fits(other) && (ends(a, b) || ends(b, a))
    };
    let mut all = candidates.iter();
    let found = all.clone().position(exact);
    found.or_else(|| all.position(near))
}

/// Writes every entry. An error of the files that are read goes to `failed`.
fn pack<W: io::Write>(
    manifest: &Manifest,
    base: &mut Weights,
    tuned: &mut Weights,
    packer: &mut Packer<W>,
    failed: &mut Option<Error>,
) -> io::Result<()> {
    let mut read = |weights: &mut Weights, i: usize| {
        weights.read(i).map_err(|e| {
            *failed = Some(e);
            io::Error::other("the input cannot be read")
        })
    };
    let text = serde_json::to_vec(manifest).map_err(io::Error::from)?;
    packer.entry(MANIFEST, &text)?;
    packer.entry("base.header", &base.header)?;
    packer.entry("tuned.header", &tuned.header)?;
    for (i, origin) in manifest.forward.iter().enumerate() {
        let width = width(tuned.tensors[i].dtype.bits());
        match *origin {
            Origin::Same(_) => {}
            Origin::Xor(j) => {
                let mut bytes = read(tuned, i)?;
                let other = read(base, j)?;
                bytes.iter_mut().zip(other).for_each(|(a, b)| *a ^= b);
                packer.tensor(&format!("xor/{i}"), &bytes, width)?;
            }
            Origin::Whole => {
                let name = format!("{}/{i}", Side::Tuned.name());
                packer.tensor(&name, &read(tuned, i)?, width)?;
            }
        }
    }
    for (j, origin) in manifest.backward.iter().enumerate() {
        if *origin == Origin::Whole {
            let width = width(base.tensors[j].dtype.bits());
            let name = format!("{}/{j}", Side::Base.name());
            packer.tensor(&name, &read(base, j)?, width)?;
        }
    }
    Ok(())
}
