//! Checks a run directory against its certificate.

use std::collections::BTreeMap;
use std::path::Path;

use graft_models::{Checkpoint, atomic};

use crate::certificate::{Certificate, FoundTensor, Verdict, sha256_hex};
use crate::error::{Error, Result};
use crate::run_dir::{CERTIFICATE_FILE, CONFIG_FILE};

/// The hash of every tensor of the model in a directory, by name. One tensor is in memory at a time.
///
/// # Errors
/// The directory has no checkpoint, or one that is malformed.
pub fn hash_tensors(dir: &Path) -> Result<BTreeMap<String, FoundTensor>> {
    let mut found = BTreeMap::new();
    Checkpoint::open(dir)?.read_each(&mut |_| true, &mut |info, bytes| {
        let tensor = FoundTensor {
            dtype: info.dtype.to_string(),
            shape: info.shape.clone(),
            sha256: sha256_hex(bytes),
        };
        found.insert(info.name.clone(), tensor);
        Ok(())
    })?;
    Ok(found)
}

/// Compares a run's model and configuration with its certificate.
///
/// # Errors
/// The certificate, the model or the configuration cannot be read. A disagreement is no error here but a failure in
/// the verdict.
pub fn verify_run(run: &Path) -> Result<Verdict> {
    if !run.exists() {
        // The replacement of this directory may have been interrupted half way.
        atomic::recover(run)?;
    }
    let certificate = Certificate::read(&run.join(CERTIFICATE_FILE))?;
    let config = run.join(CONFIG_FILE);
    let text = std::fs::read(&config).map_err(|e| Error::io("read", &config, e))?;
    Ok(certificate.verify(&hash_tensors(run)?, &sha256_hex(&text)))
}

/// The error for a verdict that did not pass: every failure on a line of its own.
pub fn failed(run: &Path, verdict: &Verdict) -> Error {
    let lines: String = verdict
        .failures
        .iter()
        .map(|failure| format!("\n  {failure}"))
        .collect();
    Error::Certificate {
        path: run.to_path_buf(),
        what: format!("the run is not what its certificate says{lines}"),
        help: "restore the files that the run wrote, or train again".to_owned(),
    }
}
