//! Weights as codes: NF4 and int8 by blocks of 64, to be read a run of elements at a time.
//!
//! A matrix is quantised as the row of its elements, whatever its shape: block b holds the elements `64 b .. 64 b + 64`,
//! and the last one what is left. What stands for an element is a code and its block's largest magnitude.
//!
//! * **NF4** (T. Dettmers et al., "QLoRA", 2023): 4 bits, the nearest of [`NF4`] to x / absmax, two to a byte, the first in
//!   the upper half. The largest magnitudes are themselves quantised: the distance of each from the mean of all as a code of
//!   [`DYNAMIC`], times the largest distance of its group of 256. That is 4 + 8/64 + 32/(64·256) = 4.127 bits an element.
//!   Codes are those of bitsandbytes to the bit; where its compiled search for CPUs approximates, those of its exact one.
//! * **int8**: the nearest integer to 127 x / absmax, ties to even (T. Dettmers et al., "LLM.int8()", 2022, 2.1), with f32
//!   magnitudes: 8.5 bits. There the blocks are rows, which are longer; blocks as short as NF4's bear outliers better, and
//!   do not ask how the matrix is laid out.
//!
//! All of it is in one range of bytes, so that a quantised matrix is allocated, counted and hashed like any other:
//!
//! ```text
//! NF4   offset f32 | group absmax f32 [ceil(blocks / 256)] | absmax codes u8 [blocks] | codes u8 [ceil(n / 2)]
//! int8  absmax f32 [blocks] | codes i8 [n]
//! ```
//! Numbers are little-endian; each part begins at a multiple of 16 bytes.

mod table;
mod unpack;

use rayon::prelude::*;

use crate::element::Float;
use crate::simd::{Isa, kernel, public};
pub use table::{DYNAMIC, NF4};
use table::{NF4_MIDDLES, NF4_ZERO};

/// Elements of a block.
pub const BLOCK: usize = 64;
/// Blocks whose magnitudes are quantised together.
pub const GROUP: usize = 256;
/// Parts of the bytes begin at a multiple of this.
const ALIGN: usize = 16;
/// Elements that are read or written by one thread at a time; whole blocks.
const CHUNK: usize = 64 * BLOCK;

/// How elements are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 4-bit codes of [`NF4`], doubly quantised
    Nf4,
    /// 8-bit integers
    Int8,
}

/// Where the parts of a range of bytes begin, and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Magnitudes of blocks: codes (NF4) or f32 (int8).
    pub absmax: usize,
    /// Codes of elements.
    pub codes: usize,
    /// Bytes in all.
    pub bytes: usize,
}

impl Format {
    /// The parts of `count` elements.
    pub fn parts(self, count: usize) -> Parts {
        let blocks = count.div_ceil(BLOCK);
        match self {
            Format::Nf4 => {
                let absmax = (4 + 4 * blocks.div_ceil(GROUP)).next_multiple_of(ALIGN);
                let codes = (absmax + blocks).next_multiple_of(ALIGN);
                let bytes = codes + count.div_ceil(2);
                Parts {
                    absmax,
                    codes,
                    bytes,
                }
            }
            Format::Int8 => {
                let codes = (4 * blocks).next_multiple_of(ALIGN);
                Parts {
                    absmax: 0,
                    codes,
                    bytes: codes + count,
                }
            }
        }
    }

    /// Bytes of `count` elements.
    pub fn bytes(self, count: usize) -> usize {
        match count {
            0 => 0,
            _ => self.parts(count).bytes,
        }
    }
}

/// Quantised elements, to be read: all of a range of bytes, or those from one on.
#[derive(Clone, Copy, Debug)]
pub struct Codes<'a> {
    format: Format,
    /// The first that belongs to these, counted from the first in `bytes`.
    first: usize,
    count: usize,
    bytes: &'a [u8],
    parts: Parts,
    isa: Isa,
}

fn f32_at(bytes: &[u8], at: usize) -> f32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    f32::from_le_bytes(four)
}

impl<'a> Codes<'a> {
    /// `count` elements in `bytes`, which [`quantise`] wrote.
    ///
    /// # Panics
    /// If there are not [`Format::bytes`] of them.
    pub fn new(format: Format, count: usize, bytes: &'a [u8]) -> Codes<'a> {
        assert_eq!(
            bytes.len(),
            format.bytes(count),
            "{format:?} codes of {count} elements have another number of bytes"
        );
        Codes {
            format,
            first: 0,
            count,
            bytes,
            parts: format.parts(count),
            isa: Isa::detect(),
        }
    }

    /// Those behind the first `count`; none if there are no more than that.
    pub fn skip(self, count: usize) -> Codes<'a> {
        Codes {
            first: self.first + count,
            count: self.count.saturating_sub(count),
            ..self
        }
    }

    /// Where all of the range lie, for hints: an address and a number of bytes.
    pub(crate) fn place(&self) -> (usize, usize) {
        (self.bytes.as_ptr().addr(), self.bytes.len())
    }

    /// The same, read by a given instruction set.
    pub fn on(self, isa: Isa) -> Codes<'a> {
        Codes {
            isa: isa.or_portable(),
            ..self
        }
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.count
    }

    /// What the codes of a block are multiplied by.
    #[inline(always)]
    fn scale(&self, block: usize) -> f32 {
        match self.format {
            Format::Nf4 => {
                let code = self.bytes[self.parts.absmax + block];
                // One rounding each for the product and the sum, as everywhere.
                let distance =
                    DYNAMIC[usize::from(code)] * f32_at(self.bytes, 4 + 4 * (block / GROUP));
                distance + f32_at(self.bytes, 0)
            }
            Format::Int8 => f32_at(self.bytes, 4 * block) / 127.0,
        }
    }

    /// Writes elements `first..` as f32, as many as `out` has room for.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn read(&self, first: usize, out: &mut [f32]) {
        assert!(
            first + out.len() <= self.count,
            "elements {first}.. of {}",
            self.count
        );
        // SAFETY: so many elements are there, and so much room.
        unsafe { unpack::read(self, self.first + first, out.as_mut_ptr(), out.len()) }
    }

    /// As [`Codes::read`], to where nothing need have been written yet.
    ///
    /// # Safety
    /// `first + len <= count`; `len` elements may be written at `out`.
    #[inline(always)]
    pub(crate) unsafe fn read_to(&self, first: usize, out: *mut f32, len: usize) {
        debug_assert!(len == 0 || first + len <= self.count);
        // SAFETY: by the caller.
        unsafe { unpack::read(self, self.first + first, out, len) }
    }
}

/// An element that is not finite, which no code stands for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NotFinite {
    /// Its number.
    pub at: usize,
}

/// Workspace that [`quantise`] needs, in elements: the blocks' largest magnitudes, where they are quantised too.
pub fn quantise_workspace(format: Format, count: usize) -> usize {
    match format {
        Format::Nf4 => count.div_ceil(BLOCK),
        Format::Int8 => 0,
    }
}

public! {
    /// Quantises x into `bytes`, [`Format::bytes`] of them. workspace: at least [`quantise_workspace`].
    ///
    /// # Errors
    /// The first element that is not finite; `bytes` is then as it was.
    ///
    /// # Panics
    /// If `bytes` has another length, or the workspace is too short.
    pub fn quantise, quantise_with[](
        isa: Isa,
        format: Format,
        x: &[f32],
        bytes: &mut [u8],
        workspace: &mut [f32],
    ) -> Result<(), NotFinite> {
        assert_eq!(
            bytes.len(),
            format.bytes(x.len()),
            "{format:?} codes of {} elements have another number of bytes",
            x.len()
        );
        if x.is_empty() {
            return Ok(());
        }
        // In parts of equal size, so that which one is reported does not depend on who is first.
        let bad = x.par_chunks(CHUNK).enumerate().find_map_first(|(i, x)| {
            let at = x.iter().position(|x| !x.is_finite())?;
            Some(NotFinite { at: i * CHUNK + at })
        });
        if let Some(bad) = bad {
            return Err(bad);
        }
        let parts = format.parts(x.len());
        let (head, codes) = bytes.split_at_mut(parts.codes);
        head.fill(0);
        match format {
            Format::Nf4 => {
                let absmax = &mut workspace[..x.len().div_ceil(BLOCK)];
                absmax
                    .par_chunks_mut(CHUNK / BLOCK)
                    .zip(x.par_chunks(CHUNK))
                    .zip(codes.par_chunks_mut(CHUNK / 2))
                    .for_each(|((absmax, x), codes)| nf4(isa, x, absmax, codes));
                // Its order of sums is nobody's: the correctly rounded mean is what others come near.
                let sum: f64 = absmax.iter().map(|&x| f64::from(x)).sum();
                let offset = (sum / absmax.len() as f64) as f32;
                write_magnitudes(absmax, offset, head);
            }
            Format::Int8 => {
                head[..4 * x.len().div_ceil(BLOCK)]
                    .par_chunks_mut(4 * CHUNK / BLOCK)
                    .zip(x.par_chunks(CHUNK))
                    .zip(codes.par_chunks_mut(CHUNK))
                    .for_each(|((absmax, x), codes)| int8(isa, x, absmax, codes));
            }
        }
        Ok(())
    }
}

/// Writes what stands in front of NF4's codes: of blocks of these largest magnitudes, whose mean is `offset`.
///
/// # Panics
/// If `head` is shorter than the parts in front of the codes.
pub fn write_magnitudes(absmax: &[f32], offset: f32, head: &mut [u8]) {
    let at = Format::Nf4.parts(absmax.len() * BLOCK).absmax;
    let (groups, codes) = head.split_at_mut(at);
    groups[..4].copy_from_slice(&offset.to_le_bytes());
    let mut groups = groups[4..].chunks_exact_mut(4);
    table::compress(absmax, offset, &mut codes[..absmax.len()], |largest| {
        if let Some(to) = groups.next() {
            to.copy_from_slice(&largest.to_le_bytes());
        }
    });
}

/// The largest magnitude of a block.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    x.iter()
        .fold(0.0f32, |max, x| if x.abs() > max { x.abs() } else { max })
}

kernel! {
    /// Codes of whole blocks and perhaps a short last one.
    fn nf4[A: Arch](isa: Isa, x: &[f32], absmax: &mut [f32], codes: &mut [u8]) {
        for ((x, absmax), codes) in x
            .chunks(BLOCK)
            .zip(absmax)
            .zip(codes.chunks_mut(BLOCK / 2))
        {
            *absmax = largest(x);
            let inverse = 1.0 / absmax.max(1e-38);
            let mut wide = [NF4_ZERO; BLOCK];
            for (code, x) in wide.iter_mut().zip(x) {
                let scaled = x * inverse;
                // Counted rather than searched for: no branch depends on the data.
                *code = NF4_MIDDLES.iter().map(|middle| u8::from(scaled > *middle)).sum();
            }
            for (code, pair) in codes.iter_mut().zip(wide.chunks_exact(2)) {
                *code = pair[0] << 4 | pair[1];
            }
        }
    }
}

kernel! {
    /// Codes of whole blocks and perhaps a short last one, and their magnitudes, little-endian.
    fn int8[A: Arch](isa: Isa, x: &[f32], absmax: &mut [u8], codes: &mut [u8]) {
        for ((x, absmax), codes) in x
            .chunks(BLOCK)
            .zip(absmax.chunks_exact_mut(4))
            .zip(codes.chunks_mut(BLOCK))
        {
            let largest = largest(x);
            absmax.copy_from_slice(&largest.to_le_bytes());
            let factor = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            for (code, x) in codes.iter_mut().zip(x) {
                // A factor that overflows belongs to magnitudes that are as good as 0.
                *code = (x * factor).round_ties_even() as i8 as u8;
            }
        }
    }
}

public! {
    /// All elements in another type.
    ///
    /// # Panics
    /// If `out` has another length.
    pub fn dequantise, dequantise_with[T: Float<Acc = f32>](isa: Isa, codes: Codes, out: &mut [T]) {
        assert_eq!(out.len(), codes.count, "dequantise: other numbers of elements");
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
            let mut wide = [0.0f32; CHUNK];
            let wide = &mut wide[..out.len()];
            codes.on(isa).read(i * CHUNK, wide);
            for (y, &x) in out.iter_mut().zip(&*wide) {
                *y = T::narrow(x);
            }
        });
    }
}
