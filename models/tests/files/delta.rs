//! Deltas: both ways to the bit, small where little changed, and refused where they do not belong.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use graft_models::Error;
use graft_models::delta::{apply, diff, revert};
use graft_models::safetensors::{TensorView, pt_metadata, to_bytes};
use graft_tensor::DType;
use proptest::prelude::*;
use zip::write::SimpleFileOptions;

/// Name to type, number of elements and bytes.
type Tensors = BTreeMap<String, (DType, usize, Vec<u8>)>;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, tensors: &Tensors) -> Vec<u8> {
        let views: Vec<([usize; 1], &String, DType, &Vec<u8>)> = tensors
            .iter()
            .map(|(name, (dtype, n, data))| ([*n], name, *dtype, data))
            .collect();
        let views = views.iter().map(|(shape, name, dtype, data)| TensorView {
            name,
            dtype: *dtype,
            shape,
            data,
        });
        let bytes = to_bytes(&pt_metadata(), views).unwrap();
        std::fs::write(self.path(name), &bytes).unwrap();
        bytes
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

fn floats(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn f32s(values: &[f32]) -> (DType, usize, Vec<u8>) {
    let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    (DType::F32, values.len(), bytes)
}

/// A bare encoder with a buffer, and a classifier that was made of it.
fn pair() -> (Tensors, Tensors) {
    let embeddings = floats(1, 40_000);
    let mut layer = floats(2, 10_000);
    let base = Tensors::from([
        ("embeddings.weight".to_owned(), f32s(&embeddings)),
        ("layer.0.weight".to_owned(), f32s(&layer)),
        ("pooler.bias".to_owned(), f32s(&floats(3, 50))),
        ("position_ids".to_owned(), (DType::I64, 3, vec![5; 24])),
    ]);
    layer.iter_mut().for_each(|x| *x += 1e-4);
    let tuned = Tensors::from([
        ("bert.embeddings.weight".to_owned(), f32s(&embeddings)),
        ("bert.layer.0.weight".to_owned(), f32s(&layer)),
        ("bert.pooler.bias".to_owned(), f32s(&floats(3, 50))),
        ("classifier.weight".to_owned(), f32s(&floats(4, 30))),
    ]);
    (base, tuned)
}

/// Files `base.safetensors` and `tuned.safetensors`, and the delta between them.
fn made(folder: &Folder) -> [Vec<u8>; 2] {
    let (base, tuned) = pair();
    let files = [
        folder.write("base.safetensors", &base),
        folder.write("tuned.safetensors", &tuned),
    ];
    let (base, tuned) = (
        folder.text("base.safetensors"),
        folder.text("tuned.safetensors"),
    );
    diff(&base, &tuned, &folder.path("delta")).unwrap();
    files
}

#[test]
fn only_what_changed_is_written() {
    let folder = Folder::new();
    let [base, tuned] = made(&folder);
    let args = (
        folder.text("base.safetensors"),
        folder.text("tuned.safetensors"),
    );
    let made = diff(&args.0, &args.1, &folder.path("again")).unwrap();
    assert_eq!((made.same, made.changed, made.new, made.gone), (2, 1, 1, 1));
    assert_eq!(made.files, [base.len() as u64, tuned.len() as u64]);
    // The layer's 40 kB, of which the upper bytes are equal; of the embeddings' 160 kB, nothing.
    assert!(made.bytes < 34_000, "{}", made.bytes);
    let delta = std::fs::read(folder.path("delta")).unwrap();
    assert_eq!(
        delta,
        std::fs::read(folder.path("again")).unwrap(),
        "equal inputs, equal deltas"
    );
    let restored = apply(&args.0, &folder.path("delta"), &folder.path("out")).unwrap();
    assert_eq!((restored.tensors, restored.bytes), (4, tuned.len() as u64));
    assert_eq!(std::fs::read(folder.path("out")).unwrap(), tuned);
    revert(&args.1, &folder.path("delta"), &folder.path("out")).unwrap();
    assert_eq!(std::fs::read(folder.path("out")).unwrap(), base);
    assert_eq!(
        folder.names(),
        [
            "again",
            "base.safetensors",
            "delta",
            "out",
            "tuned.safetensors"
        ]
    );
}

#[test]
fn a_directory_stands_for_its_weights() {
    let folder = Folder::new();
    let [_, tuned] = made(&folder);
    std::fs::create_dir(folder.path("model")).unwrap();
    std::fs::rename(
        folder.path("base.safetensors"),
        folder.path("model/model.safetensors"),
    )
    .unwrap();
    apply(
        &folder.text("model"),
        &folder.path("delta"),
        &folder.path("out"),
    )
    .unwrap();
    assert_eq!(std::fs::read(folder.path("out")).unwrap(), tuned);
    // In an archive, they are found as well.
    let file = std::fs::File::create(folder.path("model.whl")).unwrap();
    let mut zip = zip::ZipWriter::new(file);
    for (name, bytes) in [
        ("m/config.json", b"{}".to_vec()),
        (
            "m/model.safetensors",
            std::fs::read(folder.path("model/model.safetensors")).unwrap(),
        ),
    ] {
        zip.start_file(name, SimpleFileOptions::default()).unwrap();
        zip.write_all(&bytes).unwrap();
    }
    zip.finish().unwrap();
    apply(
        &folder.text("model.whl"),
        &folder.path("delta"),
        &folder.path("out2"),
    )
    .unwrap();
    assert_eq!(std::fs::read(folder.path("out2")).unwrap(), tuned);
    std::fs::write(folder.path("model/model.safetensors.index.json"), "{}").unwrap();
    std::fs::remove_file(folder.path("model/model.safetensors")).unwrap();
    let error = apply(
        &folder.text("model"),
        &folder.path("delta"),
        &folder.path("x"),
    )
    .unwrap_err();
    assert!(error.to_string().contains("one by one"), "{error}");
}

#[test]
fn another_base_is_refused_by_name_and_hash() {
    let folder = Folder::new();
    made(&folder);
    let (mut base, _) = pair();
    base.get_mut("layer.0.weight").unwrap().2[77] ^= 1;
    base.remove("position_ids");
    base.insert("spare".to_owned(), f32s(&[1.0]));
    folder.write("other.safetensors", &base);
    std::fs::write(folder.path("out"), "mine").unwrap();
    let refused = |from: &str, back: bool| {
        let (from, delta, out) = (folder.text(from), folder.path("delta"), folder.path("out"));
        let error = match back {
            false => apply(&from, &delta, &out),
            true => revert(&from, &delta, &out),
        };
        let error = error.unwrap_err().to_string();
        assert_eq!(std::fs::read(folder.path("out")).unwrap(), b"mine");
        error
    };
    let said = refused("other.safetensors", false);
    let hash = "[0-9a-f]{64}";
    for wanted in [
        "it is not the base file of",
        "tensor `layer.0.weight` has the SHA-256",
        "tensor `position_ids` is missing",
        "tensor `spare` is not in it",
        "name the base file",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    let hashes = said
        .split(|c: char| !c.is_ascii_hexdigit())
        .filter(|word| word.len() == 64);
    assert_eq!(hashes.count(), 4, "{hash}: {said}");
    assert!(!said.contains("embeddings"), "{said}");
    let said = refused("tuned.safetensors", false);
    assert!(
        said.contains("already") && said.contains("trainer revert"),
        "{said}"
    );
    let said = refused("base.safetensors", true);
    assert!(
        said.contains("already") && said.contains("trainer apply"),
        "{said}"
    );
    // A header that is laid out otherwise.
    let (base, _) = pair();
    let bytes = std::fs::read(folder.path("base.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut spaced = (length as u64 + 8).to_le_bytes().to_vec();
    spaced.extend(&bytes[8..8 + length]);
    spaced.extend([b' '; 8]);
    spaced.extend(&bytes[8 + length..]);
    std::fs::write(folder.path("other.safetensors"), spaced).unwrap();
    let said = refused("other.safetensors", false);
    assert!(
        said.contains("all tensors are the same"),
        "{said} {}",
        base.len()
    );
}

#[test]
fn outputs_replace_no_input() {
    let folder = Folder::new();
    made(&folder);
    let (base, tuned) = (
        folder.text("base.safetensors"),
        folder.text("tuned.safetensors"),
    );
    let before = std::fs::read(&base).unwrap();
    for error in [
        diff(&base, &tuned, Path::new(&base)).map(|_| ()),
        diff(&base, &tuned, Path::new(&tuned)).map(|_| ()),
        apply(&base, &folder.path("delta"), Path::new(&base)).map(|_| ()),
        revert(&tuned, &folder.path("delta"), &folder.path("delta")).map(|_| ()),
    ] {
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::Output { .. }), "{error}");
        assert!(error.to_string().contains("it would replace"), "{error}");
    }
    assert_eq!(std::fs::read(&base).unwrap(), before);
}

type Change = Box<dyn Fn(Vec<u8>) -> Vec<u8>>;

/// The delta with one entry rewritten.
fn tampered(delta: &Path, out: &Path, name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>) {
    let mut zip = zip::ZipArchive::new(std::fs::File::open(delta).unwrap()).unwrap();
    let mut writer = zip::ZipWriter::new(std::fs::File::create(out).unwrap());
    for i in 0..zip.len() {
        let mut entry = zip.by_index(i).unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        if entry.name() == name {
            bytes = change(bytes);
        }
        writer
            .start_file(entry.name(), SimpleFileOptions::default())
            .unwrap();
        writer.write_all(&bytes).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn damaged_deltas_are_refused() {
    let folder = Folder::new();
    made(&folder);
    let (base, delta) = (folder.text("base.safetensors"), folder.path("delta"));
    let refused = |what: &str| {
        let error = apply(&base, &folder.path("bad"), &folder.path("out"))
            .unwrap_err()
            .to_string();
        assert!(!folder.path("out").exists(), "{what}");
        error
    };
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains(from), "{from}: {text}");
            text.replace(from, to).into_bytes()
        }
    };
    let cases: [(&str, Change, &str); 9] = [
        (
            "xor/1/0",
            Box::new(|mut bytes| {
                bytes[9] ^= 1;
                bytes
            }),
            "comes out has the SHA-256",
        ),
        (
            "xor/1/2",
            Box::new(|bytes| bytes[1..].to_vec()),
            "`bert.layer.0.weight`",
        ),
        (
            "xor/1/2",
            Box::new(|mut bytes| {
                bytes.push(0);
                bytes
            }),
            "more than",
        ),
        (
            "tuned.header",
            Box::new(|bytes| bytes[..20].to_vec()),
            "header",
        ),
        (
            "tuned.header",
            Box::new(|mut bytes| {
                bytes[0] ^= 0xff;
                bytes
            }),
            "header",
        ),
        (
            "delta.json",
            Box::new(|_| b"{}".to_vec()),
            "delta.json is malformed",
        ),
        (
            "delta.json",
            Box::new(replace("graft-delta/1", "graft-delta/2")),
            "graft-delta/1",
        ),
        (
            "delta.json",
            Box::new(replace("{\"xor\":1}", "{\"xor\":99}")),
            "does not fit",
        ),
        (
            "delta.json",
            Box::new(replace("{\"xor\":1}", "{\"xor\":0}")),
            "does not fit",
        ),
    ];
    for (name, change, wanted) in cases {
        tampered(&delta, &folder.path("bad"), name, &change);
        let said = refused(name);
        assert!(said.contains(wanted), "{name}: {said}");
    }
    // Cut short anywhere, and with any byte changed: an error or the right file, never another one.
    let bytes = std::fs::read(&delta).unwrap();
    let right = std::fs::read(folder.path("tuned.safetensors")).unwrap();
    for cut in (0..bytes.len()).step_by(997) {
        std::fs::write(folder.path("bad"), &bytes[..cut]).unwrap();
        refused("cut");
    }
    for at in (0..bytes.len()).step_by(701) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x41;
        std::fs::write(folder.path("bad"), &bytes).unwrap();
        if apply(&base, &folder.path("bad"), &folder.path("out")).is_ok() {
            assert_eq!(std::fs::read(folder.path("out")).unwrap(), right, "{at}");
            std::fs::remove_file(folder.path("out")).unwrap();
        }
        assert!(!folder.path("out").exists());
    }
}

/// What happens to a tensor between base and tuned file.
#[derive(Clone, Debug)]
enum Fate {
    Kept,
    Changed,
    Renamed,
    Gone,
    Retyped,
}

fn tensors() -> impl Strategy<Value = Vec<(String, DType, usize, u8, Fate)>> {
    let dtype = prop::sample::select(vec![
        DType::F32,
        DType::Bf16,
        DType::F64,
        DType::U8,
        DType::I64,
    ]);
    let fate = prop::sample::select(vec![
        Fate::Kept,
        Fate::Changed,
        Fate::Changed,
        Fate::Renamed,
        Fate::Gone,
        Fate::Retyped,
    ]);
    prop::collection::vec(
        (
            "[a-c]{1,2}(\\.[a-c]{1,2})?",
            dtype,
            0usize..40,
            any::<u8>(),
            fate,
        ),
        0..7,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_ways_to_the_bit(all in tensors(), news in tensors()) {
        let folder = Folder::new();
        let fill = |dtype: DType, count: usize, seed: u8| -> Vec<u8> {
            (0..count * dtype.size()).map(|i| seed.wrapping_add((i * 7) as u8)).collect()
        };
        let (mut base, mut tuned) = (Tensors::new(), Tensors::new());
        for (name, dtype, count, seed, fate) in all {
            let data = fill(dtype, count, seed);
            base.insert(name.clone(), (dtype, count, data.clone()));
            match fate {
                Fate::Kept => { tuned.insert(name, (dtype, count, data)); }
                Fate::Changed => { tuned.insert(name, (dtype, count, fill(dtype, count, !seed))); }
                Fate::Renamed => { tuned.insert(format!("model.{name}"), (dtype, count, data)); }
                Fate::Gone => {}
                Fate::Retyped => { tuned.insert(name, (DType::F16, count, fill(DType::F16, count, seed))); }
            }
        }
        for (name, dtype, count, seed, _) in news {
            tuned.insert(format!("new.{name}"), (dtype, count, fill(dtype, count, seed)));
        }
        let files = [folder.write("base.safetensors", &base), folder.write("tuned.safetensors", &tuned)];
        let (a, b) = (folder.text("base.safetensors"), folder.text("tuned.safetensors"));
        let delta = folder.path("delta");
        let made = diff(&a, &b, &delta).unwrap();
        prop_assert_eq!(made.same + made.changed + made.new, tuned.len());
        if files[0] == files[1] {
            return Ok(());
        }
        apply(&a, &delta, &folder.path("out")).unwrap();
        prop_assert!(std::fs::read(folder.path("out")).unwrap() == files[1]);
        revert(&b, &delta, &folder.path("out")).unwrap();
        prop_assert!(std::fs::read(folder.path("out")).unwrap() == files[0]);
    }
}
