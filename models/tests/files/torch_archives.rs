//! Archives and old files of `torch.save` whose outer parts lie; cuts at every byte; noise.

use graft_models::TensorInfo;
use proptest::prelude::*;

use crate::torch_files::*;

#[test]
fn archives_of_something_else() {
    let w = dict(&tensor("FloatStorage", "0", 6, 0, &[6], &[1]));
    let (pickle, storage) = (entry("a/data.pkl", &w), entry("a/data/0", &[0; 24]));
    let with = |more: Entry| refused(zip(&[pickle.clone(), storage.clone(), more]));
    assert!(
        open(zip(&[
            pickle.clone(),
            storage.clone(),
            entry("a/version", b"3")
        ]))
        .is_ok()
    );
    assert!(with(storage.clone()).contains("a second entry `a/data/0`"));
    assert!(with(pickle.clone()).contains("a second entry `a/data.pkl`"));
    for name in [
        "../a/x",
        "/etc/passwd",
        "a/../../x",
        "a//x",
        "a\\x",
        "a/",
        "",
        "a/./x",
        "C:x",
        "a/\0",
    ] {
        assert!(
            with(entry(name, b"")).contains("is not a plain path"),
            "{name}"
        );
    }
    assert!(with(entry("b/x", b"")).contains("outside the folder `a`"));
    assert!(with(entry("x", b"")).contains("outside the folder `a`"));
    assert!(with(entry("a/byteorder", b"big")).contains("byte order `big`"));
    assert!(with(entry("a/constants.pkl", b"")).contains("TorchScript"));
    let bomb = Entry {
        method: 8,
        len: Some(u32::MAX - 1),
        ..entry("a/data/1", &[0; 40])
    };
    assert!(with(bomb).contains("compressed (method 8, 40 bytes to 4294967294)"));
    let longer = Entry {
        len: Some(1000),
        ..entry("a/data/1", &[0; 40])
    };
    assert!(with(longer).contains("overlaps"));
    assert!(
        with(Entry {
            flags: 1,
            ..entry("a/data/1", b"")
        })
        .contains("encrypted")
    );
    // The storage's length covers the entry behind it.
    let overlap = Entry {
        len: Some(24 + 30),
        ..storage.clone()
    };
    assert!(
        refused(zip(&[pickle.clone(), overlap, entry("a/version", b"3")])).contains("overlaps")
    );
    let two = refused(zip(&[
        entry("a/config.json", b"{}"),
        entry("b/data.pkl", b""),
    ]));
    assert!(two.contains("not one of torch.save"), "{two}");
    assert!(refused(zip(&[])).contains("begins neither"));
    for (bytes, part) in [
        (&b""[..], "the file is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "git lfs pull",
        ),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"\x80\x02}.", "a Python pickle, but"),
        (b"PK\x03\x04", "cut off"),
        (&[0; 100], "begins neither"),
    ] {
        let message = refused(bytes.to_vec());
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn directories_that_lie() {
    let good = floats(&[6], &[1], 0);
    let end = good.len() - 22;
    let with = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        refused(bad)
    };
    assert!(with(end + 4, &[1]).contains("several parts"));
    assert!(with(end + 8, &[1]).contains("several parts"));
    assert!(with(end + 8, &[9, 0, 9, 0]).contains("9 entries"));
    assert!(with(end + 8, &[1, 0, 1, 0]).contains("belong to no entry"));
    assert!(with(end + 12, &[0xff; 4]).contains("beyond the record"));
    assert!(with(end + 16, &[0xff; 4]).contains("beyond the record"));
    assert!(with(end + 20, &[1]).contains("cut off"));
    assert!(refused([&good[..], b"x"].concat()).contains("cut off"));
    // The local header says something else than the directory.
    assert!(with(0, b"PK\x03\x05").contains("begins neither"));
    assert!(with(8, &[8]).contains("disagree"));
    assert!(with(26, &[0xff]).contains("disagree"));
    assert!(with(28, &[0xff, 0xff]).contains("do not fit"));
    assert!(with(30, b"b").contains("disagree"));
    // A locator of 64-bit sizes that leads nowhere.
    let locator = [
        &b"PK\x06\x07\0\0\0\0"[..],
        &u64::MAX.to_le_bytes(),
        &[1, 0, 0, 0],
    ]
    .concat();
    let bad = [&good[..end], &locator, &good[end..]].concat();
    assert!(refused(bad).contains("no 64-bit end record"));
}

#[test]
fn cut_off_at_every_byte() {
    for name in ["zip.bin", "legacy.bin", "module.bin"] {
        let bytes = fixture(name);
        assert!(open(bytes.clone()).is_ok());
        for len in 0..bytes.len() {
            refused(bytes[..len].to_vec());
        }
        // And with something behind the end.
        refused([&bytes[..], &[0]].concat());
    }
}

#[test]
fn legacy_files_that_lie() {
    let good = fixture("legacy.bin");
    let find = |needle: &[u8]| {
        good.windows(needle.len())
            .position(|w| w == needle)
            .unwrap()
    };
    let with = |needle: &[u8], by: &[u8]| {
        let mut bad = good.clone();
        let at = find(needle);
        bad[at..at + by.len()].copy_from_slice(by);
        refused(bad)
    };
    assert!(with(b"M\xe9\x03.", b"M\xe8\x03.").contains("the number 1000, expected 1001"));
    assert!(with(b"little_endian", b"little_endiaN").contains("not little-endian"));
    assert!(with(b"torch\nFloatStorage", b"posix\nsystem\nabcde").contains("posix.system"));
    // The last storage's number of elements.
    let mut bad = good.clone();
    let at = bad.len() - 4 - 8;
    assert_eq!(bad[at], 1);
    bad[at] = 2;
    assert!(refused(bad).contains("has 2 elements here and 1 in the pickle"));
}

/// Opens and, where that works, reads everything.
fn survive(bytes: Vec<u8>) {
    let len = bytes.len() as u64;
    if let Ok(mut checkpoint) = open(bytes) {
        for tensor in checkpoint.tensors() {
            assert!(tensor.byte_len() <= len);
        }
        let mut wanted = |t: &TensorInfo| t.dtype.dtype().is_some();
        let _ = checkpoint.read_each(&mut wanted, &mut |_, bytes| {
            assert!(bytes.len() as u64 <= len);
            Ok(())
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_pickle_is_refused_or_read(body in prop::collection::vec(any::<u8>(), 0..400)) {
        survive(archive(&[&b"\x80\x02"[..], &body].concat()));
    }

    /// Opcodes that are known, in any order: deeper into the machine than random bytes come.
    #[test]
    fn any_program_is_refused_or_read(
        ops in prop::collection::vec(prop::sample::select(vec![
            b"N".to_vec(), b"]".to_vec(), b")".to_vec(), b"}".to_vec(), b"(".to_vec(), b"t".to_vec(), b"a".to_vec(),
            b"e".to_vec(), b"s".to_vec(), b"u".to_vec(), b"\x85".to_vec(), b"\x86".to_vec(), b"q\0".to_vec(),
            b"h\0".to_vec(), b"q\x01".to_vec(), b"h\x01".to_vec(), b"R".to_vec(), b"b".to_vec(), b"Q".to_vec(),
            text("w"), text("0"), int(6), int(-1), b"K\x01".to_vec(), b"\x88".to_vec(),
            global("collections", "OrderedDict"), global("torch", "FloatStorage"),
            global("torch._utils", "_rebuild_parameter"),
            tensor("FloatStorage", "0", 6, 0, &[2, 3], &[3, 1]), tensor("FloatStorage", "0", 6, 1, &[2, 2], &[1, 2]),
        ]), 0..40),
    ) {
        survive(archive(&[&b"\x80\x02}"[..], &ops.concat(), b"."].concat()));
    }

    #[test]
    fn damaged_files_never_panic(
        legacy in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = fixture(if legacy { "legacy.bin" } else { "zip.bin" });
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        survive(bytes);
    }

    #[test]
    fn any_tensor_is_refused_or_inside(
        shape in prop::collection::vec(-1i64..5, 0..4), strides in prop::collection::vec(-1i64..5, 0..4),
        offset in -1i64..8,
    ) {
        survive(floats(&shape, &strides, offset));
    }
}
