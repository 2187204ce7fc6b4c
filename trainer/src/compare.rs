//! Runs beside each other, from what they wrote down.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::Settings;
use crate::error::{Error, Result};
use crate::record::METRICS_FILE;
use crate::report::{duration, thousands};
use crate::run_dir::CONFIG_FILE;

/// A table with a row for each run: strategy, trained parameters and their share, the quality of the model that was kept
/// (of `MEASURES` those that some run has), the median time of a step, duration and peak memory.
///
/// # Errors
/// A directory that is no run, or whose metrics are not those of a run that ended.
pub fn compare(runs: &[PathBuf]) -> Result<String> {
    let before = ["run", "strategy", "trained", "share"];
    let after = ["step", "time", "peak memory"];
    let names = MEASURES.iter().map(|&(_, name)| name);
    let header: Vec<&str> = before.into_iter().chain(names).chain(after).collect();
    let mut rows = vec![header.iter().map(|&name| name.to_owned()).collect()];
    for run in runs {
        rows.push(row(run)?);
    }
    let first = before.len();
    let measures = first..first + MEASURES.len();
    let measured = |column: usize| rows[1..].iter().any(|row| row[column] != "-");
    let none = !measures.clone().any(measured);
    let shown = |column: usize| match measures.contains(&column) {
        true if none => column < first + USUAL,
        true => measured(column),
        false => true,
    };
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..header.len()).map(|c| width(c).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        for (column, cell) in row.iter().enumerate().filter(|(column, _)| shown(*column)) {
            let width = widths[column];
            // Names to the left, numbers to the right.
            let cell = match column {
                0 | 1 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            };
            text.push_str(&cell);
            text.push_str(if column + 1 < header.len() {
                "  "
            } else {
                "\n"
            });
        }
    }
    Ok(text)
}

/// The measures that are compared, as the record of an evaluation has them, and what they are called.
const MEASURES: [(&str, &str); 7] = [
    ("accuracy", "accuracy"),
    ("macro_f1", "macro-F1"),
    ("micro_f1", "micro-F1"),
    ("f1", "F1"),
    ("rmse", "RMSE"),
    ("pearson", "Pearson"),
    ("perplexity", "perplexity"),
];
/// So many stand in a table of runs without any.
const USUAL: usize = 2;

fn row(run: &Path) -> Result<Vec<String>> {
    let config = Settings::from_file(&run.join(CONFIG_FILE))?;
    let config = crate::config::RunConfig::resolve(config)?;
    let path = run.join(METRICS_FILE);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
    let (mut start, mut best, mut end) = (None, None, None);
    let mut steps = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let record: Value = serde_json::from_str(line).map_err(|e| {
            let what = format!("this is no record of a run: {e}");
            Error::data(
                &path,
                Some(i + 1),
                what,
                "restore the file that the run wrote",
            )
        })?;
        match record["kind"].as_str() {
            Some("start") => start = Some(record),
            Some("step") => {
                let number = |key: &str| record[key].as_f64().unwrap_or(f64::NAN);
                steps.push(number("tokens") / number("tokens_per_second"));
            }
            Some("eval") if record["best"] == true => best = Some(record),
            Some("end") => end = Some(record),
            _ => {}
        }
    }
    let (Some(start), Some(end)) = (start, end) else {
        let what = "the run's start or end is missing";
        return Err(Error::data(
            &path,
            None,
            what,
            "restore the file that the run wrote",
        ));
    };
    let number = |record: &Value, key: &str| record[key].as_f64().unwrap_or(f64::NAN);
    let score = |key: &str| match best.as_ref().and_then(|record| record[key].as_f64()) {
        Some(value) => format!("{value:.4}"),
        None => "-".to_owned(),
    };
    let (trainable, all) = (number(&start, "trainable"), number(&start, "parameters"));
    let seconds = number(&end, "seconds").max(0.0);
    let mut cells = vec![
        run.display().to_string(),
        config.strategy.name.to_string(),
        thousands(trainable as u64),
        format!("{:.2} %", 100.0 * trainable / all),
    ];
    cells.extend(MEASURES.map(|(key, _)| score(key)));
    cells.extend([
        median_step(steps),
        duration(std::time::Duration::from_secs_f64(seconds)),
        match end["peak_rss"].as_u64() {
            Some(bytes) => format!("{} MiB", thousands(bytes >> 20)),
            None => "-".to_owned(),
        },
    ]);
    Ok(cells)
}

/// The median of some seconds, in milliseconds.
fn median_step(mut seconds: Vec<f64>) -> String {
    seconds.sort_by(f64::total_cmp);
    match seconds.get(seconds.len() / 2).filter(|s| s.is_finite()) {
        Some(median) => format!("{:.1} ms", 1e3 * median),
        None => "-".to_owned(),
    }
}
