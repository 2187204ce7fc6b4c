//! The commands that use a model: `eval`, `predict`, `inspect`.

use std::path::{Path, PathBuf};

use graft_models::{Classifier, Config, DecoderClassifier, ProblemType};
use serde_json::{Value, json};

use super::{ColumnArgs, EvalArgs, InspectArgs, PredictArgs, column_applies, output, print};
use crate::adapted::Choice;
use crate::config::{Rule, TaskKind};
use crate::conversations::Conversations;
use crate::corpus::Corpus;
use crate::data::{Columns, Dataset};
use crate::documents::Documents;
use crate::encode::Encoded;
use crate::error::{Error, Result};
use crate::evaluate::{Labelled, sound_logits};
use crate::evaluation::Evaluation;
use crate::hidden::Hidden;
use crate::model::Model;
use crate::perplexity::Perplexity;
use crate::predict::write_predictions;
use crate::report::{Table, thousands};
use crate::text_classifier::TextClassifier;

/// The columns of texts in a file, without labels.
fn columns(args: &ColumnArgs, problem: ProblemType, data: &PathBuf) -> Result<Columns> {
    let task = TaskKind::Texts(problem);
    if task == TaskKind::NER {
        if args.text_pair_column.is_some() {
            let what = format!("it has no effect: the task is {task}");
            return Err(Error::config("--text-pair-column", what, "leave it out"));
        }
        let column = ("--text-column", args.text_column.as_deref());
        column_applies(column, true, [data].into_iter())?;
    }
    Ok(Columns {
        text_pair: args.text_pair_column.clone(),
        problem,
        ..Columns::texts(text_column(args, task))
    })
}

fn text_column(args: &ColumnArgs, task: TaskKind) -> String {
    let given = args.text_column.as_deref();
    given.unwrap_or(task.text_column()).to_owned()
}

/// Says on standard error what the user should know of a file, and how many texts were cut.
fn say_of(data: &Encoded, notes: &[String], path: &Path) {
    notes.iter().for_each(|note| eprintln!("{note}"));
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
    let choice = Choice::of(&args.model, &args.adapters)?;
    let config = choice.single()?.config()?;
    let task = args.task.unwrap_or_else(|| choice.task(&config));
    if !matches!(task, TaskKind::Texts(_)) {
        for (flag, column) in [
            ("--label-column", &args.label_column),
            ("--text-pair-column", &args.columns.text_pair_column),
        ] {
            if column.is_some() {
                let what = format!("it has no effect: the task is {task}");
                return Err(Error::config(flag, what, "leave it out"));
            }
        }
    }
    let args = &EvalArgs {
        max_length: args.max_length.or_else(|| choice.trained_length(task)),
        ..args.clone()
    };
    let memory = args.device.open()?;
    match (task, config) {
        (TaskKind::Texts(_), Config::Encoder(_)) => {
            eval_classifier(args, &choice.classifier::<Classifier>(&memory)?.model)
        }
        (TaskKind::Texts(_), Config::Decoder(_)) => eval_classifier(
            args,
            &choice.classifier::<DecoderClassifier>(&memory)?.model,
        ),
        (TaskKind::Clm, _) => {
            let of = |data: &Documents| ("documents", data.documents());
            eval_tokens::<Documents>(args, task, &choice.causal(&memory)?.model, of)
        }
        (TaskKind::Chat, _) => {
            let of = |data: &Conversations| ("conversations", data.lengths().len());
            eval_tokens::<Conversations>(args, task, &choice.causal(&memory)?.model, of)
        }
        (TaskKind::Mlm, _) => {
            let of = |data: &Hidden| ("documents", data.documents());
            eval_tokens::<Hidden>(args, task, &choice.masked(&memory)?.model, of)
        }
    }
}

fn eval_tokens<C: Corpus>(
    args: &EvalArgs,
    task: TaskKind,
    model: &Model<C::Network>,
    texts: impl Fn(&C) -> (&'static str, usize),
) -> Result<()> {
    let column = ("--text-column", args.columns.text_column.as_deref());
    column_applies(column, false, [&args.data].into_iter())?;
    let rows = C::read(&args.data, &text_column(&args.columns, task))?;
    let data = C::new(&model.config, &model.tokenizer, &rows, args.max_length)?;
    if data.truncated() > 0 {
        eprintln!("{}", data.note(&args.data));
    }
    let result = Perplexity::of(model, &data)?;
    if !result.loss.is_finite() {
        return Err(Error::not_numbers());
    }
    let (name, count) = texts(&data);
    if args.json {
        let value = json!({
            name: count,
            "tokens": result.tokens,
            "loss": result.loss,
            "perplexity": result.perplexity(),
        });
        return print(&format!("{value}\n"));
    }
    let mut table = Table::new();
    table.row(name, thousands(count as u64));
    table.row("predicted tokens", thousands(result.tokens));
    table.row("loss per token", format!("{:.4}", result.loss));
    table.row("perplexity", format!("{:.4}", result.perplexity()));
    print(&table.to_string())
}

fn eval_classifier<N: TextClassifier>(args: &EvalArgs, model: &Model<N>) -> Result<()> {
    let problem = N::problem(&model.config);
    let own = TaskKind::Texts(problem);
    if let Some(task) = args.task.filter(|&task| task != own) {
        let what = format!("the task is {task}, but what the model's outputs mean is for {own}");
        return Err(Error::config("--task", what, "leave it out"));
    }
    if own == TaskKind::NER {
        let column = ("--label-column", args.label_column.as_deref());
        column_applies(column, true, [&args.data].into_iter())?;
    }
    let label = args.label_column.as_deref().or(own.label_column());
    let columns = Columns {
        label: label.map(str::to_owned),
        ..columns(&args.columns, problem, &args.data)?
    };
    let data = Labelled::read(model, &args.data, &columns, args.max_length)?;
    say_of(&data.encoded, &data.notes, &args.data);
    let rows = sound_logits(model, &data.encoded)?;
    // The training set is not at hand: the guess is what is usual here.
    let result = Evaluation::new(&rows, &data.targets, &data.targets.guess());
    let names = N::labels(&model.config).names();
    if args.json {
        let mut all = result.json();
        all.insert("truncated".into(), data.encoded.truncated.into());
        all.insert("labels".into(), json!(names));
        return print(&format!("{}\n", Value::Object(all)));
    }
    print(&result.tables(names))
}

pub(super) fn predict(args: &PredictArgs) -> Result<()> {
    output::check(args.out.as_deref(), Some(&args.data))?;
    let choice = Choice::of(&args.model, &args.adapters)?;
    let config = choice.config()?;
    let trained_length = choice.trained_length(choice.task(&config));
    let args = &PredictArgs {
        max_length: args.max_length.or(trained_length),
        ..args.clone()
    };
    match config {
        Config::Encoder(_) => predict_with::<Classifier>(args, &choice),
        Config::Decoder(_) => predict_with::<DecoderClassifier>(args, &choice),
    }
}

fn predict_with<N: TextClassifier>(args: &PredictArgs, choice: &Choice) -> Result<()> {
    let mut adapted = choice.classifier::<N>(&args.device.open()?)?;
    let problem = N::problem(&adapted.model.config);
    let texts = Dataset::read(&args.data, &columns(&args.columns, problem, &args.data)?)?;
    let data = Encoded::new(&adapted.model, &texts, args.max_length)?;
    say_of(&data, &texts.notes, &args.data);
    let data = (&texts, &data);
    let mut text = Vec::new();
    let name = output::name(args.out.as_deref());
    match choice.in_use()[..] {
        [] | [_] => write_predictions(&adapted.model, data, (args.logits, None), &mut text, name)?,
        ref all => {
            for adapter in all {
                adapted.choose(adapter)?;
                let (model, which) = (&adapted.model, (args.logits, Some(*adapter)));
                write_predictions(model, data, which, &mut text, name)?;
            }
        }
    }
    output::write(args.out.as_deref(), &text)
}

pub(super) fn inspect(args: &InspectArgs) -> Result<()> {
    let strategy = match &args.strategy {
        Some(text) => Some(text.parse().map_err(|what: String| {
            let help =
                "use head, last:K, bitfit, norms, lora, rslora, dora, ia3, adapter, prompt, prefix or full, with gradual and llrd, joined by +";
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
    let head = match (args.labels, args.task.unwrap_or(TaskKind::CLASSIFY)) {
        (None, _) => None,
        (Some(labels), TaskKind::Texts(problem)) => Some((labels as usize, problem)),
        (Some(_), task) => {
            let what = format!("`{task}` has no labels");
            let help = "name classify, multilabel, regression or ner, or leave out --labels";
            return Err(Error::config("--task", what, help));
        }
    };
    print(&crate::inspect::inspect(
        &args.model,
        strategy,
        &rules,
        head,
    )?)
}
