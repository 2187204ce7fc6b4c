//! What a run leaves behind: one directory that is the trained model and the record of how it came to be.
//!
//! ```text
//! OUT/
//!   config.json  model.safetensors  tokenizer.json  ...   the best model, as transformers loads it
//!   config.resolved.toml   the configuration with every default; trains the same run again
//!   metrics.jsonl          one JSON object per line: steps, evaluations, the end
//!   certificate.json       SHA-256 of every tensor before and after
//! ```
//!
//! The directory is written aside and put into place when the run has ended, so an earlier run under the same name
//! stays whole until then. Once there is a checkpoint in it, it outlives a run that was stopped, and another one goes on
//! with it.

use std::io;
use std::path::Path;

use graft_models::adapter::{ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE};
use graft_models::atomic::{self, StagedDir};
use graft_models::tokenizer::{COMPANIONS, TOKENIZER_FILE};

use crate::certificate::{Certificate, sha256_hex};
use crate::config::{RunConfig, Settings};
use crate::error::{Error, Result};
use crate::merge::MERGE_FILE;
use crate::model::{ASIDE_FILE, WEIGHTS_FILE};
use crate::record::{METRICS_FILE, MetricsWriter};

/// The resolved configuration's file.
pub const CONFIG_FILE: &str = "config.resolved.toml";
/// The checkpoint's file, while a run goes on.
pub const CHECKPOINT_FILE: &str = "checkpoint.safetensors";
/// The certificate's file.
pub const CERTIFICATE_FILE: &str = "certificate.json";

/// A run directory while its run goes on: written beside its place, and put there by [`RunDir::commit`]. Dropped
/// before that, it is removed, unless there is a checkpoint in it, and an earlier run of that name stays as it was.
#[derive(Debug)]
pub struct RunDir {
    staged: StagedDir,
    metrics: MetricsWriter,
    config_sha256: String,
}

impl RunDir {
    /// Begins a run directory at `config.output.dir`, with the resolved configuration and empty metrics in it.
    ///
    /// # Errors
    /// As [`check_replaceable`]; another run is writing there, or was stopped and can be resumed; the directory cannot be
    /// written.
    pub fn create(config: &RunConfig) -> Result<RunDir> {
        let out = &config.output.dir;
        // A replacement may have been interrupted half way; what it set aside counts as what is there.
        atomic::recover(out)?;
        check_replaceable(out)?;
        // Before another run there is told from one that was stopped, it is refused.
        atomic::interrupted(out)?;
        if is_resumable(out) {
            let out = out.display();
            return Err(Error::config(
                &out,
                "a run of this name was stopped, and what it reached would be lost",
                format!("go on with `trainer resume {out}`, or add --restart to begin again"),
            ));
        }
        let text = config.to_toml()?;
        let staged = StagedDir::create(out)?;
        atomic::write_file(staged.path().join(CONFIG_FILE), |file| {
            file.write_all(text.as_bytes())
        })?;
        let metrics = MetricsWriter::create(staged.path())?;
        Ok(RunDir {
            staged,
            metrics,
            config_sha256: sha256_hex(text.as_bytes()),
        })
    }

    /// Takes over the directory of a run at `out` that was stopped, and reads its configuration. The metrics are to be
    /// [cut](MetricsWriter::cut) to those of its checkpoint, if [there is one](RunDir::has_checkpoint).
    ///
    /// # Errors
    /// No run was stopped there; it is still going on; its directory cannot be read or written.
    pub fn resume(out: &Path) -> Result<(RunDir, RunConfig)> {
        let nothing = |what: &str| {
            let help = "name the --out of a run that was stopped";
            Error::config(out.display(), what, help)
        };
        let Some(staged) = StagedDir::resume(out)? else {
            return Err(match out.join(CERTIFICATE_FILE).is_file() {
                true => nothing("the run has ended, there is nothing to resume"),
                false => nothing("no run of this name was stopped"),
            });
        };
        let path = staged.path().join(CONFIG_FILE);
        let text = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let config = RunConfig::resolve(Settings::from_file(&path)?)?;
        // What is complete or goes on; a run that has ended keeps the rest, but for what was being written.
        let kept = [CONFIG_FILE, METRICS_FILE, CHECKPOINT_FILE, ASIDE_FILE];
        let ended = staged.path().join(CERTIFICATE_FILE).is_file();
        let entries =
            std::fs::read_dir(staged.path()).map_err(|e| Error::io("read", staged.path(), e))?;
        for entry in entries {
            let entry = entry.map_err(|e| Error::io("read", staged.path(), e))?;
            let name = entry.file_name();
            let temporary = name.to_string_lossy().starts_with('.');
            if temporary || !(ended || kept.iter().any(|kept| name == *kept)) {
                let path = entry.path();
                std::fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
            }
        }
        let metrics = MetricsWriter::append(staged.path())?;
        let run_dir = RunDir {
            staged,
            metrics,
            config_sha256: sha256_hex(&text),
        };
        Ok((run_dir, config))
    }

    /// Keeps what is there if the run is stopped from now on: a checkpoint is.
    pub fn keep(&mut self) {
        self.staged.keep();
    }

    /// Whether there is a checkpoint.
    pub fn has_checkpoint(&self) -> bool {
        self.path().join(CHECKPOINT_FILE).is_file()
    }

    /// Where to write the model's files for now.
    pub fn path(&self) -> &Path {
        self.staged.path()
    }

    /// Where they will be.
    pub fn target(&self) -> &Path {
        self.staged.target()
    }

    /// The run's metrics.
    pub fn metrics(&mut self) -> &mut MetricsWriter {
        &mut self.metrics
    }

    /// SHA-256 of the resolved configuration's file, for the certificate.
    pub fn config_sha256(&self) -> &str {
        &self.config_sha256
    }

    /// Flushes everything to disk, adds the certificate and puts the directory into place.
    ///
    /// # Errors
    /// A failed file operation; what was there before is then still there.
    pub fn commit(mut self, certificate: &Certificate) -> Result<()> {
        self.staged.sync()?;
        // From here on the run has ended: stopped now, it only has to be put into place.
        atomic::write_file(self.path().join(CERTIFICATE_FILE), |file| {
            file.write_all(certificate.to_json().as_bytes())
        })?;
        self.staged.keep();
        self.put_into_place()
    }

    /// Whether the run has ended, and was stopped before it was in its place.
    pub fn has_ended(&self) -> bool {
        self.path().join(CERTIFICATE_FILE).is_file()
    }

    /// Puts a run that [has ended](RunDir::has_ended) into place, without what was there to resume it.
    ///
    /// # Errors
    /// A failed file operation; what was there before is then still there.
    pub fn put_into_place(self) -> Result<()> {
        for name in [CHECKPOINT_FILE, ASIDE_FILE] {
            let path = self.path().join(name);
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &path, e));
                }
                _ => {}
            }
        }
        drop(self.metrics);
        Ok(self.staged.commit()?)
    }
}

/// Whether a run at `out` was stopped and has left a checkpoint, or all that it should.
pub fn is_resumable(out: &Path) -> bool {
    let left = atomic::interrupted(out).ok().flatten();
    left.is_some_and(|dir| {
        [CHECKPOINT_FILE, CERTIFICATE_FILE]
            .iter()
            .any(|name| dir.join(name).is_file())
    })
}

/// Removes what a run at `out` that was stopped has left, if there is anything.
///
/// # Errors
/// The run is still going on; the system refuses.
pub fn discard(out: &Path) -> Result<()> {
    if let Some(left) = atomic::interrupted(out)? {
        std::fs::remove_dir_all(&left).map_err(|e| Error::io("remove", &left, e))?;
    }
    Ok(())
}

/// Refuses an output path whose replacement would destroy anything but an earlier run: it may be absent, an empty
/// directory, or a directory with a certificate and nothing beside it that no run writes.
///
/// # Errors
/// Something else is there.
pub fn check_replaceable(out: &Path) -> Result<()> {
    replaceable(out, CERTIFICATE_FILE, "run")
}

/// [`check_replaceable`] for the output of `what`, of which `marker` is a file that nothing else writes.
///
/// # Errors
/// As there.
pub(crate) fn replaceable(out: &Path, marker: &str, what: &str) -> Result<()> {
    let refuse = |found: String| {
        let help = format!(
            "name an output directory that does not exist, or that an earlier {what} wrote"
        );
        Error::config(out.display(), found, help)
    };
    let entries = match std::fs::read_dir(out) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(refuse("the output exists and is no directory".into()));
        }
        Err(e) => return Err(Error::io("read", out, e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("read", out, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry
            .file_type()
            .map_err(|e| Error::io("read", &entry.path(), e))?
            .is_dir()
        {
            return Err(refuse(format!(
                "the output directory holds the directory `{}`, which no {what} wrote and which would be lost",
                name.escape_debug()
            )));
        }
        names.push(name);
    }
    names.sort();
    if !names.is_empty() && !names.iter().any(|name| name == marker) {
        return Err(refuse(format!(
            "the output directory holds {} and no {marker}: it is no {what}, and would be replaced",
            crate::error::list_names(&names, 3)
        )));
    }
    names.retain(|name| !is_written(name));
    match names.is_empty() {
        true => Ok(()),
        false => Err(Error::config(
            out.display(),
            format!(
                "the output directory holds {}, which no {what} wrote and which would be lost",
                crate::error::list_names(&names, 3)
            ),
            "move that elsewhere, or name another output directory",
        )),
    }
}

/// Whether a run or a merge leaves a file of that name.
fn is_written(name: &str) -> bool {
    const OWN: [&str; 8] = [
        CONFIG_FILE,
        METRICS_FILE,
        CERTIFICATE_FILE,
        MERGE_FILE,
        WEIGHTS_FILE,
        graft_models::config::CONFIG_FILE,
        ADAPTER_CONFIG_FILE,
        ADAPTER_WEIGHTS_FILE,
    ];
    let tokenizer = COMPANIONS.into_iter().chain([TOKENIZER_FILE]);
    OWN.into_iter().chain(tokenizer).any(|own| own == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Record;

    #[test]
    fn a_run_replaces_an_earlier_one_only_when_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let config = |epochs: i64| {
            let mut settings = crate::config::Settings::new();
            settings.flag(
                "model.path",
                "--model",
                dir.path().join("m").to_str().unwrap(),
            );
            settings.flag(
                "data.train",
                "--train",
                dir.path().join("t.csv").to_str().unwrap(),
            );
            settings.flag("output.dir", "--out", out.to_str().unwrap());
            settings.flag("train.epochs", "--epochs", epochs);
            RunConfig::resolve(settings).unwrap()
        };
        let finish = |run: RunDir| {
            let certificate = Certificate::new("m".into(), run.config_sha256().to_owned(), vec![]);
            run.commit(&certificate).unwrap();
        };
        let kept = || std::fs::read_to_string(out.join(CONFIG_FILE)).unwrap();
        finish(RunDir::create(&config(1)).unwrap());
        let first = kept();
        assert!(first.contains("\nepochs = 1\n"));

        let end = Record::End {
            steps: 1,
            best_epoch: 1,
            tokens: 1,
            seconds: 1.0,
            peak_tensors: 9,
            peak_rss: None,
        };
        let mut abandoned = RunDir::create(&config(2)).unwrap();
        abandoned.metrics().write(&end).unwrap();
        assert_eq!(abandoned.target(), out);
        drop(abandoned);
        assert_eq!(kept(), first);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

        let mut second = RunDir::create(&config(3)).unwrap();
        second.metrics().write(&end).unwrap();
        assert_eq!(kept(), first);
        finish(second);
        assert!(kept().contains("\nepochs = 3\n"));
        let certificate = Certificate::read(&out.join(CERTIFICATE_FILE)).unwrap();
        assert_eq!(certificate.config_sha256, sha256_hex(kept().as_bytes()));
        assert_eq!(
            std::fs::read_to_string(out.join(METRICS_FILE))
                .unwrap()
                .lines()
                .count(),
            1
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_a_run_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        check_replaceable(&out).unwrap();
        std::fs::create_dir(&out).unwrap();
        check_replaceable(&out).unwrap();
        std::fs::write(out.join("notes.txt"), "mine").unwrap();
        let said = check_replaceable(&out).unwrap_err().to_string();
        assert!(
            said.contains("`notes.txt`") && said.contains("it is no run"),
            "{said}"
        );
        std::fs::write(out.join(CERTIFICATE_FILE), "{}").unwrap();
        let said = check_replaceable(&out).unwrap_err().to_string();
        assert!(said.contains("`notes.txt`, which no run wrote"), "{said}");
        std::fs::rename(out.join("notes.txt"), out.join("vocab.txt")).unwrap();
        check_replaceable(&out).unwrap();
        std::fs::create_dir(out.join("thesis")).unwrap();
        let said = check_replaceable(&out).unwrap_err().to_string();
        assert!(said.contains("the directory `thesis`"), "{said}");
        let said = check_replaceable(&out.join("vocab.txt"))
            .unwrap_err()
            .to_string();
        assert!(said.contains("is no directory"), "{said}");
    }
}
