//! `metrics.jsonl`: what a run says while it goes on, a JSON object per line.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The metrics' file.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// A line of `metrics.jsonl`. Numbers that are not finite are written as `null`, as JSON has none.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// Once, before the first step.
    Start {
        /// Training examples.
        examples: usize,
        /// Training examples whose tokens were cut to the length allowed.
        truncated: usize,
        /// Label names, by number, where there are labels.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        labels: Vec<String>,
        /// Parameters of the model.
        parameters: u64,
        /// Parameters that are trained.
        trainable: u64,
        /// Optimizer steps planned.
        steps: u64,
    },
    /// When a run that was stopped goes on.
    Resume {
        /// Optimizer steps done.
        step: u64,
    },
    /// After each optimizer step.
    Step {
        /// From 1.
        epoch: usize,
        /// From 1.
        step: u64,
        /// Mean over the step's examples, or supervised tokens.
        loss: f64,
        /// Learning rate of the step.
        lr: f64,
        /// Norm of the gradient of all trained parameters, before clipping.
        grad_norm: f64,
        /// Tokens of the step.
        tokens: u64,
        /// Tokens in a second of this step.
        tokens_per_second: f64,
    },
    /// After each evaluation of a classifier.
    Eval {
        /// From 1; the epoch that has just ended.
        epoch: usize,
        /// Optimizer steps done.
        step: u64,
        /// What [`Evaluation::json`](crate::evaluation::Evaluation::json) says.
        #[serde(flatten)]
        quality: Map<String, Value>,
        /// Whether this is the best model so far.
        best: bool,
    },
    /// After each evaluation of a language model; its kind is `eval` too.
    #[serde(rename = "eval")]
    TokenEval {
        /// From 1; the epoch that has just ended.
        epoch: usize,
        /// Optimizer steps done.
        step: u64,
        /// Mean over the predicted tokens.
        loss: f64,
        /// Its exponential.
        perplexity: f64,
        /// Predicted tokens.
        tokens: u64,
        /// Whether this is the best model so far.
        best: bool,
    },
    /// After each epoch's training.
    Epoch {
        /// From 1.
        epoch: usize,
        /// Optimizer steps done.
        step: u64,
        /// Mean over the epoch's examples, or supervised tokens.
        loss: f64,
        /// Tokens of the epoch.
        tokens: u64,
        /// Duration of the epoch's steps.
        seconds: f64,
    },
    /// Once, after the last step.
    End {
        /// Optimizer steps done.
        steps: u64,
        /// The epoch whose model was kept.
        best_epoch: usize,
        /// Tokens trained on, all epochs together.
        tokens: u64,
        /// Duration of the whole run.
        seconds: f64,
        /// The most bytes that all tensors took together.
        peak_tensors: u64,
        /// Largest resident memory of the process, in bytes, where the system tells.
        #[serde(skip_serializing_if = "Option::is_none")]
        peak_rss: Option<u64>,
    },
}

/// Writes `metrics.jsonl`; each record is handed to the system at once, so a reader sees whole lines while the run
/// goes on.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: BufWriter<File>,
}

impl MetricsWriter {
    /// Creates `metrics.jsonl` in `dir`, replacing one that is there.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(dir: &Path) -> Result<MetricsWriter> {
        let path = dir.join(METRICS_FILE);
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        Ok(MetricsWriter {
            path,
            file: BufWriter::new(file),
        })
    }

    /// Goes on with the `metrics.jsonl` in `dir`.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn append(dir: &Path) -> Result<MetricsWriter> {
        let path = dir.join(METRICS_FILE);
        let file = File::options().append(true).create(true).open(&path);
        let file = file.map_err(|e| Error::io("open", &path, e))?;
        Ok(MetricsWriter {
            path,
            file: BufWriter::new(file),
        })
    }

    /// Has everything written so far on disk; returns its bytes.
    ///
    /// # Errors
    /// The system refuses.
    pub fn persist(&mut self) -> Result<u64> {
        let file = self.file.get_ref();
        file.sync_data()
            .and_then(|()| file.metadata())
            .map(|metadata| metadata.len())
            .map_err(|e| Error::io("flush", &self.path, e))
    }

    /// Forgets what was written behind the first so many bytes.
    ///
    /// # Errors
    /// The system refuses.
    pub fn cut(&mut self, bytes: u64) -> Result<()> {
        let file = self.file.get_ref();
        file.metadata()
            .and_then(|metadata| file.set_len(bytes.min(metadata.len())))
            .map_err(|e| Error::io("shorten", &self.path, e))
    }

    /// Appends one line.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        serde_json::to_writer(&mut self.file, record)
            .map_err(io::Error::from)
            .and_then(|()| self.file.write_all(b"\n"))
            .and_then(|()| self.file.flush())
            .map_err(|e| Error::io("write", &self.path, e))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metrics_are_whole_lines_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(dir.path()).unwrap();
        let quality = json!({"loss": 0.7, "accuracy": 0.5, "baseline": {"macro_f1": 0.25}});
        let quality = quality.as_object().unwrap().clone();
        let records = [
            Record::Step {
                epoch: 1,
                step: 2,
                loss: f64::NAN,
                lr: 1e-4,
                grad_norm: 3.0,
                tokens: 7,
                tokens_per_second: 70.0,
            },
            Record::Eval {
                epoch: 1,
                step: 2,
                quality,
                best: true,
            },
            Record::End {
                steps: 2,
                best_epoch: 1,
                tokens: 7,
                seconds: 0.5,
                peak_tensors: 9,
                peak_rss: None,
            },
        ];
        for (n, record) in records.iter().enumerate() {
            writer.write(record).unwrap();
            let text = std::fs::read_to_string(dir.path().join(METRICS_FILE)).unwrap();
            assert_eq!(text.lines().count(), n + 1);
            assert!(text.ends_with('\n'));
        }
        let text = std::fs::read_to_string(dir.path().join(METRICS_FILE)).unwrap();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines[0]["kind"], "step");
        assert!(lines[0]["loss"].is_null());
        assert_eq!(lines[0]["lr"], 1e-4);
        assert_eq!(
            (&lines[1]["kind"], &lines[1]["accuracy"]),
            (&"eval".into(), &0.5.into())
        );
        assert_eq!(lines[1]["baseline"]["macro_f1"], 0.25);
        assert_eq!(lines[2]["kind"], "end");
        assert!(lines[2].get("peak_rss").is_none());
    }

    #[test]
    fn metrics_need_a_directory() {
        let error = MetricsWriter::create(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(
            error.to_string().contains("metrics.jsonl: cannot create"),
            "{error}"
        );
    }
}
