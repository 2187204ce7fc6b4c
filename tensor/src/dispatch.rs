//! The one place where an element type as a value becomes a type parameter.

/// Evaluates the body with `$t` standing for the element type of any `$dtype` but codes, which are an
/// [`Error::DType`](crate::Error::DType).
#[macro_export]
#[doc(hidden)]
macro_rules! with_dtype {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::F64 => {
                type $t = f64;
                $body
            }
            $crate::DType::Bf16 => {
                type $t = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $t = half::f16;
                $body
            }
            $crate::DType::I64 => {
                type $t = i64;
                $body
            }
            $crate::DType::I32 => {
                type $t = i32;
                $body
            }
            $crate::DType::U8 => {
                type $t = u8;
                $body
            }
            codes @ ($crate::DType::Nf4 | $crate::DType::Int8) => {
                return Err($crate::Error::DType {
                    op: "copy of elements",
                    what: "the tensor".into(),
                    found: codes,
                    expected: "a type whose elements stand by themselves".into(),
                })
            }
        }
    };
}

/// The same for the float types; any other is an [`Error::DType`](crate::Error::DType).
#[macro_export]
#[doc(hidden)]
macro_rules! with_float {
    ($op:expr, $dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::F64 => {
                type $t = f64;
                $body
            }
            $crate::DType::Bf16 => {
                type $t = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $t = half::f16;
                $body
            }
            other => {
                return Err($crate::Error::DType {
                    op: $op,
                    what: "the input".into(),
                    found: other,
                    expected: "a float type".into(),
                })
            }
        }
    };
}
