//! Our safetensors reader and writer against the `safetensors` crate, in both directions, on random files and on
//! random mutations of them.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;

use graft_models::safetensors::{FileDtype, Problem, TensorView, to_bytes};
use graft_models::{Error, SafetensorsFile};
use graft_tensor::DType;
use proptest::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, View, serialize};

/// A tensor for the oracle's writer.
#[derive(Clone, Debug)]
struct Owned {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl View for &Owned {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

fn ours_of(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::BF16 => DType::Bf16,
        Dtype::F16 => DType::F16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::U8 => DType::U8,
        _ => return None,
    })
}

fn any_dtype() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![
        Dtype::BOOL,
        Dtype::U8,
        Dtype::I8,
        Dtype::F8_E5M2,
        Dtype::F8_E4M3,
        Dtype::F8_E8M0,
        Dtype::I16,
        Dtype::U16,
        Dtype::F16,
        Dtype::BF16,
        Dtype::I32,
        Dtype::U32,
        Dtype::F32,
        Dtype::F64,
        Dtype::I64,
        Dtype::U64,
        // Smaller than a byte; given shapes that fill whole bytes.
        Dtype::F4,
        Dtype::F6_E2M3,
        Dtype::F6_E3M2,
    ])
}

fn supported_dtype() -> impl Strategy<Value = Dtype> {
    any_dtype().prop_filter("supported", |dtype| ours_of(*dtype).is_some())
}

fn tensor(dtype: impl Strategy<Value = Dtype>) -> impl Strategy<Value = Owned> {
    (dtype, prop::collection::vec(0usize..4, 0..5), any::<u8>()).prop_map(
        |(dtype, mut shape, seed)| {
            if dtype.bitsize() < 8 {
                shape.push(4);
            }
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            let data = (0..bytes)
                .map(|i| seed.wrapping_add((i * 31) as u8))
                .collect();
            Owned { dtype, shape, data }
        },
    )
}

/// Names with everything that JSON must escape.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z]{1,8}(\\.[a-z0-9]{1,6}){0,4}",
        prop::collection::vec(any::<char>(), 1..12).prop_map(|chars| chars.into_iter().collect()),
    ]
}

fn files(dtype: fn() -> BoxedStrategy<Dtype>) -> impl Strategy<Value = BTreeMap<String, Owned>> {
    prop::collection::btree_map(name(), tensor(dtype()), 0..6)
}

fn open(bytes: &[u8]) -> Result<SafetensorsFile, Error> {
    SafetensorsFile::from_reader("test file", Cursor::new(bytes.to_vec()))
}

/// Both readers agree on every tensor of a file that both accept.
fn assert_same(mut ours: SafetensorsFile, theirs: &SafeTensors) {
    assert_eq!(ours.tensors().len(), theirs.len());
    let mut supported = Vec::new();
    for (name, view) in theirs.iter() {
        let info = ours
            .get(name)
            .unwrap_or_else(|| panic!("{name:?} is missing"))
            .clone();
        assert_eq!(info.dtype.name(), view.dtype().to_string());
        assert_eq!(
            info.shape,
            view.shape().iter().map(|&d| d as u64).collect::<Vec<_>>()
        );
        let mut bytes = vec![0; view.data().len()];
        match (ours.read_into(name, &mut bytes), ours_of(view.dtype())) {
            (Ok(()), Some(_)) => {
                assert_eq!(bytes, view.data(), "{name:?}");
                supported.push((info.range.start, name.to_string(), bytes));
            }
            (Err(Error::Safetensors { problem, .. }), None) => {
                assert!(
                    matches!(*problem, Problem::UnsupportedDtype { .. }),
                    "{problem}"
                );
            }
            other => panic!("{name:?}: {other:?}"),
        }
    }
    // One pass gives the same bytes, by rising offset.
    let mut seen = Vec::new();
    ours.read_each(
        &mut |info| info.dtype.dtype().is_some(),
        &mut |info, bytes| {
            seen.push((info.range.start, info.name.clone(), bytes.to_vec()));
            Ok(())
        },
    )
    .unwrap();
    assert!(seen.is_sorted_by_key(|(start, ..)| *start));
    let mut pieces: Vec<(u64, String, Vec<u8>)> = Vec::new();
    ours.read_pieces(
        &mut |info| info.dtype.dtype().is_some(),
        &mut |info, bytes| {
            match pieces.last_mut() {
                Some((_, name, all)) if *name == info.name => all.extend(bytes),
                _ => pieces.push((info.range.start, info.name.clone(), bytes.to_vec())),
            }
            Ok(())
        },
    )
    .unwrap();
    assert_eq!(pieces, seen);
    seen.sort();
    supported.sort();
    assert_eq!(seen, supported);
}

/// The differences that the module documentation of `header` states, and no other.
fn difference_is_stated(problem: &Problem) -> bool {
    match problem {
        Problem::DuplicateKey { .. } | Problem::UnknownKey { .. } | Problem::RankTooHigh { .. } => {
            true
        }
        Problem::HeaderStart { .. } => true,
        Problem::Json { reason, .. } => [
            "invalid type: null, expected an object of strings",
            "invalid type: sequence, expected an object with `dtype`",
            "invalid type: map, expected a string",
        ]
        .iter()
        .any(|stated| reason.starts_with(stated)),
        _ => false,
    }
}

/// Reads with both readers and compares their judgements; true if both accept.
fn compare(bytes: &[u8]) -> bool {
    match (open(bytes), SafeTensors::deserialize(bytes)) {
        (Ok(ours), Ok(theirs)) => {
            assert_same(ours, &theirs);
            true
        }
        (Err(error), theirs) => {
            assert!(
                error.to_string().len() < 2000,
                "a message of {} bytes",
                error.to_string().len()
            );
            if theirs.is_ok() {
                let Error::Safetensors { problem, .. } = &error else {
                    panic!("{error}")
                };
                assert!(
                    difference_is_stated(problem),
                    "only we refuse: {error}\n{:?}",
                    String::from_utf8_lossy(bytes)
                );
            }
            false
        }
        (Ok(ours), Err(error)) => {
            let newer = ours.tensors().any(|t| t.dtype == FileDtype::C64);
            assert!(
                newer,
                "only we accept: {error:?}\n{:?}",
                String::from_utf8_lossy(bytes)
            );
            false
        }
    }
}

/// The file with this header and data section, its header length correct.
fn file_of(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn we_read_what_the_oracle_writes(
        tensors in files(|| any_dtype().boxed()),
        metadata in prop::option::of(prop::collection::hash_map(name(), name(), 0..3)),
    ) {
        prop_assume!(!tensors.contains_key("__metadata__"));
        // With no tensor and an empty map the oracle's writer produces `{},...`, which nobody can read, itself included.
        prop_assume!(!(tensors.is_empty() && metadata.as_ref().is_some_and(HashMap::is_empty)));
        let bytes = serialize(tensors.iter(), metadata.clone()).unwrap();
        let ours = open(&bytes).unwrap();
        let expected: BTreeMap<_, _> = metadata.unwrap_or_default().into_iter().collect();
        prop_assert_eq!(ours.metadata(), &expected);
        assert_same(ours, &SafeTensors::deserialize(&bytes).unwrap());
    }

    #[test]
    fn we_write_the_oracles_bytes(
        tensors in files(|| supported_dtype().boxed()),
        metadata in prop::option::of((name(), name())),
    ) {
        prop_assume!(!tensors.contains_key("__metadata__"));
        let views = tensors.iter().map(|(name, t)| TensorView {
            name,
            dtype: ours_of(t.dtype).unwrap(),
            shape: &t.shape,
            data: &t.data,
        });
        let ours = to_bytes(&metadata.clone().into_iter().collect(), views).unwrap();
        let theirs = serialize(tensors.iter(), metadata.map(|entry| HashMap::from([entry]))).unwrap();
        prop_assert_eq!(ours, theirs);
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        compare(&bytes);
        compare(&file_of(&bytes, &[]));
        compare(&file_of(&[b"{", bytes.as_slice()].concat(), &[]));
    }

    #[test]
    fn random_json_never_panics(
        text in "(\\{|\\}|\\[|\\]|,|:|\"a\"|\"dtype\"|\"shape\"|\"data_offsets\"|\"F32\"|\"__metadata__\"|0|4|1e3|-1|null|true| |\\\\){0,30}",
    ) {
        compare(&file_of(format!("{{{text}").as_bytes(), &[0; 4]));
    }
}

/// What a mutation puts into a header.
const SNIPPETS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "0",
    "1",
    "4",
    "9",
    "-1",
    "1.5",
    "1e2",
    "null",
    "true",
    " ",
    "\n",
    "\\u0041",
    "\\",
    "18446744073709551615",
    "18446744073709551616",
    "4294967296",
    "\"dtype\":\"F32\",",
    "\"shape\":[],",
    "\"data_offsets\":[0,0],",
    "\"extra\":1,",
    "\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},",
    "\"__metadata__\":{\"a\":\"b\",\"a\":\"c\"},",
    "\"__metadata__\":null,",
    "\"__metadata__\":{},",
    "\"b\":[\"F32\",[0],[0,0]],",
    "\"c\":{\"dtype\":{\"F32\":null},\"shape\":[0],\"data_offsets\":[0,0]},",
    "1,1,1,1,1,1,1,1,1,",
    "F64",
    "BOOL",
    "F4",
    "C64",
    "\u{0}",
    "é",
];

#[derive(Clone, Debug)]
enum Edit {
    Insert(prop::sample::Index, usize),
    Delete(prop::sample::Index, usize),
    /// Copies a piece of the header to another place.
    Repeat(prop::sample::Index, prop::sample::Index, usize),
    SetByte(prop::sample::Index, u8),
    Grow(usize),
    Shrink(usize),
    Prefix(u64),
}

fn edit() -> impl Strategy<Value = Edit> {
    use prop::sample::Index;
    prop_oneof![
        4 => (any::<Index>(), 0..SNIPPETS.len()).prop_map(|(at, s)| Edit::Insert(at, s)),
        2 => (any::<Index>(), 1usize..6).prop_map(|(at, n)| Edit::Delete(at, n)),
        2 => (any::<Index>(), any::<Index>(), 1usize..80).prop_map(|(a, b, n)| Edit::Repeat(a, b, n)),
        2 => (any::<Index>(), any::<u8>()).prop_map(|(at, b)| Edit::SetByte(at, b)),
        2 => (any::<Index>(), b'0'..=b'9').prop_map(|(at, b)| Edit::SetByte(at, b)),
        1 => (1usize..20).prop_map(Edit::Grow),
        1 => (1usize..20).prop_map(Edit::Shrink),
        1 => prop_oneof![any::<u64>(), 0u64..400, Just(100_000_001)].prop_map(Edit::Prefix),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files_are_judged_alike(
        tensors in files(|| any_dtype().boxed()),
        edits in prop::collection::vec(edit(), 1..3),
    ) {
        prop_assume!(!tensors.contains_key("__metadata__"));
        let bytes = serialize(tensors.iter(), Some(HashMap::from([("format".into(), "pt".into())]))).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = bytes[8..8 + length].to_vec();
        let mut data = bytes[8 + length..].to_vec();
        let mut prefix = None;
        for edit in edits {
            match edit {
                Edit::Insert(at, snippet) => {
                    let at = at.index(header.len() + 1);
                    header.splice(at..at, SNIPPETS[snippet].bytes());
                }
                Edit::Delete(at, count) if !header.is_empty() => {
                    let at = at.index(header.len());
                    header.drain(at..(at + count).min(header.len()));
                }
                Edit::Repeat(from, to, count) if !header.is_empty() => {
                    let from = from.index(header.len());
                    let piece = header[from..(from + count).min(header.len())].to_vec();
                    let to = to.index(header.len() + 1);
                    header.splice(to..to, piece);
                }
                Edit::SetByte(at, byte) if !header.is_empty() => {
                    let at = at.index(header.len());
                    header[at] = byte;
                }
                Edit::Grow(count) => data.extend(vec![7; count]),
                Edit::Shrink(count) => data.truncate(data.len().saturating_sub(count)),
                Edit::Prefix(length) => prefix = Some(length),
                _ => {}
            }
        }
        let mut bytes = file_of(&header, &data);
        if let Some(prefix) = prefix {
            bytes[..8].copy_from_slice(&prefix.to_le_bytes());
        }
        compare(&bytes);
    }
}

/// Every stated difference, met on purpose: so that the list holds no difference that is none.
#[test]
fn the_stated_differences_exist() {
    let t = r#""t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let only_we_refuse = [
        format!("{{{t},{t}}}"),
        format!("{{{t},\"__metadata__\":{{\"a\":\"1\",\"a\":\"2\"}}}}"),
        r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":0}}"#.to_string(),
        r#"{"t":["U8",[1],[0,1]]}"#.to_string(),
        r#"{"t":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}"#.to_string(),
        format!("{{\"__metadata__\":null,{t}}}"),
        format!(" {{{t}}}"),
        r#"{"t":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#.to_string(),
    ];
    for header in only_we_refuse {
        let bytes = file_of(header.as_bytes(), &[0]);
        assert!(
            SafeTensors::deserialize(&bytes).is_ok(),
            "the oracle refuses {header}"
        );
        let Error::Safetensors { problem, .. } = open(&bytes).unwrap_err() else {
            panic!()
        };
        assert!(difference_is_stated(&problem), "{header}: {problem}");
    }
    let newer = file_of(
        br#"{"t":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}"#,
        &[0; 8],
    );
    assert!(SafeTensors::deserialize(&newer).is_err());
    assert!(open(&newer).is_ok());
}
