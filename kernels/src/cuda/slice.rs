//! Ranges of device memory, typed by value.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

/// An element type on the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[allow(missing_docs)]
pub enum Scalar {
    F32,
    F64,
    Bf16,
    F16,
    I64,
    I32,
    U8,
}

impl Scalar {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Scalar::F64 | Scalar::I64 => 8,
            Scalar::F32 | Scalar::I32 => 4,
            Scalar::Bf16 | Scalar::F16 => 2,
            Scalar::U8 => 1,
        }
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scalar::F32 => "f32",
            Scalar::F64 => "f64",
            Scalar::Bf16 => "bf16",
            Scalar::F16 => "f16",
            Scalar::I64 => "i64",
            Scalar::I32 => "i32",
            Scalar::U8 => "u8",
        })
    }
}

/// Elements on the device, to read.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    address: u64,
    count: usize,
    scalar: Scalar,
    memory: PhantomData<&'a ()>,
}

/// Elements on the device, to write.
#[derive(Debug)]
pub struct SliceMut<'a> {
    slice: Slice<'a>,
}

impl<'a> Slice<'a> {
    /// `count` elements from `address`, which whoever calls this owns for `'a`.
    pub(super) fn new(address: u64, count: usize, scalar: Scalar) -> Slice<'a> {
        let memory = PhantomData;
        Slice {
            address,
            count,
            scalar,
            memory,
        }
    }

    /// No elements.
    pub fn empty(scalar: Scalar) -> Slice<'a> {
        Slice::new(0, 0, scalar)
    }

    /// The device address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Number of bytes.
    pub fn bytes(&self) -> usize {
        self.count * self.scalar.size()
    }

    /// The element type.
    pub fn scalar(&self) -> Scalar {
        self.scalar
    }

    /// Elements `range` of this.
    ///
    /// # Panics
    /// If they are not within it.
    pub fn part(self, range: Range<usize>) -> Slice<'a> {
        assert!(
            range.start <= range.end && range.end <= self.count,
            "elements {range:?} of {}",
            self.count
        );
        let address = self.address + (range.start * self.scalar.size()) as u64;
        Slice::new(address, range.len(), self.scalar)
    }
}

impl<'a> SliceMut<'a> {
    /// As [`Slice::new`]; nothing else may read or write the elements for `'a`.
    pub(super) fn new(address: u64, count: usize, scalar: Scalar) -> SliceMut<'a> {
        SliceMut {
            slice: Slice::new(address, count, scalar),
        }
    }

    /// No elements.
    pub fn empty(scalar: Scalar) -> SliceMut<'a> {
        SliceMut::new(0, 0, scalar)
    }

    /// The same elements, to read.
    pub fn as_slice(&self) -> Slice<'_> {
        self.slice
    }

    /// The same elements for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_> {
        SliceMut { slice: self.slice }
    }

    /// Elements `range` of this.
    ///
    /// # Panics
    /// If they are not within it.
    pub fn part(self, range: Range<usize>) -> SliceMut<'a> {
        SliceMut {
            slice: self.slice.part(range),
        }
    }

    /// The device address of the first element.
    pub fn address(&self) -> u64 {
        self.slice.address
    }

    /// Number of elements.
    pub fn count(&self) -> usize {
        self.slice.count
    }

    /// The element type.
    pub fn scalar(&self) -> Scalar {
        self.slice.scalar
    }
}
