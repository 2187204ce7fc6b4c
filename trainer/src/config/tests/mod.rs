mod refused;
mod resolved;

use std::path::Path;

use miette::Diagnostic;

use super::*;

const MINIMAL: &str = r#"
[model]
path = "./models/bert"
[data]
train = "train.jsonl"
[output]
dir = "out"
"#;

fn parse(text: &str) -> Result<RunConfig> {
    RunConfig::resolve(Settings::parse(text, Path::new("/exp/run.toml"))?)
}

fn minimal_with(more: &str) -> Result<RunConfig> {
    parse(&format!("{MINIMAL}{more}"))
}

/// The message and the help of an error.
fn said<T: std::fmt::Debug>(result: Result<T>) -> (String, String) {
    let error = result.unwrap_err();
    (error.to_string(), error.help().unwrap().to_string())
}
