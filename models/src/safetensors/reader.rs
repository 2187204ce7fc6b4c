//! Reads one safetensors file, from a plain file or from anything else that can be read from an offset.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use super::header::{Header, PREFIX, TensorInfo};
use super::problem::Problem;
use crate::error::{Error, Result, Shown, nearest_name};

/// Bytes of a piece of a tensor.
const PIECE: u64 = 1 << 20;

/// Bytes that can be read from any offset on, perhaps at the cost of reading all bytes before it.
///
/// This is what a compressed entry of an archive can offer: it has no seek, but it can be started again. A plain
/// `Read + Seek` has [`Seekable`].
pub trait ByteSource: Send {
    /// Number of bytes, as far as can be known without reading them.
    fn byte_len(&self) -> u64;

    /// Calls `body` with a reader that stands at `offset`.
    ///
    /// # Errors
    /// What the source or `body` returned.
    fn read_from(
        &mut self,
        offset: u64,
        body: &mut dyn FnMut(&mut dyn Read) -> io::Result<()>,
    ) -> io::Result<()>;

    /// Calls `body` for each of `ranges`, which rise and do not overlap, with its number and a reader of its bytes.
    ///
    /// By default in one pass from the first range on, to the end of the source if the last range ends there: a
    /// source that knows a checksum has then compared it.
    ///
    /// # Errors
    /// What the source or `body` returned.
    fn read_ranges(
        &mut self,
        ranges: &[Range<u64>],
        body: &mut dyn FnMut(usize, &mut dyn Read) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(first) = ranges.first() else {
            return Ok(());
        };
        let len = self.byte_len();
        self.read_from(first.start, &mut |reader| {
            let mut position = first.start;
            for (i, range) in ranges.iter().enumerate() {
                skip(reader, range.start - position)?;
                let mut limited = (&mut *reader).take(range.end - range.start);
                body(i, &mut limited)?;
                let rest = limited.limit();
                skip(reader, rest)?;
                position = range.end;
            }
            if position == len {
                nothing_left(reader)?;
            }
            Ok(())
        })
    }
}

/// A [`ByteSource`] over a reader that can seek.
pub struct Seekable<R> {
    inner: R,
    len: u64,
}

impl<R: Read + Seek + Send> Seekable<R> {
    /// Takes the length from the reader's end.
    ///
    /// # Errors
    /// The reader's, on seeking.
    pub fn new(mut inner: R) -> io::Result<Seekable<R>> {
        let len = inner.seek(SeekFrom::End(0))?;
        Ok(Seekable { inner, len })
    }
}

impl<R: Read + Seek + Send> ByteSource for Seekable<R> {
    fn byte_len(&self) -> u64 {
        self.len
    }

    fn read_from(
        &mut self,
        offset: u64,
        body: &mut dyn FnMut(&mut dyn Read) -> io::Result<()>,
    ) -> io::Result<()> {
        self.inner.seek(SeekFrom::Start(offset))?;
        body(&mut self.inner)
    }

    fn read_ranges(
        &mut self,
        ranges: &[Range<u64>],
        body: &mut dyn FnMut(usize, &mut dyn Read) -> io::Result<()>,
    ) -> io::Result<()> {
        ranges.iter().enumerate().try_for_each(|(i, range)| {
            self.inner.seek(SeekFrom::Start(range.start))?;
            body(i, &mut (&mut self.inner).take(range.end - range.start))
        })
    }
}

/// An open safetensors file whose header has passed every check of [`Header::parse`].
pub struct SafetensorsFile {
    name: String,
    header: Header,
    source: Box<dyn ByteSource>,
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SafetensorsFile")
            .field("name", &self.name)
            .field("tensors", &self.header.tensors().len())
            .finish_non_exhaustive()
    }
}

impl SafetensorsFile {
    /// Opens a file and checks its header; no tensor is read.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Safetensors`] with the reason for refusing the file.
    pub fn open(path: impl AsRef<Path>) -> Result<SafetensorsFile> {
        let path = path.as_ref();
        Self::from_source(path.display().to_string(), plain_file(path)?)
    }

    /// Opens any reader that can seek; `name` stands for it in messages.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`].
    pub fn from_reader(
        name: impl Into<String>,
        reader: impl Read + Seek + Send + 'static,
    ) -> Result<SafetensorsFile> {
        let name = name.into();
        let source = Seekable::new(reader).map_err(|e| Error::io("read", &name, e))?;
        Self::from_source(name, Box::new(source))
    }

    /// Opens any source of bytes; `name` stands for it in messages.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`].
    pub fn from_source(
        name: impl Into<String>,
        mut source: Box<dyn ByteSource>,
    ) -> Result<SafetensorsFile> {
        let name = name.into();
        let file_len = source.byte_len();
        let mut parsed = Err(Problem::TooShort { found: 0 });
        source
            .read_from(0, &mut |reader| {
                parsed = read_header(reader, file_len)?;
                Ok(())
            })
            .map_err(|e| Error::io("read the header of", &name, e))?;
        match parsed {
            Ok(header) => Ok(SafetensorsFile {
                name,
                header,
                source,
            }),
            Err(problem) => Err(Error::Safetensors {
                file: name,
                problem: Box::new(problem),
            }),
        }
    }

    /// The file's name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The free-form strings under `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.header.metadata()
    }

    /// All tensors, in the order of their bytes.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.header.tensors().iter()
    }

    pub(crate) fn infos(&self) -> &[TensorInfo] {
        self.header.tensors()
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.header.get(name)
    }

    /// Reads one tensor's bytes (row-major, little-endian) into `into`, which must be exactly as long.
    ///
    /// From a compressed archive this decompresses everything in front of the tensor; for many tensors use
    /// [`SafetensorsFile::read_each`].
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::ByteLength`], [`Error::Io`], or [`Error::Safetensors`] for an element type
    /// that Graft does not compute with.
    pub fn read_into(&mut self, name: &str, into: &mut [u8]) -> Result<()> {
        let Some(info) = self.header.get(name) else {
            return Err(Error::NoSuchTensor {
                file: self.name.clone(),
                tensor: name.to_string(),
                near: nearest_name(name, self.header.tensors().iter().map(|t| t.name.as_str())),
            });
        };
        supported(&self.name, info)?;
        check_length(&self.name, info, into.len())?;
        self.source
            .read_from(info.range.start, &mut |reader| reader.read_exact(into))
            .map_err(|e| read_error(&self.name, info, e))
    }

    /// Reads all tensors that `wanted` selects in one pass over the file, in the order of their bytes, and hands
    /// each one's bytes (row-major, little-endian) to `visit`.
    ///
    /// One buffer is reused, so memory grows to the largest wanted tensor only. When the last tensor has been read,
    /// a source that knows a checksum has compared it.
    ///
    /// # Errors
    /// Those of [`SafetensorsFile::read_into`], and the first one that `visit` returns.
    pub fn read_each(
        &mut self,
        wanted: &mut dyn FnMut(&TensorInfo) -> bool,
        visit: &mut dyn FnMut(&TensorInfo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.read(u64::MAX, wanted, visit)
    }

    /// [`SafetensorsFile::read_each`] for whoever needs no tensor as a whole: `visit` is handed the bytes of each in pieces
    /// of at most a MiB, one behind the other, and of an empty one once. No more than a piece is in memory.
    ///
    /// # Errors
    /// As there.
    pub fn read_pieces(
        &mut self,
        wanted: &mut dyn FnMut(&TensorInfo) -> bool,
        visit: &mut dyn FnMut(&TensorInfo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        self.read(PIECE, wanted, visit)
    }

    /// Hands the bytes of tensors to `visit`, at most so many at a time.
    fn read(
        &mut self,
        most: u64,
        wanted: &mut dyn FnMut(&TensorInfo) -> bool,
        visit: &mut dyn FnMut(&TensorInfo, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let header = &self.header;
        let name = &self.name;
        let mut chosen = Vec::new();
        for info in header.tensors().iter().filter(|info| wanted(info)) {
            supported(name, info)?;
            chosen.push(info);
        }
        let (Some(first), Some(end)) =
            (chosen.first(), header.tensors().last().map(|t| t.range.end))
        else {
            return Ok(());
        };
        let mut failed = None;
        let mut buffer = Vec::new();
        let mut current = *first;
        let outcome = self.source.read_from(first.range.start, &mut |reader| {
            let mut position = current.range.start;
            for &info in &chosen {
                current = info;
                skip(reader, info.range.start - position)?;
                let mut left = info.byte_len();
                loop {
                    let wanted = left.min(most);
                    // Grows with what is really there: the length of an archive's entry is only a claim.
                    buffer.clear();
                    let read = reader.take(wanted).read_to_end(&mut buffer)?;
                    if (read as u64) < wanted {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    if let Err(error) = visit(info, &buffer) {
                        failed = Some(error);
                        return Ok(());
                    }
                    left -= wanted;
                    if left == 0 {
                        break;
                    }
                }
                position = info.range.end;
            }
            skip(reader, end - position)?;
            nothing_left(reader)
        });
        if let Some(error) = failed {
            return Err(error);
        }
        outcome.map_err(|e| read_error(&self.name, current, e))
    }
}

/// A regular file as a source of bytes.
pub(crate) fn plain_file(path: &Path) -> Result<Box<dyn ByteSource>> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let kind = file.metadata().map_err(|e| Error::io("inspect", path, e))?;
    if !kind.is_file() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
        return Err(Error::io("open", path, source));
    }
    let source = Seekable::new(BufReader::new(file)).map_err(|e| Error::io("read", path, e))?;
    Ok(Box::new(source))
}

/// Reads length and header. The outer error is the source's, the inner one the header's.
fn read_header(reader: &mut dyn Read, file_len: u64) -> io::Result<Result<Header, Problem>> {
    // A little more than the length, so that other formats can be named.
    let mut start = Vec::with_capacity(32);
    reader.take(32).read_to_end(&mut start)?;
    if start.len() as u64 != file_len.min(32) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let length = match Header::check_length(&start, file_len) {
        Ok(length) => length,
        Err(problem) => return Ok(Err(problem)),
    };
    let mut json = start.split_off(PREFIX as usize);
    if length < json.len() as u64 {
        json.truncate(length as usize);
    } else {
        // Not allocated at once: for an entry of an archive, `file_len` is only a claim.
        let rest = length - json.len() as u64;
        if (reader.take(rest).read_to_end(&mut json)? as u64) < rest {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(Header::parse(&json, file_len))
}

/// Reads past `count` bytes.
fn skip(reader: &mut dyn Read, count: u64) -> io::Result<()> {
    if io::copy(&mut reader.take(count), &mut io::sink())? < count {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// Reads the end of a source, which makes an archive compare its checksum.
fn nothing_left(reader: &mut dyn Read) -> io::Result<()> {
    match reader.read(&mut [0u8; 1])? {
        0 => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "more bytes than the archive states",
        )),
    }
}

/// Refuses a buffer that is not exactly as long as a tensor.
pub(crate) fn check_length(file: &str, info: &TensorInfo, found: usize) -> Result<()> {
    match info.byte_len() == found as u64 {
        true => Ok(()),
        false => Err(Error::ByteLength {
            file: file.to_string(),
            tensor: info.name.clone(),
            shape: info.shape.clone(),
            expected: info.byte_len(),
            found: found as u64,
        }),
    }
}

/// Refuses an element type that Graft does not compute with.
pub(crate) fn supported(file: &str, info: &TensorInfo) -> Result<()> {
    if info.dtype.dtype().is_none() {
        let problem = Problem::UnsupportedDtype {
            tensor: info.name.clone(),
            dtype: info.dtype,
        };
        return Err(Error::Safetensors {
            file: file.to_string(),
            problem: Box::new(problem),
        });
    }
    Ok(())
}

fn read_error(file: &str, info: &TensorInfo, source: io::Error) -> Error {
    let range = &info.range;
    let action = format!(
        "read tensor `{}` (bytes {}..{}) of",
        Shown(&info.name),
        range.start,
        range.end
    );
    Error::io(action, file, source)
}
