//! Each step of a commit is made to fail, with an error and with a crash, and what is left is inspected.

use super::*;

/// A parent directory with `out` in it, which holds `old.txt`.
fn with_old() -> (tempfile::TempDir, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("out");
    fs::create_dir_all(out.join("sub")).unwrap();
    fs::write(out.join("old.txt"), "old").unwrap();
    fs::write(out.join("sub/deep.txt"), "old").unwrap();
    (parent, out)
}

fn stage(out: &Path) -> StagedDir {
    let staged = StagedDir::create(out).unwrap();
    fs::create_dir(staged.path().join("sub")).unwrap();
    fs::write(staged.path().join("new.txt"), "new").unwrap();
    fs::write(staged.path().join("sub/deep.txt"), "new").unwrap();
    staged
}

/// Which complete directory stands at `out`; panics on a mixture.
fn state(out: &Path) -> &'static str {
    let mut names: Vec<_> = fs::read_dir(out)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let deep = fs::read_to_string(out.join("sub/deep.txt")).unwrap();
    match (names.join(" ").as_str(), deep.as_str()) {
        ("new.txt sub", "new") => "new",
        ("old.txt sub", "old") => "old",
        other => panic!("a mixture: {other:?}"),
    }
}

fn entries(parent: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(parent)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn replaces_and_leaves_nothing_else() {
    let (parent, out) = with_old();
    stage(&out).commit().unwrap();
    assert_eq!(state(&out), "new");
    assert_eq!(entries(parent.path()), ["out"]);
}

#[test]
fn creates_parents_and_a_new_directory() {
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("a/b/out");
    stage(&out).commit().unwrap();
    assert_eq!(state(&out), "new");
    assert_eq!(entries(&parent.path().join("a/b")), ["out"]);
}

#[test]
fn dropping_without_commit_changes_nothing() {
    let (parent, out) = with_old();
    drop(stage(&out));
    assert_eq!(state(&out), "old");
    assert_eq!(entries(parent.path()), ["out"]);
}

#[test]
fn an_error_at_any_step_leaves_a_complete_directory() {
    for (step, expected) in [
        (Step::Sync, "old"),
        (Step::SetAside, "old"),
        (Step::PutInPlace, "old"),
        (Step::RemoveOld, "new"),
    ] {
        let (parent, out) = with_old();
        let mut reached = false;
        let error = stage(&out)
            .commit_steps(&mut |at| {
                if at == step {
                    reached = true;
                    return Err(io::Error::other("disk on fire"));
                }
                Ok(())
            })
            .unwrap_err();
        assert!(
            reached && error.to_string().contains("disk on fire"),
            "{step:?}: {error}"
        );
        assert_eq!(state(&out), expected, "{step:?}");
        // And the next writer is not disturbed.
        stage(&out).commit().unwrap();
        assert_eq!(state(&out), "new");
        assert_eq!(entries(parent.path()), ["out"], "{step:?}");
    }
}

/// A crash runs no destructor and no rollback: the panic is caught outside, and the guard is forgotten inside.
#[test]
fn a_crash_before_any_step_loses_nothing() {
    for (step, expected) in [
        (Step::Sync, "old"),
        (Step::SetAside, "old"),
        (Step::PutInPlace, "old"),
        (Step::RemoveOld, "new"),
    ] {
        let (parent, out) = with_old();
        // The states after each step, made by hand in the order of the protocol.
        let staged = stage(&out);
        let places = Places::of(&out).unwrap();
        let steps: [(Step, &dyn Fn()); 3] = [
            (Step::Sync, &|| sync_tree(&places.staging).unwrap()),
            (Step::SetAside, &|| {
                fs::rename(&places.target, &places.old).unwrap()
            }),
            (Step::PutInPlace, &|| {
                fs::rename(&places.staging, &places.target).unwrap()
            }),
        ];
        for (at, action) in steps {
            if at == step {
                break;
            }
            action();
        }
        // The process is gone: its lock with it, and no destructor has run.
        let mut staged = staged;
        staged._lock = None;
        std::mem::forget(staged);

        assert!(out.exists() || step == Step::PutInPlace);
        assert_eq!(recover(&out).unwrap(), step == Step::PutInPlace);
        assert_eq!(state(&out), expected, "{step:?}");
        stage(&out).commit().unwrap();
        assert_eq!(state(&out), "new");
        assert_eq!(entries(parent.path()), ["out"], "{step:?}");
    }
}

#[test]
fn create_recovers_by_itself() {
    let (_parent, out) = with_old();
    let places = Places::of(&out).unwrap();
    fs::rename(&out, &places.old).unwrap();
    drop(stage(&out));
    assert_eq!(state(&out), "old");
}

#[cfg(unix)]
#[test]
fn what_is_kept_is_taken_over() {
    let (parent, out) = with_old();
    assert!(StagedDir::resume(&out).unwrap().is_none());
    assert_eq!(interrupted(&out).unwrap(), None);
    let mut staged = stage(&out);
    assert!(interrupted(&out).is_err() && StagedDir::resume(&out).is_err());
    staged.keep();
    let path = staged.path().to_path_buf();
    drop(staged);
    assert_eq!(interrupted(&out).unwrap(), Some(path.clone()));
    // Dropped again, it stays again.
    drop(StagedDir::resume(&out).unwrap().unwrap());
    assert_eq!(interrupted(&out).unwrap(), Some(path));
    let resumed = StagedDir::resume(&out).unwrap().unwrap();
    assert_eq!(state(&out), "old");
    resumed.commit().unwrap();
    assert_eq!(state(&out), "new");
    assert_eq!(entries(parent.path()), ["out"]);
}

#[test]
fn two_writers_are_told_apart() {
    let (_parent, out) = with_old();
    let first = stage(&out);
    let error = StagedDir::create(&out).unwrap_err().to_string();
    assert!(error.contains("another process is writing"), "{error}");
    // A reader that looks for leftovers does not disturb a writer between two renames.
    let places = Places::of(&out).unwrap();
    fs::rename(&out, &places.old).unwrap();
    assert!(!recover(&out).unwrap());
    fs::rename(&places.old, &out).unwrap();
    first.commit().unwrap();
    assert_eq!(state(&out), "new");
}

#[cfg(unix)]
#[test]
fn links_are_followed() {
    let (parent, out) = with_old();
    let link = parent.path().join("link");
    std::os::unix::fs::symlink(&out, &link).unwrap();
    stage(&link).commit().unwrap();
    assert!(link.is_symlink());
    assert_eq!(state(&out), "new");
    fs::remove_dir_all(&out).unwrap();
    assert!(
        StagedDir::create(&link)
            .unwrap_err()
            .to_string()
            .contains("link to nothing")
    );
}

#[test]
fn impossible_targets_are_errors() {
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(
        StagedDir::create(&file)
            .unwrap_err()
            .to_string()
            .contains("not a directory")
    );
    assert_eq!(entries(parent.path()), ["file"]);
    assert!(StagedDir::create("/").is_err());
    assert!(StagedDir::create("").is_err());
    assert!(StagedDir::create(file.join("below")).is_err());
    assert!(write_file(parent.path(), |_| Ok(())).is_err());
    assert!(write_file("", |_| Ok(())).is_err());
    assert!(!recover("/").unwrap());
}

#[test]
fn a_file_is_replaced_whole_or_not_at_all() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("f");
    write_file(&path, |out| out.write_all(b"first")).unwrap();
    let error = write_file(&path, |out| {
        out.write_all(&[0u8; 3 << 20])?;
        Err(io::Error::other("disk full"))
    })
    .unwrap_err();
    assert!(error.to_string().contains("disk full"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"first");
    write_file(&path, |out| out.write_all(b"second")).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"second");
    assert_eq!(entries(parent.path()), ["f"]);
}
