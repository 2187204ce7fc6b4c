//! The certificate of a run: a SHA-256 of every tensor before and after training, and which were trainable.
//!
//! A hash is over the tensor's bytes as the safetensors file holds them (little-endian, row-major), so that anyone
//! can check a certificate with the model file and a hash program alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// What `format` says in certificates that this module reads and writes.
pub const FORMAT: &str = "graft-certificate/1";

/// What a run did to each tensor of its model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// [`FORMAT`].
    pub format: String,
    /// When it was made, in seconds since 1970-01-01 UTC.
    pub created: u64,
    /// Directory of the model the run started from.
    pub model: String,
    /// SHA-256 of the resolved configuration's text.
    pub config_sha256: String,
    /// One entry for each tensor of the trained model's file, sorted by name.
    pub tensors: Vec<TensorEntry>,
}

/// One tensor of a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Its name in the model file.
    pub name: String,
    /// Its element type as safetensors spells it, such as `F32`.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Whether the run trained it.
    pub trainable: bool,
    /// SHA-256 before the first step, in hexadecimal. A new tensor's is that of its initial values.
    pub before: String,
    /// SHA-256 after the last step, of what the run directory holds.
    pub after: String,
}

/// A tensor as it is found in a model file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundTensor {
    /// Element type as safetensors spells it.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<u64>,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
}

/// One way in which a model and its certificate disagree. `Display` names the tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// A frozen tensor is not what it was before training.
    FrozenDiffers {
        /// The tensor.
        name: String,
        /// Its hash before training.
        before: String,
        /// Its hash now.
        found: String,
    },
    /// A trained tensor is not what training left.
    TrainedDiffers {
        /// The tensor.
        name: String,
        /// Its hash after training.
        after: String,
        /// Its hash now.
        found: String,
    },
    /// The certificate itself says that a frozen tensor moved.
    FrozenMoved {
        /// The tensor.
        name: String,
    },
    /// Another element type or shape than certified.
    OtherForm {
        /// The tensor.
        name: String,
        /// Element type and shape in the certificate.
        expected: String,
        /// Element type and shape in the model.
        found: String,
    },
    /// Certified, but not in the model.
    Missing {
        /// The tensor.
        name: String,
    },
    /// In the model, but not certified.
    Extra {
        /// The tensor.
        name: String,
    },
    /// The resolved configuration is not the one of the run.
    ConfigDiffers,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::FrozenDiffers {
                name,
                before,
                found,
            } => write!(
                f,
                "frozen tensor `{name}` differs from before training: SHA-256 {before} then, {found} now"
            ),
            Failure::TrainedDiffers { name, after, found } => write!(
                f,
                "trained tensor `{name}` differs from the end of training: SHA-256 {after} then, {found} now"
            ),
            Failure::FrozenMoved { name } => write!(
                f,
                "frozen tensor `{name}` has different hashes before and after in the certificate itself"
            ),
            Failure::OtherForm {
                name,
                expected,
                found,
            } => {
                write!(f, "tensor `{name}` is {found}, certified as {expected}")
            }
            Failure::Missing { name } => {
                write!(f, "tensor `{name}` is certified but missing in the model")
            }
            Failure::Extra { name } => {
                write!(f, "tensor `{name}` is in the model but not certified")
            }
            Failure::ConfigDiffers => {
                f.write_str("the resolved configuration differs from the one the run was made with")
            }
        }
    }
}

/// The outcome of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Disagreements: the configuration's, then by tensor name, tensors not certified last; the check passes when there are none.
    pub failures: Vec<Failure>,
    /// Trainable tensors that did not move, sorted. No proof of anything wrong (a learning rate may round away), but
    /// seldom meant.
    pub unmoved: Vec<String>,
    /// How many frozen tensors were compared.
    pub frozen: usize,
    /// How many trainable tensors were compared.
    pub trainable: usize,
}

impl Verdict {
    /// Whether model and certificate agree.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }
}

impl Certificate {
    /// A certificate made now. Entries are sorted by name.
    pub fn new(model: String, config_sha256: String, mut tensors: Vec<TensorEntry>) -> Certificate {
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Certificate {
            format: FORMAT.to_owned(),
            created: since.map_or(0, |age| age.as_secs()),
            model,
            config_sha256,
            tensors,
        }
    }

    /// The certificate as JSON text, a line per member.
    pub fn to_json(&self) -> String {
        // Strings, integers and lists of them: there is nothing serde_json could refuse.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Reads a certificate's JSON text that came from `path`.
    ///
    /// # Errors
    /// Malformed JSON, missing or unknown members, another format, a hash that is none, or a tensor listed twice.
    pub fn parse(text: &str, path: &Path) -> Result<Certificate> {
        let refuse = |what: String| Error::Certificate {
            path: path.to_path_buf(),
            what,
            help: "restore the certificate that the run wrote".to_owned(),
        };
        let certificate: Certificate =
            serde_json::from_str(text).map_err(|e| refuse(format!("not a certificate: {e}")))?;
        if certificate.format != FORMAT {
            return Err(refuse(format!(
                "the format is `{}`, expected `{FORMAT}`",
                certificate.format.escape_debug()
            )));
        }
        let mut names = BTreeSet::new();
        for tensor in &certificate.tensors {
            if !names.insert(tensor.name.as_str()) {
                return Err(refuse(format!(
                    "the tensor `{}` is listed twice",
                    tensor.name.escape_debug()
                )));
            }
            for (which, hash) in [("before", &tensor.before), ("after", &tensor.after)] {
                let digits = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
                if hash.len() != 64 || !hash.bytes().all(digits) {
                    return Err(refuse(format!(
                        "`{which}` of the tensor `{}` is no SHA-256 of 64 lower-case hexadecimal digits",
                        tensor.name.escape_debug()
                    )));
                }
            }
        }
        Ok(certificate)
    }

    /// Reads a certificate's file.
    ///
    /// # Errors
    /// As [`Certificate::parse`], or a file that cannot be read.
    pub fn read(path: &Path) -> Result<Certificate> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        Certificate::parse(&text, path)
    }

    /// Compares the certificate with the tensors a model holds, by name, and with the hash of the resolved
    /// configuration.
    pub fn verify(&self, found: &BTreeMap<String, FoundTensor>, config_sha256: &str) -> Verdict {
        let mut verdict = Verdict::default();
        if config_sha256 != self.config_sha256 {
            verdict.failures.push(Failure::ConfigDiffers);
        }
        for tensor in &self.tensors {
            let name = || tensor.name.clone();
            if tensor.trainable {
                verdict.trainable += 1;
                if tensor.before == tensor.after {
                    verdict.unmoved.push(name());
                }
            } else {
                verdict.frozen += 1;
                if tensor.before != tensor.after {
                    verdict.failures.push(Failure::FrozenMoved { name: name() });
                }
            }
            let Some(actual) = found.get(&tensor.name) else {
                verdict.failures.push(Failure::Missing { name: name() });
                continue;
            };
            if (&actual.dtype, &actual.shape) != (&tensor.dtype, &tensor.shape) {
                verdict.failures.push(Failure::OtherForm {
                    name: name(),
                    expected: format!("{} {:?}", tensor.dtype, tensor.shape),
                    found: format!("{} {:?}", actual.dtype, actual.shape),
                });
            }
            let sha256 = || actual.sha256.clone();
            if !tensor.trainable && actual.sha256 != tensor.before {
                let before = tensor.before.clone();
                verdict.failures.push(Failure::FrozenDiffers {
                    name: name(),
                    before,
                    found: sha256(),
                });
            } else if tensor.trainable && actual.sha256 != tensor.after {
                let after = tensor.after.clone();
                verdict.failures.push(Failure::TrainedDiffers {
                    name: name(),
                    after,
                    found: sha256(),
                });
            }
        }
        let certified: BTreeSet<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        let extra = found
            .keys()
            .filter(|name| !certified.contains(name.as_str()));
        verdict
            .failures
            .extend(extra.map(|name| Failure::Extra { name: name.clone() }));
        verdict
    }
}

/// SHA-256 of some bytes, as 64 lower-case hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes in hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stands for the hash of a configuration.
    const CONFIG: &str = "c0f1";

    fn entry(name: &str, trainable: bool, before: &[u8], after: &[u8]) -> TensorEntry {
        TensorEntry {
            name: name.into(),
            dtype: "F32".into(),
            shape: vec![1],
            trainable,
            before: sha256_hex(before),
            after: sha256_hex(after),
        }
    }

    fn found(bytes: &[u8]) -> FoundTensor {
        FoundTensor {
            dtype: "F32".into(),
            shape: vec![1],
            sha256: sha256_hex(bytes),
        }
    }

    /// One frozen and one trained tensor, and the model that fits.
    fn run() -> (Certificate, BTreeMap<String, FoundTensor>) {
        let tensors = vec![
            entry("head.weight", true, &[0; 4], &[1, 2, 3, 4]),
            entry("embeddings.weight", false, &[9; 4], &[9; 4]),
        ];
        let model = BTreeMap::from([
            ("head.weight".to_owned(), found(&[1, 2, 3, 4])),
            ("embeddings.weight".to_owned(), found(&[9; 4])),
        ]);
        (
            Certificate::new("bert".into(), CONFIG.into(), tensors),
            model,
        )
    }

    #[test]
    fn hashes_are_those_of_the_standard() {
        // FIPS 180-4 examples: the empty message and "abc".
        assert_eq!(
            sha256_hex(b""),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(
            sha256_hex(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn an_untouched_run_passes() {
        let (certificate, model) = run();
        let verdict = certificate.verify(&model, CONFIG);
        assert!(
            verdict.passed() && verdict.unmoved.is_empty(),
            "{verdict:?}"
        );
        assert_eq!((verdict.frozen, verdict.trainable), (1, 1));
    }

    #[test]
    fn every_single_bit_of_a_frozen_tensor_is_noticed() {
        let (certificate, model) = run();
        for bit in 0..32 {
            let mut bytes = [9u8; 4];
            bytes[bit / 8] ^= 1 << (bit % 8);
            let mut changed = model.clone();
            changed.insert("embeddings.weight".into(), found(&bytes));
            let verdict = certificate.verify(&changed, CONFIG);
            assert_eq!(verdict.failures.len(), 1);
            let said = verdict.failures[0].to_string();
            assert!(
                said.starts_with("frozen tensor `embeddings.weight` differs"),
                "{said}"
            );
        }
    }

    #[test]
    fn other_disagreements_are_named() {
        let (certificate, model) = run();
        let failures = |change: &dyn Fn(&mut BTreeMap<String, FoundTensor>)| -> Vec<String> {
            let mut model = model.clone();
            change(&mut model);
            certificate
                .verify(&model, CONFIG)
                .failures
                .iter()
                .map(Failure::to_string)
                .collect()
        };
        for (change, want) in [
            (
                &(|m: &mut BTreeMap<_, _>| {
                    m.insert("head.weight".to_owned(), found(b"x"));
                }) as &dyn Fn(&mut BTreeMap<String, FoundTensor>),
                "trained tensor `head.weight` differs from the end of training",
            ),
            (
                &|m| {
                    m.remove("head.weight");
                },
                "tensor `head.weight` is certified but missing",
            ),
            (
                &|m| {
                    m.insert("spare".to_owned(), found(b"x"));
                },
                "tensor `spare` is in the model but not certified",
            ),
            (
                &|m| m.get_mut("head.weight").unwrap().shape = vec![2, 3],
                "tensor `head.weight` is F32 [2, 3], certified as F32 [1]",
            ),
        ] {
            let said = failures(change);
            assert_eq!(said.len(), 1, "{said:?}");
            assert!(said[0].starts_with(want), "{said:?}");
        }
    }

    #[test]
    fn a_certificate_that_lets_a_frozen_tensor_move_fails() {
        let tensors = vec![entry("w", false, b"a", b"b")];
        let certificate = Certificate::new("m".into(), CONFIG.into(), tensors);
        let model = BTreeMap::from([("w".to_owned(), found(b"b"))]);
        let said: Vec<String> = certificate
            .verify(&model, CONFIG)
            .failures
            .iter()
            .map(Failure::to_string)
            .collect();
        assert_eq!(said.len(), 2);
        assert!(
            said[0].contains("`w`") && said[0].contains("certificate itself"),
            "{said:?}"
        );
        assert!(said[1].starts_with("frozen tensor `w` differs"), "{said:?}");
    }

    #[test]
    fn trainable_tensors_that_stood_still_are_only_mentioned() {
        let tensors = vec![entry("w", true, b"a", b"a")];
        let certificate = Certificate::new("m".into(), CONFIG.into(), tensors);
        let verdict = certificate.verify(&BTreeMap::from([("w".to_owned(), found(b"a"))]), CONFIG);
        assert!(verdict.passed());
        assert_eq!(verdict.unmoved, ["w"]);
    }

    #[test]
    fn another_configuration_fails() {
        let (certificate, model) = run();
        assert_eq!(
            certificate.verify(&model, "beef").failures,
            [Failure::ConfigDiffers]
        );
    }

    #[test]
    fn json_round_trip_and_refusals() {
        let (certificate, _) = run();
        let text = certificate.to_json();
        let path = Path::new("run/certificate.json");
        assert_eq!(Certificate::parse(&text, path).unwrap(), certificate);
        assert_eq!(certificate.tensors[0].name, "embeddings.weight");

        let hash = sha256_hex(&[9; 4]);
        for (bad, want) in [
            (String::new(), "not a certificate: EOF"),
            (
                text.replace("\"tensors\"", "\"tensor\""),
                "unknown field `tensor`",
            ),
            (
                text.replace(FORMAT, "graft-certificate/9"),
                "`graft-certificate/9`, expected",
            ),
            (
                text.replace("head.weight", "embeddings.weight"),
                "`embeddings.weight` is listed twice",
            ),
            (
                text.replace(&hash, &hash[1..]),
                "`before` of the tensor `embeddings.weight`",
            ),
            (text.replace(&hash, &hash.to_uppercase()), "is no SHA-256"),
            (text.replace("true", "1"), "invalid type"),
        ] {
            let error = Certificate::parse(&bad, path).unwrap_err().to_string();
            assert!(
                error.starts_with("run/certificate.json: ") && error.contains(want),
                "{error}"
            );
        }
    }
}
