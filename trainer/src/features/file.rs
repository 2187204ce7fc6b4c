//! A file of hidden states by text: appended to, read at any place, and trusted in nothing.
//!
//! ```text
//! "graft-features1\n"  SHA-256 of the trunk
//! then for each text:
//!   key, 32 bytes   count of numbers, u64   numbers, f32   SHA-256 of the three
//! ```
//!
//! Everything is little-endian. The file of a run is no part of its directory: it goes when the run ends, and on Unix
//! it has no name from the moment it was created, so that not even a killed run leaves it behind.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use graft_models::atomic;
use sha2::{Digest, Sha256};

use super::Key;

/// The file of a run, while it goes on.
pub(super) const SPILL_FILE: &str = "trunk.features.tmp";

/// Most bytes of a file: disks are for other things too.
pub(super) const FILE_LIMIT: u64 = 16 << 30;

const MAGIC: &[u8; 16] = b"graft-features1\n";
const HEADER: u64 = 48;
/// Bytes of an entry beside its numbers: key and count in front, checksum behind.
const FRONT: usize = 40;
const CHECKSUM: usize = 32;

/// An entry of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    at: u64,
    count: u64,
}

/// An open file of entries.
#[derive(Debug)]
pub(super) struct Entries {
    path: PathBuf,
    file: File,
    end: u64,
    /// To be removed when dropped, where that was not possible at once
    remove: bool,
    /// Whether the user was told that an entry is damaged
    pub damage_said: bool,
}

/// A file that was found, where its texts are, and what is wrong with its end.
type Opened = (Entries, Vec<(Key, Place)>, Option<String>);

impl Entries {
    /// Creates an empty file for this run alone.
    pub fn create(path: &Path, trunk: &Key) -> io::Result<Entries> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)?;
        let remove = !(cfg!(unix) && std::fs::remove_file(path).is_ok());
        let mut entries = Entries {
            path: path.to_path_buf(),
            end: HEADER,
            remove,
            damage_said: false,
            file: file.try_clone()?,
        };
        if let Err(e) = file.write_all(&header(trunk)) {
            entries.end = 0;
            return Err(e);
        }
        Ok(entries)
    }

    /// Opens the file of an earlier run and finds its texts; `None` if there is no such file. An end that is cut off is
    /// left out.
    ///
    /// # Errors
    /// A file that cannot be read, or that is none of this trunk.
    pub fn open(path: &Path, trunk: &Key) -> io::Result<Option<Opened>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let length = file.metadata()?.len();
        let mut reader = BufReader::new(file);
        let mut start = [0; HEADER as usize];
        let read = reader.read_exact(&mut start);
        if read.is_err() || start != header(trunk) {
            let what = "stale or damaged: it was not made with this trunk";
            return Err(io::Error::new(ErrorKind::InvalidData, what));
        }
        let mut places = Vec::new();
        let mut at = HEADER;
        let mut damage = None;
        while at < length {
            let mut front = [0; FRONT];
            let whole = reader.read_exact(&mut front).is_ok().then(|| {
                let count = u64::from_le_bytes(*front[32..].first_chunk().unwrap_or(&[0; 8]));
                let end = size_of_entry(count).and_then(|size| at.checked_add(size));
                Some((count, end.filter(|&end| end <= length)?))
            });
            let Some((count, end)) = whole.flatten() else {
                damage = Some(format!(
                    "{}: damaged from byte {at} on; what cannot be read is computed anew",
                    path.display()
                ));
                break;
            };
            let key = *front.first_chunk().unwrap_or(&[0; 32]);
            places.push((key, Place { at, count }));
            let skip = end - at - FRONT as u64;
            reader.seek_relative(i64::try_from(skip).unwrap_or(i64::MAX))?;
            at = end;
        }
        let entries = Entries {
            path: path.to_path_buf(),
            file: reader.into_inner(),
            end: at,
            remove: false,
            damage_said: damage.is_some(),
        };
        Ok(Some((entries, places, damage)))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn bytes(&self) -> u64 {
        self.end
    }

    /// Appends the numbers of a text.
    ///
    /// # Errors
    /// The system's, after which the file is to be given up.
    pub fn append(&mut self, key: &Key, numbers: &[f32]) -> io::Result<Place> {
        let entry = entry(key, numbers);
        self.file.seek(SeekFrom::Start(self.end))?;
        self.file.write_all(&entry)?;
        let place = Place {
            at: self.end,
            count: numbers.len() as u64,
        };
        self.end += entry.len() as u64;
        Ok(place)
    }

    /// The numbers of a text; `None` if they cannot be read or are not what was written.
    pub fn read(&mut self, key: &Key, place: Place) -> Option<Vec<f32>> {
        let size = usize::try_from(size_of_entry(place.count)?).ok()?;
        let mut bytes = vec![0; size];
        self.file.seek(SeekFrom::Start(place.at)).ok()?;
        self.file.read_exact(&mut bytes).ok()?;
        let (content, checksum) = bytes.split_last_chunk::<CHECKSUM>()?;
        let (front, numbers) = content.split_first_chunk::<FRONT>()?;
        let same = front[..32] == *key
            && front[32..] == place.count.to_le_bytes()
            && Sha256::digest(content)[..] == *checksum;
        let (numbers, _) = numbers.as_chunks::<4>();
        same.then(|| numbers.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }
}

#[cfg(all(test, target_os = "linux"))]
impl Entries {
    /// A file on a disk without any room.
    pub fn full() -> io::Result<Entries> {
        let path = PathBuf::from("/dev/full");
        Ok(Entries {
            file: OpenOptions::new().read(true).write(true).open(&path)?,
            path,
            end: HEADER,
            remove: false,
            damage_said: false,
        })
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        if self.remove {
            // The directory that it is in goes too, or is checked when the run ends.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Writes a file of these entries, whole or not at all, and leaves out those that would make it larger than `limit`.
pub(super) fn write_all(
    path: &Path,
    trunk: &Key,
    entries: impl Iterator<Item = (Key, Vec<f32>)>,
    limit: u64,
) -> io::Result<()> {
    let written = atomic::write_file(path, |out| {
        out.write_all(&header(trunk))?;
        let mut bytes = HEADER;
        for (key, numbers) in entries {
            let entry = entry(&key, &numbers);
            if bytes + entry.len() as u64 > limit {
                break;
            }
            bytes += entry.len() as u64;
            out.write_all(&entry)?;
        }
        Ok(())
    });
    written.map_err(io::Error::other)
}

fn header(trunk: &Key) -> [u8; HEADER as usize] {
    let mut bytes = [0; HEADER as usize];
    bytes[..16].copy_from_slice(MAGIC);
    bytes[16..].copy_from_slice(trunk);
    bytes
}

fn entry(key: &Key, numbers: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FRONT + size_of_val(numbers) + CHECKSUM);
    bytes.extend_from_slice(key);
    bytes.extend_from_slice(&(numbers.len() as u64).to_le_bytes());
    for x in numbers {
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    let checksum = Sha256::digest(&bytes);
    bytes.extend_from_slice(&checksum);
    bytes
}

/// Bytes of an entry of so many numbers.
fn size_of_entry(count: u64) -> Option<u64> {
    count.checked_mul(4)?.checked_add((FRONT + CHECKSUM) as u64)
}
