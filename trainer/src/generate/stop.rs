//! Texts that end a generation, found in pieces.

/// Looks for the first of some texts in a text that comes in pieces, and holds back what may be its beginning.
#[derive(Debug)]
pub(super) struct Stops<'a> {
    stops: &'a [String],
    held: String,
}

impl<'a> Stops<'a> {
    /// None of `stops` is empty.
    pub fn new(stops: &'a [String]) -> Stops<'a> {
        Stops {
            stops,
            held: String::new(),
        }
    }

    /// Takes a piece; gives what is certain not to belong to a stop text, and whether one came.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop));
        if let Some(place) = found.min() {
            self.held.truncate(place);
            return (std::mem::take(&mut self.held), true);
        }
        // Where a stop text may have begun, at the earliest.
        let begins = |&place: &usize| {
            let rest = &self.held[place..];
            self.stops.iter().any(|stop| stop.starts_with(rest))
        };
        let places = self.held.char_indices().map(|(place, _)| place);
        let place = places.clone().find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(place);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back and turned out to be no stop text.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out of pieces, and whether a stop text came.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut search = Stops::new(&stops);
        let mut out = Vec::new();
        for piece in pieces {
            let (text, stopped) = search.push(piece);
            out.push(text);
            if stopped {
                return (out, true);
            }
        }
        out.push(search.finish());
        (out, false)
    }

    #[test]
    fn a_stop_text_is_found_across_pieces_and_never_shown() {
        let (out, stopped) = run(&["\n\n"], &["a\n", "b\n", "\nc"]);
        assert!(stopped);
        assert_eq!(out, ["a", "\nb", ""]);
        let (out, stopped) = run(&["END", "EN"], &["xE", "NDy"]);
        assert!(stopped);
        assert_eq!(out.concat(), "x");
    }

    #[test]
    fn the_first_one_counts() {
        let (out, stopped) = run(&["later", "é"], &["sooneré later"]);
        assert!(stopped);
        assert_eq!(out, ["sooner"]);
    }

    #[test]
    fn what_only_looked_like_one_comes_later() {
        let (out, stopped) = run(&["aab"], &["a", "a", "a", "ac", "aa"]);
        assert!(!stopped);
        assert_eq!(out, ["", "", "a", "aaac", "", "aa"]);
        let (out, stopped) = run(&[], &["a", "b"]);
        assert!(!stopped && out == ["a", "b", ""]);
    }
}
