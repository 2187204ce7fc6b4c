//! What a pickle can build: values, the names that it may use, and descriptions of storages and tensors.

use crate::error::Shown;
use crate::safetensors::FileDtype;

/// The number of a value.
pub(super) type Id = u32;

/// A name that a pickle may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`: a tensor of a typed storage
    RebuildTensor,
    /// `torch._utils._rebuild_tensor_v3`: a tensor of bytes and an element type
    RebuildTensorOfBytes,
    /// `torch._utils._rebuild_parameter`
    RebuildParameter,
    /// `torch.FloatStorage` and its kin
    Storage(FileDtype),
    /// `torch.storage.UntypedStorage`
    Bytes,
    /// `torch.float32` and its kin
    Dtype(FileDtype),
}

impl Global {
    pub(super) fn find(module: &str, name: &str) -> Option<Global> {
        use FileDtype as D;
        Some(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
            ("torch._utils", "_rebuild_tensor_v3") => Global::RebuildTensorOfBytes,
            ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
            ("torch" | "torch.storage", "UntypedStorage") => Global::Bytes,
            ("torch", "DoubleStorage") => Global::Storage(D::F64),
            ("torch", "FloatStorage") => Global::Storage(D::F32),
            ("torch", "HalfStorage") => Global::Storage(D::F16),
            ("torch", "BFloat16Storage") => Global::Storage(D::Bf16),
            ("torch", "LongStorage") => Global::Storage(D::I64),
            ("torch", "IntStorage") => Global::Storage(D::I32),
            ("torch", "ShortStorage") => Global::Storage(D::I16),
            ("torch", "CharStorage") => Global::Storage(D::I8),
            ("torch", "ByteStorage") => Global::Storage(D::U8),
            ("torch", "BoolStorage") => Global::Storage(D::Bool),
            ("torch", "ComplexFloatStorage") => Global::Storage(D::C64),
            ("torch", "float64") => Global::Dtype(D::F64),
            ("torch", "float32") => Global::Dtype(D::F32),
            ("torch", "float16") => Global::Dtype(D::F16),
            ("torch", "bfloat16") => Global::Dtype(D::Bf16),
            ("torch", "float8_e4m3fn") => Global::Dtype(D::F8E4M3),
            ("torch", "float8_e5m2") => Global::Dtype(D::F8E5M2),
            ("torch", "float8_e8m0fnu") => Global::Dtype(D::F8E8M0),
            ("torch", "int64") => Global::Dtype(D::I64),
            ("torch", "int32") => Global::Dtype(D::I32),
            ("torch", "int16") => Global::Dtype(D::I16),
            ("torch", "int8") => Global::Dtype(D::I8),
            ("torch", "uint64") => Global::Dtype(D::U64),
            ("torch", "uint32") => Global::Dtype(D::U32),
            ("torch", "uint16") => Global::Dtype(D::U16),
            ("torch", "uint8") => Global::Dtype(D::U8),
            ("torch", "bool") => Global::Dtype(D::Bool),
            ("torch", "complex64") => Global::Dtype(D::C64),
            _ => return None,
        })
    }
}

/// The storage that a pickle refers to: bytes beside it, under a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Storage<'a> {
    pub key: &'a str,
    /// `None` for bytes without a type.
    pub dtype: Option<FileDtype>,
    /// Elements, or bytes.
    pub len: u64,
}

/// A tensor as a view of a storage.
#[derive(Clone, Debug)]
pub(super) struct Tensor<'a> {
    pub storage: Storage<'a>,
    pub dtype: FileDtype,
    /// Where it begins, in elements.
    pub offset: u64,
    pub shape: Vec<u64>,
    /// In elements.
    pub strides: Vec<u64>,
    /// Where in the file it is described.
    pub at: u64,
}

/// What a pickle can build.
#[derive(Debug)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float,
    Bytes,
    Str(&'a str),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Box<Storage<'a>>),
    Tensor(Box<Tensor<'a>>),
}

impl Value<'_> {
    /// In a few words, for messages.
    pub(super) fn describe(&self) -> String {
        match self {
            Value::None => "None".to_string(),
            Value::Bool(b) => if *b { "True" } else { "False" }.to_string(),
            Value::Int(i) => format!("the number {i}"),
            Value::Float => "a float".to_string(),
            Value::Bytes => "bytes".to_string(),
            Value::Str(s) => format!("\"{}\"", Shown(s)),
            Value::List(list) => format!("a list of {}", list.len()),
            Value::Tuple(list) => format!("a tuple of {}", list.len()),
            Value::Dict(items) => format!("a dictionary of {}", items.len()),
            Value::Global(global) => format!("{global:?}"),
            Value::Storage(_) => "a storage".to_string(),
            Value::Tensor(_) => "a tensor".to_string(),
        }
    }
}
