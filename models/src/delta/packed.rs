//! Entries of a delta: bytes of a kind beside each other, compressed where that pays.

use std::io::{self, Read, Seek, Write};

use zip::write::{SimpleFileOptions, StreamWriter};
use zip::{CompressionMethod, DateTime, ZipArchive, ZipWriter};

/// Bits of information in a byte above which compression is not tried: deflate would gain less than it costs.
const DENSE: f64 = 7.6;

/// Bytes of an element that a tensor's planes are cut by.
pub(super) fn width(bits: u64) -> usize {
    match bits {
        16 => 2,
        32 => 4,
        64 => 8,
        _ => 1,
    }
}

/// Writes entries, in any order.
pub(super) struct Packer<W: Write> {
    zip: ZipWriter<StreamWriter<W>>,
    /// Bytes that went in
    pub given: u64,
}

impl<W: Write> Packer<W> {
    pub fn new(out: W) -> Packer<W> {
        Packer {
            zip: ZipWriter::new_stream(out),
            given: 0,
        }
    }

    /// One entry.
    pub fn entry(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let method = match entropy(bytes) > DENSE {
            true => CompressionMethod::Stored,
            false => CompressionMethod::Deflated,
        };
        // Without a time of day, equal inputs give equal deltas.
        let options = SimpleFileOptions::default()
            .compression_method(method)
            .last_modified_time(DateTime::default())
            .large_file(bytes.len() as u64 >= u64::from(u32::MAX) / 2);
        self.zip
            .start_file(name, options)
            .map_err(io::Error::from)?;
        self.given += bytes.len() as u64;
        self.zip.write_all(bytes)
    }

    /// A tensor's bytes: byte `P` of every element as the entry `NAME/P`.
    pub fn tensor(&mut self, name: &str, bytes: &[u8], width: usize) -> io::Result<()> {
        let mut plane = Vec::with_capacity(bytes.len() / width);
        for p in 0..width {
            plane.clear();
            plane.extend(bytes.iter().skip(p).step_by(width));
            self.entry(&format!("{name}/{p}"), &plane)?;
        }
        Ok(())
    }

    pub fn finish(self) -> io::Result<()> {
        self.zip
            .finish()
            .map_err(io::Error::from)?
            .into_inner()
            .flush()
    }
}

/// Bits of information in a byte, from how often each value occurs.
fn entropy(bytes: &[u8]) -> f64 {
    let mut counts = [0u64; 256];
    bytes
        .iter()
        .for_each(|&byte| counts[usize::from(byte)] += 1);
    let total = bytes.len().max(1) as f64;
    let term = |&count: &u64| {
        let share = count as f64 / total;
        match count {
            0 => 0.0,
            _ => -share * share.log2(),
        }
    };
    counts.iter().map(term).sum()
}

/// Reads the entry of that name, which must have exactly `length` bytes.
pub(super) fn entry<R: Read + Seek>(
    zip: &mut ZipArchive<R>,
    name: &str,
    length: u64,
) -> io::Result<Vec<u8>> {
    let bytes = limited(zip, name, length)?;
    match bytes.len() as u64 == length {
        true => Ok(bytes),
        false => Err(io::Error::other(format!(
            "the entry {name} has {} bytes, expected {length}",
            bytes.len()
        ))),
    }
}

/// Reads the entry of that name, which must have at most `limit` bytes.
pub(super) fn limited<R: Read + Seek>(
    zip: &mut ZipArchive<R>,
    name: &str,
    limit: u64,
) -> io::Result<Vec<u8>> {
    let mut entry = zip
        .by_name(name)
        .map_err(|e| io::Error::other(format!("{name}: {e}")))?;
    let mut bytes = Vec::new();
    (&mut entry).take(limit + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > limit {
        false => Ok(bytes),
        true => Err(io::Error::other(format!(
            "the entry {name} has more than {limit} bytes"
        ))),
    }
}

/// Reads a tensor of `length` bytes that [`Packer::tensor`] wrote.
pub(super) fn tensor<R: Read + Seek>(
    zip: &mut ZipArchive<R>,
    name: &str,
    length: u64,
    width: usize,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for p in 0..width {
        let plane = entry(zip, &format!("{name}/{p}"), length / width as u64)?;
        if p == 0 {
            // As long as the first plane has shown it to be.
            bytes = vec![0; plane.len() * width];
        }
        for (element, byte) in bytes.chunks_exact_mut(width).zip(plane) {
            element[p] = byte;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn information_is_shannons() {
        assert_eq!(entropy(&[]), 0.0);
        assert_eq!(entropy(&[7; 100]), 0.0);
        let all: Vec<u8> = (0..=255).collect();
        assert!((entropy(&all) - 8.0).abs() < 1e-12);
        assert!((entropy(&[0, 0, 1, 1]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn planes_come_back_together() {
        let bytes: Vec<u8> = (0..240).map(|i| (i * 37 % 251) as u8).collect();
        for width in [1, 2, 4, 8] {
            let mut out = Vec::new();
            let mut packer = Packer::new(&mut out);
            packer.tensor("t", &bytes, width).unwrap();
            assert_eq!(packer.given, 240);
            packer.finish().unwrap();
            let mut zip = ZipArchive::new(io::Cursor::new(&out)).unwrap();
            assert_eq!(zip.len(), width);
            assert_eq!(tensor(&mut zip, "t", 240, width).unwrap(), bytes);
            let error = tensor(&mut zip, "t", 248, width).unwrap_err();
            assert!(error.to_string().contains("expected"), "{error}");
            assert!(limited(&mut zip, "t/0", 3).is_err());
        }
    }
}
