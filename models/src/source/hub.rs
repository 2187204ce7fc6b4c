//! Models that the Hugging Face hub's own tools have put into their cache.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::read_limited;
use crate::error::{Error, Result, some_of};

/// The name of a model on the hub.
#[derive(Clone, Debug)]
pub(super) struct HubId {
    pub id: String,
    pub revision: String,
}

/// Where the Hugging Face cache may be: the environment variables that huggingface_hub reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HubEnv {
    /// `HF_HUB_CACHE`: the cache itself.
    pub hf_hub_cache: Option<PathBuf>,
    /// `HF_HOME`: the cache is `hub` in it.
    pub hf_home: Option<PathBuf>,
    /// `XDG_CACHE_HOME`: the cache is `huggingface/hub` in it.
    pub xdg_cache_home: Option<PathBuf>,
    /// `HOME`: the cache is `.cache/huggingface/hub` in it.
    pub home: Option<PathBuf>,
}

impl HubEnv {
    /// Reads the environment. Empty variables count as absent.
    pub fn from_env() -> HubEnv {
        let var = |name: &str| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        HubEnv {
            hf_hub_cache: var("HF_HUB_CACHE"),
            hf_home: var("HF_HOME"),
            xdg_cache_home: var("XDG_CACHE_HOME"),
            home: std::env::home_dir(),
        }
    }

    /// The cache directory, and the variable that decides it.
    fn cache(&self) -> Option<(PathBuf, &'static str)> {
        if let Some(cache) = &self.hf_hub_cache {
            return Some((cache.clone(), "HF_HUB_CACHE"));
        }
        if let Some(home) = &self.hf_home {
            return Some((home.join("hub"), "HF_HOME"));
        }
        if let Some(cache) = &self.xdg_cache_home {
            return Some((cache.join("huggingface/hub"), "XDG_CACHE_HOME"));
        }
        self.home
            .as_ref()
            .map(|home| (home.join(".cache/huggingface/hub"), "the home directory"))
    }
}

impl HubId {
    /// `name`, `org/name`, `org/name@revision`, in the characters that the hub allows.
    pub fn parse(spec: &str) -> Option<HubId> {
        let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
        let good = |part: &str| {
            !part.is_empty()
                && part.len() <= 96
                && !part.starts_with(['.', '-'])
                && !part.contains("--")
                && !part.contains("..")
                && part
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        let parts: Vec<&str> = id.split('/').collect();
        let whole =
            parts.len() <= 2 && parts.iter().all(|part| good(part)) && is_plain_name(revision);
        whole.then(|| HubId {
            id: id.to_string(),
            revision: revision.to_string(),
        })
    }

    /// Looks a hub id up in the cache: `models--org--name/refs/<revision>` holds the name of a directory under
    /// `snapshots`; a revision may also be that name itself.
    ///
    /// `None` if it is not there; `tried` then says what there is.
    pub fn find(&self, env: &HubEnv, tried: &mut Vec<String>) -> Result<Option<PathBuf>> {
        let Some((cache, variable)) = env.cache() else {
            tried.push(
                "no Hugging Face cache: neither HF_HUB_CACHE, HF_HOME nor a home directory is set"
                    .to_string(),
            );
            return Ok(None);
        };
        let repo = cache.join(format!("models--{}", self.id.replace('/', "--")));
        if !repo.is_dir() {
            let state = if cache.is_dir() {
                "no such model in the cache"
            } else {
                "the cache does not exist"
            };
            tried.push(format!(
                "{}: {state} (place given by {variable})",
                repo.display()
            ));
            return Ok(None);
        }
        let snapshots = repo.join("snapshots");
        let reference = repo.join("refs").join(&self.revision);
        let commit = match read_reference(&reference)? {
            Some(commit) => commit,
            None => {
                tried.push(format!("{}: no such file", reference.display()));
                self.revision.clone()
            }
        };
        // The content of a reference becomes part of a path.
        if !is_plain_name(&commit) {
            return Err(Error::UnsafePath {
                file: reference.display().to_string(),
                name: commit,
                reason: "a reference holds the name of a snapshot",
            });
        }
        let dir = snapshots.join(&commit);
        if !dir.is_dir() {
            let mut there: Vec<String> = fs::read_dir(&snapshots)
                .into_iter()
                .flatten()
                .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
                .collect();
            there.sort();
            let there = match there.is_empty() {
                true => "there are no snapshots".to_string(),
                false => format!(
                    "there are {}; name one as `{}@...`",
                    some_of(&there),
                    self.id
                ),
            };
            tried.push(format!("{}: no such snapshot ({there})", dir.display()));
            return Ok(None);
        }
        Ok(Some(dir))
    }
}

/// The content of a reference file, or `None` if it does not exist.
fn read_reference(path: &Path) -> Result<Option<String>> {
    match read_limited(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).trim().to_string())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

/// One path component, and not a special one.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && !name.contains(['/', '\\', ':', '\0'])
}
