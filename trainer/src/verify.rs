//! Checks a run directory against its certificate.

use std::collections::BTreeMap;
use std::path::Path;

use graft_models::{Checkpoint, Classifier, Config, DecoderClassifier, atomic};
use graft_tensor::Memory;
use sha2::{Digest, Sha256};

use crate::adapted::{AdapterArgs, Choice};
use crate::adapter::AdapterDir;
use crate::certificate::{Certificate, FoundTensor, Verdict, hex, sha256_hex};
use crate::config::TaskKind;
use crate::error::{Error, Result};
use crate::run_dir::{CERTIFICATE_FILE, CONFIG_FILE};

/// The hash of every tensor of the model in a directory, by name. No more than a piece of one is in memory: a run that has
/// just written it still holds all that it trained with.
///
/// # Errors
/// The directory has no checkpoint, or one that is malformed.
pub fn hash_tensors(dir: &Path) -> Result<BTreeMap<String, FoundTensor>> {
    let mut hashes: BTreeMap<String, (FoundTensor, Sha256)> = BTreeMap::new();
    Checkpoint::open(dir)?.read_pieces(&mut |_| true, &mut |info, bytes| {
        let begin = || {
            let tensor = FoundTensor {
                dtype: info.dtype.to_string(),
                shape: info.shape.clone(),
                sha256: String::new(),
            };
            (tensor, Sha256::new())
        };
        let (_, hash) = hashes.entry(info.name.clone()).or_insert_with(begin);
        hash.update(bytes);
        Ok(())
    })?;
    let found = hashes.into_iter().map(|(name, (tensor, hash))| {
        let sha256 = hex(&hash.finalize());
        (name, FoundTensor { sha256, ..tensor })
    });
    Ok(found.collect())
}

/// The hash of every tensor of the base that a run's adapter belongs to, and of the adapter.
fn hash_adapted(run: &Path, adapter: &AdapterDir) -> Result<BTreeMap<String, FoundTensor>> {
    let choice = Choice::of(&run.to_string_lossy(), &AdapterArgs::default())?;
    let memory = Memory::cpu();
    let config = choice.config()?;
    let (parameters, base) = match (choice.task(&config), config) {
        (TaskKind::Texts(_), Config::Encoder(_)) => {
            choice.classifier::<Classifier>(&memory)?.into_parts()
        }
        (TaskKind::Texts(_), Config::Decoder(_)) => choice
            .classifier::<DecoderClassifier>(&memory)?
            .into_parts(),
        (TaskKind::Clm | TaskKind::Chat, _) => choice.causal(&memory)?.into_parts(),
        (TaskKind::Mlm, _) => choice.masked(&memory)?.into_parts(),
    };
    adapter.hashes(&parameters, base)
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
    let found = match AdapterDir::at(&run.to_string_lossy())? {
        None => hash_tensors(run)?,
        Some(adapter) => hash_adapted(run, &adapter)?,
    };
    Ok(certificate.verify(&found, &sha256_hex(&text)))
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
