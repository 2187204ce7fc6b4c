//! Files and directories that are replaced in one step, so that a crash never leaves half of one.
//!
//! # One file
//! [`write_file`] writes a temporary file in the same directory, flushes it to disk, and renames it over the target:
//! rename is atomic on one file system. Then the directory is flushed, so that the new name outlives a power cut.
//!
//! # A directory
//! No portable call replaces a directory that is not empty, so [`StagedDir`] takes these steps for target `out`:
//!
//! 1. everything is written into `.out.graft-new` beside it;
//! 2. on commit, every file and directory in there is flushed to disk;
//! 3. an existing `out` is renamed to `.out.graft-old`;
//! 4. `.out.graft-new` is renamed to `out`, and the parent directory is flushed;
//! 5. `.out.graft-old` is removed.
//!
//! What a crash leaves, by the step after which it happened: 1 or 2, the old `out` untouched, and a staging
//! directory that the next writer removes; 3, no `out`, but the old one complete as `.out.graft-old`, which
//! [`recover`] (called by the next [`StagedDir::create`], and by the lookup of models) renames back; 4, the new
//! `out`, and the old one beside it, which the next commit removes. At no time is there neither an old nor a new
//! complete directory, and nothing is deleted before what replaces it is in place.
//!
//! The staging directory is locked while a writer lives. A second writer to the same target gets an error; a
//! staging directory without a lock belongs to nobody: the next writer removes it, or goes on with it
//! ([`StagedDir::resume`]) if there is something in it that was worth keeping ([`StagedDir::keep`]).

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Writes a file so that `path` holds either what it held before or all of the new content.
///
/// `body` writes the content through a buffer.
///
/// # Errors
/// [`Error::Io`] or [`Error::Output`]; the temporary file is then removed and `path` is as before.
pub fn write_file(
    path: impl AsRef<Path>,
    body: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let (parent, name) = split(path)?;
    if path.is_dir() {
        return Err(Error::Output {
            path: path.to_path_buf(),
            reason: "it is a directory".to_string(),
            help: "name a file".to_string(),
        });
    }
    // Distinct for every process and call: two writers of one file must not share a temporary one.
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let unique = format!(
        "graft-tmp-{}-{}",
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed)
    );
    let temporary = parent.join(hidden(&name, &unique));
    let result = (|| {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(|e| Error::io("create", &temporary, e))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        body(&mut out)
            .and_then(|()| out.flush())
            .map_err(|e| Error::io("write", path, e))?;
        out.get_ref()
            .sync_all()
            .map_err(|e| Error::io("flush", path, e))?;
        drop(out);
        fs::rename(&temporary, path).map_err(|e| Error::io("put into place", path, e))?;
        sync_dir(&parent)
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Puts back the directory that an interrupted replacement of `target` had set aside, if there is one.
///
/// Returns whether it did. Does nothing while a writer is at work on `target`, or when `target` exists.
///
/// # Errors
/// [`Error::Io`] if the rename fails.
pub fn recover(target: impl AsRef<Path>) -> Result<bool> {
    let Ok(places) = Places::of(target.as_ref()) else {
        return Ok(false);
    };
    // A living writer between steps 3 and 4 finishes by itself.
    if places.staging.exists() && matches!(lock(&places.staging), Lock::Taken) {
        return Ok(false);
    }
    places.recover()
}

/// A directory that is written aside and put into place in one step; see the [module](self) for the protocol.
///
/// Dropped without [`StagedDir::commit`], it is removed, unless it was said to [keep](StagedDir::keep) it, and the target
/// stays as it was.
#[derive(Debug)]
pub struct StagedDir {
    places: Places,
    /// Holds the lock.
    _lock: Option<File>,
    /// Whether it stays where it is when this is dropped, or is at its target already.
    stays: bool,
}

/// The staging directory that an interrupted writer to `target` has left, if there is one.
///
/// # Errors
/// [`Error::Output`] if `target` cannot be a directory's name, or is being written by another process.
pub fn interrupted(target: impl AsRef<Path>) -> Result<Option<PathBuf>> {
    let places = Places::of(target.as_ref())?;
    if !places.staging.is_dir() {
        return Ok(None);
    }
    match lock(&places.staging) {
        Lock::Taken => Err(places.busy()),
        Lock::Free(_) | Lock::Unsupported => Ok(Some(places.staging)),
    }
}

impl StagedDir {
    /// Creates an empty staging directory beside `target`, after undoing what an interrupted writer left.
    ///
    /// `target` need not exist; its parent directories are created. If it exists it must be a directory, and all of
    /// its content will be replaced. A symbolic link is followed, not replaced.
    ///
    /// # Errors
    /// [`Error::Output`] if `target` cannot be a directory's name, is no directory, or is being written by another
    /// process; [`Error::Io`].
    pub fn create(target: impl AsRef<Path>) -> Result<StagedDir> {
        let target = target.as_ref();
        let places = Places::of(target)?;
        fs::create_dir_all(&places.parent).map_err(|e| Error::io("create", &places.parent, e))?;
        if places.staging.exists() {
            match lock(&places.staging) {
                Lock::Taken => return Err(places.busy()),
                // Nobody's: its writer was interrupted.
                Lock::Free(_) | Lock::Unsupported => {
                    fs::remove_dir_all(&places.staging)
                        .map_err(|e| Error::io("remove", &places.staging, e))?;
                }
            }
        }
        fs::create_dir(&places.staging).map_err(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => places.busy(),
            _ => Error::io("create", &places.staging, e),
        })?;
        let staged = StagedDir::hold(places, false)?;
        if staged.places.target.exists() && !staged.places.target.is_dir() {
            return Err(Error::Output {
                path: target.to_path_buf(),
                reason: "it exists and is not a directory".to_string(),
                help: "name another directory".to_string(),
            });
        }
        Ok(staged)
    }

    /// Takes over the staging directory that an interrupted writer to `target` has left, with all that is in it; none if
    /// there is none. It stays if this is dropped.
    ///
    /// # Errors
    /// As [`interrupted`]; [`Error::Io`].
    pub fn resume(target: impl AsRef<Path>) -> Result<Option<StagedDir>> {
        let places = Places::of(target.as_ref())?;
        match places.staging.is_dir() {
            true => StagedDir::hold(places, true).map(Some),
            false => Ok(None),
        }
    }

    /// Locks a staging directory that is there, and undoes what an interrupted commit left.
    fn hold(places: Places, stays: bool) -> Result<StagedDir> {
        let held = match lock(&places.staging) {
            Lock::Free(file) => Some(file),
            Lock::Unsupported => None,
            Lock::Taken => return Err(places.busy()),
        };
        let staged = StagedDir {
            places,
            _lock: held,
            stays,
        };
        staged.places.recover()?;
        Ok(staged)
    }

    /// Leaves the staging directory where it is when this is dropped, for [`StagedDir::resume`].
    pub fn keep(&mut self) {
        self.stays = true;
    }

    /// The staging directory, to write into.
    pub fn path(&self) -> &Path {
        &self.places.staging
    }

    /// Where the directory will be.
    pub fn target(&self) -> &Path {
        &self.places.target
    }

    /// Flushes everything written to disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        sync_tree(&self.places.staging)
    }

    /// Flushes everything written and puts it into place, replacing what was there.
    ///
    /// # Errors
    /// [`Error::Io`]; the target is then as it was before, unless only the removal of the old content failed.
    pub fn commit(self) -> Result<()> {
        self.commit_steps(&mut |_| Ok(()))
    }

    /// [`StagedDir::commit`] with a hook before each step, with which tests make a step fail.
    fn commit_steps(mut self, before: &mut dyn FnMut(Step) -> io::Result<()>) -> Result<()> {
        let Places {
            target,
            staging,
            old,
            parent,
            ..
        } = &self.places;
        before(Step::Sync).map_err(|e| Error::io("flush", staging, e))?;
        sync_tree(staging)?;
        sync_dir(parent)?;
        let replaces = target.exists();
        if replaces {
            if old.exists() {
                // `target` is newer and complete: an earlier writer stopped just before removing this.
                fs::remove_dir_all(old).map_err(|e| Error::io("remove", old, e))?;
            }
            before(Step::SetAside)
                .and_then(|()| fs::rename(target, old))
                .map_err(|e| Error::io(format!("move aside (to {})", old.display()), target, e))?;
        }
        if let Err(e) = before(Step::PutInPlace).and_then(|()| fs::rename(staging, target)) {
            if replaces {
                fs::rename(old, target).map_err(|e| {
                    Error::io(format!("move back (from {})", old.display()), target, e)
                })?;
            }
            return Err(Error::io("put into place", target, e));
        }
        self.stays = true;
        sync_dir(parent)?;
        if replaces {
            before(Step::RemoveOld)
                .and_then(|()| fs::remove_dir_all(old))
                .map_err(|e| Error::io("remove the replaced directory", old, e))?;
        }
        Ok(())
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if !self.stays {
            // Nothing more can be done about a failure here; the next writer removes it.
            let _ = fs::remove_dir_all(&self.places.staging);
        }
    }
}

/// The steps of a commit, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Sync,
    SetAside,
    PutInPlace,
    RemoveOld,
}

/// The paths of the protocol.
#[derive(Debug)]
struct Places {
    target: PathBuf,
    parent: PathBuf,
    staging: PathBuf,
    old: PathBuf,
}

impl Places {
    fn of(target: &Path) -> Result<Places> {
        // What exists is resolved, so that `.` has a name and a link's target is replaced instead of the link.
        let target = match fs::canonicalize(target) {
            Ok(real) => real,
            Err(_) if target.is_symlink() => {
                return Err(Error::Output {
                    path: target.to_path_buf(),
                    reason: "it is a symbolic link to nothing".to_string(),
                    help: "remove the link, or create the directory that it names".to_string(),
                });
            }
            Err(_) => target.to_path_buf(),
        };
        let (parent, name) = split(&target)?;
        let staging = parent.join(hidden(&name, "graft-new"));
        let old = parent.join(hidden(&name, "graft-old"));
        Ok(Places {
            target,
            parent,
            staging,
            old,
        })
    }

    fn recover(&self) -> Result<bool> {
        if self.target.exists() || !self.old.is_dir() {
            return Ok(false);
        }
        fs::rename(&self.old, &self.target).map_err(|e| {
            Error::io(
                format!("put back (from {})", self.old.display()),
                &self.target,
                e,
            )
        })?;
        sync_dir(&self.parent)?;
        Ok(true)
    }

    fn busy(&self) -> Error {
        Error::Output {
            path: self.target.clone(),
            reason: "another process is writing it".to_string(),
            help: format!(
                "wait for it to end, or name another directory (it writes to {})",
                self.staging.display()
            ),
        }
    }
}

/// The parent directory and the last component of a path.
fn split(path: &Path) -> Result<(PathBuf, OsString)> {
    let Some(name) = path.file_name() else {
        return Err(Error::Output {
            path: path.to_path_buf(),
            reason: "the path does not end in a name".to_string(),
            help: "name a directory or file that can be created".to_string(),
        });
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    Ok((parent, name.to_os_string()))
}

/// `.name.suffix`
fn hidden(name: &std::ffi::OsStr, suffix: &str) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".");
    hidden.push(suffix);
    hidden
}

enum Lock {
    Free(File),
    Taken,
    /// Directories cannot be opened or locked here; writers are then not told apart.
    Unsupported,
}

fn lock(dir: &Path) -> Lock {
    let Ok(file) = File::open(dir) else {
        return Lock::Unsupported;
    };
    match file.try_lock() {
        Ok(()) => Lock::Free(file),
        Err(TryLockError::WouldBlock) => Lock::Taken,
        Err(TryLockError::Error(_)) => Lock::Unsupported,
    }
}

/// Flushes every file and directory below `dir`, the innermost first. Links are not followed.
fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        let entry = entry.map_err(|e| Error::io("list", dir, e))?;
        let path = entry.path();
        let kind = entry
            .file_type()
            .map_err(|e| Error::io("inspect", &path, e))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(|e| Error::io("flush", &path, e))?;
        }
    }
    sync_dir(dir)
}

/// Flushes a directory's own entries. Only Unix can open a directory for that; elsewhere the file system does it.
fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(|e| Error::io("flush", dir, e))?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "atomic_tests.rs"]
mod tests;
