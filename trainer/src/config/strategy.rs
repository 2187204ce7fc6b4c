//! What a run trains and how it goes about it, in one word or several joined by `+`.

use std::fmt;
use std::str::FromStr;

use graft_models::Strategy as Part;

use crate::nearest::nearest;

/// The factor per layer of `llrd` without a number.
const LLRD: f64 = 0.9;

/// Which parameters a run trains, before any rules: parts that are added up, and how they are gone about.
#[derive(Debug, Clone, PartialEq)]
pub struct Strategy {
    /// At least one, or an adapter; [`Part::Full`] stands alone.
    pub parts: Vec<Part>,
    /// Adapters beside frozen layers.
    pub adapter: Option<AdapterKind>,
    /// Whether they thaw one after the other from the top (ULMFiT; Howard and Ruder, 2018).
    pub gradual: Option<Gradual>,
    /// Factor of the learning rate from each layer to the one below it, in (0, 1); the head has the whole rate.
    pub llrd: Option<f64>,
}

/// What stands beside the frozen layers of a run that trains adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterKind {
    /// A low-rank matrix (E. Hu et al., 2022).
    Lora,
    /// The same, at a scale that does not fall with the rank (D. Kalajdzievski, 2023).
    RsLora,
    /// The same, with the lengths of the weights trained apart from their directions (S. Liu et al., 2024).
    Dora,
    /// Factors of outputs and inputs (H. Liu et al., 2022).
    Ia3,
    /// Two small layers behind attention and behind the feed-forward block (N. Houlsby et al., 2019).
    Bottleneck,
    /// Rows in front of each text's words (B. Lester et al., 2021).
    Prompt,
    /// Keys and values in front of each text's own, in every layer (X. Li and P. Liang, 2021).
    Prefix,
}

impl AdapterKind {
    /// The words, in the order in which they are told.
    pub const ALL: [(&'static str, AdapterKind); 7] = [
        ("lora", AdapterKind::Lora),
        ("rslora", AdapterKind::RsLora),
        ("dora", AdapterKind::Dora),
        ("ia3", AdapterKind::Ia3),
        ("adapter", AdapterKind::Bottleneck),
        ("prompt", AdapterKind::Prompt),
        ("prefix", AdapterKind::Prefix),
    ];

    /// Whether it is virtual tokens in front of each text.
    pub fn is_front(self) -> bool {
        matches!(self, AdapterKind::Prompt | AdapterKind::Prefix)
    }

    /// Whether it is a low-rank matrix.
    pub fn is_low_rank(self) -> bool {
        matches!(
            self,
            AdapterKind::Lora | AdapterKind::RsLora | AdapterKind::Dora
        )
    }

    /// The word.
    pub fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(_, kind)| *kind == self);
        found.map_or("", |(name, _)| name)
    }
}

/// How fast a model thaws.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gradual {
    /// As many layers more in each epoch as it takes to train all of them in the last.
    Even,
    /// This many layers more in each epoch.
    Layers(usize),
}

impl Strategy {
    /// One part, all of it from the first step on, at one rate.
    pub fn of(part: Part) -> Strategy {
        Strategy {
            parts: vec![part],
            adapter: None,
            gradual: None,
            llrd: None,
        }
    }

    /// Everything, from the first step on, at one rate.
    pub fn full() -> Strategy {
        Strategy::of(Part::Full)
    }

    /// Whether some parameter is trained in no step, or not in the first.
    pub fn freezes(&self) -> bool {
        self.parts != [Part::Full] || self.gradual.is_some()
    }

    /// Refuses what contradicts itself.
    fn check(&self) -> Result<(), String> {
        let only_head = self.parts == [Part::Head] && self.adapter.is_none();
        let others = self.parts.len() > 1 || self.adapter.is_some();
        if others && self.parts.contains(&Part::Full) {
            return Err(
                "`full` trains everything already: leave out what is beside it, or `full`"
                    .to_owned(),
            );
        }
        if only_head && self.gradual.is_some() {
            return Err("`gradual` thaws what is below the head, and `head` leaves it frozen: add what it should \
                        thaw, as in last:4+gradual, or leave one out"
                .to_owned());
        }
        if only_head && self.llrd.is_some() {
            return Err("`llrd` slows what is below the head, and `head` leaves it frozen: add what it should slow, \
                        as in last:4+llrd, or leave one out"
                .to_owned());
        }
        Ok(())
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(kind) = self.adapter {
            f.write_str(kind.name())?;
        }
        for (i, part) in self.parts.iter().enumerate() {
            let first = i == 0 && self.adapter.is_none();
            f.write_str(if first { "" } else { "+" })?;
            match part {
                Part::Head => f.write_str("head")?,
                Part::Last(layers) => write!(f, "last:{layers}")?,
                Part::Bitfit => f.write_str("bitfit")?,
                Part::Norms => f.write_str("norms")?,
                Part::Full => f.write_str("full")?,
            }
        }
        match self.gradual {
            None => {}
            Some(Gradual::Even) => f.write_str("+gradual")?,
            Some(Gradual::Layers(layers)) => write!(f, "+gradual:{layers}")?,
        }
        match self.llrd {
            None => Ok(()),
            Some(factor) => write!(f, "+llrd:{factor}"),
        }
    }
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut strategy = Strategy {
            parts: Vec::new(),
            adapter: None,
            gradual: None,
            llrd: None,
        };
        let mut seen: Vec<&str> = Vec::new();
        for word in text.split('+').map(str::trim) {
            let (name, value) = match word.split_once(':') {
                Some((name, value)) => (name, Some(value)),
                None => (word, None),
            };
            if seen.contains(&name) {
                return Err(format!("`{name}` stands twice in `{text}`: leave one out"));
            }
            seen.push(name);
            let layers = |value: &str| match value.parse() {
                Ok(layers) if layers >= 1 => Ok(layers),
                _ => Err(format!(
                    "`{value}` in `{word}` is no number of layers, 1 or more"
                )),
            };
            match (name, value) {
                ("head", None) => strategy.parts.push(Part::Head),
                ("full", None) => strategy.parts.push(Part::Full),
                ("bitfit", None) => strategy.parts.push(Part::Bitfit),
                ("norms", None) => strategy.parts.push(Part::Norms),
                ("last", Some(value)) => strategy.parts.push(Part::Last(layers(value)?)),
                ("last", None) => return Err("how many layers? write last:2".to_owned()),
                ("gradual", None) => strategy.gradual = Some(Gradual::Even),
                ("gradual", Some(value)) => {
                    strategy.gradual = Some(Gradual::Layers(layers(value)?));
                }
                ("llrd", None) => strategy.llrd = Some(LLRD),
                ("llrd", Some(value)) => match value.parse() {
                    Ok(factor) if factor > 0.0 && factor < 1.0 => strategy.llrd = Some(factor),
                    _ => {
                        return Err(format!(
                            "`{value}` in `{word}` is no factor per layer, above 0 and below 1"
                        ));
                    }
                },
                (word, None) if adapter_named(word).is_some() => {
                    if let Some(other) = strategy.adapter {
                        let other = other.name();
                        return Err(format!(
                            "`{other}` and `{word}`: a layer has one adapter, leave one out"
                        ));
                    }
                    strategy.adapter = adapter_named(word);
                }
                _ => return Err(unknown(word, name, value)),
            }
        }
        if strategy.parts.is_empty() && strategy.adapter.is_none() {
            strategy.parts.push(Part::Full);
        }
        strategy.check()?;
        Ok(strategy)
    }
}

fn adapter_named(word: &str) -> Option<AdapterKind> {
    let found = AdapterKind::ALL.iter().find(|(name, _)| *name == word);
    found.map(|(_, kind)| *kind)
}

fn unknown(word: &str, name: &str, value: Option<&str>) -> String {
    let parts = ["head", "last:1", "full", "last", "bitfit", "norms"];
    let adapters = AdapterKind::ALL.map(|(name, _)| name);
    let names = [&parts[..], &adapters, &["gradual", "llrd"]].concat();
    if value.is_some() && names.contains(&name) {
        return format!("`{name}` takes no number: write `{name}` in place of `{word}`");
    }
    match nearest(word, names) {
        Some("last" | "last:1") => "how many layers? write last:2".to_owned(),
        Some(near) => format!("did you mean `{near}`?"),
        None => format!(
            "expected head, last:K, bitfit, norms, {} or full, with gradual and llrd, joined by +",
            adapters.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strategies_print_as_they_parse() {
        for text in [
            "head",
            "full",
            "last:1",
            "last:12",
            "bitfit",
            "norms",
            "bitfit+norms",
            "last:2+norms",
            "full+gradual",
            "last:4+gradual:2",
            "full+llrd:0.8",
            "bitfit+gradual+llrd:0.95",
            "lora",
            "rslora+norms",
            "dora+head+llrd:0.9",
            "ia3",
            "adapter+norms",
            "prompt",
            "prefix+head",
        ] {
            let strategy: Strategy = text.parse().unwrap();
            assert_eq!(strategy.to_string(), text);
            assert_eq!(strategy.to_string().parse::<Strategy>().unwrap(), strategy);
        }
        // Alone, ways to go about it are about everything.
        for (short, long) in [
            ("gradual", "full+gradual"),
            ("llrd", "full+llrd:0.9"),
            ("llrd + gradual", "full+gradual+llrd:0.9"),
            ("llrd:0.5+last:2", "last:2+llrd:0.5"),
        ] {
            assert_eq!(short.parse::<Strategy>().unwrap().to_string(), long);
        }
    }

    #[test]
    fn what_contradicts_itself_says_what_to_do() {
        for (text, wanted) in [
            ("last:0", "1 or more"),
            ("last:x", "`x`"),
            ("heads", "`head`"),
            ("last", "last:2"),
            ("", "expected head"),
            ("norm", "`norms`"),
            ("bitfit:2", "takes no number"),
            ("full+norms", "leave out what is beside it"),
            ("head+gradual", "last:4+gradual"),
            ("head+llrd", "last:4+llrd"),
            ("last:2+last:3", "`last` stands twice"),
            ("llrd:1", "below 1"),
            ("llrd:0", "above 0"),
            ("gradual:0", "1 or more"),
            ("head+", "expected head"),
            ("lora+dora", "a layer has one adapter"),
            ("lora+full", "leave out what is beside it"),
            ("lroa", "`lora`"),
            ("lora:8", "takes no number"),
        ] {
            let error = text.parse::<Strategy>().unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }

    #[test]
    fn what_freezes() {
        for (text, freezes) in [
            ("full", false),
            ("llrd", false),
            ("gradual", true),
            ("norms", true),
        ] {
            assert_eq!(
                text.parse::<Strategy>().unwrap().freezes(),
                freezes,
                "{text}"
            );
        }
    }
}
