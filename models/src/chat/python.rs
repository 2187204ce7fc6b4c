//! What templates expect of Python: methods of strings and dictionaries, values written as `str` writes them, `tojson`
//! as `json.dumps` does, `strftime_now`, `raise_exception`.
//!
//! Values are written by [`Writer`], which pays fuel as the text grows.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::guard;

/// What the message of an error begins with that the template raised itself.
pub(super) const RAISED: &str = "raise_exception: ";

/// Adds everything but the clock.
pub(super) fn add(environment: &mut Environment) {
    environment.set_unknown_method_callback(|state, value, method, arguments| {
        match (value.as_str(), method, arguments) {
            // There it capitalises behind spaces alone.
            (Some(text), "title", []) => Ok(Value::from(title(text))),
            (Some(_), "join", [items]) => {
                let items = guard::flat_items(state, items.clone())?;
                unknown_method_callback(state, value, method, &[items])
            }
            _ => unknown_method_callback(state, value, method, arguments),
        }
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", string);
    environment.set_formatter(|out, state, value| {
        out.write_str(&string(state, value.clone())?)
            .map_err(Error::from)
    });
    environment.add_function("raise_exception", |message: &str| -> Result<Value, Error> {
        Err(invalid(format!("{RAISED}{message}")))
    });
}

/// Adds `strftime_now` for this moment.
pub(super) fn set_clock(environment: &mut Environment, now: SystemTime) {
    let seconds = match now.duration_since(UNIX_EPOCH) {
        Ok(after) => after.as_secs() as i64,
        Err(before) => -(before.duration().as_secs() as i64),
    };
    environment.add_function("strftime_now", move |format: &str| {
        strftime(seconds, format)
    });
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// Python's `str.title`: a letter behind another one is small, every other one a capital.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// How `json.dumps` is asked to write.
struct Style {
    /// As `str` writes instead.
    repr: bool,
    ascii: bool,
    /// What one level is indented by; `None` for a single line.
    indent: Option<String>,
    comma: String,
    colon: String,
    sorted: bool,
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, without HTML's escapes.
fn tojson(state: &State, value: Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        None => None,
        Some(indent) if indent.is_none() => None,
        Some(indent) => Some(match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) if text.len() <= 64 => text.to_string(),
            (None, Some(count)) if count <= 64 => " ".repeat(count),
            _ => return Err(invalid("tojson: indent is 64 at the most".to_string())),
        }),
    };
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) => (comma.clone(), colon.clone()),
        Some(_) => return Err(invalid("tojson: separators are two".to_string())),
        None => {
            let comma = if indent.is_some() { "," } else { ", " };
            (comma.to_string(), ": ".to_string())
        }
    };
    let style = Style {
        repr: false,
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
        comma,
        colon,
        sorted: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    Writer { style, state }.write(&value, 0, &mut out)?;
    Ok(out)
}

/// A value as Python's `str` gives it.
pub(super) fn string(state: &State, value: Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().to_string()),
        ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let style = Style {
                repr: true,
                ascii: false,
                indent: None,
                comma: ", ".to_string(),
                colon: ": ".to_string(),
                sorted: false,
            };
            let mut out = String::new();
            Writer { style, state }.write(&value, 0, &mut out)?;
            Ok(out)
        }
        _ => Ok(value.to_string()),
    }
}

/// Deepest nesting that is written, so that recursion here ends.
const MAX_DEPTH: usize = 64;

struct Writer<'s> {
    style: Style,
    state: &'s State<'s, 's>,
}

impl Writer<'_> {
    /// Writes one value. What is written is paid for as it grows: a list that holds another one twice, and so on, is
    /// small in memory and without end in text.
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("a value of more than {MAX_DEPTH} levels")));
        }
        let before = out.len();
        match value.kind() {
            ValueKind::None => out.push_str(if self.style.repr { "None" } else { "null" }),
            ValueKind::Bool if self.style.repr => {
                out.push_str(if value.is_true() { "True" } else { "False" })
            }
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match f64::try_from(value.clone()) {
                Ok(x) if !value.is_integer() => out.push_str(&float(x)),
                _ => out.push_str(&value.to_string()),
            },
            ValueKind::String => self.text(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let tuple = self.style.repr && value.downcast_object_ref::<Tuple>().is_some();
                let items = value.try_iter()?.map(|item| (None, item));
                let brackets = if tuple { ['(', ')'] } else { ['[', ']'] };
                self.container(brackets, items, depth, out)?;
                if tuple && value.len() == Some(1) {
                    out.insert(out.len() - 1, ',');
                }
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    let name = match key.kind() {
                        ValueKind::String => key.as_str().unwrap_or_default().to_string(),
                        _ if self.style.repr => key.to_string(),
                        ValueKind::None => "null".to_string(),
                        ValueKind::Bool => key.to_string().to_lowercase(),
                        _ => key.to_string(),
                    };
                    entries.push((Some(name), value.get_item(&key)?));
                }
                if self.style.sorted {
                    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.container(['{', '}'], entries.into_iter(), depth, out)?;
            }
            _ if self.style.repr => out.push_str(&value.to_string()),
            other => return Err(invalid(format!("tojson: a value that is {other}"))),
        }
        // What is inside a container has been paid for; this pays for it once more, which only deep nesting feels.
        self.state
            .consume_fuel(1 + (out.len() - before) as u64 / 16)
    }

    fn text(&self, text: &str, out: &mut String) {
        match self.style.repr {
            true => write_repr(text, out),
            false => write_string(text, self.style.ascii, out),
        }
    }

    fn container(
        &self,
        [open, close]: [char; 2],
        items: impl Iterator<Item = (Option<String>, Value)>,
        depth: usize,
        out: &mut String,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.style.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(open);
        let mut empty = true;
        for (key, item) in items {
            if !empty {
                out.push_str(&self.style.comma);
            }
            empty = false;
            line(out, depth + 1);
            if let Some(key) = key {
                self.text(&key, out);
                out.push_str(&self.style.colon);
            }
            self.write(&item, depth + 1, out)?;
        }
        if !empty {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }
}

fn write_string(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ascii && c >= '\u{7f}') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Python's `repr` of a string: in single quotes unless it holds some and no double ones; what does not print is
/// escaped. Of that, code points that Unicode has not assigned are left out: they would take a table.
fn write_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if prints(c) => out.push(c),
            // Writing to a String cannot fail.
            c => drop(match u32::from(c) {
                code @ ..0x100 => write!(out, "\\x{code:02x}"),
                code @ ..0x1_0000 => write!(out, "\\u{code:04x}"),
                code => write!(out, "\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
}

/// Whether a character is neither a control, a format character, a separator other than a space, nor for private use.
fn prints(c: char) -> bool {
    !matches!(c,
        '\0'..='\x1f' | '\x7f'..='\u{a0}' | '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}'
        | '\u{890}'..='\u{891}' | '\u{8e2}' | '\u{1680}' | '\u{180e}' | '\u{2000}'..='\u{200f}'
        | '\u{2028}'..='\u{202f}' | '\u{205f}'..='\u{206f}' | '\u{3000}' | '\u{e000}'..='\u{f8ff}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}' | '\u{e0001}' | '\u{e0020}'..='\u{e007f}' | '\u{f0000}'..='\u{10ffff}')
}

/// Python's `repr` of a float: the shortest digits that read back, with an exponent from 1e16 on and below 1e-4.
fn float(x: f64) -> String {
    let magnitude = x.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{x:e}");
        return match text.split_once('e') {
            Some((digits, exponent)) => {
                let (sign, exponent) = match exponent.strip_prefix('-') {
                    Some(exponent) => ('-', exponent),
                    None => ('+', exponent),
                };
                format!("{digits}e{sign}{exponent:0>2}")
            }
            None => text,
        };
    }
    format!("{x:?}")
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

/// Python's `strftime` in the C locale, for a moment in seconds since 1970 (UTC).
fn strftime(seconds: i64, format: &str) -> Result<String, Error> {
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let weekday = (days + 3).rem_euclid(7) as usize;
    let day_of_year = days - day_number(year, 1, 1) + 1;
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut kind = chars.next();
        // No padding, as GNU's C library has it.
        let bare = kind == Some('-');
        if bare {
            kind = chars.next();
        }
        let month_name = MONTHS[month as usize - 1];
        let number = |value: i64, width: usize| match bare {
            true => value.to_string(),
            false => format!("{value:0width$}"),
        };
        let text = match kind {
            Some('Y') => year.to_string(),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:>2}"),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(day_of_year, 3),
            Some('f') => "000000".to_string(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_string(),
            Some('B') => month_name.to_string(),
            Some('b' | 'h') => month_name[..3].to_string(),
            Some('A') => DAYS[weekday].to_string(),
            Some('a') => DAYS[weekday][..3].to_string(),
            Some('w') => ((weekday + 1) % 7).to_string(),
            Some('u') => (weekday + 1).to_string(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('R') => format!("{hour:02}:{minute:02}"),
            Some('D' | 'x') => format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
            Some('X') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('s') => seconds.to_string(),
            Some('Z') => String::new(),
            Some('z') => String::new(),
            Some('n') => "\n".to_string(),
            Some('t') => "\t".to_string(),
            Some('%') => "%".to_string(),
            other => {
                let found = other.map_or("%".to_string(), |c| format!("%{c}"));
                return Err(invalid(format!("strftime_now: `{found}` is not known")));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar; after Hinnant, "chrono-compatible
/// low-level date algorithms": years begin in March, so that the leap day is their last.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// The inverse of [`civil`].
fn day_number(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let shifted = (month + 9) % 12;
    let day_of_year = (153 * shifted + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_pythons() {
        for (x, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-1.5e300, "-1.5e+300"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (123456.789, "123456.789"),
        ] {
            assert_eq!(float(x), text);
        }
    }

    #[test]
    fn dates_are_pythons() {
        // 2024-02-29 13:04:05 UTC, a Thursday.
        let at = 1_709_211_845;
        for (format, text) in [
            ("%d %b %Y", "29 Feb 2024"),
            ("%A, %B %-d, %Y", "Thursday, February 29, 2024"),
            ("%Y-%m-%dT%H:%M:%S", "2024-02-29T13:04:05"),
            ("%I:%M %p %a %j %y %e %%", "01:04 PM Thu 060 24 29 %"),
            ("%F %T %R %u %w", "2024-02-29 13:04:05 13:04 4 4"),
        ] {
            assert_eq!(strftime(at, format).unwrap(), text);
        }
        assert_eq!(strftime(-1, "%F %T %a").unwrap(), "1969-12-31 23:59:59 Wed");
        assert!(
            strftime(0, "%Q").is_err() && strftime(0, "%").is_err() && strftime(0, "%-").is_err()
        );
        for day in (-800_000..800_000).step_by(97) {
            let (year, month, date) = civil(day);
            assert_eq!(day_number(year, month, date), day);
        }
    }
}
