//! Which layers a configuration means: PEFT's rules of matching names.

use regex::{Regex, RegexBuilder};

use super::config::{AdapterConfig, Targets};
use crate::error::{Error, Result};

/// The most that a compiled expression may take: a file cannot make the program take more.
const REGEX_BYTES: usize = 1 << 20;

/// A regular expression from a configuration.
pub(super) fn regex(key: &str, text: &str, around: (&str, &str)) -> Result<Regex> {
    let (before, after) = around;
    RegexBuilder::new(&format!("^{before}(?:{text}){after}$"))
        .size_limit(REGEX_BYTES)
        .build()
        .map_err(|e| {
            let reason = e.to_string();
            let last = reason.lines().last().unwrap_or_default();
            let what = format!(
                "{key}: \"{}\" is no regular expression that can be used ({last}); correct it",
                text.escape_debug()
            );
            Error::Adapter { what }
        })
}

/// Whether a module's name is `end`, or ends in it after a dot.
pub(super) fn ends_in(module: &str, end: &str) -> bool {
    module
        .strip_suffix(end)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Whether a module is `of`, or lies below a module whose name ends in that.
pub(super) fn is_within(module: &str, of: &str) -> bool {
    format!(".{module}.").contains(&format!(".{of}."))
}

/// The value of the first pattern that stands for a module.
pub(super) struct Patterns<T>(Vec<(Regex, T)>);

impl<T: Copy> Patterns<T> {
    pub fn new(key: &str, list: &[(String, T)]) -> Result<Patterns<T>> {
        let one = |(text, value): &(String, T)| Ok((regex(key, text, (r"(?:.*\.)?", ""))?, *value));
        Ok(Patterns(list.iter().map(one).collect::<Result<_>>()?))
    }

    pub fn of(&self, module: &str) -> Option<T> {
        let found = self.0.iter().find(|(regex, _)| regex.is_match(module));
        found.map(|(_, value)| *value)
    }

    /// The number of the first pattern that is the first match of none of some modules.
    pub fn idle(&self, modules: &[String]) -> Option<usize> {
        let first = |module: &String| self.0.iter().position(|(regex, _)| regex.is_match(module));
        let used: Vec<usize> = modules.iter().filter_map(first).collect();
        (0..self.0.len()).find(|i| !used.contains(i))
    }
}

/// A configuration's targets, ready to be asked.
pub(super) struct Matcher<'a> {
    config: &'a AdapterConfig,
    whole: Option<Regex>,
    /// A module's layer number is the first group of the first that matches
    numbers: Vec<Regex>,
}

impl<'a> Matcher<'a> {
    pub fn new(config: &'a AdapterConfig) -> Result<Matcher<'a>> {
        let whole = match &config.targets {
            Targets::Regex(text) => Some(regex("target_modules", text, ("", ""))?),
            Targets::AllLinear | Targets::Names(_) => None,
        };
        let numbers = match &config.layers_pattern[..] {
            [] => vec![regex("layers_pattern", "", (r".*?\.[^.]*\.(\d+)\.", ".*"))?],
            list => list
                .iter()
                .map(|text| regex("layers_pattern", text, (r"(?:.*?\.)?", r"\.(\d+)\..*")))
                .collect::<Result<_>>()?,
        };
        Ok(Matcher {
            config,
            whole,
            numbers,
        })
    }

    /// Whether a module is to have an adapter; `linear` says that it is a linear layer.
    pub fn matches(&self, module: &str, linear: bool) -> bool {
        let c = self.config;
        // Virtual tokens leave the modules that they stand beside as they are.
        let wraps = c.method.virtual_tokens() == 0;
        let kept = |name: &String| wraps && is_within(module, name);
        let excluded = |name: &String| ends_in(module, name);
        if c.modules_to_save.iter().any(kept) || c.exclude.iter().any(excluded) {
            return false;
        }
        match &c.targets {
            Targets::AllLinear => linear && self.is_of_layer(module),
            Targets::Names(names) => {
                // A full name is meant whatever its layer.
                names.iter().any(|name| name == module)
                    || (names.iter().any(|name| ends_in(module, name)) && self.is_of_layer(module))
            }
            Targets::Regex(_) => self.whole.as_ref().is_some_and(|w| w.is_match(module)),
        }
    }

    fn is_of_layer(&self, module: &str) -> bool {
        let Some(layers) = &self.config.layers else {
            return true;
        };
        let number = self.number(module);
        number.is_some_and(|number| layers.contains(&number))
    }

    /// The number of the layer that a module is in.
    pub fn number(&self, module: &str) -> Option<usize> {
        self.numbers.iter().find_map(|regex| {
            let found = regex.captures(module)?;
            found.get(1)?.as_str().parse::<usize>().ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapters::{Bias, LowRankConfig, Method};

    fn config(targets: Targets) -> AdapterConfig {
        AdapterConfig {
            method: Method::LowRank(LowRankConfig::lora(4)),
            targets,
            exclude: Vec::new(),
            layers: None,
            layers_pattern: Vec::new(),
            modules_to_save: vec!["classifier".into()],
            bias: Bias::None,
        }
    }

    fn names(list: &[&str]) -> Targets {
        Targets::Names(list.iter().map(|s| (*s).to_owned()).collect())
    }

    const QUERY: &str = "bert.encoder.layer.1.attention.self.query";
    const DENSE: &str = "bert.encoder.layer.1.attention.output.dense";

    #[test]
    fn names_are_matched_by_their_ends() {
        for (targets, module, expected) in [
            (names(&["query"]), QUERY, true),
            (names(&["uery"]), QUERY, false),
            (names(&[QUERY]), QUERY, true),
            (names(&["output.dense"]), DENSE, true),
            (names(&["query"]), DENSE, false),
            (Targets::AllLinear, DENSE, true),
            (Targets::AllLinear, "classifier", false),
            (Targets::AllLinear, "classifier.out_proj", false),
            (Targets::AllLinear, "pre_classifier", true),
            (Targets::Regex(r".*\.(query|value)".into()), QUERY, true),
            (Targets::Regex("query".into()), QUERY, false),
        ] {
            let config = config(targets);
            let matcher = Matcher::new(&config).unwrap();
            assert_eq!(
                matcher.matches(module, true),
                expected,
                "{config:?} {module}"
            );
        }
        let embedding = config(Targets::AllLinear);
        assert!(!Matcher::new(&embedding).unwrap().matches(QUERY, false));
    }

    #[test]
    fn layers_are_chosen_by_number() {
        let mut config = config(names(&["query", DENSE]));
        config.layers = Some(vec![0, 2]);
        let of = |config: &AdapterConfig, module: &str| {
            Matcher::new(config).unwrap().matches(module, true)
        };
        assert!(!of(&config, QUERY));
        assert!(of(&config, &QUERY.replace(".1.", ".2.")));
        assert!(!of(&config, &QUERY.replace(".1.", ".12.")));
        assert!(
            of(&config, DENSE),
            "a full name is meant whatever its layer"
        );
        config.layers_pattern = vec!["layer".into()];
        assert!(of(&config, &QUERY.replace(".1.", ".0.")));
        config.layers_pattern = vec!["h".into()];
        assert!(!of(&config, &QUERY.replace(".1.", ".0.")));
    }

    #[test]
    fn the_first_pattern_decides() {
        let list = |all: &[(&str, usize)]| -> Vec<(String, usize)> {
            all.iter().map(|(s, n)| ((*s).to_owned(), *n)).collect()
        };
        let patterns = |all: &[(&str, usize)]| Patterns::new("rank_pattern", &list(all));
        let found = patterns(&[("layer.1.attention.self.query", 2), ("query", 3)]).unwrap();
        assert_eq!(found.of(QUERY), Some(2));
        assert_eq!(found.of(&QUERY.replace(".1.", ".0.")), Some(3));
        assert_eq!(found.of(DENSE), None);
        assert_eq!(patterns(&[("uery", 2)]).unwrap().of(QUERY), None);
        assert_eq!(patterns(&[(r".*uery", 2)]).unwrap().of(QUERY), Some(2));
        let error = patterns(&[("que(ry", 2)]).err().unwrap().to_string();
        assert!(
            error.starts_with("rank_pattern: \"que(ry\" is no regular expression"),
            "{error}"
        );
    }
}
