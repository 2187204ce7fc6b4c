//! Predictions as JSON lines.

use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::encode::Encoded;
use crate::error::{Error, Result};
use crate::evaluate::{best_label, probabilities, sound_logits};
use crate::model::Model;
use crate::text_classifier::TextClassifier;

/// Writes one JSON object for each example, in their order: `label`, `probabilities` by label, and `logits` if asked
/// for, in the order of the model's labels; with the name of an adapter, that as `adapter` first.
///
/// # Errors
/// As the model's forward pass; logits that are no numbers; `out`, called `name` in messages, cannot be written.
pub fn write_predictions<N: TextClassifier>(
    model: &Model<N>,
    data: &Encoded,
    (raw, adapter): (bool, Option<&str>),
    out: &mut dyn Write,
    name: &Path,
) -> Result<()> {
    let names = N::labels(&model.config).names();
    for row in sound_logits(model, data)? {
        let by_label: Map<String, Value> = names
            .iter()
            .zip(probabilities(&row))
            .map(|(name, p)| (name.clone(), json!(p)))
            .collect();
        let mut line = Map::new();
        if let Some(adapter) = adapter {
            line.insert("adapter".into(), json!(adapter));
        }
        line.insert("label".into(), json!(names[best_label(&row) as usize]));
        line.insert("probabilities".into(), Value::Object(by_label));
        if raw {
            line.insert("logits".into(), json!(row));
        }
        writeln!(out, "{}", Value::Object(line)).map_err(|e| Error::io("write", name, e))?;
    }
    out.flush().map_err(|e| Error::io("write", name, e))
}
