//! Directories, wheels and the Hugging Face cache, each of them also broken.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use graft_models::safetensors::{pt_metadata, to_bytes, write_checkpoint};
use graft_models::source::HubEnv;
use graft_models::{Error, ModelSource};
use graft_tensor::DType;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Weights of two tensors: `w` of 0, 1, 2, ... and `b`.
fn weights() -> Vec<u8> {
    let w: Vec<u8> = (0..6u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let b = 9f32.to_le_bytes();
    to_bytes(
        &pt_metadata(),
        [
            ("w", DType::F32, &[2usize, 3][..], &w[..]),
            ("b", DType::F32, &[1][..], &b[..]),
        ],
    )
    .unwrap()
}

fn model_dir(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), "{}").unwrap();
    fs::write(dir.join("model.safetensors"), weights()).unwrap();
}

fn check(source: &ModelSource) {
    assert_eq!(
        source.read_file("config.json").unwrap().as_deref(),
        Some(&b"{}"[..])
    );
    assert_eq!(source.read_file("none.json").unwrap(), None);
    let mut checkpoint = source.checkpoint().unwrap();
    assert_eq!(checkpoint.len(), 2);
    let mut w = [0; 24];
    checkpoint.read_into("w", &mut w).unwrap();
    assert_eq!(w[4..8], 1f32.to_le_bytes());
    let mut seen = Vec::new();
    checkpoint
        .read_each(&mut |_| true, &mut |info, bytes| {
            seen.push((info.name.clone(), bytes.len()));
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, [("b".to_string(), 4), ("w".to_string(), 24)]);
}

fn resolve(spec: &Path) -> Result<ModelSource, Error> {
    ModelSource::resolve_with(spec.to_str().unwrap(), &HubEnv::default())
}

/// A zip with these entries, deflated, or stored where the name ends in `#`.
fn zip_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let method = if name.ends_with('#') {
            CompressionMethod::Stored
        } else {
            CompressionMethod::Deflated
        };
        let options = SimpleFileOptions::default().compression_method(method);
        zip.start_file(name.trim_end_matches('#'), options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn wheel(dir: &Path, bytes: &[u8]) -> PathBuf {
    let path = dir.join("model-0.1.0-py3-none-any.whl");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_directory() {
    let dir = tempfile::tempdir().unwrap();
    model_dir(dir.path());
    let source = resolve(dir.path()).unwrap();
    assert_eq!(source.path(), Some(dir.path()));
    check(&source);
    for name in [
        "../config.json",
        "/etc/passwd",
        "a/../../b",
        "",
        ".",
        "a\\b",
    ] {
        assert!(
            matches!(source.read_file(name), Err(Error::UnsafePath { .. })),
            "{name}"
        );
    }
    fs::create_dir(dir.path().join("1_Pooling")).unwrap();
    fs::write(dir.path().join("1_Pooling/config.json"), "[1]").unwrap();
    assert_eq!(
        source
            .read_file("1_Pooling/config.json")
            .unwrap()
            .as_deref(),
        Some(&b"[1]"[..])
    );
    let error = source
        .require_file("tokenizer.json", "fetch it")
        .unwrap_err()
        .to_string();
    assert!(error.contains("tokenizer.json; fetch it"), "{error}");
}

#[test]
fn a_directory_that_holds_no_model() {
    let dir = tempfile::tempdir().unwrap();
    let error = resolve(dir.path()).unwrap_err().to_string();
    assert!(error.contains("no config.json (it is empty)"), "{error}");
    fs::write(dir.path().join("README.md"), "").unwrap();
    let error = resolve(dir.path()).unwrap_err().to_string();
    assert!(error.contains("`README.md`"), "{error}");
    fs::write(dir.path().join("model.safetensors"), weights()).unwrap();
    let error = resolve(&dir.path().join("model.safetensors"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("single file"), "{error}");
}

#[test]
fn a_wheel() {
    let dir = tempfile::tempdir().unwrap();
    let weights = weights();
    for suffix in ["", "#"] {
        let bytes = zip_of(&[
            ("pkg/__init__.py", b"raise SystemExit"),
            ("pkg/model/config.json", b"{}"),
            (&format!("pkg/model/model.safetensors{suffix}"), &weights),
            ("pkg/model/1_Pooling/config.json", b"[1]"),
            ("pkg-0.1.0.dist-info/RECORD", b""),
        ]);
        let path = wheel(dir.path(), &bytes);
        let source = resolve(&path).unwrap();
        assert_eq!(source.path(), None);
        check(&source);
        assert_eq!(
            source
                .read_file("1_Pooling/config.json")
                .unwrap()
                .as_deref(),
            Some(&b"[1]"[..])
        );
        assert!(
            source.to_string().contains("any.whl!pkg/model/"),
            "{source}"
        );
        // Nothing was unpacked beside it.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

#[test]
fn a_wheel_with_shards() {
    let dir = tempfile::tempdir().unwrap();
    let parts = tempfile::tempdir().unwrap();
    let data = [0u8; 8];
    let tensors = ["a", "b"].map(|name| (name, DType::F32, &[2usize][..], &data[..]));
    write_checkpoint(parts.path(), &pt_metadata(), tensors, 8).unwrap();
    let mut entries = vec![("config.json".to_string(), b"{}".to_vec())];
    for entry in fs::read_dir(parts.path()).unwrap() {
        let entry = entry.unwrap();
        entries.push((
            entry.file_name().into_string().unwrap(),
            fs::read(entry.path()).unwrap(),
        ));
    }
    let entries: Vec<(&str, &[u8])> = entries
        .iter()
        .map(|(n, b)| (n.as_str(), b.as_slice()))
        .collect();
    let source = resolve(&wheel(dir.path(), &zip_of(&entries))).unwrap();
    assert_eq!(source.checkpoint().unwrap().len(), 2);
}

#[test]
fn archives_that_cannot_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let weights = weights();
    let w = weights.as_slice();
    let error = |bytes: &[u8]| resolve(&wheel(dir.path(), bytes)).unwrap_err().to_string();
    assert!(error(b"not a zip").contains("no zip archive"));
    assert!(error(b"").contains("no zip archive"));
    assert!(error(&zip_of(&[("a/config.json", b"{}")])).contains("no folder in it has both"));
    assert!(
        error(&zip_of(&[
            ("a/config.json", b"{}"),
            ("b/model.safetensors", w)
        ]))
        .contains("no folder")
    );
    let two = [
        ("a/config.json", &b"{}"[..]),
        ("a/model.safetensors", w),
        ("b/config.json", b"{}"),
        ("b/model.safetensors", w),
    ];
    assert!(error(&zip_of(&two)).contains("`a/`, `b/`"));
    let out = [
        ("../a/config.json", &b"{}"[..]),
        ("../a/model.safetensors", w),
    ];
    assert!(error(&zip_of(&out)).contains("not a plain file name"));
    // Cut off: the directory at the end is gone.
    let good = zip_of(&[("a/config.json", b"{}"), ("a/model.safetensors", w)]);
    assert!(!error(&good[..good.len() / 2]).is_empty());
}

#[test]
fn damage_inside_an_archive_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let weights = weights();
    let good = zip_of(&[("config.json", b"{}"), ("model.safetensors#", &weights)]);
    // One bit in the last tensor, stored without compression: only the checksum can tell.
    let needle = 5f32.to_le_bytes();
    let at = good.windows(4).position(|w| w == needle).unwrap();
    let mut bad = good.clone();
    bad[at] ^= 1;
    let source = resolve(&wheel(dir.path(), &bad)).unwrap();
    let error = source
        .checkpoint()
        .unwrap()
        .read_each(&mut |_| true, &mut |_, _| Ok(()))
        .unwrap_err();
    assert!(
        matches!(&error, Error::Io { .. }) && error.to_string().contains("checksum"),
        "{error}"
    );
    // Any single damaged byte gives an error or the right bytes, never a panic.
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x41;
        if let Ok(source) = resolve(&wheel(dir.path(), &bad))
            && let Ok(mut checkpoint) = source.checkpoint()
        {
            let mut bytes = Vec::new();
            let read = checkpoint.read_each(&mut |_| true, &mut |_, data| {
                bytes.extend_from_slice(data);
                Ok(())
            });
            assert!(read.is_err() || weights.ends_with(&bytes), "byte {at}");
        }
    }
}

#[test]
fn a_zip_bomb_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    // 80 MB of zeros shrink a thousandfold.
    let zeros = vec![0u8; 80 << 20];
    let bomb = zip_of(&[("config.json", b"{}"), ("model.safetensors", &zeros)]);
    assert!(bomb.len() < 1 << 20);
    let source = resolve(&wheel(dir.path(), &bomb)).unwrap();
    let error = source.checkpoint().unwrap_err();
    assert!(
        matches!(&error, Error::Archive { .. }) && error.to_string().contains("100 to one"),
        "{error}"
    );
}

/// A cache with one model: refs/main names a snapshot whose files are links into blobs, as the hub's library lays
/// it out.
fn cache(root: &Path, repo: &str) -> PathBuf {
    let repo = root.join(format!("models--{repo}"));
    let snapshot = repo.join("snapshots/0123abcd");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::create_dir_all(repo.join("blobs")).unwrap();
    fs::write(repo.join("refs/main"), "0123abcd").unwrap();
    for (name, bytes) in [
        ("config.json", b"{}".to_vec()),
        ("model.safetensors", weights()),
    ] {
        let blob = repo.join("blobs").join(format!("blob-of-{name}"));
        fs::write(&blob, bytes).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(
            Path::new("../../blobs").join(blob.file_name().unwrap()),
            snapshot.join(name),
        )
        .unwrap();
        #[cfg(not(unix))]
        fs::copy(&blob, snapshot.join(name)).unwrap();
    }
    repo
}

#[test]
fn the_cache() {
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| Some(root.path().join(path));
    let envs = [
        (
            "hub-cache",
            HubEnv {
                hf_hub_cache: at("hub-cache"),
                hf_home: at("other"),
                ..HubEnv::default()
            },
        ),
        (
            "hf-home/hub",
            HubEnv {
                hf_home: at("hf-home"),
                home: at("other"),
                ..HubEnv::default()
            },
        ),
        (
            "xdg/huggingface/hub",
            HubEnv {
                xdg_cache_home: at("xdg"),
                home: at("other"),
                ..HubEnv::default()
            },
        ),
        (
            "home/.cache/huggingface/hub",
            HubEnv {
                home: at("home"),
                ..HubEnv::default()
            },
        ),
    ];
    for (place, env) in envs {
        cache(&root.path().join(place), "no-such-org--tiny-model");
        cache(&root.path().join(place), "no-such-bert");
        for spec in [
            "no-such-org/tiny-model",
            "no-such-org/tiny-model@main",
            "no-such-org/tiny-model@0123abcd",
            "no-such-bert",
        ] {
            let source = ModelSource::resolve_with(spec, &env).unwrap();
            assert!(
                source.path().unwrap().starts_with(root.path().join(place)),
                "{source}"
            );
            check(&source);
        }
    }
}

#[test]
fn a_cache_without_the_model_says_where_it_looked() {
    let root = tempfile::tempdir().unwrap();
    let env = HubEnv {
        hf_hub_cache: Some(root.path().join("c")),
        ..HubEnv::default()
    };
    let error = |spec: &str| {
        ModelSource::resolve_with(spec, &env)
            .unwrap_err()
            .to_string()
    };
    let text = error("no-such-org/m");
    for part in [
        "no such file or directory",
        "models--no-such-org--m",
        "the cache does not exist",
        "HF_HUB_CACHE",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let repo = cache(&root.path().join("c"), "no-such-org--m");
    assert!(error("no-such-org/n").contains("no such model in the cache"));
    let text = error("no-such-org/m@v2");
    assert!(
        text.contains("refs/v2: no such file") && text.contains("`0123abcd`"),
        "{text}"
    );
    fs::remove_file(repo.join("refs/main")).unwrap();
    assert!(error("no-such-org/m").contains("no-such-org/m@"));
    // A reference's content becomes part of a path.
    for hostile in ["../../../..", "/etc", "..", "", "a/b"] {
        fs::write(repo.join("refs/main"), hostile).unwrap();
        let error = ModelSource::resolve_with("no-such-org/m", &env).unwrap_err();
        assert!(
            matches!(&error, Error::UnsafePath { .. }),
            "{hostile}: {error}"
        );
    }
    fs::write(repo.join("refs/main"), "0123abcd\n").unwrap();
    fs::remove_file(repo.join("snapshots/0123abcd/config.json")).unwrap();
    assert!(error("no-such-org/m").contains("no config.json"));
    let text = ModelSource::resolve_with("no-such-org/m", &HubEnv::default())
        .unwrap_err()
        .to_string();
    assert!(text.contains("no Hugging Face cache"), "{text}");
}

#[test]
fn names_that_can_be_nothing() {
    for spec in [
        "",
        "a/b/c",
        "../nowhere",
        "/nowhere/at/all",
        "no--such",
        "x@",
        "x@../y",
        "-x/y",
        "a\0b",
        "é/x",
        ".x/y",
    ] {
        let error = ModelSource::resolve_with(spec, &HubEnv::default()).unwrap_err();
        assert!(matches!(&error, Error::NotFound { .. }), "{spec}: {error}");
        assert!(!error.to_string().contains('\0'));
    }
}

#[test]
fn a_broken_link_is_an_error_and_not_an_absent_file() {
    let dir = tempfile::tempdir().unwrap();
    model_dir(dir.path());
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", dir.path().join("model.safetensors")).unwrap();
        let error = resolve(dir.path()).unwrap().checkpoint().unwrap_err();
        assert!(matches!(&error, Error::Io { .. }), "{error}");
    }
}

#[test]
fn an_interrupted_replacement_is_put_back() {
    let parent = tempfile::tempdir().unwrap();
    model_dir(&parent.path().join(".out.graft-old"));
    check(&resolve(&parent.path().join("out")).unwrap());
    assert!(!parent.path().join(".out.graft-old").exists());
}
