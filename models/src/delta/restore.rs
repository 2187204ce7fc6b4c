//! Making one file out of the other.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use zip::ZipArchive;

use super::packed::{entry, limited, tensor, width};
use super::weights::{Hashes, Weights, hex, parse_header};
use super::{FORMAT, MANIFEST, Manifest, Origin, Side, check_output, refuse};
use crate::atomic;
use crate::error::{Error, Result, Shown};
use crate::safetensors::{MAX_HEADER_BYTES, TensorInfo};

/// Most bytes of a manifest: a hundred for each of a million tensors.
const MAX_MANIFEST: u64 = 200 << 20;

/// Tensors that a message names at most.
const FEW: usize = 8;

/// A file that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Its SHA-256, in hexadecimal
    pub sha256: String,
    /// Its size
    pub bytes: u64,
    /// Its tensors
    pub tensors: usize,
}

/// Writes to `out` the tuned file of a delta, out of its base.
///
/// # Errors
/// Another base, with the names and hashes of what differs; a delta that is malformed; files that cannot be read or
/// written.
pub fn apply(base: &str, delta: &Path, out: &Path) -> Result<Restored> {
    restore(base, delta, out, Side::Tuned)
}

/// Writes to `out` the base of a delta, out of its tuned file.
///
/// # Errors
/// As [`apply`].
pub fn revert(tuned: &str, delta: &Path, out: &Path) -> Result<Restored> {
    restore(tuned, delta, out, Side::Base)
}

type Zip = ZipArchive<BufReader<File>>;

/// A delta, open and checked.
struct Delta {
    path: PathBuf,
    zip: Zip,
    manifest: Manifest,
    /// Headers and tensors of base and tuned file
    headers: [Vec<u8>; 2],
    tensors: [Vec<TensorInfo>; 2],
}

impl Delta {
    fn open(path: &Path) -> Result<Delta> {
        let malformed = |reason: String| refuse(path, reason, "make the delta again");
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        let mut zip = ZipArchive::new(BufReader::new(file))
            .map_err(|e| malformed(format!("this is no delta: {e}")))?;
        let text = limited(&mut zip, MANIFEST, MAX_MANIFEST);
        let text = text.map_err(|e| malformed(format!("this is no delta: {e}")))?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|e| malformed(format!("{MANIFEST} is malformed: {e}")))?;
        if manifest.format != FORMAT {
            let format = Shown(&manifest.format);
            let reason = format!("its format is `{format}`, expected `{FORMAT}`");
            return Err(refuse(
                path,
                reason,
                "use the version of trainer that made it",
            ));
        }
        let mut header = |side: Side| -> Result<(Vec<u8>, Vec<TensorInfo>)> {
            let name = format!("{}.header", side.name());
            let bytes = limited(&mut zip, &name, MAX_HEADER_BYTES + 8);
            let bytes = bytes.map_err(|e| malformed(e.to_string()))?;
            let (described, origins) = manifest.of(side);
            let tensors = parse_header(path, &bytes, described.bytes)?;
            let counts = [tensors.len(), described.tensors.len(), origins.len()];
            if counts.iter().any(|&count| count != tensors.len()) {
                return Err(malformed(format!(
                    "the {} file has {} tensors, and {MANIFEST} speaks of {} and {}",
                    side.name(),
                    counts[0],
                    counts[1],
                    counts[2]
                )));
            }
            Ok((bytes, tensors))
        };
        let (base, tuned) = (header(Side::Base)?, header(Side::Tuned)?);
        let delta = Delta {
            path: path.to_path_buf(),
            zip,
            manifest,
            headers: [base.0, tuned.0],
            tensors: [base.1, tuned.1],
        };
        for side in [Side::Base, Side::Tuned] {
            delta.check_origins(side).map_err(malformed)?;
        }
        Ok(delta)
    }

    /// Every tensor must come from one that is there and as long.
    fn check_origins(&self, side: Side) -> Result<(), String> {
        let (own, other) = (
            &self.tensors[side as usize],
            &self.tensors[side.other() as usize],
        );
        for (i, origin) in self.manifest.of(side).1.iter().enumerate() {
            let from = match *origin {
                Origin::Same(from) | Origin::Xor(from) => from,
                Origin::Whole => continue,
            };
            let fits = other
                .get(from)
                .is_some_and(|t| t.byte_len() == own[i].byte_len());
            let reason = || {
                let (name, side) = (Shown(&own[i].name), side.name());
                format!(
                    "tensor `{name}` of the {side} file comes from tensor {from}, which does not fit"
                )
            };
            if !fits {
                return Err(reason());
            }
        }
        Ok(())
    }
}

fn restore(from: &str, path: &Path, out: &Path, wanted: Side) -> Result<Restored> {
    check_output(out, &[Path::new(from), path])?;
    let mut delta = Delta::open(path)?;
    let mut weights = Weights::open(from)?;
    check_source(&mut weights, &delta, wanted.other(), path)?;
    let sha256 = delta.manifest.of(wanted).0.sha256.clone();
    let mut failed = None;
    let written = atomic::write_file(out, |file| {
        let mut hash = Sha256::new();
        let mut put = |bytes: &[u8]| {
            hash.update(bytes);
            file.write_all(bytes)
        };
        put(&delta.headers[wanted as usize])?;
        for i in 0..delta.tensors[wanted as usize].len() {
            match one(&mut delta, &mut weights, wanted, i) {
                Ok(bytes) => put(&bytes)?,
                Err(error) => {
                    failed = Some(error);
                    return Err(io::Error::other("the input cannot be used"));
                }
            }
        }
        let found = hex(hash.finalize().as_slice());
        if found != sha256 {
            let reason = format!("what comes out has the SHA-256 {found}, expected {sha256}");
            failed = Some(refuse(path, reason, "make the delta again"));
            return Err(io::Error::other("the output is wrong"));
        }
        Ok(())
    });
    if let Some(error) = failed {
        return Err(error);
    }
    written?;
    Ok(Restored {
        sha256,
        bytes: delta.manifest.of(wanted).0.bytes,
        tensors: delta.tensors[wanted as usize].len(),
    })
}

/// The bytes of one tensor of the wanted file.
fn one(delta: &mut Delta, weights: &mut Weights, wanted: Side, i: usize) -> Result<Vec<u8>> {
    let origin = delta.manifest.of(wanted).1[i];
    let info = &delta.tensors[wanted as usize][i];
    let (length, width) = (info.byte_len(), width(info.dtype.bits()));
    let name = match (origin, wanted) {
        (Origin::Same(from), _) => return weights.read(from),
        (Origin::Xor(_), Side::Tuned) => format!("xor/{i}"),
        (Origin::Xor(tuned), Side::Base) => format!("xor/{tuned}"),
        (Origin::Whole, _) => format!("{}/{i}", wanted.name()),
    };
    let bytes = match width {
        1 => entry(&mut delta.zip, &format!("{name}/0"), length),
        _ => tensor(&mut delta.zip, &name, length, width),
    };
    let mut bytes = bytes.map_err(|e| {
        let reason = format!("tensor `{}`: {e}", Shown(&info.name));
        refuse(&delta.path, reason, "make the delta again")
    })?;
    if let Origin::Xor(from) = origin {
        let other = weights.read(from)?;
        bytes.iter_mut().zip(other).for_each(|(a, b)| *a ^= b);
    }
    Ok(bytes)
}

/// Refuses a file that is not the one the delta was made with, and says in which tensors it is another.
fn check_source(weights: &mut Weights, delta: &Delta, side: Side, path: &Path) -> Result<()> {
    let found = weights.hash()?;
    let (described, _) = delta.manifest.of(side);
    if found.file == described.sha256 {
        return Ok(());
    }
    let delta_name = path.display();
    if found.file == delta.manifest.of(side.other()).0.sha256 {
        let (reason, help) = match side {
            Side::Base => (
                "it is the tuned file already",
                "to get the base, use `trainer revert`",
            ),
            Side::Tuned => (
                "it is the base already",
                "to get the tuned file, use `trainer apply`",
            ),
        };
        return Err(refuse(
            &weights.name,
            format!("{reason} of {delta_name}"),
            help,
        ));
    }
    let mut reason = format!(
        "it is not the {} file of {delta_name}: its SHA-256 is {}, expected {}",
        side.name(),
        found.file,
        described.sha256
    );
    let differing = differences(
        weights,
        &found,
        &delta.tensors[side as usize],
        &described.tensors,
    );
    for line in differing.iter().take(FEW) {
        reason += &format!("\n  {line}");
    }
    match differing.len() {
        0 => reason += "\n  all tensors are the same, and their order or the header is another",
        n if n > FEW => reason += &format!("\n  and {} more", n - FEW),
        _ => {}
    }
    let help = format!("name the {} file that the delta was made with", side.name());
    Err(refuse(&weights.name, reason, help))
}

/// A line for each tensor that is missing, unknown or other.
fn differences(
    weights: &Weights,
    found: &Hashes,
    expected: &[TensorInfo],
    hashes: &[String],
) -> Vec<String> {
    let place = |name: &str| weights.tensors.iter().position(|t| t.name == name);
    let mut lines = Vec::new();
    for (info, hash) in expected.iter().zip(hashes) {
        let name = Shown(&info.name);
        match place(&info.name) {
            None => lines.push(format!("tensor `{name}` is missing")),
            Some(i) if found.tensors[i] != *hash => {
                let now = &found.tensors[i];
                lines.push(format!(
                    "tensor `{name}` has the SHA-256 {now}, expected {hash}"
                ));
            }
            Some(_) => {}
        }
    }
    for info in &weights.tensors {
        if !expected.iter().any(|t| t.name == info.name) {
            lines.push(format!("tensor `{}` is not in it", Shown(&info.name)));
        }
    }
    lines
}
