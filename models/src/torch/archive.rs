//! The directory of the zip archive that `torch.save` writes.
//!
//! Stricter than a general reader, since there is one writer: every entry is stored without compression (so nothing
//! unpacks to more than it is), names are distinct plain paths under one folder, entries do not share bytes, and the
//! directory is where the end says it is. Sizes of 64 bits are read. Checksums are not: PyTorch itself writes wrong
//! ones when asked to save time.
//!
//! Source: APPNOTE.TXT of PKWARE, sections 4.3.7 to 4.3.16 and 4.5.3.

use std::collections::HashMap;
use std::ops::Range;

use super::refusal::{Refusal, Refused};
use crate::error::Shown;

/// Longest directory, in bytes. An entry takes some 70.
pub(super) const MAX_DIRECTORY: u64 = 64 << 20;

/// Bytes from the end in which the end record must begin: its own, and the longest comment.
pub(super) const END_BYTES: u64 = 22 + 0xffff;

/// Bytes of a local header in front of its name.
pub(super) const LOCAL: u64 = 30;

const END_SIGNATURE: &[u8; 4] = b"PK\x05\x06";
const LOCATOR_SIGNATURE: &[u8; 4] = b"PK\x06\x07";
const END64_SIGNATURE: &[u8; 4] = b"PK\x06\x06";
const ENTRY_SIGNATURE: &[u8; 4] = b"PK\x01\x02";
const LOCAL_SIGNATURE: &[u8; 4] = b"PK\x03\x04";

/// Where the directory lies.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct End {
    pub directory: Range<u64>,
    pub entries: u64,
}

/// An entry of the directory.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: String,
    /// Bytes of its content.
    pub len: u64,
    /// Where its local header begins.
    pub header: u64,
    /// Where it stands in the directory.
    at: u64,
}

/// Little-endian numbers from a slice; `None` beyond its end.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(N)?)?;
    let mut wide = [0; 8];
    wide[..N].copy_from_slice(field);
    Some(u64::from_le_bytes(wide))
}

impl End {
    /// Finds the end record in the file's last bytes, `tail`, and follows it to the one with 64-bit sizes if that is
    /// there too.
    pub(super) fn find(tail: &[u8], file_len: u64) -> Refused<End> {
        let base = file_len - tail.len() as u64;
        let end = (0..tail.len().saturating_sub(21))
            .rev()
            .find(|&at| {
                // The comment fills the rest: a signature inside a comment is none.
                tail[at..].starts_with(END_SIGNATURE)
                    && number::<2>(tail, at + 20) == Some((tail.len() - at - 22) as u64)
            })
            .ok_or_else(|| {
                let reason =
                    "the zip archive's directory is missing at its end: the file was cut off";
                Refusal::truncated(file_len, reason)
            })?;
        let place = base + end as u64;
        let field2 = |at: usize| number::<2>(tail, end + at).unwrap_or_default();
        let field4 = |at: usize| number::<4>(tail, end + at).unwrap_or_default();
        let locator = end
            .checked_sub(20)
            .filter(|&at| tail[at..].starts_with(LOCATOR_SIGNATURE));
        let (disks, entries, len, start, limit) = match locator {
            None => (
                [field2(4), field2(6)],
                [field2(8), field2(10)],
                field4(12),
                field4(16),
                place,
            ),
            Some(locator) => {
                let place64 = number::<8>(tail, locator + 8).unwrap_or_default();
                let at = place64
                    .checked_sub(base)
                    .and_then(|at| usize::try_from(at).ok())
                    .filter(|&at| {
                        // From the locator backwards: the place is whatever the file says.
                        locator.checked_sub(56).is_some_and(|last| at <= last)
                            && tail[at..].starts_with(END64_SIGNATURE)
                    })
                    .ok_or_else(|| {
                        let reason = format!(
                            "no 64-bit end record at {place64}, where the archive's locator points"
                        );
                        Refusal::damaged(base + locator as u64, reason)
                    })?;
                let wide = |field: usize| number::<8>(tail, at + field).unwrap_or_default();
                let narrow = |field: usize| number::<4>(tail, at + field).unwrap_or_default();
                (
                    [narrow(16), narrow(20)],
                    [wide(24), wide(32)],
                    wide(40),
                    wide(48),
                    place64,
                )
            }
        };
        if disks != [0, 0] || entries[0] != entries[1] {
            return Err(Refusal::damaged(place, "an archive in several parts"));
        }
        let range = start
            .checked_add(len)
            .filter(|&end| end <= limit)
            .map(|end| start..end);
        let Some(directory) = range else {
            let reason =
                format!("a directory of {len} bytes at {start}, beyond the record that names it");
            return Err(Refusal::damaged(place, reason));
        };
        if len > MAX_DIRECTORY || entries[0] > len / 46 {
            let reason = format!("a directory of {} entries in {len} bytes", entries[0]);
            return Err(Refusal::damaged(place, reason));
        }
        Ok(End {
            directory,
            entries: entries[0],
        })
    }

    /// Parses the directory's bytes. The entries rise by their place in the file and do not overlap there.
    pub(super) fn parse(&self, bytes: &[u8]) -> Refused<Vec<Entry>> {
        let base = self.directory.start;
        let mut entries = Vec::new();
        let mut names: HashMap<String, u64> = HashMap::new();
        let mut at = 0;
        for _ in 0..self.entries {
            let (entry, next) = self.entry(bytes, at)?;
            if let Some(first) = names.insert(entry.name.clone(), entry.at) {
                let name = Shown(&entry.name);
                let reason = format!("a second entry `{name}`, the first is named at {first}");
                return Err(Refusal::damaged(entry.at, reason));
            }
            entries.push(entry);
            at = next;
        }
        if at != bytes.len() {
            let reason = format!(
                "{} bytes of the directory belong to no entry",
                bytes.len() - at
            );
            return Err(Refusal::damaged(base + at as u64, reason));
        }
        entries.sort_by_key(|entry| entry.header);
        let mut position = 0;
        for entry in &entries {
            // At the least: the local header may hold more than the name.
            let end = [LOCAL, entry.name.len() as u64, entry.len]
                .into_iter()
                .try_fold(entry.header, u64::checked_add)
                .filter(|&end| end <= base);
            match end {
                Some(end) if entry.header >= position => position = end,
                _ => {
                    let name = Shown(&entry.name);
                    let reason = format!(
                        "entry `{name}` of {} bytes at {} overlaps another one or the directory",
                        entry.len, entry.header
                    );
                    return Err(Refusal::damaged(entry.at, reason));
                }
            }
        }
        Ok(entries)
    }

    /// The entry at `at`, and where the next one begins.
    fn entry(&self, bytes: &[u8], at: usize) -> Refused<(Entry, usize)> {
        let place = self.directory.start + at as u64;
        let broken =
            |reason: &str| Refusal::damaged(place, format!("an entry of the directory: {reason}"));
        let head = bytes
            .get(at..at + 46)
            .ok_or_else(|| broken("it is cut off"))?;
        if !head.starts_with(ENTRY_SIGNATURE) {
            return Err(broken("it does not begin with its signature"));
        }
        let field2 = |at: usize| number::<2>(head, at).unwrap_or_default();
        let field4 = |at: usize| number::<4>(head, at).unwrap_or_default();
        let (flags, method) = (field2(8), field2(10));
        let (name_len, extra_len, comment_len) = (
            field2(28) as usize,
            field2(30) as usize,
            field2(32) as usize,
        );
        let next = at + 46 + name_len + extra_len + comment_len;
        if next > bytes.len() {
            return Err(broken("it is cut off"));
        }
        let name = plain_path(&bytes[at + 46..at + 46 + name_len])
            .map_err(|reason| Refusal::damaged(place, reason))?;
        let extra = &bytes[at + 46 + name_len..at + 46 + name_len + extra_len];
        // Sizes of 64 bits stand in the extra field, in this order, each only where its field here is full.
        let mut wide = zip64(extra).ok_or_else(|| broken("its extra field is malformed"))?;
        let mut size = |field: u64| match field {
            0xffff_ffff => {
                let value = number::<8>(wide, 0);
                wide = wide.get(8..).unwrap_or_default();
                value.ok_or_else(|| broken("a 64-bit size is missing"))
            }
            field => Ok(field),
        };
        let len = size(field4(24))?;
        let packed = size(field4(20))?;
        let header = size(field4(42))?;
        let shown = Shown(&name);
        if method != 0 || len != packed {
            let reason = format!(
                "entry `{shown}` is compressed (method {method}, {packed} bytes to {len}); torch.save stores entries \
                 as they are"
            );
            return Err(Refusal::convert(place, reason));
        }
        if flags & 0x41 != 0 || field2(34) != 0 {
            let reason =
                format!("entry `{shown}` is encrypted or lies in another part of the archive");
            return Err(Refusal::damaged(place, reason));
        }
        let entry = Entry {
            name,
            len,
            header,
            at: place,
        };
        Ok((entry, next))
    }
}

/// The content of the extra field's part with 64-bit sizes, empty if there is none; `None` if the parts do not fill
/// the field.
fn zip64(extra: &[u8]) -> Option<&[u8]> {
    let mut rest = extra;
    let mut found: &[u8] = &[];
    while !rest.is_empty() {
        let (id, len) = (number::<2>(rest, 0)?, number::<2>(rest, 2)? as usize);
        let content = rest.get(4..4 + len)?;
        if id == 1 {
            found = content;
        }
        rest = &rest[4 + len..];
    }
    Some(found)
}

/// A name that is a relative path without detours. Nothing is ever unpacked; a name like that is a sign of intent.
fn plain_path(bytes: &[u8]) -> Result<String, String> {
    let name =
        std::str::from_utf8(bytes).map_err(|_| "an entry's name is not UTF-8".to_string())?;
    let plain = !name.is_empty()
        && !name.contains(['\\', '\0', ':'])
        && name.split('/').all(|part| !matches!(part, "" | "." | ".."));
    match plain {
        true => Ok(name.to_string()),
        false => Err(format!("entry `{}` is not a plain path", Shown(name))),
    }
}

/// Checks the local header in front of an entry's content; gives the range of the content.
///
/// `bytes` are the header's first [`LOCAL`] bytes and, behind them, the name; `limit` is where the next entry begins.
pub(super) fn content(entry: &Entry, bytes: &[u8], limit: u64) -> Refused<Range<u64>> {
    let name = Shown(&entry.name);
    let broken =
        |reason: String| Refusal::damaged(entry.header, format!("entry `{name}`: {reason}"));
    if !bytes.starts_with(LOCAL_SIGNATURE) {
        return Err(broken(
            "there is no local header where the directory says".to_string(),
        ));
    }
    let name_len = number::<2>(bytes, 26).unwrap_or_default();
    let extra_len = number::<2>(bytes, 28).unwrap_or_default();
    if number::<2>(bytes, 8) != Some(0)
        || bytes.get(LOCAL as usize..) != Some(entry.name.as_bytes())
        || name_len != entry.name.len() as u64
    {
        return Err(broken(
            "its local header and the directory disagree".to_string(),
        ));
    }
    // Cannot overflow: all are small but the place, which lies in the file.
    let start = entry.header + LOCAL + name_len + extra_len;
    match start.checked_add(entry.len) {
        Some(end) if end <= limit => Ok(start..end),
        _ => Err(broken(format!(
            "its {} bytes do not fit in front of {limit}",
            entry.len
        ))),
    }
}
