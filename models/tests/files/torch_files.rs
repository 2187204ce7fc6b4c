//! Files of `torch.save` by hand, byte by byte, so that they can lie.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use graft_models::{Checkpoint, Error, Result, torch};

pub fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
    torch::from_reader("dir/x.bin", Cursor::new(bytes))
}

/// The message of the refusal; it names the file and a place.
pub fn refused(bytes: Vec<u8>) -> String {
    match open(bytes) {
        Err(error @ Error::Weights { .. }) => {
            let text = error.to_string();
            assert!(text.starts_with("dir/x.bin: offset "), "{text}");
            assert!(text.len() < 1500, "{text}");
            text
        }
        other => panic!("{other:?}"),
    }
}

/// An entry of an archive, with what a hostile writer may claim about it.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    pub data: Vec<u8>,
    pub method: u16,
    pub flags: u16,
    /// Instead of the length of `data`.
    pub len: Option<u32>,
}

pub fn entry(name: &str, data: &[u8]) -> Entry {
    Entry {
        name: name.to_string(),
        data: data.to_vec(),
        method: 0,
        flags: 0,
        len: None,
    }
}

/// A zip archive without checks of any kind.
pub fn zip(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut directory = Vec::new();
    for e in entries {
        let at = out.len() as u32;
        let len = e.len.unwrap_or(e.data.len() as u32).to_le_bytes();
        let stored = (e.data.len() as u32).to_le_bytes();
        let packed = if e.method == 0 { len } else { stored };
        let name_len = (e.name.len() as u16).to_le_bytes();
        let common = [
            &[20, 0][..],
            &e.flags.to_le_bytes(),
            &e.method.to_le_bytes(),
            &[0; 8],
            &packed,
            &len,
        ]
        .concat();
        out.extend(
            [
                b"PK\x03\x04",
                &common[..],
                &name_len,
                &[0; 2],
                e.name.as_bytes(),
                &e.data,
            ]
            .concat(),
        );
        directory.extend(
            [
                b"PK\x01\x02\x14\0",
                &common[..],
                &name_len,
                &[0; 12],
                &at.to_le_bytes(),
                e.name.as_bytes(),
            ]
            .concat(),
        );
    }
    let (start, len, count) = (
        out.len() as u32,
        directory.len() as u32,
        (entries.len() as u16).to_le_bytes(),
    );
    out.extend(directory);
    out.extend(
        [
            b"PK\x05\x06\0\0\0\0",
            &count[..],
            &count,
            &len.to_le_bytes(),
            &start.to_le_bytes(),
            &[0; 2],
        ]
        .concat(),
    );
    out
}

/// An archive with this pickle and one storage `0` of 24 bytes.
pub fn archive(pickle: &[u8]) -> Vec<u8> {
    zip(&[entry("a/data.pkl", pickle), entry("a/data/0", &[0; 24])])
}

pub fn text(s: &str) -> Vec<u8> {
    [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
}

pub fn int(i: i64) -> Vec<u8> {
    [b"\x8a\x08", &i.to_le_bytes()[..]].concat()
}

pub fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

pub fn ints(list: &[i64]) -> Vec<u8> {
    [
        &b"("[..],
        &list.iter().flat_map(|&i| int(i)).collect::<Vec<_>>(),
        b"t",
    ]
    .concat()
}

/// The call that describes a tensor of storage `key` with `len` elements.
pub fn tensor(
    kind: &str,
    key: &str,
    len: i64,
    offset: i64,
    shape: &[i64],
    strides: &[i64],
) -> Vec<u8> {
    [
        &global("torch._utils", "_rebuild_tensor_v2")[..],
        b"((",
        &text("storage"),
        &global("torch", kind),
        &text(key),
        &text("cpu"),
        &int(len),
        b"tQ",
        &int(offset),
        &ints(shape),
        &ints(strides),
        b"\x89}tR",
    ]
    .concat()
}

/// The pickle of a dictionary with `value` under `w`.
pub fn dict(value: &[u8]) -> Vec<u8> {
    [&b"\x80\x02}"[..], &text("w"), value, b"s."].concat()
}

pub fn floats(shape: &[i64], strides: &[i64], offset: i64) -> Vec<u8> {
    archive(&dict(&tensor(
        "FloatStorage",
        "0",
        6,
        offset,
        shape,
        strides,
    )))
}

pub fn fixture(name: &str) -> Vec<u8> {
    fs::read(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures/torch")
            .join(name),
    )
    .unwrap()
}
