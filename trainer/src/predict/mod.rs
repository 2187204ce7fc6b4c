//! Predictions as JSON lines.

mod words;

use std::io::Write;
use std::path::Path;

use graft_models::ProblemType;
use serde_json::{Map, Value, json};

use crate::data::Dataset;
use crate::encode::Encoded;
use crate::error::{Error, Result};
use crate::evaluate::sound_logits;
use crate::evaluation::{best_label, likelihood, likely_labels, probabilities};
use crate::model::Model;
use crate::tags::Tags;
use crate::text_classifier::TextClassifier;

/// Writes one JSON object for each example, in their order: `label`, or `labels` where any number of them may be right,
/// and `probabilities` by label; or the predicted `number`; or what its words are: entities, or labels. With `logits` if asked
/// for, in the order of the model's labels; with the name of an adapter, that as `adapter` first.
///
/// # Errors
/// As the model's forward pass; logits that are no numbers; `out`, called `name` in messages, cannot be written.
pub fn write_predictions<N: TextClassifier>(
    model: &Model<N>,
    (texts, data): (&Dataset, &Encoded),
    (raw, adapter): (bool, Option<&str>),
    out: &mut dyn Write,
    name: &Path,
) -> Result<()> {
    let names = N::labels(&model.config).names();
    let problem = N::problem(&model.config);
    let all = sound_logits(model, data)?;
    let tags = Tags::of(names);
    let mut rest = &all[..];
    for (i, example) in texts.examples.iter().enumerate() {
        let count = match problem {
            ProblemType::Tokens => data.lengths[i],
            _ => 1,
        };
        let (rows, behind) = rest.split_at(count);
        rest = behind;
        let row = &rows[0];
        let mut logits = json!(row);
        let by_label = |each: Vec<f64>| -> Value {
            let named = names.iter().cloned().zip(each.into_iter().map(Value::from));
            Value::Object(named.collect())
        };
        let mut line = Map::new();
        if let Some(adapter) = adapter {
            line.insert("adapter".into(), json!(adapter));
        }
        match problem {
            ProblemType::SingleLabel => {
                line.insert("label".into(), json!(names[best_label(row) as usize]));
                line.insert("probabilities".into(), by_label(probabilities(row)));
            }
            ProblemType::MultiLabel => {
                let likely = likely_labels(row).into_iter();
                let likely: Vec<&String> = likely.map(|i| &names[i as usize]).collect();
                line.insert("labels".into(), json!(likely));
                let each = row.iter().map(|&logit| likelihood(logit)).collect();
                line.insert("probabilities".into(), by_label(each));
            }
            ProblemType::Regression => {
                line.insert("number".into(), json!(row[0]));
            }
            ProblemType::Tokens => {
                let places = &data.words[i];
                line.append(&mut words::row(&tags, example, rows, places));
                logits = words::raw(rows, places);
            }
        }
        if raw {
            line.insert("logits".into(), logits);
        }
        writeln!(out, "{}", Value::Object(line)).map_err(|e| Error::io("write", name, e))?;
    }
    out.flush().map_err(|e| Error::io("write", name, e))
}
