//! What keeps a template from running without end where the engine does not count.
//!
//! A list that holds another one twice, which holds another one twice, and so on, is small in memory; its text is without
//! end, and so is a comparison of two of them. Wherever the engine would turn such a value into text, it is written by
//! `python.rs`, which pays fuel while it writes: in `~` (`concat.rs`), in filters for strings, and in what is joined. For
//! what remains, comparisons, there is a clock.

use std::borrow::Cow;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};

use super::{concat, python};

/// The longest that one conversation may take. All fuel that there is takes a second.
const LIMIT: Duration = Duration::from_secs(10);

/// Under which name the engine's own filter is kept.
fn original(name: &str) -> String {
    format!("graft_{name}")
}

/// A list or dictionary as text, and every other value as it is; of named arguments, each.
pub(super) fn flat(state: &State, value: Value) -> Result<Value, Error> {
    if value.is_kwargs() {
        let mut named = Vec::new();
        for key in value.try_iter()? {
            let item = flat(state, value.get_item(&key)?)?;
            named.push((key.to_string(), item));
        }
        return Ok(Value::from(named.into_iter().collect::<Kwargs>()));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            Ok(Value::from(python::string(state, value)?))
        }
        _ => Ok(value),
    }
}

/// The items of a list, each flat.
pub(super) fn flat_items(state: &State, value: Value) -> Result<Value, Error> {
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return Ok(value);
    }
    let mut items = Vec::new();
    for item in value.try_iter()? {
        state.consume_fuel(1)?;
        items.push(flat(state, item)?);
    }
    Ok(Value::from(items))
}

/// Guards the filters that turn what they are given into text.
pub(super) fn add(environment: &mut Environment) {
    environment.add_filter(concat::FILTER, |state: &State, value: Value| {
        flat(state, value)
    });
    macro_rules! keep {
        ($($name:ident),*) => {$(
            environment.add_filter(original(stringify!($name)), filters::$name);
            guard(environment, stringify!($name), stringify!($name), flat);
        )*};
    }
    keep!(
        upper, lower, title, capitalize, trim, split, lines, safe, format
    );
    environment.add_filter(original("escape"), escape);
    guard(environment, "escape", "escape", flat);
    guard(environment, "e", "escape", flat);
    environment.add_filter(original("join"), filters::join);
    guard(environment, "join", "join", flat_items);
    // The engine has these two in other forms than it lends.
    environment.add_filter(original("replace"), replace);
    guard(environment, "replace", "replace", flat);
    environment.add_filter(original("indent"), filters::indent);
    environment.add_filter("indent", indent);
}

/// Replaces a filter by one that passes its first argument through `first`, and the others through [`flat`].
fn guard(
    environment: &mut Environment,
    name: &str,
    of: &str,
    first: fn(&State, Value) -> Result<Value, Error>,
) {
    let of = original(of);
    let guarded = move |state: &mut State, values: Rest<ValueOrKwargs>| {
        let mut arguments = Vec::new();
        for (i, value) in values.into_values().into_iter().enumerate() {
            arguments.push(match i {
                0 => first(state, value)?,
                _ => flat(state, value)?,
            });
        }
        state.apply_filter(&of, &arguments)
    };
    environment.add_filter(name.to_string(), guarded);
}

/// HTML's escapes as Jinja writes them: the engine has others for quotes, and one more for slashes.
fn escape(state: &State, value: Value) -> Result<Value, Error> {
    if value.is_safe() {
        return Ok(value);
    }
    let mut text = python::string(state, value)?;
    for (from, to) in [
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("'", "&#39;"),
        ("\"", "&#34;"),
    ] {
        text = text.replace(from, to);
    }
    Ok(Value::from_safe_string(text))
}

/// Python's `str.replace`: the first `count` times, or all where that is not given or negative.
fn replace(state: &State, values: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let values = values.into_values();
    type Arguments<'a> = (
        Cow<'a, str>,
        Cow<'a, str>,
        Cow<'a, str>,
        Option<i64>,
        Kwargs,
    );
    let (value, from, to, count, kwargs): Arguments = from_args(&values)?;
    let count = match kwargs.get::<Option<i64>>("count")? {
        Some(count) => Some(count),
        None => count,
    };
    kwargs.assert_all_used()?;
    let count = count
        .and_then(|n| usize::try_from(n).ok())
        .unwrap_or(usize::MAX);
    let times = value.matches(&*from).take(count).count();
    pay(state, times.saturating_mul(to.len()))?;
    Ok(value.replacen(&*from, &to, count))
}

/// The engine's `indent`, paid for before the text grows.
fn indent(state: &mut State, values: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let mut arguments = Vec::new();
    for value in values.into_values() {
        arguments.push(flat(state, value)?);
    }
    let lines = arguments
        .first()
        .and_then(Value::as_str)
        .map_or(0, |text| text.lines().count());
    let mut width = arguments.get(1).and_then(Value::as_usize).unwrap_or(4);
    if let Some(named) = arguments.last().filter(|last| last.is_kwargs()) {
        width = named.get_attr("width")?.as_usize().unwrap_or(width);
    }
    pay(state, lines.saturating_mul(width))?;
    state.apply_filter(&original("indent"), &arguments)
}

/// Pays for bytes of text, as the engine does.
fn pay(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(1 + bytes as u64 / 64)
}

/// Renders a template, and waits [`LIMIT`] for it at most. A rendering that takes longer is left behind: it ends with the
/// program.
pub(super) fn render(
    environment: Environment<'static>,
    name: &str,
    context: Value,
) -> Result<String, Error> {
    let (to, from) = channel();
    let name = name.to_string();
    let work = move || {
        let rendered = environment
            .get_template(&name)
            .and_then(|t| t.render(context));
        // Nobody may be waiting any more.
        let _ = to.send(rendered);
    };
    let failed = |what: &str| Error::new(ErrorKind::InvalidOperation, what.to_string());
    if let Err(e) = thread::Builder::new()
        .name("template".to_string())
        .spawn(work)
    {
        return Err(failed(&format!("no thread can be started: {e}")));
    }
    match from.recv_timeout(LIMIT) {
        Ok(rendered) => rendered,
        Err(RecvTimeoutError::Timeout) => Err(Error::from(ErrorKind::OutOfFuel)),
        Err(RecvTimeoutError::Disconnected) => Err(failed("the engine stopped")),
    }
}
