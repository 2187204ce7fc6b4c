//! Element types as values.

use std::fmt;

use graft_kernels::quantised::Format;

/// The type of a tensor's elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum DType {
    /// 32-bit IEEE float
    F32,
    /// 64-bit IEEE float, for gradient checks
    F64,
    /// bfloat16
    Bf16,
    /// 16-bit IEEE float
    F16,
    /// 64-bit signed integer: token ids, labels, offsets
    I64,
    /// 32-bit signed integer
    I32,
    /// byte
    U8,
    /// 4-bit codes of blocks of 64 elements, with doubly quantised magnitudes: frozen weights
    Nf4,
    /// 8-bit codes of blocks of 64 elements: frozen weights
    Int8,
}

impl DType {
    /// Bytes per element; 1 for types whose elements share bytes with others, of which [`DType::bytes`] knows more.
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::U8 | DType::Nf4 | DType::Int8 => 1,
        }
    }

    /// Bytes of so many elements.
    pub fn bytes(self, count: usize) -> usize {
        match self.format() {
            Some(format) => format.bytes(count),
            None => count.saturating_mul(self.size()),
        }
    }

    /// How elements are coded, of the types that are codes.
    pub fn format(self) -> Option<Format> {
        match self {
            DType::Nf4 => Some(Format::Nf4),
            DType::Int8 => Some(Format::Int8),
            _ => None,
        }
    }

    /// True for codes, which only frozen weights can be.
    pub fn is_quantised(self) -> bool {
        self.format().is_some()
    }

    /// True for ids, labels and offsets, which steer the shapes.
    pub fn is_integer(self) -> bool {
        matches!(self, DType::I64 | DType::I32 | DType::U8)
    }

    /// True for the types that gradients can have.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64 | DType::Bf16 | DType::F16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I64 => "i64",
            DType::I32 => "i32",
            DType::U8 => "u8",
            DType::Nf4 => "nf4",
            DType::Int8 => "int8",
        })
    }
}
