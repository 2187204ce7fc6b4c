//! The commands that use a model: `eval`, `predict`, `inspect`.

use std::io::{self, Write};
use std::path::Path;

use graft_models::{Config, ModelSource, atomic};
use serde_json::json;

use super::{ColumnArgs, EvalArgs, InspectArgs, PredictArgs, print};
use crate::config::Rule;
use crate::data::{Columns, Dataset};
use crate::documents::{Documents, sequence_length};
use crate::encode::Encoded;
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, Labelled, logits};
use crate::model::Model;
use crate::perplexity::Perplexity;
use crate::predict::write_predictions;
use crate::report::{Table, thousands};

fn columns(args: &ColumnArgs, label: Option<&str>) -> Columns {
    Columns {
        text: args.text_column.clone(),
        text_pair: args.text_pair_column.clone(),
        label: label.map(str::to_owned),
    }
}

/// Says on standard error how many texts were cut.
fn say_truncated(data: &Encoded, path: &Path) {
    if data.truncated > 0 {
        eprintln!(
            "{}: {} of {} texts have more tokens than allowed and were cut",
            path.display(),
            data.truncated,
            data.encodings.len()
        );
    }
}

pub(super) fn eval(args: &EvalArgs) -> Result<()> {
    match Config::load(&ModelSource::resolve(&args.model)?)? {
        Config::Encoder(_) => eval_classifier(args),
        Config::Decoder(_) => eval_language_model(args),
    }
}

fn eval_language_model(args: &EvalArgs) -> Result<()> {
    let model = Model::causal(&args.model, &args.device.open()?)?;
    let data = Dataset::documents(&args.data, &args.columns.text_column)?;
    let length = sequence_length(&model.config, args.max_length)?;
    let data = Documents::new(&model.config, &model.tokenizer, &data, length)?;
    let result = Perplexity::of(&model, &data)?;
    if args.json {
        let value = json!({
            "documents": data.documents(),
            "tokens": result.tokens,
            "loss": result.loss,
            "perplexity": result.perplexity(),
        });
        return print(&format!("{value}\n"));
    }
    let mut table = Table::new();
    table.row("documents", thousands(data.documents() as u64));
    table.row("predicted tokens", thousands(result.tokens));
    table.row("loss per token", format!("{:.4}", result.loss));
    table.row("perplexity", format!("{:.4}", result.perplexity()));
    print(&table.to_string())
}

fn eval_classifier(args: &EvalArgs) -> Result<()> {
    let model = Model::trained(&args.model, &args.device.open()?)?;
    let columns = columns(&args.columns, Some(&args.label_column));
    let data = Labelled::read(&model, &args.data, &columns, args.max_length)?;
    say_truncated(&data.encoded, &args.data);
    let rows = logits(&model, &data.encoded, None)?;
    // The training set is not at hand: the baseline guesses what is most frequent here.
    let counts = data.counts(&model.config.labels);
    let result = Evaluation::new(&rows, &data.labels, &counts);
    let (score, baseline) = (result.confusion.score(), result.baseline.score());
    let names = model.config.labels.names();
    if args.json {
        let value = json!({
            "examples": result.confusion.total(),
            "truncated": data.encoded.truncated,
            "loss": result.loss,
            "accuracy": score.accuracy,
            "macro_f1": score.macro_f1,
            "baseline": baseline,
            "labels": names,
            "classes": result.confusion.per_class(),
            "confusion": result.confusion.rows(),
        });
        return print(&format!("{value}\n"));
    }
    let mut table = Table::new();
    table.row("examples", result.confusion.total());
    table.row("loss", format!("{:.4}", result.loss));
    let line = |of: f64, base: f64| format!("{of:.4} (majority class: {base:.4})");
    table.row("accuracy", line(score.accuracy, baseline.accuracy));
    table.row("macro-F1", line(score.macro_f1, baseline.macro_f1));
    let mut classes = Table::new();
    for (name, class) in names.iter().zip(result.confusion.per_class()) {
        classes.row(
            name,
            format!(
                "precision {:.3}  recall {:.3}  F1 {:.3}  of {}",
                class.precision, class.recall, class.f1, class.support
            ),
        );
    }
    print(&format!("{table}\n{classes}"))
}

pub(super) fn predict(args: &PredictArgs) -> Result<()> {
    let model = Model::trained(&args.model, &args.device.open()?)?;
    let data = Dataset::read(&args.data, &columns(&args.columns, None))?;
    let data = Encoded::new(&model, &data, args.max_length)?;
    say_truncated(&data, &args.data);
    let mut text = Vec::new();
    let name = args.out.as_deref().unwrap_or(Path::new("standard output"));
    write_predictions(&model, &data, args.logits, &mut text, name)?;
    match &args.out {
        Some(path) => Ok(atomic::write_file(path, |file| file.write_all(&text))?),
        None => match io::stdout().lock().write_all(&text) {
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Error::io("write", name, e)),
            _ => Ok(()),
        },
    }
}

pub(super) fn inspect(args: &InspectArgs) -> Result<()> {
    let strategy = match &args.strategy {
        Some(text) => Some(text.parse().map_err(|what: String| {
            let help =
                "use head, last:K, bitfit, norms or full, with gradual and llrd, joined by +";
            Error::config("--strategy", what, help)
        })?),
        None => None,
    };
    let rules: Vec<Rule> = args
        .rule
        .iter()
        .map(|text| {
            text.parse().map_err(|what: String| {
                let help =
                    "write \"train GLOB\", \"freeze GLOB\", \"lr GLOB x0.5\" or \"decay GLOB 0.1\"";
                Error::config("--rule", what, help)
            })
        })
        .collect::<Result<_>>()?;
    let labels = args.labels.map(|n| n as usize);
    print(&crate::inspect::inspect(
        &args.model,
        strategy,
        &rules,
        labels,
    )?)
}
