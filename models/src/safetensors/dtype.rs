//! The element types of the format.

use std::fmt;

use graft_tensor::DType;

macro_rules! file_dtypes {
    ($($variant:ident $name:literal $bits:literal $doc:literal,)*) => {
        /// An element type as the format names it; more than Graft computes with.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[allow(missing_docs, reason = "the names are the format's")]
        pub enum FileDtype { $(#[doc = $doc] $variant,)* }

        impl FileDtype {
            /// Every element type of the format, by rising alignment.
            pub const ALL: &'static [FileDtype] = &[$(FileDtype::$variant),*];

            /// The name in the header.
            pub fn name(self) -> &'static str {
                match self { $(FileDtype::$variant => $name,)* }
            }

            /// Bits per element.
            pub fn bits(self) -> u64 {
                match self { $(FileDtype::$variant => $bits,)* }
            }

            pub(crate) fn from_name(name: &str) -> Option<FileDtype> {
                match name { $($name => Some(FileDtype::$variant),)* _ => None }
            }
        }
    };
}

// In the order of the reference implementation, which is the order in which it lays tensors out (backwards).
file_dtypes! {
    Bool "BOOL" 8 "truth value",
    F4 "F4" 4 "4-bit float (OCP MX)",
    F6E2M3 "F6_E2M3" 6 "6-bit float (OCP MX)",
    F6E3M2 "F6_E3M2" 6 "6-bit float (OCP MX)",
    U8 "U8" 8 "byte",
    I8 "I8" 8 "signed byte",
    F8E5M2 "F8_E5M2" 8 "8-bit float",
    F8E4M3 "F8_E4M3" 8 "8-bit float",
    F8E8M0 "F8_E8M0" 8 "8-bit scale (OCP MX)",
    I16 "I16" 16 "16-bit signed integer",
    U16 "U16" 16 "16-bit unsigned integer",
    F16 "F16" 16 "16-bit IEEE float",
    Bf16 "BF16" 16 "bfloat16",
    I32 "I32" 32 "32-bit signed integer",
    U32 "U32" 32 "32-bit unsigned integer",
    F32 "F32" 32 "32-bit IEEE float",
    C64 "C64" 64 "complex number of two 32-bit floats",
    F64 "F64" 64 "64-bit IEEE float",
    I64 "I64" 64 "64-bit signed integer",
    U64 "U64" 64 "64-bit unsigned integer",
}

impl FileDtype {
    /// The type that Graft computes with, if it is one of those.
    pub fn dtype(self) -> Option<DType> {
        Some(match self {
            FileDtype::F32 => DType::F32,
            FileDtype::F64 => DType::F64,
            FileDtype::Bf16 => DType::Bf16,
            FileDtype::F16 => DType::F16,
            FileDtype::I64 => DType::I64,
            FileDtype::I32 => DType::I32,
            FileDtype::U8 => DType::U8,
            _ => return None,
        })
    }

    /// All names, for messages.
    pub(crate) fn names() -> String {
        Self::ALL
            .iter()
            .map(|d| d.name())
            .collect::<Vec<_>>()
            .join(", ")
    }
}

impl From<DType> for FileDtype {
    fn from(dtype: DType) -> FileDtype {
        match dtype {
            DType::F32 => FileDtype::F32,
            DType::F64 => FileDtype::F64,
            DType::Bf16 => FileDtype::Bf16,
            DType::F16 => FileDtype::F16,
            DType::I64 => FileDtype::I64,
            DType::I32 => FileDtype::I32,
            // No format has codes with their magnitudes: the writer is never given any.
            DType::U8 | DType::Nf4 | DType::Int8 => FileDtype::U8,
        }
    }
}

impl fmt::Display for FileDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
