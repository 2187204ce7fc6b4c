//! Files that are cut off, damaged or made to do harm: each is refused with the file, the place and the reason.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;

use graft_models::safetensors::{
    MAX_HEADER_BYTES, Problem, TensorView, pt_metadata, to_bytes, write,
};
use graft_models::{Error, SafetensorsFile};
use graft_tensor::DType;

fn file_of(header: &str, data_len: usize) -> Vec<u8> {
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        &vec![0; data_len],
    ]
    .concat()
}

/// The problem that the reader finds; the message must name the file.
fn problem(bytes: &[u8]) -> Problem {
    match SafetensorsFile::from_reader("dir/x.safetensors", Cursor::new(bytes.to_vec())) {
        Err(error @ Error::Safetensors { .. }) => {
            let text = error.to_string();
            assert!(text.starts_with("dir/x.safetensors: "), "{text}");
            assert!(text.len() < 1500, "{text}");
            let Error::Safetensors { problem, .. } = error else {
                unreachable!()
            };
            *problem
        }
        other => panic!("{other:?}"),
    }
}

fn problem_of(header: &str, data_len: usize) -> Problem {
    problem(&file_of(header, data_len))
}

#[test]
fn cut_off_at_every_byte() {
    let data: Vec<u8> = (0..40).collect();
    let bytes = to_bytes(
        &pt_metadata(),
        [
            ("a", DType::F32, &[2usize, 3][..], &data[..24]),
            ("b", DType::I64, &[2][..], &data[24..]),
        ],
    )
    .unwrap();
    for length in 0..bytes.len() {
        match problem(&bytes[..length]) {
            Problem::TooShort { found } => assert!(found == length as u64 && length < 8),
            Problem::HeaderTruncated { .. } => {}
            Problem::DataTruncated {
                tensor,
                end,
                file_len,
            } => {
                assert_eq!(file_len, length as u64);
                // `b` comes first: its elements are the larger ones.
                let (expected, at) = if length < bytes.len() - 24 {
                    ("b", bytes.len() - 24)
                } else {
                    ("a", bytes.len())
                };
                assert_eq!((tensor.as_str(), end), (expected, at as u64));
            }
            other => panic!("cut to {length}: {other}"),
        }
    }
    assert!(SafetensorsFile::from_reader("x", Cursor::new(bytes)).is_ok());
}

#[test]
fn oversized_headers() {
    for claimed in [MAX_HEADER_BYTES + 1, u64::MAX, 1 << 63] {
        let bytes = [&claimed.to_le_bytes()[..], b"{}"].concat();
        assert_eq!(
            problem(&bytes),
            Problem::HeaderTooLarge {
                claimed,
                limit: MAX_HEADER_BYTES
            }
        );
    }
    let bytes = [&3u64.to_le_bytes()[..], b"{}"].concat();
    assert_eq!(
        problem(&bytes),
        Problem::HeaderTruncated {
            claimed: 3,
            available: 2
        }
    );
}

#[test]
fn other_formats_are_named() {
    let cases: [(&[u8], &str); 6] = [
        (
            b"PK\x03\x04\x14\0\0\0\x08\x08archive/data.pkl",
            "PyTorch pickle",
        ),
        (
            b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02",
            "Python pickle",
        ),
        (b"\x80\x04\x95\x0f\0\0\0\0\0\0\0}\x94", "Python pickle"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "Git LFS",
        ),
        (b"GGUF\x03\0\0\0\x10\x10\0\0", "GGUF"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
    ];
    for (bytes, kind) in cases {
        let found = problem(bytes);
        assert!(
            matches!(&found, Problem::OtherFormat { .. }) && found.to_string().contains(kind),
            "{found}"
        );
    }
    // A real header may be 0x0280 bytes long, which begins like a pickle.
    let header = format!("{{}}{}", " ".repeat(0x280 - 2));
    assert!(SafetensorsFile::from_reader("x", Cursor::new(file_of(&header, 0))).is_ok());
}

#[test]
fn headers_that_are_not_the_json_expected() {
    assert!(matches!(problem_of("", 0), Problem::HeaderStart { .. }));
    assert!(matches!(problem_of("[]", 0), Problem::HeaderStart { .. }));
    assert_eq!(
        problem_of(" {}", 0),
        Problem::HeaderStart {
            found: "byte 0x20".to_string()
        }
    );
    assert!(
        matches!(problem_of("{\"a\"}", 0), Problem::Json { offset: 13, .. }),
        "{}",
        problem_of("{\"a\"}", 0)
    );
    assert!(matches!(problem_of("{}x", 0), Problem::Json { .. }));
    let mut bytes = file_of("{\"..\":1}", 0);
    bytes[11] = 0xff;
    assert_eq!(problem(&bytes), Problem::NotUtf8 { offset: 11 });
    // The tensor is named where the parser gives up inside it.
    let found = problem_of(
        r#"{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
        4,
    );
    assert!(
        matches!(&found, Problem::Json { tensor: Some(t), .. } if t == "w"),
        "{found}"
    );
    assert!(found.to_string().contains("`w`"), "{found}");
    // Depth that would overflow the stack of a parser without a limit.
    assert!(matches!(
        problem_of(&format!("{{\"a\":{}", "[".repeat(50_000)), 0),
        Problem::Json { .. }
    ));
    assert!(matches!(
        problem_of(&"{\"a\":".repeat(50_000), 0),
        Problem::UnknownKey { .. }
    ));
    let found = problem_of(r#"{"__metadata__":{"a":1}}"#, 0);
    assert!(
        matches!(&found, Problem::Json { tensor: Some(t), .. } if t == "__metadata__"),
        "{found}"
    );
}

#[test]
fn keys_of_a_tensor() {
    let t = |body: &str| problem_of(&format!("{{\"w\":{{{body}}}}}"), 4);
    let missing = |key| Problem::MissingKey {
        tensor: "w".to_string(),
        key,
    };
    assert_eq!(t(r#""shape":[1],"data_offsets":[0,4]"#), missing("dtype"));
    assert_eq!(t(r#""dtype":"F32","data_offsets":[0,4]"#), missing("shape"));
    assert_eq!(t(r#""dtype":"F32","shape":[1]"#), missing("data_offsets"));
    let unknown = t(r#""dtype":"F32","shape":[1],"data_offsets":[0,4],"stride":[1]"#);
    assert_eq!(
        unknown,
        Problem::UnknownKey {
            tensor: "w".to_string(),
            key: "stride".to_string()
        }
    );
    let dtype = t(r#""dtype":"float32","shape":[1],"data_offsets":[0,4]"#);
    assert!(matches!(&dtype, Problem::UnknownDtype { found, .. } if found == "float32"));
    assert!(dtype.to_string().contains("BF16"), "{dtype}");
    for offsets in ["[0]", "[0,4,8]", "{}", "[0,\"4\"]", "[0,4.0]"] {
        let found = t(&format!(
            r#""dtype":"F32","shape":[1],"data_offsets":{offsets}"#
        ));
        assert!(matches!(&found, Problem::Json { .. }), "{offsets}: {found}");
    }
}

#[test]
fn duplicates() {
    let w = r#""w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let header = format!("{{{w},{w}}}");
    let found = problem_of(&header, 4);
    let Problem::DuplicateKey {
        offset,
        tensor: None,
        key,
    } = &found
    else {
        panic!("{found}")
    };
    // Just behind the second `"w"`.
    assert_eq!(
        (key.as_str(), *offset as usize),
        ("w", 8 + 1 + w.len() + 1 + 3)
    );
    let found = problem_of(
        r#"{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        4,
    );
    assert!(
        matches!(&found, Problem::DuplicateKey { tensor: Some(t), key, .. } if t == "w" && key == "dtype")
    );
    // The same name, spelled with an escape.
    let found = problem_of(
        r#"{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"\u0077":{}}"#,
        0,
    );
    assert!(
        matches!(&found, Problem::DuplicateKey { key, .. } if key == "w"),
        "{found}"
    );
    let found = problem_of(r#"{"__metadata__":{"a":"1","a":"1"}}"#, 0);
    assert!(
        matches!(&found, Problem::DuplicateKey { tensor: Some(t), .. } if t == "__metadata__"),
        "{found}"
    );
}

#[test]
fn shapes_and_sizes() {
    let with = |dtype: &str, shape: &str, end: u64| {
        problem_of(
            &format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}}}"#),
            8,
        )
    };
    assert!(matches!(
        with("U8", "[1,1,1,1,1,1,1,1,8]", 8),
        Problem::RankTooHigh { limit: 8, .. }
    ));
    let long = format!("[{}1]", "1,".repeat(1_000_000));
    assert!(matches!(with("U8", &long, 8), Problem::RankTooHigh { .. }));
    assert!(matches!(
        with("U8", "[4294967296,4294967296]", 8),
        Problem::SizeOverflow { .. }
    ));
    assert!(matches!(
        with("F64", "[2305843009213693952]", 8),
        Problem::SizeOverflow { .. }
    ));
    assert!(matches!(with("F4", "[3]", 8), Problem::PartialByte { .. }));
    assert!(matches!(
        with("F32", "[3]", 8),
        Problem::WrongLength { expected: 12, .. }
    ));
    assert!(matches!(
        with("F32", "[1]", 8),
        Problem::WrongLength { expected: 4, .. }
    ));
    assert!(matches!(
        with("F32", "[]", 8),
        Problem::WrongLength { expected: 4, .. }
    ));
    assert!(matches!(
        with("F32", "[0]", 8),
        Problem::WrongLength { expected: 0, .. }
    ));
    // Far more than the file holds: refused by arithmetic, nothing is allocated.
    assert!(matches!(
        with("U8", "[1152921504606846976]", 1 << 60),
        Problem::DataTruncated { .. }
    ));
}

#[test]
fn ranges() {
    let two = |a: (u64, u64), b: (u64, u64), data| {
        let t = |(s, e): (u64, u64)| {
            format!(
                r#"{{"dtype":"U8","shape":[{}],"data_offsets":[{s},{e}]}}"#,
                e.saturating_sub(s)
            )
        };
        problem_of(&format!(r#"{{"a":{},"b":{}}}"#, t(a), t(b)), data)
    };
    assert_eq!(
        two((0, 4), (2, 6), 6),
        Problem::Overlap {
            tensor: "b".to_string(),
            start: 2,
            previous_end: 4
        }
    );
    assert_eq!(
        two((0, 4), (0, 4), 4),
        Problem::Overlap {
            tensor: "b".to_string(),
            start: 0,
            previous_end: 4
        }
    );
    assert_eq!(
        two((0, 4), (5, 6), 6),
        Problem::Hole {
            tensor: "b".to_string(),
            start: 5,
            previous_end: 4
        }
    );
    assert_eq!(
        two((4, 8), (8, 9), 9),
        Problem::Hole {
            tensor: "a".to_string(),
            start: 4,
            previous_end: 0
        }
    );
    assert_eq!(
        two((0, 4), (4, 3), 4),
        Problem::ReversedRange {
            tensor: "b".to_string(),
            start: 4,
            end: 3
        }
    );
    assert_eq!(
        two((0, 4), (u64::MAX, 2), 4),
        Problem::ReversedRange {
            tensor: "b".to_string(),
            start: u64::MAX,
            end: 2
        }
    );
    assert!(
        matches!(two((0, 4), (4, 8), 7), Problem::DataTruncated { tensor, .. } if tensor == "b")
    );
    assert!(matches!(
        two((0, 4), (4, 8), 11),
        Problem::TrailingBytes { extra: 3, .. }
    ));
    assert!(matches!(
        problem_of("{}", 1),
        Problem::TrailingBytes {
            offset: 10,
            extra: 1
        }
    ));
}

#[test]
fn empty_tensors_are_fine() {
    // `c` stands before `a`, which begins at the same byte and must come first.
    let header = r#"{"c":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},
        "a":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},
        "b":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
        "d":{"dtype":"F32","shape":[2,0],"data_offsets":[8,8]}}"#;
    let mut file = SafetensorsFile::from_reader("x", Cursor::new(file_of(header, 8))).unwrap();
    file.read_into("a", &mut []).unwrap();
    file.read_into("b", &mut [0; 4]).unwrap();
    let mut order = Vec::new();
    file.read_each(&mut |_| true, &mut |info, bytes| {
        order.push((info.name.clone(), bytes.len()));
        Ok(())
    })
    .unwrap();
    assert_eq!(order.iter().map(|(_, n)| n).sum::<usize>(), 8);
    assert_eq!(order.len(), 4);
}

/// Of a tensor that is longer than a piece, each piece but the last is as long as a piece may be; one that ends too early is
/// refused as it is where tensors are read as a whole.
#[test]
fn pieces_are_of_a_mib() {
    let length = (5 << 19) + 4; // two and a half MiB, and a number
    let header = format!(
        r#"{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},
        "b":{{"dtype":"U8","shape":[{length}],"data_offsets":[4,{}]}},
        "c":{{"dtype":"F32","shape":[0],"data_offsets":[{1},{1}]}}}}"#,
        4 + length,
        4 + length,
    );
    let whole = file_of(&header, 4 + length);
    let pieces = |bytes: Vec<u8>| {
        let mut found = Vec::new();
        let mut file = SafetensorsFile::from_reader("x", Cursor::new(bytes))?;
        file.read_pieces(&mut |_| true, &mut |info, piece| {
            found.push((info.name.clone(), piece.len()));
            Ok(())
        })?;
        Ok::<_, Error>(found)
    };
    let of = |name: &str, bytes: usize| (name.to_owned(), bytes);
    let wanted = [
        of("a", 4),
        of("b", 1 << 20),
        of("b", 1 << 20),
        of("b", (1 << 19) + 4),
        of("c", 0),
    ];
    assert_eq!(pieces(whole.clone()).unwrap(), wanted);
    assert!(pieces(whole[..whole.len() - 1].to_vec()).is_err());
}

#[test]
fn long_names_do_not_make_long_messages() {
    let name = "n".repeat(1 << 20);
    let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,3]}}}}"#);
    assert!(matches!(
        problem_of(&header, 3),
        Problem::WrongLength { .. }
    ));
}

#[test]
fn reading_by_name() {
    let bytes = to_bytes(
        &BTreeMap::new(),
        [("encoder.weight", DType::F32, &[2usize][..], &[1u8; 8][..])],
    )
    .unwrap();
    let mut file = SafetensorsFile::from_reader("x", Cursor::new(bytes)).unwrap();
    let error = file
        .read_into("encoder.wieght", &mut [0; 8])
        .unwrap_err()
        .to_string();
    assert!(error.contains("nearest is `encoder.weight`"), "{error}");
    let error = file.read_into("encoder.weight", &mut [0; 7]).unwrap_err();
    assert!(
        matches!(
            &error,
            Error::ByteLength {
                expected: 8,
                found: 7,
                ..
            }
        ),
        "{error}"
    );
    let bytes = file_of(
        r#"{"m":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}}"#,
        1,
    );
    let mut file = SafetensorsFile::from_reader("x", Cursor::new(bytes)).unwrap();
    let error = file.read_into("m", &mut [0]).unwrap_err().to_string();
    assert!(error.contains("`m`") && error.contains("BOOL"), "{error}");
    let stop = Error::Encode {
        reason: "stop".to_string(),
        help: "go".to_string(),
    };
    let mut stop = Some(stop);
    let error = file
        .read_each(&mut |_| true, &mut |_, _| Err(stop.take().unwrap()))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("BOOL"),
        "an unsupported tensor stops before the first visit: {error}"
    );
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let none = BTreeMap::new();
    let tensor = |name, shape, data| TensorView {
        name,
        dtype: DType::F32,
        shape,
        data,
    };
    for (tensors, reason) in [
        (vec![tensor("", &[], &[0; 4])], "needs a name"),
        (vec![tensor("__metadata__", &[], &[0; 4])], "needs a name"),
        (
            vec![tensor("a", &[], &[0; 4]), tensor("a", &[], &[0; 4])],
            "same name",
        ),
        (vec![tensor("a", &[1; 9], &[0; 4])], "9 dimensions"),
        (vec![tensor("a", &[usize::MAX, 2], &[0; 4])], "overflows"),
        (vec![tensor("a", &[2], &[0; 4])], "8 bytes"),
    ] {
        let error = to_bytes(&none, tensors.iter().copied())
            .unwrap_err()
            .to_string();
        assert!(error.contains(reason), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.safetensors");
        fs::write(&path, "earlier").unwrap();
        assert!(write(&path, &none, tensors).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "earlier");
    }
}
