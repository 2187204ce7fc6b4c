//! Pickles that mean harm: each is refused with the file, the place and the reason.

use crate::torch_files::*;

#[test]
fn the_helpers_make_files_that_are_read() {
    let checkpoint = open(floats(&[2, 3], &[3, 1], 0)).unwrap();
    assert_eq!(checkpoint.get("w").unwrap().shape, [2, 3]);
    assert!(open(archive(b"\x80\x02}.")).unwrap().is_empty());
}

#[test]
fn code_is_never_run() {
    let run = [
        &b"\x80\x02"[..],
        &global("os", "system"),
        b"(",
        &text("touch /tmp/owned"),
        b"tR.",
    ]
    .concat();
    let message = refused(archive(&run));
    // The pickle begins behind the local header and the name of its entry.
    let at = 30 + "a/data.pkl".len() + 2;
    assert!(
        message.contains(&format!("offset {at}: GLOBAL asks for `os.system`")),
        "{message}"
    );
    for (module, name) in [
        ("builtins", "eval"),
        ("__builtin__", "exec"),
        ("posix", "system"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", ""),
        ("torch.storage", "FloatStorage"),
    ] {
        let message = refused(archive(
            &[&b"\x80\x02"[..], &global(module, name), b"."].concat(),
        ));
        assert!(
            message.contains(&format!("GLOBAL asks for `{module}.{name}`")),
            "{message}"
        );
        let stack = [&b"\x80\x04"[..], &text(module), &text(name), b"\x93."].concat();
        let message = refused(archive(&stack));
        assert!(
            message.contains(&format!("STACK_GLOBAL asks for `{module}.{name}`")),
            "{message}"
        );
    }
    // The names that are allowed, called in ways that are not.
    let ordered = global("collections", "OrderedDict");
    let float = global("torch", "FloatStorage");
    let parameter = global("torch._utils", "_rebuild_parameter");
    for (callee, arguments) in [
        (&float, &b")"[..]),
        (&ordered, b"(K\x01t"),
        (&ordered, b"(]K\x01at"),
        (&parameter, b"(NN}t"),
        (&parameter, b")"),
        (&ordered, b"K\x01"),
        (&text("collections.OrderedDict"), b")"),
    ] {
        let message = refused(archive(
            &[&b"\x80\x02"[..], callee, arguments, b"R."].concat(),
        ));
        assert!(message.contains("REDUCE: "), "{message}");
    }
    let build = [&b"\x80\x02"[..], &ordered, b"}b."].concat();
    assert!(refused(archive(&build)).contains("BUILD: expected attributes of a dictionary"));
}

#[test]
fn every_other_opcode_is_named() {
    for (opcode, name) in [
        (b'i', "INST"),
        (b'o', "OBJ"),
        (0x81, "NEWOBJ"),
        (0x92, "NEWOBJ_EX"),
        (0x82, "EXT1"),
        (0x84, "EXT4"),
        (b'P', "PERSID"),
        (b'I', "INT"),
        (b'L', "LONG"),
        (b'F', "FLOAT"),
        (b'S', "STRING"),
        (b'V', "UNICODE"),
        (b'0', "POP"),
        (b'1', "POP_MARK"),
        (b'2', "DUP"),
        (b'd', "DICT"),
        (b'l', "LIST"),
        (b'g', "GET"),
        (b'p', "PUT"),
        (0x8f, "EMPTY_SET"),
        (0x90, "ADDITEMS"),
        (0x91, "FROZENSET"),
        (0x96, "BYTEARRAY8"),
        (0x97, "NEXT_BUFFER"),
        (0xff, "no opcode"),
        (0, "no opcode"),
    ] {
        let message = refused(archive(&[0x80, 2, opcode, b'.']));
        assert!(
            message.contains(&format!("opcode {name} ({opcode:#04x})")),
            "{message}"
        );
    }
}

#[test]
fn the_stack_machine_is_bounded() {
    let pickle = |body: &[u8]| refused(archive(&[b"\x80\x02", body, b"."].concat()));
    assert!(pickle(b"\x8b\xff\xff\xff\x7f").contains("LONG4: a whole number of 2147483647 bytes"));
    assert!(pickle(b"\x8a\x09").contains("9 bytes, where 8 are the most"));
    assert!(pickle(b"X\xff\xff\xff\xff").contains("ends within BINUNICODE"));
    assert!(pickle(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff").contains("ends within BINUNICODE8"));
    assert!(pickle(b"B\xff\xff\xff\xff").contains("ends within BINBYTES"));
    assert!(pickle(b"X\x01\0\0\0\xff").contains("not UTF-8"));
    assert!(pickle(&[b'('; 1000]).contains("more than 256 nested containers"));
    assert!(pickle(&[b'N'; 100_000]).contains("more than 65536 values on the stack"));
    assert!(pickle(&[b'c'; 2000]).contains("a name of more than 512 bytes"));
    // Lists filled with lists: more values than any checkpoint has.
    let fill = [&b"("[..], &vec![b']'; 60_000], b"e"].concat();
    assert!(pickle(&[&b"]"[..], &fill.repeat(80)].concat()).contains("more than 4194304 values"));
    // A tuple of the remembered tuple twice, and so on: 2^1000 in Python, a few bytes here.
    let bomb = [&b")q\0"[..], &b"h\0h\0\x86q\0".repeat(1000)].concat();
    assert!(pickle(&bomb).contains("left on the stack"));
    let bomb = [&b")"[..], &b"q\0h\0\x86".repeat(1000)].concat();
    assert!(pickle(&bomb).contains("expected a dictionary of tensors"));
    // Nesting that would overflow the stack of a recursive reader, and a list in itself.
    assert!(pickle(&[&b")"[..], &b"\x85".repeat(1 << 20)].concat()).contains("found a tuple of 1"));
    assert!(pickle(b"]q\0h\0a").contains("found a list of 1"));
    assert!(pickle(b"h\x05").contains("nothing was remembered under 5"));
    assert!(pickle(b"j\xff\xff\xff\xff").contains("under 4294967295"));
    for body in [
        &b"t"[..],
        b"e",
        b"u",
        b"a",
        b"s",
        b"\x86",
        b"R",
        b"b",
        b"Q",
        b"q\0",
        b"\x93",
        b"((N\x85t",
    ] {
        assert!(!pickle(body).is_empty());
    }
    for body in [
        &b"K\x01K\x01a"[..],
        b"N(e",
        b"N(NNu",
        b"}(Nu",
        b"}NQ",
        b"NN\x93",
    ] {
        assert!(pickle(body).contains(": "), "{body:?}");
    }
    assert!(refused(archive(b"\x80\x02}.more")).contains("behind the pickle's STOP"));
    assert!(refused(archive(b"")).contains("ends"));
    assert!(refused(archive(b"\x80\x02N.")).contains("found None"));
}

#[test]
fn tensors_stay_in_their_storage() {
    for (shape, strides, offset, part) in [
        (
            &[2i64, 3][..],
            &[3i64, 1][..],
            1i64,
            "takes 6 elements, but its storage has 6",
        ),
        (&[7], &[1], 0, "takes 7 elements"),
        (&[6], &[1], i64::MAX, "from element 9223372036854775807"),
        (&[2], &[i64::MAX], 0, "takes"),
        (&[i64::MAX, 4], &[4, 1], 0, "overflows"),
        (&[i64::MAX], &[1], 0, "takes"),
        (&[4], &[0], 0, "more than once"),
        (&[3, 3], &[1, 1], 0, "more than once"),
        (&[i64::MAX, i64::MAX], &[0, 0], 0, "more than once"),
        (&[2, 3], &[1], 0, "2 dimensions, but 1 strides"),
        (&[-1], &[1], 0, "found the number -1"),
        (&[1], &[-1], 0, "found the number -1"),
        (&[1], &[1], -1, "begins at element -1"),
        (&[1; 9], &[1; 9], 0, "9 dimensions, where 8 are the most"),
        (&[0], &[1], 7, "begins at element 7 of a storage of 6"),
    ] {
        let message = refused(floats(shape, strides, offset));
        assert!(message.contains(part), "{message}");
    }
    // Zero elements, whatever the other sizes say.
    let empty = open(floats(&[i64::MAX, 0, i64::MAX], &[1, 1, 1], 6)).unwrap();
    assert_eq!(empty.get("w").unwrap().byte_len(), 0);
    for (kind, key, len, part) in [
        ("FloatStorage", "1", 6, "no storage `1`"),
        ("FloatStorage", "../data.pkl", 6, "no storage"),
        (
            "FloatStorage",
            "0",
            5,
            "should be 5 of F32, and has 24 bytes",
        ),
        ("DoubleStorage", "0", 6, "should be 6 of F64"),
        ("FloatStorage", "0", i64::MAX, "and has 24 bytes"),
        ("FloatStorage", "0", -6, "a storage of -6 elements"),
        ("OrderedDict", "0", 6, "GLOBAL asks for `torch.OrderedDict`"),
        ("float32", "0", 6, "no kind of storage"),
    ] {
        let message = refused(archive(&dict(&tensor(kind, key, len, 0, &[1], &[1]))));
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn dictionaries_of_something_else() {
    let w = tensor("FloatStorage", "0", 6, 0, &[6], &[1]);
    let twice = [&b"\x80\x02}("[..], &text("w"), &w, &text("w"), &w, b"u."].concat();
    assert!(refused(archive(&twice)).contains("`w` occurs twice"));
    let number = [&b"\x80\x02}K\x01"[..], &w, b"s."].concat();
    assert!(refused(archive(&number)).contains("a key that is no string: the number 1"));
    for value in [&b"K\x07"[..], b"N", b"}", b"G\0\0\0\0\0\0\0\0", b"C\x01x"] {
        assert!(refused(archive(&dict(value))).contains("`w` holds "));
    }
    // Python 2 wrote an ordered dictionary's items as a list of pairs.
    let pairs = [
        &global("collections", "OrderedDict")[..],
        b"(](",
        &text("w"),
        &w,
        b"lt",
    ]
    .concat();
    assert!(refused(archive(&[&b"\x80\x02"[..], &pairs, b"R."].concat())).contains("opcode LIST"));
    let pairs = [
        &global("collections", "OrderedDict")[..],
        b"(]]",
        b"(",
        &text("w"),
        &w,
        b"eatR.",
    ]
    .concat();
    assert_eq!(
        open(archive(&[&b"\x80\x02"[..], &pairs].concat()))
            .unwrap()
            .len(),
        1
    );
}
